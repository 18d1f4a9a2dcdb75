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
    leave_one_out_advantages,
    leave_one_out_inverse_std,
)
from grpo_jax.objectives.aggregation import token_coefficients
from grpo_jax.objectives.divergences import divergence
from grpo_jax.objectives.presets import Objective
from grpo_jax.objectives.ratios import SEQUENCE_RATIOS, ratio_level
from grpo_jax.objectives.surrogates import (
    bounded_ratio,
    fisher_rao_penalty,
    token_losses,
)
from grpo_jax.objectives.token_weights import conflict_weights, mean_entropy
from grpo_jax.preconditioner import PromptWeights, std_weights, unit_weights
from grpo_jax.prompt_weights import batch_std_weights, beta_weights, group_mean_weights


def per_prompt_losses(
    objective: Objective,
    *,
    logprobs: jax.Array,
    behaviour_logprobs: jax.Array,
    rewards: jax.Array,
    completion_mask: jax.Array,
    reference_logprobs: jax.Array | None = None,
    entropy: jax.Array | None = None,
    token_weights: jax.Array | None = None,
    token_ids: jax.Array | None = None,
    advantages: jax.Array | None = None,
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
        entropy: [P, G, T] float32 nats of the policy at each token, needed where the
            objective has entropy terms (GTPO); constants.
        token_weights: [P, G, T], factors on the surrogate's tokens, constants; needed
            by nthr (`nthr_weights`).
        token_ids: [P, G, T] int, needed by conflict token weights (GTPO).
        advantages: [P, G], or [P, G, T] for one per token, instead of those that the
            objective's baseline, scale and KL in the reward make of the rewards;
            constants. Any prompt weights: `centred_advantages(rewards) * w[:, None]`.
        max_length: What a constant-length aggregation divides by; default T. Give it
            where completions were trimmed to a bucket.

    Returns:
        ([P] float32 losses, metrics): metrics are scalars, means over tokens:
        `ratio/mean`, `ratio/deviation` (of |ratio - 1|), `ratio/clipped`, with a
        reference `kl/mean` and with entropy `entropy/mean`, both in nats.

    Raises:
        ValueError: shapes do not fit, or an array that the objective needs is missing.
    """
    same_shape = {
        "behaviour_logprobs": behaviour_logprobs,
        "completion_mask": completion_mask,
        "reference_logprobs": reference_logprobs,
        "entropy": entropy,
        "token_weights": token_weights,
        "token_ids": token_ids,
    }
    _check(objective, logprobs, rewards, same_shape, advantages)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}.")
    _check_needed(objective, same_shape, advantages is not None)
    mask = present_mask(completion_mask, rewards)
    if advantages is None:
        rewards = shaped_rewards(
            objective, rewards, behaviour_logprobs, reference_logprobs, mask
        )
        scale, _ = scale_weights(objective).weights(rewards, ())
        advantages = baselined(objective, rewards) * scale[:, None]
    weights = [] if token_weights is None else [token_weights]
    if objective.token_weight == "conflict":
        signs = _known(advantages, mask > 0).sum(-1)
        weights.append(conflict_weights(token_ids, signs, mask))
    surrogate, penalty, metrics = prompt_terms(
        objective,
        logprobs=logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        coefficients=token_coefficients(
            objective.aggregation, mask, max_length, objective.first_token_weight
        ),
        token_shares=mask / jnp.maximum(mask.sum(), 1),
        reference_logprobs=reference_logprobs,
        entropy=entropy,
        token_weights=weights,
    )
    return surrogate + penalty, metrics


def policy_loss(objective: Objective, **arrays) -> tuple[jax.Array, dict]:
    """(scalar loss, metrics): the mean of `per_prompt_losses`, same arguments."""
    losses, metrics = per_prompt_losses(objective, **arrays)
    return losses.mean(), metrics


def scale_weights(objective: Objective) -> PromptWeights:
    """The prompt weights that an objective's scale stands for.

    "leave_one_out_std" scales samples, not prompts: `baselined` does it.
    """
    eps, ddof = objective.std_eps, objective.std_ddof
    return {
        "none": unit_weights,
        "std": lambda: std_weights(eps=eps, ddof=ddof),
        "length_std": lambda: std_weights(eps=eps, ddof=ddof),
        "batch_std": lambda: batch_std_weights(eps=eps, ddof=ddof),
        "group_mean": lambda: group_mean_weights(eps=eps),
        "beta": beta_weights,
        "leave_one_out_std": unit_weights,
    }[objective.scale]()


def present_mask(completion_mask: jax.Array, rewards: jax.Array) -> jax.Array:
    """[P, G, T] float: the mask without completions whose reward is missing."""
    present = group_statistics(rewards).present
    return completion_mask.astype(float) * present[..., None]


def shaped_rewards(objective, rewards, behaviour_logprobs, reference_logprobs, mask):
    """[P, G] rewards, less kl_coef * sum_t KL where the objective puts KL there, and
    divided by their completion's length where it scales by "length_std"."""
    if objective.kl_coef and objective.kl_in == "reward":
        gap = jnp.where(mask > 0, behaviour_logprobs - reference_logprobs, 0.0)
        kl = divergence(objective.divergence, gap, jnp.zeros_like(gap))  # 0 at gap 0
        rewards = rewards - objective.kl_coef * jax.lax.stop_gradient(kl.sum(-1))
    if objective.scale == "length_std":
        rewards = rewards / jnp.maximum(mask.sum(-1), 1)
    return rewards


def baselined(objective: Objective, rewards: jax.Array) -> jax.Array:
    """[P, G] rewards less the objective's baseline, without the prompt's scale; 0 where
    missing. A scale per sample ("leave_one_out_std") is in it."""
    if objective.baseline == "mean":
        advantages = centred_advantages(rewards)
    elif objective.baseline == "leave_one_out":
        advantages = leave_one_out_advantages(rewards)
    else:
        present = group_statistics(rewards).present
        advantages = jax.lax.stop_gradient(jnp.where(present, rewards, 0))
    if objective.scale == "leave_one_out_std":
        advantages *= leave_one_out_inverse_std(
            rewards, eps=objective.std_eps, ddof=objective.std_ddof
        )
    return advantages


def loss_kl_coef(objective: Objective) -> float:
    """The weight of the KL term in the loss; 0 where KL is in the reward."""
    return objective.kl_coef if objective.kl_in == "loss" else 0.0


def needs_entropy(objective: Objective) -> bool:
    return bool(objective.entropy_coef) or objective.entropy_limit is not None


def prompt_terms(
    objective: Objective,
    *,
    logprobs: jax.Array,
    behaviour_logprobs: jax.Array,
    advantages: jax.Array,
    coefficients: jax.Array,
    token_shares: jax.Array,
    reference_logprobs: jax.Array | None = None,
    entropy: jax.Array | None = None,
    token_weights: list[jax.Array] | tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The differentiable part, additive over any split of prompts and completions.

    Args:
        advantages: [P, G], or [P, G, T] for one per token; constants.
        coefficients: [P, G, T] from `token_coefficients` of the whole batch.
        token_shares: [P, G, T], 1 / all tokens of the batch on each token, 0 elsewhere.
        token_weights: Factors [P, G, T], multiplied.

    Returns:
        (surrogate [P], penalty [P], metrics): prompt weights scale the first only, the
        second is all that is not proportional to the advantages: KL in the loss, the
        entropy shift, Fisher-Rao. Metrics of all parts of a batch add up to the
        batch's.
    """
    live = token_shares > 0
    advantages = _known(advantages, live)
    level = ratio_level(
        objective.ratio, logprobs, behaviour_logprobs, live, advantages, objective.clip
    )
    coefficients = jnp.where(live, coefficients, 0.0)
    if objective.ratio in SEQUENCE_RATIOS:  # one term, shared by its tokens
        coefficients /= jnp.maximum(live.sum(-1, keepdims=True), 1)
    factors = coefficients
    for weights in token_weights:
        factors = factors * jnp.where(live, weights, 0.0)
    if needs_entropy(objective):
        level_of = mean_entropy(entropy, live)[..., None]  # [P, G, 1]
        if objective.entropy_limit is not None:
            factors = jnp.where(level_of <= objective.entropy_limit, factors, 0.0)
    factors = jax.lax.stop_gradient(factors)
    losses, clipped = token_losses(objective, level, advantages)
    surrogate = (factors * losses).sum((1, 2))

    penalty = jnp.zeros_like(surrogate)
    if objective.surrogate == "fisher_rao":
        distance = fisher_rao_penalty(level.z, level.behaviour, objective.tau)
        penalty += (factors * distance).sum((1, 2))
    if objective.entropy_coef:  # the surrogate is linear: its value at A - coef H
        shift, _ = token_losses(objective, level, level_of)
        penalty -= objective.entropy_coef * (factors * shift).sum((1, 2))
    ratio = bounded_ratio(level.z)
    metrics = {
        "ratio/mean": (token_shares * ratio).sum(),
        "ratio/deviation": (token_shares * jnp.abs(ratio - 1)).sum(),
        "ratio/clipped": (token_shares * (clipped | level.clipped)).sum(),
    }
    if entropy is not None:
        metrics["entropy/mean"] = (token_shares * jnp.where(live, entropy, 0)).sum()
    if reference_logprobs is not None:
        reference = jax.lax.stop_gradient(reference_logprobs)
        gap = jnp.where(live, logprobs - reference, 0.0)
        kl = divergence(objective.divergence, gap, jnp.zeros_like(gap))
        metrics["kl/mean"] = (token_shares * kl).sum()
        penalty += loss_kl_coef(objective) * (coefficients * kl).sum((1, 2))
    return surrogate, penalty, jax.lax.stop_gradient(metrics)


def _known(advantages, live):
    """[P, G, 1] or [P, G, T] constants, 0 where there is no token."""
    if advantages.ndim == 2:
        advantages, live = advantages[..., None], live.any(-1, keepdims=True)
    return jax.lax.stop_gradient(jnp.where(live, advantages, 0.0))


def _check_needed(objective, arrays, given):
    for name, needed, why in (
        (
            "reference_logprobs",
            objective.kl_coef and not (given and objective.kl_in == "reward"),
            f"kl_coef is {objective.kl_coef}; pass the reference policy's log-probs or "
            "set kl_coef=0",
        ),
        (
            "entropy",
            needs_entropy(objective),
            "the objective has entropy terms; `token_logprobs(..., with_entropy=True)` "
            "gives it",
        ),
        (
            "token_ids",
            objective.token_weight == "conflict",
            "token_weight is 'conflict'; pass the completions' token ids",
        ),
        (
            "token_weights",
            objective.token_weight == "nthr",
            "token_weight is 'nthr'; pass `nthr_weights(...)`",
        ),
    ):
        if needed and arrays[name] is None:
            raise ValueError(f"{name} must be given, {why}.")


def _check(objective, logprobs, rewards, same_shape, advantages):
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
    shapes.append(("rewards", rewards, logprobs.shape[:2]))
    if advantages is not None and advantages.ndim == 2:
        shapes.append(("advantages", advantages, logprobs.shape[:2]))
    else:
        shapes.append(("advantages", advantages, logprobs.shape))
    for name, array, shape in shapes:
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} must be {shape} to fit logprobs {logprobs.shape}, "
                f"got {array.shape}."
            )
