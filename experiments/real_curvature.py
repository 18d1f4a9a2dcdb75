"""Does sigma^2 of a prompt's reward predict its curvature in a pretrained model?

Paper: Ge et al. 2026, arXiv:2601.23135, Table 1: Pearson of a prompt's curvature, by a
Fisher proxy, with sigma^2: .342 at the same iteration, -.028 at another one.
Claim: |curvature| follows sigma^2 at the same step and not at others, which is why
dividing by the std at every step is an adaptive step size.

    python experiments/real_curvature.py [--checkpoints RUN ...] [--model DIR]
        [--smoke] [--plot-only]

Setting: model, task and runs of real_orthogonality.py; probe prompts of a seed: 4 of
each of six skills, kept where between an eighth and seven eighths of 16 first samples
are right, the same at every step. Curvature is along each prompt's own gradient, of one
half of its G = 32 samples, measured on the other half, mean of both ways (unbiased
given the directions); beside it the paper's proxy G |g_L|^2, g_L the mean of the
sampled scores. Of LoRA factors (rank 16), or of all parameters with --params full.
sigma^2 is that of the measured samples ("own") and of 32 others ("other"): with the own
samples the correlation is partly made by noise, as tied halves measure 0 of both, and
left out for that reason. All |.|; Spearman and Pearson over prompts of one step.
Controls: "shuffled" gives each prompt the curvature / sigma^2 of another one: what the
factor sigma^2, an identity, gives alone; "permuted" gives it another one's curvature: 0
but for chance. Intervals: 95 %, bootstrap over prompts within a seed, mean over seeds
and steps.
Hardware and time (estimated from one prompt): one CPU core, 22 s a prompt (LoRA; 37 s
full), so 9 minutes a policy; with the start of three seeds and two policies of three
runs 80 minutes. --smoke: half a minute.

Implied by theory: H_x = sigma^2 (E[W | right] - E[W | wrong]), W = (grad^2 pi) / pi.
Expected: correlations at the same step about as large as shuffled ones, smaller at
other steps; the proxy not necessarily alike: it need not vanish with sigma^2.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import once_by_settings, write_config, write_table
from real_probes import (
    OTHER,
    RESULTS,
    SMOKE,
    Checkpoint,
    ProbeConfig,
    Setting,
    all_checkpoints,
    measured,
    probe_groups,
    setting_of,
)
from scipy import stats

from grpo_jax.instrument.rows import finite_mean
from grpo_jax.runs.lines import read_lines, without_nan
from grpo_jax.runs.paths import use_compile_cache

PAPER = "same iteration .342, another one -.028 (Pearson, Fisher proxy)"
KINDS = {"curvature": "along own gradient", "fisher": "Fisher proxy"}
SIGMAS = ("own", "other")


@dataclasses.dataclass(frozen=True)
class Config(ProbeConfig):
    output: Path = RESULTS / "real_curvature"  # rows, table and plot
    params: str = "lora"  # "full": curvature of all parameters
    others: tuple[str, ...] = ("buy", "even", "last", "copy", "largest")
    prompts: int = 4  # of the first skill
    each: int = 4  # of each other one
    resamples: int = 2000  # of the bootstrap


def measure_checkpoint(s: Setting, c: Config, at: Checkpoint) -> dict[str, Any]:
    """The row of a checkpoint: figures of its probe prompts, lists over them."""

    def run() -> dict[str, Any]:
        print(f"{at.run} step {at.step}, {c.params}", flush=True)
        x = measured(s, at, c.params, curvature=True)
        others = probe_groups(s, at, OTHER)
        figures = {
            "curvature": x.curvature,
            "halves": x.halves,
            "slope": x.slope,
            "fisher": x.fisher,
            "own": x.rewards.mean(1),
            "other": others.scored_rewards.mean(1),
        }
        row = {n: [float(f"{v:.5g}") for v in y] for n, y in figures.items()}
        return without_nan(row | {"seconds": round(float(x.seconds.sum()))})

    labels = {"kind": "curvature", "run": at.run, "step": at.step, "when": at.when}
    labels |= {"seed": at.seed, "params": c.params, "group_size": c.group_size}
    return once_by_settings(s.rows, labels, s.identity, run)


# ---- correlations


def load(rows: Sequence[dict], params: str) -> dict[str, list[dict[str, np.ndarray]]]:
    """Series of checkpoints of the same prompts: figures [P] by name, in order of
    steps; the start belongs to every run of its seed."""
    rows = [r for r in rows if r["kind"] == "curvature" and r["params"] == params]
    starts = {r["seed"]: r for r in rows if r["when"] == "start"}
    runs = dict.fromkeys(r["run"] for r in rows if r["when"] != "start")
    series = {}
    for run in runs:
        later = sorted((r for r in rows if r["run"] == run), key=lambda r: r["step"])
        start = starts.get(later[0]["seed"])
        series[run] = [_figures(r) for r in [start, *later] if r is not None]
    covered = {r["seed"] for r in rows if r["when"] != "start"}
    for seed in starts.keys() - covered:
        series[f"start, seed {seed}"] = [_figures(starts[seed])]
    return series


def _figures(row: dict) -> dict[str, np.ndarray]:
    """[P] |curvature|, NaN where a half is tied, and sigma^2 of both draws."""
    x = {n: np.array(row[n], float) for n in ("curvature", "fisher", "own", "other")}
    unbiased = row["group_size"] / (row["group_size"] - 1)
    x |= {n: x[n] * (1 - x[n]) * unbiased for n in SIGMAS}
    x["signed"], x["rate"] = x["curvature"], np.array(row["own"], float)
    both = np.array(row["halves"]) == 2
    x["curvature"] = np.where(both, np.abs(x["curvature"]), np.nan)
    x["signed"] = np.where(both, x["signed"], np.nan)
    x["fisher"] = np.where(x["own"] > 0, x["fisher"], np.nan)
    return x


def correlation(x: np.ndarray, y: np.ndarray, method: str) -> float:
    """Over the finite pairs of [P]; NaN below five, or where one side is constant."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    if method == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y)
    return float(np.corrcoef(x, y)[0, 1])


