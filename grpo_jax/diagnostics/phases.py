"""The training phase: near-orthogonal (I), in transition (II), widely spread (III).

The phase is about cosines between prompts' gradients, not about rewards. Ge et al.
2026, arXiv:2601.23135, show three phases and no rule: the thresholds are between
the columns of their Table 3 (97.7, 80.3 and 52.4 % of |cos| below 0.1; std .045, .066
and .130), and are parameters. A run need not go through the phases in order, or through
all of them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import group_statistics, group_std
from grpo_jax.diagnostics.geometry import PromptGeometry, debiased_statistics

PHASES = ("I", "II", "III")
LEAST_PROMPTS = 4  # with signal; bootstrap samples of fewer hardly differ
INTERVAL = (2.5, 97.5)  # percentiles of the bootstrap


class Thresholds(NamedTuple):
    """Where the phases part, in statistics of debiased cosines."""

    small_fraction: float = 0.9  # I where at least this share of |cos| is below 0.1
    std_cosine: float = 0.10  # else III where the cosines' std is at least this


THRESHOLDS = Thresholds()


class Phase(NamedTuple):
    """Result of `phase`: label, the statistics that decide it, their uncertainty."""

    label: str  # "I", "II", "III"; "unknown": too little signal
    shares: tuple[float, float, float]  # of bootstrap samples of the prompts, I to III
    small_fraction: float  # debiased, as are the next two
    small_fraction_interval: tuple[float, float]  # 95 %
    std_cosine: float
    std_cosine_interval: tuple[float, float]
    mean_cosine: float
    mean_cosine_interval: tuple[float, float]
    mean_sigma: float  # mean std of a prompt's reward: `sigma`, or the groups' (ddof 1)
    rate_factor: float  # C = (8/3) mean sigma, over `sigma_history` and now. For 0/1
    # rewards std-normalisation has the better bound where the true C is below 1
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
    """Phase shown by the debiased cosines of P prompts. Not for use inside jit.

    Args:
        geometry: Of P prompts, P at least 2.
        rewards: [P, G] float, as given for the geometry.
        thresholds: Where the phases part.
        sigma: Mean over prompts of the rewards' true std, if it can be computed. That
            of sampled groups is lower (half of it at pass rate .02 and 16 samples),
            which makes C too low.
        sigma_history: `mean_sigma` of earlier measurements; C is over the full run.
        num_directions: As given for the geometry.
        resamples: Bootstrap samples of the prompts.
        seed: Of the bootstrap.

    Raises:
        ValueError: fewer than two prompts, or a threshold that is no share or std.

    References:
        Ge et al. 2026, arXiv:2601.23135, Table 3 and Theorem 3.2 (C(T), which compares
        two upper bounds).
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
    counts = np.concatenate([np.ones((1, p)), draws])  # all prompts, then resamples
    small, std, mean = _resampled(geometry, rewards, counts, num_directions)
    labels = np.where(
        small >= thresholds.small_fraction,
        0,
        np.where(std >= thresholds.std_cosine, 2, 1),
    )  # indices of PHASES
    finite = np.isfinite(small[1:]) & np.isfinite(std[1:])  # not so for a single prompt
    prompts = int(np.isfinite(np.asarray(geometry.cosines)).any(1).sum())
    decided = bool(np.isfinite([small[0], std[0]]).all() and prompts >= LEAST_PROMPTS)
    shares = np.full(3, np.nan)
    if decided:
        shares = np.bincount(labels[1:][finite], minlength=3) / max(1, finite.sum())
    else:
        finite[:] = False
    if sigma is None:
        sigma = float(mean_sigma(rewards))
    history = [x for x in (*sigma_history, sigma) if np.isfinite(x)]
    factor = 8 / 3 * float(np.mean(history)) if history else float("nan")
    return Phase(
        label=PHASES[labels[0]] if decided else "unknown",
        shares=(float(shares[0]), float(shares[1]), float(shares[2])),
        small_fraction=float(small[0]),
        small_fraction_interval=_interval(small[1:][finite]),
        std_cosine=float(std[0]),
        std_cosine_interval=_interval(std[1:][finite]),
        mean_cosine=float(mean[0]),
        mean_cosine_interval=_interval(mean[1:][finite]),
        mean_sigma=sigma,
        rate_factor=factor,
        prompts=prompts,
    )


def _resampled(
    geometry: PromptGeometry,
    rewards: jax.Array,
    counts: np.ndarray,
    num_directions: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(small fraction, std, mean) of debiased cosines, each [R], of counts [R, P]."""
    small, std, mean = _debiased(
        geometry.cosines,
        geometry.squared_norms,
        geometry.raw_squared_norms,
        geometry.squared_inner,
        group_std(rewards, ddof=1)[0],
        jnp.asarray(counts, float),
        num_directions,
    )
    return np.asarray(small), np.asarray(std), np.asarray(mean)


@partial(jax.jit, static_argnames="num_directions")
def _debiased(
    cosines: jax.Array,
    squared_norms: jax.Array,
    raw_squared_norms: jax.Array,
    squared_inner: jax.Array,
    sigma: jax.Array,
    counts: jax.Array,
    num_directions: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def one(counts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        debiased = debiased_statistics(
            cosines,
            squared_norms,
            raw_squared_norms,
            squared_inner,
            sigma,
            counts,
            num_directions,
        )
        small = debiased.statistics.small_fraction
        return small, debiased.std_cosine, debiased.mean_cosine

    return jax.vmap(one)(counts)


def mean_sigma(rewards: jax.Array) -> jax.Array:
    """Scalar mean over prompts of the groups' std (ddof 1), from rewards [P, G]."""
    usable = group_statistics(rewards).count >= 2
    return jnp.where(usable, group_std(rewards, ddof=1)[0], 0).sum() / usable.sum()


def _interval(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return (float("nan"), float("nan"))
    low, high = np.percentile(values, INTERVAL)
    return (float(low), float(high))
