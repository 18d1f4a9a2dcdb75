"""Are a pretrained model's prompt gradients orthogonal, and what becomes of it?

Paper: Ge et al. 2026, arXiv:2601.23135, Assumption 2 and Table 3 (GSM8K, 1.5B, LoRA,
100 probe questions): cosines of mean .000, .039, .056, std .045, .066, .130, below .1
in size 97.7, 80.3, 52.4 % at steps 0, 260, 500. Its section 4.1: sentence features have
a mean |cos| of .088, which is why gradients should be orthogonal.
Claim: gradients of different prompts are nearly orthogonal at the start, and drift.

    python experiments/real_orthogonality.py [--checkpoints RUN ...] [--model DIR]
        [--smoke] [--plot-only]

Setting: SmolLM2-135M-Instruct (real_model.py), task ladder. 20 prompts of one skill
(boxes: one product in a word problem), and a mix of 5 of these and 5 of each of four
others (even or odd, last word, two words repeated, largest number); drawn by seed (0 to
2), and kept where between an eighth and seven eighths of 16 first samples are right:
what is measured is on other samples. Gradients of all 134.5 M parameters ("full") and
of LoRA factors of rank 16 ("lora"), at the start and at the middle and end of each run
of `--checkpoints` (`grpo-jax train --pretrained`); the prompts stay. Both of one
function: factors are merged, or new ones added. G = 32 samples in 4 parts of 8, and at
the start with seed 0 as many others, and both together as G = 64; at most 14 tokens.
Gradients are hashed to 16,384 sums, checked on three of them.
Debiased mean and std, with intervals over prompts and samples; raw ones; what noise
alone gives: raw cosines between differences of parts. Pairs within a skill and across
skills apart, by a jackknife over prompts that is wider than need be. Features: last
hidden states, mean over the tokens of the answers or of the question, raw and less
their mean over prompts.
Hardware and time (estimated from one prompt): one CPU core, a prompt at G = 32 takes 13
s full, 8 s LoRA, 3 s of sampling; the start of one seed 16 minutes and 5 for choosing
(with the second draw 32), middle and end of a run 32 minutes. --smoke: a minute.

Expected: the paper says near-orthogonal at the start. A first look (7 probes) said .78
for one-digit sums: aligned within a skill, less so across skills.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import interval_text, once_by_settings, write_config, write_table
from real_cosines import FEATURES, SETS, figures
from real_gradients import Probed, hash_errors
from real_probes import (
    RESULTS,
    SMOKE,
    Checkpoint,
    ProbeConfig,
    Setting,
    all_checkpoints,
    measured,
    probe_groups,
    probes_of,
    setting_of,
)
from three_phases import PAPER

from grpo_jax.runs.lines import read_lines, without_nan
from grpo_jax.runs.paths import use_compile_cache


@dataclasses.dataclass(frozen=True)
class Config(ProbeConfig):
    output: Path = RESULTS / "real_orthogonality"  # rows, table and plot
    kinds: tuple[str, ...] = ("lora", "full")  # what gradients are of
    twice: tuple[int, ...] = (0,)  # seeds with twice as many samples at the start
    hashes: tuple[int, ...] = (2**10, 2**12, 2**14, 2**16)  # sums, compared once


# ---- rows


def measure_checkpoint(s: Setting, c: Config, at: Checkpoint, params: str) -> None:
    """Writes the rows of a checkpoint; at the start two draws, and both together, of
    the seeds in `twice`."""
    labels = {"kind": "cosines", "run": at.run, "step": at.step, "when": at.when}
    labels |= {"seed": at.seed, "params": params}
    twice = at.when == "start" and at.seed in c.twice
    for draws in ((0,), (1,), (0, 1)) if twice else ((0,),):

        def run(draws: tuple[int, ...] = draws) -> dict[str, Any]:
            print(f"{at.run} step {at.step}, {params}, draw {draws}", flush=True)
            x = group_of(s, at, params, draws)
            found = figures(c, x, skills_of(s, at.seed))
            return without_nan(found | {"seconds": round(float(x.seconds.sum()))})

        size = {"group_size": c.group_size * len(draws), "draws": draws}
        once_by_settings(s.rows, labels | size, s.identity, run)


def skills_of(s: Setting, seed: int) -> list[str]:
    """[P] skills of the probe prompts."""
    return [probe["skill"] for probe in probes_of(s, seed)]


def group_of(s: Setting, at: Checkpoint, params: str, draws: Sequence[int]) -> Probed:
    """Measurements of the draws' samples together, in parts of 8."""
    found = [measured(s, at, params, draw) for draw in draws]
    joined = {
        name: np.concatenate([getattr(x, name) for x in found], 1)
        for name in ("rewards", "vectors")
    }
    features = {n: np.mean([getattr(x, n) for x in found], 0) for n in FEATURES}
    return found[0]._replace(**joined, **features)


