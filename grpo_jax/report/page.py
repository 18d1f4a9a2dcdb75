"""report.html: one self-contained file about one run, or several beside each other.

Figures are inline SVG; the page fetches nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.instrument.rows import ROW_FIELDS, by_prompts
from grpo_jax.intervals import difference_interval
from grpo_jax.objectives.presets import OBJECTIVES
from grpo_jax.report.curves import comparison, run_figures
from grpo_jax.report.instrument_figures import Section, instrument_section
from grpo_jax.report.run_files import RunFiles, number, read_run
from grpo_jax.report.svg import Figure
from grpo_jax.runs.config_files import differences
from grpo_jax.runs.directory import versions
from grpo_jax.runs.fields import FIELDS
from grpo_jax.runs.files import replace_text

PHASES = ("sample", "score", "reference", "update")  # of a step, by their times
MOST_TEXTS = 6  # different completions of a prompt that are shown


def write_report(directories: Sequence[Path], output: Path) -> Path:
    """Writes one HTML file about the runs in `directories`, overlaid where several.

    Raises:
        ConfigError: a directory holds no run.
    """
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [run._replace(name=str(run.directory)) for run in runs]
    return _write(_render(runs), output)


def write_look(
    rows: Sequence[dict[str, Any]], output: Path, *, title: str, notes: Sequence[str]
) -> Path:
    """Writes one HTML file about measurements that belong to no run.

    Args:
        rows: As those of instrument.jsonl; of each set of prompts the page has a
            section.
        output: The file.
        title: Of the page.
        notes: Sentences on what was measured, below it.
    """
    series = by_prompts(rows)
    names = [""] if len(series) == 1 else [steps_of(x) for x in series]
    found = map(instrument_section, names, series)
    sections = [section for section in found if section is not None]
    page = _template("look.html").render(
        title=title,
        notes=notes,
        instrument=sections,
        instrument_figures=_by_kind(sections),
        versions=versions(),
        fields={"look.json": ROW_FIELDS},
    )
    return _write(page, output)


def steps_of(rows: Sequence[dict[str, Any]]) -> str:
    """ "step 3", or "steps 3, 4" of several rows."""
    steps = [str(row["step"]) for row in rows]
    return f"step{'s' * (len(steps) > 1)} {', '.join(steps)}"


def _write(page: str, output: Path) -> Path:
    """Writes the file as a whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, page)
    return output


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("grpo_jax", "report"),
        autoescape=True,
        trim_blocks=True,
    )
    return environment.get_template(name)


def _render(runs: list[RunFiles]) -> str:
    sections = _instrument(runs)
    return _template("page.html").render(
        title=" and ".join(run.name for run in runs),
        runs=[_summary(run) for run in runs],
        instrument=sections,
        instrument_figures=_by_kind(sections),
        figures=run_figures(runs),
        compared=[(run.name, comparison(run)) for run in runs if run.counterfactuals],
        samples=[(run.name, _first_and_last_samples(run)) for run in runs],
        differing=[
            (run.name, differences(runs[0].config, run.config)) for run in runs[1:]
        ],
        configs=[(run.name, json.dumps(run.config, indent=1)) for run in runs],
        fields={"metrics.jsonl": FIELDS, "instrument.jsonl": ROW_FIELDS},
    )


_ENDS = ("low", "high")  # of an interval


# ---- what the top of the page says of one run


def _mismatch(run: RunFiles) -> str:
    """The largest difference of two log-probs of a token, and the mean of all."""
    largest, means = (run.series(f"mismatch/{x}")[1] for x in ("max_abs", "mean_abs"))
    if not len(largest):
        return "none yet"
    mean = f" (mean {means.mean():.1e})" if len(means) else ""  # older runs have none
    return f"{largest.max():.1e}{mean}"


def _summary(run: RunFiles) -> dict[str, Any]:
    objective = run.config["objective"]["name"]
    weights = run.config.get("weights", {}).get("name", "objective")
    return {
        "name": run.name,
        "versions": run.versions,
        "steps": run.metrics[-1]["step"],
        "asked": run.config["steps"],
        "objective": objective,
        "formula": "" if objective in OBJECTIVES else run.formula,
        "weights": "" if weights == "objective" else f" with {weights} weights",
        "source": OBJECTIVES[objective].source if objective in OBJECTIVES else "",
        "task": run.config["task"]["name"],
        "learning_rate": _learning_rate(run),
        "rows": _pass_rates(run),
        "phases": _seconds(run),
        "mismatch": _mismatch(run),
        "cut_off": _cut_off(run),
        "missing": int(run.series("reward/missing")[1].sum()),
        "failed": int(run.series("reward/failed")[1].sum()),
        "unscored": int(run.series("eval/missing")[1].sum()),
        "hung": int(run.series("eval/failed")[1].sum()),
        "verdict": _verdict(run),
    }


def _learning_rate(run: RunFiles) -> str:
    """The learning rate and where it comes from; "" where it was not recorded."""
    rate = run.config.get("optimizer", {}).get("learning_rate")
    return "" if rate is None else f"{rate:g}, {run.rate_from}"


