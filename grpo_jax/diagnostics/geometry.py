"""Geometry of per-prompt gradients: how far prompts can be scaled independently.

Normalisation scales each prompt's gradient by a positive number, so it changes none of
the cosines measured here. Sampling inflates squared norms by tr Cov / G and so shrinks
cosines; debiased figures are given beside the raw ones. They are computed from the Gram
matrix of the sequences' scores (`prompt_geometry`), or from gradients of independent
parts of every group (`parts_geometry`), which a model of any size can afford.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_statistics, group_std, leave_one_out_advantages
from grpo_jax.diagnostics.cosines import (
    CosineStatistics,
    attenuations,
    debiased_statistics,
    pair_terms,
)
from grpo_jax.precision import float32_products

MOST_UNEVEN = 2.5  # (see `_given_rewards`) where parts are more uneven, none is used


class PromptGeometry(NamedTuple):
    """Inner products, cosines and norms of P prompts' gradients.

    Statistics are over pairs of two prompts: the matrices' diagonals are left out. A
    prompt without signal (tied, or too few rewards for a debiased figure) is NaN in the
    cosines and left out of the scalars. Inner products are in reward^2 / parameter^2.

    The debiased mean and std estimate those of the true cosines over pairs of prompts,
    which count by how far their gradients stand out from sampling noise (see
    `pair_terms`), and equally as groups grow; NaN where noise hides them.
    """

    inner: jax.Array  # [P, P], unbiased off the diagonal
    squared_norms: jax.Array  # [P] debiased |grad J_x|^2; may be negative
    raw_squared_norms: jax.Array  # [P] |estimated gradient|^2, inflated by tr Cov / G
    expected_squared_norms: jax.Array  # [P] |expectation of the estimated gradient|^2,
    # debiased, given the rewards that the group got; NaN where parts do not tell
    squared_inner: jax.Array  # [P, P] <g_x, g_y>^2 of those expectations, unbiased
    cosines: jax.Array  # [P, P] raw, shrunk by the inflated norms
    mean_cosine: jax.Array  # scalar, debiased
    std_cosine: jax.Array  # scalar, debiased
    attenuation: jax.Array  # scalar, mean over prompts of debiased / raw squared norm:
    # about the factor by which sampling noise shrinks a cosine
    effective_prompts: jax.Array  # scalar, prompts that the weights of pairs amount to
    noise_cosine: jax.Array  # scalar, std of a raw cosine between two prompts' noise
    statistics: CosineStatistics  # of the raw cosines moved to the debiased mean and
    # std: those of the true cosines if sampling noise keeps the distribution's shape
    raw_statistics: CosineStatistics  # of `cosines`
    chi: jax.Array  # scalar, largest eigenvalue of `cosines`, in [1, P]; NaN of none
    noise_floor: jax.Array  # scalar, mean |cos| of orthogonal vectors in a K-sketch
    violating_fraction: jax.Array  # scalar, of pairs with a negative inner product
    m_bound: jax.Array  # [P, P] M of each ordered pair; NaN where inner is negative
    m_median: jax.Array  # scalar, over `m_bound`
    m_p99: jax.Array  # scalar
    norm_ratio: jax.Array  # scalar R1: 95th over 5th percentile of the debiased norms
    sigma_ratio: jax.Array  # scalar R2: the same of the groups' std, without ties

    @property
    def norms(self) -> jax.Array:
        """[P] debiased |grad J_x|, 0 where the estimate of its square is negative."""
        return jnp.sqrt(jnp.maximum(self.squared_norms, 0))


@float32_products()
def prompt_geometry(
    rewards: jax.Array, gram: jax.Array, *, num_directions: int | None = None
) -> PromptGeometry:
    """Geometry of the prompts' gradients from the Gram matrix of the scores.

    Norms are debiased over distinct quadruples of samples. M is |X_i g_j|^2 /
    (|X_i|^2 <g_i, g_j>), X_i the matrix of prompt i's sampled scores.

    Args:
        rewards: [P, G] float, NaN where missing.
        gram: [P, G, P, G] inner products of sequences' scores, exact or sketched.
        num_directions: K of the sketch; None: exact.

    Raises:
        ValueError: `gram` does not fit `rewards`.

    References:
        Ge et al. 2026, arXiv:2601.23135, Assumptions 4 and 5 (M, R1, R2). M > 0 assumes
        that no pair is negative: see `violating_fraction` first.
    """
    p, g = rewards.shape
    if gram.shape != (p, g, p, g):
        raise ValueError(f"gram must be {(p, g, p, g)}, got {gram.shape}.")
    statistics = group_statistics(rewards)
    weights = _gradient_weights(rewards)  # [P, G]
    pulled = jnp.einsum("pgqh,qh->pgq", gram, weights)  # X_p g_q
    pulled = jnp.where(statistics.present[..., None], pulled, 0.0)
    inner = jnp.einsum("pg,pgq->pq", weights, pulled)
    within = jnp.einsum("pgph->pgh", gram)  # [P, G, G] one block a prompt

    halves = part_weights(rewards, 2)  # [P, 2, G // 2]
    even = gram[:, : g // 2 * 2, :, : g // 2 * 2].reshape(p, 2, g // 2, p, 2, g // 2)
    parts = jnp.einsum("phg,phgqkl,qkl->phqk", halves, even, halves)
    r = jnp.where(statistics.present, rewards, 0.0)
    lengths = (halves * _by_parts(r, 2)).sum(2)
    length = (weights * r).sum(1)

    # |X_i|^2, the largest eigenvalue of the block.
    largest = jnp.linalg.eigvalsh(within * _pairs_present(statistics.present))[:, -1]
    positive = inner > 0
    m_bound = (pulled**2).sum(1) / (largest[:, None] * jnp.where(positive, inner, 1.0))
    return _summary(
        rewards,
        inner=inner,
        squared_norms=_debiased_squared_norms(rewards, within),
        parts=parts,
        lengths=lengths,
        square_factor=_given_rewards(
            length, _debiased_squared_norms(rewards, r[:, :, None] * r[:, None])
        ),
        inner_factor=_given_rewards(length, _mean_of_products(lengths)),
        m_bound=jnp.where(positive, m_bound, jnp.nan),
        num_directions=num_directions,
    )


@float32_products()
def parts_geometry(
    rewards: jax.Array, vectors: jax.Array, *, num_directions: int | None = None
) -> PromptGeometry:
    """Geometry of the prompts' gradients from estimates of H disjoint parts each.

    Different parts have independent noise, so that norms and squares from products of
    two parts are unbiased. M is <g_i, g_j> / |g_i|^2: as in `prompt_geometry`, but X_i
    is the gradient of prompt i. A prompt with a part of fewer than two rewards is left
    out.

    Args:
        rewards: [P, G] float, NaN where missing.
        vectors: [P, H, K], H at least 2: for each part the sum of `part_weights` times
            scores, all coordinates or hashed to K.
        num_directions: K where the vectors are hashed; None where they are exact.

    Raises:
        ValueError: `vectors` does not fit, or has fewer than two parts.
    """
    p, h = vectors.shape[:2]
    if rewards.shape[0] != p or vectors.ndim != 3 or h < 2:
        raise ValueError(
            f"vectors must be [{rewards.shape[0]}, parts >= 2, K], got {vectors.shape}."
        )
    parts = jnp.einsum("phd,qkd->phqk", vectors, vectors)
    inner = parts.mean((1, 3))
    within = jnp.einsum("phpk->phk", parts)  # [P, H, H] one block a prompt
    between = (within.sum((1, 2)) - jnp.einsum("phh->p", within)) / (h * (h - 1))
    raw = jnp.diagonal(inner)
    positive = inner > 0
    m_bound = jnp.where(positive, inner, jnp.nan) / raw[:, None]
    split = _by_parts(rewards, h)
    complete = (jnp.isfinite(split).sum(2) >= 2).all(1)
    both = complete[:, None] & complete[None]
    lengths = (part_weights(rewards, h) * jnp.nan_to_num(split)).sum(2)
    factor = _given_rewards(lengths.mean(1), _mean_of_products(lengths))
    factor = jnp.where(complete, factor, jnp.nan)
    return _summary(
        rewards,
        inner=jnp.where(both, inner, jnp.nan),
        squared_norms=jnp.where(complete, between, jnp.nan),
        parts=parts,
        lengths=lengths,
        square_factor=factor,
        inner_factor=factor,
        m_bound=m_bound,
        num_directions=num_directions,
    )


@float32_products()
def first_order_changes(
    inner: jax.Array, squared_norms: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First-order change of every prompt by a gradient step.

    The step is sum_y w_y g_y / L; prompt x's expected reward changes by
    w_x |g_x|^2 / L by its own gradient, and by the rest of <g_x, sum_y w_y g_y> / L by
    the others'. Numerators are unbiased. L^2 = sum_y w_y^2 |g_y|^2, of raw norms: the
    step has length 1 but for what gradients have in common. No estimate's sign decides
    what is kept or changes L, so a mean of signs over measurements is not biased.

    Args:
        inner: [P, P] of a `PromptGeometry`: unbiased off the diagonal, on which there
            are the raw squared norms.
        squared_norms: [P] of the same, debiased.
        weights: [P] prompt weights; a prompt of NaN norm is left out.

    Returns:
        (own [P], others [P]) in reward units; NaN if every sampled gradient is 0.
    """
    usable = jnp.isfinite(squared_norms)
    w = jnp.where(usable, weights, 0.0)
    squares = jnp.where(usable, squared_norms, 0.0)
    between = jnp.where(jnp.eye(len(w), dtype=bool), 0.0, inner)
    others = jnp.where(usable[None], between, 0.0) @ w
    total = (w**2) @ jnp.where(usable, jnp.diagonal(inner), 0.0)
    length = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), jnp.nan)
    own, others = w * squares / length, others / length
    return jnp.where(usable, own, jnp.nan), jnp.where(usable, others, jnp.nan)


