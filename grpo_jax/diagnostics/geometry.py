"""The geometry of per-prompt gradients: how far prompts can be scaled independently.

Normalisation scales each prompt's gradient by a positive number, so it changes none of
the cosines measured here. What a group of samples inflates (norms, and so it shrinks
cosines) is debiased; the raw figures stand beside. From the Gram matrix of sequences'
scores (`prompt_geometry`), or from gradients of independent parts of every group
(`parts_geometry`), which is what a model of any size can afford.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_statistics, group_std, leave_one_out_advantages

SMALL = 0.1  # the |cos| below which two prompts count as orthogonal
LEAST_SIGNAL = 0.1  # share of squared norms below which nothing is said of cosines


class CosineStatistics(NamedTuple):
    """Over the pairs i < j of P prompts; each a scalar."""

    mean: jax.Array
    std: jax.Array
    mean_abs: jax.Array
    positive_fraction: jax.Array
    small_fraction: jax.Array  # of pairs with |cos| < 0.1


class PromptGeometry(NamedTuple):
    """Of P prompts' gradients; the matrices' diagonals are not pairs.

    A prompt without signal (tied, or too few rewards for what is debiased) is NaN in
    the cosines and left out of the scalars.
    """

    inner: jax.Array  # [P, P], unbiased off the diagonal
    squared_norms: jax.Array  # [P] debiased |grad J_x|^2; may be negative
    raw_squared_norms: jax.Array  # [P] |estimated gradient|^2, inflated by noise / G
    squared_inner: jax.Array  # [P, P] unbiased <g_x, g_y>^2 off the diagonal
    cosines: jax.Array  # [P, P] raw, attenuated by the inflated norms
    debiased_cosines: jax.Array  # [P, P]; NaN where a debiased norm is not positive
    mean_cosine: jax.Array  # debiased: mean raw cosine / attenuation
    std_cosine: jax.Array  # debiased: see `debiased_statistics`
    attenuation: jax.Array  # sum of debiased / sum of raw squared norms, in [0, 1]
    statistics: CosineStatistics  # of the raw cosines moved to the debiased mean and
    # std: what the true ones look like if sampling noise kept their shape
    raw_statistics: CosineStatistics  # of `cosines`
    chi: jax.Array  # largest eigenvalue of `cosines`, in [1, P]
    noise_floor: jax.Array  # mean |cos| that K directions show of orthogonal vectors
    violating_fraction: jax.Array  # of pairs with a negative inner product
    m_bound: jax.Array  # [P, P] M of each ordered pair; NaN where inner is negative
    m_median: jax.Array
    m_p99: jax.Array
    norm_ratio: jax.Array  # R1: 95th over 5th percentile of the norms
    sigma_ratio: jax.Array  # R2: the same of the groups' std, ties left out

    @property
    def norms(self) -> jax.Array:
        """[P] debiased |grad J_x|, 0 where its square came out negative."""
        return jnp.sqrt(jnp.maximum(self.squared_norms, 0))


def prompt_geometry(
    rewards: jax.Array, gram: jax.Array, *, num_directions: int | None = None
) -> PromptGeometry:
    """What the Gram matrix of scores and the rewards say about prompts' gradients.

    Norms are debiased over distinct quadruples of samples. M is |X_i g_j|^2 /
    (|X_i|^2 <g_i, g_j>), X_i the matrix of prompt i's sampled scores.

    Args:
        rewards: [P, G], NaN where missing.
        gram: [P, G, P, G] inner products of sequences' scores, exact or sketched.
        num_directions: K of the sketch; None: exact.

    References:
        Ge et al. 2026, arXiv:2601.23135, Assumptions 4 and 5 (M, R1, R2; there, M > 0
        asks for no negative pair at all: see `violating_fraction` first).
    """
    p, g = rewards.shape
    if gram.shape != (p, g, p, g):
        raise ValueError(f"gram must be {(p, g, p, g)}, got {gram.shape}.")
    statistics = group_statistics(rewards)
    weights = _gradient_weights(rewards)  # [P, G]
    pulled = jnp.einsum("pgqh,qh->pgq", gram, weights)  # X_p g_q
    pulled = jnp.where(statistics.present[..., None], pulled, 0.0)
    inner = jnp.einsum("pg,pgq->pq", weights, pulled)
    own = jnp.einsum("pgph->pgh", gram)

    halves = part_weights(rewards, 2)  # [P, 2, G // 2]
    cut = gram[:, : g // 2 * 2, :, : g // 2 * 2].reshape(p, 2, g // 2, p, 2, g // 2)
    parts = jnp.einsum("phg,phgqkl,qkl->phqk", halves, cut, halves)

    spread = jnp.linalg.eigvalsh(own * _pairs_present(statistics.present))[:, -1]
    positive = inner > 0
    m_bound = (pulled**2).sum(1) / (spread[:, None] * jnp.where(positive, inner, 1.0))
    return _summary(
        rewards,
        inner=inner,
        squared=_debiased_squared_norms(rewards, own),
        squared_inner=_squared_inner(parts),
        m_bound=jnp.where(positive, m_bound, jnp.nan),
        num_directions=num_directions,
    )


def parts_geometry(
    rewards: jax.Array, vectors: jax.Array, *, num_directions: int | None = None
) -> PromptGeometry:
    """The same from H estimated gradients per prompt, of disjoint parts of its group.

    Products of different parts are of independent noise: norms and squares from them
    are unbiased. M is <g_i, g_j> / |g_i|^2, with the prompt's own gradient as X_i. A
    prompt with a part of fewer than two rewards is left out.

    Args:
        rewards: [P, G], NaN where missing.
        vectors: [P, H, K], H at least 2: of each part, the sum of `part_weights` times
            scores, whole or hashed.
        num_directions: K where the vectors are hashed; None: they are whole.
    """
    p, h = vectors.shape[:2]
    if rewards.shape[0] != p or vectors.ndim != 3 or h < 2:
        raise ValueError(
            f"vectors must be [{rewards.shape[0]}, parts >= 2, K], got {vectors.shape}."
        )
    parts = jnp.einsum("phd,qkd->phqk", vectors, vectors)
    inner = parts.mean((1, 3))
    own = jnp.einsum("phpk->phk", parts)
    between = (own.sum((1, 2)) - jnp.einsum("phh->p", own)) / (h * (h - 1))
    raw = jnp.diagonal(inner)
    positive = inner > 0
    m_bound = jnp.where(positive, inner, jnp.nan) / raw[:, None]
    whole = (jnp.isfinite(_by_parts(rewards, h)).sum(2) >= 2).all(1)
    both = whole[:, None] & whole[None]
    return _summary(
        rewards,
        inner=jnp.where(both, inner, jnp.nan),
        squared=jnp.where(whole, between, jnp.nan),
        squared_inner=jnp.where(both, _squared_inner(parts), jnp.nan),
        m_bound=m_bound,
        num_directions=num_directions,
    )


def first_order_changes(
    inner: jax.Array, squared_norms: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a gradient step of length 1 under prompt weights does to every prompt.

    The step is along g = sum_y w_y g_y; prompt x's expected reward changes by
    <g_x, g> / |g|: w_x |g_x|^2 / |g| of its own doing, and the rest by the others'.

    Args:
        inner, squared_norms: Of a `PromptGeometry`, so unbiased.
        weights: [P]; a prompt of NaN norm takes no part.

    Returns:
        (own [P], others [P]) in reward units; all NaN where |g|^2 is not positive.
    """
    usable = jnp.isfinite(squared_norms)
    w = jnp.where(usable, weights, 0.0)
    squares = jnp.where(usable, squared_norms, 0.0)
    between = jnp.where(jnp.eye(len(w), dtype=bool), 0.0, inner)
    others = jnp.where(usable[None], between, 0.0) @ w
    total = w @ jnp.where(usable, others, 0.0) + (w**2) @ squares
    length = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), jnp.nan)
    own, others = w * squares / length, others / length
    return jnp.where(usable, own, jnp.nan), jnp.where(usable, others, jnp.nan)


