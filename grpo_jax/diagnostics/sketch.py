"""Random projections of gradients to K coordinates that preserve inner products.

`gradient_sketch` projects the score of every sequence by K random jvps: it forms no
gradient, and each coordinate costs a jvp. `gradient_hash` folds a gradient in memory
into K sums: all K for one pass over it, so K can be in the thousands. Inner products
are unbiased with both, with the same variance of order 1 / K.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.precision import float32_products


def gradient_sketch(
    log_prob_fn: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    num_directions: int,
) -> jax.Array:
    """Sketch S of per-sequence scores: E[S S^T / K] is their Gram matrix.

    One jvp per direction, entries +-1 (Rademacher, whose variance is at most that of
    normal ones). Nothing of size P x params is formed. An inner product <a, b> has
    variance at most (|a|^2 |b|^2 + <a, b>^2) / K.

    Args:
        log_prob_fn: params -> [P, G] sequence log-probs, in nats.
        params: Pytree of float arrays.
        key: PRNG key; direction k is drawn from fold_in(key, k).
        num_directions: K, at least 1.

    Returns:
        [P, G, K] derivatives of the log-probs along the directions, in nats.

    Raises:
        ValueError: `num_directions` is less than 1.
    """
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, got {num_directions}.")
    leaves, structure = jax.tree.flatten(params)

    def column(k: jax.Array) -> jax.Array:  # [P, G]
        keys = jax.random.split(jax.random.fold_in(key, k), len(leaves))
        direction = [
            jax.random.rademacher(key, x.shape, x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]
        tangent = structure.unflatten(direction)
        return jax.jvp(log_prob_fn, (params,), (tangent,))[1]

    columns = jax.lax.map(column, jnp.arange(num_directions))  # [K, P, G]
    return jnp.moveaxis(columns, 0, -1)


@float32_products()
def sketch_gram(sketch: jax.Array) -> jax.Array:
    """[P, G, P, G] estimated inner products of the scores, from a sketch [P, G, K]."""
    return jnp.einsum("pgk,qhk->pgqh", sketch, sketch) / sketch.shape[-1]


def exact_gram(log_prob_fn: Callable[[Any], jax.Array], params: Any) -> jax.Array:
    """[P, G, P, G] inner products of the scores of `log_prob_fn` (params -> [P, G]).

    P * G gradients are in memory at once: a reference for small models.
    """
    scores = jax.jacrev(log_prob_fn)(params)  # leaves [P, G, *shape]
    with float32_products():
        parts = [
            jnp.einsum("pgn,qhn->pgqh", x, x)
            for x in (y.reshape(*y.shape[:2], -1) for y in jax.tree.leaves(scores))
        ]
    return sum(parts[1:], parts[0])


def gradient_hash(gradient: Any, key: jax.Array, width: int) -> jax.Array:
    """Random sums h of a gradient's coordinates: E[h(a) . h(b)] = <a, b> over keys.

    Every coordinate gets a random sign and is added to one of K sums. Rows of K
    neighbours are rotated as one, so that no two of them share a sum, and a column of a
    matrix is spread over the sums. An inner product has variance at most
    (|a|^2 |b|^2 + <a, b>^2) / K, and is exact for at most K coordinates, which are
    returned unchanged, padded with zeros.

    Args:
        gradient: Pytree of float arrays.
        key: PRNG key, the same for all gradients that are compared.
        width: K, at least 1.

    Returns:
        [K], float32 or the widest dtype of the leaves.

    Raises:
        ValueError: `width` is less than 1.

    References:
        Charikar et al. 2002 (the count sketch).
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    leaves = jax.tree.leaves(gradient)
    dtype = jnp.promote_types(jnp.result_type(*leaves), jnp.float32)
    if sum(x.size for x in leaves) <= width:
        flat = jnp.concatenate([x.ravel().astype(dtype) for x in leaves])
        return jnp.pad(flat, (0, width - flat.size))
    total = jnp.zeros(width, dtype)
    for i, leaf in enumerate(leaves):
        total += _hashed(leaf.ravel().astype(dtype), jax.random.fold_in(key, i), width)
    return total


def _hashed(flat: jax.Array, key: jax.Array, width: int) -> jax.Array:
    """[width] signed sums of a vector [N]."""
    rows = -(-flat.size // width)
    signs, shifts = jax.random.split(key)
    words = jax.random.bits(signs, (-(-rows * width // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.ravel()[: rows * width].reshape(rows, width)
    table = jnp.pad(flat, (0, rows * width - flat.size)).reshape(rows, width)
    table = jnp.where(bits.astype(bool), table, -table)
    shift = jax.random.randint(shifts, (rows, 1), 0, width)
    rotated = (jnp.arange(width)[None] + shift) % width
    return jnp.take_along_axis(table, rotated, axis=1).sum(0)
