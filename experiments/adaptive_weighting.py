"""Does an adaptive prompt weighting beat the best-tuned REINFORCE and the best GRPO?

Claim (ours, an open lead): weights from what can be measured while training (a
remembered pass rate, interference between prompts, the noise of their gradients) beat
unit weights and 1 / std, each at its best learning rate.

    python experiments/adaptive_weighting.py [--smoke] [--plot-only] [--part task]

Setting: log-linear policies with sampled gradients, 32 prompts with pass rates from
.01 to .5 at the start, 8 of them a step, 150 steps, G = 4 and 16, SGD and Adam; rates
in half octaves, chosen on 12 seeds, reported on 32 others; rules were designed on
yet others. Features: of each prompt alone (orthogonal), half on one shared direction
(aligned), or random in 96 or 48 dimensions (mixed: cosines of either sign). Task: 128
prompts of chains, 16 x 16, 100 steps of Adam without clip; rates 1.6 times apart,
chosen on 2 seeds, reported on 5 others. Metric: mean pass rate over the run. Gain: less
the better (on tuning seeds) of unit and std 1; 95%, t over seeds, paired.
Rules, m the group's mean, p the posterior's over visits: `std k` (m (1-m))^-k/2,
`posterior k` the same of p, `expected 2` and `cautious 2` E[1 / var] and 1 / (E + sd of
var) under the posterior, `noise-aware` 1 / (p (1-p) + measured noise), `interference`
posterior 1 + sqrt((n-1) measured variance of cosines), `group mean` 1 / m (MaxRL's),
`hard` 1 / (m sqrt(1-m)), `hard posterior` the same of p, `hard interference` from
posterior 1 to that by the measured interference.
Hardware and time: one CPU core; log-linear 10 minutes, task 25 and 7 warm starts of 1
(busy machine); --smoke: 1 to 3 minutes, mostly compilation.

Got (2026-11-21): no adaptive rule earns its name. Under mixed interference all of them
beat both bases, on orthogonal and aligned prompts none does. What wins there is more
weight on hard prompts without more on solved ones, and a fixed, published rule without
memory does that: 1 / mean. On the task one rule of eight is ahead of REINFORCE over the
run, by .007 +- .004 (p = .008, .07 after correcting for eight), and none at its end.
Mean over G and optimizer (aligned: all within 1e-4, solved in a step or two):
                     orthogonal        mixed96           mixed48
    unit             -.0033 +- .0017   -.0162 +- .0042   -.0082 +- .0031
    std 1             .0000 +- .0003    .0016 +- .0017   -.0001 +- .0045
    std 1.5           .0014 +- .0012    .0056 +- .0059    .0071 +- .0066
    std 2             .0019 +- .0012    .0113 +- .0051    .0109 +- .0064
    posterior 1      -.0006 +- .0010    .0176 +- .0050    .0127 +- .0058
    posterior 1.5    -.0012 +- .0017    .0241 +- .0054    .0194 +- .0067
    posterior 2      -.0022 +- .0017    .0326 +- .0062    .0236 +- .0079
    expected 2       -.0094 +- .0029    .0292 +- .0072    .0237 +- .0079
    cautious 2       -.0010 +- .0013    .0230 +- .0049    .0150 +- .0061
    noise-aware      -.0001 +- .0013    .0165 +- .0053    .0159 +- .0062
    interference     -.0006 +- .0010    .0238 +- .0046    .0214 +- .0069
    group mean        .0022 +- .0018    .0418 +- .0068    .0341 +- .0085
    hard              .0031 +- .0013    .0333 +- .0050    .0318 +- .0072
    hard posterior   -.0001 +- .0017    .0431 +- .0065    .0302 +- .0082
    hard interf.     -.0006 +- .0010    .0338 +- .0066    .0257 +- .0071
* Memory helps under interference (posterior 2 less std 2: .021 +- .007, .013 +- .007),
  not on orthogonal prompts. It adds nothing to 1 / mean on average: hard posterior less
  group mean -.0024 +- .0017, .0013 +- .0047, -.0040 +- .0071.
* Interference is measured well enough to separate the settings (the others' push over
  a prompt's own: 0, .54 to .59 in mixed96, .76 to .83 in mixed48 at G = 16; half that
  at G = 4) and does set a power from 1 to 1.8. But posterior 2 is no worse where it
  matters (interference less posterior 2: .0016, -.0088, -.0023, half widths .0014,
  .0048, .0048): a power is the wrong knob, it weighs solved prompts up with hard ones.
* The noise-aware step, by theory the best one for the log-odds of a prompt alone, is
  between unit and 1 / sigma^2: about std 1 on orthogonal prompts, behind posterior 2
  elsewhere. The uncertainty of p helps in neither direction.
* Task, less unit at its best rate, 8e-4: mean of run std 1 -.007 +- .012, std 1.5
  .004 +- .015, posterior 1, 1.5, 2 -.007 +- .012, -.010 +- .011, -.018 +- .013, group
  mean .001 +- .015, hard .003 +- .011, hard posterior .007 +- .004 (one of eight, and
  not in the final rate: -.000 +- .024). 2 seeds separate 5e-4 from 8e-4 badly; runs at
  8e-4 have spikes. All at 5e-4, less std 1: unit -.000 +- .004, posterior 1, 1.5, 2
  -.000 +- .003, -.003 +- .002, -.010 +- .006, group mean .008 +- .003, hard .010 +-
  .004, hard posterior .010 +- .006; final rates: none of these above unit's.
  So memory's power harms the task, where it helped the log-linear policies; more weight
  on hard prompts helps a little along the way, less than the choice of a rate does,
  and not at the end.
Limits: no prompt is easy at the start, which suits 1 / mean; 15 rules, no correction
for that; the group mean was added after the others' figures were seen; prompts of one
task, one pool, few seeds. Only gsm8k-expressions (--task, --task-path) has nearly
orthogonal gradients and hard prompts; it was not run.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from adaptive_rules import OURS, RULES, Horizon, train
from common import (
    append_row,
    interval_text,
    once_by_settings,
    temporary_run,
    write_config,
    write_rows,
    write_table,
)
from loglinear_prompts import make_prompts, stacked

from grpo_jax.intervals import t_interval
from grpo_jax.loglinear import LogLinear
from grpo_jax.prompt_weights import WEIGHTS
from grpo_jax.runs.lines import read_lines

BASES = ("unit", "std 1")  # the better one, on tuning seeds, is what a rule must beat


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/adaptive_weighting")  # where the files go
    part: Literal["loglinear", "task", "both"] = "both"
    smoke: bool = False  # one cell, few seeds; two rules for two steps
    plot_only: bool = False  # table and plot from metrics.jsonl
    # ---- log-linear policies
    features: tuple[str, ...] = ("orthogonal", "aligned", "mixed96", "mixed48")
    group_sizes: tuple[int, ...] = (4, 16)
    optimizers: tuple[str, ...] = ("sgd", "adam")
    num_prompts: int = 32  # at the start their pass rates are log-spaced between
    pass_rates: tuple[float, float] = (0.01, 0.5)
    responses: int = 8  # per prompt, the first is right
    block: int = 4  # parameters that a prompt does not share (orthogonal, aligned)
    batch: int = 8  # prompts per step
    steps: int = 150
    log2_sgd: tuple[float, float] = (3.0, 12.0)  # ends of the grid of learning rates
    log2_adam: tuple[float, float] = (-4.0, 3.0)
    log2_spacing: float = 0.5
    first_seed: int = 1000  # rules were designed on lower ones
    tuning_seeds: int = 12  # of the choice of a learning rate
    test_seeds: int = 32  # others, on which it is reported
    prior: float = 0.5  # of the posterior: pseudo-counts
    discount: float = 0.8  # what a visit leaves of older counts
    decay: float = 0.95  # of the running sums of products of gradients
    # ---- the trainer's task
    task: str = "chains"
    task_path: str | None = None  # the data's directory, for gsm8k-expressions
    pool: int = 128  # trained prompts, so that each is visited 12.5 times
    task_steps: int = 100  # of 16 prompts x 16 samples
    # Swept outwards from the middle until the best one has a worse one on either side.
    task_rates: tuple[float, ...] = (2e-4, 3e-4, 5e-4, 8e-4, 1.3e-3, 2e-3)
    task_common_rate: float = 5e-4  # all rules are run at this one too
    task_rules: tuple[str, ...] = (
        "unit", "std 1", "std 1.5", "posterior 1", "posterior 1.5", "posterior 2",
        "group mean", "hard", "hard posterior",
    )  # fmt: skip
    task_tuning_seeds: tuple[int, ...] = (100, 101)
    task_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    warm_start_steps: int | None = None  # None: the task's own


# ---- log-linear policies, sampled gradients


def padded_prompts(c: Config, kind: str, seed: int) -> LogLinear:
    """Prompts with features padded to one width, so that all kinds compile once."""
    sizes = dict(num_prompts=c.num_prompts, responses=c.responses, block=c.block)
    policy = make_prompts(kind, c.pass_rates, seed, **sizes)
    x = policy.features
    width = c.num_prompts * c.block + 1
    x = np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])))
    return policy._replace(features=x)


def loglinear_rows(c: Config) -> Iterator[dict]:
    seeds = c.first_seed + np.arange(c.tuning_seeds + c.test_seeds)
    for kind in c.features:
        policies = stacked([padded_prompts(c, kind, seed) for seed in seeds])
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        tuning, test = (
            jax.tree.map(lambda x, part=part: x[part], (policies, keys))
            for part in (slice(c.tuning_seeds), slice(c.tuning_seeds, None))
        )
        for group, optimizer in itertools.product(c.group_sizes, c.optimizers):
            ends = c.log2_sgd if optimizer == "sgd" else c.log2_adam
            log2 = np.arange(ends[0], ends[1] + 1e-9, c.log2_spacing)
            shape = dict(group=group, batch=c.batch, steps=c.steps)
            horizon = Horizon(c.prior, c.discount, c.decay)
            results = functools.partial(
                train, optimizer=optimizer, horizon=horizon, **shape
            )
            for i, rule in enumerate(RULES):
                swept = results(*tuning, i, jnp.asarray(2.0**log2))
                swept = np.asarray(swept)[..., 0]
                best = int(swept.mean(0).argmax())
                tested = results(*test, i, jnp.asarray(2.0 ** log2[[best]]))
                tested = np.asarray(tested)[:, 0]
                yield {
                    "kind": "loglinear",
                    "features": kind,
                    "group_size": group,
                    "optimizer": optimizer,
                    "rule": rule,
                    "log2_rate": float(log2[best]),
                    "edge": best in (0, len(log2) - 1),
                    "tuning": swept.mean(0).tolist(),
                    "mean": tested[:, 0].tolist(),
                    "final": tested[:, 1].tolist(),
                    "push": float(tested[:, 2].mean()),
                    "noise": float(tested[:, 3].mean()),
                }


# ---- the trainer's tasks


def task_settings(c: Config, rule: str, rate: float, seed: int) -> dict:
    name, _, power = rule.rpartition(" ")  # "std 1.5", or "group mean"
    weights = {"name": rule.replace(" ", "_")}
    if power[:1].isdigit():
        weights = {"name": name, "power": float(power)}
    warm = {"max_steps": c.warm_start_steps, "noisy_steps": 0}
    return {
        "task": {"name": c.task, "path": c.task_path, "train_prompts": c.pool},
        "objective": {"kl_coef": 0.0},
        "weights": weights,
        "warm_start": warm if c.warm_start_steps else {},
        # No clip: it would act on the rules' different norms, which Adam ignores.
        "optimizer": {"learning_rate": rate, "clip_norm": 0.0},
        "steps": c.task_steps,
        "seed": seed,
        "evaluation": {"every": 10, "prompts": c.pool},
        "instrument": {"every": 0},
        "log": {"lines_every": 10**6, "samples_every": 0},
        "checkpoint": {"every": 10**6},
    }


def one_run(settings: dict) -> dict:
    with temporary_run(settings) as directory:
        rows = read_lines(directory / "metrics.jsonl")
    rows = [r for r in rows if "eval/train_pass_rate" in r]
    curve = [r["eval/train_pass_rate"] for r in rows]
    return {
        "mean": float(np.mean(curve[1:])),
        "final": curve[-1],
        "heldout": rows[-1]["eval/heldout_pass_rate"],
        "curve": curve,
    }


def task_run(c: Config, rule: str, rate: float, seed: int) -> dict:
    """The run's row of metrics.jsonl; the run is made where it is missing."""
    settings = task_settings(c, rule, rate, seed)
    # The rows name no path of this machine.
    kept = settings | {"task": settings["task"] | {"path": None}}
    labels = {"kind": "task", "rule": rule, "rate": rate, "seed": seed}
    train = functools.partial(one_run, settings)
    return once_by_settings(c.results / "metrics.jsonl", labels, kept, train)


