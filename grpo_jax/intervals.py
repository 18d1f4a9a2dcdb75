"""Means and shares with their 95 % intervals."""

import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000  # of the prompts, for a bootstrap interval


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): a 95 % bootstrap interval over prompts, NaN without any."""
    array = np.asarray(values, float)
    count = len(array)
    if not count:
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(0)
    means = [array[rng.integers(count, size=count)].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def rate_interval(rates: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): a 95 % interval over prompts of their pass rates.

    By bootstrap; Wilson's where all are 0 or all are 1, which shows no spread.
    """
    if len(rates) and set(rates) in ({0.0}, {1.0}):
        return wilson_interval(round(sum(rates)), len(rates))
    return bootstrap_interval(rates)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): a 95 % normal interval over independent values in [0, 1]."""
    array = np.asarray(values, float)
    mean, count = float(array.mean()), len(array)
    half = 1.96 * float(array.std(ddof=1)) / count**0.5 if count > 1 else 1.0
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half width) of a 95 % Student interval over seeds [n]; inf for one."""
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, math.inf
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return mean, float(half)


def wilson_interval(successes: int, total: int) -> tuple[float, float, float]:
    """(share, low, high): the 95 % Wilson score interval of a binomial share."""
    if total == 0:
        return 0.0, 0.0, 1.0
    z, share = 1.96, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total)
    half *= (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    return share, max(0.0, centre - half), min(1.0, centre + half)
