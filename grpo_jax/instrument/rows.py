"""The rows of instrument.jsonl: their fields, and how the report reads them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

import numpy as np

from grpo_jax.diagnostics.cosines import LEAST_PROMPTS
from grpo_jax.diagnostics.phases import PHASES, THRESHOLDS

Floats = list[float | None]  # null: not finite


class ExactFields(TypedDict):
    """Figures of the exact pass rates' gradients, from the one right answer."""

    cosines: list[Floats]  # [P, P]
    statistics: dict[str, float]  # `CosineStatistics`
    chi: float  # largest eigenvalue of the cosines
    norms: Floats  # [P]
    curvature: Floats  # [P] along the same directions as the sampled one
    slope: Floats  # [P]


class UpdateFields(TypedDict):
    """Along the update that followed, each [P]."""

    slope: Floats
    curvature: Floats
    predicted: Floats  # slope + curvature / 2
    realised: Floats
    exact_slope: Floats
    exact_curvature: Floats


class Row(TypedDict):
    """One line of instrument.jsonl: each field's type and meaning.

    The report reads all fields but those that are not required, which rows of older
    versions lack.
    """

    step: Annotated[
        int,
        "steps that the measured policy was trained for; of a look, the rollouts' or 0",
    ]
    phase: Annotated[
        dict[str, Any],
        "label (right in 95 % of cases; else unknown), shares of draws from the "
        "estimates' distribution in which a phase is certain, the figures that decide",
    ]
    prompts: Annotated[
        NotRequired[list[int]],
        "indices among the trained prompts; of a look, in the order in which they came",
    ]
    group_size: Annotated[int, "samples of each prompt"]
    directions: Annotated[
        NotRequired[int | None],
        "sums that gradients were hashed to; null: all coordinates were kept",
    ]
    group_mean: Annotated[Floats, "mean reward of the sampled group"]
    group_std: Annotated[Floats, "std of the group's rewards (ddof 0)"]
    sigma: Annotated[Floats, "std of the group's rewards (ddof 1)"]
    pass_rate: Annotated[Floats | None, "exact, where one answer is right; else null"]
    curvature: Annotated[
        Floats,
        "u'Hu / |u|^2 along the prompt's gradient u: estimated from one half of the "
        "group and measured on the other, mean of both ways; unbiased given u; 0 where "
        "halves is 1, as the other half has no signal",
    ]
    halves: Annotated[
        list[int],
        "halves that curvature, spread and slope average over: 0, 1 or 2; weight by it "
        "in means over prompts",
    ]
    spread: Annotated[
        Floats,
        "max - min over completions of (d2/dt2 p) / p along u; for 0/1 rewards "
        "|curvature| <= sigma^2 * spread",
    ]
    slope: Annotated[Floats, "change of expected reward per unit length along u"]
    geometry: Annotated[
        dict[str, Any],
        "raw cosines, squared norms and the statistics of `PromptGeometry`",
    ]
    null: Annotated[
        dict[str, float],
        "cosines between differences of a group's parts: sampling noise alone",
    ]
    features: Annotated[
        dict[str, dict[str, float]],
        "cosines of mean hidden states, raw and less their mean over prompts",
    ]
    weightings: Annotated[
        dict[str, dict[str, Floats]],
        "first-order change of each prompt's expected reward by a gradient step under "
        "other prompt weights, of length 1 but for what gradients have in common: the "
        "part of its own gradient (own) and of the other prompts' (others); null under "
        "weights made of pass rates where a reward is not in [0, 1]",
    ]
    exact: Annotated[
        ExactFields | None,
        "cosines, norms, curvature and slope (along the same u) from the one right "
        "answer; null where there is none",
    ]
    update: Annotated[
        UpdateFields | None,
        "slope and curvature along the next update (per update, per update squared), "
        "predicted and realised change; null where no update followed",
    ]