def figure(
    steps: Sequence[dict[str, np.ndarray]],
    kind: str,
    sigma: str,
    which: str,
    method: str,
    rng: np.random.Generator,
) -> float:
    """Mean over a series' steps of one correlation.

    which: "same" step, "other" steps, "shuffled" or "permuted" as in the header.
    """
    found = []
    if which == "other":
        for i, j in itertools.permutations(range(len(steps)), 2):
            found.append(correlation(steps[i][sigma], steps[j][kind], method))
    for x in steps if which != "other" else ():
        curvature = x[kind]
        if which != "same":
            used = np.flatnonzero(np.isfinite(curvature) & (x["own"] > 0))
            other = rng.permutation(used)
            curvature = np.full(len(curvature), np.nan)
            scale = x["own"] if which == "shuffled" else np.ones(len(curvature))
            curvature[used] = scale[used] * x[kind][other] / scale[other]
        found.append(correlation(x[sigma], curvature, method))
    return float(finite_mean(np.array(found), 0))


def interval(
    c: Config, series: Sequence[Sequence[dict]], *what: str
) -> tuple[float, float, float]:
    """(estimate, low, high) of `figure`, mean over series; 95 %, bootstrap of prompts.

    Prompts of a series are drawn anew, the same at all of its steps. Controls, which
    are random, are means of 20.
    """
    random = what[2] in ("shuffled", "permuted")

    def mean(rng: np.random.Generator, resample: bool) -> float:
        found = []
        for steps in series:
            count = len(steps[0]["own"])
            i = rng.integers(count, size=count) if resample else np.arange(count)
            drawn = [{n: x[i] for n, x in step.items()} for step in steps]
            found.append(figure(drawn, *what, rng))
        return float(finite_mean(np.array(found), 0))

    rng = np.random.default_rng(0)
    estimates = [mean(rng, False) for _ in range(20 if random else 1)]
    drawn = [mean(rng, True) for _ in range(c.resamples)]
    if not np.isfinite(drawn).any():
        return float(np.mean(estimates)), np.nan, np.nan
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(np.mean(estimates)), float(low), float(high)


