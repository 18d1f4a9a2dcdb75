"""Group statistics: baselines and inverse scales of rewards [P, G].

A missing reward is NaN or infinite: it takes no part in its group's statistics and its
advantage is exactly 0. A tied group (max == min) carries no signal: its inverse scale
is exactly 0.
"""

import math
import operator
import reprlib
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_number(
    name: str, value: Any, allows: Callable[[Any], Any], rule: str
) -> None:
    """ValueError unless the value is a number (or array) and allowed; a traced one
    (`optax.inject_hyperparams`) passes."""
    good: Any = isinstance(value, Real | np.ndarray | jax.Array)
    if good and not isinstance(value, bool):
        good = allows(value)
        if isinstance(good, Tracer) or np.all(good):
            return
    raise ValueError(f"{name} {rule}, got {reprlib.repr(value)}.")


def not_negative(value: Any) -> Any:
    """Whether a number is 0 or more."""
    return value >= 0


def whole_number(name: str, value: Any, least: int) -> int:
    """A static whole number; ValueError for all else, and for one below `least`."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None and isinstance(value, jax.Array):
        raise ValueError(
            f"{name} must be an integer outside jit, got {value}; give "
            f"optax.inject_hyperparams static_args={name!r}."
        )
    if whole is None or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if whole < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return whole


def as_array(values: Any) -> jax.Array:
    """An array [...] as it is; numbers and lists of them as an array of floats."""
    return values if hasattr(values, "ndim") else jnp.asarray(values, float)


class GroupStatistics(NamedTuple):
    """Statistics of each prompt's rewards."""

    present: jax.Array  # [P, G] bool, the reward is finite
    count: jax.Array  # [P], rewards present, in the rewards' dtype
    mean: jax.Array  # [P], 0 for an empty group
    centred: jax.Array  # [P, G], reward - mean; exactly 0 if missing or tied
    tied: jax.Array  # [P] bool: all present rewards equal, or none present


def group_statistics(rewards: jax.Array) -> GroupStatistics:
    """Mean, deviations and ties of each prompt's rewards [P, G] that are present."""
    rewards = as_array(rewards)
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards must be [num_prompts, group_size], got {rewards.shape}; "
            "reshape flat rewards with rewards.reshape(-1, group_size)."
        )
    rewards = jax.lax.stop_gradient(jnp.asarray(rewards, float))
    present = jnp.isfinite(rewards)
    filled = jnp.where(present, rewards, 0)
    count = present.sum(1).astype(rewards.dtype)
    mean = filled.sum(1) / jnp.maximum(count, 1)
    highest = jnp.where(present, rewards, -jnp.inf).max(1)
    lowest = jnp.where(present, rewards, jnp.inf).min(1)
    tied = highest <= lowest
    keep = present & ~tied[:, None]
    centred = jnp.where(keep, filled - mean[:, None], 0)
    return GroupStatistics(present, count, mean, centred, tied)


def inverse_std(rewards: jax.Array, *, eps: float = 1e-6, ddof: int = 0) -> jax.Array:
    """GRPO's preconditioner: one scale per prompt, s_p = 1 / (std_p + eps).

    Args:
        rewards: [P, G] float32, each row the rewards of one prompt's group; constants.
        eps: Added to the std, in reward units; caps the scale at 1 / eps.
        ddof: 0 for the population std, 1 for the sample std (TRL, Tunix).

    Returns:
        [P], in 1 / reward units. Exactly 0 for a group whose rewards tie: its float32
        std is a rounding residue, and dividing by it would invent a signal.

    Raises:
        ValueError: `rewards` is not rank 2, or has no more than `ddof` columns; eps is
            negative, or ddof neither 0 nor 1.

    References:
        Shao et al. 2024, arXiv:2402.03300 (the division); Ge et al. 2026,
        arXiv:2601.23135 (why it is an adaptive per-prompt step).
    """
    check_number("eps", eps, not_negative, "must not be negative")
    std, tied = group_std(rewards, ddof=ddof)
    return jnp.where(tied, 0.0, 1.0 / jnp.where(tied, 1.0, std + eps))


