"""Do prompts' gradients satisfy what replaces orthogonality: Assumptions 4 and 5?

Paper: Ge et al. 2026, arXiv:2601.23135, section 3.4 and Table 3. Assumption 4 wants one
M > 0 with M <g_i, g_j> >= |X_i g_j|^2 / |X_i|^2 for all pairs of prompts, so that none
has a negative <g_i, g_j>; 5 wants |g_i| <= R1 |g_j| and sigma_i <= R2 sigma_j. Theorem
3.3 (REINFORCE) is then 3.1 times max(1, M / 2), 3.4 (GRPO) 3.2 times max(R1, 5M / 8)
R2.
Claim: they hold, with M of 89, 250 and 418 at three steps (how it was measured is not
said; the same table has 50.5, 72.7 and 66.4% of cosines positive).

    python experiments/relaxed_assumptions.py [--smoke] [--plot-only] [--task
        gsm8k-expressions --task-path DIR_OF_GSM8K]

Setting: the default job (100k parameters, 120 steps), 3 seeds, 64 trained prompts each
(2,016 pairs), 4 steps. One completion is right, so g = p grad log pi(answer) is exact;
beside it leave-one-out gradients of groups of 16 and 64. X_i: the scores of the sampled
completions (of 64 for the exact g). M is of ordered pairs that do not violate; rank-1:
with X_i replaced by g_i. Trimmed: 99th percentile of M, 95th over 5th percentile for R1
and R2. The null: log-linear policies of random features, pass rates that differ.
Hardware and time: one CPU core, 2 minutes after the runs, which are kept (and take 1 to
2 minutes each; local_curvature.py uses the same ones). --smoke: 1 minute.

Expected: violations, as in the paper's own cosines; a largest M without meaning.
Got (2026-11-21), mean +- 95% over seeds, or their range; chains / expressions:
* Assumption 4 fails: 18.6 +- 11.8, 43.1 +- 5.6, 44.9 +- 1.4, 43.4 +- 4.3% of pairs at
  steps 0, 20, 60, 120 violate it / 47.5 +- 3.2, 50.4 +- 3.3, 48.3 +- 6.8, 46.2 +- 3.1%,
  with exact gradients. The paper's cosines: 49.5, 27.3, 33.6%. Pairs that violate it at
  none of these steps: 25.8 +- 6.1 / 19.1 +- 3.3%. Random features: 49 to 52%; the
  expressions do not differ from them, chains' shared skill does, at the start.
* M over the other pairs, median: .34, .16, .12, .10 / .15, .13, .11, .08; 99th
  percentile 7 to 58 / 247 to 17,367; largest 127 to 16,270 / 7,363 to 2,473,355, of
  seeds that differ by up to 47 times: no property of the model. The paper's 89 to 418
  lie between. Random features: median .5 to 1.2 (of a pair's two, 2.3 to 6.9), 99th
  percentile 117 to 3,493. Rank-1 M: median .05 to .09 / .02 to .03.
* R1 is 23 to 125 / 11,711 to 2,992,433 (95 over 5: 11 to 35 / 247 to 708), R2 2.9 to
  11.2 / 71 to 1,364 (2.4 to 4.9 / 15 to 36): prompts all but never or always solved.
* What a group makes of it. G = 16 finds about as many violations (21.7, 46.1, 48.1,
  48.2 / 45.5 to 49.4%), but 37 to 47 / 22 to 37% of them are false and 26 to 39 / 20 to
  32% of the real ones are missed; at G = 64 21 to 38 / 12 to 32% and 15 to 33 / 12 to
  29%. The share is right, the pairs are not. The tails are cut: tied prompts drop out,
  so at G = 16 R2 is at most 2.1 and M's 99th percentile 1.4 to 17.
* Steps, exact figures, trimmed: 3.3's bound is 3.3 to 29 / 124 to 8,684 times 3.1's,
  3.4's 17 to 376 / 1,333 to 637,632 times 3.2's. With C(T) = 8/3 mean sigma of .6 to
  1.0, GRPO's bound is 2.8 to 36 / 7 to 54 times REINFORCE's where the unrelaxed ones
  promise a gain (untrimmed 2.9 to 12 / 77 to 6,270): these theorems do not say that
  normalisation helps here.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import (
    finished_run,
    interval_text,
    pick_answers,
    sample_groups,
    sequence_logprobs,
    write_config,
    write_rows,
    write_table,
)
from jax.flatten_util import ravel_pytree
from loglinear_prompts import independent_prompts

import grpo_jax as gj
from grpo_jax.intervals import t_interval
from grpo_jax.loglinear import exact
from grpo_jax.models.policy import Policy
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.lines import read_lines, rounded
from grpo_jax.runs.paths import use_compile_cache
from grpo_jax.runs.snapshots import load_policy

PAPER_M = (89, 250, 418)  # Table 3, at steps 0, 260 and 500 of its run
PAPER_POSITIVE = (50.5, 72.7, 66.4)  # % of pairs with a positive cosine there


@dataclasses.dataclass(frozen=True)
class Config:
    task: str = "chains"  # any task where one completion is right
    task_path: str | None = None  # its data, where it reads any
    results: Path = Path("results/relaxed_assumptions")  # a directory of the task's
    runs: Path = Path("results/curvature_runs")  # local_curvature.py's as well
    smoke: bool = False  # a tiny model, one seed, 2 steps, 6 prompts
    plot_only: bool = False  # redraw plot.png and the table from metrics.jsonl
    seeds: tuple[int, ...] = (0, 1, 2)  # a run and a set of prompts each
    run_steps: int = 120
    every: int = 10  # steps between policies that a run keeps
    steps: tuple[int, ...] = (0, 20, 60, 120)  # of a run, measured
    prompts: int = 64  # 2,016 pairs; the paper had 100 and 4,950
    group_sizes: tuple[int, ...] = (16, 64)  # the larger one also makes X_i
    dimensions: tuple[int, ...] = (4, 32, 256)  # of random features, the null
    responses: int = 6  # per prompt of the null


class Products(NamedTuple):
    """Products of prompts' gradients g: what M, R1 and R2 are computed from.

    A leading axis of `kinds`: the exact gradients, then those of each group size. X_i
    has a row per sampled completion of prompt i, its score; all of them for the exact
    g_j. `prompt_geometry` computes these figures too, from a Gram matrix of all scores.
    """

    logp: jax.Array  # [P] of the right answers
    inner: jax.Array  # [kinds, P, P] <g_i, g_j>
    pulled: jax.Array  # [kinds, P, P] |X_i g_j|^2
    spread: jax.Array  # [kinds, P] |X_i|^2


@partial(jax.jit, static_argnames="sizes")
def products(
    policy: Policy, rollouts: Rollouts, answers: Rollouts, *, sizes: tuple[int, ...]
) -> Products:
    """Products at `policy`, with leave-one-out gradients of groups of each size."""
    flat, unravel = ravel_pytree(policy.params)

    def scores(answer, samples):
        """Log-probs [samples] of completions and their gradients [samples, D]."""

        def one(*sample):
            def logprob(flat):
                alone = tuple(x[None] for x in sample)
                return sequence_logprobs(policy, unravel, answer, flat, alone)[0]

            return jax.value_and_grad(logprob)(flat)

        return jax.vmap(one)(*samples)

    def gradients(x):
        """[kinds, D] exact, then leave-one-out estimates; log-prob of the answer."""
        answer, samples, rewards = x
        logp, right = scores(answer, (answer.completions, answer.completion_mask))
        kinds, (_, s) = [jnp.exp(logp) @ right], scores(answer, samples)
        for g in sizes:
            advantages = gj.leave_one_out_advantages(rewards[None, :g])[0]
            kinds.append(advantages @ s[:g] / g)
        return jnp.stack(kinds), logp[0]

    def against(x):
        """|X_i g_j|^2 [kinds, P] and |X_i|^2 [kinds] of one prompt i."""
        answer, samples = x
        _, s = scores(answer, samples)
        pulled = s @ g.reshape(-1, flat.size).T  # [G, P * kinds]
        pulled = pulled.reshape(-1, *g.shape[:2])
        counts = [sizes[-1], *sizes]
        square = [(pulled[:n, :, k] ** 2).sum(0) for k, n in enumerate(counts)]
        spread = [jnp.linalg.norm(s[:n] @ s[:n].T, ord=2) for n in counts]
        return jnp.stack(square), jnp.stack(spread)

    samples = rollouts.completions, rollouts.completion_mask
    g, logp = jax.lax.map(gradients, (answers, samples, rollouts.rewards))
    pulled, spread = jax.lax.map(against, (answers, samples))
    inner = jnp.einsum("pkd,qkd->kpq", g, g)
    return Products(logp, inner, pulled.swapaxes(0, 1), spread.T)


def ratios(values: np.ndarray) -> list[float]:
    """[max / min, 95th / 5th percentile] of values [P]."""
    if not len(values):
        return [np.nan, np.nan]
    low, fifth, high, top = np.percentile(values, [0, 5, 95, 100])
    return [top / low, high / fifth]


def assumptions(
    inner: np.ndarray, pulled: np.ndarray, spread: np.ndarray, sigma: np.ndarray
) -> dict:
    """Violations of Assumption 4, then M over the other ordered pairs, R1 and R2.

    The first three as in `Products`, of one kind; sigma: [P].
    """
    signal = np.diagonal(inner) > 0  # a tied group has no gradient
    inner, pulled = (x[np.ix_(signal, signal)] for x in (inner, pulled))
    spread, norms = spread[signal], np.sqrt(np.diagonal(inner))
    pairs = ~np.eye(len(inner), dtype=bool)
    kept = pairs & (inner > 0)
    if not kept.any():
        return {"prompts": int(signal.sum()), "violating": None}
    full = (pulled / spread[:, None])[kept] / inner[kept]
    rank1 = (inner / norms[:, None] ** 2)[kept]
    quantiles = (50, 99, 100)
    r1, r2 = ratios(norms), ratios(sigma[signal])
    gain = 8 / 3 * float(sigma.mean())  # the paper's C(T), at this step
    # Factors of theorems 3.3 and 3.4: with the largest M and all pairs' R1 and R2; then
    # with the 99th percentile and 95th / 5th.
    m99, most = np.percentile(full, [99, 100])
    costs = [
        [max(1, m / 2), max(a, 5 * m / 8) * b]
        for m, a, b in zip((most, m99), r1, r2, strict=True)
    ]
    cosines = (inner / norms / norms[:, None])[pairs]
    return {
        "prompts": int(signal.sum()),
        "violating": float((inner < 0)[pairs].mean()),
        "m_full": np.percentile(full, quantiles).tolist(),
        "m_rank1": np.percentile(rank1, quantiles).tolist(),
        "r1": r1,
        "r2": r2,
        "costs": costs,
        # GRPO's bound over REINFORCE's, both with these steps; without, C(T).
        "relative": [gain * grpo / reinforce for reinforce, grpo in costs],
        "gain": gain,
        "cosines": [float(cosines.mean()), float(cosines.std())],
        "curve": rounded(np.percentile(full, np.linspace(0, 100, 201))),
    }


def violations(truth: np.ndarray, inner: np.ndarray) -> dict:
    """Shares of pairs: exact violations (`truth` [P, P]) against those of `inner`."""
    signal = np.diagonal(inner) > 0
    pairs = np.triu(np.outer(signal, signal), 1)
    real, sampled = (truth < 0)[pairs], (inner < 0)[pairs]
    return {
        "real": float(real.mean()),
        "false": float((sampled & ~real).sum() / max(1, sampled.sum())),  # of sampled
        "missed": float((real & ~sampled).sum() / max(1, real.sum())),  # of real
        "agree": float((real == sampled).mean()),
    }


def random_features(c: Config, seed: int, dimension: int) -> dict:
    """The null: the row of log-linear policies over independent features, which are
    their X_i."""
    sizes = dict(num_prompts=c.prompts, responses=c.responses)
    policy = independent_prompts(seed, dimension, **sizes)
    now = jax.jit(exact)(policy, np.zeros(dimension))
    g = np.asarray(now.gradients, float)
    pulled = (np.einsum("pkd,qd->pqk", policy.features, g) ** 2).sum(2)
    spread = np.linalg.norm(policy.features, ord=2, axis=(1, 2)) ** 2
    inner = g @ g.T
    larger = np.maximum(m := pulled / spread[:, None] / inner, m.T)
    row = assumptions(inner, pulled, spread, np.asarray(now.sigma, float))
    larger = float(np.median(larger[np.triu(inner > 0, 1)]))  # of a pair's two
    return {"seed": seed, "dimension": dimension, "larger": larger} | row


def run_rows(c: Config, seed: int) -> Iterator[dict]:
    """A row per step and kind of gradient of one run."""
    directory = finished_run(
        c.runs / (f"{c.task}-seed{seed}" + "-smoke" * c.smoke),
        task=c.task,
        task_path=c.task_path,
        seed=seed,
        steps=c.run_steps,
        every=c.every,
        tiny=c.smoke,
    )
    task = gj.load_task(c.task, path=c.task_path)
    answers = pick_answers(task, c.prompts, seed=seed, length=8)
    never = np.ones((c.prompts, c.prompts), bool)  # violated so far
    upper = np.triu_indices(c.prompts, 1)
    for step in c.steps:
        policy = load_policy(directory, step)
        key = jax.random.fold_in(jax.random.key(seed), step)
        groups = sample_groups(policy, task, answers, key, c.group_sizes[-1])
        now = jax.device_get(products(policy, groups, answers, sizes=c.group_sizes))
        now = Products(*(np.asarray(x, float) for x in now))
        rewards, truth = np.asarray(groups.rewards, float), now.inner[0]
        never &= truth > 0
        for k, g in enumerate((None, *c.group_sizes)):
            sigma = rewards[:, :g].std(1)
            if g is None:
                sigma = np.sqrt(np.exp(now.logp) * -np.expm1(now.logp))
            row = {"seed": seed, "step": step, "group_size": g}
            row |= assumptions(now.inner[k], now.pulled[k], now.spread[k], sigma)
            row |= violations(truth, now.inner[k])
            yield row | {"never": float(never[upper].mean())}


def experiment(c: Config) -> Iterator[dict]:
    """The rows of metrics.jsonl: of the runs, then of the null."""
    for seed in c.seeds:
        yield from run_rows(c, seed)
    for seed in c.seeds:
        for dimension in c.dimensions:
            yield random_features(c, seed, dimension)


def range_text(values: np.ndarray) -> str:
    """Least to greatest over seeds, for what has a heavy tail."""
    low, high = (
        f"{x:,.1f}" if x < 100 else f"{x:,.0f}" for x in np.sort(values)[[0, -1]]
    )
    return f"{low} to {high}"


def kinds_of(c: Config) -> list[tuple[int, int | None]]:
    """(step, group size) of every kind of gradient; None for exact."""
    return [(step, g) for step in c.steps for g in (None, *c.group_sizes)]


def columns_of(rows: list[dict], step: int, g: int | None) -> dict[str, np.ndarray]:
    """Columns of the rows of one step and kind, over seeds; {} without any."""
    rows = [r for r in rows if r.get("step") == step and r["group_size"] == g]
    rows = [r for r in rows if r["violating"] is not None]
    return {name: np.array([r[name] for r in rows]) for name in (rows or [{}])[0]}


def assumption_cells(x: dict[str, np.ndarray]) -> list[str]:
    cells = [interval_text(100 * x["violating"], 1) + " %"]
    for m in ("m_full", "m_rank1"):
        cells.append(interval_text(x[m][:, 0]))
        cells += [range_text(x[m][:, i]) for i in (1, 2)]
    for r in ("r1", "r2"):
        cells += [range_text(x[r][:, 0]), interval_text(x[r][:, 1], 1)]
    return cells + [interval_text(x["cosines"][:, i], 3) for i in (0, 1)]


def noise_cells(x: dict[str, np.ndarray]) -> list[str]:
    shares = ("violating", "false", "missed", "agree")
    cells = [interval_text(100 * x[name], 1) for name in shares]
    return [interval_text(x["prompts"], 0), *cells]


def cost_cells(x: dict[str, np.ndarray]) -> list[str]:
    cells = []
    for i in (0, 1):
        cells += [range_text(x["costs"][:, i, j]) for j in (0, 1)]
        cells.append(range_text(x["relative"][:, i]))
    return [*cells, interval_text(x["gain"])]


def random_cells(rows: list[dict]) -> list[str]:
    m = np.array([r["m_full"] for r in rows])
    cells = [interval_text([100 * r["violating"] for r in rows], 1) + " %"]
    cells += [interval_text(m[:, 0]), interval_text([r["larger"] for r in rows])]
    return cells + [range_text(m[:, 1]), range_text(m[:, 2])]


def markdown(head: str, lines: list[list]) -> list[str]:
    rule = "|" + "---|" * (head.count("|") - 1)
    return [head, rule, *("| " + " | ".join(map(str, x)) + " |" for x in lines)]


def table(c: Config) -> str:
    """Markdown: mean and 95 % over seeds; of maxima and 99th percentiles the range."""
    rows = read_lines(c.results / c.task / "metrics.jsonl")
    runs, null = ([r for r in rows if ("step" in r) == x] for x in (True, False))
    kinds = [(step, g, columns_of(runs, step, g)) for step, g in kinds_of(c)]
    kinds = [kind for kind in kinds if kind[2]]
    sampled = [kind for kind in kinds if kind[1] is not None]
    lines = markdown(
        "| step | gradients | violating | M median | M p99 | M max | rank-1 M median |"
        " p99 | max | R1 | R1, 95/5 | R2 | R2, 95/5 | cos mean | cos std |",
        [[step, g or "exact", *assumption_cells(x)] for step, g, x in kinds],
    )
    never = columns_of(runs, c.steps[-1], None)["never"]
    never = (
        f"Pairs that violate at none of the steps: {interval_text(100 * never, 1)} %."
    )
    noise = markdown(
        "| step | G | prompts untied | violations found | of them false |"
        " real ones missed | same sign |",
        [[step, g, *noise_cells(x)] for step, g, x in sampled],
    )
    cost = markdown(
        "| step | gradients | 3.3 / 3.1 | 3.4 / 3.2 | GRPO / REINFORCE | 3.3 / 3.1"
        ", trimmed | 3.4 / 3.2, trimmed | GRPO / REINFORCE, trimmed | C |",
        [[step, g or "exact", *cost_cells(x)] for step, g, x in kinds],
    )
    random = markdown(
        "| random features, d | violating | M median | larger of a pair's two |"
        " M p99 | M max |",
        [
            [d, *random_cells([r for r in null if r["dimension"] == d])]
            for d in c.dimensions
        ],
    )
    return "\n".join([*lines, "", never, "", *noise, "", *cost, "", *random]) + "\n"


def plot(c: Config) -> None:
    plt.switch_backend("Agg")
    rows = read_lines(c.results / c.task / "metrics.jsonl")
    runs, null = ([r for r in rows if ("step" in r) == x] for x in (True, False))
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    violating, m_bound, curve, ratio = axes.ravel()
    names = {None: "exact"} | {g: f"sampled, G = {g}" for g in c.group_sizes}
    for j, (g, label) in enumerate(names.items()):
        by_step = {step: columns_of(runs, step, g) for step in c.steps}
        by_step = {step: x for step, x in by_step.items() if x}
        steps = np.array(list(by_step)) + j
        style = dict(color=f"C{j}", marker="o", ms=4)
        at = [t_interval(100 * x["violating"]) for x in by_step.values()]
        mean, half = np.array(at).reshape(-1, 2).T
        half = np.where(np.isfinite(half), half, 0)
        violating.errorbar(steps, mean, half, label=label, **style)
        for i, line in enumerate(("-", "--", ":")):
            y = [np.median(x["m_full"][:, i]) for x in by_step.values()]
            m_bound.plot(steps, y, line, label=label if i == 0 else None, **style)
        for name, line in (("r1", "-"), ("r2", "--")):
            y = [x[name][:, 1].mean() for x in by_step.values()]
            word = {"r1": "R1", "r2": "R2"}[name]
            ratio.plot(steps, y, line, label=f"{word}, {label}", **style)
        if x := by_step.get(c.steps[0]):
            share = np.linspace(100, 0, 201)
            curve.plot(x["curve"].mean(0), share, color=f"C{j}", label=label)
    for j, d in enumerate(c.dimensions, 3):
        y = np.mean([r["curve"] for r in null if r["dimension"] == d], 0)
        label = f"random features, {d}"
        curve.plot(y, np.linspace(100, 0, 201), color=f"C{j}", lw=0.8, label=label)
    at = np.array([0, 260, 500]) * c.steps[-1] / 500
    violating.plot(
        at, 100 - np.array(PAPER_POSITIVE), "kx", label="paper, rescaled steps"
    )
    m_bound.plot(at, PAPER_M, "kx", label="paper, rescaled steps")
    violating.set(title="Pairs with a negative inner product, %", xlabel="step")
    m_bound.set(title="M: median -, 99th percentile --, largest :", xlabel="step")
    curve.set(title=f"Pairs with a larger M, %; step {c.steps[0]}", xlabel="M")
    ratio.set(title="95th / 5th percentile", xlabel="step", yscale="log")
    m_bound.set(yscale="log")
    curve.set(xscale="log", yscale="log", xlim=(1e-2, None), ylim=(0.3, 100))
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
        axis.legend(loc="best", frameon=False, fontsize=8)
    figure.savefig(c.results / c.task / "plot.png", dpi=110)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(seeds=(0,), run_steps=4, every=2, steps=(0, 2), prompts=6)
        c = dataclasses.replace(c, **few, group_sizes=(8, 16))
    directory = c.results / c.task
    if not c.plot_only:
        use_compile_cache()
        write_config(directory, c)
        write_rows(directory / "metrics.jsonl", experiment(c))
    write_table(directory, table(c))
    plot(c)


if __name__ == "__main__":
    main(tyro.cli(Config))
