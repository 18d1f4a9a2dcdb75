"""How wide is the std's interval by P probe prompts and G samples? Known truth.

Question (ours): what `grpo-jax plan` may promise of the instrument: how often a
measurement tells the std of the cosines between prompts' gradients, and how wide its 95
% interval then is. The table of grpo_jax/instrument/widths.py is this script's.

    python experiments/interval_widths.py [--smoke] [--results DIR]

Setting: prompts drawn anew in every repeat, two ways, each with a signal and a noise as
SmolLM2-135M has them on task ladder before training (LoRA, real_orthogonality.py):
"one skill": cosines of mean .60 and std .17, sqrt(s_i s_j) with s of Beta(2.4, 1.6);
half of a gradient's squared norm is signal at 30 samples, noise in 23 directions.
"a mix of skills": five, drawn with equal chances: cosines of .5 within four of them, of
+-.9 within the fifth (as where there are two answers), 0 across; half is signal at 10
samples, noise in 118 directions. Both: norms lognormal(.4), pass rates uniform in [1/8,
7/8], rewards 0 or 1, parts as the instrument makes them. 100 repeats a cell.
Hardware and time: one CPU core, 5 minutes (--smoke: 10 s).

Expected: +-.19 by 20 prompts of one skill and +-.10 by 24 of a mix, G = 32, as on the
real model. Got (2026-11-29): +-.21 and +-.08 by 24 of each. Of one skill at G = 8 a
measurement of more prompts gives a std less often: nearly all gradients are noise, and
those that are not must be a fifth of all. Intervals cover 95 to 100 % of one skill's
std to P = 32, later 68 to 98 % (it comes out too small), and 72 to 97 % of a mix's,
whose std hangs on the fifth of prompts with two answers.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import write_config, write_rows, write_table
from scipy.special import gammaln

import grpo_jax as gj
from grpo_jax.diagnostics.geometry import part_weights
from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.instrument.widths import GROUP_SIZES, PROMPTS
from grpo_jax.runs.lines import read_lines

SKILLS = 5
BETA = (2.4, 1.6)  # of the shares of "one skill"


class Kind(NamedTuple):
    """Prompts of one kind: how much signal their gradients have, and what noise."""

    half_at: float  # samples at which half of the squared norm is signal, at p = 1/2
    directions: int  # that the noise is spread over


KINDS = {"one skill": Kind(30.0, 23), "a mix of skills": Kind(10.0, 118)}
MIX = "a mix of skills"


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/interval_widths")
    smoke: bool = False  # few cells, 10 repeats
    plot_only: bool = False  # the table again, from metrics.jsonl
    seed: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)
    prompts: tuple[int, ...] = PROMPTS
    group_sizes: tuple[int, ...] = GROUP_SIZES
    repeats: int = 100


def true_std(kind: str) -> float:
    """Std of the cosine of two prompts drawn anew."""
    if kind == MIX:
        mean, square = 4 * 0.5 / 25, (4 * 0.5**2 + 0.9**2) / 25
        return (square - mean**2) ** 0.5
    a, b = BETA
    root = np.exp(gammaln(a + 0.5) + gammaln(a + b) - gammaln(a) - gammaln(a + b + 0.5))
    return float(((a / (a + b)) ** 2 - root**4) ** 0.5)


def unit_gradients(
    rng: np.random.Generator, kind: str, repeats: int, prompts: int
) -> np.ndarray:
    """[R, P, SKILLS + P]: axes of the skills, and one of each prompt's own."""
    shape = repeats, prompts
    if kind == MIX:
        skill = rng.integers(SKILLS, size=shape)
        share = np.where(skill == 0, 0.9, 0.5)
        sign = np.where(skill == 0, rng.choice([-1, 1], shape), 1)
    else:
        skill, sign = np.zeros(shape, int), np.ones(shape)
        share = rng.beta(*BETA, shape)
    unit = np.zeros((*shape, SKILLS + prompts), np.float32)
    unit[:, np.arange(prompts), SKILLS + np.arange(prompts)] = np.sqrt(1 - share)
    np.put_along_axis(unit, skill[..., None], (sign * np.sqrt(share))[..., None], 2)
    return unit


