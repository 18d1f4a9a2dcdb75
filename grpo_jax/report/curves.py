"""Figures of metrics over steps and of other prompt weights, of one run or several."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from grpo_jax.instrument.rows import THIRDS, finite_mean
from grpo_jax.report.run_files import RunFiles, number
from grpo_jax.report.svg import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PURPLE,
    SAND,
    Figure,
    svg_figure,
)
from grpo_jax.runs.fields import FIELDS, PART

Runs = Sequence[RunFiles]
SHADES = {  # parts of a run's time
    "start": GREY,
    "sample": BLUE,
    "score": SAND,
    "reference": GREEN,
    "update": ORANGE,
    "evaluation": PURPLE,
    "instrument": BLACK,
    "other": PALE,
}
BINS = 5  # of pass rates, in the figure of predicted changes


def run_figures(runs: Runs) -> list[Figure]:
    """Every figure that the runs have data for, runs overlaid in one colour each."""
    figures = [
        _pass_rates(runs),
        _metric(runs, "Within-prompt std", "group/std_mean", smooth=True),
        _metric(runs, "Informative groups", "group/informative", smooth=True, top=1.0),
        _metric(runs, "Reward", "reward/mean", smooth=True),
        _metric(
            [run for run in runs if run.has_other_rewards],
            "Reward of held-out prompts",
            "eval/heldout_reward",
        ),
        *(
            _metric(runs, f"Reward {name.removeprefix(PART)}", name, smooth=True)
            for name in sorted({f for run in runs for row in run.metrics for f in row})
            if name.startswith(PART)
        ),
        _metric(runs, "Cut off at the limit", "completion/cut_off", smooth=True),
        _metric(runs, "Entropy", "entropy/sampled", smooth=True),
        _metric(runs, "KL to the start", "kl/mean", smooth=True),
        _metric(runs, "Sampler/trainer mismatch", "mismatch/max_abs", log=True),
        _time_figure(runs),
        *(
            _predicted_changes(run, named=len(runs) > 1)
            for run in runs
            if run.counterfactuals
        ),
    ]
    return [figure for figure in figures if figure is not None]


def _with_colours(runs: Runs) -> Iterator[tuple[RunFiles, str]]:
    for i, run in enumerate(runs):
        yield run, COLOURS[i % len(COLOURS)]


def _pass_rates(runs: Runs) -> Figure | None:
    styles = {"eval/train": "-", "eval/heldout": "--"}
    if not any(len(run.series(f"{p}_pass_rate")[0]) for run in runs for p in styles):
        return None

    def draw(axes: Any) -> None:
        for run, colour in _with_colours(runs):
            for prefix, style in styles.items():
                steps, values = run.series(f"{prefix}_pass_rate")
                label = prefix.split("/")[1] if len(runs) == 1 else None
                if len(runs) > 1 and style == "-":
                    label = run.name
                axes.plot(steps, values, style, color=colour, label=label)
                (at, low), (_, high) = (
                    run.series(f"{prefix}_{end}") for end in ("low", "high")
                )
                axes.fill_between(at, low, high, color=colour, alpha=0.13, lw=0)
        axes.set(xlabel="step", ylabel="pass rate", ylim=(0, 1))

    caption = (
        "Mean pass rate of trained (full line) and held-out (dashed) prompts, with "
        "95 % intervals over prompts."
    )
    return svg_figure("Pass rate", caption, draw)


def _metric(
    runs: Runs,
    title: str,
    field: str,
    *,
    smooth: bool = False,
    log: bool = False,
    top: float | None = None,
) -> Figure | None:
    """A field of metrics.jsonl over steps, `smooth` with its running mean on top."""
    if not any(len(run.series(field)[0]) for run in runs):
        return None

    def draw(axes: Any) -> None:
        for run, colour in _with_colours(runs):
            steps, values = run.series(field)
            label = run.name if len(runs) > 1 else None
            if smooth and len(values) >= 10:
                width = max(2, len(values) // 20)
                axes.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
                values = np.convolve(values, np.ones(width) / width, mode="valid")
                steps = steps[width - 1 :]
            axes.plot(steps, values, color=colour, label=label)
        axes.set(xlabel="step")
        if log:
            axes.set_yscale("log")
        elif top is not None:
            axes.set_ylim(0, top)
        elif axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)

    meaning = FIELDS[f"{PART}NAME" if field.startswith(PART) else field]
    return svg_figure(title, meaning[0].upper() + meaning[1:] + ".", draw)


def run_times(run: RunFiles) -> dict[str, float]:
    """Seconds of each part of a run, in all; `other` is what its steps took besides."""
    totals = {p: float(np.nansum(run.series(f"time/{p}_s")[1])) for p in SHADES}
    started = [row for row in run.metrics if row["step"] > 0]
    steps = sum(row.get("time/step_s") or 0.0 for row in started)
    parts = [f"time/{p}_s" for p in SHADES if p != "start"]
    known = sum(row.get(part) or 0.0 for row in started for part in parts)
    totals["other"] = max(0.0, steps - known)
    return totals


def _time_figure(runs: Runs) -> Figure | None:
    if not any(len(run.series("time/update_s")[0]) for run in runs):
        return None

    def draw(axes: Any) -> None:
        times = [run_times(run) for run in runs]
        left = np.zeros(len(runs))
        for phase, shade in SHADES.items():
            widths = np.asarray([x[phase] for x in times]) / 60
            if not widths.any():
                continue
            axes.barh(
                range(len(runs)), widths, 0.5, left=left, color=shade, label=phase
            )
            left += widths
        axes.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=7)
        axes.set(xlabel="minutes", ylim=(-0.6, len(runs) + 0.6))
        spacing = {"columnspacing": 1.0, "handlelength": 1.2}
        axes.legend(frameon=False, fontsize=7.5, ncols=4, loc="upper left", **spacing)

    caption = (
        "Minutes of each part of a run: what came before the first step (of its first "
        "start), the phases of all steps, evaluations and measurements at the start "
        "included, and what steps took besides. Runs of older versions have "
        "evaluations in `other`, and the reference policy in `score`."
    )
    return svg_figure("Where the time went", caption, draw)


# ---- other prompt weights


def comparison(run: RunFiles) -> list[dict[str, Any]]:
    """The table of prompt weights: one row for each, means over the compared steps."""
    rows = []
    norms, cosines, updates = (
        np.asarray([row[key] for row in run.counterfactuals], float)
        for key in ("norm_ratio", "cosines", "update_cosines")
    )
    rates, changes = _rates_and_changes(run)
    for k, name in enumerate(run.counterfactuals[0]["weightings"]):
        third = [changes[k][(rates >= low) & (rates < high)] for _, low, high in THIRDS]
        rows.append(
            {
                "name": name,
                "norm": number(finite_mean(norms[:, k], 0), ".2f"),
                "cosines": [number(x) for x in finite_mean(cosines[:, k], 0)],
                "update": number(finite_mean(updates[:, k, 0], 0)),
                "change": [number(finite_mean(x, 0), "+.4f") for x in third],
                "total": number(finite_mean(changes[k], 0), "+.4f"),
            }
        )
    return rows


def _rates_and_changes(run: RunFiles) -> tuple[np.ndarray, np.ndarray]:
    """(group means [N], predicted changes [K, N]) of the N prompts of all compared
    steps, under K prompt weights."""
    rows = run.counterfactuals
    rates = np.concatenate([np.asarray(row["group_mean"], float) for row in rows])
    changes = [np.asarray(row["predicted_change"], float) for row in rows]
    return rates, np.concatenate(changes, axis=1)


def _predicted_changes(run: RunFiles, *, named: bool) -> Figure:
    def draw(axes: Any) -> None:
        rates, changes = _rates_and_changes(run)
        edges = np.linspace(0, 1, BINS + 1)
        bins = np.clip(np.digitize(rates, edges) - 1, 0, BINS - 1)
        bins = np.where(np.isnan(rates), -1, bins)
        used = [b for b in range(BINS) if (bins == b).any()]
        middle = (edges[:-1] + edges[1:]) / 2
        for k, name in enumerate(run.counterfactuals[0]["weightings"]):
            values = [finite_mean(changes[k][bins == b], 0) for b in used]
            if name == "this run":
                style = {"color": BLACK, "lw": 3, "alpha": 0.3}
            else:
                colour = COLOURS[(k - 1) % len(COLOURS)]
                style = {"color": colour, "marker": "o", "ms": 3}
            axes.plot(middle[used], values, label=name, **style)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set(xlabel="pass rate of a prompt's group", ylabel="predicted change")
        axes.set_xlim(0, 1)

    title = "What other weightings would have done"
    caption = (
        "Predicted change of a prompt's expected reward by the update that the run's "
        "optimizer would have made of each weighting's gradient, from slope and "
        f"curvature along it; means over {len(run.counterfactuals)} steps in {BINS} "
        "bins."
    )
    return svg_figure(f"{title}: {run.name}" if named else title, caption, draw)
