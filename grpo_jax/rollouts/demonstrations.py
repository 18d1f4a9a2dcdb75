"""Batches of worked solutions that fit, for supervised learning."""

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import encode_imitated, encode_prompts, pack_answers
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Task, WarmStart

_ASIDE = 64  # demonstrations set aside, a tenth of them at most


_TRIES = 100  # draws of a batch before its demonstrations count as too long


class Demonstrations:
    """Batches of demonstrations that fit, never one that is set aside."""

    def __init__(self, task: Task, settings: WarmStart, prompt_length, length):
        self.task, self.settings = task, settings
        self.sizes = prompt_length, length
        self.aside: frozenset[str] = frozenset()  # prompts
        self.left_out = 0
        if settings.longest is None:
            self.left_out = len(task.train) - len(self._fitting(task.train))
            if self.left_out == len(task.train):
                raise ConfigError(
                    f"every solution of task {task.name} is longer than {length} "
                    "tokens, what a completion may have; raise max_new_tokens, or "
                    "leave the warm start out with --warm-start.no-enabled."
                )

    def set_aside(self, rng) -> Rollouts:
        """Some demonstrations, which no batch will show."""
        prompts = dict.fromkeys(e.prompt for e in self.task.train)
        count = max(1, min(_ASIDE, len(prompts) // 10))
        rows = {}
        for _ in range(_TRIES):
            found = self._fitting(self._draw(rng, False))
            rows |= {example.prompt: row for example, *row in found}
            if len(rows) >= count:
                break
        rows = dict(list(rows.items())[:count])
        if len(prompts) > 1:
            self.aside = frozenset(rows)
        return self._packed(list(rows.values()))

    def batch(self, rng, spoiled: bool) -> Rollouts:
        rows = []
        for _ in range(_TRIES):
            rows += [
                row
                for example, *row in self._fitting(self._draw(rng, spoiled))
                if example.prompt not in self.aside
            ]
            if len(rows) >= self.settings.batch_size:
                return self._packed(rows[: self.settings.batch_size])
        raise ConfigError(
            f"fewer than 1 in {_TRIES} demonstrations of task {self.task.name} fit "
            f"into {self.sizes[1]} tokens; raise max_new_tokens."
        )

    def _draw(self, rng, spoiled):
        return self.settings.demonstrations(rng, self.settings.batch_size, spoiled)

    def _fitting(self, examples) -> list[tuple[Example, list[int], list[int]]]:
        prompts = encode_prompts(self.task, examples)
        answers = encode_imitated(self.task, examples)
        return [
            row
            for row in zip(examples, prompts, answers, strict=True)
            if len(row[1]) <= self.sizes[0] and len(row[2]) <= self.sizes[1]
        ]

    def _packed(self, rows):
        prompts, answers = zip(*rows, strict=True)
        return pack_answers(
            prompts, answers, *self.sizes, self.task.tokenizer.pad_token_id
        )
