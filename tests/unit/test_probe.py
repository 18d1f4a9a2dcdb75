"""Estimates for one prompt, against a policy whose expectations are finite sums."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.diagnostics.probe import num_parts, probe_prompt

FEATURES = np.random.default_rng(0).normal(size=(3, 4))
REWARDS = np.array([1.0, 0.0, 0.0])
THETA = np.array([0.3, -0.2, 0.1, 0.4])


def log_probs(theta, samples):
    # tanh: a second derivative that differs from response to response.
    return jax.nn.log_softmax(jnp.tanh(FEATURES @ theta) * 2)[samples]


def pass_rate(theta):
    return jnp.exp(log_probs(theta, jnp.arange(3))) @ REWARDS


def probe(samples, answer=None):
    rewards = jnp.asarray(REWARDS)[samples]
    return probe_prompt(log_probs, THETA, samples, rewards, jnp.ravel, answer)


def every_group(size):
    groups = np.array(list(itertools.product(range(3), repeat=size)))
    mass = np.exp(log_probs(THETA, np.arange(3)))[groups].prod(1)
    return groups, mass


# Over all groups of 4: every part's vector averages to the gradient.
def test_parts_are_unbiased(x64):
    groups, mass = every_group(4)
    result = jax.jit(jax.vmap(probe))(groups)
    chex.assert_shape(result.vectors, (81, 2, 4))
    mean = np.einsum("n,nhk->hk", mass, result.vectors)
    np.testing.assert_allclose(mean, np.stack([jax.grad(pass_rate)(THETA)] * 2))


# Given the half that makes the direction, the other half's estimate averages to the
# curvature (slope) along it: so their error averages to 0 whatever the direction.
def test_curvature_along_a_half_s_gradient_is_unbiased_given_it(x64):
    groups, mass = every_group(4)
    result = jax.jit(jax.vmap(partial(probe, answer=jnp.array([0]))))(groups)
    for name in ("curvature", "slope"):
        gap = getattr(result, name) - getattr(result, f"exact_{name}")
        assert np.array_equal(np.isnan(gap), result.halves == 0)
        total = np.nansum(mass * result.halves * gap)
        np.testing.assert_allclose(total, 0, atol=1e-12)
    assert set(np.asarray(result.halves)) == {0, 1, 2}


def test_exact_figures_are_those_of_the_pass_rate(x64):
    samples = jnp.array([0, 1, 0, 2])
    result = jax.jit(partial(probe, answer=jnp.array([0])))(samples)
    gradient, hessian = jax.grad(pass_rate)(THETA), jax.hessian(pass_rate)(THETA)
    np.testing.assert_allclose(result.exact_vector, gradient)
    directions = np.array(result.vectors)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    along = np.einsum("hi,ij,hj->h", directions, hessian, directions)
    np.testing.assert_allclose(result.exact_curvature, along.mean())
    np.testing.assert_allclose(result.exact_slope, (directions @ gradient).mean())


# |u'Hu| <= sigma^2 (largest - smallest second derivative of a likelihood).
def test_the_spread_bounds_the_curvature(x64):
    samples = jnp.array([0, 1, 2, 0, 1, 2])  # every response in either half
    result = jax.jit(partial(probe, answer=jnp.array([0])))(samples)
    p = float(pass_rate(THETA))
    assert abs(result.exact_curvature) <= p * (1 - p) * result.spread


def test_a_tied_half_gives_no_direction(x64):
    rewards = jnp.array([1.0, 1, 0, 1])
    result = probe_prompt(log_probs, THETA, jnp.array([0, 0, 1, 0]), rewards, jnp.ravel)
    untied = probe_prompt(
        log_probs, THETA, jnp.array([1, 0, 1, 0]), jnp.array([0.0, 1, 0, 1]), jnp.ravel
    )
    assert np.isfinite(result.curvature) and np.isfinite(untied.curvature)
    tied = probe_prompt(log_probs, THETA, jnp.zeros(4, int), jnp.ones(4), jnp.ravel)
    assert np.isnan(tied.curvature) and not np.asarray(tied.vectors).any()
    assert np.isnan(result.exact_curvature)  # no answer was given


def test_a_missing_reward_takes_no_part(x64):
    rewards = jnp.array([1.0, 0, jnp.nan, 1, 0, 0])
    other = jnp.array([0, 1, 2, 0, 1, 1])
    result, same = (
        probe_prompt(log_probs, THETA, other.at[2].set(x), rewards, jnp.ravel)
        for x in (0, 1)
    )
    np.testing.assert_allclose(result.vectors, same.vectors)
    np.testing.assert_allclose(result.curvature, same.curvature)


# Unlike a tied half, one without two rewards measures nothing.
def test_a_half_without_rewards_is_not_a_measurement_of_0(x64):
    samples, nan = jnp.array([0, 1, 2, 1, 0, 1, 2, 0]), jnp.nan
    rewards = jnp.array([1.0, 0, 0, 0, nan, nan, nan, 1.0])
    result = probe_prompt(log_probs, THETA, samples, rewards, jnp.ravel)
    assert np.isnan(result.curvature) and result.halves == 0
    rewards = rewards.at[6].set(0.0)
    result = probe_prompt(log_probs, THETA, samples, rewards, jnp.ravel)
    assert result.halves == 2


@pytest.mark.parametrize(("size", "parts"), [(4, 2), (8, 2), (15, 2), (16, 4)])
def test_parts_of_a_group(size, parts):
    assert num_parts(size) == parts


def test_three_samples_cannot_be_split():
    with pytest.raises(ValueError, match="group_size must be at least 4 .* got 3"):
        num_parts(3)
