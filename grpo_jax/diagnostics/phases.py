"""The training phase: near-orthogonal (I), in transition (II), widely spread (III).

The phase is about cosines between prompts' gradients, not about rewards. Ge et al.
2026, arXiv:2601.23135, show three phases and no rule: the thresholds are between
the columns of their Table 3 (97.7, 80.3 and 52.4 % of |cos| below 0.1; std .045, .066
and .130), and are parameters. A run need not go through the phases in order, or through
all of them.
"""

import reprlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import as_array, group_statistics, group_std
from grpo_jax.diagnostics.cosine_intervals import CosineDraws, draw_cosines
from grpo_jax.diagnostics.geometry import PromptGeometry

PHASES = ("I", "II", "III")
SURE = 0.95  # share of draws with one phase from which it is the label


class Thresholds(NamedTuple):
    """Where the phases part, in statistics of debiased cosines."""

    small_fraction: float = 0.9  # I where at least this share of |cos| is below 0.1
    std_cosine: float = 0.10  # else III where the cosines' std is at least this


THRESHOLDS = Thresholds()


class Phase(NamedTuple):
    """Result of `phase`: label, the statistics that decide it, their uncertainty."""

    label: str  # "I", "II", "III": right in 95 % of cases; else "unknown"
    # Of draws from the estimates' distribution: certainly I, II, III. Their sum is
    # below 1 where noise leaves more than one possible; NaN with too little signal
    shares: tuple[float, float, float]
    small_fraction: float  # if sampling noise keeps the shape of the cosines'
    # distribution, within bounds that hold for any
    small_fraction_interval: tuple[float, float]  # 95 % and more, for any distribution
    std_cosine: float  # debiased
    std_cosine_interval: tuple[float, float]
    mean_cosine: float
    mean_cosine_interval: tuple[float, float]
    mean_sigma: float  # mean std of a prompt's reward: `sigma`, or the groups' (ddof 1)
    rate_factor: float  # C = (8/3) mean sigma, over `sigma_history` and now. For 0/1
    # rewards std-normalisation has the better bound where the true C is below 1
    prompts: int  # with signal
    effective_prompts: float  # that the weights of pairs amount to


def phase(
    geometry: PromptGeometry,
    rewards: jax.Array,
    thresholds: Thresholds = THRESHOLDS,
    *,
    sigma: float | None = None,
    sigma_history: tuple[float, ...] = (),
    num_directions: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Phase:
    """Phase shown by the debiased cosines of P prompts. Not for use inside jit.

    Intervals and label are about prompts like these, the choice of prompts and sampling
    noise both counted (`draw_cosines`).

    Args:
        geometry: Of P prompts, P at least 2.
        rewards: [P, G] float, as given for the geometry.
        thresholds: Where the phases part.
        sigma: Mean over prompts of the rewards' true std, if it can be computed. That
            of sampled groups is lower (half of it at pass rate .02 and 16 samples),
            which makes C too low.
        sigma_history: `mean_sigma` of earlier measurements; C is over the full run.
        num_directions: As given for the geometry.
        resamples: Draws from the distribution of the estimates, for intervals, shares.
        seed: Of the draws.

    Raises:
        ValueError: fewer than two prompts, or a threshold that is no share or std.

    References:
        Ge et al. 2026, arXiv:2601.23135, Table 3 and Theorem 3.2 (C(T), which compares
        two upper bounds).
    """
    if not isinstance(geometry, PromptGeometry):
        raise ValueError(
            f"geometry must be a PromptGeometry, got {reprlib.repr(geometry)}; "
            "prompt_geometry makes one."
        )
    rewards = as_array(rewards)
    p = rewards.shape[0] if rewards.ndim == 2 else None
    if p is not None and p < 2:
        raise ValueError(f"rewards must be of 2 prompts or more, got {p}.")
    if p != len(geometry.inner):
        raise ValueError(
            f"rewards must be [P, G] of the geometry's {len(geometry.inner)} prompts, "
            f"got {rewards.shape}."
        )
    if not (0 <= thresholds.small_fraction <= 1 and thresholds.std_cosine >= 0):
        raise ValueError(
            "thresholds must be a share in [0, 1] and a std of at least 0, "
            f"got {tuple(thresholds)}."
        )
    draws = draw_cosines(
        geometry, num_directions=num_directions, draws=resamples, seed=seed
    )
    shares = _shares(draws, thresholds)
    sure = [name for name, share in zip(PHASES, shares, strict=True) if share >= SURE]
    prompts = int(np.isfinite(np.asarray(geometry.expected_squared_norms)).sum())
    small = float(geometry.statistics.small_fraction)
    if np.isfinite(draws.mean[0]):
        small = float(np.clip(small, draws.small_low[0], draws.small_high[0]))
    if sigma is None:
        sigma = float(mean_sigma(rewards))
    history = [x for x in (*sigma_history, sigma) if np.isfinite(x)]
    factor = 8 / 3 * float(np.mean(history)) if history else float("nan")
    return Phase(
        label=sure[0] if sure else "unknown",
        shares=shares,
        small_fraction=small,
        small_fraction_interval=_interval(draws.small_low, draws.small_high),
        std_cosine=float(geometry.std_cosine),
        std_cosine_interval=_interval(draws.std, draws.std),
        mean_cosine=float(geometry.mean_cosine),
        mean_cosine_interval=_interval(draws.mean, draws.mean),
        mean_sigma=sigma,
        rate_factor=factor,
        prompts=prompts,
        effective_prompts=float(geometry.effective_prompts),
    )


def mean_sigma(rewards: jax.Array) -> jax.Array:
    """Scalar mean over prompts of the groups' std (ddof 1), from rewards [P, G]."""
    usable = group_statistics(rewards).count >= 2
    return jnp.where(usable, group_std(rewards, ddof=1)[0], 0).sum() / usable.sum()


def _shares(draws: CosineDraws, thresholds: Thresholds) -> tuple[float, float, float]:
    """Shares of the draws in which a phase is certain, I to III; NaN without any."""
    if not np.isfinite(draws.mean[0]):
        return (float("nan"), float("nan"), float("nan"))
    one = draws.small_low[1:] >= thresholds.small_fraction
    not_one = draws.small_high[1:] < thresholds.small_fraction
    wide = draws.std[1:] >= thresholds.std_cosine
    shares = (one.mean(), (not_one & ~wide).mean(), (not_one & wide).mean())
    return (float(shares[0]), float(shares[1]), float(shares[2]))


def _interval(low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """95 % interval from draws, the first entries left out."""
    low_end, high_end = np.percentile(low[1:], 2.5), np.percentile(high[1:], 97.5)
    return (float(low_end), float(high_end))
