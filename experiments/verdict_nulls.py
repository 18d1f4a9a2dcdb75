"""How often does the report name a direction where there is none? A simulation.

Question (ours): rates of wrong sentences ("interference helps / hurts them", "C is
below 1", "the pass rate rose / fell", kinds of interference, a mean cosine that is not
0) on nulls, beside the rules that they replaced.

    python experiments/verdict_nulls.py [--smoke]

Setting: prompts with pass rates log-uniform in .02 to .98 and gradients along
orthogonal directions (other cosines where said), of lognormal length; groups of 16 in
4 parts, rewards drawn. Scores of a prompt's samples add noise: "many" directions, or
"few" (5) that all prompts share, normal, t3 or exponential. Runs of 1 to 20
measurements. Before: the sign of the mean effect where the estimate of |g|^2 is above
0; the sign of C - 1 as estimated; bootstrap intervals that do not overlap.
Hardware and time: one CPU core, 20 minutes (--smoke: 10 seconds).

Expected: each direction wrong in at most 2.5 % of runs, both in at most 5 %.
Got (2026-11-28): helps or hurts .044 on average over 20 settings with orthogonal
gradients (largest .075, +- .02), before: "helps" in .25 to .67 and else "hurts"; C .002
(before .45); rose or fell never. With cosines of .1 "helps" in .01 (8 prompts, one
measurement) to 1.00 (32 prompts).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from common import write_config, write_rows, write_table
from interval_coverage import bootstrap

from grpo_jax.diagnostics.geometry import PromptGeometry, parts_geometry
from grpo_jax.diagnostics.phases import phase
from grpo_jax.intervals import rate_interval
from grpo_jax.report.instrument_text import rate_factor_interval, sampled_kind
from grpo_jax.report.interference import effect_on_hard

GROUP, PARTS, WIDTH, FEW = 16, 4, 256, 5
NOISE = 3.0  # length of a score's noise, relative to a mean difference of 1
NOISES = ("many", "few", "few, t3", "few, exponential")


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/verdict_nulls")
    smoke: bool = False  # 40 runs, one noise, one size
    runs: int = 400  # simulated, of each setting
    sizes: tuple[tuple[int, int], ...] = (  # probe prompts, measurements
        (8, 1), (8, 5), (8, 20), (32, 5), (32, 20),
    )  # fmt: skip
    noises: tuple[str, ...] = NOISES
    seed: int = 0


# ---- simulated measurements


def directions(prompts: int, cosine: float, *, mixed: bool = False) -> np.ndarray:
    """[P, WIDTH] unit vectors of this cosine, or of + and - it in halves."""
    unit = np.zeros((prompts, WIDTH))
    unit[np.arange(prompts), np.arange(prompts)] = (1 - cosine) ** 0.5
    unit[:, prompts] = cosine**0.5
    if mixed:
        unit[::2, prompts] *= -1
    return unit


def part_noise(rng: np.random.Generator, weights: np.ndarray, noise: str) -> np.ndarray:
    """[N, P, H, WIDTH] sums of weights [N, P, H, n] times noise of scores."""
    width = WIDTH if noise == "many" else FEW
    if noise == "few, exponential":
        scores = rng.exponential(size=(*weights.shape, width)) - 1
        total = np.einsum("...n,...nd->...d", weights, scores)
    else:
        if noise == "few, t3":
            weights = weights * (rng.chisquare(3, weights.shape) / 3) ** -0.5 / 3**0.5
        length = np.sqrt((weights**2).sum(-1, keepdims=True))
        total = length * rng.normal(size=(*weights.shape[:-1], width))
    padding = [(0, 0)] * 3 + [(WIDTH - width, 0)]
    return np.pad(NOISE / width**0.5 * total, padding)


def measured(
    rng: np.random.Generator, rates: np.ndarray, mean: np.ndarray, noise: str, n: int
) -> tuple[PromptGeometry, np.ndarray]:
    """(geometry, rewards [N, P, G]) of n measurements.

    mean: [P, WIDTH] difference of right and wrong samples' mean scores; the gradient is
        p (1 - p) times it.
    """
    rewards = (rng.random((n, len(rates), GROUP)) < rates[:, None]).astype(np.float32)
    parts = rewards.reshape(n, len(rates), PARTS, -1)
    weights = (parts - parts.mean(-1, keepdims=True)) / (parts.shape[-1] - 1)
    signal = (weights * (parts - rates[:, None, None])).sum(-1)  # [N, P, H]
    vectors = signal[..., None] * mean[:, None] + part_noise(rng, weights, noise)
    return jax.device_get(_geometry(rewards, vectors.astype(np.float32))), rewards


_geometry = jax.jit(jax.vmap(parts_geometry))


def as_rows(geometry: PromptGeometry, rewards: np.ndarray) -> list[Any]:
    """The fields of instrument.jsonl's rows that sentences read."""
    names = ("cosines", "squared_norms", "raw_squared_norms")
    fields = zip(*(getattr(geometry, name) for name in names), strict=True)
    return [
        {
            "exact": None,
            "pass_rate": None,
            "group_mean": r.mean(1),
            "sigma": r.std(1, ddof=1),
            "geometry": dict(zip(names, field, strict=True)),
        }
        for field, r in zip(fields, rewards, strict=True)
    ]


