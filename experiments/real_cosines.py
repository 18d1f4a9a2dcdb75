"""Cosines between a real model's prompts: within one skill, in a mix, across skills.

Debiased figures with intervals, raw ones, the noise floor and cosines of features.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from real_gradients import Probed
from real_probes import ProbeConfig
from scipy import stats

from grpo_jax.diagnostics.cosines import cosine_statistics, pair_terms
from grpo_jax.diagnostics.geometry import PromptGeometry, parts_geometry
from grpo_jax.diagnostics.phases import phase
from grpo_jax.instrument.measurement import cosines, noise_vectors

SETS = {
    "one": "one skill",
    "mix": "mix, all pairs",
    "within": "mix, within a skill",
    "across": "mix, across skills",
}
FEATURES = ("answers", "questions")


def figures(c: ProbeConfig, x: Probed, skills: Sequence[str]) -> dict[str, Any]:
    """Figures of every set of prompts, and of each prompt; `skills` of P prompts."""
    names = np.array(skills)
    one = np.flatnonzero(names == c.skill)
    mix = np.concatenate([np.flatnonzero(names == s)[: c.each] for s in c.wanted])
    mixed, kinds = _prompts(x, mix), names[mix]
    same = kinds[:, None] == kinds[None]
    geometry = _geometry(x)
    matrix = np.asarray(geometry.cosines, float)[np.triu_indices(len(names), 1)]
    return {
        "sets": {
            "one": set_figures(_prompts(x, one)),
            "mix": set_figures(mixed),
            "within": pair_figures(mixed, same),
            "across": pair_figures(mixed, ~same),
        },
        "skills": {
            skill: _brief(pair_figures(mixed, same & (kinds == skill)[None]))
            for skill in c.wanted
        },
        "rate": _digits(x.rewards.mean(1)),
        "squared_norm": _digits(geometry.expected_squared_norms),
        "raw_squared_norm": _digits(geometry.raw_squared_norms),
        "cosines": np.round(matrix, 3).tolist(),  # raw, of pairs i < j
    }


def _prompts(x: Probed, indices: np.ndarray) -> Probed:
    """Those of the indices [N]."""
    return jax.tree.map(lambda values: values[indices], x)


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    """Debiased mean and std, and the raw mean, without intervals."""
    debiased = {name: found[name][0] for name in ("mean", "std")}
    return debiased | {"raw": found["raw"]["mean"]}


def _digits(values: Any) -> list[float]:
    """Four significant digits of an array [P]."""
    return [float(f"{v:.4g}") for v in np.asarray(values, float)]


def _geometry(x: Probed) -> PromptGeometry:
    rewards, vectors = jnp.asarray(x.rewards), jnp.asarray(x.vectors)
    return _parts_geometry(rewards, vectors, x.num_directions)


@partial(jax.jit, static_argnums=2)
def _parts_geometry(
    rewards: jax.Array, vectors: jax.Array, num_directions: int | None
) -> PromptGeometry:
    """Geometry from rewards [P, G] and vectors [P, H, K]."""
    return parts_geometry(rewards, vectors, num_directions=num_directions)


def set_figures(x: Probed) -> dict[str, Any]:
    """Figures over all pairs of a set of prompts, with the library's intervals."""
    geometry, rewards = _geometry(x), jnp.asarray(x.rewards)
    now = phase(geometry, rewards, num_directions=x.num_directions)
    every = np.ones((len(x.rewards),) * 2, bool)
    return pair_figures(x, every) | {
        "mean": [now.mean_cosine, *now.mean_cosine_interval],
        "std": [now.std_cosine, *now.std_cosine_interval],
        "small": list(now.small_fraction_interval),
        "label": now.label,
        "prompts": now.prompts,
        "effective_prompts": now.effective_prompts,
        "attenuation": float(geometry.attenuation),
        "mean_sigma": now.mean_sigma,
    }


def pair_figures(x: Probed, mask: np.ndarray) -> dict[str, Any]:
    """Figures over the pairs of `mask` [P, P], by a jackknife over prompts.

    The intervals are of prompts of the same skills. Each prompt is in all of its pairs,
    so what belongs to single pairs is counted twice: they are wider than need be.
    """
    geometry = _geometry(x)
    terms = pair_terms(
        geometry.inner,
        geometry.expected_squared_norms,
        geometry.raw_squared_norms,
        geometry.squared_inner,
        x.num_directions,
    )
    sums = np.stack([np.asarray(t, float) for t in terms]) * mask  # [3, P, P]
    sums = sums[:, sums[0].any(1)][:, :, sums[0].any(1)]
    nothing = [np.nan] * 3
    found: dict[str, Any] = {"mean": nothing, "std": nothing}
    if np.isfinite(geometry.mean_cosine) and len(sums[0]) > 2:
        total, count = sums.sum((1, 2)), len(sums[0])
        estimate = _moments(total)
        left_out = _moments(total - 2 * sums.sum(2).T)  # [P, 2]
        variance = (count - 1) / count * ((left_out - estimate) ** 2).sum(0)
        half = stats.t.ppf(0.975, count - 1) * np.sqrt(variance)
        ends = np.stack([estimate, estimate - half, estimate + half], 1)  # [2, 3]
        found = {"mean": np.clip(ends[0], -1, 1).tolist()}
        found["std"] = np.sqrt(np.clip(ends[1], 0, 1)).tolist()
    raw = _statistics(np.asarray(geometry.cosines, float), mask)
    null = _statistics(np.asarray(cosines(noise_vectors(x.vectors))), mask)
    features = {name: getattr(x, name) for name in FEATURES}
    centred = {name: y - y.mean(0) for name, y in features.items()}
    return found | {
        "noise_cosine": float(geometry.noise_cosine),
        "raw": raw,
        "null": null,
        "features": {n: _statistics(cosines(y), mask) for n, y in features.items()},
        "centred": {n: _statistics(cosines(y), mask) for n, y in centred.items()},
    }


def _moments(totals: np.ndarray) -> np.ndarray:
    """[..., 2] mean and variance of the true cosines, of sums [..., 3] of terms."""
    weights, products, squares = np.moveaxis(totals, -1, 0)
    mean = products / weights
    return np.stack([mean, squares / weights - mean**2], -1)


def _statistics(matrix: Any, mask: np.ndarray) -> dict[str, float]:
    """`CosineStatistics` of the entries [P, P] that are in the mask [P, P]."""
    found = cosine_statistics(jnp.where(mask, matrix, jnp.nan))
    return {name: round(float(v), 4) for name, v in found._asdict().items()}