def part_weights(rewards: jax.Array, parts: int) -> jax.Array:
    """[P, H, G // H]: sum over a part of weight * score is its unbiased gradient."""
    split = _by_parts(rewards, parts)
    return _gradient_weights(split.reshape(-1, split.shape[-1])).reshape(split.shape)


def cosine_statistics(cosines: jax.Array) -> CosineStatistics:
    """Summary of the off-diagonal of cosines [P, P], P at least 2; NaN ones are out."""
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1] or len(cosines) < 2:
        raise ValueError(f"cosines must be [P >= 2, P], got {cosines.shape}.")
    pairs = jnp.isfinite(cosines) & jnp.triu(jnp.ones(cosines.shape, bool), 1)
    return weighted_statistics(jnp.where(pairs, cosines, 0.0), pairs)


def weighted_statistics(cosines: jax.Array, weights: jax.Array) -> CosineStatistics:
    """Of cosines, each counted `weights` times; NaN where nothing counts."""
    total = weights.sum()

    def mean(values):
        return (weights * values).sum() / total

    centre = mean(cosines)
    known = jnp.where(jnp.isfinite(centre), 1.0, jnp.nan)
    return CosineStatistics(
        centre,
        jnp.sqrt(mean((cosines - centre) ** 2)),
        mean(jnp.abs(cosines)),
        mean(cosines > 0) * known,
        mean(jnp.abs(cosines) < SMALL) * known,
    )


