"""Does the instrument say what the true cosines are? Simulated prompts, known truth.

Question (ours): bias and interval coverage of the debiased mean, std and fraction of
small cosines, and how often a label is wrong, over shapes of the true cosines, norms,
noise, pass rates, P prompts and G samples; beside the estimators that came before.

    python experiments/estimator_coverage.py [--smoke] [--results DIR]

Setting: prompts are drawn anew in every repeat: unit gradients in 200 coordinates,
orthogonal, all cosines .2 or .4, +-.3 or +-.12 by a random sign each, or in one of 4 or
12 clusters (.6 within, 0 between); norms equal or lognormal(1). Rewards are 0 or 1 with
pass rate 1/2 or uniform in [.02, .98] (tied groups as they fall); a score is (reward -
pass rate) times the prompt's gradient, plus noise, of twice the squared length of a
gradient of norm 1 in all or in proportion to the norm, normal or t with 3 degrees. P =
8, 16, 32, G = 4, 8, 16, 32, in as many parts as the instrument uses. 80 repeats a cell,
504 cells. The truth is of the population that prompts are drawn from. "Before": the
mean of raw cosines over a pooled attenuation, a mean square as a ratio of averages
(weights: squared norms of std-normalised gradients), the fraction of raw cosines moved
to both, a bootstrap over prompts; a label counts as sure from 95 % of samples on.
Hardware and time: one CPU core, 15 minutes (--smoke: 20 s).

Expected: where something is told, bias well inside the interval, coverage of 93 % or
more, at most 5 % of labels wrong in any cell; nothing told where noise hides it.
Got (2026-11-28), before / now: told in 89 / 73 % of runs. Covered there: mean 89 / 98
%, std 89 / 97 %, small fraction 72 / 100 %. Labels sure in 34 / 28 % of runs, wrong in
5.4 / .03 %, in the worst cell in 100 / 4 %.
* Before, lognormal norms and equal noise: 10 to 15 % of labels wrong; of equal cosines,
  32 prompts and G = 32, 86 to 100 %, all the more the larger G (mean .28, std .29 for
  .4 and 0, no interval covers). Equal norms: up to 100 % of 12 clusters' labels wrong.
* Now, G = 4, 8, 16, 32: told in 16, 80, 97, 100 %. The mean is off by .005 or less
  (.011 and .007 in 2 of 28 rows). A std of 0 comes out as .01 to .05, being a root;
  others are .002 to .014 too small from G = 8 on, .02 to .03 at G = 4.
* 12 clusters are the hardest: 8 prompts hardly show them, and the std's interval covers
  .81 to .89 in such cells. Labels are sure there in .1 % of runs or less.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import write_config, write_rows, write_table

import grpo_jax as gj
from grpo_jax.diagnostics.geometry import part_weights
from grpo_jax.diagnostics.phases import PHASES, SURE, THRESHOLDS
from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.runs.lines import read_lines

FIGURES = ("mean", "std", "small")
# (norms, noise in proportion to them, distribution of noise, pass rates)
SETTINGS = (
    ("equal", False, "normal", "half"),
    ("equal", False, "t3", "any"),
    ("lognormal", False, "normal", "half"),
    ("lognormal", False, "normal", "any"),
    ("lognormal", True, "t3", "half"),
    ("lognormal", True, "normal", "any"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/estimator_coverage")
    smoke: bool = False  # few cells, 20 repeats
    plot_only: bool = False  # the table again, from metrics.jsonl
    seed: int = 0
    cosines: tuple[str, ...] = (
        "orthogonal", "equal .2", "equal .4", "signs .3", "signs .12", "clusters 4",
        "clusters 12",
    )  # fmt: skip
    prompts: tuple[int, ...] = (8, 16, 32)
    group_sizes: tuple[int, ...] = (4, 8, 16, 32)
    noise: float = 2.0  # squared length of a sample's, the prompt's gradient 1
    settings: tuple[int, ...] = tuple(range(len(SETTINGS)))
    repeats: int = 80
    coordinates: int = 200
    resamples: int = 500


def truth_of(cosines: str) -> tuple[float, float, float]:
    """(mean, std, fraction of |cos| < .1) over pairs of two prompts drawn anew."""
    kind, _, number = cosines.partition(" ")
    size = float(number or 0)
    if kind == "clusters":
        return 0.6 / size, 0.6 * (1 / size * (1 - 1 / size)) ** 0.5, 1 - 1 / size
    small = float(size < 0.1)
    return (0.0, size, small) if kind == "signs" else (size, 0.0, small)


def label_of(small: float, std: float) -> str:
    if small >= THRESHOLDS.small_fraction:
        return "I"
    return "III" if std >= THRESHOLDS.std_cosine else "II"


def directions(
    rng: np.random.Generator, cosines: str, shape: tuple[int, int, int]
) -> np.ndarray:
    """[R, P, K] unit gradients: one axis of each prompt's own, others shared."""
    repeats, prompts, width = shape
    kind, _, number = cosines.partition(" ")
    own = np.zeros(shape, np.float32)
    own[:, np.arange(prompts), width - 1 - np.arange(prompts)] = 1
    if kind == "orthogonal":
        return own
    size = 0.6 if kind == "clusters" else float(number)
    unit = (1 - size) ** 0.5 * own
    if kind == "clusters":
        axis = rng.integers(int(number), size=(repeats, prompts, 1))
        np.put_along_axis(unit, axis, size**0.5, 2)
    else:
        signs = rng.choice([-1, 1], (repeats, prompts)) if kind == "signs" else 1
        unit[:, :, 0] = signs * size**0.5
    return unit


