"""The algebra put together: advantages, token losses, one loss per prompt.

`per_prompt_losses` does all of it on arrays. Its parts are public for a trainer that
needs them apart: global quantities (advantages, coefficients) once per batch, the
differentiable part once per micro-batch, prompt weights on the cotangent.
"""

import reprlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_statistics
from grpo_jax.objectives.aggregation import token_coefficients
from grpo_jax.objectives.baselines import BASELINES
from grpo_jax.objectives.divergences import divergence
from grpo_jax.objectives.objective import Objective
from grpo_jax.objectives.ratios import RATIOS, Level, tokens_of
from grpo_jax.objectives.scales import SCALES
from grpo_jax.objectives.surrogates import SURROGATES, bounded_ratio
from grpo_jax.objectives.token_weights import conflict_weights, mean_entropy
from grpo_jax.preconditioner import PromptWeights


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
    solving: jax.Array | None = None,
    max_length: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One loss per prompt; their mean is the objective's loss (minimise it).

    Args:
        objective: A row of `OBJECTIVES`, or another one.
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
        solving: [P, G], what each reward holds for solving the prompt, else 0; read by
            scales of pass rates ("group_mean", "beta"), which weigh this part and add
            the rest. Default: the rewards, which such a scale then needs in [0, 1].
        max_length: What a constant-length aggregation divides by; default T. Give it
            where completions were trimmed to a bucket.

    Returns:
        ([P] float32 losses, metrics): metrics are scalars, means over tokens:
        `ratio/mean`, `ratio/deviation` (of |ratio - 1|), `ratio/clipped`, with a
        reference `kl/mean` and with entropy `entropy/mean`, both in nats; NaN where no
        token belongs to a sample with a reward.

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
    _check(objective, logprobs, rewards, solving, same_shape, advantages)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}.")
    _check_needed(objective, same_shape, advantages is not None)
    mask = present_mask(completion_mask, rewards)
    if advantages is None:
        shaped = shaped_rewards(
            objective,
            rewards,
            behaviour_logprobs,
            reference_logprobs,
            mask,
            solving=solving if SCALES[objective.scale].pass_rates else None,
        )
        scale, _ = scale_weights(objective).weights(shaped.judged, ())
        advantages = weighed_advantages(objective, shaped, scale)
    weights = [] if token_weights is None else [token_weights]
    if objective.token_weight == "conflict" and token_ids is not None:
        signs = _per_term(advantages, mask > 0).sum(-1)
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
    return surrogate + penalty, nan_without_tokens(metrics, mask)


def policy_loss(objective: Objective, **arrays: Any) -> tuple[jax.Array, dict]:
    """(scalar loss, metrics): the mean of `per_prompt_losses`, same arguments."""
    losses, metrics = per_prompt_losses(objective, **arrays)
    return losses.mean(), metrics


def scale_weights(objective: Objective) -> PromptWeights:
    """The prompt weights of an objective's scale.

    A scale that differs within a group is left to `baselined`, with prompt weights 1.
    """
    return SCALES[objective.scale].weights(objective)


def present_mask(completion_mask: jax.Array, rewards: jax.Array) -> jax.Array:
    """[P, G, T] float: the mask without completions whose reward is missing."""
    present = group_statistics(rewards).present
    return completion_mask.astype(float) * present[..., None]


class ShapedRewards(NamedTuple):
    """What prompt weights see of each reward; NaN where it is missing."""

    judged: jax.Array  # [P, G], the weights are made of it
    weighed: jax.Array  # [P, G], they multiply it
    added: jax.Array | None  # [P, G], they do not; None: no such part


