"""Which of the paper's three phases does a real model show, and was the verdict right?

Paper: Ge et al. 2026, arXiv:2601.23135, Table 3 and section 4.4 (GSM8K, 1.5B, LoRA):
near-orthogonal gradients (I, to step 100), a transition (II, to 300), widely spread
cosines (III). Its abstract has the gain of normalisation in I, its section 4.4 in II.
Claim: a run goes through the phases, and they say when normalisation helps.

    python experiments/real_phases.py [--seeds 0] [--model DIR] [--smoke] [--long]
        [--plot-only]

Setting: the runs of real_normalisation.py (model, prompts, sizes) with std at G = 16,
at the rate chosen there, made again with the instrument on: it changes nothing in them,
which is checked by their rewards; they keep the policies of middle and end too.
Measured before, in the middle of and after training: 16 probe prompts, 16 samples of
each. The verdict is what the report says of the first measurement alone, by a rule that
was fixed before any run; it is a row of its own. What it makes expect of std less none:
near-orthogonal and C below 1: more; aligned: no difference that could be told; of mixed
sign: more on hard prompts; any other: nothing. Then real_normalisation.py's paired
differences say whether that was right.
Hardware and time (estimated from tokens): one core of 2, a measurement 4 to 6 minutes,
so a run with three about 20, and three seeds an hour. --smoke: half a minute.
"""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import once_by_settings, paired_gain, write_config, write_table
from real_normalisation import pairs
from real_runs import (
    RESULTS,
    RunsConfig,
    Setting,
    best_rate,
    identity_of,
    rows_of,
    rows_with,
    run_name,
    setting_of,
    settings_of,
    sized,
    step_rewards,
    train_anew,
)

