"""How many prompts an evaluation during training asks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grpo_jax.evaluation.sampled import MULTIPLE
from grpo_jax.instrument.plan import SAMPLING, step_cost
from grpo_jax.planning.shapes import Lengths
from grpo_jax.rewards.types import Example
from grpo_jax.runs.config import EvaluationConfig, TrainConfig
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.types import Task

MOST, LEAST = 256, 16  # trained prompts; and held-out ones, where time decides
PERIOD = EvaluationConfig.every  # steps that pay for an evaluation, if only the ends do


class EvaluatedPrompts(NamedTuple):
    """Which prompts an evaluation asks: indices among the task's."""

    picked: np.ndarray  # all trained prompts in the order that fixed sets take
    trained: np.ndarray
    heldout: np.ndarray

    def sampled(self, task: Task) -> int:
        """How many have their answers sampled: trained ones with exact rates do not."""
        return len(self.heldout) + (0 if task.single_answer else len(self.trained))

    def examples(self, task: Task) -> tuple[Sequence[Example], Sequence[Example]]:
        """(trained, held-out) examples."""
        return (
            [task.train[i] for i in self.trained],
            [task.heldout[i] for i in self.heldout],
        )


def evaluated_prompts(
    config: TrainConfig, task: Task, lengths: Lengths
) -> EvaluatedPrompts:
    """The prompts of evaluations, by number as in the config or by their time.

    Where completions are sampled, each part has as many prompts as fit into
    evaluation.max_overhead of step time, from 16 to 256, unless its number was given.
    Time is counted in forward passes over tokens, so that the same command asks the
    same prompts, and not over the run's steps, so that a longer run does too.
    """
    rng = host_rng(config.seed, Stream.EVALUATED_PROMPTS)
    picked = rng.permutation(len(task.train))
    heldout = np.arange(len(task.heldout))
    number = config.evaluation.prompts
    if number is None and task.single_answer:
        number = MOST
    elif number is None:
        number = _affordable(config, lengths)
        if config.task.heldout_prompts is None:
            heldout = np.sort(rng.permutation(len(heldout))[:number])
    return EvaluatedPrompts(picked, picked[:number], heldout)


def _affordable(config: TrainConfig, lengths: Lengths) -> int:
    """Prompts of either part that an evaluation has time for."""
    length, t = lengths.prompt_length, lengths.max_new_tokens
    step = step_cost(config.batch, length, t)
    period = config.evaluation.every or PERIOD
    prompt = SAMPLING * (length + config.evaluation.samples * t)
    number = config.evaluation.max_overhead * period * step / prompt / 2
    return int(np.clip(number // MULTIPLE * MULTIPLE, LEAST, MOST))


def evaluation_text(config: TrainConfig, task: Task, asked: EvaluatedPrompts) -> str:
    """One line about the evaluations of a run."""
    parts = [
        f"{len(chosen)} of {len(examples)} {name}"
        if len(chosen) < len(examples)
        else f"{len(chosen)} {name}"
        for name, chosen, examples in (
            ("trained", asked.trained, task.train),
            ("held-out", asked.heldout, task.heldout),
        )
    ]
    samples, every = config.evaluation.samples, config.evaluation.every
    how = "" if samples == 1 else f", {samples} samples of each"
    if task.single_answer:
        how = ", exact"
    when = f"every {every} steps, " if every else ""
    when += "at the start and at the end"
    return f"evaluation: {' and '.join(parts)} prompts{how}, {when}"
