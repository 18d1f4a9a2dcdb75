"""Three phases of training, and std-normalised against not, from one start.

Paper: Ge et al. 2026, arXiv:2601.23135, Table 3 and section 4.4 (GSM8K, 1.5B, LoRA):
cosines between prompts' gradients at steps 0, 260, 500 of mean .000, .039, .056, std
.045, .066, .130, below .1 in size 97.7, 80.3, 52.4 %.
Claim: a run goes from near-orthogonal (I) through a transition (II) to widely spread
cosines (III); normalisation gains most in II, on hard prompts, less in III.

    python experiments/three_phases.py [--task gsm8k-expressions --task-path
        DIR_OF_GSM8K --prompts 32] [--smoke] [--plot-only]

Setting: the default model (100k parameters), 120 steps of 16 (expressions: 32) prompts
x 16 samples, Adam, no KL; prompt weights std or unit, all else equal, seeds 0 to 4, one
warm start a seed for both. Learning rates 3e-4, 6e-4, 1.2e-3, the best by the mean
trained pass rate on another seed: 6e-4 for both methods on both tasks. The instrument
measures 64 probe prompts x 32 samples every 10 steps, with exact figures beside. Easy
and hard: thirds of the probe prompts at step 0. +- 95 %, t over seeds, paired.
Hardware and time: 2 CPU cores, about 20 minutes a task (--smoke: 1 minute).

Expected: Table 3's drift; a gain of std on hard prompts in the middle.
Got (2026-11-21): no three phases on either task; normalisation gains where gradients
are near-orthogonal, and nothing on the shared skill.
* chains: exact std .133 +- .032 at step 0, then .099, .097, .096 +- .02 (steps 40, 80,
  120), |cos| < .1 62.8 +- 14.3, then 81, 81, 82 %, mean .090 +- .040, then .020: the
  reverse of the paper's drift, and over by step 10. Labels II or III throughout (I at
  5 of 65 probes). C is below 1 all along, and predicts nothing of what follows:
* std less none, pass rate: trained +.003 +- .006 (mean of run), held-out +.001 +- .007,
  easy +.004 +- .005, hard +.007 +- .007; at the end +.001 +- .020 trained. A tie.
* expressions: near-orthogonal from first to last: exact std .054, .058, .056, .052 +-
  .01, |cos| < .1 94, 93, 92, 94 %, mean .002 to .004; half of all pairs hurt each
  other, a little. Labels I, II, III at 31, 23, 11 of 65 probes: the estimates move
  about the thresholds, the exact figures do not.
* std less none there: trained +.024 +- .006 (mean of run), +.028 +- .016 (end), with
  rates from one tuning seed and a grid of three, which the intervals leave out; hard
  thirds of the probe set +.030 +- .039, easy +.002 +- .020: where the gain sits is not
  resolved. Held-out -.003 +- .003: facts.
* Labels and estimates are of before a label had to be sure (estimator_coverage.py).
* The estimates (32 samples) follow the exact figures: std .111, .139, .145, .120 on
  chains, where late pairs count unequally, .063, .059, .052, .058 on expressions.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import interval_text, write_config, write_rows, write_table

import grpo_jax as gj
from grpo_jax.diagnostics.phases import PHASES, THRESHOLDS
from grpo_jax.intervals import t_interval
from grpo_jax.records import overlaid
from grpo_jax.runs.config_files import differences, from_dict, to_dict
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.recorded import run_config

METHODS = {"std": {"name": "std"}, "none": {"name": "unit"}}  # prompt weights
NUMBERS = ("small_fraction", "std_cosine", "mean_cosine", "mean_sigma")
# Table 3 of the paper, at steps 0, 260 and 500 of its run.
PAPER = "mean .000 .039 .056 | std .045 .066 .130 | |cos| < .1: 97.7 80.3 52.4 %"


@dataclasses.dataclass(frozen=True)
class Config:
    task: str = "chains"  # any task that `grpo-jax train` knows
    task_path: str | None = None  # its data, where it reads any
    results: Path = Path("results/three_phases")  # a directory of the task's in it
    smoke: bool = False  # a tiny model, 2 + 2 runs of 4 steps
    plot_only: bool = False  # redraw from runs.jsonl
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seed: int = 10  # on which each method's learning rate is chosen
    learning_rates: tuple[float, ...] = (3e-4, 6e-4, 1.2e-3)
    steps: int = 120
    prompts: int = 16  # per step
    group_size: int = 16
    looks_every: int = 10  # steps between measurements of the instrument
    probe_prompts: int = 64
    probe_group_size: int = 32


def settings_of(c: Config, method: str, rate: float, seed: int, watched: bool) -> dict:
    settings = {
        "task": {"name": c.task, "path": c.task_path},
        # Group mean as baseline, no KL: the weights are the only difference.
        "objective": {"name": "grpo", "kl_coef": 0.0},
        "weights": METHODS[method],
        "sampling": {"prompts": c.prompts, "group_size": c.group_size},
        "optimizer": {"learning_rate": rate},
        "evaluation": {"every": c.looks_every},
        "instrument": {
            "every": c.looks_every if watched else 0,
            "prompts": c.probe_prompts,
            "group_size": c.probe_group_size,
            "max_overhead": 1e6,  # this run is for the measurements
        },
        "steps": c.steps,
        "seed": seed,
    }
    if c.smoke:
        settings["model"] = {"width": 32, "mlp_width": 48, "head_dim": 8}
        settings["warm_start"] = {"max_steps": 60, "noisy_steps": 0}
        if c.task == "gsm8k-expressions":
            del settings["warm_start"]["noisy_steps"]
        settings["task"] |= {"heldout_prompts": 32}
    return settings


def one_run(c: Config, method: str, rate: float, seed: int, watched: bool) -> Path:
    """The run's directory; a finished run of the same settings is kept."""
    kind = "run" if watched else "tuning"
    directory = c.results / c.task / f"{kind}-{method}-lr{rate:g}-seed{seed}"
    settings = settings_of(c, method, rate, seed, watched)
    config = from_dict(gj.TrainConfig, settings | {"run_dir": str(directory)})
    if not (directory / "report.html").exists():
        gj.train(config)
        return directory
    made = run_config(directory)
    # What a setting left open, the run chose.
    if rows := differences(to_dict(made), to_dict(overlaid(made, config))):
        raise SystemExit(
            f"{directory} is a run of other settings ({'; '.join(rows)}); give another "
            "--results."
        )
    return directory


