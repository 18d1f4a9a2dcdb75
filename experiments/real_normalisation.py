"""Does dividing by the std beat not doing so, on a real model at its best rate?

Paper: Ge et al. 2026, arXiv:2601.23135, section 4.4 (GSM8K, 1.5B, LoRA, no seeds
told): hard questions .85 with std against .78 without at step 300, .03 apart at the
end; easy ones .95 against .92, then .02 apart.
Claim: std (weight 1 / sigma) learns faster than none (weight 1), hard prompts most. By
theory 1 / sigma^2, which ascends log-odds, is ahead of both on orthogonal prompts.

    python experiments/real_normalisation.py [--group-sizes 16] [--rules none std]
        [--model DIR] [--smoke] [--long] [--plot-only]

Setting: SmolLM2-135M-Instruct (real_model.py), LoRA of rank 16, Adam without clip or
KL; task ladder, ten skills of short answers (at most 8 tokens) that the model solves
from nearly always (word) to seldom (remainder); 40 trained prompts, the same for all
(task.seed 0). 10 steps of 64 completions: 4 prompts at G = 16, 16 at G = 4.
Learning rates 1e-4, 3e-4, 6e-4: for each rule and G the one of the highest mean reward
in the second half of a run of seed 10; reported on seeds 0 to 2 (order of prompts,
samples, LoRA's start). Pass rates: 16 samples of every trained prompt and of 40
held-out ones, with the same random numbers after every run, others before training.
Hard and easy: thirds by 16 further samples before training. Paired: a rule's run less
none's of the same seed, +- 95 %, t over seeds; prompts are not resampled, so this is
about these 80 prompts. Policies of the middle and the end stay in the runs'
directories, for `--checkpoints` of real_orthogonality.py and real_curvature.py.
Hardware and time: one core of 2, shared. A step of 4 x 16 takes 11 s (sampling 3,
update 8), one of 16 x 4 about 25 (8 x 4: 15); a start 20 to 35 s, an evaluation about a
minute. G = 16: 9 tuning runs of 2.5 minutes and 9 of 3.5; G = 4: 9 of 5 and 9 of 6;
together 2.5 hours (--smoke: a minute). A row a run: what is there is not made again.

Expected: less than three seeds can tell. At G = 16 the std of an untied group goes from
.242 to .5, so the rules' weights differ by factors of 2 and 4 at most, less a common
one that Adam removes. At G = 4 it is .433 or .5: the three rules are nearly one, and
differences there say how large chance is.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import interval_text, paired_gain, write_config, write_table
from real_runs import (
    PARTS,
    RESULTS,
    RULES,
    START,
    THIRDS,
    RunsConfig,
    Setting,
    best_rate,
    chosen_runs,
    rows_of,
    setting_of,
    sized,
    start_row,
    thirds,
    trained_run,
    tuned,
)

from grpo_jax.runs.paths import use_compile_cache

COLOURS = dict(zip(RULES, ("#c0562f", "#2f5d8a", "#4a8a4a"), strict=True))


@dataclasses.dataclass(frozen=True)
class Config(RunsConfig):
    output: Path = RESULTS / "real_normalisation"  # table and plot
    group_sizes: tuple[int, ...] = (16, 4)  # runs are made in this order
    rules: tuple[str, ...] = tuple(RULES)  # none first: the others are paired with it


# ---- what came out: figures [seeds] of the runs that are there


BySeed = dict[int, dict[str, float]]  # seed -> FIGURES by name


def figures(s: Setting) -> dict[tuple[int, str], BySeed]:
    """(group size, rule) -> figures of its runs at the rate that is the best so far.

    Gains of pass rates by part and third, and the mean reward of the steps.
    """
    start, first = (rows_of(s, kind="start", draw=draw) for draw in (START, THIRDS))
    if not (start and first):
        return {}
    masks = {part: thirds(np.array(first[0][part])) for part in PARTS}
    found: dict[tuple[int, str], BySeed] = {}
    for row in chosen_runs(s):
        values = {"reward": float(np.mean(row["rewards"]))}
        for part in PARTS:
            gain = np.array(row[part]) - np.array(start[0][part])
            for name, mask in masks[part].items():
                values[f"{part} {name}"] = float(gain[mask].mean())
        found.setdefault((row["group_size"], row["rule"]), {})[row["seed"]] = values
    return found


FIGURES = (
    "train all", "train hard", "train easy", "heldout all", "heldout hard",
    "heldout easy", "reward",
)  # fmt: skip
WORDS = {"train": "trained", "heldout": "held-out", "reward": "reward, mean of run"}


def words(figure: str) -> str:
    part, _, third = figure.partition(" ")
    return f"{WORDS[part]}{'' if third in ('', 'all') else f', {third} third'}"


def paired(runs: BySeed, base: BySeed, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A figure of both rules, each [seeds], over the seeds that both have."""
    seeds = [seed for seed in runs if seed in base]
    rule, other = (np.array([x[seed][name] for seed in seeds]) for x in (runs, base))
    return rule, other


