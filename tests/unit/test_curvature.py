import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import directional_derivatives, prompt_curvature, prompt_slope

NAN = float("nan")
K, D = 4, 3  # answers of one prompt, features
RNG = np.random.default_rng(0)
FEATURES, OFFSETS = RNG.normal(size=(K, D)), RNG.normal(size=K)
THETA, DIRECTION = RNG.normal(size=(2, D))
BINARY, GRADED = np.array([1.0, 0, 0, 1]), np.array([0.3, -2, 1, 0.5])


def log_linear(theta):
    return jax.nn.log_softmax(FEATURES @ theta + OFFSETS)


def curved(theta):
    """Not linear in its parameters before the softmax."""
    return jax.nn.log_softmax(jnp.tanh(FEATURES @ theta) * theta.sum())


def along(function, theta=THETA, direction=DIRECTION):
    """(value, slope, curvature) of a function from its gradient and Hessian."""
    slope = jax.jacobian(function)(theta) @ direction
    return function(theta), slope, jax.hessian(function)(theta) @ direction @ direction


@pytest.mark.parametrize("policy", [log_linear, curved])
def test_directional_derivatives(policy, x64):
    def log_probs(theta):
        return policy(theta).reshape(2, 2)

    actual = jax.jit(lambda *x: directional_derivatives(log_probs, *x))
    expected = tuple(x.reshape(2, 2) for x in along(policy))
    chex.assert_trees_all_close(actual(THETA, DIRECTION), expected, rtol=1e-11)


def test_directional_derivatives_take_any_pytree():
    def log_probs(params):
        return (params["a"] ** 2 * params["b"]).reshape(1, 1)

    params = {"a": jnp.float32(3), "b": jnp.float32(2)}
    direction = {"a": jnp.float32(1), "b": jnp.float32(-1)}
    # a = 3 + t, b = 2 - t: 18 + 3 t - 4 t^2 - t^3.
    actual = jax.jit(lambda *x: directional_derivatives(log_probs, *x))
    np.testing.assert_allclose(np.ravel(actual(params, direction)), [18, 3, -8])


# Every group of G answers, weighted by its probability.
@pytest.mark.parametrize(
    ("policy", "rewards", "group_size"),
    [(log_linear, BINARY, 3), (log_linear, GRADED, 2), (curved, GRADED, 3)],
    ids=["binary", "pairs", "curved"],
)
def test_slope_and_curvature_are_unbiased(policy, rewards, group_size, x64):
    groups = np.array(list(itertools.product(range(K), repeat=group_size)))

    @jax.jit
    def expected(theta):
        value, first, second = directional_derivatives(
            lambda theta: policy(theta)[groups], theta, DIRECTION
        )
        probability = jnp.exp(value.sum(1))
        slope = prompt_slope(rewards[groups], first)
        curvature = prompt_curvature(rewards[groups], first, second)
        return probability @ slope, probability @ curvature

    _, slope, curvature = along(lambda theta: jnp.exp(policy(theta)) @ rewards)
    actual = expected(THETA)
    np.testing.assert_allclose(actual, (slope, curvature), rtol=1e-11, atol=1e-14)


# (1, 0) by leave-one-out: advantages (1, -1), mean of 3 - 5. Curvature of (4, 7):
# 9 + 4 - 25 - 7.
def test_slope_and_curvature_by_hand():
    rewards, first = np.float32([[1, 0]]), np.float32([[3, 5]])
    np.testing.assert_allclose(jax.jit(prompt_slope)(rewards, first), [-1])
    curvature = jax.jit(prompt_curvature)(rewards, first, np.float32([[4, 7]]))
    np.testing.assert_allclose(curvature, [-19 / 2])


def test_missing_rewards_take_no_part():
    rewards = np.float32([[1, NAN, 0, 4], [NAN, NAN, 3, NAN], [NAN] * 4, [2] * 4])
    first = np.float32(RNG.normal(size=(4, 4)))
    first[0, 1] = NAN
    second = first + 1
    kept = [0, 2, 3]
    for function, values in (
        (prompt_slope, [first]),
        (prompt_curvature, [first, second]),
    ):
        actual = jax.jit(function)(rewards, *values)
        without = jax.jit(function)(rewards[:1, kept], *(x[:1, kept] for x in values))
        np.testing.assert_allclose(actual[0], without[0], rtol=1e-5)
        np.testing.assert_array_equal(actual[1:], [0, 0, 0])


@pytest.mark.parametrize("shape", [(2, 4), (3,), (6,)])
def test_derivatives_fit_the_rewards(shape):
    rewards, values = np.zeros((2, 3), np.float32), np.zeros(shape, np.float32)
    message = r"derivatives must be \(2, 3\), the rewards' shape, got \("
    with pytest.raises(ValueError, match=message):
        jax.jit(prompt_slope)(rewards, values)
    with pytest.raises(ValueError, match=message):
        jax.jit(prompt_curvature)(rewards, values, values)
