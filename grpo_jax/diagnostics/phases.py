"""The training phase: near-orthogonal (I), in transition (II), cosines widely spread
(III), with the numbers that say so and how sure they are.

What spreads is the cosines between prompts' gradients, not the rewards. Ge et al. 2026,
arXiv:2601.23135, print three phases and no rule: the thresholds here lie between their
Table 3's columns (97.7, 80.3 and 52.4 % of |cos| below 0.1; std .045, .066 and .130),
and are parameters. A run need not go through them in order, or through all.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import group_statistics, group_std
from grpo_jax.diagnostics.geometry import PromptGeometry, debiased_statistics

PHASES = ("I", "II", "III")
LEAST_PROMPTS = 4  # with signal; resamples of fewer are hardly different


class Thresholds(NamedTuple):
    small_fraction: float = 0.9  # I where at least this share of |cos| is below 0.1
    std_cosine: float = 0.10  # else III where the cosines' std is at least this


THRESHOLDS = Thresholds()


class Phase(NamedTuple):
    """`phase`: the label, what it was decided on, and its standing in resamples."""

    label: str  # "I", "II", "III"; "unknown": too little signal
    shares: tuple[float, float, float]  # of bootstrap samples of the prompts, I to III
    small_fraction: float  # debiased, as are the next two
    small_fraction_interval: tuple[float, float]  # 95 %
    std_cosine: float
    std_cosine_interval: tuple[float, float]
    mean_cosine: float
    mean_cosine_interval: tuple[float, float]
    mean_sigma: float  # mean std of a prompt's reward: `sigma`, or the groups' (ddof 1)
    rate_factor: float  # C = (8/3) mean sigma, over `sigma_history` and now
    gain: bool  # C < 1: std-normalisation has the better bound (binary rewards)
    prompts: int  # with signal


def phase(
    geometry: PromptGeometry,
    rewards: jax.Array,
    thresholds: Thresholds = THRESHOLDS,
    *,
    sigma: float | None = None,
    sigma_history: tuple[float, ...] = (),
    num_directions: int | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> Phase:
    """The phase that debiased cosines of a probe set show. Not for use inside jit.

    Args:
        geometry: Of P prompts, P at least 2.
        rewards: [P, G], as given for the geometry.
        thresholds: Where the phases part.
        sigma: Mean over prompts of the rewards' true std, where it is known. Groups
            show less of it (half of it at pass rate .02 and 16 samples), which makes C
            come out low.
        sigma_history: `mean_sigma` of earlier looks; C is over the whole run.
        num_directions: As given for the geometry.
        resamples: Bootstrap samples of the prompts.
        seed: Of the bootstrap.

    Raises:
        ValueError: fewer than two prompts, or a threshold that is no share or std.

    References:
        Ge et al. 2026, arXiv:2601.23135, Table 3 and Theorem 3.2 (C(T); a comparison of
        two upper bounds, no more).
    """
    p = len(rewards)
    if p < 2:
        raise ValueError(f"rewards must be of 2 prompts or more, got {p}.")
    if not (0 <= thresholds.small_fraction <= 1 and thresholds.std_cosine >= 0):
        raise ValueError(
            "thresholds must be a share in [0, 1] and a std of at least 0, "
            f"got {tuple(thresholds)}."
        )
    draws = np.random.default_rng(seed).multinomial(p, np.full(p, 1 / p), resamples)
    counts = np.concatenate([np.ones((1, p)), draws])
    matrices = (
        geometry.cosines,
        geometry.squared_norms,
        geometry.raw_squared_norms,
        geometry.squared_inner,
        group_std(rewards, ddof=1)[0],
    )
    small, std, mean = (
        np.asarray(x)
        for x in _resampled(*matrices, jnp.asarray(counts, float), num_directions)
    )
    labels = np.where(
        small >= thresholds.small_fraction,
        0,
        np.where(std >= thresholds.std_cosine, 2, 1),
    )
    told = np.isfinite(small[1:]) & np.isfinite(std[1:])  # a resample of one prompt
    shares = np.bincount(labels[1:][told], minlength=3) / max(1, told.sum())
    prompts = int(np.isfinite(np.asarray(geometry.cosines)).any(1).sum())
    known = np.isfinite([small[0], std[0]]).all() and prompts >= LEAST_PROMPTS
    if not known:
        told[:] = False
        shares = np.full(3, np.nan)
    sigma = float(mean_sigma(rewards)) if sigma is None else sigma
    history = [x for x in (*sigma_history, sigma) if np.isfinite(x)]
    factor = 8 / 3 * float(np.mean(history)) if history else float("nan")
    return Phase(
        label=PHASES[labels[0]] if known else "unknown",
        shares=tuple(float(x) for x in shares),
        small_fraction=float(small[0]),
        small_fraction_interval=_interval(small[1:][told]),
        std_cosine=float(std[0]),
        std_cosine_interval=_interval(std[1:][told]),
        mean_cosine=float(mean[0]),
        mean_cosine_interval=_interval(mean[1:][told]),
        mean_sigma=sigma,
        rate_factor=factor,
        gain=factor < 1,
        prompts=prompts,
    )


@partial(jax.jit, static_argnames="num_directions")
def _resampled(cosines, squared, raw, squared_inner, sigma, counts, num_directions):
    def one(counts):
        found = debiased_statistics(
            cosines, squared, raw, squared_inner, sigma, counts, num_directions
        )
        return found.statistics.small_fraction, found.std_cosine, found.mean_cosine

    return jax.vmap(one)(counts)


def mean_sigma(rewards: jax.Array) -> jax.Array:
    """Mean over prompts of sqrt(unbiased variance of the group's rewards)."""
    usable = group_statistics(rewards).count >= 2
    return jnp.where(usable, group_std(rewards, ddof=1)[0], 0).sum() / usable.sum()


def _interval(values):
    if not len(values):
        return (float("nan"), float("nan"))
    low, high = np.percentile(values, [2.5, 97.5])
    return (float(low), float(high))


def change_points(series: np.ndarray, *, most: int = 2) -> list[int]:
    """Where a run's looks fall into stretches of constant level: a view of a whole run.

    Least squares over every way to cut the looks into at most `most` + 1 stretches of
    two looks or more; how many, by the Bayesian information criterion. Independent of
    thresholds.

    Args:
        series: [N, S], S measures at N looks, finite; each is divided by its std.
        most: The largest number of change points.

    Returns:
        Indices of the first look of every stretch but the first.
    """
    series = np.asarray(series, float)
    if series.ndim != 2 or not np.isfinite(series).all():
        raise ValueError("series must be [looks, measures] of finite numbers.")
    n, measures = series.shape
    if n < 4:
        return []
    scale = series.std(0)
    x = (series - series.mean(0)) / np.where(scale > 0, scale, 1.0)
    sums = np.concatenate([np.zeros((1, measures)), np.cumsum(x, 0)])
    squares = np.concatenate([[0.0], np.cumsum((x**2).sum(1))])

    def cost(a, b):  # of looks a .. b - 1 about their mean
        return squares[b] - squares[a] - ((sums[b] - sums[a]) ** 2).sum() / (b - a)

    best = {(0, b): (cost(0, b), []) for b in range(2, n + 1)}
    for k in range(1, most + 1):
        for b in range(2 * (k + 1), n + 1):
            best[k, b] = min(
                (best[k - 1, a][0] + cost(a, b), [*best[k - 1, a][1], a])
                for a in range(2 * k, b - 1)
            )
    criterion = {
        k: n * measures * np.log(max(best[k, n][0], 1e-9) / (n * measures))
        + (k + 1) * measures * np.log(n * measures)
        + k * np.log(n)
        for k in range(most + 1)
        if (k, n) in best
    }
    return best[min(criterion, key=criterion.get), n][1]