def shaped_rewards(
    objective: Objective,
    rewards: jax.Array,
    behaviour_logprobs: jax.Array,
    reference_logprobs: jax.Array | None,
    mask: jax.Array,
    *,
    solving: jax.Array | None = None,
    punishment: jax.Array | None = None,
) -> ShapedRewards:
    """The rewards that prompt weights multiply, and those added after them.

    A group is tied by its task rewards. KL in the reward is therefore never divided by
    the group's spread, which in a tied group is that of the KL alone: the coefficient
    would cancel, and gaps of rounding size would become advantages of full size. It is
    added in reward units, as KL in the loss is: with b the baseline and K the
    completion's KL, A = w (R - b(R)) - kl_coef (K - b(K)). A punishment counts as a
    task reward, but in a group that is tied without it, where it is added. Where
    `solving` is given the weights are made of it and multiply it; the rest is added.

    Both parts are divided by the completion's length where the scale asks for it.

    Args:
        objective: Its KL, where that is in the reward, and its scale.
        rewards: [P, G].
        behaviour_logprobs, reference_logprobs, mask: [P, G, T].
        solving: [P, G], as in `per_prompt_losses`; None where all rewards are weighed.
        punishment: [P, G] to add to the rewards.
    """
    statistics = group_statistics(rewards)
    weighed, parts, judged = rewards, [], None
    if solving is not None:
        weighed = jnp.where(statistics.present, solving, jnp.nan)
        judged = jnp.where(statistics.present, (solving != 0) + 0.0, jnp.nan)
        parts.append(rewards - weighed)
    if punishment is not None:
        # Where it would be the only thing that the weights see, or none of theirs.
        alone = statistics.tied[:, None] | (judged is not None)
        weighed = weighed + jnp.where(alone, 0, punishment).astype(weighed.dtype)
        parts.append(jnp.where(alone, punishment, 0))
    if objective.kl_coef and objective.kl_in == "reward":
        if reference_logprobs is None:
            raise ValueError("reference_logprobs must be given, kl_in is 'reward'.")
        gap = jnp.where(mask > 0, behaviour_logprobs - reference_logprobs, 0.0)
        kl = divergence(objective.divergence, gap, jnp.zeros_like(gap))  # 0 at gap 0
        parts.append(-objective.kl_coef * jax.lax.stop_gradient(kl.sum(-1)))
    added = None
    if parts:
        added = jnp.where(statistics.present, sum(parts), jnp.nan)
    if SCALES[objective.scale].by_length:
        lengths = jnp.maximum(mask.sum(-1), 1)
        weighed = weighed / lengths
        added = None if added is None else added / lengths
    return ShapedRewards(weighed if judged is None else judged, weighed, added)


def baselined(objective: Objective, rewards: jax.Array) -> jax.Array:
    """[P, G] rewards [P, G] less the objective's baseline, 0 where missing.

    Without the prompt weights of its scale, but with factors per sample, if any.
    """
    advantages = BASELINES[objective.baseline].advantages(objective, rewards)
    per_sample = SCALES[objective.scale].per_sample
    if per_sample is not None:
        advantages *= per_sample(objective, rewards)
    return advantages


def weighed_advantages(
    objective: Objective, shaped: ShapedRewards, weights: jax.Array
) -> jax.Array:
    """[P, G] advantages: `baselined` rewards times weights [P], and the added part
    less its baseline."""
    advantages = baselined(objective, shaped.weighed) * weights[:, None]
    if shaped.added is not None:
        advantages += BASELINES[objective.baseline].advantages(objective, shaped.added)
    return advantages


def loss_kl_coef(objective: Objective) -> float:
    """The weight of the KL term in the loss; 0 where KL is in the reward."""
    return objective.kl_coef if objective.kl_in == "loss" else 0.0