def pass_rates(run: Path, name: str) -> np.ndarray:
    """[evaluations] "train" or "heldout" pass rates of a run."""
    rows = read_lines(run / "metrics.jsonl")
    return np.array(
        [r[f"eval/{name}_pass_rate"] for r in rows if "eval/train_low" in r]
    )


def best_rate(c: Config, method: str) -> float:
    """The learning rate of the highest mean trained pass rate over a tuning run."""
    if len(c.learning_rates) == 1:
        return c.learning_rates[0]
    runs = {r: one_run(c, method, r, c.tuning_seed, False) for r in c.learning_rates}
    return max(runs, key=lambda r: pass_rates(runs[r], "train").mean())


def summarise(c: Config, method: str, rate: float, seed: int) -> dict:
    """A run as lists over its measurements."""
    directory = one_run(c, method, rate, seed, True)
    probes = read_lines(directory / "instrument.jsonl")
    exact = probes[0]["exact"] is not None
    rates = np.array([r["pass_rate" if exact else "group_mean"] for r in probes], float)
    order = np.argsort(rates[0])
    third = len(order) // 3
    row = {"method": method, "rate": rate, "seed": seed, "directory": str(directory)}
    row["step"] = [r["step"] for r in probes]
    row["easy"] = rates[:, order[-third:]].mean(1).tolist()
    row["hard"] = rates[:, order[:third]].mean(1).tolist()
    for name in ("train", "heldout"):
        row[name] = pass_rates(directory, name).tolist()
    for name in (*NUMBERS, "label", "shares"):
        row[name] = [r["phase"][name] for r in probes]
    for name in ("raw_statistics", "chi", "violating_fraction", "m_median", "m_p99"):
        row[name] = [r["geometry"][name] for r in probes]
    row["exact"] = [r["exact"]["statistics"] for r in probes] if exact else None
    row["features"] = [r["features"]["raw"]["mean_abs"] for r in probes]
    return row


def over_seeds(
    rows: dict, method: str, get: Callable[[dict], list]
) -> tuple[np.ndarray, np.ndarray]:
    """(means, half widths of 95 %) over seeds, each [measurements]."""
    values = [[np.nan if x is None else x for x in get(r)] for r in rows[method]]
    pairs = [t_interval(np.array(x)) for x in zip(*values, strict=True)]
    return np.array([m for m, _ in pairs]), np.array([h for _, h in pairs])