class Debiased(NamedTuple):
    """`debiased_statistics`: the names of `PromptGeometry`."""

    mean_cosine: jax.Array
    std_cosine: jax.Array
    attenuation: jax.Array
    statistics: CosineStatistics
    raw_statistics: CosineStatistics


def debiased_statistics(
    cosines: jax.Array,
    squared: jax.Array,
    raw: jax.Array,
    squared_inner: jax.Array,
    sigma: jax.Array,
    counts: jax.Array,
    num_directions: int | None,
) -> Debiased:
    """Cosines without what sampling does to them, averaged before dividing.

    The mean is that of the raw cosines over the pooled attenuation. The mean square is
    a ratio of averages: of squared inner products, and of products of debiased squared
    norms, of gradients divided by their prompt's std; so pairs count as they do in a
    std-normalised update. (A mean of ratios does not do: a pair's inner product and
    its raw norms share their noise.) NaN where less than a tenth of the squared norms
    is signal, or what is divided by comes out negative.

    Args:
        cosines: [P, P] raw; NaN where there is no signal.
        squared, raw: [P] squared norms, debiased and not.
        squared_inner: [P, P] unbiased squares of inner products.
        sigma: [P] std of rewards.
        counts: [P] how often each prompt counts (1; a bootstrap draws others).
        num_directions: K of a sketch; None: exact.
    """
    signal = jnp.isfinite(cosines)
    both = signal & jnp.isfinite(squared_inner)
    both &= jnp.isfinite(squared)[:, None] & jnp.isfinite(squared)[None]
    upper = jnp.triu(counts[:, None] * counts[None], 1)
    pairs = upper * both
    counted = counts * (both & ~jnp.eye(len(raw), dtype=bool)).any(1)

    def kept(values, where):
        return jnp.where(where > 0, values, 0.0)

    shrink = (counted * kept(squared, counted)).sum()
    shrink /= (counted * kept(raw, counted)).sum()
    shrink = jnp.where(shrink < LEAST_SIGNAL, jnp.nan, jnp.minimum(shrink, 1.0))
    filled = jnp.where(signal, cosines, 0.0)
    found = weighted_statistics(filled, upper * signal)
    mean = jnp.clip((pairs * filled).sum() / pairs.sum() / shrink, -1.0, 1.0)

    variance = jnp.where(counted > 0, sigma**2, 1.0)
    norms = kept(squared, counted) / variance
    above = pairs * kept(squared_inner, pairs) / (variance[:, None] * variance[None])
    below = (pairs * norms[:, None] * norms[None]).sum()
    square = jnp.where(below > 0, above.sum() / jnp.where(below > 0, below, 1), jnp.nan)
    if num_directions is not None:  # a sketch adds (1 + cos^2) / K to a squared cosine
        square = (square - 1 / num_directions) / (1 + 1 / num_directions)
    square = jnp.minimum(square, 1.0) + 0 * shrink
    std = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
    wide = found.std > 0
    moved = mean + (filled - found.mean) * std / jnp.where(wide, found.std, 1.0)
    moved = weighted_statistics(jnp.clip(moved, -1.0, 1.0), pairs)
    return Debiased(mean, std, shrink, moved, found)


