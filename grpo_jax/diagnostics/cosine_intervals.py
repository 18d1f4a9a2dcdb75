"""Uncertainty of the debiased cosines: of sampling and of the choice of prompts.

Everything here is on the host. Prompts are independent, so that deleting one at a time
(the jackknife) shows what prompts and their sampling noise contribute, each prompt's in
all of its pairs; what belongs to single pairs is held against the spread over pairs.
The fraction of small cosines cannot be estimated through noise without assuming the
distribution of the cosines: bounds on it, which hold for any, are estimated instead.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.diagnostics.cosines import (
    LEAST_PROMPTS,
    SMALL,
    attenuations,
    pair_terms,
)
from grpo_jax.diagnostics.geometry import PromptGeometry

# A cosine is called small, or not small, where noise does so wrongly in at most a tenth
# of pairs: a normal beyond 1.2816 of its stds.
WRONGLY, STDS = 0.1, 1.2816
LEAST_DEBIASED = 0.25  # attenuation of which a norm is debiased by half at the most


class CosineDraws(NamedTuple):
    """Estimates (first entry) and draws from their sampling distribution, each [1 + N].

    Figures of prompts like the measured ones; NaN where noise hides them.
    """

    mean: np.ndarray
    std: np.ndarray
    small_low: np.ndarray  # lower bound on the fraction of |cos| < 0.1
    small_high: np.ndarray  # upper bound


def draw_cosines(
    geometry: PromptGeometry,
    *,
    num_directions: int | None = None,
    draws: int = 4000,
    seed: int = 0,
) -> CosineDraws:
    """Draws mean, std and bounds on the small fraction of the true cosines.

    Args:
        geometry: Of P prompts.
        num_directions: As given for the geometry.
        draws: N.
        seed: Of the draws.
    """
    sums = _pair_sums(geometry, num_directions)
    effective = float(geometry.effective_prompts)
    if not (np.isfinite(geometry.mean_cosine) and effective >= LEAST_PROMPTS):
        return CosineDraws(*np.full((4, 1 + draws), np.nan))
    estimate = _figures(sums.sum((1, 2)))  # [4]
    deviations, variance = _jackknife(sums, estimate)
    rng = np.random.default_rng(seed)
    lengths = np.sqrt((deviations**2).sum(0))
    normal = rng.normal(size=(draws, len(deviations))) @ (
        deviations / np.where(lengths > 0, lengths, 1.0)
    )
    alone = rng.normal(size=normal.shape)  # in place of figures alike in all prompts
    normal = np.where(lengths > 0, normal, alone)
    freedom = effective - 1
    tails = np.sqrt(rng.chisquare(freedom, size=(draws, 1)) / freedom)
    drawn = estimate + np.sqrt(variance) * normal / tails
    mean, spread, large, small = np.vstack([estimate, drawn]).T
    mean, spread = np.clip(mean, -1, 1), np.clip(spread, 0, 1)
    return CosineDraws(mean, np.sqrt(spread), *_bounds(mean, spread, large, small))


def _pair_sums(geometry: PromptGeometry, num_directions: int | None) -> np.ndarray:
    """[6, P, P] of each pair: the terms of mean and mean square, 1, whether its cosine
    is called not small, and whether small; 0 where a prompt has no signal."""
    expected = jnp.asarray(geometry.expected_squared_norms)
    raw = jnp.asarray(geometry.raw_squared_norms)
    inner, squared_inner = (
        jnp.asarray(x) for x in (geometry.inner, geometry.squared_inner)
    )
    terms = pair_terms(inner, expected, raw, squared_inner, num_directions)
    a = np.asarray(attenuations(expected, raw), float)
    used = np.isfinite(a)
    a = np.where(used, np.clip(a, 0, 1), 0.0)
    pairs = used[:, None] & used[None] & ~np.eye(len(a), dtype=bool)
    product = a[:, None] * a[None]
    variance = float(geometry.noise_cosine) ** 2 * (1 - product)
    if num_directions is not None:
        variance = variance + 1 / num_directions
    noise = STDS * np.sqrt(variance)
    size = np.abs(np.where(pairs, np.asarray(geometry.cosines, float), 0.0))
    # Half of the debiasing (raw squared norm * sqrt(a)) leaves norms too long, cosines
    # too small; half as much again (* sqrt(a)^3) the opposite: room for noise in a.
    half = np.sqrt(np.sqrt(np.maximum(product, LEAST_DEBIASED**2)))
    large = pairs & (size - noise > SMALL * half)
    small = pairs & (size + noise < SMALL * product**0.75)
    return np.stack([*(np.asarray(x, float) for x in terms), pairs, large, small])


def _figures(totals: np.ndarray) -> np.ndarray:
    """[..., 4] mean, variance, fractions not small and small, of sums [..., 6]."""
    weights, products, squares, pairs, large, small = np.moveaxis(totals, -1, 0)
    mean = products / weights
    spread = squares / weights - mean**2
    return np.stack([mean, spread, large / pairs, small / pairs], -1)


def _jackknife(sums: np.ndarray, estimate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(deviations with each prompt left out [used, 4], variances [4]) of the figures.

    Summed over prompts, the squared deviations count what belongs to single pairs
    twice, on average, and by chance nearly not at all: its variance, as the spread over
    pairs shows it, is taken off once, and is the least that is returned.
    """
    used = sums[3].any(1)
    sums = sums[:, used][:, :, used]
    count = sums.shape[1]
    totals = sums.sum((1, 2))
    deleted = _figures(totals - 2 * sums.sum(2).T)
    deviations = deleted - deleted.mean(0)
    of_prompts = (count - 1) / count * (deviations**2).sum(0)

    mean, spread, large_share, small_share = estimate
    weights, products, squares, pairs, large, small = sums
    first = (products - mean * weights) / totals[0]
    second = (squares - (spread + mean**2) * weights) / totals[0] - 2 * mean * first
    large, small = large - large_share * pairs, small - small_share * pairs
    influence = np.stack([first, second, large / totals[3], small / totals[3]])
    of_each = influence.sum(2) / max(count - 2, 1)  # what a prompt adds to its pairs
    alone = (influence - of_each[:, :, None] - of_each[:, None]) * pairs
    of_pairs = 2 * (alone**2).sum((1, 2))
    return deviations, np.maximum(of_prompts - of_pairs, of_pairs)


def _bounds(
    mean: np.ndarray, spread: np.ndarray, large: np.ndarray, small: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) bounds on the fraction of |cos| < 0.1, for any distribution.

    From mean and variance by the inequalities of Markov and Cantelli, and from the
    fractions [N] of pairs that are called small, or not small, of which noise makes at
    most WRONGLY where it is not so. The tighter one counts.
    """
    low = np.maximum(
        1 - (spread + mean**2) / SMALL**2, (small - WRONGLY) / (1 - WRONGLY)
    )
    beyond = np.maximum(np.abs(mean) - SMALL, 0.0)
    below = np.where(beyond > 0, spread / np.maximum(spread + beyond**2, 1e-12), 1.0)
    high = np.minimum(below, 1 - (large - WRONGLY) / (1 - WRONGLY))
    low = np.clip(low, 0, 1)
    return low, np.maximum(np.clip(high, 0, 1), low)
