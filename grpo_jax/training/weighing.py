"""From rewards to prompt weights, token weights and group metrics."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_statistics, group_std, overlong_punishment
from grpo_jax.models.forward import completion_hidden
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.loss import baselined, present_mask, shaped_rewards
from grpo_jax.objectives.presets import Objective
from grpo_jax.objectives.token_weights import (
    conflict_weights,
    nthr_weights,
    overlong_weights,
)
from grpo_jax.preconditioner import PromptWeights, apply_weights
from grpo_jax.rollouts.types import Rollouts


def has_token_weights(objective: Objective) -> bool:
    """Whether `token_weights` makes any for the objective."""
    return objective.token_weight != "none" or objective.overlong == "mask"


def token_weights(
    objective: Objective,
    policy: Policy,
    rollouts: Rollouts,
    *,
    temperature: float,
    eos_id: int | Sequence[int],
) -> jax.Array:
    """[P, G, T]: the product of the factors that the objective asks for."""
    mask = present_mask(rollouts.completion_mask, rollouts.rewards)
    weights = jnp.ones_like(mask)
    if objective.token_weight == "conflict":
        signs = baselined(objective, rollouts.rewards)
        weights *= conflict_weights(rollouts.completions, signs, mask)
    if objective.token_weight == "nthr":

        def one_prompt(x):
            prompt, prompt_mask, completions, rewards, mask = (y[None] for y in x)
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

        groups = (
            rollouts.prompts,
            rollouts.prompt_mask,
            rollouts.completions,
            rollouts.rewards,
            mask,
        )
        weights *= jax.lax.map(one_prompt, groups)
    if objective.overlong == "mask":
        weights *= overlong_weights(rollouts.completions, mask, eos_id)
    return weights


def weigh(
    objective: Objective,
    rule: PromptWeights,
    rollouts: Rollouts,
    reference_logprobs: jax.Array | None,
    prompt_ids: jax.Array,
    state: Any,
    *,
    max_length: int,
) -> tuple[Rollouts, jax.Array, Any, dict[str, jax.Array]]:
    """(rollouts to train on, weights [P], the rule's new state, metrics).

    Once per rollouts, however many updates are made from them. The metrics are of the
    rewards as scored; what is trained on may have been punished for its length.
    """
    trained = rollouts
    if objective.overlong == "punish":
        cache = max(1, round(objective.overlong_share * max_length))
        lengths = rollouts.completion_mask.sum(-1)
        punished = rollouts.rewards + overlong_punishment(lengths, max_length, cache)
        trained = rollouts._replace(rewards=punished.astype(rollouts.rewards.dtype))
    rewards = shaped_rewards(
        objective,
        trained.rewards,
        rollouts.behaviour_logprobs,
        reference_logprobs,
        present_mask(rollouts.completion_mask, rollouts.rewards),
    )
    weights, state = apply_weights(rule, rewards, state, prompt_ids)
    return trained, weights, state, group_metrics(rollouts, weights)


def group_metrics(rollouts: Rollouts, weights: jax.Array) -> dict[str, jax.Array]:
    """What the rewards of a batch look like, group by group."""
    statistics = group_statistics(rollouts.rewards)
    std, tied = group_std(rollouts.rewards)
    present = statistics.present.sum()
    total = (statistics.mean * statistics.count).sum()
    lengths = rollouts.completion_mask.sum(-1)
    informative = ~tied
    return {
        "reward/mean": total / jnp.maximum(present, 1),
        "reward/missing": statistics.present.size - present,
        "group/informative": informative.mean(),
        "group/std_mean": std.mean(),
        "weights/mean": weights.mean(),
        "weights/max": weights.max(),
        "completion/length_mean": lengths.mean(),
        "tokens/completion": lengths.sum(),
    }