def simulate(
    rng: np.random.Generator, kind: str, prompts: int, group_size: int, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rewards [R, P, G], gradients of parts [R, P, H, K])."""
    half_at, directions = KINDS[kind]
    unit = unit_gradients(rng, kind, repeats, prompts)
    norm = rng.lognormal(sigma=0.4, size=(repeats, prompts))
    rate = rng.uniform(1 / 8, 7 / 8, (repeats, prompts))
    rewards = rng.random((repeats, prompts, group_size)) < rate[..., None]
    rewards = rewards.astype(np.float32)
    parts = num_parts(group_size)
    weights = part_weights(jnp.asarray(rewards.reshape(-1, group_size)), parts)
    weights = np.asarray(weights).reshape(repeats, prompts, parts, -1)
    centred = rewards.reshape(weights.shape) - rate[..., None, None]
    signal = (weights * centred).sum(-1) * norm[..., None]  # [R, P, H]
    width = max(directions, SKILLS + prompts)
    vectors = np.zeros((*signal.shape, width), np.float32)
    vectors[..., : SKILLS + prompts] = signal[..., None] * unit[:, :, None]
    noise = rng.standard_normal((*signal.shape, directions), np.float32)
    # At p = 1/2 a gradient's squared norm is 1/16, its noise's half_at / 16 G.
    scale = np.sqrt((weights**2).sum(-1) * half_at / (4 * directions))
    vectors[..., :directions] += noise * scale[..., None]
    return rewards, vectors


@jax.jit
@jax.vmap
def geometries(rewards: jax.Array, vectors: jax.Array) -> gj.PromptGeometry:
    """Geometries of R repeats at once: [R, P, G] and [R, P, H, K]."""
    return gj.parts_geometry(rewards, vectors)


def measure_cell(
    kind: str, prompts: int, group_size: int, *, repeats: int, seed: int
) -> dict:
    """Share of repeats that tell a std, its interval's mean half width and coverage."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind), prompts, group_size])
    rewards, vectors = simulate(rng, kind, prompts, group_size, repeats)
    stacked = jax.tree.map(np.asarray, geometries(rewards, vectors))
    ends, means = [], []
    for r in range(repeats):
        geometry = jax.tree.map(lambda x, r=r: x[r], stacked)
        phase = gj.phase(geometry, rewards[r], sigma=0.5, resamples=500, seed=r)
        ends.append(phase.std_cosine_interval)
        means.append(phase.mean_cosine_interval)
    (low, high), mean = np.array(ends).T, np.ptp(means, axis=1) / 2
    told, truth = np.isfinite(low), true_std(kind)
    low, high, mean = low[told], high[told], mean[told]
    cell = {"kind": kind, "prompts": prompts, "group_size": group_size}
    cell |= {"repeats": repeats, "told": float(told.mean()), "truth": truth}
    if told.any():
        cell["half"] = float((high - low).mean() / 2)
        cell["mean_half"] = float(mean.mean())
        cell["covered"] = float(((low <= truth) & (truth <= high)).mean())
    return cell


def cells(c: Config) -> Iterator[dict]:
    for kind in c.kinds:
        for g in c.group_sizes:
            for p in c.prompts:
                yield measure_cell(kind, p, g, repeats=c.repeats, seed=c.seed)


# ---- table


def table(c: Config) -> str:
    """Told in % / +- of the std / covered in %, by kind, G and P."""
    rows = read_lines(c.results / "metrics.jsonl")
    lines = ["| kind | G | " + " | ".join(f"P {p}" for p in c.prompts) + " |"]
    lines.append("|---" * (2 + len(c.prompts)) + "|")
    for kind in c.kinds:
        for g in c.group_sizes:
            here = [r for r in rows if (r["kind"], r["group_size"]) == (kind, g)]
            lines.append(f"| {kind} | {g} | " + " | ".join(map(cell_text, here)) + " |")
    return "\n".join(lines) + "\n"


def cell_text(row: dict) -> str:
    told = f"{100 * row['told']:.0f}"
    if "half" not in row:
        return told
    return f"{told} / {row['half']:.3f} / {100 * row['covered']:.0f}"


def main(c: Config) -> None:
    if c.smoke:
        few = {"prompts": (8, 24), "group_sizes": (8, 32), "repeats": 10}
        c = dataclasses.replace(c, **few)
    if not c.plot_only:
        write_config(c.results, c)
        write_rows(c.results / "metrics.jsonl", cells(c))
    write_table(c.results, table(c))


if __name__ == "__main__":
    main(tyro.cli(Config))
