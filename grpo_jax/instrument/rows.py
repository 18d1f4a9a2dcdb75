"""The rows of instrument.jsonl: their fields, and how to read them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.diagnostics.phases import PHASES, THRESHOLDS


def metrics_of(row: dict) -> dict[str, Any]:
    """What metrics.jsonl keeps of a look."""
    geometry, standing = row["geometry"], row["phase"]
    metrics = {
        "phase/label": standing["label"],
        "phase/small_fraction": standing["small_fraction"],
        "phase/rate_factor": standing["rate_factor"],
        "geometry/mean_cosine": geometry["mean_cosine"],
        "geometry/std_cosine": geometry["std_cosine"],
        "geometry/mean_abs_cosine": geometry["statistics"]["mean_abs"],
        "geometry/violating_fraction": geometry["violating_fraction"],
        "geometry/chi": geometry["chi"],
        "geometry/attenuation": geometry["attenuation"],
        "curvature/sigma2_rank_correlation": rank_correlation(*sampled_curvature(row)),
    }
    if row["exact"] is not None:
        exact = row["exact"]["statistics"]
        metrics["geometry/exact_mean_abs_cosine"] = exact["mean_abs"]
        metrics["geometry/exact_std_cosine"] = exact["std"]
    return metrics


def sampled_curvature(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """(sigma^2 [P], |curvature| [P]), NaN for prompts without signal in both halves:
    measured on a tied half a curvature is 0, and its sigma small, by construction."""
    curvature = np.abs(np.asarray(row["curvature"], float))
    informative = np.asarray(row["halves"]) == 2
    sigma = np.asarray(row["sigma"], float)
    return sigma**2, np.where(informative, curvature, np.nan)


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's, over the pairs that are there; NaN for fewer than three, or where
    one side does not vary."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    there = np.isfinite(x) & np.isfinite(y)
    if there.sum() < 3:
        return float("nan")
    x, y = x[there], y[there]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    from scipy import stats

    return float(stats.spearmanr(x, y).statistic)


# Pass rates that the report tells apart.
THIRDS = (
    ("hard", -np.inf, 1 / 3),
    ("middle", 1 / 3, 2 / 3),
    ("easy", 2 / 3, np.inf),
)


_KEYS = {
    "step", "phase", "group_size", "group_mean", "group_std", "sigma", "pass_rate",
    "curvature", "halves", "spread", "geometry", "null", "features", "weightings",
    "exact", "update",
}  # fmt: skip


_MEASURES = ("small_fraction", "std_cosine", "mean_cosine")


def usable(rows: Sequence[dict]) -> list[dict]:
    """The rows with everything the report reads, of the last one's number of prompts.

    A run that an older version wrote has rows with less; they are left out. A look
    without a phase keeps none of the figures that one is decided on, nor intervals of
    them from the resamples that told more.
    """
    rows = [row for row in rows if row.keys() >= _KEYS]
    rows = [row for row in rows if len(row["sigma"]) == len(rows[-1]["sigma"])]
    return [_without_unknown(row) for row in rows]


def _without_unknown(row):
    if row["phase"]["label"] in PHASES:
        return row
    unknown = {name: None for name in _MEASURES}
    unknown |= {f"{name}_interval": [None, None] for name in _MEASURES}
    return row | {"phase": row["phase"] | unknown}


def values(rows: Sequence[dict], *path: str) -> np.ndarray:
    """[looks, ...] of what stands at `path` of each row; null is NaN."""
    found = []
    for row in rows:
        for name in path:
            row = row[name]
        found.append(row)
    return np.asarray(found, float)


def with_exact(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if row["exact"] is not None]


def with_update(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if row["update"] is not None]


def rates(row: dict) -> np.ndarray:
    """[P] exact pass rates where there are, else the groups' means."""
    exact = row["pass_rate"]
    return np.asarray(row["group_mean"] if exact is None else exact, float)


def is_binary(rows: Sequence[dict]) -> bool:
    """Whether every group's std is that of rewards 0 and 1."""
    mean, std = values(rows, "group_mean"), values(rows, "group_std")
    there = np.isfinite(mean) & np.isfinite(std)
    mean, std = mean[there], std[there]
    return bool(np.allclose(std**2, mean * (1 - mean), atol=1e-4))


def pairs(matrix) -> np.ndarray:
    """The finite entries above the diagonal."""
    matrix = np.asarray(matrix, float)
    above = matrix[np.triu_indices(len(matrix), 1)]
    return above[np.isfinite(above)]


def exact_label(row: dict) -> str:
    """The phase of the exact cosines, by the thresholds of the sampled ones."""
    found = row["exact"]["statistics"]
    small, std = np.asarray([found["small_fraction"], found["std"]], float)
    if not np.isfinite([small, std]).all():
        return "unknown"
    if small >= THRESHOLDS.small_fraction:
        return "I"
    return "III" if std >= THRESHOLDS.std_cosine else "II"


def first_order(rows: Sequence[dict], weighting: str) -> tuple[np.ndarray, np.ndarray]:
    """(own, others), each [looks, P]; NaN where the prompt's group is tied."""
    own = values(rows, "weightings", weighting, "own")
    others = values(rows, "weightings", weighting, "others")
    tied = values(rows, "sigma") == 0
    return np.where(tied, np.nan, own), np.where(tied, np.nan, others)


def curvature_correlations(row: dict) -> tuple[float, float]:
    """Rank correlations of |curvature| and sigma^2: (sampled, exact)."""
    exact = float("nan")
    if row["exact"] is not None:
        true, rate = values([row], "exact", "curvature")[0], rates(row)
        exact = rank_correlation(np.abs(true), rate * (1 - rate))
    return rank_correlation(*sampled_curvature(row)), exact
