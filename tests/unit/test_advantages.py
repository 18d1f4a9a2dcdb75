import dataclasses
import itertools
import math
from functools import partial

import chex
import jax
import numpy as np
import pytest

from grpo_jax import (
    OBJECTIVES,
    centred_advantages,
    expected_group_std,
    inverse_std,
    leave_one_out_advantages,
    overlong_punishment,
    policy_loss,
    whitened_advantages,
)
from grpo_jax.advantages import (
    group_statistics,
    group_std,
    inverse_batch_std,
    inverse_beta_density,
    inverse_group_mean,
    leave_one_out_inverse_std,
)

ADVANTAGES = (centred_advantages, leave_one_out_advantages, whitened_advantages)
NAN = float("nan")


@pytest.mark.parametrize("function", (*ADVANTAGES, inverse_std))
@pytest.mark.parametrize("value", [0.0, 1.0, 0.35, -1e-8, 1e30])
@pytest.mark.parametrize("group_size", [2, 8, 100])
def test_a_tied_group_gives_exactly_zero(function, value, group_size):
    rewards = np.full((2, group_size), value, np.float32)
    assert (np.asarray(jax.jit(function)(rewards)) == 0).all()


@pytest.mark.parametrize("function", ADVANTAGES)
def test_a_group_tied_but_for_missing_rewards_gives_exactly_zero(function):
    rewards = np.array([[0.35, NAN, 0.35, 0.35], [NAN, NAN, 2.0, NAN]], np.float32)
    assert (np.asarray(jax.jit(function)(rewards)) == 0).all()


@pytest.mark.parametrize("ddof", [0, 1])
def test_missing_rewards_take_no_part(ddof):
    rewards = np.array([[1, NAN, 4, 0, NAN, 2]], np.float32)
    present = rewards[:, [0, 2, 3, 5]]
    whitened = jax.jit(partial(whitened_advantages, ddof=ddof))
    actual = np.asarray(whitened(rewards))
    np.testing.assert_allclose(actual[:, [0, 2, 3, 5]], whitened(present), rtol=1e-6)
    assert (actual[:, [1, 4]] == 0).all()
    scale = jax.jit(partial(inverse_std, ddof=ddof))
    np.testing.assert_allclose(scale(rewards), scale(present), rtol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_group_std_is_numpys(ddof):
    rewards = np.random.default_rng(0).normal(3, 2, (5, 7)).astype(np.float32)
    std, tied = jax.jit(partial(group_std, ddof=ddof))(rewards)
    np.testing.assert_allclose(std, rewards.std(1, ddof=ddof), rtol=1e-5)
    assert not np.asarray(tied).any()


def test_a_near_tie_keeps_its_sign():
    high = np.nextafter(np.float32(1), np.float32(2))
    actual = jax.jit(whitened_advantages)(np.array([[1, high]], np.float32))
    assert actual[0, 0] <= 0 <= actual[0, 1]
    chex.assert_tree_all_finite(actual)


def test_group_statistics_of_an_empty_group():
    statistics = jax.jit(group_statistics)(np.full((1, 3), NAN, np.float32))
    assert statistics.tied[0] and statistics.count[0] == 0 and statistics.mean[0] == 0


@pytest.mark.parametrize("function", (*ADVANTAGES, inverse_std))
def test_rewards_are_constants(function):
    rewards = np.array([[1, 2, 6]], np.float32)
    grad = jax.jit(jax.grad(lambda r: (function(r) ** 2).sum()))(rewards)
    assert (np.asarray(grad) == 0).all()


def test_whole_number_rewards_become_floats():
    actual = jax.jit(centred_advantages)(np.array([[1, 0]], np.int32))
    np.testing.assert_array_equal(actual, [[0.5, -0.5]])


@pytest.mark.parametrize("function", (*ADVANTAGES, inverse_std))
@pytest.mark.parametrize("shape", [(4,), (), (2, 2, 2)])
def test_rewards_must_have_two_axes(function, shape):
    message = r"rewards must be \[num_prompts, group_size\], got \(.*reshape\(-1"
    with pytest.raises(ValueError, match=message):
        jax.jit(function)(np.zeros(shape, np.float32))


@pytest.mark.parametrize("function", [inverse_std, whitened_advantages])
def test_ddof_needs_more_samples(function):
    with pytest.raises(ValueError, match=r"group_size > 1\], got \(3, 1\)"):
        jax.jit(partial(function, ddof=1))(np.zeros((3, 1), np.float32))


def expected_stds(p, group_size):
    one = partial(expected_group_std, group_size=group_size)
    return jax.jit(jax.vmap(one))(p)


@pytest.mark.parametrize("group_size", [2, 3, 4, 8])
def test_expected_group_std_is_the_mean_over_all_outcomes(group_size):
    p = np.array([0.0, 1e-3, 0.1, 0.5, 0.77, 1.0])
    expected = np.zeros_like(p)
    for outcome in itertools.product((0, 1), repeat=group_size):
        solved = sum(outcome)
        mass = p**solved * (1 - p) ** (group_size - solved)
        expected += mass * np.std(outcome)
    actual = expected_stds(p.astype(np.float32), group_size)
    np.testing.assert_allclose(actual, expected, rtol=2e-5)


@pytest.mark.parametrize(("group_size", "factor"), [(2, 1.0), (3, 2**0.5)])
def test_groups_of_two_and_three_only_rescale_reinforce(group_size, factor):
    p = np.linspace(0, 1, 21, dtype=np.float32)
    actual = expected_stds(p, group_size)
    np.testing.assert_allclose(actual, factor * p * (1 - p), rtol=1e-5, atol=1e-8)


def test_a_large_group_approaches_the_true_std():
    p = np.array([0.2, 0.5], np.float32)
    actual = expected_stds(p, 512)
    np.testing.assert_allclose(actual, np.sqrt(p * (1 - p)), rtol=3e-3)


# At p far below 1 / G a group has one success at most: mass G p, std sqrt(G - 1) / G.
@pytest.mark.parametrize("group_size", [4, 16, 64])
def test_a_rare_success_saturates_the_weight(group_size):
    p = np.float32([1e-6])
    actual = expected_stds(p, group_size)
    np.testing.assert_allclose(actual, p * (group_size - 1) ** 0.5, rtol=1e-3)


def test_expected_group_std_is_exact_in_float64():
    with jax.enable_x64(True):
        p = np.array([1e-6, 0.3, 0.9])
        actual = expected_stds(p, 3)
        np.testing.assert_allclose(actual, 2**0.5 * p * (1 - p), rtol=1e-12)


@jax.numpy_rank_promotion("allow")
def test_pass_rates_may_have_any_shape():
    p = np.linspace(0, 1, 6, dtype=np.float32)
    actual = jax.jit(expected_group_std, static_argnums=1)(p.reshape(2, 3), 4)
    np.testing.assert_allclose(actual.ravel(), expected_stds(p, 4), rtol=1e-6)


def test_expected_group_std_needs_two_samples():
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        expected_group_std(np.float32(0.5), 1)


# [0, 4, 2, 2]: mean 2, squares 4 + 4 = 8; over 4 that is 2, over 3 it is 8 / 3.
@pytest.mark.parametrize(("ddof", "expected"), [(0, 2**-0.5), (1, (3 / 8) ** 0.5)])
def test_inverse_batch_std(ddof, expected):
    scale = jax.jit(partial(inverse_batch_std, eps=0.0, ddof=ddof))
    expected = [expected] * 2
    np.testing.assert_allclose(scale(np.float32([[0, 4], [2, 2]])), expected, rtol=1e-6)
    gaps = np.float32([[0, NAN, 4], [2, 2, math.inf]])
    np.testing.assert_allclose(scale(gaps), expected, rtol=1e-6)
    assert not np.asarray(scale(np.full((2, 3), 0.35, np.float32))).any()


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2)])
def test_inverse_batch_std_wants_two_axes(shape):
    with pytest.raises(
        ValueError, match=r"rewards must be \[num_prompts, group_size\]"
    ):
        jax.jit(inverse_batch_std)(np.zeros(shape, np.float32))


