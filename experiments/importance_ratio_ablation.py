"""Token or whole-completion importance ratios, two-sided or up-only clip, or none.

Paper: Pang et al. 2025, arXiv:2508.02833v5 (TIC-GRPO), the ablation table (AIME24, a
1.7B model): GRPO 9.17, + trajectory ratio 10.62, + up-only clip 10.31, both (TIC-GRPO)
11.77; and no loss without importance sampling.
Claim: with several updates a rollout, each on its own prompts, the trajectory ratio and
the clip from above only both help.

    python experiments/importance_ratio_ablation.py [--smoke] [--plot-only]

Setting: the default task, 40 rollouts of 16 prompts x 16 samples, 3 seeds; group mean
as baseline, no std, constant length and no KL throughout, so that only the ratio and
its clip differ. One edge, 1.28, for all; the two-sided clip is PPO's, with .72 below.
Three learning rates each, best against best by the final pass rate on 512 held-out
prompts (exact), chosen on the same seeds. Intervals: 95 %, t over 3 seeds, paired.
Hardware and time: one CPU core, about 15 minutes after the warm starts (a minute a
seed, cached); --smoke: two variants, about a minute, mostly compilation.

Expected: the paper's order; and with one update a rollout, no difference at all.
Got (2026-11-21): not the paper's order. Final pass rate, less that of the first row:
                            4 updates                8 updates
    token, two-sided        .878                     .878
    token, up-only          .859  -.019 +- .019      .866  -.012 +- .025
    trajectory, two-sided   .866  -.012 +- .009      .873  -.005 +- .015
    trajectory, up-only     .845  -.033 +- .025      .863  -.015 +- .029
    no ratio                .845  -.034 +- .015      .863  -.015 +- .010
* Trajectory less token: -.013 +- .011 and -.004 +- .005; up-only less two-sided:
  -.020 +- .016 and -.011 +- .032. At 4 updates both lose, at 8 both include 0. Ten
  comparisons on 3 seeds, none corrected for, each with rates picked on the same seeds,
  which flatters both sides: an order, not a measurement of it.
* The best rate is inside the sweep for all but two at 4 updates (trajectory, up-only
  and no ratio: the lowest, by less than .01). At the lowest rates the five are within
  .006 of each other: ratios hardly move, so a missing clip or ratio does not matter.
* Twice the rate, 4 updates: two-sided .817 (token) and .827 (trajectory); up-only .557
  and .736; no ratio .701. What PPO's clip buys here is a wider range of rates; the
  trajectory ratio, whose clip drops 5 to 6 times as many tokens, is not worse there.
* Last update of a rollout, best rates: mean |ratio - 1| .015 to .020 for tokens, .051
  to .084 for completions; clipped .4 to .8 % and .9 to 4.2 % of tokens.
* One update a rollout: the same run to the last bit (seed 0, .857972 each).
Answers of chains have 2 to 8 tokens, the paper's thousands: its bounds, which grow with
length, have little to act on, and this neither confirms nor refutes its table.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import (
    interval_text,
    once_by_settings,
    temporary_run,
    write_config,
    write_table,
)

import grpo_jax as gj
from grpo_jax.intervals import t_interval
from grpo_jax.planning.resolve import resolve_objective
from grpo_jax.runs.config_files import from_dict
from grpo_jax.runs.lines import read_lines

NAMES = (
    "token, two-sided",
    "token, up-only",
    "trajectory, two-sided",
    "trajectory, up-only",
    "no ratio",
)
BASE = NAMES[0]


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/importance_ratio_ablation")  # where the files go
    smoke: bool = False  # two variants, one seed, one rate, three steps
    plot_only: bool = False  # redraw from metrics.jsonl
    variants: tuple[str, ...] = NAMES
    seeds: tuple[int, ...] = (0, 1, 2)  # of warm start, order of prompts and sampling
    updates: tuple[int, ...] = (4, 8)  # per rollout, each on its own prompts
    # At 4 updates a rollout, else times 4 / updates; each variant's best one counts.
    learning_rates: tuple[float, ...] = (1.5e-4, 3e-4, 6e-4)
    control_rate: float = 3e-4  # of the runs with one update a rollout, first seed only
    steps: int = 40  # rollouts, of 16 prompts x 16 samples
    evaluate_every: int = 10  # steps; the mean over a run is over these
    clip: float = 0.28  # ratios in [1 - clip, 1 + clip], or at most 1 + clip


def objectives(clip: float) -> dict[str, dict]:
    """Objectives by name of variant; they differ in the ratio and its clip only."""
    two, up = {"clip": (clip, clip)}, {"clip": (None, clip)}
    token = {"name": "dr_grpo", "disjoint": True}
    rows = (
        token | two,
        {"name": "grpo_up_clip"} | up,
        token | two | {"ratio": "sequence_sum"},
        {"name": "tic_grpo"} | up,
        {"name": "grpo_no_is", "scale": "none", "aggregation": "constant"},
    )
    return dict(zip(NAMES, rows, strict=True))


def settings_of(c: Config, variant: str, updates: int, rate: float, seed: int) -> dict:
    objective = objectives(c.clip)[variant]
    if updates == 1:  # a single update has all prompts anyway
        objective.pop("disjoint", None)
    return {
        "objective": objective,
        "updates_per_rollout": updates,
        "optimizer": {"learning_rate": rate},
        "steps": c.steps,
        "seed": seed,
        "evaluation": {"every": c.evaluate_every},
        "instrument": {"every": 0},
        "log": {"lines_every": 10**6, "samples_every": 0},
        "checkpoint": {"every": 10**6},
    }


def rates(c: Config, updates: int) -> list[float]:
    return [rate * 4 / updates for rate in c.learning_rates]


def planned(c: Config) -> Iterator[tuple[str, int, float, int]]:
    """(variant, updates, learning rate, seed) of every run."""
    for variant in c.variants:
        yield variant, 1, c.control_rate, c.seeds[0]
    for updates in c.updates:
        for seed in c.seeds:
            for rate in rates(c, updates):
                for variant in c.variants:
                    yield variant, updates, rate, seed


def check_only_ratios_differ(c: Config) -> None:
    """Asserts that the five objectives agree on every other field."""
    free = {"ratio", "surrogate", "clip", "source"}
    kept = []
    for objective in objectives(c.clip).values():
        settings = {"objective": objective, "updates_per_rollout": 4}
        config = from_dict(gj.TrainConfig, settings)
        fields = dataclasses.asdict(resolve_objective(config))
        kept.append({k: v for k, v in fields.items() if k not in free})
    assert all(fields == kept[0] for fields in kept), kept


def one_run(settings: dict) -> dict:
    with temporary_run(settings) as directory:
        rows = read_lines(directory / "metrics.jsonl")
    name = "eval/heldout_pass_rate"
    curve = {row["step"]: row[name] for row in rows if name in row}
    after = rows[1:]  # ratios are those of each rollout's last update
    return {
        "curve": curve,
        "final": curve[settings["steps"]],
        "mean": statistics.mean(v for step, v in curve.items() if step),
        "clipped": statistics.mean(r["ratio/clipped"] for r in after),
        "deviation": statistics.mean(r["ratio/deviation"] for r in after),
        "gradient_norms": [r["gradient/norm"] for r in after],
        "skipped": rows[-1]["update/skipped"],
    }


def rows_of(c: Config) -> dict[tuple, dict]:
    """(variant, updates, rate, seed) -> row of metrics.jsonl; runs what is missing."""
    rows = {}
    for run in planned(c):
        settings = settings_of(c, *run)
        labels = dict(zip(("variant", "updates", "rate", "seed"), run, strict=True))
        train = None if c.plot_only else functools.partial(one_run, settings)
        path = c.results / "metrics.jsonl"
        rows[run] = once_by_settings(path, labels, settings, train)
    return rows


def of_seeds(
    c: Config, rows: dict, variant: str, updates: int, rate: float, field: str
) -> np.ndarray:
    """A field of the runs [seeds] of one variant and rate."""
    return np.array([rows[variant, updates, rate, seed][field] for seed in c.seeds])


def best_rate(c: Config, rows: dict, variant: str, updates: int) -> float:
    """The learning rate with the highest final pass rate, mean over seeds."""
    return max(
        rates(c, updates),
        key=lambda rate: of_seeds(c, rows, variant, updates, rate, "final").mean(),
    )


def at_best(
    c: Config, rows: dict, variant: str, updates: int, field: str
) -> np.ndarray:
    """A field of the runs [seeds] of one variant at its best rate."""
    rate = best_rate(c, rows, variant, updates)
    return of_seeds(c, rows, variant, updates, rate, field)


def less_base(
    c: Config, rows: dict, variant: str, updates: int, field: str
) -> np.ndarray:
    """The paired difference [seeds] to BASE, best against best."""
    base = at_best(c, rows, BASE, updates, field)
    return at_best(c, rows, variant, updates, field) - base


def main_effects(c: Config, rows: dict, updates: int) -> list[str]:
    four = [at_best(c, rows, v, updates, "final") for v in NAMES[:4]]
    (token2, token1), (whole2, whole1) = four[:2], four[2:]
    effects = {
        "trajectory less token": (whole2 + whole1 - token2 - token1) / 2,
        "up-only less two-sided": (token1 + whole1 - token2 - whole2) / 2,
    }
    return [
        f"* {updates} updates, {name}: {interval_text(effect, 4, '+')}"
        for name, effect in effects.items()
    ]


def on_policy_check(c: Config, rows: dict) -> str:
    """How far the variants agree where each rollout has one update.

    Raises:
        RuntimeError: their first gradients differ by more than rounding.
    """
    control = [rows[v, 1, c.control_rate, c.seeds[0]] for v in c.variants]
    norms = np.array([row["gradient_norms"] for row in control])
    gaps = np.ptp(norms, axis=0) / norms.mean(0)
    if not gaps[0] < 1e-5:
        raise RuntimeError(f"the variants differ on policy: gradient norms {norms}")
    finals = [row["final"] for row in control]
    return (
        f"One update a rollout: gradient norms of all agree to {gaps[0]:.1e} at "
        f"the first step and to {gaps.max():.1e} at the worst one; final pass rates "
        f"{min(finals):.6f} to {max(finals):.6f}."
    )


def table(c: Config, rows: dict) -> str:
    lines = [
        "| updates | variant | final, by rate | best rate | less token, two-sided "
        "| mean of run | less token, two-sided | clipped | ratio deviation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for updates in c.updates:
        for variant in c.variants:
            get = functools.partial(of_seeds, c, rows, variant, updates)
            finals = [f"{get(r, 'final').mean():.4f}" for r in rates(c, updates)]
            best = best_rate(c, rows, variant, updates)
            cells = [str(updates), variant, ", ".join(finals), f"{best:g}"]
            for field in ("final", "mean"):
                if field == "mean":
                    cells.append(f"{get(best, field).mean():.4f}")
                gain = less_base(c, rows, variant, updates, field)
                cells.append(interval_text(gain, 4, "+"))
            cells += [f"{get(best, x).mean():.4f}" for x in ("clipped", "deviation")]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Best rates are picked on the seeds that are reported."]
    lines += ["Main effects on the final pass rate, best against best:"]
    for updates in c.updates if c.variants == NAMES else ():
        lines += main_effects(c, rows, updates)
    lines += ["", on_policy_check(c, rows)]
    return "\n".join(lines) + "\n"


def plot(c: Config, rows: dict) -> None:
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(
        len(c.updates), 4, figsize=(16, 3.6 * len(c.updates)), layout="constrained"
    )
    axes = np.atleast_2d(axes)
    for updates, (final, gap, clipped, deviation) in zip(c.updates, axes, strict=True):
        swept = rates(c, updates)
        for i, variant in enumerate(c.variants):
            style = dict(color=f"C{i}", lw=1.2, marker=".", label=variant)
            for axis, field in (
                (final, "final"), (clipped, "clipped"), (deviation, "deviation")
            ):  # fmt: skip
                values = np.array(
                    [of_seeds(c, rows, variant, updates, r, field) for r in swept]
                )
                axis.plot(swept, values.mean(1), **style)
                axis.plot(swept, values, ".", color=f"C{i}", alpha=0.35)
            difference, half = t_interval(less_base(c, rows, variant, updates, "final"))
            gap.errorbar(difference, i, xerr=half, fmt="o", color=f"C{i}", capsize=3)
        what = f"{updates} updates a rollout"
        final.set(title=f"Final held-out pass rate, {what}")
        names = dict(yticks=range(len(c.variants)), yticklabels=c.variants)
        gap.set(title=f"Final, best rates, less {BASE}", **names)
        gap.axvline(0, color="k", lw=1)
        gap.invert_yaxis()
        clipped.set(title="Tokens clipped, last update")
        deviation.set(title="Mean |ratio - 1|, last update")
        for axis in (final, clipped, deviation):
            ticks = dict(xticks=swept, xticklabels=[f"{r:g}" for r in swept])
            axis.set(xscale="log", xlabel="learning rate", **ticks)
            axis.minorticks_off()
        final.legend(loc="best", frameon=False, fontsize=8)
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
    figure.savefig(c.results / "plot.png", dpi=110)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(
            variants=(BASE, NAMES[3]),
            seeds=c.seeds[:1],
            updates=(4,),
            learning_rates=(3e-4,),
        )
        c = dataclasses.replace(c, **few, steps=3, evaluate_every=3)
    check_only_ratios_differ(c)
    if not c.plot_only:
        write_config(c.results, c)
    rows = rows_of(c)
    write_table(c.results, table(c, rows))
    plot(c, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