def pool_seeds(s: Setting, c: Config, params: str) -> None:
    """Writes the row of the start's prompts of the config's seeds together: they are
    under one policy, with the same new factors."""

    def run() -> dict[str, Any]:
        found, skills = [], []
        for seed in c.seeds:
            at = Checkpoint("pretrained", 0, "start", seed, s.start)
            found.append(group_of(s, at, params, (0,)))
            skills += skills_of(s, seed)
        names = [n for n in Probed._fields if n not in Probed._field_defaults]
        joined = {n: np.concatenate([getattr(x, n) for x in found]) for n in names}
        every = dataclasses.replace(c, each=c.each * len(c.seeds))
        row = figures(every, Probed(**joined), skills)
        return without_nan(row | {"cosines": None})

    labels = {"kind": "pooled", "run": "pretrained", "step": 0, "when": "start"}
    labels |= {"params": params, "group_size": c.group_size, "seeds": c.seeds}
    once_by_settings(s.rows, labels, s.identity, run)


def check_hash(s: Setting, c: Config) -> None:
    """Writes exact and hashed cosines of three prompts' gradients of all parameters."""

    def run() -> dict[str, Any]:
        print("cosines of three gradients, exact and hashed", flush=True)
        at = Checkpoint("pretrained", 0, "start", c.seeds[0], s.start)
        groups = probe_groups(s, at)
        some = [0, 1, len(groups.prompts) - 1]
        return hash_errors(s.start(), jax.tree.map(lambda x: x[some], groups), c.hashes)

    once_by_settings(s.rows, {"kind": "hash"}, s.identity, run)


# ---- table and plot


def told(rows: Sequence[dict], name: str, field: str) -> np.ndarray:
    """[seeds] a set's figure, or mean over a seed's draws, where noise leaves one."""
    seeds: dict[int, list[float]] = {}
    for row in rows:
        value = row["sets"][name][field]
        value = value[0] if isinstance(value, list) else value
        if value is not None:
            seeds.setdefault(row["seed"], []).append(value)
    return np.array([np.mean(x) for x in seeds.values()])


