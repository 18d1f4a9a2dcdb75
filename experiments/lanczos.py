"""Extreme eigenvalues of a symmetric matrix from its products with vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def extremes(
    product: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(least and greatest eigenvalue, error of the larger in size) by Lanczos.

    product: v [N] -> H v [N]; start: [N], of norm 1. Without reorthogonalisation, which
    makes copies of extreme eigenvalues and moves none of them.
    """

    def one(carry, _):
        before, v, beta = carry
        w = product(v) - beta * before
        alpha = v @ w
        w -= alpha * v
        beta = jnp.linalg.norm(w)
        return (v, w / jnp.maximum(beta, 1e-30), beta), (alpha, beta)

    carry = (jnp.zeros_like(start), start, jnp.zeros(()))
    _, (alpha, beta) = jax.lax.scan(one, carry, length=steps)
    off = jnp.diag(beta[:-1], 1)
    values, vectors = jnp.linalg.eigh(jnp.diag(alpha) + off + off.T)
    top = jnp.abs(values).argmax()
    return values[0], values[-1], beta[-1] * jnp.abs(vectors[-1, top])
