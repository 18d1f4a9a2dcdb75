"""Intervals of means and rates."""

import math

import numpy as np
import pytest
from scipy import stats

from grpo_jax.intervals import (
    difference_interval,
    mean_interval,
    rate_interval,
    t_interval,
)


@pytest.mark.parametrize(("solved", "total"), [(0, 10), (1, 16), (8, 10), (64, 64)])
def test_outcomes_have_the_exact_binomial_interval(solved, total):
    outcomes = [1.0] * solved + [0.0] * (total - solved)
    expected = stats.binomtest(solved, total).proportion_ci()
    np.testing.assert_allclose(
        rate_interval(outcomes), (solved / total, expected.low, expected.high)
    )


# Mean 1/2, variance 1/8 (ddof 1), so half that of outcomes; the rates count as
# 1 / (1/16 + 9/16) = 1.6 prompts: design effect (1.6 / 2 + 1) / 2.6 = 9/13.
def test_shares_have_the_interval_of_more_outcomes():
    half = 2 * 13 / 9 / 2
    ends = stats.beta.ppf(0.025, half, half + 1), stats.beta.ppf(0.975, half + 1, half)
    np.testing.assert_allclose(rate_interval([0.25, 0.75]), (0.5, *ends))


def test_the_interval_of_failures_is_that_of_successes():
    rates = np.random.default_rng(0).beta(0.1, 0.9, 20)
    mean, low, high = rate_interval(1 - rates)
    np.testing.assert_allclose(rate_interval(rates), (1 - mean, 1 - high, 1 - low))


def test_one_prompt_and_none_and_rates_near_zero():
    assert rate_interval([0.3])[1] < 0.02 and rate_interval([0.3])[2] > 0.98
    assert all(map(math.isnan, rate_interval([])))
    mean, low, high = rate_interval([1e-200, 0.0, 3e-300])
    assert 0 <= low <= mean < 1e-199 and 0.4 < high < 1


# Prompts of which few are ever solved, Beta(.05, .95): a percentile bootstrap of such
# rates covers their mean in about 8 of 10 samples.
@pytest.mark.parametrize(("prompts", "samples"), [(16, 16), (64, 4)])
def test_rare_successes_are_covered(prompts, samples):
    rng = np.random.default_rng(0)
    rates = rng.beta(0.05, 0.95, (600, prompts))
    drawn = rng.binomial(samples, rates) / samples
    low, high = np.transpose([rate_interval(x)[1:] for x in drawn])
    assert ((low <= 0.05) & (high >= 0.05)).mean() > 0.94
    single = [rate_interval(x)[1:] for x in rng.binomial(1, rates)]  # one sample each
    assert (high - low).mean() < np.ptp(single, 1).mean()


# t(.975, 1) = 12.706; std of (1, 3) is sqrt 2, over sqrt 2.
def test_mean_interval():
    np.testing.assert_allclose(
        mean_interval([1.0, 3.0]), (2, 2 - 12.706, 2 + 12.706), rtol=1e-4
    )
    assert mean_interval([2.0]) == (2.0, -math.inf, math.inf)
    assert t_interval([2.0]) == (2.0, math.inf)
    assert all(map(math.isnan, mean_interval([])))


# Of 9 and 5 values with other variances, against scipy's Welch test and its interval.
def test_a_difference_has_welchs_interval():
    rng = np.random.default_rng(0)
    first, last = rng.normal(size=9), rng.normal(1.0, 3.0, size=5)
    test = stats.ttest_ind(last, first, equal_var=False)
    low, high = test.confidence_interval(0.95)
    expected = ((high + low) / 2, (high - low) / 2)
    np.testing.assert_allclose(difference_interval(first, last), expected)
    assert difference_interval([1.0, 1.0], [3.0, 3.0]) == (2.0, 0.0)