def pairs(s: Setting) -> dict[tuple[int, str], dict[str, tuple]]:
    """(group size, rule) -> figure -> `paired` with none, where there is a pair."""
    found = figures(s)
    compared = {}
    for (g, rule), runs in found.items():
        base = found.get((g, "none"), {})
        if rule != "none" and runs.keys() & base.keys():
            compared[g, rule] = {name: paired(runs, base, name) for name in FIGURES}
    return compared


def table(s: Setting) -> str:
    """Markdown of gains, of differences, and of what these leave open."""
    head = [f"| G | rule | seeds | {' | '.join(map(words, FIGURES))} |"]
    head += ["|" + "---|" * (3 + len(FIGURES))]
    lines = [*start_lines(s), "", *rate_lines(s), ""]
    lines += ["Pass rate after less before training, and the mean reward of all steps;"]
    lines += ["mean ± 95 % over seeds:", "", *head]
    for (g, rule), runs in figures(s).items():
        cells = [text([run[name] for run in runs.values()]) for name in FIGURES]
        lines.append(f"| {g} | {rule} | {len(runs)} | {' | '.join(cells)} |")
    lines += ["", "The same less none's of the same seed:", "", *head]
    said = []
    for (g, rule), gaps in pairs(s).items():
        cells = [text(x - y, "+") for x, y in gaps.values()]
        lines.append(
            f"| {g} | {rule} | {len(gaps['reward'][0])} | {' | '.join(cells)} |"
        )
        said += [sentence(g, rule, name, *pair) for name, pair in gaps.items()]
    said += [f"Of {len(said)} comparisons, one in 20 is named by chance alone."]
    return "\n".join([*lines, "", *said, ""])


def start_lines(s: Setting) -> list[str]:
    """How pass rates are spread before training."""
    start, first = (rows_of(s, kind="start", draw=draw) for draw in (START, THIRDS))
    lines = []
    for part in PARTS if start and first else ():
        rates = np.array(start[0][part])
        masks = thirds(np.array(first[0][part]))
        means = [rates[mask].mean() for mask in masks.values()]
        inside = 100 * ((rates > 0) & (rates < 1)).mean()
        lines.append("Before training, {}: {:.2f}; hard third {:.2f}, easy {:.2f}; ")
        lines[-1] = lines[-1].format(WORDS[part], *means)
        lines[-1] += f"{inside:.0f} % of prompts between 0 and 1."
    return lines