# Means 1/4, 1, -1/2 and (1/2 of what is there); tied groups and empty ones get 0.
def test_inverse_group_mean():
    rewards = [[1, 0, 0, 0], [0.5, 1.5, 1, 1], [-2, 0, 0, 0], [1, NAN, 0, NAN]]
    rewards = np.float32([*rewards, [1] * 4, [NAN] * 4])
    actual = jax.jit(partial(inverse_group_mean, eps=0.0))(rewards)
    np.testing.assert_allclose(actual, [4, 1, 0, 2, 0, 0], rtol=1e-6)
    actual = jax.jit(partial(inverse_group_mean, eps=0.25))(rewards)
    np.testing.assert_allclose(actual[:2], [2, 0.8], rtol=1e-6)


def binary(*solved, group_size=4):
    return np.float32([[1] * k + [0] * (group_size - k) for k in solved])


beta_scale = jax.jit(inverse_beta_density)


# Means 1/4, 1/2, 3/4: m = 1/2, v = (1/16 + 1/16) / 2 = 1/16, m (1 - m) / v - 1 = 3, so
# a = b = 3/2 and a' = b' = 3/2, whose density is 8 / pi sqrt(p (1 - p)).
def test_a_beta_of_three_halves_is_the_std():
    expected = math.pi / 8 * np.array([4 / 3**0.5, 2, 4 / 3**0.5])
    np.testing.assert_allclose(beta_scale(binary(1, 2, 3)), expected, rtol=1e-5)