def _summary(rewards, *, inner, squared, squared_inner, m_bound, num_directions):
    statistics = group_statistics(rewards)
    raw = jnp.diagonal(inner)
    signal = ~statistics.tied & (raw > 0)
    unit = jnp.where(signal, jax.lax.rsqrt(jnp.where(signal, raw, 1.0)), jnp.nan)
    cosines = inner * unit[:, None] * unit[None]
    known = signal & (squared > 0)
    norms = jnp.where(known, jnp.sqrt(jnp.where(known, squared, 1.0)), jnp.nan)
    off_diagonal = ~jnp.eye(len(raw), dtype=bool)
    both = signal[:, None] & signal[None] & off_diagonal
    sigma, _ = group_std(rewards, ddof=1)
    debiased = debiased_statistics(
        cosines, squared, raw, squared_inner, sigma, jnp.ones_like(raw), num_directions
    )
    floor = 0.0 if num_directions is None else (2 / (jnp.pi * num_directions)) ** 0.5
    m_bound = jnp.where(both, m_bound, jnp.nan)
    return PromptGeometry(
        inner=inner,
        squared_norms=squared,
        raw_squared_norms=raw,
        squared_inner=squared_inner,
        cosines=cosines,
        debiased_cosines=inner / (norms[:, None] * norms[None]),
        **debiased._asdict(),
        chi=jnp.linalg.eigvalsh(jnp.where(jnp.isfinite(cosines), cosines, 0.0))[-1],
        noise_floor=jnp.asarray(floor, inner.dtype),
        violating_fraction=(both & (inner < 0)).sum() / both.sum(),
        m_bound=m_bound,
        m_median=jnp.nanmedian(m_bound),
        m_p99=jnp.nanpercentile(m_bound, 99),
        norm_ratio=_percentile_ratio(norms),
        sigma_ratio=_percentile_ratio(jnp.where(signal, sigma, jnp.nan)),
    )


def _gradient_weights(rewards):
    """[P, G] leave-one-out advantages over the rewards that are there."""
    count = jnp.maximum(group_statistics(rewards).count, 1)
    return leave_one_out_advantages(rewards) / count[:, None]


def _by_parts(rewards, parts):
    p, g = rewards.shape
    return rewards[:, : g // parts * parts].reshape(p, parts, g // parts)


def _squared_inner(parts):
    """[P, P] unbiased <g_i, g_j>^2 from parts [P, H, P, H] of inner products: over all
    products of two that share no part of either group."""
    h = parts.shape[1]
    total = parts.sum((1, 3)) ** 2
    same_left = (parts.sum(3) ** 2).sum(1)
    same_right = (parts.sum(1) ** 2).sum(2)
    both = (parts**2).sum((1, 3))
    return (total - same_left - same_right + both) / (h * (h - 1)) ** 2


def _debiased_squared_norms(rewards, own):
    """[P] mean over distinct (i, j, k, l) of (r_i - r_j) (r_k - r_l) <s_i, s_k>.

    The sums over j and l are done in closed form, over the n rewards that are there.
    """
    present = group_statistics(rewards).present
    r = jnp.where(present, rewards, 0.0)
    n = present.sum(1)[:, None, None]
    total, squares = r.sum(1)[:, None, None], (r**2).sum(1)[:, None, None]
    ri, rk = r[:, :, None], r[:, None, :]
    rest = total - ri - rk  # over the n - 2 others
    m = jnp.maximum(n - 2, 2)
    mean = rest / m
    mean_product = (rest**2 - (squares - ri**2 - rk**2)) / (m * (m - 1))
    w = ri * rk - (ri + rk) * mean + mean_product
    pairs = _pairs_present(present) & ~jnp.eye(r.shape[1], dtype=bool)[None]
    total = jnp.where(pairs, w * own, 0).sum((1, 2))
    n = n[:, 0, 0]
    return jnp.where(n >= 4, total / jnp.maximum(n * (n - 1), 1), jnp.nan)


def _pairs_present(present):
    return present[:, :, None] & present[:, None, :]


def _percentile_ratio(values):
    return jnp.nanpercentile(values, 95) / jnp.nanpercentile(values, 5)
