"""The geometry of per-prompt gradients: how far prompts can be scaled independently.

Normalisation scales each prompt's gradient by a positive number, so it changes none of
the cosines measured here. Exactly, for models small enough to hold the gradients; or
from a sketch: K jvps along random directions give every sequence's score K coordinates,
and all inner products follow from that, with a known error. What a group of samples
inflates (norms, and so it shrinks cosines) is debiased; the raw figures stand beside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_statistics, leave_one_out_advantages


class CosineStatistics(NamedTuple):
    """Over the pairs i < j of P prompts; each a scalar."""

    mean: jax.Array
    std: jax.Array
    mean_abs: jax.Array
    positive_fraction: jax.Array
    small_fraction: jax.Array  # of pairs with |cos| < 0.1


def exact_cosines(
    value_fn: Callable[[Any, Any], jax.Array], params: Any, examples: Any
) -> jax.Array:
    """[P, P] cosines between the gradients of value_fn(params, example) for P examples.

    Holds P gradients at once: P * params * 4 bytes.

    Args:
        value_fn: (params, example) -> scalar.
        params: Pytree of float32.
        examples: Pytree of arrays with a leading axis of P.
    """

    def gradient(example):
        grads = jax.grad(value_fn)(params, example)
        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    gradients = jax.lax.map(gradient, examples)  # [P, params]
    norms = jnp.linalg.norm(gradients, axis=1, keepdims=True)
    unit = gradients / jnp.where(norms > 0, norms, 1.0)
    return unit @ unit.T


def cosine_statistics(cosines: jax.Array) -> CosineStatistics:
    """Summary of the off-diagonal of cosines [P, P], P at least 2."""
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1] or len(cosines) < 2:
        raise ValueError(f"cosines must be [P >= 2, P], got {cosines.shape}.")
    rows, columns = jnp.triu_indices(cosines.shape[0], k=1)
    pairs = cosines[rows, columns]
    return CosineStatistics(
        pairs.mean(),
        pairs.std(),
        jnp.abs(pairs).mean(),
        (pairs > 0).mean(),
        (jnp.abs(pairs) < 0.1).mean(),
    )


def gradient_sketch(
    log_prob_fn: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    num_directions: int,
) -> jax.Array:
    """[P, G, K] sketch S of per-sequence scores: E[S S^T / K] is their Gram matrix.

    One jvp per direction, entries +-1 (Rademacher: never a larger variance than a
    normal's). Nothing of size P x params is formed. The error of an inner product has
    variance at most (|a|^2 |b|^2 + <a, b>^2) / K.

    Args:
        log_prob_fn: params -> [P, G] log-probs of whole completions.
        params: Pytree of float arrays.
        key: PRNG key; direction k is drawn from fold_in(key, k).
        num_directions: K, at least 1.
    """
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, got {num_directions}.")
    leaves, structure = jax.tree.flatten(params)

    def column(k):
        keys = jax.random.split(jax.random.fold_in(key, k), len(leaves))
        direction = [
            jax.random.rademacher(key, x.shape, x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]
        tangent = structure.unflatten(direction)
        return jax.jvp(log_prob_fn, (params,), (tangent,))[1]

    columns = jax.lax.map(column, jnp.arange(num_directions))  # [K, P, G]
    return jnp.moveaxis(columns, 0, -1)


def sketch_gram(sketch: jax.Array) -> jax.Array:
    """[P, G, P, G] inner products of the scores that a sketch [P, G, K] estimates."""
    return jnp.einsum("pgk,qhk->pgqh", sketch, sketch) / sketch.shape[-1]


def exact_gram(log_prob_fn: Callable[[Any], jax.Array], params: Any) -> jax.Array:
    """[P, G, P, G] inner products of all scores, from the scores themselves.

    Holds P * G gradients: the oracle for small models.
    """
    scores = jax.jacrev(log_prob_fn)(params)  # leaves [P, G, *shape]
    parts = [
        jnp.einsum("pgn,qhn->pgqh", x, x)
        for x in (y.reshape(*y.shape[:2], -1) for y in jax.tree.leaves(scores))
    ]
    return sum(parts[1:], parts[0])


class PromptGeometry(NamedTuple):
    """Of P prompts' gradients, from rewards and a Gram matrix; m_* over ordered pairs.

    A prompt without signal (tied, or fewer than 4 rewards for what is debiased) is NaN
    in the matrices and left out of the scalars.
    """

    inner: jax.Array  # [P, P], unbiased off the diagonal
    squared_norms: jax.Array  # [P] debiased |grad J_x|^2; may be negative
    raw_squared_norms: jax.Array  # [P] |estimated gradient|^2, inflated by noise / G
    cosines: jax.Array  # [P, P] raw, attenuated by that inflation
    debiased_cosines: jax.Array  # [P, P]; NaN where a debiased norm is not positive
    mean_cosine: jax.Array  # debiased: sum of inner / sum of products of norms, the raw
    # norms times one attenuation for all prompts, sum of debiased / sum of raw squares
    raw_statistics: CosineStatistics  # of `cosines`
    chi: jax.Array  # largest eigenvalue of `cosines`, in [1, P]
    noise_floor: jax.Array  # mean |cos| that K directions show of orthogonal vectors
    violating_fraction: jax.Array  # of pairs with a negative inner product
    m_median: jax.Array  # M over the other pairs: |X_i g_j|^2 / (|X_i|^2 <g_i, g_j>)
    m_p99: jax.Array
    norm_ratio: jax.Array  # R1: 95th over 5th percentile of the norms
    sigma_ratio: jax.Array  # R2: the same of the groups' std, ties left out


def prompt_geometry(
    rewards: jax.Array, gram: jax.Array, *, num_directions: int | None = None
) -> PromptGeometry:
    """What the Gram matrix of scores and the rewards say about prompts' gradients.

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
    count = jnp.maximum(statistics.count, 1)
    weights = leave_one_out_advantages(rewards) / count[:, None]  # [P, G]
    pulled = jnp.einsum("pgqh,qh->pgq", gram, weights)  # X_p g_q
    pulled = jnp.where(statistics.present[..., None], pulled, 0.0)
    inner = jnp.einsum("pg,pgq->pq", weights, pulled)
    own = jnp.einsum("pgph->pgh", gram)
    raw = jnp.diagonal(inner)
    squared = _debiased_squared_norms(rewards, own)

    signal = ~statistics.tied & (raw > 0)
    unit = jnp.where(signal, jax.lax.rsqrt(jnp.where(signal, raw, 1.0)), jnp.nan)
    cosines = inner * unit[:, None] * unit[None]
    known = signal & (squared > 0)
    norms = jnp.where(known, jnp.sqrt(jnp.where(known, squared, 1.0)), jnp.nan)
    debiased = inner / (norms[:, None] * norms[None])
    upper = jnp.triu(jnp.ones((p, p), bool), 1)
    pairs = upper & signal[:, None] & signal[None]

    def mean_over(values, where):
        total = jnp.where(where, values, 0).sum()
        return total / where.sum()  # NaN without any

    # Pooled before dividing: one prompt's debiased square may well be negative.
    counted = signal & jnp.isfinite(squared)
    level = jnp.where(counted, squared, 0.0).sum()
    shrink = jnp.maximum(level, 0) / jnp.where(counted, raw, 0.0).sum()
    products = jnp.sqrt(jnp.maximum(raw[:, None] * raw[None], 0)) * shrink
    mean_cosine = mean_over(inner, pairs) / mean_over(products, pairs)

    both = (pairs | pairs.T) & (inner > 0)
    spread = jnp.linalg.eigvalsh(own * _pairs_present(statistics.present))[:, -1]
    bound = (pulled**2).sum(1) / (spread[:, None] * jnp.where(both, inner, 1.0))
    bound = jnp.where(both, bound, jnp.nan)
    sigma = jnp.sqrt((statistics.centred**2).sum(1) / count)
    floor = 0.0 if num_directions is None else (2 / (jnp.pi * num_directions)) ** 0.5
    filled = jnp.where(signal[:, None] & signal[None], cosines, 0.0)
    return PromptGeometry(
        inner=inner,
        squared_norms=squared,
        raw_squared_norms=raw,
        cosines=cosines,
        debiased_cosines=debiased,
        mean_cosine=mean_cosine,
        raw_statistics=_pair_statistics(cosines, pairs),
        chi=jnp.linalg.eigvalsh(filled)[-1],
        noise_floor=jnp.asarray(floor, inner.dtype),
        violating_fraction=mean_over(inner < 0, pairs),
        m_median=jnp.nanmedian(bound),
        m_p99=jnp.nanpercentile(bound, 99),
        norm_ratio=_percentile_ratio(norms),
        sigma_ratio=_percentile_ratio(jnp.where(signal, sigma, jnp.nan)),
    )


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


def _pair_statistics(cosines, pairs):
    count = pairs.sum()

    def mean(values):
        return jnp.where(pairs, values, 0).sum() / count

    centre = mean(cosines)
    return CosineStatistics(
        centre,
        jnp.sqrt(mean((cosines - centre) ** 2)),
        mean(jnp.abs(cosines)),
        mean(cosines > 0),
        mean(jnp.abs(cosines) < 0.1),
    )


def _percentile_ratio(values):
    return jnp.nanpercentile(values, 95) / jnp.nanpercentile(values, 5)