def task_sweep(c: Config, rule: str) -> dict[float, float]:
    """Mean pass rate over the tuning seeds' runs, by learning rate.

    Starts in the middle and goes on until the best rate has a worse one on either side.
    """
    rates, means = c.task_rates, {}
    missing = {(len(rates) - 1) // 2, len(rates) // 2}
    while missing:
        for i in missing:
            runs = [task_run(c, rule, rates[i], s)["mean"] for s in c.task_tuning_seeds]
            means[i] = float(np.mean(runs))
        best = max(means, key=means.__getitem__)
        missing = {i for i in (best - 1, best + 1) if 0 <= i < len(rates)} - {*means}
    return {rates[i]: means[i] for i in sorted(means)}


def run_task(c: Config) -> None:
    WEIGHTS.update(OURS)
    best = {}
    for rule in c.task_rules:
        sweep = task_sweep(c, rule)
        best[rule] = max(sweep, key=sweep.__getitem__)
    for seed, rule in itertools.product(c.task_seeds, c.task_rules):
        for rate in {best[rule], c.task_common_rate}:
            task_run(c, rule, rate, seed)


# ---- what came out: gains over the better of BASES, on seeds that chose nothing


def gains(values: dict, tuned: dict) -> dict[str, np.ndarray]:
    """rule -> gains [seeds] over the base that is better on the tuning seeds."""
    base = max(BASES, key=tuned.__getitem__)
    return {rule: np.array(x) - values[base] for rule, x in values.items()}


def loglinear_gains(rows: list[dict]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """features -> "G = 4, sgd" -> rule -> gains [seeds]."""
    cells, out = {}, {}
    for row in rows:
        if row["kind"] == "loglinear":
            cell = row["features"], f"G = {row['group_size']}, {row['optimizer']}"
            cells.setdefault(cell, {})[row["rule"]] = row
    for (kind, rest), by_rule in cells.items():
        values = {rule: np.array(row["mean"]) for rule, row in by_rule.items()}
        tuned = {rule: max(row["tuning"]) for rule, row in by_rule.items()}
        out.setdefault(kind, {})[rest] = gains(values, tuned)
    return out


def task_summary(c: Config, rows: list[dict]) -> dict[str, dict]:
    """rule -> results of its runs at the best rate; {} before both bases are done."""
    runs, out = {}, {}
    for row in rows:
        if row["kind"] == "task" and row["settings"]["task"]["name"] == c.task:
            runs[row["rule"], row["rate"], row["seed"]] = row

    def over_seeds(rule, rate, seeds, field):
        if any((rule, rate, seed) not in runs for seed in seeds):
            return None
        return np.array([runs[rule, rate, seed][field] for seed in seeds])

    for rule in c.task_rules:
        sweep = {}
        for rate in c.task_rates:
            means = over_seeds(rule, rate, c.task_tuning_seeds, "mean")
            if means is not None:
                sweep[rate] = float(means.mean())
        best = max(sweep, key=sweep.__getitem__, default=None)
        if best and over_seeds(rule, best, c.task_seeds, "mean") is not None:
            fields = ("mean", "final", "heldout", "curve")
            out[rule] = {x: over_seeds(rule, best, c.task_seeds, x) for x in fields}
            out[rule] |= {"sweep": sweep, "tuned": sweep[best]}
            for field in ("mean", "final"):
                common = over_seeds(rule, c.task_common_rate, c.task_seeds, field)
                out[rule][f"{field} at {c.task_common_rate:g}"] = common
    return out if {*BASES} <= {*out} else {}


def task_gains(c: Config, summary: dict) -> dict[str, dict[str, np.ndarray]]:
    """field of the runs -> rule -> gains [seeds]."""
    tuned = {rule: x["tuned"] for rule, x in summary.items()}
    out = {}
    for field in ("mean", "final"):
        out[field] = gains({rule: x[field] for rule, x in summary.items()}, tuned)
    tuned = {r: x["sweep"].get(c.task_common_rate, 0) for r, x in summary.items()}
    for field in (f"{field} at {c.task_common_rate:g}" for field in ("mean", "final")):
        if all(x[field] is not None for x in summary.values()):
            out[field] = gains({r: x[field] for r, x in summary.items()}, tuned)
    return out


def markdown(columns: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Table of t intervals, a line per rule."""
    lines = [
        "",
        "| rule | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for rule in dict.fromkeys(rule for column in columns.values() for rule in column):
        shown = [
            interval_text(x[rule], 4, "+") if rule in x else ""
            for x in columns.values()
        ]
        lines.append(f"| {rule} | " + " | ".join(shown) + " |")
    return lines if columns else []


def table(c: Config, rows: list[dict]) -> str:
    by_features, summary = loglinear_gains(rows), task_summary(c, rows)
    columns = {
        kind: {rule: np.mean([x[rule] for x in cells.values()], 0) for rule in RULES}
        for kind, cells in by_features.items()
    }
    lines = ["Mean pass rate over the run, less the better of unit and std 1."]
    lines += markdown(columns)
    for kind, cells in by_features.items():
        lines += markdown({f"{kind}, {cell}": x for cell, x in cells.items()})
    edges = [
        f"{r['features']} {r['group_size']} {r['optimizer']} {r['rule']}"
        for r in rows
        if r["kind"] == "loglinear" and r["edge"]
    ]
    lines += ["", "Best rate at an end of the grid: " + (", ".join(edges) or "none")]
    lines += [
        "",
        f"Task {c.task}:",
        *markdown(task_gains(c, summary) if summary else {}),
        "",
    ]
    for rule, x in summary.items():
        sweep = ", ".join(f"{rate:g} {v:.4f}" for rate, v in x["sweep"].items())
        means = [
            f"{field} {x[field].mean():.4f}" for field in ("mean", "final", "heldout")
        ]
        lines.append(f"* {rule}: tuning {sweep}; {', '.join(means)}")
    return "\n".join(lines) + "\n"


def plot(c: Config, rows: list[dict]) -> None:
    plt.switch_backend("Agg")
    summary = task_summary(c, rows)
    panels = loglinear_gains(rows) | (
        {c.task: task_gains(c, summary)} if summary else {}
    )
    count = len(panels) + bool(summary)
    width, height = min(3, count), -(-count // 3)
    figure, axes = plt.subplots(
        height, width, figsize=(5 * width, 5.5 * height), layout="constrained"
    )
    axes = np.atleast_1d(axes).ravel()[:count]
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for j, (label, gain) in enumerate(series.items()):
            mean, half = np.transpose([t_interval(x) for x in gain.values()])
            y = np.arange(len(mean)) + 0.17 * (j - (len(series) - 1) / 2)
            axis.errorbar(mean, y, xerr=half, fmt=".", lw=1, capsize=2, label=label)
        axis.set(title=title, xlabel="gain over the better of unit, std 1")
        axis.set(xlim=(-0.045, 0.075))
        axis.set(yticks=range(len(gain)), yticklabels=list(gain))
        axis.axvline(0, color="k", lw=0.8)
        axis.invert_yaxis()
    if summary:
        for rule, x in summary.items():
            steps = np.linspace(0, c.task_steps, x["curve"].shape[1])
            axes[-1].plot(steps, x["curve"].mean(0), lw=1.2, label=rule)
        axes[-1].set(title=f"{c.task}: pass rate, best rates", xlabel="step")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(loc="best", frameon=False, fontsize=8)
    figure.savefig(c.results / "plot.png", dpi=110)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(features=("mixed48",), group_sizes=(4,), optimizers=("sgd",))
        few |= dict(steps=30, log2_sgd=(4.0, 6.0), tuning_seeds=2, test_seeds=3)
        few |= dict(pool=16, task_steps=2, task_rates=(5e-4,), warm_start_steps=30)
        few |= dict(task_rules=(*BASES, "hard posterior"), task_seeds=(1, 2))
        c = dataclasses.replace(c, **few, task_tuning_seeds=(0,))
    path = c.results / "metrics.jsonl"
    if not c.plot_only:
        write_config(c.results, c, task_path=None)
    if c.part != "task" and not c.plot_only:
        kept = [row for row in read_lines(path) if row["kind"] != "loglinear"]
        write_rows(path, kept)
        for row in loglinear_rows(c):
            append_row(path, row)
    if c.part != "loglinear" and not c.plot_only:
        run_task(c)
    rows = read_lines(path)
    write_table(c.results, table(c, rows))
    plot(c, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