def drawn_prompts(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, ...]:
    """(pass rates, lengths of the mean differences), each [P]."""
    logits = np.log(0.02) + rng.random(prompts) * np.log(0.5 / 0.02)
    rates = np.exp(logits)
    easy = rng.random(prompts) < 0.3
    return np.where(easy, 1 - rates, rates), np.exp(rng.normal(size=prompts) / 2)


# ---- sentences


def helps_before(geometry: PromptGeometry, rewards: np.ndarray) -> bool:
    """Mean first-order effect above 0, where the estimate of |g|^2 is."""
    squares = np.nan_to_num(geometry.squared_norms)
    off = geometry.inner * ~np.eye(squares.shape[1], dtype=bool)
    total = np.nan_to_num(off).sum((1, 2)) + squares.sum(1)
    others = (
        np.nan_to_num(off).sum(2) / np.sqrt(np.where(total > 0, total, np.nan))[:, None]
    )
    mean = rewards.mean(2)
    hard = (mean < 1 / 3) & (rewards.std(2) > 0) & np.isfinite(others)
    return bool(others[hard].mean() > 0) if hard.any() else False


def interference(c: Config, rng: np.random.Generator) -> Iterator[dict]:
    """Shares of runs with each sentence on hard prompts, of orthogonal gradients, of
    signs at random (wrong: against the true sum), and of a common direction."""
    for noise in c.noises:
        for prompts, n in c.sizes:
            for name, cosine, mixed in (
                ("orthogonal", 0.0, False),
                ("mixed signs, .1", 0.1, True),
                ("all .1", 0.1, False),
            ):
                unit = directions(prompts, cosine, mixed=mixed)
                helps = hurts = before = wrong = 0
                for _ in range(c.runs):
                    rates, lengths = drawn_prompts(rng, prompts)
                    mean = unit * lengths[:, None]
                    geometry, rewards = measured(rng, rates, mean, noise, n)
                    effect = effect_on_hard(as_rows(geometry, rewards))
                    sign = effect.direction if effect else 0
                    helps, hurts = helps + (sign > 0), hurts + (sign < 0)
                    before += helps_before(geometry, rewards)
                    wrong += sign != 0 and sign != true_sign(rates, mean)
                yield {
                    "kind": "interference", "truth": name, "noise": noise,
                    "prompts": prompts, "measurements": n, "helps": helps / c.runs,
                    "hurts": hurts / c.runs, "wrong": wrong / c.runs,
                    "helps before": before / c.runs,
                }  # fmt: skip


def true_sign(rates: np.ndarray, mean: np.ndarray) -> float:
    """Sign of what the others' gradients do to prompts of a rate below 1/3."""
    gradients = (rates * (1 - rates))[:, None] * mean
    inner = gradients @ gradients.T
    np.fill_diagonal(inner, 0.0)
    return np.sign(np.round(inner[rates < 1 / 3].sum(), 12))


def rate_factor(c: Config, rng: np.random.Generator) -> Iterator[dict]:
    """Shares of runs that say on which side of 1 C is, around C = 1."""
    for prompts, n in c.sizes:
        for group in (4, GROUP):
            for true in (0.9, 1.0, 1.1):
                said, before = [], []
                for _ in range(c.runs):
                    sigma = rng.beta(8, 2, prompts) / 2
                    sigma = np.clip(sigma * true * 3 / 8 / sigma.mean(), 0, 0.5)
                    p = 0.5 - np.sqrt(0.25 - sigma**2)
                    rewards = rng.random((n, prompts, group)) < p[:, None]
                    s = rewards.std(2, ddof=1)
                    rows: Any = [{"pass_rate": None, "sigma": x} for x in s]
                    low, high = rate_factor_interval(rows)
                    factor = 8 / 3 * sigma.mean()
                    said.append(((high < 1) & (factor >= 1), (low >= 1) & (factor < 1)))
                    before.append((8 / 3 * s.mean() < 1) != (factor < 1))
                yield {
                    "kind": "C", "prompts": prompts, "measurements": n, "group": group,
                    "true": true, "wrongly below": np.mean(said, 0)[0],
                    "wrongly not below": np.mean(said, 0)[1],
                    "wrong before": float(np.mean(before)),
                }  # fmt: skip


