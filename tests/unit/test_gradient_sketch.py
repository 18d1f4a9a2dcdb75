"""Hashed gradients: unbiased, with the stated error, exact where they fit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.diagnostics.sketch import gradient_hash


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(7, 5)) * scale),
        "b": jnp.asarray(rng.normal(size=11)),
    }


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a.values(), b.values(), strict=True))


def test_a_gradient_that_fits_is_unchanged(x64):
    a, b = tree(0), tree(1)
    ha, hb = (gradient_hash(x, jax.random.key(0), 50) for x in (a, b))
    chex.assert_shape(ha, (50,))  # of 46 coordinates
    np.testing.assert_allclose(ha @ hb, inner(a, b), rtol=1e-12)


# E = <a, b>, Var <= (|a|^2 |b|^2 + <a, b>^2) / K, over keys.
@pytest.mark.parametrize("width", [4, 16])
def test_hashed_inner_products(x64, width):
    a, b = tree(2, scale=3.0), tree(3)

    @jax.jit
    @jax.vmap
    def products(key):
        return gradient_hash(a, key, width) @ gradient_hash(b, key, width)

    result = np.asarray(products(jax.random.split(jax.random.key(0), 8000)))
    true = float(inner(a, b))
    bound = (inner(a, a) * inner(b, b) + true**2) / width
    assert abs(result.mean() - true) < 4 * result.std() / 8000**0.5
    assert 0.5 * bound < result.var() < 1.05 * bound


# Energy in one column of a matrix must not fall into one sum.
def test_a_column_is_spread(x64):
    column = {"a": jnp.zeros((64, 8)).at[:, 3].set(1.0)}

    @jax.jit
    @jax.vmap
    def squares(key):
        h = gradient_hash(column, key, 8)
        return h @ h

    result = np.asarray(squares(jax.random.split(jax.random.key(1), 4000)))
    assert abs(result.mean() - 64) < 4 * result.std() / 4000**0.5
    assert result.var() < 1.1 * 2 * 64**2 / 8


def test_the_key_alone_decides():
    a = tree(4)
    one, two = (gradient_hash(a, jax.random.key(k), 8) for k in (0, 1))
    np.testing.assert_array_equal(one, gradient_hash(a, jax.random.key(0), 8))
    assert not np.allclose(one, two)


def test_a_width_of_0_raises():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        gradient_hash(tree(0), jax.random.key(0), 0)
