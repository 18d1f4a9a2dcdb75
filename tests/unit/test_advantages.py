import itertools
from functools import partial

import jax
import numpy as np
import pytest

from grpo_jax import (
    centred_advantages,
    expected_group_std,
    inverse_std,
    leave_one_out_advantages,
    whitened_advantages,
)
from grpo_jax.advantages import group_statistics, group_std

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
    assert np.isfinite(np.asarray(actual)).all()


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
