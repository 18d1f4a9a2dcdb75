"""Pass rates of the policy on trained and held-out prompts, with intervals."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.evaluation.exact import exact_pass_rates
from grpo_jax.evaluation.figures import (
    cut_off_share,
    mean_reward_interval,
    missing_and_failed,
    pass_rate_interval,
)
from grpo_jax.evaluation.sampled import (
    PromptAnswers,
    answer_prompts,
    prompts_at_a_time,
)
from grpo_jax.intervals import rate_interval
from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import Processes
from grpo_jax.rewards.pool import VerifierPool
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import answer_rollouts, encode_prompts, pad_left
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Task
from grpo_jax.training.prompts import SampleFn

PARTS = ("train", "heldout")


class EvaluatedPart(NamedTuple):
    """One part of a task, encoded."""

    examples: Sequence[Example]  # N
    prompts: tuple[Any, Any]  # token ids and mask [N, L]
    answers: Rollouts | None  # [N, 1, T], where exactly one completion is right


class PassRates:
    """Exact pass rates where exactly one completion is right, sampled ones elsewhere.

    Args:
        task: Whose prompts.
        trained, heldout: Examples to evaluate.
        policy: Without trained parameters.
        sample: `gj.sample` with everything but prompts, group size and key.
        key: Folded with the step.
        samples: Completions of each prompt, where they are sampled.
        rows: Completions sampled at a time, at most.
        prompt_tokens, max_new_tokens: L and T.
        temperature: The sampling temperature.
        micro_batch_tokens: Tokens per forward pass, on each device.
        pool: Worker processes for rewards; None where a Python function scores.
        processes: The processes of the run, which must call `measure` together.
        warn: Called with a sentence about missing rewards, or checks that hung.

    Attributes:
        parts: What is evaluated, by its name in PARTS.
    """

    def __init__(
        self,
        task: Task,
        trained: Sequence[Example],
        heldout: Sequence[Example],
        policy: Policy,
        sample: SampleFn,
        key: jax.Array,
        *,
        samples: int,
        rows: int,
        prompt_tokens: int,
        max_new_tokens: int,
        temperature: float,
        micro_batch_tokens: int,
        pool: VerifierPool | None,
        processes: Processes,
        warn: Callable[[str], None],
    ):
        self._task, self._policy, self._sample, self._key = task, policy, sample, key
        self._samples, self._rows = samples, rows
        self._temperature, self._tokens = temperature, micro_batch_tokens
        self._pool, self._processes, self._warn = pool, processes, warn

        def encoded(examples: Sequence[Example]) -> EvaluatedPart:
            pad_id = task.tokenizer.pad_token_id
            prompts = pad_left(encode_prompts(task, examples), prompt_tokens, pad_id)
            answers = None
            if task.single_answer:
                answers = answer_rollouts(task, examples, prompt_tokens, max_new_tokens)
            return EvaluatedPart(examples, prompts, answers)

        self.parts = {"train": encoded(trained), "heldout": encoded(heldout)}

    def measure(self, params: Any, step: int) -> dict[str, float]:
        """`eval/...` metrics of the parameters after `step` steps."""
        metrics: dict[str, float] = {}
        sampled = self._sampled(params, jax.random.fold_in(self._key, step))
        for name, part in self.parts.items():
            rows = sampled.get(name, [])
            if part.answers is None:
                rate = pass_rate_interval(rows)
            else:
                rate = self._exact(params, part.answers)
            metrics |= _with_interval(f"eval/{name}_pass_rate", f"eval/{name}", rate)
            if rows and part.answers is not None:
                stem = f"eval/{name}_sampled"
                metrics |= _with_interval(stem, stem, pass_rate_interval(rows))
            if rows:
                metrics[f"eval/{name}_cut_off"] = cut_off_share(rows)
                stem = f"eval/{name}_reward"
                metrics |= _with_interval(stem, stem, mean_reward_interval(rows))
        answered = [row for rows in sampled.values() for row in rows]
        metrics["eval/missing"], failed = missing_and_failed(answered)
        if self._pool is not None:
            metrics["eval/failed"] = failed
        return metrics

    def _exact(self, params: Any, answers: Rollouts) -> tuple[float, float, float]:
        policy = self._policy.replace(params)
        return rate_interval(
            exact_pass_rates(policy, answers, self._temperature, self._tokens)
        )

    def _sampled(self, params: Any, key: jax.Array) -> dict[str, list[PromptAnswers]]:
        """Answers to the held-out prompts, and to the trained ones where no exact pass
        rate is known: all in the same batches, so that few are filled up."""
        parts = {
            name: part
            for name, part in self.parts.items()
            if part.answers is None or name == "heldout"
        }
        examples = [x for part in parts.values() for x in part.examples]
        ids, mask = zip(*(part.prompts for part in parts.values()), strict=True)
        batches = answer_prompts(
            self._sample,
            self._policy.replace(params),
            self._task,
            examples,
            (np.concatenate(ids), np.concatenate(mask)),
            samples=self._samples,
            size=prompts_at_a_time(self._rows, self._samples, len(examples)),
            key=key,
            pool=self._pool,
            processes=self._processes,
            warn=self._warn,
            names=np.concatenate([np.arange(len(p.examples)) for p in parts.values()]),
        )
        rows = iter(row for rows in batches for row in rows)
        return {
            name: list(itertools.islice(rows, len(part.examples)))
            for name, part in parts.items()
        }


def _with_interval(
    name: str, stem: str, interval: tuple[float, float, float]
) -> dict[str, float]:
    return dict(zip((name, f"{stem}_low", f"{stem}_high"), interval, strict=True))
