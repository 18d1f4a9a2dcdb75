"""Statistics of the cosines between prompts' gradients, sampling noise removed.

A raw cosine is the true one times the square roots of two attenuations, a = debiased /
raw squared norm, plus noise. Both the mean and the mean square of the true cosines are
estimated as ratios of sums over pairs, in which the pair (i, j) counts a_i a_j times:
nearly alike where all prompts stand out from their noise, so that both tend to the
figures over pairs counted equally as groups grow, and hardly at all for a prompt that
is mostly noise, whose cosines nobody can tell. The weights need no true norms, and are
the same in both, so that mean square - mean^2 is a variance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SMALL = 0.1  # |cos| below which two prompts count as orthogonal
LEAST_SIGNAL = 0.1  # attenuation below which cosines are not debiased
LEAST_PROMPTS = 4  # effective ones: fewer say nothing of a distribution
LEAST_SHARE = 0.2  # of all prompts that the effective ones must be


class CosineStatistics(NamedTuple):
    """Statistics of cosines over the pairs i < j of P prompts; each a scalar."""

    mean: jax.Array
    std: jax.Array
    mean_abs: jax.Array
    positive_fraction: jax.Array
    small_fraction: jax.Array  # of pairs with |cos| < 0.1


class PairTerms(NamedTuple):
    """What sums over pairs are made of, each [P, P]; 0 on the diagonal and elsewhere
    where a prompt has no signal."""

    weights: jax.Array  # a_i a_j
    products: jax.Array  # of expectation weight * cosine
    squares: jax.Array  # of expectation weight * cosine^2


class Debiased(NamedTuple):
    """Result of `debiased_statistics`, fields as in `PromptGeometry`."""

    mean_cosine: jax.Array  # scalar
    std_cosine: jax.Array  # scalar
    attenuation: jax.Array  # scalar
    effective_prompts: jax.Array  # scalar
    statistics: CosineStatistics
    raw_statistics: CosineStatistics


def cosine_statistics(cosines: jax.Array) -> CosineStatistics:
    """Statistics of the finite cosines above the diagonal of [P, P].

    Raises:
        ValueError: `cosines` is not square, or of fewer than two prompts.
    """
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1] or len(cosines) < 2:
        raise ValueError(f"cosines must be [P >= 2, P], got {cosines.shape}.")
    pairs = jnp.isfinite(cosines) & jnp.triu(jnp.ones(cosines.shape, bool), 1)
    return weighted_statistics(jnp.where(pairs, cosines, 0.0), pairs)


def weighted_statistics(cosines: jax.Array, weights: jax.Array) -> CosineStatistics:
    """Statistics of cosines [P, P], counted `weights` [P, P] times; NaN of none."""
    total = weights.sum()

    def mean(values: jax.Array) -> jax.Array:
        return (weights * values).sum() / total

    centre = mean(cosines)
    any_counted = jnp.where(jnp.isfinite(centre), 1.0, jnp.nan)  # 1 or NaN
    return CosineStatistics(
        centre,
        jnp.sqrt(mean((cosines - centre) ** 2)),
        mean(jnp.abs(cosines)),
        mean(cosines > 0) * any_counted,
        mean(jnp.abs(cosines) < SMALL) * any_counted,
    )


def attenuations(expected_squared: jax.Array, raw_squared: jax.Array) -> jax.Array:
    """[P] debiased over raw squared norms; NaN where one is undefined.

    At most 1 on average, and negative where noise hides a gradient. Arguments as in
    `pair_terms`.
    """
    usable = jnp.isfinite(expected_squared) & (raw_squared > 0)
    raw = jnp.where(usable, raw_squared, 1.0)
    return jnp.where(usable, expected_squared / raw, jnp.nan)


def pair_terms(
    inner: jax.Array,
    expected_squared: jax.Array,
    raw_squared: jax.Array,
    squared_inner: jax.Array,
    num_directions: int | None = None,
) -> PairTerms:
    """Terms of the ratios that estimate mean and mean square of the true cosines.

    Args:
        inner: [P, P] inner products of the estimated gradients.
        expected_squared: [P] debiased squared norms; NaN: the prompt is left out.
        raw_squared: [P] those of the estimates themselves.
        squared_inner: [P, P] unbiased squares of inner products.
        num_directions: K of a sketch; None: exact.
    """
    a = attenuations(expected_squared, raw_squared)
    used = jnp.isfinite(a)
    pairs = used[:, None] & used[None] & ~jnp.eye(len(a), dtype=bool)
    a = jnp.where(used, a, 0.0)
    inverse = jnp.where(used, 1 / jnp.where(used, raw_squared, 1.0), 0.0)
    length = jnp.sqrt(jnp.maximum(a, 0.0) * inverse)
    weights = a[:, None] * a[None] * pairs
    products = jnp.where(pairs, inner, 0.0) * length[:, None] * length[None]
    squares = jnp.where(pairs, squared_inner, 0.0) * inverse[:, None] * inverse[None]
    if num_directions is not None:  # a sketch adds (1 + cos^2) / K to a squared cosine
        squares = (squares - weights / num_directions) / (1 + 1 / num_directions)
    return PairTerms(weights, products, squares)


def debiased_statistics(
    cosines: jax.Array,
    expected_squared: jax.Array,
    raw_squared: jax.Array,
    terms: PairTerms,
) -> Debiased:
    """Mean, std and statistics of the true cosines.

    NaN where sampling noise hides them: the attenuations' mean is below LEAST_SIGNAL,
    or the effective number of prompts, (sum a)^2 / sum a^2, below LEAST_PROMPTS or
    LEAST_SHARE of all (of few with signal, below nine tenths of these). Attenuations
    that are noise about 0 have an effective number of about 1.

    Args:
        cosines: [P, P] raw; NaN where there is no signal.
        expected_squared: [P], as given for `terms`.
        raw_squared: [P], likewise.
        terms: Of `pair_terms`.
    """
    a = attenuations(expected_squared, raw_squared)
    used = jnp.isfinite(a)
    a, count = jnp.where(used, a, 0.0), used.sum()
    squares = (a**2).sum()
    effective = a.sum() ** 2 / jnp.where(squares > 0, squares, 1.0)
    attenuation = a.sum() / jnp.maximum(count, 1)
    total = terms.weights.sum()
    told = (attenuation >= LEAST_SIGNAL) & (total > 0) & (count >= 2)
    least = jnp.minimum(LEAST_PROMPTS, 0.9 * count)
    told &= effective >= jnp.maximum(least, LEAST_SHARE * len(a))
    total = jnp.where(told, total, jnp.nan)
    mean = jnp.clip(terms.products.sum() / total, -1.0, 1.0)
    square = jnp.minimum(terms.squares.sum() / total, 1.0)
    std = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))

    pairs = jnp.isfinite(cosines) & used[:, None] & used[None]
    above = jnp.triu(jnp.ones(pairs.shape, bool), 1)
    pairs &= above
    filled = jnp.where(jnp.isfinite(cosines), cosines, 0.0)
    shape = weighted_statistics(filled, pairs)
    moved = mean + (filled - shape.mean) * std / jnp.where(shape.std > 0, shape.std, 1)
    moved = weighted_statistics(jnp.clip(moved, -1.0, 1.0), pairs)
    attenuation = jnp.where(told, jnp.minimum(attenuation, 1.0), jnp.nan)
    raw = weighted_statistics(filled, above & jnp.isfinite(cosines))
    return Debiased(mean, std, attenuation, effective, moved, raw)
