"""The instrument in a run: a fixed set of probe prompts, looked at every so often.

A look samples every probe prompt's group, and measures: pass rates and their spread,
the geometry of the prompts' gradients with its noise, the curvature along each one's
own gradient, the phase this means, and what other prompt weights would do to first
order.
Then it waits for the next update, and compares what slope and curvature along that
predict for every prompt with what happened. Where one answer is right, the same is
computed exactly beside it, from that answer alone.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import group_std
from grpo_jax.curvature import (
    directional_derivatives,
    prompt_curvature,
    prompt_slope,
)
from grpo_jax.errors import ConfigError
from grpo_jax.gradient_geometry import (
    CosineStatistics,
    PromptGeometry,
    cosine_statistics,
    first_order_changes,
    parts_geometry,
)
from grpo_jax.gradient_sketch import gradient_hash
from grpo_jax.models.decoder import Policy, completion_hidden
from grpo_jax.phases import phase
from grpo_jax.probe import Probe, num_parts, probe_prompt
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training.config import TrainConfig
from grpo_jax.training.counterfactual import RULES
from grpo_jax.training.metrics import rounded
from grpo_jax.training.processes import whole
from grpo_jax.training.step import (
    MicroBatch,
    batch_logprobs,
    group_means,
    micro_batch,
)
from grpo_jax.training.warm_start import pass_rates

# Costs in forward passes over tokens, measured on a CPU (BUILD_NOTES.md). A step is
# counted low: without what the host and the optimizer do.
SAMPLING, GRADIENT, SECOND_ORDER = 2, 4, 6
FLOOR = 160  # tokens that a pass over one prompt's few samples costs besides its own
MOST_PROMPTS = 32  # chosen for a run that does not say; more cost memory and file size
VECTOR_BYTES = 128 * 2**20  # of all parts' gradients, and three more a prompt


@dataclasses.dataclass(frozen=True)
class ProbePlan:
    """What a look looks at."""

    prompts: int
    group_size: int
    width: int  # coordinates kept of a gradient
    exact: bool  # all of them
    share: float  # of a step's time that looks should take, averaged over steps

    @property
    def num_directions(self) -> int | None:
        return None if self.exact else self.width

    @property
    def vector_bytes(self) -> int:
        """Of all parts' gradients or their sums, and three more a prompt."""
        return 4 * self.prompts * (num_parts(self.group_size) + 3) * self.width

    def text(self, every: int) -> str:
        kept = "whole gradients" if self.exact else f"gradients in {self.width:,} sums"
        return (
            f"{self.prompts} probe prompts x {self.group_size} samples, {kept}, every "
            f"{every} steps and at the end: about {100 * self.share:.0f} % of step time"
        )


