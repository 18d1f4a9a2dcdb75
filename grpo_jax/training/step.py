"""The update: a pure function of state and rollouts, jitted once.

One `jax.vjp` of the [P] losses per micro-batch, pulled back through the prompt weights:
the cotangent form of the preconditioner. Group statistics, denominators and weights are
those of the whole batch, so how it is split changes no gradient.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.advantages import group_statistics, group_std
from grpo_jax.logprobs import token_logprobs
from grpo_jax.models.decoder import Policy, completion_hidden
from grpo_jax.objectives.aggregation import token_coefficients
from grpo_jax.objectives.loss import (
    baselined,
    loss_kl_coef,
    present_mask,
    prompt_terms,
    shaped_rewards,
)
from grpo_jax.objectives.presets import Objective
from grpo_jax.preconditioner import PromptWeights, std_weights, unit_weights
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training.config import OptimizerConfig


class TrainState(NamedTuple):
    """All that an update changes; checkpointed whole."""

    params: Any  # float32
    opt_state: Any
    weights_state: Any  # of the prompt weights
    updates: jax.Array  # int32, optimizer updates applied
    skipped_in_a_row: jax.Array  # int32, updates skipped for a non-finite gradient


class Batch(NamedTuple):
    """Scored rollouts and the log-probs that the objective needs beside them."""

    rollouts: Rollouts
    old_logprobs: jax.Array | None  # [P, G, T] before the first of several updates
    reference_logprobs: jax.Array | None  # [P, G, T] of the starting policy


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """How a batch is split: `prompts` x `samples` at a time, divisors of P and G."""

    prompts: int
    samples: int


def micro_batch(
    num_prompts: int, group_size: int, prompt_tokens: int, max_tokens: int, budget: int
) -> MicroBatch:
    """The largest split into equal parts of at most `budget` tokens (at least 1 x 1).

    A part of p prompts and g samples holds p * (prompt_tokens + g * max_tokens) tokens.
    Whole groups are preferred: their prompt is encoded once.
    """

    def fits(p, g):
        return p * (prompt_tokens + g * max_tokens) <= budget

    for p in _divisors(num_prompts):
        if fits(p, group_size):
            return MicroBatch(p, group_size)
    for g in _divisors(group_size):
        if fits(1, g):
            return MicroBatch(1, g)
    return MicroBatch(1, 1)


def _divisors(n):
    """Of n, the largest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)


