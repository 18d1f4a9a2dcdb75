"""Do 95 % intervals of pass rates cover, where successes are rare? A simulation.

Question (ours): how often `rate_interval` and the intervals it replaced cover the mean
pass rate of the prompts' distribution, and how wide they are.

    python experiments/interval_coverage.py [--smoke]

Setting: n prompts with rates that are equal, Beta with a + b = 20, 1 or .3, or .9 for a
few and 0 for the others; K outcomes of each, or the exact rates. Compared: a percentile
bootstrap over prompts (Wilson's interval where K is 1 or all rates are 0 or 1), the
normal interval cut to [0, 1], and `rate_interval`. Apart: rates of .02 and for one
prompt in 32 of .9, which a small sample may lack; and Student's interval over five
seeds' rates, each of n prompts.
Hardware and time: one CPU core, 4 minutes (--smoke: 5 seconds).

Expected: 95 %, or more, where the rates have a beta distribution.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro
from common import write_config, write_rows, write_table

from grpo_jax.intervals import rate_interval, t_interval

EXACT = 0  # samples a prompt: its rate itself
RARE = "one prompt in 32"


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/interval_coverage")
    smoke: bool = False  # 100 repeats, 2 numbers of prompts, 2 of samples
    repeats: int = 1000
    prompts: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    samples: tuple[int, ...] = (1, 4, 16, EXACT)
    rates: tuple[float, ...] = (0.005, 0.05, 0.5, 0.95)
    resamples: int = 500  # of the bootstrap
    seed: int = 0


# ---- distributions of pass rates


def beta(total: float) -> Callable[[np.random.Generator, float, int], np.ndarray]:
    return lambda rng, p, n: rng.beta(p * total, (1 - p) * total, n)


DISTRIBUTIONS = {
    "equal": lambda rng, p, n: np.full(n, p),
    "beta, 20": beta(20),
    "beta, 1": beta(1),
    "beta, .3": beta(0.3),
    "0 or .9": lambda rng, p, n: np.where(rng.random(n) < p / 0.9, 0.9, 0.0),
}


def rare(rng: np.random.Generator, n: int) -> tuple[np.ndarray, float]:
    """(rates [n], their mean): a kind of prompt that samples of a few lack."""
    return np.where(rng.random(n) < 1 / 32, 0.9, 0.02), 0.02 + 0.88 / 32


def outcomes(rng: np.random.Generator, rates: np.ndarray, samples: int) -> np.ndarray:
    return rates if samples == EXACT else rng.binomial(samples, rates) / samples


# ---- intervals


def bootstrap(x: np.ndarray, rng: np.random.Generator, resamples: int) -> list[float]:
    """Percentiles of resampled means; Wilson's interval where there is no spread."""
    n, mean = len(x), x.mean()
    if set(x) <= {0.0, 1.0}:
        z = 1.96
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        variance = mean * (1 - mean) / n + z * z / (4 * n * n)
        half = z / (1 + z * z / n) * variance**0.5
        return [centre - half, centre + half]
    means = x[rng.integers(n, size=(resamples, n))].mean(1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def normal(x: np.ndarray) -> list[float]:
    half = 1.96 * x.std(ddof=1) / len(x) ** 0.5
    return [max(0.0, x.mean() - half), min(1.0, x.mean() + half)]


METHODS = ("bootstrap", "normal", "ours")


def intervals(x: np.ndarray, rng: np.random.Generator, c: Config) -> np.ndarray:
    """[METHODS, 2] ends of the intervals of one sample."""
    return np.array([bootstrap(x, rng, c.resamples), normal(x), rate_interval(x)[1:]])


# ---- the simulation


def coverage(ends: np.ndarray, mean: float) -> dict[str, float]:
    """Share of [N, 2] ends that cover the mean, and their mean width."""
    low, high = ends.T
    inside = (low <= mean + 1e-9) & (mean - 1e-9 <= high)
    return {"covers": float(inside.mean()), "width": float((high - low).mean())}


def cells(c: Config) -> Iterator[tuple[str, int, float]]:
    for samples in c.samples:
        for name in DISTRIBUTIONS:
            if (name == "equal" and samples == EXACT) or (
                name != "equal" and samples == 1  # outcomes are the same for all
            ):
                continue
            for p in c.rates:
                if not (name == "0 or .9" and p > 0.9):
                    yield name, samples, p


def simulate(c: Config) -> Iterator[dict]:
    rng = np.random.default_rng(c.seed)
    for name, samples, p in cells(c):
        for n in c.prompts:
            ends = []
            for _ in range(c.repeats):
                x = outcomes(rng, DISTRIBUTIONS[name](rng, p, n), samples)
                ends.append(intervals(x, rng, c))
            row = {"kind": "grid", "rates": name, "samples": samples, "p": p, "n": n}
            for i, method in enumerate(METHODS):
                row[method] = coverage(np.array(ends)[:, i], p)
            yield row
    for n in c.prompts:
        for samples in (4, EXACT):
            drawn = [rare(rng, n) for _ in range(c.repeats)]
            ends = [intervals(outcomes(rng, x, samples), rng, c) for x, _ in drawn]
            row = {"kind": RARE, "samples": samples, "n": n}
            for i, method in enumerate(METHODS):
                row[method] = coverage(np.array(ends)[:, i], drawn[0][1])
            yield row
        for p in c.rates:
            seeds = rng.binomial(n, p, (c.repeats, 5)) / n
            mean, half = np.transpose([t_interval(x) for x in seeds])
            ends = np.stack([mean - half, mean + half], 1)
            yield {"kind": "seeds", "n": n, "p": p, "student": coverage(ends, p)}


# ---- the table


def table(c: Config, rows: list[dict]) -> str:
    """Markdown: worst and mean coverage over distributions and samples a prompt."""
    lines = [
        "Coverage: the lowest over distributions and samples a prompt / the mean. "
        "Width: the mean of ours over that of outcomes as many as prompts.",
        "",
        "| p | n | bootstrap, Wilson | normal | ours | width |",
        "|---|---|---|---|---|---|",
    ]
    for p in c.rates:
        for n in c.prompts:
            same = [
                r for r in rows if r["kind"] == "grid" and (r["p"], r["n"]) == (p, n)
            ]
            outcome = next(r["ours"]["width"] for r in same if r["samples"] == 1)
            shown = [[r[m]["covers"] for r in same] for m in METHODS]
            text = [f"{min(x):.3f} / {np.mean(x):.3f}" for x in shown]
            width = np.mean([r["ours"]["width"] for r in same]) / outcome
            lines.append(f"| {p:g} | {n} | {' | '.join(text)} | {width:.2f} |")
    lines += ["", f"Rates .02, and .9 for {RARE}:", ""]
    for row in rows:
        if row["kind"] == RARE:
            text = ", ".join(f"{m} {row[m]['covers']:.3f}" for m in METHODS)
            each = f"{row['samples']} samples" if row["samples"] else "exact rates"
            lines.append(f"* {row['n']} prompts, {each}: {text}")
    lines += [
        "",
        "Student's interval over five seeds, each of n prompts of rate p:",
        "",
    ]
    for p in c.rates:
        text = ", ".join(
            f"{r['student']['covers']:.3f} ({r['n']})"
            for r in rows
            if r["kind"] == "seeds" and r["p"] == p
        )
        lines.append(f"* p = {p:g}: {text}")
    return "\n".join(lines)


def main(c: Config) -> None:
    if c.smoke:
        c = dataclasses.replace(
            c, repeats=100, prompts=(16, 64), samples=(1, 16, EXACT)
        )
    write_config(c.results, c)
    rows = []

    def kept() -> Iterator[dict]:
        for row in simulate(c):
            rows.append(row)
            yield row

    write_rows(c.results / "metrics.jsonl", kept())
    write_table(c.results, table(c, rows))


if __name__ == "__main__":
    main(tyro.cli(Config))
