"""Dr. GRPO's two biases: answers that grow when wrong, and weights of easy and hard.

Paper: Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO), Sec. 3 and its figure of lengths.
Claim: (a) a per-sequence token mean gives each token of a long wrong answer a smaller
penalty, so wrong answers grow; a constant length does not. (b) Dividing by the std
gives the prompts that are nearly always or nearly never solved more of the gradient.

    python experiments/normalization_bias.py [--smoke] [--plot-only]

Setting: KL off, one update a rollout, 60 rollouts of 16 prompts x 16 samples, Adam
3e-4, up to 24 tokens, where right answers have 2 to 8 with EOS. `chains` is the default
task, 3 seeds, {token mean, constant} x {std, no std}. `restated` is chains with
scratchpads that say some values twice, right if the last value is: right and wrong
answers of many lengths; 5 seeds, no std. Excess length: tokens beyond the plain answer.
Growth: its mean over the last 15 rollouts less that over the first 15. Intervals: 95 %,
t over seeds, differences paired by seed; bands and bars of the plot: all seeds.
Hardware and time: one CPU core, about 15 minutes, half of it the warm starts of
restated (cached afterwards); --smoke: chains alone, about a minute of compilation.

Expected: (a) growth under grpo, none under dr_grpo. (b) A prompt's std follows w_G(p),
the expectation over groups of 16, so that its weight against no std's rises from 2.1 at
p = .5 to 4.1 at most (1 / sqrt(p (1 - p)) has no bound).
Got (2026-11-21): (b) as claimed; (a) does not show on the default task.
* (a) chains: the prompt tells the length and the warm start teaches it; wrong answers
  are .007 to .019 tokens too long, mean over a run. Growth in tokens: .025 +- .027
  (grpo), .038 +- .009 (grpo without std), .042 +- .012 (dr_grpo with std), .030 +- .020
  (dr_grpo); token mean less constant -.017 +- .021 with std, .008 +- .014 without.
  Lengths hardly vary, so the bias has nothing to act on.
* (a) restated, 5 seeds: wrong answers start 2.3 tokens too long and shrink under both,
  by 1.39 +- .51 (token mean) and 1.72 +- .88 (constant), right ones by .87 and .99. The
  difference, .33 +- .54, has the claimed sign in four seeds of five, and its interval
  includes 0. Held-out pass rate (sampled): constant .030 +- .025 higher. Wrong answers
  are the longer ones at the start (right ones 1.6 too long): both learn to be brief.
* (b) 1,330 groups of chains by exact p: mean std against w_G(p), chi2 18.1 of 12 bins.
  Weight 2.1 at p = .42 and .58, 2.8 at .85, 3.3 at .93, 3.8 at .96; 1 / sqrt(p (1 - p))
  would be 2.0, 2.0, 2.8, 3.8, 5.4: at G = 16 the weight stops growing early.
* (b) Share of the advantage mass of groups with 1, 2, 14 or 15 of 16 right: 29.8 % by
  grpo, where it would be 21.3 % without std; 23.0 % by dr_grpo, with std 31.9 %. Most
  of it is of easy prompts (25 % against 5 %). No difference in what is learnt:
  without std less with, held-out, .002 +- .008 (token mean).
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax.numpy as jnp
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
from grpo_jax.runs.lines import read_lines

# Aggregation and std are all that differs; KL off.
VARIANTS = {
    "grpo": {"name": "grpo", "kl_coef": 0.0},
    "grpo without std": {"name": "grpo", "kl_coef": 0.0, "scale": "none"},
    "dr_grpo with std": {"name": "dr_grpo", "scale": "std"},
    "dr_grpo": {"name": "dr_grpo"},
}
# (per-sequence token mean, constant length) pairs that agree on the std.
PAIRS = (("grpo", "dr_grpo with std"), ("grpo without std", "dr_grpo"))


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/normalization_bias")  # where the files go
    smoke: bool = False  # one seed, one task, two variants, six steps
    plot_only: bool = False  # redraw from metrics.jsonl
    tasks: tuple[str, ...] = ("chains", "restated")  # chains, and restated or not
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)  # of warm start, order of prompts and sampling
    restated_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # each has its own warm start
    steps: int = 60  # rollouts, one update each
    group_size: int = 16
    learning_rate: float = 3e-4  # one for all: Adam hides what scales every gradient
    max_new_tokens: int = 24  # answers have 2 to 8 with EOS, restated ones up to 16
    restate: float = 0.5  # share of values said twice in the restated warm start
    window: int = 15  # steps at the start and at the end that lengths are compared over
    probe_every: int = 10  # steps between probes of the exact pass rates, chains only
    probes: int = 64  # prompts of a probe


def restated_chains(c: Config) -> gj.Task:
    """Chains of free length: a completion is right if its last value is.

    Its warm start ends on scratchpads that say some values twice, so that right and
    wrong completions of a prompt have many lengths, which chains does not.
    """
    chains = gj.load_task("chains", seed=0)
    learn = chains.warm_start

    def demonstrations(rng, count, spoiled):
        examples = learn.demonstrations(rng, count, spoiled)
        if not spoiled:
            return examples
        return [gj.Example(e.prompt, said_twice(e.answer, rng)) for e in examples]

    def said_twice(answer, rng):
        values = answer.split(",")
        times = 1 + (rng.random(len(values)) < c.restate)
        return ",".join(np.repeat(values, times))

    def last_value(example, completion):
        return float(completion.split(",")[-1] == example.answer.split(",")[-1])

    longest = gj.Example(learn.longest.prompt, ",".join("0" * 8))
    return dataclasses.replace(
        chains,
        name=f"restated-{c.restate:g}",
        reward=last_value,
        single_answer=False,
        warm_start=dataclasses.replace(
            learn, demonstrations=demonstrations, longest=longest
        ),
    )


def settings_of(c: Config, task: str, variant: str, seed: int) -> dict:
    probe = c.probe_every if task == "chains" else 0
    return {
        "objective": VARIANTS[variant],
        "sampling": {"max_new_tokens": c.max_new_tokens, "group_size": c.group_size},
        "optimizer": {"learning_rate": c.learning_rate},
        "steps": c.steps,
        "seed": seed,
        "evaluation": {"every": 0},
        "instrument": {"every": probe, "prompts": c.probes},
        "log": {"lines_every": 10**6, "samples_every": 1, "samples_prompts": 16},
        "checkpoint": {"every": 10**6},
    }


def task_settings(c: Config, task: str) -> dict:
    """What a run depends on besides the settings of the trainer."""
    return {} if task == "chains" else {"restate": c.restate}


def variants_of(c: Config, task: str) -> tuple[str, ...]:
    """On restated, which is about lengths only, the two without std."""
    return c.variants if task == "chains" else PAIRS[1]


def seeds_of(c: Config, task: str) -> tuple[int, ...]:
    return c.seeds if task == "chains" else c.restated_seeds


def planned(c: Config) -> Iterator[tuple[str, str, int]]:
    """(task, variant, seed) of every run."""
    for task in c.tasks:
        for seed in seeds_of(c, task):
            for variant in variants_of(c, task):
                yield task, variant, seed


def one_run(c: Config, task: str, settings: dict) -> dict:
    """Per step: lengths of right and wrong completions; per group: how many right."""
    own_task = None if task == "chains" else restated_chains(c)
    with temporary_run(settings, own_task) as directory:
        groups = read_lines(directory / "samples.jsonl")
        probes = read_lines(directory / "instrument.jsonl")
        heldout = read_lines(directory / "metrics.jsonl")[-1]
    # Sums over a step's completions: [steps, (wrong, right)] count, excess, cut off.
    sums = np.zeros((c.steps, 2, 3))
    solved = np.zeros((c.steps, c.group_size + 1), int)  # groups with so many right
    for group in groups:
        step, plain = group["step"] - 1, len(group["answer"])
        solved[step, round(sum(group["rewards"]))] += 1
        for text, reward in zip(group["completions"], group["rewards"], strict=True):
            length = min(len(text), c.max_new_tokens)  # a token may show as a word
            cut = length == c.max_new_tokens  # no room was left for EOS
            excess = length - plain - cut  # tokens beyond the plain answer and EOS
            sums[step, int(reward)] += (1, excess, cut)
    return {
        "heldout": heldout["eval/heldout_pass_rate"],
        "completions": sums.tolist(),
        "groups": solved.tolist(),
        "probed": [[x["pass_rate"], x["group_std"]] for x in probes],
    }


def rows_of(c: Config) -> dict[tuple, dict]:
    """(task, variant, seed) -> row of metrics.jsonl; runs what is missing."""
    rows = {}
    for run in planned(c):
        settings = settings_of(c, *run)
        labels = dict(zip(("task", "variant", "seed"), run, strict=True))
        train = None if c.plot_only else partial(one_run, c, run[0], settings)
        path, kept = c.results / "metrics.jsonl", settings | task_settings(c, run[0])
        rows[run] = once_by_settings(path, labels, kept, train)
    return rows


def excess(row: dict, right: int, steps: slice) -> float:
    """Mean tokens beyond the plain answer, of wrong (right=0) or right completions."""
    count, total, _ = np.array(row["completions"])[steps, right].sum(0)
    return total / count if count else np.nan


def growth(c: Config, row: dict, right: int) -> float:
    """Growth of the excess length: at the end less at the start of the run."""
    end, start = slice(c.steps - c.window, None), slice(c.window)
    return excess(row, right, end) - excess(row, right, start)


def advantage_mass(c: Config, std: bool) -> np.ndarray:
    """Mean |A| [G + 1] of a group with k right: 2 q (1 - q), over the std if `std`."""
    q = np.arange(c.group_size + 1) / c.group_size
    return 2 * np.sqrt(q * (1 - q)) if std else 2 * q * (1 - q)


def bins(c: Config) -> list[tuple[str, slice]]:
    """(label, counts) of groups with few, some, about half, most, nearly all right.

    Tied groups, whose advantages are 0, are left out.
    """
    eighth, g = max(1, c.group_size // 8), c.group_size
    edges = (1, 1 + eighth, 1 + 3 * eighth, g - 3 * eighth, g - eighth, g)
    names = (f"{a}-{b - 1}" for a, b in zip(edges, edges[1:], strict=False))
    return list(zip(names, map(slice, edges, edges[1:]), strict=False))


def shares(c: Config, row: dict) -> np.ndarray:
    """Shares [2, bins] of a run's advantage mass: without std, and with it."""
    groups = np.array(row["groups"]).sum(0)
    mass = np.stack([groups * advantage_mass(c, std) for std in (False, True)])
    binned = np.stack([mass[:, part].sum(1) for _, part in bins(c)], 1)
    return binned / binned.sum(1, keepdims=True)


