"""Rows of instrument.jsonl, made of measurements, and the part of them that
metrics.jsonl repeats."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import group_std
from grpo_jax.diagnostics.cosines import CosineStatistics, cosine_statistics
from grpo_jax.diagnostics.geometry import PromptGeometry, first_order_changes
from grpo_jax.diagnostics.phases import Phase
from grpo_jax.instrument.measurement import Measurement, UpdateEffect
from grpo_jax.instrument.rows import (
    ExactFields,
    Floats,
    Row,
    UpdateFields,
    rank_correlation,
    sampled_curvature,
)
from grpo_jax.instrument.weightings import RULES
from grpo_jax.rollouts.judging import group_means
from grpo_jax.runs.lines import rounded

_GEOMETRY_FIELDS = (
    "cosines", "squared_norms", "raw_squared_norms", "mean_cosine", "std_cosine",
    "attenuation", "effective_prompts", "noise_cosine", "statistics",
    "raw_statistics", "chi", "noise_floor",
    "violating_fraction", "m_median", "m_p99", "norm_ratio", "sigma_ratio",
)  # fmt: skip
_statistics = jax.jit(cosine_statistics)


def make_row(
    measurement: Measurement,
    phase: Phase,
    rewards: np.ndarray,
    pass_rates: np.ndarray | None,
    *,
    step: int,
    prompts: Sequence[int] | np.ndarray,
    num_directions: int | None,
) -> Row:
    """The row of a measurement of P prompts, no update following yet.

    Args:
        measurement: On the host.
        phase: Decided on its geometry.
        rewards: [P, G], NaN where missing.
        pass_rates: [P] exact ones; None where several answers are right.
        step: Steps that the policy was trained for.
        prompts: [P] indices among the trained prompts.
        num_directions: K of hashed gradients; None: all coordinates were kept.
    """
    geometry, probes = measurement.geometry, measurement.probes
    groups = jnp.asarray(rewards)
    return Row(
        step=step,
        phase=phase._asdict(),
        prompts=[int(i) for i in prompts],
        group_size=rewards.shape[1],
        directions=num_directions,
        group_mean=rounded(group_means(rewards)),
        group_std=rounded(group_std(groups)[0]),
        sigma=rounded(group_std(groups, ddof=1)[0]),
        pass_rate=None if pass_rates is None else rounded(pass_rates),
        curvature=rounded(probes.curvature),
        halves=[int(n) for n in probes.halves],
        spread=rounded(probes.spread),
        slope=rounded(probes.slope),
        geometry={name: _to_json(getattr(geometry, name)) for name in _GEOMETRY_FIELDS},
        null=_to_json(_statistics(measurement.null_cosines)),
        features={
            "raw": _to_json(_statistics(measurement.feature_cosines)),
            "centred": _to_json(_statistics(measurement.centred_feature_cosines)),
        },
        weightings=_first_order_fields(geometry, groups),
        exact=None if pass_rates is None else _exact_fields(measurement),
        update=None,
    )


def _first_order_fields(
    geometry: PromptGeometry, rewards: jax.Array
) -> dict[str, dict[str, Floats]]:
    """NaN under rules that are made of pass rates, where rewards are none."""
    outside = bool(((rewards < 0) | (rewards > 1)).any())
    fields = {}
    for name, rule in RULES.items():
        if rule.pass_rates and outside:
            weights = jnp.full(len(rewards), jnp.nan)
        else:
            weights, _ = rule.weights(rewards, rule.init())
        own, others = first_order_changes(
            geometry.inner, geometry.squared_norms, weights
        )
        fields[name] = {"own": rounded(own), "others": rounded(others)}
    return fields


def _exact_fields(measurement: Measurement) -> ExactFields:
    cosines = np.asarray(measurement.exact_cosines, float)
    return ExactFields(
        cosines=rounded(cosines),
        statistics=_to_json(_statistics(cosines)),
        chi=float(np.linalg.eigvalsh(np.nan_to_num(cosines))[-1]),
        norms=rounded(measurement.exact_norms),
        curvature=rounded(measurement.probes.exact_curvature),
        slope=rounded(measurement.probes.exact_slope),
    )


def update_fields(effect: UpdateEffect, realised: np.ndarray) -> UpdateFields:
    """Predicted and realised change of each prompt by one update, each [P]."""
    return UpdateFields(
        slope=rounded(effect.slope),
        curvature=rounded(effect.curvature),
        predicted=rounded(effect.slope + effect.curvature / 2),
        realised=rounded(realised),
        exact_slope=rounded(effect.exact_slope),
        exact_curvature=rounded(effect.exact_curvature),
    )


def _to_json(value: Any) -> Any:
    """Arrays and records as lists and dicts of rounded numbers."""
    if isinstance(value, CosineStatistics):
        return {name: _to_json(x) for name, x in value._asdict().items()}
    return rounded(value)


def metrics_of(row: Row) -> dict[str, Any]:
    """The fields of metrics.jsonl that come from a measurement."""
    geometry, phase = row["geometry"], row["phase"]
    metrics = {
        "phase/label": phase["label"],
        "phase/small_fraction": phase["small_fraction"],
        "phase/rate_factor": phase["rate_factor"],
        "geometry/mean_cosine": geometry["mean_cosine"],
        "geometry/std_cosine": geometry["std_cosine"],
        "geometry/mean_abs_cosine": geometry["statistics"]["mean_abs"],
        "geometry/violating_fraction": geometry["violating_fraction"],
        "geometry/chi": geometry["chi"],
        "geometry/attenuation": geometry["attenuation"],
        "curvature/sigma2_rank_correlation": rank_correlation(*sampled_curvature(row)),
    }
    if row["exact"] is not None:
        exact = row["exact"]["statistics"]
        metrics["geometry/exact_mean_abs_cosine"] = exact["mean_abs"]
        metrics["geometry/exact_std_cosine"] = exact["std"]
    return metrics
