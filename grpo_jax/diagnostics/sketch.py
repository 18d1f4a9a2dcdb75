"""Gradients too large to keep, as a few coordinates that preserve inner products.

Two ways. `gradient_sketch` sees the score of every sequence through K random jvps: no
gradient is ever formed, and each direction costs a jvp. `gradient_hash` folds one
gradient that is there into K sums: all coordinates for the price of reading it once,
so K can be in the thousands. Both are unbiased, with the same error of order 1 / K.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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


def gradient_hash(gradient: Any, key: jax.Array, width: int) -> jax.Array:
    """[width] vector h with E[h(a) . h(b)] = <a, b> over keys.

    Every coordinate gets a random sign and is added to one of `width` sums; those of a
    row of `width` neighbours are rotated together, so that none of them meet and no
    column of a matrix falls into one sum. The error of an inner product has variance at
    most (|a|^2 |b|^2 + <a, b>^2) / width. A gradient of at most `width` coordinates is
    returned as it is, filled with zeros: exact.

    Args:
        gradient: Pytree of float arrays.
        key: The same for all that are to be compared.
        width: K, at least 1.

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


def _hashed(flat, key, width):
    rows = -(-flat.size // width)
    signs, shifts = jax.random.split(key)
    words = jax.random.bits(signs, (-(-rows * width // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.ravel()[: rows * width].reshape(rows, width)
    table = jnp.pad(flat, (0, rows * width - flat.size)).reshape(rows, width)
    table = jnp.where(bits.astype(bool), table, -table)
    shift = jax.random.randint(shifts, (rows, 1), 0, width)
    place = (jnp.arange(width)[None] + shift) % width
    return jnp.take_along_axis(table, place, axis=1).sum(0)
