"""Gradient geometry from sketches and groups, against exact scores."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.diagnostics.geometry import prompt_geometry
from grpo_jax.diagnostics.sketch import exact_gram, gradient_sketch, sketch_gram

NAN = float("nan")


def linear(num_prompts=3, group_size=4, width=30, seed=0):
    """(log_prob_fn, params, scores [P, G, D]) whose scores do not depend on params."""
    scores = np.random.default_rng(seed).normal(size=(num_prompts, group_size, width))

    def log_prob_fn(params):
        return scores @ jnp.concatenate([params["a"], params["b"].ravel()])

    params = {"a": jnp.zeros(width - 6), "b": jnp.zeros((2, 3))}
    return log_prob_fn, params, scores


def test_the_exact_gram_is_all_inner_products(x64):
    log_prob_fn, params, scores = linear()
    params = jax.tree.map(lambda x: x.astype(float), params)
    actual = jax.jit(partial(exact_gram, log_prob_fn))(params)
    np.testing.assert_allclose(actual, np.einsum("pgd,qhd->pgqh", scores, scores))


# Rademacher: Var <a, b>_K = (|a|^2 |b|^2 + <a, b>^2 - 2 sum a^2 b^2) / K.
def test_a_sketch_is_unbiased_with_the_stated_variance(x64):
    log_prob_fn, params, scores = linear()
    params = jax.tree.map(lambda x: x.astype(float), params)
    keys = jax.random.split(jax.random.key(0), 4000)
    sketches = jax.jit(
        jax.vmap(lambda key: sketch_gram(gradient_sketch(log_prob_fn, params, key, 8)))
    )(keys)
    exact = np.einsum("pgd,qhd->pgqh", scores, scores)
    norms = np.einsum("pgd,pgd->pg", scores, scores)
    fourth = np.einsum("pgd,qhd->pgqh", scores**2, scores**2)
    variance = (norms[..., None, None] * norms + exact**2 - 2 * fourth) / 8
    error = np.asarray(sketches).mean(0) - exact
    assert np.abs(error / np.sqrt(variance / 4000)).max() < 4.5
    ratio = np.asarray(sketches).var(0) / variance
    assert abs(ratio.mean() - 1) < 0.02 and np.abs(ratio - 1).max() < 0.2


def test_a_direction_does_not_depend_on_how_many_follow():
    log_prob_fn, params, _ = linear()
    few, many = (
        jax.jit(partial(gradient_sketch, log_prob_fn, num_directions=k))(
            params, jax.random.key(1)
        )
        for k in (3, 7)
    )
    np.testing.assert_array_equal(many[..., :3], few)


# Over all groups of 4 of a policy with three responses: inner products between prompts
# and the debiased squared norms average to those of the true gradients.
def test_debiased_norms_and_inner_products_by_enumeration(x64):
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(2, 3, 5))
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    scores -= np.einsum("pk,pkd->pd", p, scores)[:, None]
    rewards = np.array([[1.0, 0, 0], [1.0, 0.5, 0]])
    true = np.einsum("pk,pk,pkd->pd", p, rewards, scores)

    @jax.jit
    def estimates(groups):
        s = jnp.take_along_axis(scores, groups[..., None], 1)
        r = jnp.take_along_axis(rewards, groups, 1)
        result = prompt_geometry(r, jnp.einsum("pgd,qhd->pgqh", s, s))
        mass = jnp.take_along_axis(p, groups, 1).prod(1)
        return result.squared_norms, result.inner, result.raw_squared_norms, mass

    groups = np.array(list(itertools.product(range(3), repeat=4)))
    pairs = np.stack([groups, groups], 1)  # the same draw for both prompts
    squared, _, raw, mass = jax.vmap(estimates)(pairs)
    expected = (squared * mass).sum(0)
    np.testing.assert_allclose(expected, (true**2).sum(1), rtol=1e-9)
    assert ((raw * mass).sum(0) > 1.2 * expected).all()  # what is debiased away
    first, second = np.meshgrid(np.arange(81), np.arange(81), indexing="ij")
    both = np.stack([groups[first.ravel()], groups[second.ravel()]], 1)
    _, inner, _, mass = jax.vmap(estimates)(both)
    total = (inner[:, 0, 1] * mass.prod(1)).sum()
    np.testing.assert_allclose(total, true[0] @ true[1], rtol=1e-9)


def test_a_missing_reward_leaves_the_group_of_the_others(x64):
    rng = np.random.default_rng(3)
    scores, rewards = rng.normal(size=(2, 6, 5)), rng.random((2, 6))
    gram = np.einsum("pgd,qhd->pgqh", scores, scores)
    missing = rewards.copy()
    missing[:, 2] = NAN
    gram[:, 2], gram[:, :, :, 2] = 1e3, 1e3
    keep = [0, 1, 3, 4, 5]
    with_gap = jax.jit(prompt_geometry)(missing, gram)
    part = jax.jit(prompt_geometry)(rewards[:, keep], gram[:, keep][:, :, :, keep])
    names = ("inner", "squared_norms", "cosines", "chi", "mean_cosine", "m_median")
    actual, expected = ({n: getattr(x, n) for n in names} for x in (with_gap, part))
    chex.assert_trees_all_close(actual, expected, rtol=1e-9)


# Groups of 4 shrink a cosine of .44 to a fraction of it.
def test_the_debiased_mean_cosine_is_right_where_the_raw_one_is_not(x64):
    rng = np.random.default_rng(4)
    width, prompts, group = 200, 2, 4
    shared = rng.normal(size=width) * 0.35
    own = rng.normal(size=(prompts, width)) * 0.4
    true = shared + own  # d of each prompt's score with its reward
    target = true[0] @ true[1] / np.linalg.norm(true, axis=1).prod()

    @jax.jit
    def trial(key):
        a, b = jax.random.split(key)
        r = jax.random.bernoulli(a, 0.5, (prompts, group)).astype(float)
        noise = jax.random.normal(b, (prompts, group, width))
        s = (r - 0.5)[..., None] * true[:, None] * 2 + noise
        result = prompt_geometry(r, jnp.einsum("pgd,qhd->pgqh", s, s))
        return result.inner[0, 1], result.squared_norms, result.raw_squared_norms

    inner, squared, raw = jax.vmap(trial)(jax.random.split(jax.random.key(0), 4000))
    debiased = inner.mean() / np.sqrt(squared.mean(0).prod())
    error = inner.std() / np.sqrt(len(inner)) / np.sqrt(squared.mean(0).prod())
    assert abs(debiased - target) < 4 * error
    shrunk = inner.mean() / np.sqrt(raw.mean(0).prod())
    assert shrunk < 0.8 * target and abs(shrunk - target) > 6 * error


@pytest.mark.parametrize("reward", [1.0, np.nan], ids=["tied", "missing"])
def test_prompts_without_signal_have_no_figures(reward):
    scores = jax.random.normal(jax.random.key(0), (3, 4, 8))
    gram = jnp.einsum("pgd,qhd->pgqh", scores, scores)
    result = jax.jit(prompt_geometry)(jnp.full((3, 4), reward), gram)
    for name in ("chi", "violating_fraction", "mean_cosine", "m_median"):
        assert np.isnan(getattr(result, name)), name


# Two prompts at 60 degrees, one tied: cosines 1/2, chi 1.5, no violating pair.
def test_summaries_by_hand(x64):
    scores = np.zeros((3, 2, 2))
    scores[0], scores[1] = [[1, 0], [-1, 0]], [[0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]]
    scores[2] = [[5, 5], [5, 5]]
    rewards = np.array([[1.0, 0], [1.0, 0], [1.0, 1.0]])
    gram = np.einsum("pgd,qhd->pgqh", scores, scores)
    result = jax.jit(partial(prompt_geometry, num_directions=64))(rewards, gram)
    np.testing.assert_allclose(result.cosines[0, 1], 0.5)
    assert np.isnan(result.cosines[2]).all() and np.isnan(result.squared_norms).all()
    np.testing.assert_allclose(result.chi, 1.5)
    assert result.violating_fraction == 0
    np.testing.assert_allclose(result.raw_statistics.mean, 0.5)
    np.testing.assert_allclose(result.noise_floor, (2 / (np.pi * 64)) ** 0.5)
    # |X_i g_j|^2 / (|X_i|^2 <g_i, g_j>) = 2 (1/2)^2 / (2 * 1/2), with g of unit length.
    np.testing.assert_allclose(result.m_median, 0.5)
    np.testing.assert_allclose([result.norm_ratio, result.sigma_ratio][1], 1)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"gram must be \(2, 3, 2, 3\)"):
        prompt_geometry(np.zeros((2, 3)), np.zeros((2, 3, 3, 2)))
    log_prob_fn, params, _ = linear()
    with pytest.raises(ValueError, match="num_directions must be at least 1, got 0"):
        gradient_sketch(log_prob_fn, params, jax.random.key(0), 0)
