"""Batches of worked solutions that fit, for supervised learning."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import encode_imitated, encode_prompts, pack_answers
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Task, WarmStart, as_examples

_HELD_OUT = 64  # demonstrations, at most a tenth of all
_TRIES = 100  # draws of a batch before its demonstrations count as too long

Row = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its answer


class Demonstrations:
    """Batches of the demonstrations that fit, without those that were set aside.

    Args:
        task: Encodes the demonstrations.
        settings: The task's `WarmStart`, which draws them.
        prompt_length: L, tokens that a prompt may have.
        length: T, tokens that an answer may have.

    Attributes:
        left_out: Examples of the training part that are too long, if they are what is
            demonstrated; else 0.

    Raises:
        ConfigError: none fits.
    """

    def __init__(
        self, task: Task, settings: WarmStart, prompt_length: int, length: int
    ):
        self.task, self.settings = task, settings
        self.sizes = prompt_length, length
        self.left_out = 0
        self._held_out: frozenset[tuple] = frozenset()  # prompts, after their turns
        if settings.longest is None:
            self.left_out = len(task.train) - len(self._fitting(task.train))
            if self.left_out == len(task.train):
                raise ConfigError(
                    f"every solution of task {task.name} is longer than {length} "
                    "tokens, what a completion may have; raise max_new_tokens, or "
                    "leave the warm start out with --warm-start.no-enabled."
                )

    def set_aside(self, rng: np.random.Generator) -> Rollouts:
        """Some demonstrations [N, 1, T], which no later batch contains."""
        prompts = dict.fromkeys(_asked(e) for e in self.task.train)
        count = max(1, min(_HELD_OUT, len(prompts) // 10))
        rows: dict[tuple, Row] = {}
        for _ in range(_TRIES):
            drawn = self._fitting(self._draw(rng, spoiled=False))
            rows |= {_asked(example): row for example, row in drawn}
            if len(rows) >= count:
                break
        rows = dict(list(rows.items())[:count])
        if len(prompts) > 1:
            self._held_out = frozenset(rows)
        return self._packed(list(rows.values()))

    def batch(self, rng: np.random.Generator, spoiled: bool) -> Rollouts:
        """A batch [batch_size, 1, T].

        Args:
            rng: Draws it.
            spoiled: Passed to `WarmStart.demonstrations`.

        Raises:
            ConfigError: too few of the demonstrations drawn fit.
        """
        rows: list[Row] = []
        for _ in range(_TRIES):
            rows += [
                row
                for example, row in self._fitting(self._draw(rng, spoiled))
                if _asked(example) not in self._held_out
            ]
            if len(rows) >= self.settings.batch_size:
                return self._packed(rows[: self.settings.batch_size])
        raise ConfigError(
            f"fewer than 1 in {_TRIES} demonstrations of task {self.task.name} fit "
            f"into {self.sizes[1]} tokens; raise max_new_tokens."
        )

    def _draw(self, rng: np.random.Generator, spoiled: bool) -> Sequence[Example]:
        drawn = self.settings.demonstrations(rng, self.settings.batch_size, spoiled)
        return as_examples("what warm_start.demonstrations gives", drawn)

    def _fitting(self, examples: Sequence[Example]) -> list[tuple[Example, Row]]:
        """The examples whose prompt and answer fit, with their token ids."""
        prompts = encode_prompts(self.task, examples)
        answers = encode_imitated(self.task, examples)
        return [
            (example, (prompt, answer))
            for example, prompt, answer in zip(examples, prompts, answers, strict=True)
            if len(prompt) <= self.sizes[0] and len(answer) <= self.sizes[1]
        ]

    def _packed(self, rows: Sequence[Row]) -> Rollouts:
        prompts, answers = zip(*rows, strict=True)
        return pack_answers(
            prompts, answers, *self.sizes, self.task.tokenizer.pad_token_id
        )


def _asked(example: Example) -> tuple:
    """What makes prompts the same: the text and the turns before it."""
    return example.context, example.prompt