def simulate(
    c: Config, rng: np.random.Generator, cell: dict
) -> tuple[np.ndarray, np.ndarray]:
    """(rewards [R, P, G], gradients of parts [R, P, H, K]) of one cell."""
    p, g, k = cell["prompts"], cell["group_size"], c.coordinates
    norms, proportional, noise, rates = SETTINGS[cell["setting"]]
    unit = directions(rng, cell["cosines"], (c.repeats, p, k))
    length = np.ones((c.repeats, p))
    if norms == "lognormal":
        length = rng.lognormal(size=(c.repeats, p))
    scale = (c.noise / k) ** 0.5 * (length if proportional else length**0)
    rate = np.full((c.repeats, p), 0.5)
    if rates == "any":
        rate = rng.uniform(0.02, 0.98, (c.repeats, p))
    rewards = (rng.random((c.repeats, p, g)) < rate[..., None]).astype(np.float32)
    parts = num_parts(g)
    weights = np.asarray(part_weights(jnp.asarray(rewards.reshape(-1, g)), parts))
    weights = weights.reshape(c.repeats, p, parts, g // parts)
    centred = rewards.reshape(weights.shape) - rate[..., None, None]
    signal = (weights * centred).sum(-1) * length[..., None]  # [R, P, H]
    if noise == "t3":  # of variance 1: each sample's noise has a length of its own
        draws = rng.standard_normal((*weights.shape, k), dtype=np.float32)
        own = 1 / np.sqrt(rng.chisquare(3, weights.shape))
        spread = np.matmul((weights * own)[..., None, :], draws)[..., 0, :]
    else:
        spread = rng.standard_normal((*signal.shape, k), dtype=np.float32)
        spread *= np.sqrt((weights**2).sum(-1))[..., None]
    vectors = signal[..., None] * unit[:, :, None] + scale[..., None, None] * spread
    return rewards, vectors.astype(np.float32)


# ---- the estimators before: kept here alone, to show what they did


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5]) if len(values) else (np.nan,) * 2
    return float(low), float(high)


def before(
    g: gj.PromptGeometry, rewards: np.ndarray, rng: np.random.Generator
) -> tuple[dict[str, tuple[float, float, float]], str]:
    """({figure: (estimate, low, high)}, label where sure) as they were."""
    p = len(rewards)
    first, second = np.triu_indices(p, 1)
    signal = np.isfinite(g.cosines).any(1)
    factor = np.where(g.squared_norms != 0, g.expected_squared_norms, np.nan)
    factor = factor / np.where(g.squared_norms != 0, g.squared_norms, 1)
    squared = np.nan_to_num(g.squared_inner / (factor[:, None] * factor[None]))
    used = (signal[first] & signal[second])[None]
    counts = np.vstack([np.ones(p), rng.multinomial(p, np.full(p, 1 / p), 100)])
    pairs = counts[:, first] * counts[:, second] * used  # [1 + N, pairs]
    counts = counts * signal
    with np.errstate(invalid="ignore", divide="ignore"):
        attenuation = (counts @ g.squared_norms) / (counts @ g.raw_squared_norms)
        attenuation = np.where(attenuation < 0.1, np.nan, np.minimum(attenuation, 1))
        cosines = np.nan_to_num(g.cosines)[first, second]
        total = pairs.sum(1)
        raw = pairs @ cosines / total
        raw_std = np.sqrt(pairs @ cosines**2 / total - raw**2)
        mean = np.clip(raw / attenuation, -1, 1)
        z = g.squared_norms / np.where(signal, rewards.var(1, ddof=1), 1)
        scale = np.where(signal, rewards.var(1, ddof=1), 1)
        below = pairs @ (z[first] * z[second])
        square = pairs @ (squared[first, second] / (scale[first] * scale[second]))
        square = np.minimum(np.where(below > 0, square / below, np.nan), 1)
        std = np.sqrt(np.maximum(square - mean**2, 0)) + 0 * attenuation
        ratio = std / np.where(raw_std > 0, raw_std, 1)
        moved = mean[:, None] + (cosines - raw[:, None]) * ratio[:, None]
        small = (pairs * (np.abs(moved) < 0.1)).sum(1) / total + 0 * std
    finite = np.isfinite(small) & np.isfinite(std)
    figures = {}
    for name, x in zip(FIGURES, (mean, std, small), strict=True):
        figures[name] = (float(x[0]), *_percentiles(x[1:][finite[1:]]))
    if not finite[0] or signal.sum() < 4 or not finite[1:].any():
        nothing = (float("nan"), float("nan"), float("nan"))
        return dict.fromkeys(figures, nothing), "unknown"
    drawn = [label_of(s, d) for s, d in zip(small[1:], std[1:], strict=True)]
    drawn = np.array(drawn)[finite[1:]]
    sure = [label for label in PHASES if (drawn == label).mean() >= SURE]
    return figures, sure[0] if sure else "unknown"