def group_std(rewards: jax.Array, *, ddof: int = 0) -> tuple[jax.Array, jax.Array]:
    """Std [P] of each group, exactly 0 where it is tied, and which are tied [P]."""
    rewards, static = as_array(rewards), not isinstance(ddof, Tracer)
    if static and ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}.")
    if static and rewards.ndim == 2 and rewards.shape[1] <= ddof:
        raise ValueError(
            f"rewards must be [num_prompts, group_size > {ddof}], got {rewards.shape}; "
            "raise group_size or lower ddof."
        )
    statistics = group_statistics(rewards)
    variance = (statistics.centred**2).sum(1) / jnp.maximum(statistics.count - ddof, 1)
    tied = statistics.tied
    return jnp.where(tied, 0.0, jnp.sqrt(jnp.where(tied, 1.0, variance))), tied


def centred_advantages(rewards: jax.Array) -> jax.Array:
    """[P, G] rewards minus their group's mean, in reward units."""
    return group_statistics(rewards).centred


def leave_one_out_advantages(rewards: jax.Array) -> jax.Array:
    """[P, G] rewards minus the mean of the others: `centred_advantages` * G / (G - 1).

    The baseline is independent of the sample, so the gradient is unbiased
    (Ahmadian et al. 2024, arXiv:2402.14740; as a U-statistic, arXiv:2603.01162).
    """
    statistics = group_statistics(rewards)
    others = jnp.maximum(statistics.count - 1, 1)
    return statistics.centred * (statistics.count / others)[:, None]


def whitened_advantages(
    rewards: jax.Array, *, eps: float = 1e-6, ddof: int = 0
) -> jax.Array:
    """[P, G] `centred_advantages` times `inverse_std` (GRPO, arXiv:2402.03300)."""
    scale = inverse_std(rewards, eps=eps, ddof=ddof)
    return centred_advantages(rewards) * scale[:, None]


def inverse_batch_std(
    rewards: jax.Array, *, eps: float = 1e-6, ddof: int = 0
) -> jax.Array:
    """[P] 1 / (std of all rewards [P, G] + eps), repeated; 0 if they all tie."""
    rewards = as_array(rewards)
    count = len(group_statistics(rewards).count)  # also checks the shape
    return inverse_std(rewards.reshape(1, -1), eps=eps, ddof=ddof).repeat(count)