# ---- table and plot


def table(c: Config, series: dict[str, list[dict]]) -> str:
    """Markdown of the correlations over all series."""
    every = [*series.values()]
    lines = [f"Correlations of |curvature| ({c.params}) with sigma^2 over prompts, of"]
    lines += [f"{len(every)} series of prompts, {sum(map(len, every))} policies:", ""]
    lines += ["| curvature | sigma^2 of | method | same step | shuffled | permuted |"]
    lines[-1] += " other step |"
    lines += ["|" + "---|" * 7]
    for kind, sigma, method in itertools.product(
        KINDS, SIGMAS, ("spearman", "pearson")
    ):
        cells = [
            _text(*interval(c, every, kind, sigma, which, method))
            for which in ("same", "shuffled", "permuted", "other")
        ]
        words = f"| {KINDS[kind]} | {sigma} samples | {method}"
        lines.append(f"{words} | {' | '.join(cells)} |")
    lines += ["", "Over all policies of a series, by pass rate of the samples:", ""]
    lines += ["| pass rate | prompts | curvature > 0 | median of curvature / sigma^2 |"]
    lines += ["|---|---|---|---|"]
    joined = [x for steps in every for x in steps]
    rate, own, signed = (
        np.concatenate([x[n] for x in joined]) for n in ("rate", "own", "signed")
    )
    for low, high in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)):
        used = np.isfinite(signed) & (rate > low) & (rate <= high)
        if used.any():
            ratio = np.median(signed[used] / own[used])
            share = 100 * (signed[used] > 0).mean()
            lines += [f"| {low:.2f}-{high:.2f} | {used.sum()} | {share:.0f}% "]
            lines[-1] += f"| {ratio:.3g} |"
    return "\n".join([*lines, "", f"The paper's Table 1: {PAPER}.", ""])


def _text(estimate: float, low: float, high: float) -> str:
    if not np.isfinite(estimate):
        return "-"
    return f"{estimate:.2f} [{low:.2f}, {high:.2f}]"


def plot(c: Config, series: dict[str, list[dict]]) -> None:
    """Curvature and the proxy against sigma^2 of other samples, colours by step."""
    plt.switch_backend("Agg")
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    words = ("start", "middle", "end")
    for steps in series.values():
        for i, x in enumerate(steps):
            axes[0].plot(x["own"], x["curvature"], ".", color=f"C{i}")
            axes[1].plot(x["own"], x["fisher"], ".", color=f"C{i}")
            axes[2].plot(x["rate"], x["signed"], ".", color=f"C{i}")
    for i in range(max(map(len, series.values()), default=0)):
        axes[2].plot([], [], ".", color=f"C{i}", label=words[min(i, 2)])
    axes[0].set(title=f"|curvature| along the own gradient ({c.params})", yscale="log")
    axes[1].set(title="Fisher proxy", yscale="log")
    axes[2].set(title="Curvature along the own gradient", xlabel="pass rate")
    axes[2].set(yscale="symlog")
    axes[2].legend(loc="best", frameon=False)
    for axis in axes[:2]:
        axis.set(xlabel="sigma^2")
    for axis in axes:
        axis.grid(alpha=0.3)
    fig.savefig(c.output / "plot.png", dpi=100)
    plt.close(fig)


def main(c: Config) -> None:
    if c.smoke:
        c = dataclasses.replace(c, **SMOKE | {"resamples": 20})
    if not c.plot_only:
        use_compile_cache()
        s = setting_of(c)
        names = [path.name for path in c.checkpoints]  # paths are of this machine alone
        write_config(c.output, c, output=None, runs=None, model=None, checkpoints=names)
        for at in all_checkpoints(s):
            measure_checkpoint(s, c, at)
    series = load(read_lines(c.output / "metrics.jsonl"), c.params)
    write_table(c.output, table(c, series))
    plot(c, series)


if __name__ == "__main__":
    main(tyro.cli(Config))
