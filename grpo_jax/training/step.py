"""The update: a pure function of state and batch, jitted once.

One `jax.vjp` of the [P] losses per micro-batch, pulled back through the prompt weights:
the cotangent form of the preconditioner. Group statistics, denominators and weights are
those of the full batch, so how it is split changes no gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.models.forward import teacher_forced
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.aggregation import token_coefficients
from grpo_jax.objectives.loss import (
    ShapedRewards,
    baselined,
    nan_without_tokens,
    needs_entropy,
    present_mask,
    prompt_terms,
    weighed_advantages,
)
from grpo_jax.objectives.objective import Objective
from grpo_jax.objectives.token_weights import truncated_importance_weights
from grpo_jax.parallel.gathers import in_one_part
from grpo_jax.parallel.sharding import constrain_params
from grpo_jax.rollouts.micro_batches import MicroBatch, repeat_parts, split_batch
from grpo_jax.training.state import Batch, TrainState

Metrics = dict[str, jax.Array]  # scalars
Gradients = Callable[[Policy, Batch], tuple[Any, Metrics]]


class PromptTerms(NamedTuple):
    """A batch's arrays with one row per prompt."""

    prompts: jax.Array  # [P, L]
    prompt_mask: jax.Array  # [P, L]
    surrogate_cotangent: jax.Array  # [P], prompt weights / P, or 1 / P if in advantages
    penalty_cotangent: jax.Array  # [P], 1 / P


class SampleTerms(NamedTuple):
    """A batch's arrays with one entry per completion, constants of the loss."""

    completions: jax.Array  # [P, G, T]
    sampled_logprobs: jax.Array  # [P, G, T], the sampler's
    old_logprobs: jax.Array | None  # [P, G, T]; None: on policy
    reference_logprobs: jax.Array | None  # [P, G, T]
    token_weights: jax.Array | None  # [P, G, T]
    advantages: jax.Array  # [P, G]; prompt weights left out where they are a cotangent
    coefficients: jax.Array  # [P, G, T], the aggregation's
    token_shares: jax.Array  # [P, G, T], 1 / all tokens of the batch
    newest_shares: jax.Array  # [P, G, T], 1 / all tokens whose sampler still exists


class Part(NamedTuple):
    """One micro-batch."""

    prompt: PromptTerms
    sample: SampleTerms


def batch_terms(objective: Objective, batch: Batch, max_length: int | None) -> Part:
    """The full batch as one `Part`: the arrays of the loss, with batch statistics."""
    rollouts, weights = batch.rollouts, batch.weights
    mask = present_mask(rollouts.completion_mask, rollouts.scored_rewards)
    prompts = len(weights)
    # Sampler/trainer mismatch cannot be measured on older rollouts of a history: the
    # parameters that sampled them are gone.
    newest = jnp.arange(prompts) < prompts // objective.history
    newest = rollouts.completion_mask.astype(bool) & newest[:, None, None]  # [P, G, T]
    advantages, factors = baselined(objective, batch.shaped_rewards), weights
    if batch.added_rewards is not None:  # the weights are those of one part alone
        shaped = batch.shaped_rewards
        shaped = ShapedRewards(shaped, shaped, batch.added_rewards)
        advantages = weighed_advantages(objective, shaped, weights)
        factors = jnp.ones_like(weights)
    return Part(
        PromptTerms(
            rollouts.prompts,
            rollouts.prompt_mask,
            factors / weights.size,
            jnp.full_like(weights, 1 / weights.size),
        ),
        SampleTerms(
            completions=rollouts.completions,
            sampled_logprobs=rollouts.behaviour_logprobs,
            old_logprobs=batch.old_logprobs,
            reference_logprobs=batch.reference_logprobs,
            token_weights=batch.token_weights,
            advantages=advantages,
            coefficients=token_coefficients(
                objective.aggregation, mask, max_length, objective.first_token_weight
            ),
            token_shares=mask / jnp.maximum(mask.sum(), 1),
            newest_shares=newest / jnp.maximum(newest.sum(), 1),
        ),
    )