def part_weights(rewards: jax.Array, parts: int) -> jax.Array:
    """[P, H, G // H] weights of rewards [P, G] cut into H parts, the rest left out.

    The sum over a part of weight * score is an unbiased estimate of the gradient.
    """
    split = _by_parts(rewards, parts)
    return _gradient_weights(split.reshape(-1, split.shape[-1])).reshape(split.shape)


def _summary(
    rewards: jax.Array,
    *,
    inner: jax.Array,
    squared_norms: jax.Array,
    parts: jax.Array,
    lengths: jax.Array,
    square_factor: jax.Array,
    inner_factor: jax.Array,
    m_bound: jax.Array,
    num_directions: int | None,
) -> PromptGeometry:
    """All fields of the geometry from inner products [P, P] and debiased norms [P].

    parts [P, H, P, H] and lengths [P, H] are of the parts; the factors [P] of
    `_given_rewards` are those of squared norms and of squared inner products.
    """
    statistics = group_statistics(rewards)
    raw = jnp.diagonal(inner)
    signal = ~statistics.tied & (raw > 0)
    unit = jnp.where(signal, jax.lax.rsqrt(jnp.where(signal, raw, 1.0)), jnp.nan)
    cosines = inner * unit[:, None] * unit[None]
    positive = signal & (squared_norms > 0)
    norms = jnp.where(
        positive, jnp.sqrt(jnp.where(positive, squared_norms, 1.0)), jnp.nan
    )
    off_diagonal = ~jnp.eye(len(raw), dtype=bool)
    both = signal[:, None] & signal[None] & off_diagonal
    sigma, _ = group_std(rewards, ddof=1)
    expected = squared_norms * square_factor + 0 * inner_factor  # NaN where either is
    expected = jnp.where(signal, expected, jnp.nan)
    squared_inner = _squared_inner(parts) * inner_factor[:, None] * inner_factor[None]
    terms = pair_terms(inner, expected, raw, squared_inner, num_directions)
    debiased = debiased_statistics(cosines, expected, raw, terms)
    finite = jnp.isfinite(cosines)
    largest = jnp.linalg.eigvalsh(jnp.where(finite, cosines, 0.0))[-1]
    floor = 0.0 if num_directions is None else (2 / (jnp.pi * num_directions)) ** 0.5
    m_bound = jnp.where(both, m_bound, jnp.nan)
    return PromptGeometry(
        inner=inner,
        squared_norms=squared_norms,
        raw_squared_norms=raw,
        expected_squared_norms=expected,
        squared_inner=squared_inner,
        cosines=cosines,
        **debiased._asdict(),
        noise_cosine=_noise_cosine(parts, lengths, expected, raw),
        chi=jnp.where(finite.any(), largest, jnp.nan),
        noise_floor=jnp.asarray(floor, inner.dtype),
        violating_fraction=(both & (inner < 0)).sum() / both.sum(),
        m_bound=m_bound,
        m_median=jnp.nanmedian(m_bound),
        m_p99=jnp.nanpercentile(m_bound, 99),
        norm_ratio=_percentile_ratio(norms),
        sigma_ratio=_percentile_ratio(jnp.where(signal, sigma, jnp.nan)),
    )