def split_batch(tree: Any, micro: MicroBatch, group_axis: bool) -> Any:
    """Leaves [P, ...] or [P, G, ...] to [parts, p, ...] or [parts, p, g, ...]."""

    def split(x):
        p = x.shape[0] // micro.prompts
        x = x.reshape(p, micro.prompts, *x.shape[1:])
        if not group_axis:
            return x
        g = x.shape[2] // micro.samples
        x = x.reshape(p, micro.prompts, g, micro.samples, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(p * g, *x.shape[1:2], *x.shape[3:])

    return jax.tree.map(split, tree)


def repeat_parts(tree: Any, times: int) -> Any:
    """Prompt-wise leaves [parts, p, ...] once per split of their groups."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def batch_logprobs(
    policy: Policy, rollouts: Rollouts, temperature: float, micro: MicroBatch
) -> jax.Array:
    """[P, G, T] log-probs of the completions, micro-batch by micro-batch."""
    p, g, t = rollouts.completions.shape
    times = g // micro.samples
    prompts = split_batch((rollouts.prompts, rollouts.prompt_mask), micro, False)
    parts = (
        repeat_parts(prompts, times),
        split_batch(rollouts.completions, micro, True),
    )

    def part(x):
        (prompts, prompt_mask), completions = x
        return _logprobs(policy, prompts, prompt_mask, completions, temperature)

    logprobs = jax.lax.map(part, parts)  # [parts, p, g, T]
    logprobs = logprobs.reshape(-1, times, micro.prompts, micro.samples, t)
    logprobs = logprobs.swapaxes(1, 2).reshape(p, g, t)
    return jnp.where(rollouts.completion_mask.astype(bool), logprobs, 0.0)


def _logprobs(policy, prompts, prompt_mask, completions, temperature):
    model = policy.module()
    hidden = completion_hidden(model, prompts, prompt_mask, completions)
    return token_logprobs(
        hidden, model.unembedding_matrix(), completions, temperature=temperature
    )


def objective_weights(objective: Objective) -> PromptWeights:
    """The prompt weights that an objective's scale stands for."""
    if objective.scale == "std":
        return std_weights(eps=objective.std_eps, ddof=objective.std_ddof)
    return unit_weights()


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate over optimizer updates: linear warm-up, then the named decay."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = max(1, total_updates - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay),
    }[config.schedule]()
    if not warmup:
        return after
    # The first update moves already: rate peak / warmup, not 0.
    rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW; decay on matrices only (not norms, not biases)."""
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _decayed(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding", "unembedding"), params
    )


def init_state(
    params: Any, optimizer: optax.GradientTransformation, weights: PromptWeights
) -> TrainState:
    # Two arrays, not one twice: a donated buffer may be given away only once.
    zeros = (jnp.zeros((), jnp.int32) for _ in range(2))
    return TrainState(params, optimizer.init(params), weights.init(), *zeros)


def make_train_step(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    prompt_weights: PromptWeights,
    micro: MicroBatch,
    temperature: float,
    max_length: int,
):
    """train_step(state, batch) -> (state, metrics), pure; jit it with donated state.

    On policy (batch.old_logprobs is None) the behaviour policy is the current one:
    `stop_gradient(logprobs)` stands for it and the ratio is exactly 1. The sampler's
    own log-probs serve the mismatch metric, and KL where it is in the reward.

    An update that is not finite changes nothing but `skipped_in_a_row`.
    """
    kl_coef = loss_kl_coef(objective)

    def gradients(params, weights_state, batch):
        rollouts = batch.rollouts
        mask = present_mask(rollouts.completion_mask, rollouts.rewards)
        rewards = shaped_rewards(
            objective,
            rollouts.rewards,
            rollouts.behaviour_logprobs,
            batch.reference_logprobs,
            mask,
        )
        weights, weights_state = prompt_weights.weights(rewards, weights_state)
        per_sample = {
            "completions": rollouts.completions,
            "sampled_logprobs": rollouts.behaviour_logprobs,
            "old_logprobs": batch.old_logprobs,
            "reference_logprobs": batch.reference_logprobs,
            "advantages": baselined(objective, rewards),
            "coefficients": token_coefficients(objective.aggregation, mask, max_length),
            "token_shares": mask / jnp.maximum(mask.sum(), 1),
            "sampled": rollouts.completion_mask.astype(bool),
        }
        per_prompt = {
            "prompts": rollouts.prompts,
            "prompt_mask": rollouts.prompt_mask,
            "cotangent": (
                weights / weights.size,
                jnp.full_like(weights, kl_coef / weights.size),
            ),
        }
        parts = repeat_parts(
            split_batch(per_prompt, micro, False),
            rollouts.completions.shape[1] // micro.samples,
        ) | split_batch(per_sample, micro, True)

        def add_part(total, part):
            result = _part_gradients(params, part)
            return jax.tree.map(jnp.add, total, result[:2]), result[2]

        def _part_gradients(params, part):
            def losses(params):
                logprobs = _logprobs(
                    policy.replace(params),
                    part["prompts"],
                    part["prompt_mask"],
                    part["completions"],
                    temperature,
                )
                old = part["old_logprobs"]
                surrogate, kl, metrics = prompt_terms(
                    objective,
                    logprobs=logprobs,
                    behaviour_logprobs=logprobs if old is None else old,
                    advantages=part["advantages"],
                    coefficients=part["coefficients"],
                    token_shares=part["token_shares"],
                    reference_logprobs=part["reference_logprobs"],
                )
                shares, live = part["token_shares"], part["token_shares"] > 0
                metrics["entropy/sampled"] = -(
                    shares * jnp.where(live, logprobs, 0)
                ).sum()
                before = logprobs if old is None else old
                gap = jnp.where(part["sampled"], before - part["sampled_logprobs"], 0)
                metrics["loss/policy"] = part["cotangent"][0] @ surrogate
                metrics["loss/kl"] = part["cotangent"][1] @ kl
                return (surrogate, kl), (metrics, jnp.abs(gap).max())

            _, pull_back, (metrics, gap) = jax.vjp(losses, params, has_aux=True)
            (grads,) = pull_back(part["cotangent"])
            return grads, jax.lax.stop_gradient(metrics), gap

        first = jax.tree.map(lambda x: x[0], parts)
        if micro.prompts == rollouts.prompts.shape[0] and (
            micro.samples == rollouts.completions.shape[1]
        ):
            grads, metrics, gaps = _part_gradients(params, first)
        else:
            shapes = jax.eval_shape(_part_gradients, params, first)[:2]
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), gaps = jax.lax.scan(add_part, zeros, parts)
        metrics["mismatch/max_abs"] = gaps.max()
        return grads, weights_state, metrics | group_metrics(rollouts, weights)

    def train_step(state: TrainState, batch: Batch):
        grads, weights_state, metrics = gradients(
            state.params, state.weights_state, batch
        )
        norm = optax.tree.norm(grads)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        change_norm = optax.tree.norm(changes)
        finite = jnp.isfinite(norm) & jnp.isfinite(change_norm)
        params = optax.apply_updates(state.params, changes)
        params, opt_state, weights_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, weights_state),
            (state.params, state.opt_state, state.weights_state),
        )
        state = TrainState(
            params,
            opt_state,
            weights_state,
            state.updates + finite,
            jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "gradient/norm": norm,
            "update/norm": jnp.where(finite, change_norm, 0.0),
            "update/applied": state.updates,
            "update/skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step


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