def log_prob_change(batch: Part, gain: jax.Array) -> jax.Array:
    """How far an update moves its own samples' log-probs, at least, to first order.

    The loss is sum_i q_i s_i log pi_i over tokens i, q_i the aggregation's coefficient
    over P and s_i the weighted advantage. So its change is `gain` = sum_i q_i s_i d_i,
    with d_i the change of a log-prob, and by Cauchy and Schwarz
    rms_q(d) >= |gain| / sqrt(sum_i q_i s_i^2 sum_i q_i). Half rms_q(d)^2 is
    about the KL between the policies before and after, to second order. The bound is
    one where the loss has no other terms and a surrogate's slope is the advantage.

    Args:
        batch: [P, G, T] coefficients and [P, G] advantages of the full batch.
        gain: [], gradient times change of the parameters.

    Returns:
        [] float32, in nats per token; 0 where no sample has an advantage.
    """
    prompt, sample = batch
    factors = prompt.surrogate_cotangent / prompt.penalty_cotangent  # [P]
    slopes = sample.advantages * factors[:, None]  # [P, G]
    q = (sample.coefficients * prompt.penalty_cotangent[:, None, None]).sum(-1)
    squares = (q * slopes**2).sum() * q.sum()
    known = squares > 0
    return jnp.where(known, jnp.abs(gain) / jnp.sqrt(jnp.where(known, squares, 1)), 0)


def part_losses(
    objective: Objective, policy: Policy, part: Part, temperature: float
) -> tuple[tuple[jax.Array, jax.Array], tuple[Metrics, jax.Array]]:
    """((surrogate [P], penalty [P]), (metrics, largest mismatch)) of one micro-batch.

    Metrics of all parts of a batch add up to the batch's.
    """
    prompt, sample = part
    wants_entropy = needs_entropy(objective)
    scored = teacher_forced(
        policy,
        prompt.prompts,
        prompt.prompt_mask,
        sample.completions,
        temperature,
        entropy=wants_entropy,
    )
    logprobs, entropy = scored if wants_entropy else (scored, None)
    old = logprobs if sample.old_logprobs is None else sample.old_logprobs
    factors = [] if sample.token_weights is None else [sample.token_weights]
    if objective.tis_cap is not None:
        factors.append(
            truncated_importance_weights(
                old, sample.sampled_logprobs, objective.tis_cap
            )
        )
    surrogate, penalty, metrics = prompt_terms(
        objective,
        logprobs=logprobs,
        behaviour_logprobs=old,
        advantages=sample.advantages,
        coefficients=sample.coefficients,
        token_shares=sample.token_shares,
        reference_logprobs=sample.reference_logprobs,
        entropy=entropy,
        token_weights=factors,
    )
    shares = sample.token_shares
    metrics["entropy/sampled"] = -(shares * jnp.where(shares > 0, logprobs, 0)).sum()
    metrics["loss/policy"] = (prompt.surrogate_cotangent * surrogate).sum()
    metrics["loss/penalty"] = (prompt.penalty_cotangent * penalty).sum()
    trainers = logprobs if objective.history > 1 else old
    gaps = jnp.abs(trainers - sample.sampled_logprobs)
    gaps = jnp.where(sample.newest_shares > 0, gaps, 0)
    metrics["mismatch/mean_abs"] = (sample.newest_shares * gaps).sum()
    return (surrogate, penalty), (metrics, gaps.max())


