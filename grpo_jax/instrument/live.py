"""The instrument of a run: probe measurements of a fixed set of prompts.

A measurement samples a group of every probe prompt and estimates pass rates, the
geometry of the prompts' gradients, the curvature along each one's gradient, the phase
these show, and the first-order effect of other prompt weights. Its row is complete
after the next update, when the predicted change of every prompt is compared with the
realised one. Where one answer is right, the exact figures are computed from it too.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.diagnostics.phases import phase
from grpo_jax.evaluation.exact import exact_pass_rates
from grpo_jax.instrument.measurement import measure, update_effect
from grpo_jax.instrument.plan import ProbePlan
from grpo_jax.instrument.record import make_row, metrics_of, update_fields
from grpo_jax.instrument.rows import Row
from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import gather_to_host
from grpo_jax.rollouts.judging import group_means
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.rollouts.types import Rollouts


def hash_key(key: jax.Array) -> jax.Array:
    """The key [] of the sums that gradients are kept as, from that of measurements."""
    return jax.random.fold_in(key, 2**31 - 1)  # no step: it differs from their keys


class Pending(NamedTuple):
    """A measurement whose next update has not been compared yet."""

    key: jax.Array  # the probe prompts were sampled with
    rollouts: Rollouts  # [P, G, T] with rewards
    pass_rates: np.ndarray | None  # [P] exact ones
    row: Row


class Instrument:
    """The probe prompts of one run, the compiled programs, the pending measurement.

    Args:
        plan: Probe prompts, group size and coordinates of a measurement.
        policy: Without parameters.
        sample_and_score: (params, key) -> rollouts of the probe prompts, with rewards.
        answers: [P, 1, T], where one completion is right; else None.
        prompts: [P] indices among the trained prompts, as written to the file.
        temperature: Of sampling.
        prompt_tokens: L, of the padded prompts.
        max_new_tokens: T.
        micro_batch_tokens: Tokens in one pass, about.
        key: Of all measurements; each folds in its step.
        sigma_history: `mean_sigma` of the measurements before a resume.
    """

    def __init__(
        self,
        plan: ProbePlan,
        policy: Policy,
        sample_and_score: Callable[[Any, jax.Array], Rollouts],
        answers: Rollouts | None,
        *,
        prompts: Sequence[int] | np.ndarray,
        temperature: float,
        prompt_tokens: int,
        max_new_tokens: int,
        micro_batch_tokens: int,
        key: jax.Array,
        sigma_history: list[float],
    ):
        self.plan, self.policy, self.answers = plan, policy, answers
        self.sample_and_score, self.prompts = sample_and_score, prompts
        self.temperature, self.key = temperature, key
        self.sigma_history = sigma_history
        self.micro_batch_tokens = micro_batch_tokens
        self.pending: Pending | None = None
        self._hash_key = hash_key(key)
        shape = {"width": plan.width, "exact": plan.exact}
        self._measure = jax.jit(
            partial(measure, **shape, micro_batch_tokens=micro_batch_tokens)
        )
        micro = micro_batch(
            plan.prompts,
            plan.group_size + (answers is not None),
            prompt_tokens,
            max_new_tokens,
            micro_batch_tokens,
        )
        self._update_effect = jax.jit(partial(update_effect, micro=micro))

    def measure(self, params: Any, step: int) -> dict[str, Any]:
        """Metrics of the policy after `step` steps; its row waits for the next update.

        The metrics are fields of metrics.jsonl, `time/instrument_s` among them.
        """
        began = time.monotonic()
        key = jax.random.fold_in(self.key, step)
        rollouts = self.sample_and_score(params, key)
        on_device = self._measure(
            self.policy.replace(params),
            rollouts,
            self.answers,
            np.float32(self.temperature),
            self._hash_key,
        )
        measurement, rewards = gather_to_host((on_device, rollouts.rewards))
        exact = self._exact_pass_rates(params)
        current = phase(
            measurement.geometry,
            rewards,
            sigma=None if exact is None else float(np.sqrt(exact * (1 - exact)).mean()),
            sigma_history=tuple(self.sigma_history),
            num_directions=self.plan.num_directions,
        )
        self.sigma_history.append(current.mean_sigma)
        row = make_row(
            measurement,
            current,
            rewards,
            exact,
            step=step,
            prompts=self.prompts,
            num_directions=self.plan.num_directions,
        )
        self.pending = Pending(key, rollouts, exact, row)
        return metrics_of(row) | {"time/instrument_s": time.monotonic() - began}

    def compare_update(self, before: Any, after: Any) -> dict[str, float]:
        """Completes the pending row by the update from parameters `before` to `after`.

        Returns `time/instrument_s`. Without exact pass rates the same random numbers
        are sampled with again, so that only what the update changed differs.
        """
        began = time.monotonic()
        pending = self.pending
        if pending is None:
            raise RuntimeError("compare_update needs a pending measurement.")
        effect = gather_to_host(
            self._update_effect(
                self.policy.replace(before),
                jax.tree.map(jnp.subtract, after, before),
                pending.rollouts,
                self.answers,
                np.float32(self.temperature),
            )
        )
        exact = self._exact_pass_rates(after)
        if exact is not None and pending.pass_rates is not None:
            realised = exact - pending.pass_rates
        else:
            rewards = self.sample_and_score(after, pending.key).rewards
            now, then = gather_to_host((rewards, pending.rollouts.rewards))
            realised = group_means(now) - group_means(then)
        pending.row["update"] = update_fields(effect, realised)
        return {"time/instrument_s": time.monotonic() - began}

    def compile(self, params: Any) -> None:
        """Compiles the programs of `compare_update`, so that no step waits for them.

        To be called after `measure`; the row's `update` is None again afterwards.
        """
        self.compare_update(params, params)
        if self.pending is not None:
            self.pending.row["update"] = None

    def discard(self) -> None:
        """Drops the pending measurement, and its entry in `sigma_history`."""
        if self.sigma_history:
            self.sigma_history.pop()
        self.pending = None

    def take_row(self) -> dict[str, Any] | None:
        """The pending row, to be written; nothing is pending afterwards."""
        if self.pending is None:
            return None
        row: dict[str, Any] = {**self.pending.row}
        self.pending = None
        return row

    def _exact_pass_rates(self, params: Any) -> np.ndarray | None:
        """[P] on the host; None where several answers are right."""
        if self.answers is None:
            return None
        policy = self.policy.replace(params)
        rates = exact_pass_rates(
            policy, self.answers, self.temperature, self.micro_batch_tokens
        )
        return np.asarray(rates, float)
