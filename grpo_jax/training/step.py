"""The update: a pure function of state and rollouts, jitted once.

One `jax.vjp` of the [P] losses per micro-batch, pulled back through the prompt weights:
the cotangent form of the preconditioner. Group statistics, denominators and weights are
those of the whole batch, so how it is split changes no gradient.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.models.forward import teacher_forced
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.aggregation import token_coefficients
from grpo_jax.objectives.loss import (
    baselined,
    needs_entropy,
    present_mask,
    prompt_terms,
    shaped_rewards,
)
from grpo_jax.objectives.presets import Objective
from grpo_jax.objectives.token_weights import (
    truncated_importance_weights,
)
from grpo_jax.parallel.sharding import constrain_params
from grpo_jax.rollouts.micro_batches import MicroBatch, repeat_parts, split_batch
from grpo_jax.training.state import Batch, TrainState


def make_gradients(
    objective: Objective,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int,
):
    """gradients(policy, batch) -> (grads, metrics): the loss's, under batch.weights,
    by policy.params.

    On policy (batch.old_logprobs is None) the behaviour policy is the current one:
    `stop_gradient(logprobs)` stands for it and the ratio is exactly 1. The sampler's
    own log-probs serve the mismatch metric, and KL where it is in the reward.
    """
    wants_entropy = needs_entropy(objective)

    def gradients(policy, batch):
        params = policy.params
        rollouts, weights = batch.rollouts, batch.weights
        mask = present_mask(rollouts.completion_mask, rollouts.rewards)
        rewards = shaped_rewards(
            objective,
            rollouts.rewards,
            rollouts.behaviour_logprobs,
            batch.reference_logprobs,
            mask,
        )
        per_sample = {
            "completions": rollouts.completions,
            "sampled_logprobs": rollouts.behaviour_logprobs,
            "old_logprobs": batch.old_logprobs,
            "reference_logprobs": batch.reference_logprobs,
            "token_weights": batch.token_weights,
            "advantages": baselined(objective, rewards),
            "coefficients": token_coefficients(
                objective.aggregation, mask, max_length, objective.first_token_weight
            ),
            "token_shares": mask / jnp.maximum(mask.sum(), 1),
            # The first iterate's; of older ones the policy that sampled is gone.
            "newest": rollouts.completion_mask.astype(bool)
            & (jnp.arange(len(weights)) < len(weights) // objective.history)[
                :, None, None
            ],
        }
        per_prompt = {
            "prompts": rollouts.prompts,
            "prompt_mask": rollouts.prompt_mask,
            "cotangent": (
                weights / weights.size,
                jnp.full_like(weights, 1 / weights.size),
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
                logprobs = teacher_forced(
                    policy.replace(params),
                    part["prompts"],
                    part["prompt_mask"],
                    part["completions"],
                    temperature,
                    entropy=wants_entropy,
                )
                logprobs, entropy = logprobs if wants_entropy else (logprobs, None)
                old, sampled = part["old_logprobs"], part["sampled_logprobs"]
                before = logprobs if old is None else old
                factors = (
                    [part["token_weights"]] if batch.token_weights is not None else []
                )
                if objective.tis_cap is not None:
                    factors.append(
                        truncated_importance_weights(before, sampled, objective.tis_cap)
                    )
                surrogate, penalty, metrics = prompt_terms(
                    objective,
                    logprobs=logprobs,
                    behaviour_logprobs=before,
                    advantages=part["advantages"],
                    coefficients=part["coefficients"],
                    token_shares=part["token_shares"],
                    reference_logprobs=part["reference_logprobs"],
                    entropy=entropy,
                    token_weights=factors,
                )
                shares, live = part["token_shares"], part["token_shares"] > 0
                metrics["entropy/sampled"] = -(
                    shares * jnp.where(live, logprobs, 0)
                ).sum()
                now = logprobs if objective.history > 1 else before
                gap = jnp.where(part["newest"], now - sampled, 0)
                metrics["loss/policy"] = part["cotangent"][0] @ surrogate
                metrics["loss/penalty"] = part["cotangent"][1] @ penalty
                return (surrogate, penalty), (metrics, jnp.abs(gap).max())

            _, pull_back, (metrics, gap) = jax.vjp(losses, params, has_aux=True)
            (grads,) = pull_back(part["cotangent"])
            grads = constrain_params(grads)
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
        return grads, metrics

    return gradients


def make_train_step(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int,
):
    """train_step(state, batch, at=None, frozen=None) -> (state, metrics), pure; jit it
    with donated state.

    `policy` is a template without parameters. `frozen` ones are an argument of the
    step: closed over, they would be constants of the program. The gradient is taken at
    the parameters `at`, by default the state's own: without an importance ratio, all
    updates of one rollout take it where that was sampled.

    An update that is not finite changes nothing but the counts of skipped ones; nor
    does one after the objective's `stop_deviation` was passed.
    """
    gradients = make_gradients(
        objective, micro=micro, temperature=temperature, max_length=max_length
    )

    def train_step(state: TrainState, batch: Batch, at: Any = None, frozen: Any = None):
        params = state.params if at is None else at
        current = dataclasses.replace(policy, params=params, frozen=frozen)
        grads, metrics = gradients(current, batch)
        norm = optax.tree.norm(grads)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        change_norm = optax.tree.norm(changes)
        finite = jnp.isfinite(norm) & jnp.isfinite(change_norm)
        applied = finite
        if objective.stop_deviation is not None:
            stopped = metrics["ratio/deviation"] > objective.stop_deviation
            applied = finite & ~stopped
            metrics["update/stopped"] = stopped.astype(jnp.int32)
        params = optax.apply_updates(state.params, changes)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (params, opt_state),
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
            "update/applied": state.updates,
            "update/skipped": state.skipped,
            "update/skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step