def rate_lines(s: Setting) -> list[str]:
    """Rewards of the tuning runs, by rate."""
    rates = sorted({rate for by_rate in tuned(s).values() for rate in by_rate})
    lines = ["Reward of tuning runs, second half of their steps, by rate:", ""]
    lines += [f"| G | rule | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines += ["|---|---" + "|---" * len(rates) + "|"]
    for (g, rule), by_rate in tuned(s).items():
        means = [f"{by_rate[x]:.3f}" if x in by_rate else "-" for x in rates]
        lines.append(f"| {g} | {rule} | {' | '.join(means)} |")
    return lines


def text(values: Sequence[float] | np.ndarray, sign: str = "") -> str:
    """Mean and interval over seeds; of one seed the value alone."""
    if len(values) < 2:
        return f"{values[0]:{sign}.3f} (one seed)" if len(values) else "-"
    return interval_text(np.asarray(values), 3, sign)


def sentence(g: int, rule: str, name: str, x: np.ndarray, base: np.ndarray) -> str:
    """What a paired difference says, or what it cannot; x, base [seeds]."""
    head = f"* G = {g}, {words(name)}: {rule} less none "
    if len(x) < 2:
        return head + "has no interval yet."
    mean, half = paired_gain(x, base)
    if abs(mean) > half:
        return head + f"is {mean:+.3f} ± {half:.3f}: {'more' if mean > 0 else 'less'}."
    return head + f"is {mean:+.3f} ± {half:.3f}: cannot be told from 0."


def plot(c: Config, s: Setting) -> None:
    """Rewards by step, and paired differences, for each G."""
    plt.switch_backend("Agg")
    compared, runs = pairs(s), chosen_runs(s)
    sizes = [g for g in c.group_sizes if any(row["group_size"] == g for row in runs)]
    size = dict(figsize=(12, 4 * max(1, len(sizes))), layout="constrained")
    figure, axes = plt.subplots(max(1, len(sizes)), 2, squeeze=False, **size)
    for (left, right), g in zip(axes, sizes, strict=False):
        for j, rule in enumerate(RULES):
            here = [x for x in runs if (x["group_size"], x["rule"]) == (g, rule)]
            if here:
                curves = np.array([row["rewards"] for row in here])
                steps = np.arange(1, curves.shape[1] + 1)
                left.plot(steps, curves.T, color=COLOURS[rule], alpha=0.25, lw=1)
                label = f"{rule}, {here[0]['rate']:g}"
                left.plot(steps, curves.mean(0), color=COLOURS[rule], label=label)
            for i, pair in enumerate(compared.get((g, rule), {}).values()):
                gaps, x = pair[0] - pair[1], i + 0.2 * (j - 1.5)
                right.plot([x] * len(gaps), gaps, ".", color=COLOURS[rule], alpha=0.4)
                if len(gaps) > 1:
                    mean, half = paired_gain(*pair)
                    right.errorbar(x, mean, half, fmt="o", color=COLOURS[rule])
        left.set(title=f"G = {g}: reward of a step's samples", xlabel="step")
        left.legend(loc="best", frameon=False)
        right.axhline(0, color="k", lw=0.8)
        right.set(title=f"G = {g}: less none's, 95 % over seeds (dots: seeds)")
        labels = [words(name).replace(", ", ",\n") for name in FIGURES]
        right.set_xticks(range(len(FIGURES)), labels, fontsize=7)
        for axis in (left, right):
            axis.grid(alpha=0.3)
    figure.savefig(c.output / "plot.png", dpi=100)
    plt.close(figure)


def main(c: Config) -> None:
    c = sized(c)
    s = setting_of(c)
    if not c.plot_only:
        use_compile_cache()
        # The config's paths are of this machine alone.
        write_config(c.output, c, output=None, runs=None, rows=None, model=None)
        for draw in (THIRDS, START):
            start_row(s, draw)
        for g in c.group_sizes:
            rates = {rule: best_rate(s, rule, g) for rule in c.rules}
            for seed in c.seeds:
                for rule, rate in rates.items():
                    trained_run(s, rule, rate, g, seed)
    write_table(c.output, table(s))
    plot(c, s)


if __name__ == "__main__":
    main(tyro.cli(Config))