def inverse_group_mean(rewards: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """[P] 1 / (mean + eps) of rewards [P, G], none negative; 0 for a tied group.

    With binary rewards the centred gradient times this has the expectation
    ((1 - p) - (1 - p)^G) grad logit p, which as G grows is (1 - p) grad logit p =
    grad log p (Tajwar et al. 2026, arXiv:2602.02710). At G = 2 it is p (1 - p) grad
    logit p: REINFORCE. A group whose mean is not positive gets 0.
    """
    check_number("eps", eps, not_negative, "must not be negative")
    statistics = group_statistics(rewards)
    usable = ~statistics.tied & (statistics.mean > 0)
    return jnp.where(usable, 1.0 / jnp.where(usable, statistics.mean + eps, 1.0), 0.0)


def inverse_beta_density(rewards: jax.Array) -> jax.Array:
    """BNPO's scale [P]: 1 / Beta(a', b') density at each group's mean; 0 if tied.

    The Beta is fitted by moments to the batch's group means (variance with ddof 1),
    then a' = max(1, 1 + a / 3), and b' likewise; the scale is cut at 1e6. Where the
    means differ by no more than their rounding (or there is one group) there is
    nothing to fit: a' = b' = 1, and the scale is 1.

    Args:
        rewards: [P, G] in [0, 1].

    References:
        Xiao et al. 2025, arXiv:2506.02864; the cut is its code's, the case of no
        variance is undefined there.
    """
    statistics = group_statistics(rewards)
    present = statistics.count > 0
    means, count = statistics.mean, present.sum()
    centre = jnp.where(present, means, 0).sum() / jnp.maximum(count, 1)
    deviation = jnp.where(present, means - centre, 0)
    variance = (deviation**2).sum() / jnp.maximum(count - 1, 1)
    highest = jnp.where(present, means, -jnp.inf).max()
    lowest = jnp.where(present, means, jnp.inf).min()
    varies = highest - lowest > 8 * jnp.finfo(means.dtype).eps * jnp.abs(highest)
    spread = centre * (1 - centre) / jnp.where(varies, variance, 1.0) - 1
    a = jnp.where(varies, jnp.maximum(1, 1 + spread * centre / 3), 1.0)
    b = jnp.where(varies, jnp.maximum(1, 1 + spread * (1 - centre) / 3), 1.0)
    inside = ~statistics.tied & (means > 0) & (means < 1)
    p = jnp.where(inside, means, 0.5)
    scale = jnp.exp(jnp.minimum(-_log_beta_density(p, a, b), math.log(1e6)))
    return jnp.where(inside, scale, 0.0)


def _log_beta_density(p: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """log Beta(a, b) density at p in (0, 1), a and b at least 1.

    In Stirling's form, where the large terms are cancelled by hand: as the difference
    of three log-gammas float32 has no digit left at a + b = 1e5.
    """
    n = a + b
    mode = a / n
    distance = a * jnp.log1p((p - mode) / mode) + b * jnp.log1p((mode - p) / (1 - mode))
    rest = _stirling_error(a) + _stirling_error(b) - _stirling_error(n)
    spread = jnp.log(a) + jnp.log(b) - jnp.log(n) - math.log(2 * math.pi)
    return distance + spread / 2 - rest - jnp.log(p) - jnp.log1p(-p)


def _stirling_error(x: jax.Array) -> jax.Array:
    """log Gamma(x) less (x - 1/2) log x - x + log(2 pi) / 2, for x at least 1."""
    small, large = jnp.minimum(x, 16), 1 / jnp.maximum(x, 16)
    direct = jax.scipy.special.gammaln(small) - (small - 0.5) * jnp.log(small) + small
    direct -= math.log(2 * math.pi) / 2
    coefficients = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)
    series = sum(c * large ** (2 * k + 1) for k, c in enumerate(coefficients))
    return jnp.where(x < 16, direct, series)


def leave_one_out_inverse_std(
    rewards: jax.Array, *, eps: float = 1e-6, ddof: int = 1
) -> jax.Array:
    """[P, G] 1 / (std of the group's other rewards + eps); 1 if they tie (NeMo-RL).

    One factor per sample, so no prompt weight can express it.
    """
    present = group_statistics(rewards).present
    g = rewards.shape[1]
    others = present[:, None] & ~jnp.eye(g, dtype=bool)[None]  # [P, sample, other]
    filled = jnp.where(present, jax.lax.stop_gradient(rewards), 0)[:, None, :]
    values = jnp.where(others, filled, jnp.nan).reshape(-1, g)
    std, tied = group_std(values, ddof=ddof)
    scale = jnp.where(tied, 1.0, 1.0 / jnp.where(tied, 1.0, std + eps))
    return scale.reshape(rewards.shape)


def overlong_punishment(lengths: jax.Array, max_length: int, cache: int) -> jax.Array:
    """[...] to add to rewards: 0 up to max_length - cache tokens, then down to -1.

    DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), linear in lengths [...].
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache must be in [1, {max_length}], got {cache}.")
    over = jnp.asarray(lengths, float) - (max_length - cache)
    return -jnp.clip(over / cache, 0.0, 1.0)


def expected_group_std(p: jax.Array, group_size: int) -> jax.Array:
    """w_G(p) = E[std of G Bernoulli(p) rewards]: what a finite group's std estimates.

    The mean gradient of std-normalised advantages is w_G(p) * Delta_p where the ideal
    is sigma_p * Delta_p: at G = 2 and 3 it is sigma^2 up to a constant, a pure rescale
    of REINFORCE, and for p much below 1 / G it saturates at sqrt(G - 1) * sigma^2.

    Args:
        p: [...] pass rates in [0, 1].
        group_size: G, at least 2.

    Returns:
        [...], population std (ddof 0), summed exactly over the binomial.
    """
    group_size = whole_number("group_size", group_size, 2)
    p = jnp.asarray(p, float)[..., None]
    shape = (1,) * (p.ndim - 1) + (group_size - 1,)
    mixed = range(1, group_size)  # successes in a group that is not tied
    log_choose = jnp.asarray(
        [math.log(math.comb(group_size, k)) for k in mixed], p.dtype
    ).reshape(shape)
    k = jnp.asarray(mixed, p.dtype).reshape(shape)
    inside = (p > 0) & (p < 1)
    safe = jnp.where(inside, p, 0.5)
    log_mass = log_choose + k * jnp.log(safe) + (group_size - k) * jnp.log1p(-safe)
    std = jnp.sqrt(k / group_size * (1 - k / group_size))
    return jnp.where(inside, jnp.exp(log_mass) * std, 0.0).sum(-1)
