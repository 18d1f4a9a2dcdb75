"""The arithmetic of one block of scores, held transposed: [keys, queries]."""

import jax
import jax.numpy as jnp

from grpo_jax.logprobs import soft_capped
from grpo_jax.models.attention import MASKED

KEYS, QUERIES = 0, 1  # axes of scores


def product(x: jax.Array, y: jax.Array, over_x: int, over_y: int) -> jax.Array:
    """[block or d, ...] of two blocks [.., ..], summed over an axis of each."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    precisions = jax.lax.Precision  # whatever jax's default was set to
    exact = precisions.HIGHEST if x.dtype == wide else precisions.DEFAULT
    return jax.lax.dot_general(
        x,
        y,
        (((over_x,), (over_y,)), ((), ())),
        precision=exact,
        preferred_element_type=wide,
    )


def scores_of(softcap: float | None, k: jax.Array, q: jax.Array) -> jax.Array:
    """[keys, queries] of k and q [block, d]."""
    return soft_capped(product(k, q, 1, 1), softcap)


def weights_and_change(
    softcap: float | None,
    k: jax.Array,
    v: jax.Array,
    q: jax.Array,
    cotangent: jax.Array,
    log_total: jax.Array,
    inner: jax.Array,
    seen: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(softmax weights, the loss's derivatives by uncapped scores), [keys, queries].

    Args:
        softcap: Caps the scores; None: not.
        k, v, q, cotangent: [block, d].
        log_total, inner: [1, queries], the softmax's, and cotangent times output.
        seen: [keys, queries] bool.
    """
    scores = scores_of(softcap, k, q)
    weights = jnp.exp(jnp.where(seen, scores, MASKED) - log_total)
    weights = jnp.where(seen, weights, 0.0)  # of a row that sees nothing too
    change = weights * (product(v, cotangent, 1, 1) - inner)
    if softcap is not None:
        change *= 1 - (scores / softcap) ** 2
    return weights, jnp.where(seen, change, 0.0)