def text(values: np.ndarray) -> str:
    """Mean, with 95 % over seeds where there are two or more; values [seeds]."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if len(values) else "-"
    return interval_text(values, 3)


def keys_of(rows: Sequence[dict]) -> list[tuple[str, str, int]]:
    """(when, params, G) of the rows, each once."""
    return [*dict.fromkeys((r["when"], r["params"], r["group_size"]) for r in rows)]


def rows_at(rows: Sequence[dict], when: str, params: str, g: int) -> list[dict]:
    return [
        r
        for r in rows
        if (r["when"], r["params"], r["group_size"]) == (when, params, g)
    ]


def table(rows: Sequence[dict]) -> str:
    """Markdown of all rows."""
    lines = ["Cosines by checkpoint: debiased, mean ± 95 % (t over seeds).", ""]
    lines += ["| when | of | G | pairs | prompts | mean | std | its own half width |"]
    lines[-1] += " raw mean | raw std | noise alone (std) | raw > 0 | labels |"
    lines += ["|" + "---|" * 13]
    cells = [r for r in rows if r["kind"] == "cosines"]
    for key in keys_of(cells):
        some = rows_at(cells, *key)
        head = "| {} | {} | {} ".format(*key)
        lines += [f"{head}| {SETS[name]} {line(some, name)}" for name in SETS]
    lines += ["", "At the start, prompts of a seed or of some together, with intervals"]
    lines += ["over prompts and samples, and bounds on the share of |cos| < .1:", ""]
    lines += ["| of | G | pairs | seeds | prompts | mean | std | below .1 | raw mean |"]
    lines[-1] += " raw std | raw, below .1 |"
    lines += ["|" + "---|" * 11]
    pooled = [row for row in rows if row["kind"] == "pooled"]
    lines += [pooled_line(row, name) for row in pooled for name in SETS]
    lines += ["", *skill_lines(cells), "", *feature_lines(cells), ""]
    lines += [*hash_lines(rows), "", f"The paper's Table 3, three steps: {PAPER}", ""]
    return "\n".join(lines)


def average(values: Sequence[float | None]) -> float:
    """Mean of the values that are there."""
    found = [x for x in values if x is not None]
    return float(np.mean(found)) if found else np.nan


def line(rows: Sequence[dict], name: str) -> str:
    """The cells of one set of prompts, from the rows of one checkpoint and G."""
    sets = [row["sets"][name] for row in rows]
    half = average(
        [(x["std"][2] - x["std"][1]) / 2 for x in sets if x["std"][1] is not None]
    )
    raw = [average([x["raw"][n] for x in sets]) for n in ("mean", "std")]
    null = average([x["null"]["std"] for x in sets])
    positive = average([x["raw"]["positive_fraction"] for x in sets])
    prompts = "/".join(str(x.get("prompts", "")) for x in sets)
    labels = " ".join(x.get("label", "") for x in sets)
    return (
        f"| {prompts} | {text(told(rows, name, 'mean'))} "
        f"| {text(told(rows, name, 'std'))} | {half:.3f} | {raw[0]:.3f} "
        f"| {raw[1]:.3f} | {null:.3f} | {100 * positive:.0f}% | {labels} |"
    )


def pooled_line(row: dict, name: str) -> str:
    x = row["sets"][name]
    mean, std = (
        "-" if x[n][1] is None else "{:.3f} [{:.3f}, {:.3f}]".format(*x[n])
        for n in ("mean", "std")
    )
    small = [100 * y for y in x.get("small", []) if y is not None]
    share = "{:.0f} to {:.0f}%".format(*small) if len(small) == 2 else ""
    raw = [average([x["raw"][n]]) for n in ("mean", "std", "small_fraction")]
    return (
        f"| {row['params']} | {row['group_size']} | {SETS[name]} "
        f"| {', '.join(map(str, row['seeds']))} "
        f"| {x.get('prompts', '')} | {mean} | {std} | {share} | {raw[0]:.3f} "
        f"| {raw[1]:.3f} | {100 * raw[2]:.0f}% |"
    )


def skill_lines(rows: Sequence[dict]) -> list[str]:
    """Mean cosine within each skill of the mix, debiased, mean over seeds."""
    skills = dict.fromkeys(skill for row in rows for skill in row["skills"])
    lines = [
        "Mean cosine within a skill of the mix, debiased; in brackets the std:",
        "",
    ]
    lines += [
        f"| when | of | G | {' | '.join(skills)} |",
        "|" + "---|" * (3 + len(skills)),
    ]
    for when, params, g in keys_of(rows):
        some = rows_at(rows, when, params, g)
        cells = [
            [
                average([row["skills"][skill][n] for row in some])
                for n in ("mean", "std")
            ]
            for skill in skills
        ]
        numbers = " | ".join(f"{mean:.2f} ({std:.2f})" for mean, std in cells)
        lines.append(f"| {when} | {params} | {g} | {numbers} |")
    return lines


def feature_lines(rows: Sequence[dict]) -> list[str]:
    """Cosines of hidden states by checkpoint: mean and std, mean over seeds."""
    lines = ["Cosines of features, mean / std / share below .1 in size:", ""]
    lines += ["| when | pairs | answers | centred | questions | centred |"]
    lines += ["|" + "---|" * 6]
    for when in dict.fromkeys(row["when"] for row in rows):
        some = [row for row in rows if row["when"] == when]
        for name in SETS:
            cells = []
            for feature in FEATURES:
                for kind in ("features", "centred"):
                    found = [r["sets"][name][kind][feature] for r in some]
                    numbers = [
                        average([x[n] for x in found])
                        for n in ("mean", "std", "small_fraction")
                    ]
                    cells.append(" / ".join(f"{x:.3f}" for x in numbers))
            lines.append(f"| {when} | {SETS[name]} | {' | '.join(cells)} |")
    return lines


def hash_lines(rows: Sequence[dict]) -> list[str]:
    """Exact cosines of three gradients, and how far hashed ones are from them."""
    for row in rows:
        if row["kind"] == "hash":
            exact = np.array(row["exact"])
            errors = {
                k: np.sqrt(np.mean((np.array(x) - exact) ** 2))
                for k, x in row["hashed"].items()
            }
            return [
                f"Exact cosines of three gradients {row['exact']}; root mean square",
                "error of hashed ones by sums: "
                + ", ".join(f"{k}: {x:.4f}" for k, x in errors.items())
                + ".",
            ]
    return []


def plot(c: Config, rows: Sequence[dict]) -> None:
    """Mean and std over the checkpoints, and raw cosines at the start."""
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    cells = [
        r for r in rows if r["kind"] == "cosines" and r["group_size"] == c.group_size
    ]
    order = [
        x for x in ("start", "middle", "end") if any(r["when"] == x for r in cells)
    ]
    for axis, field in zip(axes[:2], ("mean", "std"), strict=True):
        for j, name in enumerate(("one", "within", "across")):
            for params, style in zip(c.kinds, ("-", "--"), strict=False):
                here = [[r for r in cells if (r["when"], r["params"]) == (w, params)]
                        for w in order]  # fmt: skip
                values = [told(some, name, field) for some in here]
                y = [x.mean() if len(x) else np.nan for x in values]
                words = f"{SETS[name]}, {params}"
                axis.plot(order, y, style, color=f"C{j}", marker="o", label=words)
                for i, x in enumerate(values):
                    axis.plot([i] * len(x), x, ".", color=f"C{j}", alpha=0.4)
        paper = {"mean": [0.0, 0.039, 0.056], "std": [0.045, 0.066, 0.130]}[field]
        axis.plot(order, paper[: len(order)], "k:", label="paper, Table 3")
        axis.set(title=f"{field} of cosines, debiased, G = {c.group_size}")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="best", frameon=False, fontsize=7)
    for params in c.kinds:
        raw = [r["cosines"] for r in cells
               if r["when"] == "start" and r["params"] == params]  # fmt: skip
        found = np.array([x for row in raw for x in row if x is not None], float)
        axes[2].hist(found, 40, histtype="step", density=True, label=params)
    axes[2].set(title="Raw cosines at the start, all pairs of probes", xlabel="cosine")
    axes[2].legend(loc="best", frameon=False)
    figure.savefig(c.output / "plot.png", dpi=100)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        small = SMOKE | {"hashes": (64, 2**14)}
        c = dataclasses.replace(c, **small)
    if not c.plot_only:
        use_compile_cache()
        s = setting_of(c)
        names = [path.name for path in c.checkpoints]  # paths are of this machine alone
        write_config(c.output, c, output=None, runs=None, model=None, checkpoints=names)
        for at in all_checkpoints(s):
            for params in c.kinds:
                measure_checkpoint(s, c, at, params)
        for params in c.kinds:
            pool_seeds(s, c, params)
        check_hash(s, c)
    rows = read_lines(c.output / "metrics.jsonl")
    write_table(c.output, table(rows))
    plot(c, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