def _gradient_weights(rewards: jax.Array) -> jax.Array:
    """[P, G] leave-one-out advantages divided by the number of present rewards."""
    count = jnp.maximum(group_statistics(rewards).count, 1)
    return leave_one_out_advantages(rewards) / count[:, None]


def _by_parts(rewards: jax.Array, parts: int) -> jax.Array:
    """[P, H, G // H] rewards of H parts, those beyond them left out."""
    p, g = rewards.shape
    return rewards[:, : g // parts * parts].reshape(p, parts, g // parts)


def _squared_inner(parts: jax.Array) -> jax.Array:
    """[P, P] unbiased <g_i, g_j>^2 from inner products of parts [P, H, P, H].

    Mean over products of two inner products that share no part of either group.
    """
    h = parts.shape[1]
    total = parts.sum((1, 3)) ** 2
    same_left = (parts.sum(3) ** 2).sum(1)
    same_right = (parts.sum(1) ** 2).sum(2)
    both = (parts**2).sum((1, 3))
    return (total - same_left - same_right + both) / (h * (h - 1)) ** 2


def _mean_of_products(lengths: jax.Array) -> jax.Array:
    """[P] mean of the products of two different parts' lengths [P, H]."""
    h = lengths.shape[1]
    return (lengths.sum(1) ** 2 - (lengths**2).sum(1)) / (h * (h - 1))


def _given_rewards(length: jax.Array, product: jax.Array) -> jax.Array:
    """[P] factor that makes a product of two independent estimates one of the square.

    Given the rewards of its group, a prompt's estimated gradient has expectation
    `length` times the regression of scores on rewards (exactly so for rewards 0 and 1),
    length being the variance of the rewards. The products of estimates that share no
    sample have `product` times its square, which is less where parts of a group differ:
    0 where only one part has signal. Without the factor norms come out too short, and
    cosines too large. NaN where it is above MOST_UNEVEN: the rewards alone decide.
    """
    usable = product > length**2 / MOST_UNEVEN
    return jnp.where(usable, length**2 / jnp.where(usable, product, 1.0), jnp.nan)


@float32_products()
def _noise_cosine(
    parts: jax.Array, lengths: jax.Array, expected: jax.Array, raw: jax.Array
) -> jax.Array:
    """Scalar std of a raw cosine between two prompts' noise, from their parts.

    The noise of a part is what is left of it without its share of the prompt's mean;
    its variance goes with the part's length. Of all pairs with signal the variances of
    the inner products are added up, and divided by the sum of |noise|^2 |estimate|^2.
    """
    h = parts.shape[1]
    share = lengths / jnp.where(lengths.mean(1) > 0, lengths.mean(1), 1.0)[:, None]
    inverse = jnp.where(share > 0, 1 / jnp.where(share > 0, share, 1.0), 0.0)
    freedom = h * jnp.maximum((share > 0).sum(1) - 1, 1)
    left = parts - share[:, :, None, None] * parts.mean(1, keepdims=True)
    both = left - share[None, None] * left.mean(3, keepdims=True)
    one = jnp.einsum("phq,ph->pq", left.mean(3) ** 2, inverse) / freedom[:, None]
    two = jnp.einsum("phqk,ph,qk->pq", both**2, inverse, inverse)
    two /= freedom[:, None] * freedom[None]
    variance = one + one.T - two

    a = attenuations(expected, raw)
    used = jnp.isfinite(a)
    pairs = used[:, None] & used[None] & ~jnp.eye(len(a), dtype=bool)
    a, raw = jnp.where(used, a, 0.0), jnp.where(used, raw, 0.0)
    scale = (1 - a[:, None] * a[None]) * raw[:, None] * raw[None]
    total = jnp.where(pairs, scale, 0.0).sum()
    variance = jnp.where(pairs, variance, 0.0).sum()
    usable = (total > 0) & (variance > 0)
    return jnp.sqrt(jnp.where(usable, variance / jnp.where(usable, total, 1.0), 0.0))


def _debiased_squared_norms(rewards: jax.Array, within: jax.Array) -> jax.Array:
    """[P] mean over distinct (i, j, k, l) of (r_i - r_j) (r_k - r_l) <s_i, s_k>.

    `within` [P, G, G] holds the inner products <s_i, s_k> of one prompt's scores. The
    sums over j and l are in closed form, over the n present rewards; NaN for n < 4.
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
    total = jnp.where(pairs, w * within, 0).sum((1, 2))
    n = n[:, 0, 0]
    return jnp.where(n >= 4, total / jnp.maximum(n * (n - 1), 1), jnp.nan)


def _pairs_present(present: jax.Array) -> jax.Array:
    """[P, G, G] whether both samples of a pair are present, from [P, G]."""
    return present[:, :, None] & present[:, None, :]


def _percentile_ratio(values: jax.Array) -> jax.Array:
    """Scalar 95th over 5th percentile of the finite of [P]."""
    return jnp.nanpercentile(values, 95) / jnp.nanpercentile(values, 5)