# Means 1/4, 1/4, 3/4: m = 5/12, v = (1/36 + 1/36 + 1/9) / 2 = 1/12, then 35/12 - 1 =
# 23/12: a' = 1 + 23/12 5/12 / 3 = 1 + 115/432, b' = 1 + 161/432.
def test_a_beta_that_leans():
    a, b, p = 1 + 115 / 432, 1 + 161 / 432, np.array([1, 1, 3]) / 4
    beta = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    expected = beta * p ** (1 - a) * (1 - p) ** (1 - b)
    np.testing.assert_allclose(beta_scale(binary(1, 1, 3)), expected, rtol=1e-5)


# Means 0, 1/2, 1: v = 1/4 = m (1 - m), so a = b = 0 and the density is 1: the tied
# groups count in the fit. A half and an empty group are one group: nothing to fit.
@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (binary(0, 2, 4), [0, 1, 0]),
        (binary(2, 2, 2), [1, 1, 1]),
        (binary(3), [1]),
        (binary(0), [0]),
        (np.float32([[1, 0], [NAN, NAN]]), [1, 0]),
        (np.float32([[1, NAN, 0], [1, 0, NAN]]), [1, 1]),
    ],
)
def test_a_beta_with_nothing_to_fit(rewards, expected):
    np.testing.assert_allclose(beta_scale(rewards), expected, rtol=1e-6)


def test_group_means_that_differ_by_rounding_have_nothing_to_fit():
    rng, row = np.random.default_rng(0), [0.1, 0.2, 0.4, 0.7, 0.35, 0.05]
    rewards = np.float32([rng.permutation(row) for _ in range(6)])
    np.testing.assert_allclose(beta_scale(rewards), 1, rtol=1e-3)


# A narrow Beta: 511 groups solve 8 of 16, one solves 9. In float64 with lgamma.
def test_a_narrow_beta_in_float32():
    rewards = binary(*[8] * 511, 9, group_size=16)
    with jax.enable_x64(True):
        expected = jax.jit(inverse_beta_density)(rewards.astype(np.float64))
    np.testing.assert_allclose(beta_scale(rewards), expected, rtol=2e-2)


# [1, 0, 0, 0]: the others of the 1 tie, so it stays 1 - 0. Of a 0: 0 - 1/3, and the
# std of (1, 0, 0) with ddof 1 is 1 / sqrt 3.
def test_leave_one_out_std_is_nemos():
    objective = dataclasses.replace(
        OBJECTIVES["reinforce"], baseline="leave_one_out", scale="leave_one_out_std",
        std_ddof=1, std_eps=0.0,
    )  # fmt: skip
    x = np.zeros((1, 4, 1), np.float32)
    arrays = dict(behaviour_logprobs=x, completion_mask=np.ones_like(x))

    def loss(x):
        return policy_loss(objective, logprobs=x, rewards=binary(1), **arrays)[0]

    actual = -4 * jax.jit(jax.grad(loss))(x).ravel()  # mean over 4 of -A log pi
    np.testing.assert_allclose(actual, [1] + [-(3**-0.5)] * 3, rtol=1e-6)


# Of [0, 2, 4]: (2, 4), (0, 4), (0, 2) have sample stds sqrt 2, 2 sqrt 2, sqrt 2.
def test_leave_one_out_inverse_std():
    scale = jax.jit(partial(leave_one_out_inverse_std, eps=0.0))
    expected = np.array([1, 1 / 2, 1]) / 2**0.5
    np.testing.assert_allclose(scale(np.float32([[0, 2, 4]]))[0], expected, rtol=1e-6)
    gap = np.asarray(scale(np.float32([[0, 2, NAN, 4]])))[0]
    np.testing.assert_allclose(gap[[0, 1, 3]], expected, rtol=1e-6)
    chex.assert_tree_all_finite(gap)
    np.testing.assert_array_equal(scale(np.float32([[3, 5]])), [[1, 1]])


def test_leave_one_out_inverse_std_broadcasts_openly():
    with jax.numpy_rank_promotion("raise"):
        jax.jit(leave_one_out_inverse_std)(binary(1, 2))


SCALES = (inverse_batch_std, inverse_group_mean, inverse_beta_density)


@pytest.mark.parametrize("function", (*SCALES, leave_one_out_inverse_std))
def test_scales_are_constants_and_of_the_rewards_dtype(function):
    grad = jax.jit(jax.grad(lambda r: (function(r) ** 2).sum()))(binary(1, 2))
    assert (np.asarray(grad) == 0).all()
    assert jax.eval_shape(function, binary(1, 2)).dtype == np.float32


# A budget of 20 with a cache of 4: free up to 16, then a quarter each token.
def test_overlong_punishment():
    lengths = np.array([[0, 16, 17], [18, 20, 25]])
    actual = jax.jit(overlong_punishment, static_argnums=(1, 2))(lengths, 20, 4)
    np.testing.assert_allclose(actual, [[0, 0, -0.25], [-0.5, -1, -1]], rtol=1e-6)


@pytest.mark.parametrize("cache", [0, 21])
def test_overlong_punishments_cache_is_within_the_budget(cache):
    with pytest.raises(ValueError, match=rf"cache must be in \[1, 20\], got {cache}"):
        overlong_punishment(np.zeros(3), 20, cache)
