"""The algebra put together: advantages, token losses, one loss per prompt.

`per_prompt_losses` is the whole of it on arrays. Its parts are public for a trainer
that needs them apart: global quantities (advantages, coefficients) once per batch, the
differentiable part once per micro-batch, prompt weights on the cotangent.
"""

import jax
import jax.numpy as jnp

from grpo_jax.advantages import (
    centred_advantages,
    group_statistics,
    inverse_std,
    leave_one_out_advantages,
)
from grpo_jax.objectives.aggregation import token_coefficients
from grpo_jax.objectives.divergences import divergence
from grpo_jax.objectives.presets import Objective
from grpo_jax.objectives.ratios import log_ratio
from grpo_jax.objectives.surrogates import logp, ppo, ppo_clipped


def per_prompt_losses(
    objective: Objective,
    *,
    logprobs: jax.Array,
    behaviour_logprobs: jax.Array,
    rewards: jax.Array,
    completion_mask: jax.Array,
    reference_logprobs: jax.Array | None = None,
    token_weights: jax.Array | None = None,
    max_length: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One loss per prompt; their mean is the objective's loss (minimise it).

    Args:
        objective: A row of `OBJECTIVES`, or one of your own.
        logprobs: [P, G, T] float32, the current policy's; the one input differentiated.
        behaviour_logprobs: [P, G, T] float32, of the policy that sampled; constants.
        rewards: [P, G] float32; NaN for a missing one, whose completion is left out.
        completion_mask: [P, G, T], 1 on sampled tokens, EOS included.
        reference_logprobs: [P, G, T] float32, needed where kl_coef is not 0; constants.
        token_weights: [P, G, T], factors on the surrogate's tokens; constants.
        max_length: What a constant-length aggregation divides by; default T. Give it
            where completions were trimmed to a bucket.

    Returns:
        ([P] float32 losses, metrics): metrics are scalars, means over tokens:
        `ratio/mean`, `ratio/clipped` and, with a reference, `kl/mean` in nats.

    Raises:
        ValueError: shapes do not fit, or a reference is missing.
    """
    same_shape = {
        "behaviour_logprobs": behaviour_logprobs,
        "completion_mask": completion_mask,
        "reference_logprobs": reference_logprobs,
        "token_weights": token_weights,
    }
    _check(objective, logprobs, rewards, same_shape)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}.")
    if objective.kl_coef and reference_logprobs is None:
        raise ValueError(
            f"reference_logprobs must be given, kl_coef is {objective.kl_coef}; pass "
            "the reference policy's log-probs or set kl_coef=0."
        )
    mask = present_mask(completion_mask, rewards)
    rewards = shaped_rewards(
        objective, rewards, behaviour_logprobs, reference_logprobs, mask
    )
    advantages = baselined(objective, rewards)
    if objective.scale == "std":
        scale = inverse_std(rewards, eps=objective.std_eps, ddof=objective.std_ddof)
        advantages = advantages * scale[:, None]
    surrogate, kl, metrics = prompt_terms(
        objective,
        logprobs=logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        coefficients=token_coefficients(objective.aggregation, mask, max_length),
        token_shares=mask / jnp.maximum(mask.sum(), 1),
        reference_logprobs=reference_logprobs,
        token_weights=token_weights,
    )
    return surrogate + loss_kl_coef(objective) * kl, metrics


def policy_loss(objective: Objective, **arrays) -> tuple[jax.Array, dict]:
    """(scalar loss, metrics): the mean of `per_prompt_losses`, same arguments."""
    losses, metrics = per_prompt_losses(objective, **arrays)
    return losses.mean(), metrics


def present_mask(completion_mask: jax.Array, rewards: jax.Array) -> jax.Array:
    """[P, G, T] float: the mask without completions whose reward is missing."""
    present = group_statistics(rewards).present
    return completion_mask.astype(float) * present[..., None]


def shaped_rewards(objective, rewards, behaviour_logprobs, reference_logprobs, mask):
    """[P, G] rewards, less kl_coef * sum_t KL where the objective puts KL there."""
    if not (objective.kl_coef and objective.kl_in == "reward"):
        return rewards
    gap = jnp.where(mask > 0, behaviour_logprobs - reference_logprobs, 0.0)
    kl = divergence(objective.divergence, gap, jnp.zeros_like(gap))  # 0 at gap 0
    return rewards - objective.kl_coef * jax.lax.stop_gradient(kl.sum(-1))


def baselined(objective: Objective, rewards: jax.Array) -> jax.Array:
    """[P, G] rewards less the objective's baseline, not scaled; 0 where missing."""
    if objective.baseline == "mean":
        return centred_advantages(rewards)
    if objective.baseline == "leave_one_out":
        return leave_one_out_advantages(rewards)
    present = group_statistics(rewards).present
    return jax.lax.stop_gradient(jnp.where(present, rewards, 0))


def loss_kl_coef(objective: Objective) -> float:
    """The weight of the KL term in the loss; 0 where KL is in the reward."""
    return objective.kl_coef if objective.kl_in == "loss" else 0.0


def prompt_terms(
    objective: Objective,
    *,
    logprobs: jax.Array,
    behaviour_logprobs: jax.Array,
    advantages: jax.Array,
    coefficients: jax.Array,
    token_shares: jax.Array,
    reference_logprobs: jax.Array | None = None,
    token_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The differentiable part, additive over any split of prompts and completions.

    Args:
        advantages: [P, G], or [P, G, T] for one per token; constants.
        coefficients: [P, G, T] from `token_coefficients` of the whole batch.
        token_shares: [P, G, T], 1 / all tokens of the batch on each token, 0 elsewhere.

    Returns:
        (surrogate [P], KL [P], metrics): advantages scale the first only. KL is 0
        without a reference. Metrics of all parts of a batch add up to the batch's.
    """
    if advantages.ndim == 2:
        advantages = advantages[..., None]
    live = token_shares > 0
    behaviour = jax.lax.stop_gradient(behaviour_logprobs)
    # Padding may hold anything, so it is cut off before it meets exp: 0 * inf is NaN.
    z = jnp.where(live, log_ratio(objective.ratio, logprobs, behaviour), 0.0)
    if objective.surrogate == "logp":
        tokens = logp(jnp.where(live, logprobs, 0.0), advantages)
        clipped = jnp.zeros_like(z)
    else:
        tokens = ppo(z, advantages, objective.clip)
        clipped = ppo_clipped(z, advantages, objective.clip)
    if token_weights is not None:
        factors = jnp.where(live, token_weights, 0.0)
        tokens = tokens * jax.lax.stop_gradient(factors)
    surrogate = (coefficients * tokens).sum((1, 2))
    metrics = {
        "ratio/mean": (token_shares * jnp.exp(z)).sum(),
        "ratio/clipped": (token_shares * clipped).sum(),
    }
    if reference_logprobs is None:
        return surrogate, jnp.zeros_like(surrogate), metrics
    gap = jnp.where(live, logprobs - reference_logprobs, 0.0)
    kl = divergence(objective.divergence, gap, jnp.zeros_like(gap))
    metrics["kl/mean"] = (token_shares * kl).sum()
    return surrogate, (coefficients * kl).sum((1, 2)), jax.lax.stop_gradient(metrics)


def _check(objective, logprobs, rewards, same_shape):
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective must be an Objective, got {objective!r}; look one up in "
            "OBJECTIVES."
        )
    if logprobs.ndim != 3:
        raise ValueError(
            f"logprobs must be [P, G, T], got {logprobs.shape}; reshape flat rows with "
            "x.reshape(-1, group_size, T)."
        )
    shapes = [(name, array, logprobs.shape) for name, array in same_shape.items()]
    for name, array, shape in [*shapes, ("rewards", rewards, logprobs.shape[:2])]:
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} must be {shape} to fit logprobs {logprobs.shape}, "
                f"got {array.shape}."
            )