# ---- cells


def cells(c: Config) -> Iterator[dict]:
    axes = (c.cosines, c.settings, c.prompts, c.group_sizes)
    names = ("cosines", "setting", "prompts", "group_size")
    for values in itertools.product(*axes):
        yield dict(zip(names, values, strict=True))


@jax.jit
@jax.vmap
def geometries(rewards: jax.Array, vectors: jax.Array) -> gj.PromptGeometry:
    """Geometries of R repeats at once: [R, P, G] and [R, P, H, K]."""
    return gj.parts_geometry(rewards, vectors)


def measure_cell(c: Config, cell: dict, index: int) -> dict:
    """The cell with errors, coverage and labels of the estimators, before and now."""
    rng = np.random.default_rng([c.seed, index])
    rewards, vectors = simulate(c, rng, cell)
    stacked = jax.tree.map(np.asarray, geometries(rewards, vectors))
    truth = truth_of(cell["cosines"])
    right = label_of(truth[2], truth[1])
    found = {"now": [], "before": []}
    for r in range(c.repeats):
        geometry = jax.tree.map(lambda x, r=r: x[r], stacked)
        phase = gj.phase(geometry, rewards[r], sigma=0.5, resamples=c.resamples, seed=r)
        now = {
            "mean": (phase.mean_cosine, *phase.mean_cosine_interval),
            "std": (phase.std_cosine, *phase.std_cosine_interval),
            "small": (phase.small_fraction, *phase.small_fraction_interval),
        }
        found["now"].append((now, phase.label))
        found["before"].append(before(geometry, rewards[r], rng))
    summary = {name: summarise(x, truth, right) for name, x in found.items()}
    return cell | {"repeats": c.repeats, "truth": truth, "label": right} | summary


def summarise(
    found: list[tuple[dict, str]], truth: tuple[float, float, float], right: str
) -> dict:
    """Counts and sums over the repeats of a cell, so that cells can be added up."""
    told = [figures for figures, _ in found if np.isfinite(figures["std"][1])]
    labels = [label for _, label in found]
    summary: dict[str, Any] = {
        "told": len(told),
        "sure": sum(label != "unknown" for label in labels),
        "wrong": sum(label not in ("unknown", right) for label in labels),
    }
    for name, true in zip(FIGURES, truth, strict=True):
        x = np.array([figures[name] for figures in told]).reshape(-1, 3)
        # Float32 sums: an interval of [0, 0] about 0.
        inside = (x[:, 1] <= true + 1e-5) & (true <= x[:, 2] + 1e-5)
        summary[name] = {
            "error": float((x[:, 0] - true).sum()),
            "covered": int(inside.sum()),
            "width": float((x[:, 2] - x[:, 1]).sum()),
        }
    return summary


# ---- table


def line(rows: list[dict], when: str) -> list[str]:
    """Figures of the cells together: told, errors, coverage, labels, the worst cell."""
    told = sum(row[when]["told"] for row in rows)
    runs = sum(row["repeats"] for row in rows)
    percent = [f"{100 * told / runs:.0f}"]
    for name in FIGURES:
        if not told:
            percent += ["-", "-"]
            continue
        error = sum(row[when][name]["error"] for row in rows) / told
        covered = sum(row[when][name]["covered"] for row in rows) / told
        percent += [f"{error:+.3f}", f"{100 * covered:.0f}"]
    sure, wrong = (sum(row[when][x] for row in rows) for x in ("sure", "wrong"))
    worst = max(row[when]["wrong"] / row["repeats"] for row in rows)
    percent += [f"{100 * x:.1f}" for x in (sure / runs, wrong / runs, worst)]
    return percent


HEADER = (
    "cosines", "G", "when", "told %", "mean: error", "covered %", "std: error",
    "covered %", "small: error", "covered %", "sure %", "sure and wrong %",
    "worst cell %",
)  # fmt: skip


def table(c: Config) -> str:
    rows = read_lines(c.results / "metrics.jsonl")
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    groups = [*itertools.product(c.cosines, c.group_sizes), ("all", "all")]
    for cosines, g in groups:
        here = [
            row
            for row in rows
            if cosines == "all" or (row["cosines"], row["group_size"]) == (cosines, g)
        ]
        for when in ("before", "now"):
            cells = [str(cosines), str(g), when, *line(here, when)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(c: Config) -> None:
    if c.smoke:
        few = {"cosines": ("orthogonal", "equal .4"), "prompts": (8,)}
        few |= {"group_sizes": (8, 32), "settings": (0, 3), "repeats": 20}
        c = dataclasses.replace(c, **few)
    if not c.plot_only:
        write_config(c.results, c)
        measured = (measure_cell(c, cell, i) for i, cell in enumerate(cells(c)))
        write_rows(c.results / "metrics.jsonl", measured)
    write_table(c.results, table(c))


if __name__ == "__main__":
    main(tyro.cli(Config))
