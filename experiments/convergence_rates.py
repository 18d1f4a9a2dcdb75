"""REINFORCE, GRPO and log-odds weights: steps to a target, and the bounds on them.

Paper: Ge et al. 2026, arXiv:2601.23135, Theorems 3.1 and 3.2 (Sec. 3, App. D).
Claim: dividing by sigma converges faster on prompts with orthogonal features; losing
orthogonality limits the gain. Ours: Theorem A, a step's least gain in log-odds at the
steps of `loglinear.safe_step`; Theorem C, GRPO ascends sum 2 asin sqrt p, so that
sum |grad J|^2 / sigma^2 <= 2 n L (pi - 2 asin sqrt p0), L = sqrt(3) D^2 / 12.

    python experiments/convergence_rates.py [--smoke] [--plot-only] [--results DIR]

Setting: 24 prompts of 6 responses, one right, exact full-batch gradients weighted by
sigma^-0 (reinforce), sigma^-1 (std), sigma^-2 (log-odds). Steps until the mean (the
worst) pass rate is .9, at the safe step / chi, chi being `loglinear.interference`, and
at each run's best step of that times 2^-6 ... 2^8; 8 seeds of features. Bounds: 500
random single prompts, 400 steps; n = 8 is one of 8 orthogonal prompts drawn per step,
in expectation. Sampled: 8 prompts x G, 60 steps, p0 .02 to .5, rates 2^0 ... 2^13
chosen on 12 seeds, reported on 24 others. Intervals: 95 %, t over seeds, paired.
Hardware and time: one CPU core, 2 minutes (--smoke: 30 s, mostly compilation).

Expected: std ahead on orthogonal prompts, most so where p0 varies; no gain on aligned
ones; every bound holds but Theorem 3.2 as a sum, as its main text has it.
Got (2026-11-21): as claimed where features are orthogonal or aligned. The blanket form
of "losing orthogonality limits the gain" does not show: with cosines of either sign
normalisation matters more, not less.
* Orthogonal, safe steps, steps of reinforce over std (mean .9): 1.23 [1.19, 1.28] at
  p0 = .5, 1.72 [1.68, 1.76] at .02, 3.3 [2.4, 4.7] at .001 to .5; std over log-odds
  1.28, 1.54, 2.04. Best steps: 1 (one step does), 2.5 [1.5, 4.2], 2.5 [1.5, 4.2]. These
  few-step counts are only indicative: nothing punishes a huge step here, and up to 5
  of 8 best steps are the grid's largest.
* Aligned (mean |cos| .78, chi 24): 1, 1.71, 1.47 [1.41, 1.54] at safe steps; nothing at
  best steps, one step for all three.
* Mixed signs, p0 .001 to .5, seeds of 8 that get to mean .9 in 20,000 safe steps
  (reinforce, std, log-odds): 3, 7, 8 (192 dimensions, mean |cos| .057), 0, 1, 8 (96),
  0, 0, 4 (48). Best steps, 1500 of them: 3, 8, 8; 0, 2, 8; 0, 0, 5. Not for want of a
  solution: some theta has every right response on top in all seeds, at 48 in 7. The
  easy prompts drive the hard ones' p to where reinforce's gradient, like p, vanishes.
* log-odds is not uniformly better: at p0 = .5 and 48 dimensions 4 of 8 seeds fail with
  safe steps, where std takes 117 and reinforce 164 (medians); at 96 the worst prompt
  needs 559 steps, against 30 and 33.
* Theorem 3.2 as a sum: false from T = 36 on for one prompt with two one-hot responses
  and p0 = 1/2 (T = 1000: .440, bound .033), and for 88% of the random prompts (X = D/2;
  61% with the spectral X), up to 8.7-fold. At n = 8 not within 400 steps. Min: holds.
* Tightness over all runs and T, smaller over larger side, median (worst): 3.1 .49 (.56)
  with X = D/2, .41 (.52) spectral; n = 8 .14 (.54), .02 (.50). 3.2's min 2e-4 (.23);
  its one step .38 (.48). Theorem A .997 (.9997) reinforce, .990 (.997) std, .50 (.74)
  log-odds. Theorem C's sum .50 (.67), n = 8 .47 (.65); its min .001 (.47). No bound but
  the sum was violated. The sums are of use, the minima are not: gradients die faster.
* Sampled, gain over reinforce in mean pass rate, G = 4, 16, 64: in 96 dimensions std
  .029 +- .016, .040 +- .019, .050 +- .023, log-odds .014 +- .024, .082 +- .023,
  .105 +- .024 (reinforce .69, .77, .81). Orthogonal, near saturation: std
  -.009 +- .011, -.001 +- .005, .004 +- .005, log-odds .000 +- .004, .0019 +- .0005,
  .004 +- .005.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import paired_gain, tune_then_test, write_config, write_rows
from convergence_bounds import METHODS, bound_rows, counterexample, random_prompts
from loglinear_prompts import make_prompts, stacked
from scipy import optimize

import grpo_jax as gj
from grpo_jax import loglinear
from grpo_jax.intervals import t_interval
from grpo_jax.loglinear import LogLinear
from grpo_jax.runs.lines import read_lines


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/convergence_rates")  # where the three files go
    smoke: bool = False  # fewer of everything
    plot_only: bool = False  # redraw plot.png from metrics.jsonl
    seeds: tuple[int, ...] = tuple(range(8))  # of the features
    features: tuple[str, ...] = (
        "orthogonal",  # a block of `block` parameters per prompt
        "aligned",  # half of each squared norm on one direction, + for right
        "mixed192",  # random directions in 192 dimensions: cosines of either sign
        "mixed96",
        "mixed48",
    )
    pass_rates: tuple[tuple[float, float], ...] = (
        (0.5, 0.5),
        (0.02, 0.02),
        (1e-3, 0.5),
    )
    num_prompts: int = 24  # at the start their pass rates are log-spaced between two
    responses: int = 6  # per prompt, one of them right
    block: int = 4  # parameters of each prompt, where they are not shared
    target: float = 0.9  # pass rate to reach, by the mean and by the worst prompt
    limit: int = 20_000  # steps, at the safe step
    best_limit: int = 1500  # steps, in the search for the best constant step
    best_log2: tuple[int, int] = (-6, 8)  # ends of its grid, around the safe step
    instances: int = 500  # random single prompts, for the bounds
    horizon: int = 400  # steps of each
    draws: tuple[int, ...] = (1, 8)  # n, orthogonal prompts of which a step draws one
    sampled_features: tuple[str, ...] = ("orthogonal", "mixed96")
    sampled_pass_rates: tuple[float, float] = (0.02, 0.5)
    group_sizes: tuple[int, ...] = (4, 16, 64)
    batch: int = 8  # prompts per sampled step, of num_prompts
    sampled_steps: int = 60
    log2_lr: tuple[int, int] = (0, 13)  # ends of the grid of learning rates
    tuning_seeds: int = 12  # choose the learning rate
    test_seeds: int = 24  # others, at the chosen one


def policies_of(
    c: Config, kind: str, pass_rates: tuple[float, float], seeds: Iterable[int]
) -> LogLinear:
    """Policies of all seeds, stacked; each has prompts of its own features."""
    sizes = dict(num_prompts=c.num_prompts, responses=c.responses, block=c.block)
    return stacked([make_prompts(kind, pass_rates, seed, **sizes) for seed in seeds])


# ---- steps to the target, exact gradients


@functools.partial(jax.jit, static_argnums=(3, 4))
def steps_to_target(
    policies: LogLinear, power: int, steps: jax.Array, target: float, limit: int
) -> jax.Array:
    """Steps [S, E, 2] until the mean and the worst pass rate reach the target.

    S policies at step sizes `steps` [S, E]; limit + 1 if not reached by then. The
    search ends when every policy has a step size that brought its worst prompt there.
    """

    def one(policy, theta, step, reached_at, t):
        now = loglinear.exact(policy, theta)
        p = now.pass_rates
        reached = jnp.stack([p.mean(), p.min()]) >= target
        reached_at = jnp.where(reached, jnp.minimum(reached_at, t), reached_at)
        weights = jnp.maximum(now.sigma, 1e-30) ** -power
        return theta + step * weights @ now.gradients, reached_at

    every = jax.vmap(jax.vmap(one, (None, 0, 0, 0, None)), (0, 0, 0, 0, None))

    def advance(state):
        theta, reached_at, t = state
        return *every(policies, theta, steps, reached_at, t), t + 1

    def searching(state):
        _, reached_at, t = state
        return (t <= limit) & ~(reached_at[..., 1] <= limit).any(1).all()

    theta = jnp.zeros((*steps.shape, policies.features.shape[-1]))
    never = jnp.full((*steps.shape, 2), limit + 1)
    return jax.lax.while_loop(searching, advance, (theta, never, jnp.array(0)))[1]


def separable(features: jax.Array) -> bool:
    """Whether some theta prefers the right response of every prompt; [P, K, D]."""
    x = np.asarray(features)
    gaps = (x[:, :1] - x[:, 1:]).reshape(-1, x.shape[-1])
    zero, one = np.zeros(gaps.shape[1]), np.ones(len(gaps))
    return optimize.linprog(zero, -gaps, -one, bounds=(None, None)).status == 0


def log_ratio(
    above: Sequence[int | None], below: Sequence[int | None]
) -> list[float] | None:
    """[mean, low, high] of the ratio over seeds, geometric; None if a seed has none."""
    if None in above or None in below:
        return None
    mean, half = t_interval(np.log(np.maximum(above, 1)) - np.log(np.maximum(below, 1)))
    return np.exp([mean, mean - half, mean + half]).tolist()


def mean_abs_cosine(policies: LogLinear) -> float:
    """Mean over seeds and pairs of prompts of |cos| between gradients at the start."""
    seeds, num_prompts, _, dim = policies.features.shape
    g = jax.vmap(loglinear.exact)(policies, jnp.zeros((seeds, dim))).gradients
    g /= jnp.linalg.norm(g, axis=-1, keepdims=True)
    cosines = jnp.einsum("spd,sqd->spq", g, g)[:, *np.triu_indices(num_prompts, 1)]
    return float(jnp.abs(cosines).mean())


def steps_row(c: Config, policies: LogLinear, chi: jax.Array, rule: str) -> dict:
    """Steps to the target at the safe step, or at the best of a grid around it.

    chi: [S] interference, which the safe step is divided by.
    """
    log2 = np.arange(c.best_log2[0], c.best_log2[1] + 1)
    limit = c.best_limit if rule == "best" else c.limit
    grid = 2.0**log2 if rule == "best" else np.ones(1)
    diameter = jax.vmap(loglinear.diameters)(policies).max(1)
    row = {"step": rule, "limit": limit, "mean": {}, "min": {}}
    row["best_log2"] = {}  # for the mean
    for power, method in enumerate(METHODS):
        steps = (loglinear.safe_step(power, diameter) / chi)[:, None] * grid
        counts = steps_to_target(policies, power, steps, c.target, limit)
        least = np.asarray(counts.min(1))  # [S, 2]
        for i, name in enumerate(("mean", "min")):
            row[name][method] = [int(x) if x <= limit else None for x in least[:, i]]
        if rule == "best":
            best = log2[np.asarray(counts)[..., 0].argmin(1)]
            row["best_log2"][method] = best.tolist()
    for name in ("mean", "min"):  # reinforce / std, std / log-odds
        row[f"{name}_ratios"] = [
            log_ratio(row[name][a], row[name][b])
            for a, b in itertools.pairwise(METHODS)
        ]
    return row


def exact_rows(c: Config) -> Iterator[dict]:
    for kind, pass_rates in itertools.product(c.features, c.pass_rates):
        policies = policies_of(c, kind, pass_rates, c.seeds)
        chi = jax.vmap(loglinear.interference)(policies)
        setting = {
            "kind": "steps",
            "features": kind,
            "pass_rates": pass_rates,
            "chi": chi.tolist(),
            "cosine": mean_abs_cosine(policies),
            "separable": [separable(x) for x in policies.features],
        }
        for rule in ("safe", "best"):
            yield setting | steps_row(c, policies, chi, rule)


# ---- sampled gradients


def advantages(method: str, rewards: jax.Array) -> jax.Array:
    """Advantages [B, G] of rewards [B, G]."""
    if method == "reinforce":
        return gj.leave_one_out_advantages(rewards)
    if method == "std":
        return gj.whitened_advantages(rewards)
    if method == "log-odds":
        return gj.whitened_advantages(rewards) * gj.inverse_std(rewards)[:, None]
    raise ValueError(f"method must be one of {METHODS}, got {method}.")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(
    c: Config,
    method: str,
    group: int,
    policies: LogLinear,
    lrs: np.ndarray,
    keys: jax.Array,
) -> jax.Array:
    """Mean pass rate [E, S] after training each of S policies at E learning rates."""

    def run(lr, policy, key):
        def one(theta, key):
            key_x, key_y = jax.random.split(key)
            x = jax.random.permutation(key_x, c.num_prompts)[: c.batch]
            features = policy.features[x]
            logits = features @ theta + policy.offsets[x]
            y = jax.random.categorical(key_y, logits, shape=(group, c.batch)).T
            a = advantages(method, jnp.take_along_axis(policy.rewards[x], y, 1))
            chosen = jax.nn.one_hot(y, c.responses)
            # The advantages of a group sum to 0, so the mean score drops out.
            gradient = jnp.einsum("bg,bgk,bkd->d", a, chosen, features)
            return theta + lr * gradient / (c.batch * group), None

        theta = jnp.zeros(policy.features.shape[-1])
        theta, _ = jax.lax.scan(one, theta, jax.random.split(key, c.sampled_steps))
        return loglinear.exact(policy, theta).pass_rates.mean()

    return jax.vmap(jax.vmap(run, (None, 0, 0)), (0, None, None))(lrs, policies, keys)


def sampled_rows(c: Config) -> Iterator[dict]:
    log2 = np.arange(c.log2_lr[0], c.log2_lr[1] + 1)
    seeds = np.arange(c.tuning_seeds + c.test_seeds)
    for kind, group in itertools.product(c.sampled_features, c.group_sizes):
        policies = policies_of(c, kind, c.sampled_pass_rates, seeds)
        keys = jax.random.split(jax.random.key(group), len(seeds))
        row = {"kind": "sampled", "features": kind, "group_size": group}
        finals = {}
        for method in METHODS:
            rates = np.asarray(train(c, method, group, policies, 2.0**log2, keys))
            best, finals[method] = tune_then_test(rates, c.tuning_seeds)
            row[method] = t_interval(finals[method]) + (int(log2[best]),)
        for method in METHODS[1:]:
            gain = paired_gain(finals[method], finals["reinforce"])
            row[f"{method}_less_reinforce"] = gain
        yield row


def experiment(c: Config) -> Iterator[dict]:
    """The rows of metrics.jsonl."""
    yield from exact_rows(c)
    singles = random_prompts(c.instances, c.responses, c.block)
    yield from bound_rows(singles, c.horizon, c.draws)
    yield counterexample()
    yield from sampled_rows(c)


def plot_steps(axis, rows: list[dict]) -> None:
    """Draws a dot per seed; above the line, how many did not reach the target."""
    features = list(dict.fromkeys(r["features"] for r in rows))
    top, rng = 2.5 * max(r["limit"] for r in rows), np.random.default_rng(0)
    for row, (i, method) in itertools.product(rows, enumerate(METHODS)):
        best = row["step"] == "best"
        at = features.index(row["features"]) + (i - 1) * 0.27 + (best - 0.5) * 0.1
        y = np.array(row["mean"][method], float)  # None becomes NaN
        x = at + rng.uniform(-0.03, 0.03, len(y))
        face = "none" if best else f"C{i}"
        label = (
            f"{method}, {row['step']} step" if row["features"] == features[0] else ""
        )
        axis.scatter(x, y, s=16, lw=0.8, ec=f"C{i}", fc=face, label=label or None)
        if lost := np.isnan(y).sum():
            height = top * (2.2 if best else 1)
            axis.text(at, height, lost, color=f"C{i}", ha="center", fontsize=8)
    low, high = rows[0]["pass_rates"]
    name = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    axis.axhline(top * 0.7, color="k", lw=0.6)
    axis.set(title=f"Exact gradients, p0 = {name}", yscale="log", ylim=(0.7, top * 6))
    axis.set(
        xlabel="above the line: seeds that fail, safe step (below) and best (above)"
    )
    axis.set(ylabel="steps to the target, mean pass rate")
    axis.set_xticks(range(len(features)), features)


def plot_bounds(axis, bounds: list[dict]) -> None:
    """Draws the median and the worst tightness of each bound."""
    median, worst = ([r[k] for r in bounds] for k in ("median", "worst"))
    y = range(len(bounds))
    axis.hlines(y, median, worst, color="C0", lw=1)
    axis.plot(median, y, "o", color="C0", ms=5, label="median")
    axis.plot(worst, y, "x", color="C3", ms=6, label="worst")
    axis.axvline(1, color="k", lw=0.8)
    axis.set(title="Bounds on random runs", xscale="log")
    axis.set(xlabel="smaller side / larger side (1: attained, above: violated)")
    axis.set_yticks(y, [f"{r['name']}, n = {r['n']}" for r in bounds], fontsize=8)


def plot(results: Path) -> None:
    plt.switch_backend("Agg")
    rows = read_lines(results / "metrics.jsonl")

    def some(**fields):
        return [r for r in rows if all(r[k] == v for k, v in fields.items())]

    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    starts = {str(r["pass_rates"]): r["pass_rates"] for r in some(kind="steps")}
    for axis, start in zip(axes[0], starts.values(), strict=False):
        plot_steps(axis, some(kind="steps", pass_rates=start))
    axes[0, 0].legend(loc="best", frameon=False, fontsize=8)
    example, tight, sampled = axes[1]
    (row,) = some(kind="counterexample")
    for name, label in (("sum", "sum"), ("t_min", "T x min"), ("bound", "bound")):
        style = "k--" if name == "bound" else "-"
        example.plot(row["t"], row[name], style, label=label)
    example.axvline(row["first"], color="k", lw=0.6)
    title = f"Theorem 3.2, one prompt: fails as a sum from T = {row['first']}"
    example.set(title=title, xlabel="steps T", ylabel="squared gradients")
    example.set(xscale="log", yscale="log")
    plot_bounds(tight, some(kind="bound")[::-1])
    kinds = list(dict.fromkeys(r["features"] for r in some(kind="sampled")))
    for (j, kind), i in itertools.product(enumerate(kinds), (1, 2)):
        of_kind = some(kind="sampled", features=kind)
        gains = [r[f"{METHODS[i]}_less_reinforce"] for r in of_kind]
        mean, half = np.transpose(gains)
        sizes = [r["group_size"] for r in of_kind]
        line = dict(color=f"C{i}", fmt="o-" if j else "o--", capsize=3, ms=4)
        x = np.array(sizes) * 1.04 ** (2 * j + i - 2)
        sampled.errorbar(x, mean, half, label=f"{METHODS[i]}, {kind}", **line)
    sampled.axhline(0, color="k", lw=0.8)
    sampled.set(xscale="log", xlabel="group size", xticks=sizes, xticklabels=sizes)
    sampled.set(title="Sampled, tuned: gain over REINFORCE, 95%")
    sampled.set(ylabel="difference of mean pass rates")
    sampled.minorticks_off()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.legend(loc="best", frameon=False, fontsize=9)
    figure.savefig(results / "plot.png", dpi=100)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(seeds=(0, 1), features=("orthogonal", "mixed96"), limit=1500)
        few |= dict(pass_rates=((0.5, 0.5), (0.02, 0.5)), best_limit=100)
        few |= dict(instances=40, horizon=100, best_log2=(-1, 2), sampled_steps=20)
        few |= dict(group_sizes=(4, 16), log2_lr=(3, 6), tuning_seeds=2, test_seeds=3)
        c = dataclasses.replace(c, sampled_features=("orthogonal",), **few)
    if not c.plot_only:
        write_config(c.results, c)
        with jax.enable_x64(True):
            write_rows(c.results / "metrics.jsonl", experiment(c))
    plot(c.results)


if __name__ == "__main__":
    main(tyro.cli(Config))
