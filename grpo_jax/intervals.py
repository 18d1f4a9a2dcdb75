"""Means and rates with their 95 % intervals."""

import math
from collections.abc import Sequence

import numpy as np


def rate_interval(rates: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): a 95 % interval over prompts of their mean pass rate.

    Clopper and Pearson's of n / d prompts, d the design effect: the variance of the
    rates over p (1 - p), 1 where each is 0 or 1. Few prompts that are solved tell
    little of it, so it is averaged with 1, weighted as one prompt to m, the rates'
    (sum)^2 / sum of squares (of 1 - rate, where that is less). Covers beta-distributed
    rates at least as often as it says; a rare kind of prompt, far from the others and
    absent from the sample, is not covered (`experiments/interval_coverage.py`).

    Args:
        rates: [n] of independent prompts, each in [0, 1]: outcomes, shares of several
            samples, or exact. NaN is returned without any.

    References:
        Korn and Graubard 1998, Survey Methodology 24(2) (the interval; the average
        with 1 is ours, and their t quantiles are left out).
    """
    from scipy.special import betaincinv

    x = np.asarray(rates, float)
    n, mean = len(x), float(x.mean()) if len(x) else math.nan
    if not n:
        return mean, mean, mean
    size = n / _design_effect(x) if 0 < mean < 1 else n
    right, wrong = mean * size, (1 - mean) * size
    low = float(betaincinv(right, wrong + 1, 0.025)) if right else 0.0
    high = float(betaincinv(right + 1, wrong, 0.975)) if wrong else 1.0
    return mean, low, high


def _design_effect(rates: np.ndarray) -> float:
    """In (0, 1]: variance of rates [n], not all 0 or 1, relative to outcomes'."""
    mean = rates.mean()
    variance = rates.var(ddof=1) if len(rates) > 1 else np.inf
    effect = min(1.0, variance / (mean * (1 - mean)))
    relative = [x / x.max() for x in (rates, 1 - rates)]  # squares do not underflow
    prompts = min(x.sum() ** 2 / (x**2).sum() for x in relative)
    return float((prompts * effect + 1) / (prompts + 1))


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): a 95 % Student interval over independent values [n].

    The ends are infinite for one value; all is NaN without any.
    """
    if not len(values):
        return math.nan, math.nan, math.nan
    mean, half = t_interval(values)
    return mean, mean - half, mean + half


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half width) of a 95 % Student interval over seeds [n]; inf for one."""
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, math.inf
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return mean, float(half)


def difference_interval(
    first: Sequence[float] | np.ndarray, last: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """(mean of `last` less that of `first`, half width of its 95 % Welch interval).

    Args:
        first, last: [n], [m] independent values, two or more of each; their variances
            may differ.
    """
    from scipy import stats

    parts = [np.asarray(x, float) for x in (first, last)]
    squares = [float(x.var(ddof=1)) / len(x) for x in parts]  # standard errors'
    spread = sum(q**2 / (len(x) - 1) for q, x in zip(squares, parts, strict=True))
    degrees = sum(squares) ** 2 / spread if spread else 1.0
    half = float(stats.t.ppf(0.975, degrees)) * sum(squares) ** 0.5
    return float(parts[1].mean() - parts[0].mean()), half