def make_gradients(
    objective: Objective,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int | None,
) -> Gradients:
    """gradients(policy, batch) -> (gradient of the loss by policy.params, metrics).

    On policy (batch.old_logprobs is None) the behaviour policy is the current one:
    `stop_gradient(logprobs)` replaces its log-probs and the ratio is exactly 1. The
    sampler's log-probs serve the mismatch metric, and KL in the reward.

    Args:
        objective: Whose loss, under the batch's prompt weights.
        micro: Prompts and samples per backward pass.
        temperature: The sampling temperature.
        max_length: Tokens that a completion may have; None: not read.
    """

    def part_gradients(policy: Policy, part: Part) -> tuple[Any, Metrics, jax.Array]:
        def losses(params: Any):
            current = policy.replace(params)
            return part_losses(objective, current, part, temperature)

        _, pull_back, (metrics, gap) = jax.vjp(losses, policy.params, has_aux=True)
        prompt = part.prompt
        (grads,) = pull_back((prompt.surrogate_cotangent, prompt.penalty_cotangent))
        return constrain_params(grads), jax.lax.stop_gradient(metrics), gap

    def gradients(policy: Policy, batch: Batch) -> tuple[Any, Metrics]:
        whole = batch_terms(objective, batch, max_length)
        parts = _split(whole, micro)
        first = jax.tree.map(lambda x: x[0], parts)
        if batch.rollouts.completions.shape[:2] == (micro.prompts, micro.samples):
            with in_one_part():
                grads, metrics, gaps = part_gradients(policy, first)
        else:

            def add_part(total: Any, part: Part):
                result = part_gradients(policy, part)
                return jax.tree.map(jnp.add, total, result[:2]), result[2]

            shapes = jax.eval_shape(part_gradients, policy, first)[:2]
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), gaps = jax.lax.scan(add_part, zeros, parts)
        metrics = nan_without_tokens(metrics, whole.sample.token_shares)
        metrics["mismatch/max_abs"] = gaps.max()
        return grads, metrics

    return gradients


def _split(batch: Part, micro: MicroBatch) -> Part:
    """The batch's micro-batches, stacked along a new first axis."""
    splits_of_group = batch.sample.completions.shape[1] // micro.samples
    prompts = split_batch(batch.prompt, micro, False)
    return Part(
        repeat_parts(prompts, splits_of_group), split_batch(batch.sample, micro, True)
    )


def make_train_step(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int | None,
    skip_empty: bool = True,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """train_step(state, batch, at=None, frozen=None) -> (state, metrics), pure; jit it
    with donated state.

    An update that is not finite changes nothing but the counts of skipped ones; nor
    does one after the objective's `stop_deviation` was passed, nor one without any
    gradient: Adam's moments would move the parameters on what older rollouts said.

    Args:
        policy: A template without parameters. `frozen` ones are an argument of the
            step: closed over, they would be constants of the program.
        objective: Whose loss.
        optimizer: What turns gradients into updates.
        micro: Prompts and samples per backward pass.
        temperature: The sampling temperature.
        max_length: Tokens that a completion may have; None: not read.
        skip_empty: Leave out an update whose gradient is 0 everywhere.

    The step's `at` is where the gradient is taken, by default at the state's
    parameters: without an importance ratio, all updates of one rollout take it at the
    parameters that sampled.
    """
    gradients = make_gradients(
        objective, micro=micro, temperature=temperature, max_length=max_length
    )

    def train_step(
        state: TrainState, batch: Batch, at: Any = None, frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        params = state.params if at is None else at
        current = dataclasses.replace(policy, params=params, frozen=frozen)
        grads, metrics = gradients(current, batch)
        norm = optax.tree.norm(grads)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        change_norm = optax.tree.norm(changes)
        # Not a vdot of flat arrays, for which a mesh would gather them.
        products = jax.tree.map(lambda g, c: (g * c).sum(), grads, changes)
        gain = jnp.asarray(optax.tree.sum(products))
        moved = log_prob_change(batch_terms(objective, batch, max_length), gain)
        finite = jnp.isfinite(norm) & jnp.isfinite(change_norm)
        nonzero = jax.tree.map(lambda g: (g != 0).any(), grads)  # NaN is not 0
        empty = ~jax.tree.reduce(jnp.logical_or, nonzero)
        applied = finite & ~empty if skip_empty else finite
        if objective.stop_deviation is not None:
            stopped = metrics["ratio/deviation"] > objective.stop_deviation
            applied &= ~stopped
            metrics["update/stopped"] = stopped.astype(jnp.int32)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (optax.apply_updates(state.params, changes), opt_state),
            (state.params, state.opt_state),
        )
        params, opt_state = constrain_params((params, opt_state))
        state = state._replace(
            params=params,
            opt_state=opt_state,
            updates=state.updates + applied,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "gradient/norm": norm,
            "update/norm": jnp.where(applied, change_norm, 0.0),
            "update/log_prob_change": jnp.where(applied, moved, 0.0),
            "update/empty": empty.astype(jnp.int32),
            "update/applied": state.updates,
            "update/skipped": state.skipped,
            "update/skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step