def _pass_rates(run: RunFiles) -> list[tuple[str, str, str]]:
    """(label, first, last) of pass rates and mean rewards, with intervals."""
    figures = [
        (f"{what}, {label}", f"eval/{name}_{field}", f"eval/{name}{stem}")
        for what, field, stem in (
            ("pass rate", "pass_rate", ""),
            ("mean reward", "reward", "_reward"),
        )
        if field == "pass_rate" or run.has_other_rewards
        for name, label in (
            ("train", "trained prompts"),
            ("heldout", "held-out prompts"),
        )
    ]
    shown = []
    for label, field, stem in figures:
        rows = [row for row in run.metrics if field in row]
        if rows:
            first, last = (_rate(row, field, stem) for row in (rows[0], rows[-1]))
            shown.append((label, first, last))
    return shown


def _rate(row: dict[str, Any], field: str, stem: str) -> str:
    if row[field] is None:
        return "none"
    low, high = (number(row.get(f"{stem}_{end}")) for end in _ENDS)
    return f"{number(row[field])}{'' if '-' in (low, high) else f' [{low}, {high}]'}"


def _cut_off(run: RunFiles) -> str:
    """Shares of completions cut off, at the first and the last step; "" without any."""
    shares = run.series("completion/cut_off")[1]
    if not len(shares):
        return ""
    return f"{shares[0]:.1%} at the first step, {shares[-1]:.1%} at the last"


def _seconds(run: RunFiles) -> list[tuple[str, str]]:
    """(phase, median seconds) of those the run has; empty before the first step."""
    times = ((phase, run.series(f"time/{phase}_s")[1]) for phase in PHASES)
    return [(phase, f"{np.median(x):.3f}") for phase, x in times if len(x)]


def _verdict(run: RunFiles) -> list[str]:
    """Sentences on what changed between the first and the last evaluation.

    A change is named where the 95 % intervals of both do not overlap, which those of
    one rate do in less than 1 % of runs.
    """
    rows = [r for r in run.metrics if "eval/heldout_pass_rate" in r]
    if len(rows) < 2:
        few = "Too few evaluations to say what changed."
        return [few, *_unmeasured(run)]
    first, last = rows[0], rows[-1]
    sentences = []
    for name, label in (("train", "trained"), ("heldout", "held-out")):
        ends = [r.get(f"eval/{name}_{end}") for r in (first, last) for end in _ENDS]
        if None in ends:
            sentences.append(
                f"The pass rate on {label} prompts cannot be compared: an evaluation, "
                "the first or the last, had no rewards."
            )
            continue
        rose = last[f"eval/{name}_low"] > first[f"eval/{name}_high"]
        fell = last[f"eval/{name}_high"] < first[f"eval/{name}_low"]
        change = "rose" if rose else "fell" if fell else "did not change measurably"
        before, after = (row[f"eval/{name}_pass_rate"] for row in (first, last))
        sentences.append(
            f"The pass rate on {label} prompts {change}: {before:.3f} at step "
            f"{first['step']}, {after:.3f} at step {last['step']}."
        )
    sentences += _reward_trend(*run.series("reward/mean")) + _unmeasured(run)
    return [*sentences, run.note] if run.note else sentences


def _unmeasured(run: RunFiles) -> list[str]:
    """Where the instrument is on and has measured nothing."""
    if run.measurements or not run.config.get("instrument", {}).get("every", 0):
        return []
    return ["The instrument has measured nothing yet."]


LEAST_STEPS = 9  # of a run whose first third is compared with the rest


def _reward_trend(steps: np.ndarray, rewards: np.ndarray) -> list[str]:
    """A sentence on the mean reward of trained prompts' samples, for runs that are
    too short, or evaluated on too few prompts, for their pass rates to tell.

    A change is named where the 95 % interval of the difference between the first third
    of the steps and the rest leaves out 0: steps have prompts of their own, so that
    without any change their rewards are independent. Most of what is learned in a short
    run is learned early, so that all later steps tell of it.

    Args:
        steps: [N], from 1.
        rewards: [N], of each step.
    """
    third = len(steps) // 3
    if len(steps) < LEAST_STEPS:
        return []
    first, last = rewards[:third], rewards[third:]
    difference, half = difference_interval(first, last)
    change = "rose" if difference > 0 else "fell"
    if abs(difference) <= half:
        change = "did not change measurably"
    return [
        f"The mean reward of a step's samples {change}: {first.mean():.3f} over steps "
        f"{steps[0]} to {steps[third - 1]}, {last.mean():.3f} over steps "
        f"{steps[third]} to {steps[-1]}."
    ]


# ---- instrument and samples


def _instrument(runs: list[RunFiles]) -> list[Section]:
    """The sections of the runs that have measurements."""
    sections = [
        instrument_section(run.name if len(runs) > 1 else "", run.measurements)
        for run in runs
    ]
    return [section for section in sections if section is not None]


def _by_kind(sections: list[Section]) -> list[Figure | None]:
    """The runs' figures, one kind after another; None where one run lacks the kind."""
    kinds = zip(*(section["figures"] for section in sections), strict=True)
    return [figure for kind in kinds if any(kind) for figure in kind]


def _first_and_last_samples(run: RunFiles) -> list[dict[str, Any]]:
    """Rows of the first and the last logged step, equal completions counted."""
    if not run.samples:
        return []
    steps = [row["step"] for row in run.samples]
    shown = []
    for row in run.samples:
        if row["step"] not in (min(steps), max(steps)):
            continue
        counts: dict[tuple[str, float | None], int] = {}
        for text, reward in zip(row["completions"], row["rewards"], strict=True):
            counts[text, reward] = counts.get((text, reward), 0) + 1
        top = sorted(counts.items(), key=lambda item: -item[1])[:MOST_TEXTS]
        shown.append(row | {"top": [(text, reward, n) for (text, reward), n in top]})
    return shown