def needs_entropy(objective: Objective) -> bool:
    """Whether the loss reads each token's entropy."""
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
        logprobs, behaviour_logprobs, reference_logprobs, entropy: [P, G, T].
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
    mask = token_shares > 0
    ratio, surrogate = RATIOS[objective.ratio], SURROGATES[objective.surrogate]
    advantages = _per_term(advantages, mask)
    tokens = tokens_of(logprobs, behaviour_logprobs, mask, advantages)
    level = ratio.level(objective, tokens)
    coefficients = jnp.where(mask, coefficients, 0.0)
    if ratio.sequence:  # one term, shared by its tokens
        coefficients /= jnp.maximum(mask.sum(-1, keepdims=True), 1)
    factors = coefficients
    for weights in token_weights:
        factors = factors * jnp.where(mask, weights, 0.0)
    entropies = None
    if needs_entropy(objective):
        if entropy is None:
            raise ValueError("entropy must be given, the objective has entropy terms.")
        entropies = mean_entropy(entropy, mask)[..., None]  # [P, G, 1]
        if objective.entropy_limit is not None:
            factors = jnp.where(entropies <= objective.entropy_limit, factors, 0.0)
    factors = jax.lax.stop_gradient(factors)
    losses, clipped = surrogate.terms(objective, level, advantages)
    total = (factors * losses).sum((1, 2))

    penalty = jnp.zeros_like(total)
    if surrogate.penalty is not None:
        penalty += (factors * surrogate.penalty(objective, level)).sum((1, 2))
    if objective.entropy_coef and entropies is not None:
        # The surrogate is linear: its value at A - coef H.
        shift, _ = surrogate.terms(objective, level, entropies)
        penalty -= objective.entropy_coef * (factors * shift).sum((1, 2))
    metrics = _ratio_metrics(level, clipped, token_shares)
    if entropy is not None:
        metrics["entropy/mean"] = (token_shares * jnp.where(mask, entropy, 0)).sum()
    if reference_logprobs is not None:
        reference = jax.lax.stop_gradient(reference_logprobs)
        gap = jnp.where(mask, logprobs - reference, 0.0)
        kl = divergence(objective.divergence, gap, jnp.zeros_like(gap))
        metrics["kl/mean"] = (token_shares * kl).sum()
        penalty += loss_kl_coef(objective) * (coefficients * kl).sum((1, 2))
    return total, penalty, jax.lax.stop_gradient(metrics)


def _ratio_metrics(
    level: Level, clipped: jax.Array, token_shares: jax.Array
) -> dict[str, jax.Array]:
    ratio = bounded_ratio(level.z)
    return {
        "ratio/mean": (token_shares * ratio).sum(),
        "ratio/deviation": (token_shares * jnp.abs(ratio - 1)).sum(),
        "ratio/clipped": (token_shares * (clipped | level.clipped)).sum(),
    }


def nan_without_tokens(
    metrics: dict[str, jax.Array], mask: jax.Array
) -> dict[str, jax.Array]:
    """The metrics, with NaN for means over the tokens of mask [P, G, T] where it has
    none."""
    some = (mask > 0).any()
    means = ("ratio/", "kl/", "entropy/")
    return {
        name: jnp.where(some, value, jnp.nan) if name.startswith(means) else value
        for name, value in metrics.items()
    }


def _per_term(advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """[P, G, 1] or [P, G, T] constants, 0 where there is no token."""
    if advantages.ndim == 2:
        advantages, mask = advantages[..., None], mask.any(-1, keepdims=True)
    return jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))


def _check_needed(
    objective: Objective, arrays: dict[str, jax.Array | None], given: bool
) -> None:
    """ValueError for an array that is missing; `given`: advantages are an argument."""
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


def _check(
    objective: Objective,
    logprobs: jax.Array,
    rewards: jax.Array,
    solving: jax.Array | None,
    same_shape: dict[str, jax.Array | None],
    advantages: jax.Array | None,
) -> None:
    """ValueError for shapes that do not fit together."""
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective must be an Objective, got {objective!r}; look one up in "
            "OBJECTIVES."
        )
    needed = {"logprobs": logprobs, "rewards": rewards} | {
        name: same_shape[name] for name in ("behaviour_logprobs", "completion_mask")
    }
    optional = {"solving": solving, "advantages": advantages} | same_shape
    given = {name: x for name, x in optional.items() if x is not None}
    for name, array in (given | needed).items():
        if not hasattr(array, "ndim"):
            raise ValueError(
                f"{name} must be an array, got {reprlib.repr(array)}; give jnp.asarray "
                "of a list."
            )
    if logprobs.ndim != 3:
        raise ValueError(
            f"logprobs must be [P, G, T], got {logprobs.shape}; reshape flat rows with "
            "x.reshape(-1, group_size, T)."
        )
    shapes = [(name, array, logprobs.shape) for name, array in same_shape.items()]
    shapes.append(("rewards", rewards, logprobs.shape[:2]))
    shapes.append(("solving", solving, logprobs.shape[:2]))
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
