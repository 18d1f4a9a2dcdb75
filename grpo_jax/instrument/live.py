"""The instrument in a run: a fixed set of probe prompts, looked at every so often.

A look samples every probe prompt's group, and measures: pass rates and their spread,
the geometry of the prompts' gradients with its noise, the curvature along each one's
own gradient, the phase this means, and what other prompt weights would do to first
order.
Then it waits for the next update, and compares what slope and curvature along that
predict for every prompt with what happened. Where one answer is right, the same is
computed exactly beside it, from that answer alone.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import group_std
from grpo_jax.diagnostics.geometry import (
    CosineStatistics,
    cosine_statistics,
    first_order_changes,
)
from grpo_jax.diagnostics.phases import phase
from grpo_jax.evaluation.exact import exact_pass_rates
from grpo_jax.instrument.measurement import Measurement, measure, update_effect
from grpo_jax.instrument.plan import ProbePlan
from grpo_jax.instrument.rows import metrics_of
from grpo_jax.instrument.weightings import RULES
from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import gather_to_host
from grpo_jax.rollouts.judging import group_means
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.lines import rounded


class Instrument:
    """The probe set of one run, its compiled programs, and the look in progress.

    Args:
        plan: What a look looks at.
        policy: Without parameters.
        sample_and_score: (params, key) -> rollouts of the probe prompts, with rewards.
        answers: [P, 1, T], where one completion is right; else None.
        prompts: Their indices among the trained ones, as written to the file.
        sigma_history: `mean_sigma` of the looks before a resume.
    """

    def __init__(
        self,
        plan: ProbePlan,
        policy: Policy,
        sample_and_score: Callable[[Any, jax.Array], Rollouts],
        answers: Rollouts | None,
        *,
        prompts: np.ndarray,
        temperature: float,
        prompt_tokens: int,
        max_new_tokens: int,
        micro_batch_tokens: int,
        key: jax.Array,
        sigma_history: list[float],
    ):
        self.plan, self.policy, self.answers = plan, policy, answers
        self.sample_and_score, self.prompts = sample_and_score, prompts
        self.temperature, self.key = np.float32(temperature), key
        self.sigma_history = sigma_history
        self.tokens = micro_batch_tokens
        # Not a key of a look's samples: those are of steps.
        self.hash_key = jax.random.fold_in(key, 2**31 - 1)
        shape = {"width": plan.width, "exact": plan.exact}
        self._measure = jax.jit(
            partial(measure, **shape, micro_batch_tokens=micro_batch_tokens)
        )
        completions = plan.group_size + (answers is not None)
        micro = micro_batch(
            plan.prompts,
            completions,
            prompt_tokens,
            max_new_tokens,
            micro_batch_tokens,
        )
        self._update_effect = jax.jit(partial(update_effect, micro=micro))
        self.pending = None  # (sampling key, rollouts, exact pass rates, row)

    def measure(self, params: Any, step: int) -> dict[str, Any]:
        """Measures; the row waits for the next update. Returns metrics of the step."""
        began = time.monotonic()
        policy = self.policy.replace(params)
        key = jax.random.fold_in(self.key, step)
        rollouts = self.sample_and_score(params, key)
        found = self._measure(
            policy,
            rollouts,
            self.answers,
            self.temperature,
            self.hash_key,
        )
        found, rewards = gather_to_host((found, rollouts.rewards))
        exact = self._exact_pass_rates(params)
        standing = phase(
            found.geometry,
            rewards,
            sigma=None if exact is None else float(np.sqrt(exact * (1 - exact)).mean()),
            sigma_history=tuple(self.sigma_history),
            num_directions=self.plan.num_directions,
        )
        self.sigma_history.append(standing.mean_sigma)
        row = {"step": step, "phase": standing._asdict()}
        row |= self._row(found, rewards, exact)
        self.pending = (key, rollouts, exact, row)
        return metrics_of(row) | {"time/instrument_s": time.monotonic() - began}

    def compare_update(self, before: Any, after: Any) -> dict[str, float]:
        """Completes the pending row with what the update did; metrics of its step."""
        began = time.monotonic()
        key, rollouts, exact, row = self.pending
        change = jax.tree.map(jnp.subtract, after, before)
        found = gather_to_host(
            self._update_effect(
                self.policy.replace(before),
                change,
                rollouts,
                self.answers,
                self.temperature,
            )
        )
        if exact is not None:
            realised = self._exact_pass_rates(after) - exact
        else:  # the same random numbers: what did not change is sampled again
            now = self.sample_and_score(after, key).rewards
            realised = np.subtract(
                *map(group_means, gather_to_host((now, rollouts.rewards)))
            )
        row["update"] = {
            "slope": rounded(found.slope),
            "curvature": rounded(found.curvature),
            "predicted": rounded(found.slope + found.curvature / 2),
            "realised": rounded(realised),
            "exact_slope": rounded(found.exact_slope),
            "exact_curvature": rounded(found.exact_curvature),
        }
        return {"time/instrument_s": time.monotonic() - began}

    def compile(self, params: Any) -> None:
        """Runs what `compare_update` will need, so that no step waits for it."""
        self.compare_update(params, params)
        self.pending[-1]["update"] = None

    def discard(self) -> None:
        """Drops the look in progress."""
        if self.sigma_history:
            self.sigma_history.pop()
        self.pending = None

    def take_row(self) -> dict | None:
        """The pending row, to be written; None if there is none."""
        if self.pending is None:
            return None
        row, self.pending = self.pending[-1], None
        return row

    def _exact_pass_rates(self, params):
        if self.answers is None:
            return None
        policy = self.policy.replace(params)
        found = exact_pass_rates(policy, self.answers, self.temperature, self.tokens)
        return np.asarray(found, float)

    def _row(self, found: Measurement, rewards, pass_rates):
        geometry = found.geometry
        row = {
            "prompts": [int(i) for i in self.prompts],
            "group_size": rewards.shape[1],
            "directions": self.plan.num_directions,
            "group_mean": rounded(group_means(rewards)),
            "group_std": rounded(group_std(rewards)[0]),
            "sigma": rounded(group_std(rewards, ddof=1)[0]),
            "pass_rate": None if pass_rates is None else rounded(pass_rates),
            "curvature": rounded(found.probes.curvature),
            "halves": [int(n) for n in found.probes.halves],
            "spread": rounded(found.probes.spread),
            "slope": rounded(found.probes.slope),
            "geometry": {
                name: _plain(getattr(geometry, name)) for name in _GEOMETRY_FIELDS
            },
            "null": _plain(_statistics(found.null_cosines)),
            "features": {
                "raw": _plain(_statistics(found.feature_cosines)),
                "centred": _plain(_statistics(found.centred_feature_cosines)),
            },
            "weightings": {},
            "exact": None,
            "update": None,
        }
        for name, rule in RULES.items():
            weights, _ = rule.weights(jnp.asarray(rewards), rule.init())
            own, others = first_order_changes(
                geometry.inner, geometry.squared_norms, weights
            )
            row["weightings"][name] = {"own": rounded(own), "others": rounded(others)}
        if pass_rates is not None:
            true = np.asarray(found.exact_cosines, float)
            row["exact"] = {
                "cosines": rounded(true),
                "statistics": _plain(_statistics(true)),
                "chi": float(np.linalg.eigvalsh(np.nan_to_num(true))[-1]),
                "norms": rounded(found.exact_norms),
                "curvature": rounded(found.probes.exact_curvature),
                "slope": rounded(found.probes.exact_slope),
            }
        return row


_GEOMETRY_FIELDS = (
    "cosines", "squared_norms", "raw_squared_norms", "mean_cosine", "std_cosine",
    "attenuation", "statistics", "raw_statistics", "chi", "noise_floor",
    "violating_fraction", "m_median", "m_p99", "norm_ratio", "sigma_ratio",
)  # fmt: skip


_statistics = jax.jit(cosine_statistics)


def _plain(value):
    """Arrays and records as JSON takes them."""
    if isinstance(value, CosineStatistics):
        return {name: _plain(x) for name, x in value._asdict().items()}
    return rounded(value)
