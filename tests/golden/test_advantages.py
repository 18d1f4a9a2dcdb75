"""Group statistics whose values are worked out by hand beside each case."""

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

NAN = float("nan")


# 1 of 4 solved: mean 1/4, std sqrt(3)/4, so (3/4, -1/4) / std = (√3, -1/√3).
# 1 of 3 present solved: mean 1/3, std √2/3, so (2/3, -1/3) / std = (√2, -1/√2).
@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        pytest.param([1, 0, 0, 0], [3**0.5] + [-(3**-0.5)] * 3, id="one_of_four"),
        pytest.param(
            [1] + [0] * 63, [63**0.5] + [-(63**-0.5)] * 63, id="one_of_sixty_four"
        ),
        pytest.param([1, 1, 0, 0], [1, 1, -1, -1], id="half_solved"),
        pytest.param([7, 7, 5, 5], [1, 1, -1, -1], id="half_solved_shifted_scaled"),
        pytest.param([1, 1, 1, 1], [0, 0, 0, 0], id="all_solved"),
        pytest.param([0.35] * 8, [0] * 8, id="tied_and_not_exact_in_float32"),
        pytest.param(
            [1, NAN, 0, 0], [2**0.5, 0, -(2**-0.5), -(2**-0.5)], id="one_missing"
        ),
        pytest.param([NAN, NAN], [0, 0], id="all_missing"),
    ],
)
def test_whitened_advantages(rewards, expected):
    actual = jax.jit(whitened_advantages)(np.array([rewards], np.float32))
    np.testing.assert_allclose(actual[0], expected, rtol=1e-5)


# [1, 0, 0, 0]: squared deviations 9/16 + 3/16 = 3/4; over 3 that is 1/4, std 1/2.
def test_whitened_advantages_with_the_sample_std():
    rewards = np.array([[1, 0, 0, 0]], np.float32)
    actual = jax.jit(partial(whitened_advantages, ddof=1))(rewards)
    np.testing.assert_allclose(actual[0], [1.5, -0.5, -0.5, -0.5], rtol=1e-5)


# [1, 0]: std 1/2, so with eps 1/2 the scale is 1 and deviations stay as they are.
def test_eps_is_added_to_the_std_in_reward_units():
    rewards = np.array([[1, 0]], np.float32)
    actual = jax.jit(partial(whitened_advantages, eps=0.5))(rewards)
    np.testing.assert_allclose(actual[0], [0.5, -0.5], rtol=1e-6)


# [0, 4]: std 2. [1, 1, 1, 5]: mean 2, squares 1+1+1+9 = 12; 12/4 = 3, 12/3 = 4.
@pytest.mark.parametrize(
    ("rewards", "ddof", "expected"),
    [([0, 4], 0, 1 / 2), ([1, 1, 1, 5], 0, 3**-0.5), ([1, 1, 1, 5], 1, 1 / 2)],
)
def test_inverse_std(rewards, ddof, expected):
    rewards = np.array([rewards, [2] * len(rewards)], np.float32)
    actual = jax.jit(partial(inverse_std, eps=0.0, ddof=ddof))(rewards)
    np.testing.assert_allclose(actual, [expected, 0], rtol=1e-6)


# [1, 2, 6]: mean 3; the others' means are 4, 3.5 and 1.5. Without the 2 the mean is
# 3.5 and each of the two others has only the other: 6 and 1.
@pytest.mark.parametrize(
    ("rewards", "centred", "leave_one_out"),
    [
        ([1, 2, 6], [-2, -1, 3], [-3, -1.5, 4.5]),
        ([1, NAN, 6], [-2.5, 0, 2.5], [-5, 0, 5]),
        ([NAN, NAN, 6], [0, 0, 0], [0, 0, 0]),
    ],
)
def test_centred_and_leave_one_out(rewards, centred, leave_one_out):
    rewards = np.array([rewards], np.float32)
    actual = jax.jit(centred_advantages)(rewards)
    np.testing.assert_allclose(actual, [centred], rtol=1e-6)
    actual = jax.jit(leave_one_out_advantages)(rewards)
    np.testing.assert_allclose(actual, [leave_one_out], rtol=1e-6)


# G = 4, p = 1/2: 1 or 3 solved with mass 4/16 each and std √3/4, 2 solved with mass
# 6/16 and std 1/2. G = 4, p = 1/4: masses 27/64, 27/128 and 3/64 for 1, 2, 3 solved.
@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.5, 2 * 4 / 16 * 3**0.5 / 4 + 6 / 16 / 2),
        (0.25, (27 + 3) / 64 * 3**0.5 / 4 + 27 / 128 / 2),
        (0.0, 0.0),
        (1.0, 0.0),
    ],
)
def test_expected_group_std(p, expected):
    actual = jax.jit(expected_group_std, static_argnums=1)(np.float32(p), 4)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
