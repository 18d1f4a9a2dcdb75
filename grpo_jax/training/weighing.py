"""From rewards to prompt weights, token weights and group metrics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_statistics, group_std, overlong_punishment
from grpo_jax.models.forward import completion_hidden
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.loss import baselined, present_mask
from grpo_jax.objectives.objective import Objective
from grpo_jax.objectives.token_weights import (
    conflict_weights,
    nthr_weights,
    overlong_weights,
)
from grpo_jax.preconditioner import PromptWeights, apply_weights
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training.state import shape_rewards


class Weighed(NamedTuple):
    """Rollouts to train on, weighed."""

    rollouts: Rollouts  # [P, G, T]
    shaped_rewards: jax.Array  # [P, G], what the weights multiply
    added_rewards: jax.Array | None  # [P, G], what they do not
    weights: jax.Array  # [P]
    weights_state: Any  # the rule's, with these rewards in it
    metrics: dict[str, jax.Array]  # scalars


def weigh(
    objective: Objective,
    rule: PromptWeights,
    rollouts: Rollouts,
    reference_logprobs: jax.Array | None,
    prompt_ids: jax.Array,
    weights_state: Any,
    *,
    max_length: int | None,
) -> Weighed:
    """Prompt weights of scored rollouts; once per rollout, before its updates.

    Metrics are those of the rewards as scored, but for the informative groups, which
    are those that the weights tell apart; the rollouts to train on may have been
    punished for their length.

    Args:
        objective: What shapes the rewards.
        rule: What turns them into weights.
        rollouts: [P, G, T] completions with rewards [P, G], and with what is paid for
            solving where the rule is one for pass rates and the rewards are none.
        reference_logprobs: [P, G, T], needed by KL in the reward.
        prompt_ids: [P] int32, for rules that remember prompts.
        weights_state: The rule's.
        max_length: Tokens that a completion may have; None: not read.
    """
    trained, punishment = rollouts, None
    if objective.overlong == "punish":
        assert max_length is not None  # `Learner` asks for it
        cache = max(1, round(objective.overlong_share * max_length))
        lengths = rollouts.completion_mask.sum(-1)
        punishment = overlong_punishment(lengths, max_length, cache)
        punished = rollouts.scored_rewards + punishment
        trained = rollouts._replace(
            rewards=punished.astype(rollouts.scored_rewards.dtype)
        )
    told_apart = rollouts if rule.pass_rates else rollouts._replace(solving=None)
    shaped = shape_rewards(objective, told_apart, reference_logprobs, punishment)
    weights, state = apply_weights(rule, shaped.judged, weights_state, prompt_ids)
    metrics = group_metrics(rollouts, weights, shaped.judged)
    return Weighed(trained, shaped.weighed, shaped.added, weights, state, metrics)


def group_metrics(
    rollouts: Rollouts, weights: jax.Array, judged: jax.Array
) -> dict[str, jax.Array]:
    """Scalar metrics of rewards [P, G], their groups, weights [P] and lengths.

    A mean of no rewards is NaN.

    Args:
        rollouts: [P, G, T] as scored.
        weights: [P], of the prompts.
        judged: [P, G], the rewards that the weights were made of.
    """
    statistics = group_statistics(rollouts.scored_rewards)
    std, _ = group_std(rollouts.scored_rewards)
    present = statistics.present.sum()
    total = (statistics.mean * statistics.count).sum()
    lengths = rollouts.completion_mask.sum(-1)
    # A group smaller than G has places with neither tokens nor a reward.
    samples = ((lengths > 0) | statistics.present).sum()
    informative = ~group_statistics(judged).tied
    return {
        "reward/mean": total / present,
        "reward/missing": samples - present,
        "group/informative": informative.mean(),
        "group/std_mean": std.sum() / (statistics.count > 0).sum(),
        "weights/mean": weights.mean(),
        "weights/min": weights.min(),
        "weights/max": weights.max(),
        "completion/length_mean": lengths.sum() / samples,
        "tokens/completion": lengths.sum(),
    }


def has_token_weights(objective: Objective) -> bool:
    """Whether the objective weighs tokens once per rollout, by `token_weights`."""
    return objective.token_weight != "none" or objective.overlong == "mask"


def token_weights(
    objective: Objective,
    policy: Policy,
    rollouts: Rollouts,
    *,
    temperature: float,
    eos_id: int | Sequence[int],
) -> jax.Array:
    """[P, G, T] float32: the product of the factors that the objective asks for.

    Args:
        objective: Its `token_weight` and `overlong` choose the factors.
        policy: The policy that sampled, for NTHR's hidden states.
        rollouts: [P, G, T] completions with rewards [P, G].
        temperature: The sampling temperature.
        eos_id: Tokens that end a completion.
    """
    mask = present_mask(rollouts.completion_mask, rollouts.scored_rewards)
    weights = jnp.ones_like(mask)
    if objective.token_weight == "conflict":
        signs = baselined(objective, rollouts.scored_rewards)
        weights *= conflict_weights(rollouts.completions, signs, mask)
    if objective.token_weight == "nthr":
        weights *= _nthr_weights(policy, rollouts, mask, temperature)
    if objective.overlong == "mask":
        weights *= overlong_weights(rollouts.completions, mask, eos_id)
    return weights


def _nthr_weights(
    policy: Policy, rollouts: Rollouts, mask: jax.Array, temperature: float
) -> jax.Array:
    """[P, G, T] `nthr_weights`, one prompt at a time: influences are [G T, G T]."""

    def one_prompt(group: tuple[jax.Array, ...]) -> jax.Array:
        prompt, prompt_mask, completions, rewards, mask = (x[None] for x in group)
        model = policy.module()
        hidden = completion_hidden(model, prompt, prompt_mask, completions)
        return nthr_weights(
            hidden,
            model.unembedding_matrix(),
            completions,
            rewards,
            mask,
            temperature=temperature,
            softcap=policy.config.logit_softcap,
        )[0]

    r = rollouts
    groups = (r.prompts, r.prompt_mask, r.completions, r.rewards, mask)
    return jax.lax.map(one_prompt, groups)
