"""The geometry of per-prompt gradients, exactly, for models small enough to hold them.

Normalisation scales each prompt's gradient by a positive number, so it changes none of
the cosines measured here; they say how far prompts can be scaled independently.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