def table(c: Config, rows: dict) -> str:
    steps = rows["std"][0]["step"]
    shown = [0, len(steps) // 3, 2 * len(steps) // 3, len(steps) - 1]
    head = " | ".join(f"step {steps[i]}" for i in shown)
    lines = [f"paper: {PAPER}", "", f"| std-normalised run | {head} |"]
    lines += ["|---" * (len(shown) + 1) + "|"]
    series = {name: lambda r, name=name: r[name] for name in NUMBERS}
    raw = {f"raw {x}": lambda r, x=x: [y[x] for y in r["raw_statistics"]]
           for x in ("mean", "std", "small_fraction")}  # fmt: skip
    series |= raw
    if rows["std"][0]["exact"]:
        series |= {f"exact {x}": lambda r, x=x: [y[x] for y in r["exact"]]
                   for x in ("mean", "std", "small_fraction")}  # fmt: skip
    for name in ("chi", "violating_fraction", "m_median", "features"):
        series[name] = lambda r, name=name: r[name]
    for name, get in series.items():
        mean, half = over_seeds(rows, "std", get)
        cells = [f"{mean[i]:.3f} ± {half[i]:.3f}" for i in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    labels = [" ".join(r["label"][i] for r in rows["std"]) for i in shown]
    lines.append("| label, by seed | " + " | ".join(labels) + " |")
    lines += ["", "| std less none, best against best | mean of run | end |"]
    lines += ["|---|---|---|"]
    for name in ("train", "heldout", "easy", "hard"):
        std, none = (
            np.array([r[name] for r in rows[m]]) for m in METHODS
        )  # [seeds, measurements]
        gaps = (std - none)[:, 1:].mean(1), (std - none)[:, -1]
        cells = [interval_text(gap, 3, "+") for gap in gaps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rates = {m: rows[m][0]["rate"] for m in METHODS}
    lines += ["", f"learning rates chosen on seed {c.tuning_seed}: {rates}"]
    return "\n".join(lines) + "\n"


def plot(c: Config, rows: dict, path: Path) -> None:
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    steps = rows["std"][0]["step"]

    def draw(axis, method, get, label, **style):
        mean, half = over_seeds(rows, method, get)
        axis.plot(steps, mean, label=label, **style)
        low, high = np.maximum(mean - half, 0), np.minimum(mean + half, 1)
        axis.fill_between(steps, low, high, alpha=0.15, color=style["color"], lw=0)

    colours = {"std": "#2f5d8a", "none": "#c0562f"}
    for method, colour in colours.items():
        for name, style in (("easy", "-"), ("hard", "--")):
            draw(axes[0, 0], method, lambda r, n=name: r[n], f"{method}, {name}",
                 color=colour, ls=style)  # fmt: skip
        draw(axes[0, 1], method, lambda r: r["heldout"], method, color=colour)
        draw(axes[0, 2], method, lambda r: r["mean_sigma"], method, color=colour)
        draw(axes[1, 0], method, lambda r: r["small_fraction"], method, color=colour)
        draw(axes[1, 1], method, lambda r: r["std_cosine"], method, color=colour)
        if rows[method][0]["exact"]:
            for axis, x in ((axes[1, 0], "small_fraction"), (axes[1, 1], "std")):
                draw(axis, method, lambda r, x=x: [y[x] for y in r["exact"]],
                     f"{method}, exact", color=colour, ls=":")  # fmt: skip
    # A phase that could not be decided, null in every share, leaves a gap at the top.
    shares = [np.array(r["shares"], float) for r in rows["std"]]
    shares = np.nan_to_num(shares).mean(0)
    axes[1, 2].stackplot(
        steps, shares.T, labels=PHASES, colors=("#9dbdd6", "#e6d7a3", "#d9a38c")
    )
    axes[0, 0].set(title="Pass rate, easiest and hardest third", ylim=(0, 1))
    axes[0, 1].set(title="Held-out pass rate", ylim=(0, 1))
    axes[0, 2].set(title="Mean sigma (C < 1 below the line)", ylim=(0, 0.5))
    axes[0, 2].axhline(3 / 8, color="k", lw=0.8)
    axes[1, 0].set(title="Share of |cos| < .1 between prompts' gradients")
    axes[1, 0].axhline(THRESHOLDS.small_fraction, color="k", lw=0.8)
    axes[1, 1].set(title="Std of the cosines")
    axes[1, 1].axhline(THRESHOLDS.std_cosine, color="k", lw=0.8)
    axes[1, 2].set(title="Phase, shares of draws (std)", ylim=(0, 1))
    for axis in axes.ravel():
        axis.set(xlabel="step")
        axis.legend(loc="best", frameon=axis is axes[1, 2], fontsize=7.5)
        axis.grid(alpha=0.25)
    figure.suptitle(f"{c.task}: std-normalised against not, {len(c.seeds)} seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(seeds=(0, 1), learning_rates=(3e-4,), steps=4, looks_every=2)
        c = dataclasses.replace(c, **few, probe_prompts=6, probe_group_size=8)
    directory = c.results / c.task
    if not c.plot_only:
        write_config(directory, c)
        best = {method: best_rate(c, method) for method in METHODS}
        lines = [summarise(c, m, best[m], seed) for m in METHODS for seed in c.seeds]
        write_rows(directory / "metrics.jsonl", lines)
    lines = read_lines(directory / "metrics.jsonl")
    rows = {m: [line for line in lines if line["method"] == m] for m in METHODS}
    write_table(directory, table(c, rows))
    plot(c, rows, directory / "plot.png")


if __name__ == "__main__":
    main(tyro.cli(Config))