from grpo_jax.diagnostics.phases import THRESHOLDS
from grpo_jax.instrument.rows import Row, usable, values
from grpo_jax.report.instrument_text import (
    rate_factor_interval,
    reading,
    sampled_kind,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.paths import use_compile_cache

STATISTICS = {
    "mean_cosine": "mean cosine",
    "std_cosine": "std of cosines",
    "small_fraction": "share of |cos| < .1",
}


@dataclasses.dataclass(frozen=True)
class Config(RunsConfig):
    output: Path = RESULTS / "real_phases"  # rows, table and plot
    group_size: int = 16
    probes: int = 16  # prompts that the instrument measures
    probe_group_size: int = 16  # samples of each


def looks_row(s: Setting, c: Config, seed: int) -> dict[str, Any]:
    """The instrument's rows of a run with std, and the rewards of its steps."""

    def run() -> dict[str, Any]:
        rate = best_rate(s, "std", c.group_size)
        settings = settings_of(c, "std", rate, c.group_size, seed)
        settings |= {
            "instrument": {
                "every": max(1, c.steps // 2),
                "at_start": True,  # the default but for a pretrained model on a CPU
                "prompts": c.probes,
                "group_size": c.probe_group_size,
                "max_overhead": 1e6,  # this run is for the measurements
            },
            "checkpoint": {"every": max(1, c.steps // 2), "keep": 3},
        }
        name = f"{run_name('std', rate, c.group_size, seed)}-looks"
        directory = train_anew(s, name, settings)
        looks = read_lines(directory / "instrument.jsonl")
        seconds = [
            round(row["time/instrument_s"])
            for row in read_lines(directory / "metrics.jsonl")
            if "time/instrument_s" in row
        ]
        rewards = step_rewards(directory)
        return {"rewards": rewards, "rate": rate, "looks": looks, "seconds": seconds}

    labels = {"kind": "looks", "seed": seed, "group_size": c.group_size}
    path = c.output / "metrics.jsonl"
    return once_by_settings(path, labels, probed(s, c), run)


def probed(s: Setting, c: Config) -> dict[str, Any]:
    """What the rows of this script have in common."""
    own = {"probes": c.probes, "probe_group_size": c.probe_group_size}
    return identity_of(s) | own


def verdict(looks: list[Row]) -> dict[str, Any]:
    """What the first measurement says, and what it makes expect of std less none."""
    first = looks[:1]
    low, high = rate_factor_interval(first)
    return {
        "phase": first[0]["phase"]["label"],
        "cosines": sampled_kind(first[0]),
        "factor": [low, high],
        "expected": expectation(first[0], high),
        "text": reading(first),
    }


def expectation(first: Row, factor: float) -> str:
    """As in the header; factor: the upper end of C."""
    kind = sampled_kind(first)
    if kind == "near-orthogonal":
        return "more" if factor < 1 else "nothing"
    return {"aligned": "no difference", "of mixed sign": "more on hard prompts"}.get(
        kind, "nothing"
    )


def verdict_row(s: Setting, c: Config, row: dict[str, Any]) -> dict[str, Any]:
    labels = {"kind": "verdict", "seed": row["seed"], "group_size": c.group_size}
    path = c.output / "metrics.jsonl"
    settings = probed(s, c)
    return once_by_settings(
        path, labels, settings, lambda: verdict(usable(row["looks"]))
    )


# ---- what came out


def found_rows(s: Setting, c: Config, kind: str) -> list[dict[str, Any]]:
    return rows_with(c.output / "metrics.jsonl", probed(s, c), kind=kind)


def table(s: Setting, c: Config) -> str:
    """Markdown of the phases, the verdicts, and the differences that judge them."""
    lines = ["| seed | step | phase | I / II / III | mean cosine | std | within .1 |"]
    lines[0] += " mean sigma | cosines | signal |"
    lines += ["|" + "---|" * 10]
    for row in found_rows(s, c, "looks"):
        lines += [look_line(row["seed"], look) for look in usable(row["looks"])]
    lines += [
        "",
        "Of draws from the estimates' distribution, I / II / III is the share",
    ]
    lines += [
        "in which a phase is certain; of .95 on it is the label. Within .1: share of",
        "cosines of at most that size. Signal: prompts.",
    ]
    for row in found_rows(s, c, "verdict"):
        low, high = row["factor"]
        lines += ["", f"Verdict before training, seed {row['seed']}: phase "]
        lines[-1] += f"{row['phase']}, cosines {row['cosines']}, C in [{low:.2f}, "
        lines[-1] += f"{high:.2f}]; expected of std less none: {row['expected']}."
    lines += ["", *judgement(s, c), "", *same_runs(s, c), ""]
    return "\n".join(lines)


def look_line(seed: int, look: Row) -> str:
    phase = look["phase"]
    shares = np.array(phase["shares"], float)
    certain = " / ".join("-" if np.isnan(x) else f"{x:.2f}" for x in shares)
    cells = [
        "{:.3f} [{:.3f}, {:.3f}]".format(
            *np.array([phase[name], *phase[f"{name}_interval"]], float)
        )
        for name in STATISTICS
    ]
    return (
        f"| {seed} | {look['step']} | {phase['label']} | {certain} "
        f"| {' | '.join(cells)} | {phase['mean_sigma']:.3f} | {sampled_kind(look)} "
        f"| {phase['prompts']} |"
    )


def judgement(s: Setting, c: Config) -> list[str]:
    """The verdicts beside std less none of real_normalisation.py at the same G."""
    compared = pairs(s).get((c.group_size, "std"))
    if compared is None:
        return ["std less none: real_normalisation.py has no pair of runs yet."]
    verdicts = [row["expected"] for row in found_rows(s, c, "verdict")]
    lines = [f"Expected by seed: {', '.join(verdicts) or '-'}. Found, std less none:"]
    for name in ("train all", "heldout all", "train hard", "train easy", "reward"):
        x, base = compared[name]
        if len(x) < 2:
            lines.append(f"* {name}: {np.mean(x - base):+.3f}, of one seed.")
            continue
        mean, half = paired_gain(x, base)
        told = "told apart" if abs(mean) > half else "cannot be told from 0"
        lines.append(f"* {name}: {mean:+.3f} ± {half:.3f}, {told}.")
    return lines


def same_runs(s: Setting, c: Config) -> list[str]:
    """Whether the measured runs are those of real_normalisation.py."""
    lines = []
    for row in found_rows(s, c, "looks"):
        labels = {"rule": "std", "group_size": c.group_size, "seed": row["seed"]}
        for other in rows_of(s, kind="run", rate=row["rate"], **labels):
            gap = np.abs(np.subtract(row["rewards"], other["rewards"])).max()
            lines.append(
                f"Seed {row['seed']}: rewards of the run with the instrument differ by "
                f"{gap:.3g} at most from those without."
            )
    return lines


def plot(s: Setting, c: Config) -> None:
    """Cosines' statistics by step, with intervals, and the phases' thresholds."""
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for row in found_rows(s, c, "looks"):
        looks, color = usable(row["looks"]), f"C{row['seed']}"
        steps = values(looks, "step")
        x = steps + 0.05 * c.steps * (row["seed"] - 1) / 2
        label = f"seed {row['seed']}"
        for axis, name in zip(axes, STATISTICS, strict=False):
            y, ends = (values(looks, "phase", n) for n in (name, f"{name}_interval"))
            bars = np.maximum(np.abs(ends.T - y), 0)
            axis.errorbar(x, y, bars, fmt="o-", color=color, label=label, capsize=2)
        y = values(looks, "phase", "mean_sigma")
        axes[3].plot(x, y, "o-", color=color, label=label)
    for axis, words in zip(axes, STATISTICS.values(), strict=False):
        axis.set(title=words)
    axes[1].axhline(THRESHOLDS.std_cosine, color="k", lw=0.8)
    axes[2].axhline(THRESHOLDS.small_fraction, color="k", lw=0.8)
    axes[3].axhline(3 / 8, color="k", lw=0.8)
    axes[3].set(title="mean sigma (C < 1 below the line)")
    for axis in axes:
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="best", frameon=False)
    figure.savefig(c.output / "plot.png", dpi=100)
    plt.close(figure)


def main(c: Config) -> None:
    c = sized(c, group_size=8, probes=4, probe_group_size=8)
    s = setting_of(c)
    if not c.plot_only:
        use_compile_cache()
        # The config's paths are of this machine alone.
        write_config(c.output, c, output=None, runs=None, rows=None, model=None)
        for seed in c.seeds:
            verdict_row(s, c, looks_row(s, c, seed))
    write_table(c.output, table(s, c))
    plot(s, c)


if __name__ == "__main__":
    main(tyro.cli(Config))