def plan_probe(
    config: TrainConfig,
    *,
    parameters: int,
    train_prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
) -> ProbePlan | None:
    """Probe prompts and coordinates within config.instrument.max_overhead.

    From a count of forward passes, not from a clock, so that the same command looks at
    the same prompts; the run measures the share that it takes. None where the
    instrument is off.

    Raises:
        ConfigError: not even two prompts fit, or the group is too small to be cut.
    """
    wanted, sampling = config.instrument, config.sampling
    if not wanted.every:
        return None
    g = wanted.group_size or max(8, -(-sampling.group_size // 4) * 4)
    parts, t = num_parts(g), max_new_tokens
    step = (SAMPLING + GRADIENT) * sampling.prompts
    step *= prompt_tokens + sampling.group_size * t
    look = GRADIENT * (parts * (prompt_tokens + FLOOR) + g * t)  # of the parts
    look += SECOND_ORDER * (2 * (prompt_tokens + FLOOR) + g * t)  # along their mean
    look += SECOND_ORDER * (prompt_tokens + g * t)  # along the update
    look += (SAMPLING + 1) * (prompt_tokens + g * t)  # and the hidden states
    allowed = wanted.max_overhead * wanted.every * step / look
    prompts = wanted.prompts or min(MOST_PROMPTS, int(allowed))
    if train_prompts < max(2, wanted.prompts or 0):
        raise ConfigError(
            f"instrument.prompts must be from 2 to {train_prompts}, the task's trained "
            f"prompts, got {wanted.prompts or 'no number'}; lower it, or set "
            "instrument.every to 0."
        )
    prompts = min(prompts, train_prompts)
    if prompts < 2:
        share = 2 * look / (wanted.every * step)
        raise ConfigError(
            f"instrument.max_overhead {wanted.max_overhead:g} leaves no two probe "
            f"prompts: they would take about {100 * share:.0f} % of step time; raise "
            "instrument.every or max_overhead, or set instrument.every to 0."
        )
    width = max(1, VECTOR_BYTES // (4 * prompts * (parts + 3)))
    looks = len({*range(0, config.steps + 1, wanted.every), config.steps}) - 1
    share = looks * prompts * look / (config.steps * step)
    exact = parameters <= width
    return ProbePlan(prompts, g, parameters if exact else width, exact, share)


class Look(NamedTuple):
    """What the device measures of P probe prompts."""

    probes: Probe  # leaves [P, ...]
    geometry: PromptGeometry
    null_cosines: jax.Array  # [P, P] of differences of parts: sampling noise alone
    feature_cosines: jax.Array  # [P, P] of hidden states, mean over tokens and samples
    centred_feature_cosines: jax.Array  # of the same less their mean over prompts
    exact_cosines: jax.Array  # [P, P] of the exact pass rates' gradients; or NaN
    exact_norms: jax.Array  # [P]


def measure(
    policy: Policy,
    rollouts: Rollouts,
    answers: Rollouts | None,
    temperature: jax.Array,
    key: jax.Array,
    *,
    width: int,
    exact: bool,
    micro_batch_tokens: int = 2**16,
) -> Look:
    """A look at rollouts [P, G, T] with rewards; answers [P, 1, T] or None.

    Passes are split so that each sees about `micro_batch_tokens` tokens.
    """
    length, t = rollouts.prompts.shape[1], rollouts.completions.shape[-1]
    hash_fn = partial(gradient_hash, key=key, width=width)

    def sequence_logprobs(prompt, params, samples):
        completions, mask = samples
        group = Rollouts(*(x[None] for x in (*prompt, *samples)), mask[None])
        n = completions.shape[0]
        micro = micro_batch(1, n, length, t, micro_batch_tokens)
        current = policy.replace(params)
        return batch_logprobs(current, group, temperature, micro)[0].sum(-1)

    def one_prompt(x):
        rollouts, answer = x
        log_prob_fn = partial(
            sequence_logprobs, (rollouts.prompts, rollouts.prompt_mask)
        )
        right = None
        if answer is not None:
            right = (answer.completions, answer.completion_mask)
        return probe_prompt(
            log_prob_fn,
            policy.params,
            (rollouts.completions, rollouts.completion_mask),
            rollouts.rewards,
            hash_fn,
            right,
        )

    def feature(rollouts):
        """[D] mean hidden state of a prompt's sampled tokens."""
        prompt = (rollouts.prompts[None], rollouts.prompt_mask[None])
        g = rollouts.completions.shape[0]
        size = micro_batch(1, g, length, t, micro_batch_tokens).samples

        def total(x):
            completions, mask = x
            hidden = completion_hidden(policy.module(), *prompt, completions[None])[0]
            return (hidden * mask[..., None]).sum((0, 1), jnp.float32)

        cut = (rollouts.completions, rollouts.completion_mask)
        cut = jax.tree.map(lambda x: x.reshape(g // size, size, t), cut)
        count = jnp.maximum(rollouts.completion_mask.sum(), 1)
        return jax.lax.map(total, cut).sum(0) / count

    probes = jax.lax.map(one_prompt, (rollouts, answers))
    features = jax.lax.map(feature, rollouts)
    geometry = parts_geometry(
        rollouts.rewards, probes.vectors, num_directions=None if exact else width
    )
    parts = probes.vectors.shape[1]
    signs = jnp.where(jnp.arange(parts) % 2 == 0, 1.0, -1.0)
    noise = jnp.einsum("h,phk->pk", signs, probes.vectors)
    # A part without signal leaves the others' mean in the difference.
    whole = (probes.vectors != 0).any(2).all(1)
    noise = jnp.where(whole[:, None], noise, 0.0)
    kept = {"vectors": None, "exact_vector": None}  # large, and in the matrices
    return Look(
        probes._replace(**kept),
        geometry,
        cosines(noise),
        cosines(features),
        cosines(features - features.mean(0)),
        cosines(probes.exact_vector),
        jnp.linalg.norm(probes.exact_vector, axis=1),
    )


def cosines(vectors: jax.Array) -> jax.Array:
    """[P, P] of vectors [P, K]; NaN where one of them is 0."""
    norms = jnp.linalg.norm(vectors, axis=1)
    unit = vectors / jnp.where(norms > 0, norms, jnp.nan)[:, None]
    return unit @ unit.T


class Along(NamedTuple):
    """Of P prompts along a change of the parameters, per that change; to its square."""

    slope: jax.Array  # [P]
    curvature: jax.Array
    exact_slope: jax.Array  # NaN where no single answer is right
    exact_curvature: jax.Array


def along(
    policy: Policy,
    change: Any,
    rollouts: Rollouts,
    answers: Rollouts | None,
    temperature: jax.Array,
    *,
    micro: MicroBatch,
) -> Along:
    """Slope and curvature of every probe prompt's expected reward along `change`."""
    group = rollouts._replace(rewards=None)
    if answers is not None:  # one more completion of each prompt

        def join(name):
            pair = (getattr(rollouts, name), getattr(answers, name))
            return jnp.concatenate(pair, axis=1)

        names = ("completions", "completion_mask", "behaviour_logprobs")
        group = group._replace(**{name: join(name) for name in names})

    def sequence_logprobs(params):
        current = policy.replace(params)
        return batch_logprobs(current, group, temperature, micro).sum(-1)

    value, first, second = directional_derivatives(
        sequence_logprobs, policy.params, change
    )
    g = rollouts.rewards.shape[1]
    exact = jnp.full((2, len(value)), jnp.nan)
    if answers is not None:
        exact = jnp.exp(value[:, g]) * jnp.stack(
            [first[:, g], first[:, g] ** 2 + second[:, g]]
        )
    first, second = first[:, :g], second[:, :g]
    return Along(
        prompt_slope(rollouts.rewards, first),
        prompt_curvature(rollouts.rewards, first, second),
        *exact,
    )


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
        self._along = jax.jit(partial(along, micro=micro))
        self.pending = None  # (sampling key, rollouts, exact pass rates, row)

    def look(self, params: Any, step: int) -> dict[str, Any]:
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
        found, rewards = whole((found, rollouts.rewards))
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

    def follow(self, before: Any, after: Any) -> dict[str, float]:
        """Completes the pending row with what the update did; metrics of its step."""
        began = time.monotonic()
        key, rollouts, exact, row = self.pending
        change = jax.tree.map(jnp.subtract, after, before)
        found = whole(
            self._along(
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
            realised = np.subtract(*map(group_means, whole((now, rollouts.rewards))))
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
        """Runs what `follow` will need, so that no step waits for it."""
        self.follow(params, params)
        self.pending[-1]["update"] = None

    def forget(self) -> None:
        """Drops the look in progress."""
        if self.sigma_history:
            self.sigma_history.pop()
        self.pending = None

    def take(self) -> dict | None:
        """The pending row, to be written; None if there is none."""
        if self.pending is None:
            return None
        row, self.pending = self.pending[-1], None
        return row

    def _exact_pass_rates(self, params):
        if self.answers is None:
            return None
        policy = self.policy.replace(params)
        found = pass_rates(policy, self.answers, self.temperature, self.tokens)
        return np.asarray(found, float)

    def _row(self, found: Look, rewards, pass_rates):
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


def metrics_of(row: dict) -> dict[str, Any]:
    """What metrics.jsonl keeps of a look."""
    geometry, standing = row["geometry"], row["phase"]
    metrics = {
        "phase/label": standing["label"],
        "phase/small_fraction": standing["small_fraction"],
        "phase/rate_factor": standing["rate_factor"],
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


def sampled_curvature(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """(sigma^2 [P], |curvature| [P]), NaN for prompts without signal in both halves:
    measured on a tied half a curvature is 0, and its sigma small, by construction."""
    curvature = np.abs(np.asarray(row["curvature"], float))
    informative = np.asarray(row["halves"]) == 2
    sigma = np.asarray(row["sigma"], float)
    return sigma**2, np.where(informative, curvature, np.nan)


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's, over the pairs that are there; NaN for fewer than three, or where
    one side does not vary."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    there = np.isfinite(x) & np.isfinite(y)
    if there.sum() < 3:
        return float("nan")
    x, y = x[there], y[there]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    from scipy import stats

    return float(stats.spearmanr(x, y).statistic)


_statistics = jax.jit(cosine_statistics)


def _plain(value):
    """Arrays and records as JSON takes them."""
    if isinstance(value, CosineStatistics):
        return {name: _plain(x) for name, x in value._asdict().items()}
    return rounded(value)