def pass_rate_change(c: Config, rng: np.random.Generator) -> Iterator[dict]:
    """Shares of runs in which an unchanged pass rate "rose" or "fell"."""
    for n in (8, 32, 128):
        for p in (0.005, 0.05, 0.5, 0.95):
            for samples in (1, 4):
                found = np.zeros(2)
                for _ in range(c.runs):
                    rates = rng.beta(p, 1 - p, n)
                    first, last = (
                        rng.binomial(samples, rates) / samples for _ in range(2)
                    )
                    ours = [rate_interval(x)[1:] for x in (first, last)]
                    old = [bootstrap(x, rng, 200) for x in (first, last)]
                    found += [a[1] < b[0] or b[1] < a[0] for a, b in (ours, old)]
                yield {
                    "kind": "change", "prompts": n, "p": p, "samples": samples,
                    "ours": found[0] / c.runs, "before": found[1] / c.runs,
                }  # fmt: skip


TRUTHS = {  # kind of interference: (cosine, mixed)
    "near-orthogonal": (0.0, False),
    "aligned": (0.4, False),
    "of mixed sign": (0.4, True),
}


def kinds(c: Config, rng: np.random.Generator) -> Iterator[dict]:
    """Kinds that measurements are said to be of, and mean cosines said not to be 0."""
    for true, (cosine, mixed) in TRUTHS.items():
        for noise in c.noises:
            for prompts in sorted({p for p, _ in c.sizes}):
                unit = directions(prompts, cosine, mixed=mixed)
                said, above, below = [], 0, 0
                runs = max(1, c.runs // 4)
                for seed in range(runs):
                    rates, lengths = drawn_prompts(rng, prompts)
                    mean = unit * lengths[:, None]
                    geometry, rewards = measured(rng, rates, mean, noise, 1)
                    one = jax.tree.map(lambda x: x[0], geometry)
                    result = phase(one, rewards[0], seed=seed)._asdict()
                    said.append(sampled_kind({"phase": result}))  # pyright: ignore
                    low, high = result["mean_cosine_interval"]
                    above, below = above + (low > 0), below + (high < 0)
                told = [x for x in said if x != "unknown"]
                yield {
                    "kind": "kinds", "true": true, "noise": noise, "prompts": prompts,
                    "told": len(told) / runs,
                    "wrong": sum(x != true for x in told) / runs,
                    "above 0": above / runs, "below 0": below / runs,
                }  # fmt: skip


# ---- tables


def table(rows: list[dict]) -> str:
    """Markdown, one table a kind of sentence: shares of runs."""
    parts = []
    for name in dict.fromkeys(row["kind"] for row in rows):
        same = [
            {k: x for k, x in r.items() if k != "kind"}
            for r in rows
            if r["kind"] == name
        ]
        cells = [
            [f"{x:.3g}" if isinstance(x, float) else str(x) for x in r.values()]
            for r in same
        ]
        header = list(same[0])
        lines = [header, ["---"] * len(header), *cells]
        parts.append(f"{name}\n\n" + "\n".join(f"| {' | '.join(x)} |" for x in lines))
    return "\n\n".join(parts)


def main(c: Config) -> None:
    if c.smoke:
        c = dataclasses.replace(c, runs=40, sizes=((8, 5),), noises=("few, t3",))
    write_config(c.results, c)
    rng, rows = np.random.default_rng(c.seed), []

    def kept() -> Iterator[dict]:
        for part in (interference, rate_factor, pass_rate_change, kinds):
            for row in part(c, rng):
                rows.append(
                    {
                        k: float(x) if isinstance(x, np.floating) else x
                        for k, x in row.items()
                    }
                )
                yield rows[-1]

    write_rows(c.results / "metrics.jsonl", kept())
    write_table(c.results, table(rows))


if __name__ == "__main__":
    main(tyro.cli(Config))
