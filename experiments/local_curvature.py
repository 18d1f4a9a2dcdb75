"""Does a prompt's reward variance sigma^2 predict its local curvature, now and later?

Paper: Ge et al. 2026, arXiv:2601.23135, Table 1: Pearson of a prompt's curvature, by a
Fisher proxy, with sigma^2: .342 at the same iteration, -.028 at another one.
Claim: |curvature| follows sigma^2 at the same step and not at others, which is why
dividing by the std at every step is an adaptive step size.

    python experiments/local_curvature.py [--smoke] [--plot-only] [--task
        gsm8k-expressions --task-path DIR_OF_GSM8K]

Setting: the default job (100k parameters, 120 steps), 3 seeds, 64 trained prompts each,
6 steps. One completion is right, so p, the gradient p s and products with the Hessian
H = p (s s' + grad^2 log pi), s = grad log pi(answer), are exact: the top |eigenvalue|
(10 Lanczos steps), and u'Hu along the own gradient and along the policy's change over
the next 10 steps. Beside them at G = 16: the estimator of the instrument, and the
paper's proxy G |g_L|^2, g_L the mean of the sampled scores: the sum of its entries
G g_L * g_L (their mean is that over d: the same correlations). All in absolute value.
Hardware and time: one CPU core, 2 minutes after the runs, which are kept (and take 1 to
2 minutes each; relaxed_assumptions.py uses the same ones). --smoke: 1 minute.

Implied by theory: H_x = sigma^2 (E[W | right] - E[W | wrong]), W = (grad^2 pi) / pi, so
the factor sigma^2 is an identity, and the claim is on the other factor: `shuffled`
gives each prompt another one's. Correlations are across prompts of one step.

Expected: as the paper, more clearly in the exact figures.
Got (2026-11-21), mean +- 95% over seeds; chains first, then expressions:
* Pearson at the same step / at other steps, of the top eigenvalue: .47 +- .02 / .00 +-
  .06 on chains, .53 +- .08 / .25 +- .12 on expressions; along the own gradient .31 +-
  .03 / -.02 +- .05, .33 +- .10 / .17 +- .10; along the update .34 +- .03 / -.01 +- .10,
  .33 +- .07 / .14 +- .08. Spearman at the same step .63 .40 .47, .78 .55 .73. So the
  paper's pair of numbers shows on chains, for the Hessian itself.
* The factor sigma^2 alone gives as much: with shuffled constants Pearson is .53 .43
  .42, .52 .45 .34. The other factor, curvature / sigma^2, falls with sigma^2 (Spearman
  -.18 -.30 -.16, -.37 -.54), but along the update of expressions (.20 +- .11).
* The loss at other steps does not come from the curvature either: sigma^2 of one step
  and of another correlate by .16 +- .18 on chains, .53 +- .05 on expressions.
* The paper's proxy: .30 +- .01 / .15 +- .05 on chains, but -.17 +- .15 on expressions:
  it stays finite as p goes to 0 (log-log slope -.21 +- .18 at step 0 of chains, -.04
  over all of expressions), where H vanishes. It cannot stand in for curvature.
* Log-log slopes on sigma^2, all steps: |grad p| 1.00 +- .05, .88 +- .05; top eigenvalue
  .75 +- .01, .76 +- .17; own gradient .51, .54; update .80, 1.19. By step the top one
  is .64 to 1.01, .71 to .83: sigma^2 rather than sigma (.5).
* Over the run the median of top / sigma^2 grows 4.4 +- 1.4 times on chains (768 to
  3,361), 1.7 +- .6 on expressions; along the update it changes 3.0 +- 1.5, 3.2 +- 1.4
  times. Over the steps of one prompt Spearman is .51, .57 (top), .24, .30 (own
  gradient): sigma says less about when to step carefully than about which prompt is
  steep.
* Along the own gradient curvature is positive at first (85%, 70% of prompts) and
  negative at the end (1%, 28% positive), as p passes 1/2.
* G = 16 along the own gradient: Spearman with the exact one of its directions .48 +-
  .18, .50 +- .10; with its own group's variance .69 +- .04, .65 +- .14, above the exact
  figure's: tied parts measure 0 of both, so this correlation is partly made by noise.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

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
from lanczos import extremes
from scipy import stats

import grpo_jax as gj
from grpo_jax.diagnostics.curvature import directional_derivatives, prompt_curvature
from grpo_jax.diagnostics.probe import probe_prompt
from grpo_jax.intervals import t_interval
from grpo_jax.models.policy import Policy
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.lines import read_lines, rounded
from grpo_jax.runs.paths import use_compile_cache
from grpo_jax.runs.snapshots import load_policy

# Curvatures of a prompt: name in metrics.jsonl, and in words.
KINDS = {
    "top": "top eigenvalue",
    "own": "along own gradient",
    "update": "along the update",
    "fisher": "Fisher proxy, G = 16",
    "sampled": "own gradient, G = 16",
    "sampled_update": "the update, G = 16",
}


@dataclasses.dataclass(frozen=True)
class Config:
    task: str = "chains"  # any task where one completion is right
    task_path: str | None = None  # its data, where it reads any
    results: Path = Path("results/local_curvature")  # a directory of the task's in it
    runs: Path = Path("results/curvature_runs")  # relaxed_assumptions.py's as well
    smoke: bool = False  # a tiny model, one seed, 2 steps, 6 prompts
    plot_only: bool = False  # redraw plot.png and the table from metrics.jsonl
    seeds: tuple[int, ...] = (0, 1, 2)  # a run and a set of prompts each
    steps: tuple[int, ...] = (0, 10, 20, 40, 80, 110)  # of a run, measured
    ahead: int = 10  # steps to the later policy that gives the update's direction
    prompts: int = 64
    group_size: int = 16
    lanczos: int = 10  # Hessian-vector products behind a top eigenvalue
    window: tuple[float, float] = (1e-3, 0.999)  # pass rates in log-log slopes


@partial(jax.jit, static_argnames="lanczos")
def prompt_curvatures(
    policy: Policy, change, rollouts: Rollouts, answers: Rollouts, *, lanczos: int
) -> dict[str, jax.Array]:
    """Figures [P] of every prompt; all curvatures are along unit vectors.

    From its one right answer, with nothing sampled: p = pi(answer), the gradient p s
    and the Hessian p (s s' + grad^2 log pi), s = grad log pi(answer). From its group:
    the Fisher proxy, and curvatures as the instrument measures them.

    change: the update, shaped as the parameters.
    """
    flat, unravel = ravel_pytree(policy.params)
    change, _ = ravel_pytree(change)
    change /= jnp.linalg.norm(change)

    def one_prompt(x):
        answer, group, rewards = x
        logprobs = partial(sequence_logprobs, policy, unravel, answer)
        right = (answer.completions, answer.completion_mask)
        score = jax.grad(lambda flat: logprobs(flat, right)[0])
        s, logp = score(flat), logprobs(flat, right)[0]
        p, norm = jnp.exp(logp), jnp.linalg.norm(s)

        def product(v):
            return s * (s @ v) + jax.jvp(score, (flat,), (v,))[1]

        low, high, error = extremes(product, s / norm, lanczos)
        mean = jax.grad(lambda flat: logprobs(flat, group).mean())(flat)
        probe = probe_prompt(logprobs, flat, group, rewards, lambda g: g[:1], right)
        _, first, second = directional_derivatives(
            lambda flat: logprobs(flat, group), flat, change
        )
        count, rate = len(rewards), rewards.mean()
        variance = rate * (1 - rate) * count / (count - 1)
        moved = prompt_curvature(rewards[None], first[None], second[None])[0]
        return {
            "p": p,
            "sigma2": p * -jnp.expm1(logp),
            "gradient": p * norm,
            "low": p * low,
            "high": p * high,
            "error": error / jnp.maximum(-low, high),  # relative
            "own": p * (s / norm) @ product(s / norm),
            "update": p * change @ product(change),
            "fisher": count * (mean @ mean),
            "sampled": probe.curvature,
            "sampled_exact": probe.exact_curvature,  # along the same directions
            "sampled_update": jnp.where(variance > 0, moved, jnp.nan),
            "sampled_sigma2": variance,
        }

    group = (rollouts.completions, rollouts.completion_mask)
    return jax.lax.map(one_prompt, (answers, group, rollouts.rewards))


def measurements(c: Config) -> Iterator[dict]:
    """A row per run and step, lists over its prompts."""
    for seed in c.seeds:
        directory = finished_run(
            c.runs / (f"{c.task}-seed{seed}" + "-smoke" * c.smoke),
            task=c.task,
            task_path=c.task_path,
            seed=seed,
            steps=max(c.steps) + c.ahead,
            every=c.ahead,
            tiny=c.smoke,
        )
        task = gj.load_task(c.task, path=c.task_path)
        answers = pick_answers(task, c.prompts, seed=seed, length=8)
        for step in c.steps:
            policy, end = (load_policy(directory, s) for s in (step, step + c.ahead))
            change = jax.tree.map(jnp.subtract, end.params, policy.params)
            key = jax.random.fold_in(jax.random.key(seed), step)
            groups = sample_groups(policy, task, answers, key, c.group_size)
            figures = prompt_curvatures(
                policy, change, groups, answers, lanczos=c.lanczos
            )
            row = {name: rounded(x) for name, x in figures.items()}
            yield {"seed": seed, "step": step} | row


def load(directory: Path) -> dict[str, np.ndarray]:
    """Figures [seeds, steps, P] by name; |curvature| under the names of KINDS."""
    rows = read_lines(directory / "metrics.jsonl")
    seeds = sorted({r["seed"] for r in rows})
    by = [[r for r in rows if r["seed"] == s] for s in seeds]
    names = [name for name in rows[0] if name not in ("seed", "step")]
    data = {n: np.array([[r[n] for r in line] for line in by], float) for n in names}
    data["signed own"], data["signed update"] = data["own"], data["update"]
    data["top"] = np.maximum(-data["low"], data["high"])
    return data | {kind: np.abs(data[kind]) for kind in KINDS}


def correlation(x: np.ndarray, y: np.ndarray, method: str) -> float:
    """Correlation "spearman" or "pearson" of the finite pairs."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 4 or x.std() == 0 or y.std() == 0:
        return np.nan
    return float(
        {"spearman": stats.spearmanr, "pearson": stats.pearsonr}[method](x, y)[0]
    )


def slope(c: Config, p: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Slope of log y on log x over the pass rates p in `window`; [P] each."""
    used = (p > c.window[0]) & (p < c.window[1]) & (y > 0)
    if used.sum() < 4:
        return np.nan
    return float(np.polyfit(np.log(x[used]), np.log(y[used]), 1)[0])


def finite_text(values: np.ndarray) -> str:
    """Mean ± 95 % over the seeds with a finite value; values: [seeds]."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return interval_text(values) if len(values) else "-"


def by_step(data: dict, fn: Callable[[dict], float]) -> np.ndarray:
    """fn(figures of one seed and step, each [P]) as [seeds, steps]."""
    seeds, steps, _ = data["p"].shape
    return np.array(
        [
            [fn({n: x[i, s] for n, x in data.items()}) for s in range(steps)]
            for i in range(seeds)
        ]
    )


def lags(data: dict, kind: str, method: str) -> np.ndarray:
    """Correlation of sigma^2 at one step with |curvature| at another; [seeds, steps,
    steps]."""
    pairs = zip(data["sigma2"], data[kind], strict=True)
    return np.array([[[correlation(x, y, method) for y in ys] for x in xs]
                     for xs, ys in pairs])  # fmt: skip


def shuffled(x: dict, kind: str, method: str, draws: int = 20) -> float:
    """Correlation with sigma^2 if curvature / sigma^2 were another prompt's: what the
    factor sigma^2 alone gives."""
    rng = np.random.default_rng(0)
    y = x[kind] / x["sigma2"]
    curvatures = [x["sigma2"] * rng.permutation(y) for _ in range(draws)]
    return float(np.mean([correlation(x["sigma2"], y, method) for y in curvatures]))


def correlations(data: dict, kind: str, method: str) -> list[np.ndarray]:
    """Correlations with sigma^2, [seeds] each: of |curvature| at the same step, of
    `shuffled`, at other steps, of all steps pooled; and of curvature / sigma^2."""
    lag = lags(data, kind, method)
    other = ~np.eye(lag.shape[1], dtype=bool)
    pairs = zip(data["sigma2"], data[kind], strict=True)
    return [
        np.nanmean(np.einsum("ijj->ij", lag), 1),
        np.nanmean(by_step(data, lambda x: shuffled(x, kind, method)), 1),
        np.nanmean(lag[:, other], 1),
        np.array([correlation(x.ravel(), y.ravel(), method) for x, y in pairs]),
        np.nanmean(
            by_step(
                data, lambda x: correlation(x["sigma2"], x[kind] / x["sigma2"], method)
            ),
            1,
        ),
    ]


def slopes(c: Config, data: dict, kind: str) -> list[np.ndarray]:
    """Log-log slopes on sigma^2, [seeds] each: of every step, then of all pooled."""
    at = by_step(data, lambda x: slope(c, x["p"], x["sigma2"], x[kind]))
    triples = zip(data["p"], data["sigma2"], data[kind], strict=True)
    return [*at.T, np.array([slope(c, *(x.ravel() for x in y)) for y in triples])]


def along_the_run(data: dict, kind: str) -> list[np.ndarray]:
    """Changes over a run, [seeds] each: Spearman over the steps of one prompt, and the
    median of curvature / sigma^2, largest over least."""
    pairs = zip(data["sigma2"], data[kind], strict=True)
    each = [
        [correlation(x, y, "spearman") for x, y in zip(xs.T, ys.T, strict=True)]
        for xs, ys in pairs
    ]
    constant = np.nanmedian(data[kind] / data["sigma2"], 2)
    constant = np.where(constant > 0, constant, np.nan)
    return [np.nanmean(each, 1), constant.max(1) / constant.min(1)]


def row_of(*cells: str | np.ndarray) -> str:
    texts = [x if isinstance(x, str) else finite_text(x) for x in cells]
    return "| " + " | ".join(texts) + " |"


def table(c: Config, data: dict) -> str:
    """Markdown; every cell a mean and its 95 % interval over seeds."""
    lines = ["Medians of |curvature| / sigma^2:", ""]
    lines += ["| step | mean p | mean sigma^2 | top | own | update | own > 0 |"]
    lines += ["|" + "---|" * 7]
    for s, step in enumerate(c.steps):
        now = {name: x[:, s] for name, x in data.items()}
        cells = [now["p"].mean(1), now["sigma2"].mean(1)]
        cells += [
            np.median(now[k] / now["sigma2"], 1) for k in ("top", "own", "update")
        ]
        lines.append(row_of(str(step), *cells, (now["signed own"] > 0).mean(1)))
    lines += ["", "Correlations of |curvature| with sigma^2 over prompts:", ""]
    lines += ["| curvature | method | same step | shuffled | other step | all steps |"]
    lines[-1] += " curvature / sigma^2, same step |"
    lines += ["|" + "---|" * 7]
    itself = {"itself": data["sigma2"]} | data
    for kind, words in (KINDS | {"itself": "sigma^2 itself"}).items():
        for method in ("spearman", "pearson"):
            lines.append(row_of(words, method, *correlations(itself, kind, method)))
    lines += ["", "Log-log slopes on sigma^2:", ""]
    lines += ["| figure | " + " | ".join(f"step {s}" for s in c.steps) + " | all |"]
    lines += ["|" + "---|" * (len(c.steps) + 2)]
    for kind, words in ({"gradient": "norm of the gradient"} | KINDS).items():
        lines.append(row_of(words, *slopes(c, data, kind)))
    lines += ["", "| curvature | Spearman over one prompt's steps | drift |"]
    lines += ["|---|---|---|"]
    for kind, words in KINDS.items():
        lines.append(row_of(words, *along_the_run(data, kind)))

    def agreement(x):
        return correlation(x["sampled"], np.abs(x["sampled_exact"]), "spearman")

    def own_group(x):
        return correlation(x["sampled"], x["sampled_sigma2"], "spearman")

    spearman = [np.nanmean(by_step(data, fn), 1) for fn in (agreement, own_group)]
    lines += ["", "Spearman of |curvature| along the own gradient measured at G = 16"]
    lines += [f"with the exact one of the same directions: {finite_text(spearman[0])};"]
    lines += [f"with its group's own reward variance: {finite_text(spearman[1])}."]
    lines += [
        f"Top eigenvalue: relative error {np.median(data['error']):.1e} (median),"
    ]
    lines += [f"{np.quantile(data['error'], 0.99):.1e} (99th percentile)."]
    return "\n".join(lines) + "\n"


def plot(c: Config, directory: Path, data: dict) -> None:
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    cloud, same, lagged, drift, paper, measured = axes.ravel()
    steps, x = np.array(c.steps), data["sigma2"]
    for s, step in enumerate(steps):
        color = plt.cm.viridis(s / max(1, len(steps) - 1))
        cloud.plot(
            x[:, s].ravel(),
            data["top"][:, s].ravel(),
            ".",
            color=color,
            label=f"step {step}",
        )
        paper.plot(x[:, s].ravel(), data["fisher"][:, s].ravel(), ".", color=color)
        y = data["sampled"][:, s].ravel()
        exact = np.abs(data["sampled_exact"][:, s]).ravel()
        measured.plot(exact[y > 0], y[y > 0], ".", color=color)
    ends = np.array([max(np.nanmin(x), 1e-5), 0.25])
    scale = np.nanmedian(data["top"] / x)
    cloud.plot(ends, scale * ends, "k", lw=0.8, label="slope 1")
    cloud.set(
        title="Top |eigenvalue| of H", xlabel="sigma^2", xscale="log", yscale="log"
    )
    cloud.set(xlim=(ends[0], 0.4))
    paper.set(
        title="Fisher proxy, G = 16", xlabel="sigma^2", xscale="log", yscale="log"
    )
    paper.set(xlim=(ends[0], 0.4))
    measured.set(title="|Curvature| along the own gradient")
    measured.set(xlabel="exact", ylabel="measured, G = 16")
    if (data["sampled"] > 0).any():  # not every half of a group tied
        ends = np.nanpercentile(np.abs(data["sampled_exact"]), [1, 100])
        measured.plot(ends, ends, "k", lw=0.8)
        measured.set(ylim=ends / [3, 1 / 3], xscale="log", yscale="log")
    for j, (kind, words) in enumerate(KINDS.items()):
        lag = lags(data, kind, "spearman")
        at = [
            t_interval(lag[np.isfinite(lag[:, s, s]), s, s]) for s in range(len(steps))
        ]
        mean, half = np.array(at).T
        bar = dict(color=f"C{j}", marker="o", ms=3, lw=1, label=words)
        same.errorbar(steps + 0.5 * j, mean, np.where(half < 9, half, 0), **bar)
        if kind in ("top", "own", "update", "fisher"):
            lagged.plot(steps, np.nanmean(lag[:, 0], 0), color=f"C{j}", label=words)
        if kind == "sampled":  # often 0: half of a group is tied
            continue
        constant = np.nanmedian(data[kind] / x, 2)
        drift.plot(steps, (constant / constant[:, :1]).mean(0), ".-", color=f"C{j}")
    itself = lags(data | {"itself": x}, "itself", "spearman")
    lagged.plot(steps, itself[:, 0].mean(0), "k--", label="sigma^2 itself")
    same.set(title="Spearman with sigma^2 across prompts, same step", xlabel="step")
    lagged.set(
        title=f"... with sigma^2 of step {steps[0]}", xlabel="step of the curvature"
    )
    drift.set(title="Median curvature / sigma^2, first step = 1", xlabel="step")
    drift.set(yscale="log")
    for axis in (cloud, same, lagged):
        axis.legend(loc="best", frameon=False, fontsize=7)
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
    figure.savefig(directory / "plot.png", dpi=110)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(seeds=(0,), steps=(0, 2), ahead=2, prompts=6)
        c = dataclasses.replace(c, **few)
    directory = c.results / c.task
    if not c.plot_only:
        use_compile_cache()
        write_config(directory, c)
        write_rows(directory / "metrics.jsonl", measurements(c))
    data = load(directory)
    # Where every group of a step is tied there is nothing to average.
    warnings.filterwarnings("ignore", "Mean of empty|All-NaN", RuntimeWarning)
    write_table(directory, table(c, data))
    plot(c, directory, data)


if __name__ == "__main__":
    main(tyro.cli(Config))