def probed(c: Config, rows: dict) -> dict[str, np.ndarray]:
    """Means over bins of the exact pass rate: std of the probes' groups, and w_G.

    From the runs of one variant: the others sample with the same keys, so their groups
    are not independent ones.
    """
    probes = [x for s in c.seeds for x in rows["chains", c.variants[-1], s]["probed"]]
    p, std = np.array(probes).transpose(1, 0, 2).reshape(2, -1)
    law = np.asarray(gj.expected_group_std(jnp.asarray(p), c.group_size))
    # Of the std of G Bernoulli rewards: their mean square is (1 - 1/G) p (1 - p).
    variance = (1 - 1 / c.group_size) * p * (1 - p) - law**2
    edges = [0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.995]
    place = np.digitize(p, edges)
    every = [place == i for i in range(1, len(edges)) if (place == i).any()]
    means = ("p", p), ("variance", p * (1 - p)), ("std", std), ("law", law)
    columns = {name: np.array([x[part].mean() for part in every]) for name, x in means}
    counts = np.array([part.sum() for part in every])
    errors = [variance[part].sum() ** 0.5 for part in every] / counts
    return columns | {"se": errors, "count": counts}


def length_lines(c: Config, rows: dict) -> list[str]:
    """Table of pass rates and excess lengths, by task and variant."""
    lines = [
        "| task | variant | held-out | less the first's | wrong: start | end | growth "
        "| right: growth | wrong cut off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in c.tasks:
        first = None
        for variant in variants_of(c, task):
            runs = [rows[task, variant, seed] for seed in seeds_of(c, task)]
            heldout = np.array([row["heldout"] for row in runs])
            first = heldout if first is None else first
            start = [excess(row, 0, slice(c.window)) for row in runs]
            end = [excess(row, 0, slice(c.steps - c.window, None)) for row in runs]
            wrong = np.sum([row["completions"] for row in runs], (0, 1))[0]
            cells = (
                task, variant, f"{heldout.mean():.4f}",
                interval_text(heldout - first, 4, "+"),
                f"{np.mean(start):+.3f}", f"{np.mean(end):+.3f}",
                interval_text([growth(c, row, 0) for row in runs], 3, "+"),
                interval_text([growth(c, row, 1) for row in runs], 3, "+"),
                f"{wrong[2] / wrong[0]:.3%}",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def growth_lines(c: Config, rows: dict) -> list[str]:
    lines = ["Growth under a per-sequence token mean less that under a constant:"]
    for task in c.tasks:
        for a, b in PAIRS:
            if {a, b} <= set(variants_of(c, task)):
                growths = [
                    [growth(c, rows[task, v, s], i) for s in seeds_of(c, task)]
                    for v in (a, b)
                    for i in (0, 1)
                ]
                gaps = np.subtract(growths[:2], growths[2:])
                wrong, right = (interval_text(gap, 3, "+") for gap in gaps)
                lines.append(
                    f"* {task}, {a} less {b}: wrong {wrong}, right {right} tokens"
                )
    return lines


def share_lines(c: Config, rows: dict) -> list[str]:
    names = ", ".join(name for name, _ in bins(c))
    lines = [f"Share of the advantage mass by right samples a group ({names}):"]
    for task in c.tasks:
        for variant in variants_of(c, task):
            runs = [rows[task, variant, seed] for seed in seeds_of(c, task)]
            means = np.mean([shares(c, row) for row in runs], 0)
            none, std = (", ".join(f"{x:.1%}" for x in part) for part in means)
            lines.append(f"* {task}, {variant}: {none} without std; {std} with std")
    return lines


def weight_lines(c: Config, rows: dict) -> list[str]:
    """Table of the groups' std against w_G(p), by exact pass rate."""
    columns = probed(c, rows)
    weights = columns["std"] / (columns["variance"] * (1 - 1 / c.group_size))
    lines = ["| exact p | groups | their std | w_G(p) | weight | 1 / std(p) |"]
    lines += ["|---|---|---|---|---|---|"]
    for i, p in enumerate(columns["p"]):
        count, std, se, law = (columns[x][i] for x in ("count", "std", "se", "law"))
        lines.append(
            f"| {p:.3f} | {count} | {std:.3f} ± {2 * se:.3f} | {law:.3f} "
            f"| {weights[i]:.2f} | {(p * (1 - p)) ** -0.5:.2f} |"
        )
    chi2 = (((columns["std"] - columns["law"]) / columns["se"]) ** 2).sum()
    text = f"Groups' std against w_G(p): chi2 {chi2:.1f} of {len(weights)} bins."
    return [*lines, "", text]


def table(c: Config, rows: dict) -> str:
    parts = length_lines, growth_lines, share_lines, weight_lines
    return "\n\n".join("\n".join(part(c, rows)) for part in parts) + "\n"


def plot_lengths(c: Config, rows: dict, axis, task: str, right: int) -> None:
    """Draws mean and range over seeds of the excess length along the run."""
    width = max(1, c.steps // 12)
    parts = [slice(i, i + width) for i in range(0, c.steps - width + 1, width)]
    middles = [part.start + (width + 1) / 2 for part in parts]
    for variant in variants_of(c, task) if task in c.tasks else ():
        color = f"C{list(VARIANTS).index(variant)}"
        lines = np.array([
            [excess(rows[task, variant, s], right, part) for part in parts]
            for s in seeds_of(c, task)
        ])  # fmt: skip
        low, high = lines.min(0), lines.max(0)
        axis.plot(middles, lines.mean(0), ".-", color=color, label=variant)
        axis.fill_between(middles, low, high, color=color, alpha=0.15, lw=0)
    kind = ("wrong", "right")[right]
    axis.set(title=f"{task}: excess length of {kind} completions, tokens")
    axis.set(xlabel="rollouts")


def plot_weights(c: Config, rows: dict, std, weight) -> None:
    """Draws the groups' std and the weight that follows from it against w_G."""
    columns, grid = probed(c, rows), np.linspace(0.003, 0.997, 400)
    law = np.asarray(gj.expected_group_std(jnp.asarray(grid), c.group_size))
    spread, less = np.sqrt(grid * (1 - grid)), (c.group_size - 1) / c.group_size
    p, bar = columns["p"], 2 * columns["se"]
    std.plot(grid, spread, "k--", lw=1, label="sqrt(p (1 - p))")
    std.plot(grid, law, "k-", lw=1, label=f"w_G(p), G = {c.group_size}")
    std.errorbar(p, columns["std"], bar, fmt="C3.", label="groups")
    std.set(title="Mean std of a group, chains", xlabel="exact pass rate p")
    weight.plot(grid, 1 / spread, "k--", lw=1, label="1 / sqrt(p (1 - p))")
    weight.plot(grid, law / spread**2 / less, "k-", lw=1, label="w_G(p), finite G")
    scale = 1 / (columns["variance"] * less)
    weight.errorbar(p, columns["std"] * scale, bar * scale, fmt="C3.", label="groups")
    weight.set(title="A prompt's weight, with std / without", ylim=(0, 8))
    weight.set(xlabel="exact pass rate p")


def plot_mass(c: Config, rows: dict, axis) -> None:
    """Draws each variant's shares of the advantage mass on chains."""
    names = [name for name, _ in bins(c)]
    for i, variant in enumerate(c.variants):
        both = np.array([shares(c, rows["chains", variant, s]) for s in c.seeds])
        used = both[:, int(variant in ("grpo", "dr_grpo with std"))]
        at = np.arange(len(names)) + 0.2 * (i - 1.5)
        low, high = used.mean(0) - used.min(0), used.max(0) - used.mean(0)
        axis.bar(at, used.mean(0), 0.18, yerr=(low, high), color=f"C{i}", label=variant)
    axis.set(xticks=range(len(names)), xticklabels=names)
    axis.set(title="Share of the advantage mass, chains")
    axis.set(xlabel=f"right samples of {c.group_size}")


def plot(c: Config, rows: dict) -> None:
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    plain, wrong, right, std, weight, mass = axes.ravel()
    plot_lengths(c, rows, plain, "chains", 0)
    plot_lengths(c, rows, wrong, "restated", 0)
    plot_lengths(c, rows, right, "restated", 1)
    plot_weights(c, rows, std, weight)
    plot_mass(c, rows, mass)
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            place = "upper center" if axis is weight else "best"
            axis.legend(frameon=False, fontsize=8, loc=place)
    figure.savefig(c.results / "plot.png", dpi=110)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(tasks=("chains",), variants=("grpo without std", "dr_grpo"))
        short = dict(seeds=c.seeds[:1], steps=6, window=2, probe_every=6)
        c = dataclasses.replace(c, **few, **short)
    if "chains" not in c.tasks:
        raise ValueError(f"tasks must have chains, got {c.tasks}; add it.")
    if not c.plot_only:
        write_config(c.results, c)
    rows = rows_of(c)
    write_table(c.results, table(c, rows))
    plot(c, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
