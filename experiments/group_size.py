"""How many samples per prompt: the U-statistic law of the group gradient's error.

Paper: Zhou et al. 2026, arXiv:2603.01162 (the leave-one-out gradient is a U-statistic;
Proposition 3 and Theorem 7: the best group size at fixed N), with exact constants.
Claim: B prompts x G samples have MSE = c1/B + c2/(BG) + c3/(BG(G-1)), with no
remainder, so at fixed N = BG it is least at G* = 1 + sqrt(c3 / c1), whatever N is.

    python experiments/group_size.py [--smoke] [--plot-only] [--results DIR]

Setting: a log-linear policy over 64 responses, 8 correct, pass rates .05 to .9, where
the constants are finite sums. `spread` moves c1: the share of feature variance that
prompts do not share. 9 pools (3 seeds x 3 spreads), 11 group sizes, 20,000 gradients
each. Hardware and time: 2 CPU cores, 1 minute (--smoke: 12 s, mostly compilation).

Expected: the enumerated MSEs to rounding; chi2 near its count; the intervals cover G*.
Got (2026-11-21):
* One prompt, all groups: 15 cases agree to 2e-13. Sampled, G = 8 to 64: 12 cases, chi2
  9.1, within 0.8% (standard errors 0.3 to 1.1%).
* Minibatches: 99 cells, chi2 107.6, no parameter fitted; standard errors 0.2 to 0.4%.
  The worst cell is 4.1 standard errors (1.1%) low, by chance: 400,000 other gradients
  put it at -0.04% +- 0.06%.
* Best G, law against fitted to the measured MSEs with c1, c2, c3 free (95% interval),
  by seed. The law is in all 9 intervals; sqrt(c3 / c1), the paper's, is in none.
      spread 1      5.46: 5.48 [5.45, 5.50]        5.01: 5.03 [5.01, 5.05]
                    5.42: 5.41 [5.39, 5.43]
      spread .1     10.25: 10.29 [10.22, 10.35]    9.74: 9.72 [9.67, 9.78]
                    10.94: 10.93 [10.85, 11.00]
      spread .01    14.20: 14.10 [13.94, 14.26]    12.81: 12.80 [12.68, 12.92]
                    13.34: 13.31 [13.18, 13.44]
  The best divisor of N as measured is the exact one in 7 of 9; in the other two it is
  the neighbour across the minimum (8 for 12, 12 for 8), 0.4 and 0.04% above it, noise
  0.3%. The minimum is flat: MSE is up 0.04 to 1.4% at sqrt(c3 / c1), 4 to 17% at half
  or twice G*.
* Std-normalised: at G = 2, 3 a rescale by sqrt(G - 1), group by group. From G = 4 on
  its mean turns from the gradient: 7.2 to 12.4 degrees at G = 64 and spread 1, .58 to
  .85 at .1, .16 to .26 at .01. It climbs another objective, the more so the larger G.
  Its MSE over its mean's square, relative to leave-one-out's: 1.03 to 1.06 at G = 12
  and spread 1; .80 to .89 at G = 64 and spread .1 or .01. It has more noise within
  prompts, but less between prompts whose gradients differ in length only; there
  (spread .01) its best divisor is 24, where leave-one-out's is 12 to 16.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import write_config, write_rows

import grpo_jax as gj
from grpo_jax.runs.lines import read_lines


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/group_size")  # where the three files go
    smoke: bool = False  # one pool, fewer group sizes and repeats
    plot_only: bool = False  # redraw plot.png from metrics.jsonl
    seeds: tuple[int, ...] = (0, 1, 2)  # a pool of prompts each
    spreads: tuple[float, ...] = (1.0, 0.1, 0.01)  # feature variance not shared
    num_prompts: int = 32  # in the pool; a minibatch draws from it with replacement
    responses: int = 64  # per prompt
    correct: int = 8  # of them, with reward 1
    dim: int = 32  # of the features, so of the gradient
    pass_rates: tuple[float, float] = (0.05, 0.9)  # ends of an even grid of log-odds
    samples: int = 192  # N = batch * group_size, held fixed
    group_sizes: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # divide N
    repeats: int = 20_000  # gradients per group size
    chunk: int = 250  # of them at a time, for memory
    bootstrap: int = 4_000  # resamples behind the interval of a fitted minimiser
    single_group_sizes: tuple[int, ...] = (8, 16, 32, 64)  # one prompt, sampled
    small_group_sizes: tuple[int, ...] = (2, 3, 4, 5, 6)  # one prompt, enumerated
    small_responses: int = 5  # of an enumerated prompt, 2 of them correct


class Pool(NamedTuple):
    """Prompts under one log-linear policy, softmax(features . theta + offset)."""

    probs: np.ndarray  # [P, K], over K responses
    rewards: np.ndarray  # [P, K], 0 or 1
    scores: np.ndarray  # [P, K, D], gradients of the log probs


def make_pool(c: Config, seed: int, spread: float) -> Pool:
    rng = np.random.default_rng(seed)
    shape = c.responses, c.dim
    shared, each = rng.normal(size=shape), rng.normal(size=(c.num_prompts, *shape))
    x = (np.sqrt(1 - spread) * shared + np.sqrt(spread) * each) / np.sqrt(c.dim)
    good = np.arange(c.responses) < c.correct
    weights = np.exp(x @ rng.normal(size=c.dim))
    # An offset on the correct responses sets each prompt's pass rate.
    odds = np.geomspace(*(p / (1 - p) for p in c.pass_rates), c.num_prompts)
    odds = rng.permutation(odds) * weights[:, ~good].sum(1) / weights[:, good].sum(1)
    weights[:, good] *= odds[:, None]
    probs = weights / weights.sum(1, keepdims=True)
    scores = x - np.einsum("pk,pkd->pd", probs, x)[:, None]
    return Pool(probs, np.tile(good * 1.0, (c.num_prompts, 1)), scores)


def prompt_gradients(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """Pass rates [P] and exact gradients [P, D]."""
    p = (pool.probs * pool.rewards).sum(1)
    centred = pool.probs * (pool.rewards - p[:, None])
    return p, np.einsum("pk,pkd->pd", centred, pool.scores)


def constants(pool: Pool) -> list[float]:
    """c1, c2, c3 of the law: variance between prompts, within them under an oracle
    baseline, and what estimating the baseline adds."""
    p, g = prompt_gradients(pool)
    norm2, g2 = (pool.scores**2).sum(2), (g**2).sum(1)
    c1 = ((g - g.mean(0)) ** 2).sum(1)
    c2 = (pool.probs * (pool.rewards - p[:, None]) ** 2 * norm2).sum(1) - g2
    c3 = p * (1 - p) * (pool.probs * norm2).sum(1) + g2
    return [float(c.mean()) for c in (c1, c2, c3)]


expected_std = jax.jit(gj.expected_group_std, static_argnums=1)


def exact(pool: Pool, batch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Means [2, D] and MSEs [2] of the gradient: leave-one-out, then std."""
    c1, c2, c3 = constants(pool)
    loo_mse = c1 / batch + c2 / (batch * group) + c3 / (batch * group * (group - 1))
    p, g = prompt_gradients(pool)
    delta = g / (p * (1 - p))[:, None]  # E[score | correct] - E[score | wrong]
    std = np.asarray(expected_std(p, group))[:, None] * delta
    # E|std-normalised prompt gradient|^2, by conditioning on the number of successes.
    second = (group - 1) / group * p * (1 - p) * (delta**2).sum(1)
    for z, rate in ((1, p), (0, 1 - p)):
        conditional = pool.probs * (pool.rewards == z) / rate[:, None]
        centre = np.einsum("pk,pkd->pd", conditional, pool.scores)[:, None]
        variance = (conditional * ((pool.scores - centre) ** 2).sum(2)).sum(1)
        second += (1 - rate - (1 - rate) ** group) * variance / group
    means = np.stack([g.mean(0), std.mean(0)])
    return means, np.array([loo_mse, (second.mean() - means[1] @ means[1]) / batch])