# Field -> its meaning, as the report prints it.
ROW_FIELDS: dict[str, str] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Row, include_extras=True).items()
}
# Pass rates that the report tells apart.
THIRDS = (
    ("hard", -np.inf, 1 / 3),
    ("middle", 1 / 3, 2 / 3),
    ("easy", 2 / 3, np.inf),
)
LEAST_RANKED = 5  # pairs of a rank correlation: no order of fewer is rare (5 %)


# ---- reading


def usable(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows with every required field and as many prompts as the last one.

    Figures over pairs of fewer than LEAST_PROMPTS prompts with signal become null. So
    do those of rows from before `effective_prompts`, which give figures without a label
    and bootstrap intervals of them, where there was too little signal.
    """
    complete = [row for row in rows if row.keys() >= Row.__required_keys__]
    return [
        _without_few(_without_undecided(row))
        for row in complete
        if len(row["sigma"]) == len(complete[-1]["sigma"])
    ]


def by_prompts(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each set of prompts, in the order in which the sets came.

    Rows are compared prompt by prompt, by place, so only rows of the same are.
    """
    series: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(tuple(row["prompts"]), []).append(row)
    return list(series.values())


_DECIDING = ("small_fraction", "std_cosine", "mean_cosine")


def is_older(row: Mapping[str, Any]) -> bool:
    """Whether its label is the phase of point estimates, which weighed pairs unlike.

    Those labels and intervals are wrong more often than they say.
    """
    return "effective_prompts" not in row["phase"]


def _without_undecided(row: dict[str, Any]) -> Row:
    if is_older(row) and row["phase"]["label"] not in PHASES:
        undecided: dict[str, Any] = dict.fromkeys(_DECIDING)
        undecided |= {f"{name}_interval": [None, None] for name in _DECIDING}
        row = row | {"phase": row["phase"] | undecided}
    return Row(**row)


def signal_prompts(cosines: Sequence[Sequence[float | None]]) -> int:
    """Prompts with signal in a matrix of cosines [P, P]."""
    return int(np.isfinite(np.diag(np.asarray(cosines, float))).sum())


def _without_few(row: Row) -> Row:
    """The row without figures over pairs of too few prompts."""

    def nothing(fields: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        return {**fields, **dict.fromkeys(names)}

    changed: dict[str, Any] = {**row}
    phase, geometry, exact = row["phase"], row["geometry"], row["exact"]
    signal = signal_prompts(geometry["cosines"])
    effective = phase.get("effective_prompts", signal) or 0
    if min(signal, effective) < LEAST_PROMPTS:
        phase = nothing(phase, _DECIDING) | {"label": "unknown", "shares": [None] * 3}
        phase |= {f"{name}_interval": [None, None] for name in _DECIDING}
        changed["phase"] = phase
    if signal < LEAST_PROMPTS:
        names = ("attenuation", "chi", "violating_fraction")
        changed["geometry"] = nothing(geometry, names)
        changed["null"] = nothing(row["null"], row["null"])
    if len(row["sigma"]) < LEAST_PROMPTS:
        changed["features"] = {k: nothing(x, x) for k, x in row["features"].items()}
    if exact is not None and signal_prompts(exact["cosines"]) < LEAST_PROMPTS:
        statistics = nothing(exact["statistics"], exact["statistics"])
        changed["exact"] = exact | {"statistics": statistics}
    return Row(**changed)


def values(rows: Sequence[Row], *path: str) -> np.ndarray:
    """[N, ...] the field at `path` of each of N rows; null is NaN."""
    fields: list[Any] = list(rows)
    for name in path:
        fields = [field[name] for field in fields]
    return np.asarray(fields, float)


def with_exact(rows: Sequence[Row]) -> list[Row]:
    """The rows with figures from the one right answer."""
    return [row for row in rows if row["exact"] is not None]


def with_update(rows: Sequence[Row]) -> list[Row]:
    """The rows whose next update was compared."""
    return [row for row in rows if row["update"] is not None]


def pass_rates(row: Row) -> np.ndarray:
    """[P] exact pass rates, or the groups' mean rewards where there are none."""
    exact = row["pass_rate"]
    return np.asarray(row["group_mean"] if exact is None else exact, float)


def is_binary(rows: Sequence[Row]) -> bool:
    """Whether every group's std is that of rewards 0 and 1."""
    mean, std = values(rows, "group_mean"), values(rows, "group_std")
    finite = np.isfinite(mean) & np.isfinite(std)
    mean, std = mean[finite], std[finite]
    return bool(np.allclose(std**2, mean * (1 - mean), rtol=0.02, atol=1e-8))


def has_pass_rates(rows: Sequence[Row]) -> bool:
    """Whether mean rewards may be read as pass rates: they are exact, or no group has a
    mean or a std that rewards from 0 to 1 cannot have."""
    if rows[-1]["pass_rate"] is not None:
        return True
    mean, std = values(rows, "group_mean"), values(rows, "group_std")
    wrong = (mean < 0) | (mean > 1) | (std**2 > mean * (1 - mean) + 1e-3)
    return not wrong.any()


def pairs(matrix: Sequence[Sequence[float | None]]) -> np.ndarray:
    """[N] finite entries above the diagonal of a matrix [P, P]."""
    square = np.asarray(matrix, float)
    above = square[np.triu_indices(len(square), 1)]
    return above[np.isfinite(above)]


def exact_label(row: Row) -> str:
    """Phase label of the exact cosines, by the thresholds of the sampled ones."""
    if row["exact"] is None:
        return "unknown"
    statistics = row["exact"]["statistics"]
    small, std = np.asarray([statistics["small_fraction"], statistics["std"]], float)
    if not np.isfinite([small, std]).all():
        return "unknown"
    if small >= THRESHOLDS.small_fraction:
        return "I"
    return "III" if std >= THRESHOLDS.std_cosine else "II"


def first_order(rows: Sequence[Row], weighting: str) -> tuple[np.ndarray, np.ndarray]:
    """(own, others), each [N, P]; NaN where the prompt's group is tied."""
    own = values(rows, "weightings", weighting, "own")
    others = values(rows, "weightings", weighting, "others")
    tied = values(rows, "sigma") == 0
    return np.where(tied, np.nan, own), np.where(tied, np.nan, others)


def sampled_curvature(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """(sigma^2, |curvature|), each [P]; NaN without signal in both halves of a group.

    Measured on a tied half a curvature is 0, and sigma small, by construction.
    """
    curvature = np.abs(np.asarray(row["curvature"], float))
    informative = np.asarray(row["halves"]) == 2
    sigma = np.asarray(row["sigma"], float)
    return sigma**2, np.where(informative, curvature, np.nan)


def exact_curvature(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """(p (1 - p), |curvature|), each [P], from the one right answer."""
    p = pass_rates(row)
    return p * (1 - p), np.abs(values([row], "exact", "curvature")[0])


def curvature_correlations(row: Row) -> tuple[float, float]:
    """Rank correlations of |curvature| with sigma^2: (sampled, exact or NaN)."""
    exact = float("nan")
    if row["exact"] is not None:
        variance, curvature = exact_curvature(row)
        exact = rank_correlation(curvature, variance)
    return rank_correlation(*sampled_curvature(row)), exact


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's correlation of the finite pairs of x and y, each [N].

    NaN for fewer than LEAST_RANKED pairs, or where one side does not vary.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.sum() < LEAST_RANKED:
        return float("nan")
    x, y = x[finite], y[finite]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    from scipy import stats

    result: Any = stats.spearmanr(x, y)  # scipy has no types
    return float(result.statistic)


def finite_mean(x: np.ndarray, axis: int) -> np.ndarray:
    """[...] mean of the finite entries along an axis; NaN of none, unwarned."""
    finite = np.isfinite(x)
    count = finite.sum(axis)
    total = np.where(finite, x, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