@jax.jit
def advantages(rewards: jax.Array) -> jax.Array:
    """Advantages [2, ..., G] of rewards [..., G]: leave-one-out, then std."""
    std = gj.whitened_advantages(rewards, eps=0.0)
    return jnp.stack([gj.leave_one_out_advantages(rewards), std])


def enumerate_groups(pool: Pool, group: int) -> dict:
    """The row of a pool with a single prompt, from all K^G groups."""
    y = np.array(list(itertools.product(range(pool.probs.shape[1]), repeat=group)))
    a = np.asarray(advantages(pool.rewards[0, y]))
    gradients = np.einsum("arn,rnd->rad", a, pool.scores[0, y]) / group
    means, mse = exact(pool, 1, group)
    errors = pool.probs[0, y].prod(1) @ ((gradients - means) ** 2).sum(-1)
    row = {"group_size": group, "measured": errors.tolist(), "exact": mse.tolist()}
    # Zero at G = 2 and 3: there std only rescales each group, by sqrt(G - 1).
    return row | {"not_a_rescale": float(abs(a[1] - np.sqrt(group - 1) * a[0]).max())}


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def squared_errors(
    c: Config, pool: Pool, means: np.ndarray, batch: int, group: int, stream: int
) -> jax.Array:
    """|minibatch gradient - mean|^2 [repeats, 2], prompts and responses sampled.

    means: [2, D] of leave-one-out and of std; stream: seed of the random key.
    """
    num_prompts, responses, dim = pool.scores.shape
    cdf = jnp.cumsum(pool.probs, 1).at[:, -1].set(1.0)
    cdf = (cdf + jnp.arange(num_prompts)[:, None]).ravel()

    def chunk_errors(key):
        key_x, key_u = jax.random.split(key)
        x = jax.random.randint(key_x, (c.chunk * batch, 1), 0, num_prompts)
        u = jax.random.uniform(key_u, (c.chunk * batch, group))
        y = jnp.searchsorted(cdf, x + u, side="right")  # x * K + response
        y = jnp.minimum(y, (x + 1) * responses - 1)
        a = advantages(pool.rewards.ravel()[y]).reshape(2, c.chunk, -1)
        scores = pool.scores.reshape(-1, dim)[y].reshape(c.chunk, -1, dim)
        gradients = jnp.einsum("arn,rnd->rad", a, scores) / (batch * group)
        return ((gradients - means) ** 2).sum(-1)

    key = jax.random.fold_in(jax.random.key(stream), group)
    keys = jax.random.split(key, c.repeats // c.chunk)
    return jax.lax.map(chunk_errors, keys).reshape(-1, 2)


def measure(
    c: Config,
    pool: Pool,
    sizes: Sequence[int],
    stream: int,
    samples: int | None = None,
) -> dict:
    """A row from sampled gradients, lists over group sizes: leave-one-out, then std.

    The minibatch has samples / group_size prompts, or one if `samples` is None.
    """
    on_device = Pool(*map(jnp.asarray, pool))
    columns = []
    for group in sizes:
        batch = samples // group if samples else 1
        means, mse = exact(pool, batch, group)
        errors = squared_errors(c, on_device, means, batch, group, stream)
        se = np.std(errors, 0) / np.sqrt(len(errors))
        norm = np.linalg.norm(means, axis=1)
        angle = np.degrees(np.arccos(min(1.0, means[0] @ means[1] / norm.prod())))
        columns.append((np.mean(errors, 0), se, mse, norm**2, angle))
    names = "measured", "se", "exact", "mean_norm2", "angle"
    arrays = (np.array(x).T.tolist() for x in zip(*columns, strict=True))
    return {"group_sizes": list(sizes)} | dict(zip(names, arrays, strict=True))


def summarise(c: Config, pool: Pool, row: dict) -> dict:
    """The row with the minimum of its measured curve and the fit of the exact one."""
    group = np.array(row["group_sizes"])
    measured, se, mse = (np.array(row[k]) for k in ("measured", "se", "exact"))
    # N * MSE = c1 G + c2 + c3 / (G - 1), all three free; resampled within the errors.
    noise = np.random.default_rng(0).normal(size=(c.bootstrap, len(group))) * se[0]
    curves = np.vstack([measured[0], measured[0] + noise])
    design = np.stack([group, np.ones(len(group)), 1 / (group - 1)], 1)
    fits = np.linalg.lstsq(design / se[0][:, None], (curves / se[0]).T)[0]
    fitted = 1 + np.sqrt(fits[2] / fits[0])
    relative = mse / np.array(row["mean_norm2"])
    c1, c2, c3 = constants(pool)
    return row | {
        "constants": [c1, c2, c3],
        "law": 1 + np.sqrt(c3 / c1),
        "fitted": fitted[0],
        "interval": np.quantile(fitted[1:], (0.025, 0.975)).tolist(),
        "best_measured": int(group[measured[0].argmin()]),
        "best_exact": int(group[mse[0].argmin()]),
        "std_best_exact": int(group[relative[1].argmin()]),
        "std_noise": (relative[1] / relative[0]).tolist(),
        "chi2": (((measured - mse) / se) ** 2).sum(1).tolist(),
    }


def experiment(c: Config) -> Iterator[dict]:
    """The rows of metrics.jsonl; every row has a random stream of its own."""
    few = dataclasses.replace(c, num_prompts=3)
    tiny = dataclasses.replace(few, responses=c.small_responses, correct=2)
    for i in range(few.num_prompts):
        small = Pool(*(a[i : i + 1] for a in make_pool(tiny, 0, 1.0)))
        for group in c.small_group_sizes:
            yield {"kind": "enumerated"} | enumerate_groups(small, group)
        large = Pool(*(a[i : i + 1] for a in make_pool(few, 0, 1.0)))
        yield {"kind": "one prompt"} | measure(c, large, c.single_group_sizes, i)
    for stream, (seed, spread) in enumerate(itertools.product(c.seeds, c.spreads), 3):
        pool = make_pool(c, seed, spread)
        row = measure(c, pool, c.group_sizes, stream, c.samples)
        label = {"kind": "pool", "seed": seed, "spread": spread}
        yield label | summarise(c, pool, row)


def plot(results: Path) -> None:
    plt.switch_backend("Agg")
    rows = read_lines(results / "metrics.jsonl")
    pools = [r for r in rows if r["kind"] == "pool"]
    spreads = sorted({r["spread"] for r in pools}, reverse=True)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    curve, minimum, noise, angle = axes.ravel()
    for pool in pools:
        g, first = pool["group_sizes"], pool["seed"] == pools[0]["seed"]
        color = f"C{spreads.index(pool['spread'])}"
        line = dict(color=color, label=f"spread {pool['spread']:g}" if first else None)
        noise.plot(g, pool["std_noise"], ".-", lw=1, **line)
        angle.plot(g, pool["angle"], ".-", lw=1, **line)
        bar = np.abs(np.array(pool["interval"]) - pool["fitted"])[:, None]
        minimum.errorbar(
            pool["law"], pool["fitted"], bar, fmt=".", capsize=3, color=color
        )
        if first:
            value, se, law = (np.array(pool[k][0]) for k in ("measured", "se", "exact"))
            curve.errorbar(g, value / law.min(), 2 * se / law.min(), fmt=".", **line)
            curve.plot(g, law / law.min(), lw=1, color=color)
            curve.axvline(pool["law"], lw=1, ls=":", color=color)
    ends = np.array(
        [min(r["law"] for r in pools) - 1, max(r["law"] for r in pools) + 1]
    )
    minimum.plot(ends, ends, "k-", lw=1, label="1 + sqrt(c3 / c1)")
    minimum.plot(ends, ends - 1, "k--", lw=1, label="sqrt(c3 / c1)")
    minimum.set(title="Best group size", xlabel="1 + sqrt(c3 / c1)", ylabel="measured")
    curve.set(title="MSE at fixed N / its minimum: measured (points), law")
    noise.set(title="Relative MSE, std-normalised / leave-one-out")
    angle.set(title="Std-normalised mean to gradient, degrees")
    for axis in (curve, noise, angle):
        ticks = (2, 4, 8, 16, 32, 64)
        axis.set(xscale="log", xlabel="group size", xticks=ticks, xticklabels=ticks)
        axis.minorticks_off()
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
        axis.legend(loc="best", frameon=False)
    figure.savefig(results / "plot.png", dpi=120)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(seeds=(0,), spreads=(0.1,), single_group_sizes=(16,), repeats=4000)
        sizes = dict(group_sizes=(2, 6, 12, 48), small_group_sizes=(2, 3, 4))
        c = dataclasses.replace(c, **few, **sizes)
    if any(c.samples % g for g in c.group_sizes) or c.repeats % c.chunk:
        raise ValueError(
            "group_sizes must divide samples and chunk repeats, got "
            f"{c.group_sizes}, {c.samples}, {c.chunk}, {c.repeats}; change one of them."
        )
    if not c.plot_only:
        write_config(c.results, c)
        with jax.enable_x64(True):
            write_rows(c.results / "metrics.jsonl", experiment(c))
    plot(c.results)


if __name__ == "__main__":
    main(tyro.cli(Config))
