"""Padded lengths of prompts and completions."""

import dataclasses
import math
from collections.abc import Sequence

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import encode_imitated, encode_prompts
from grpo_jax.tasks.types import Task

_SMALLEST = 16  # tokens: shorter buckets save nothing


def bucket(length: int) -> int:
    """The padded length for `length` tokens: unchanged up to 16, else rounded up to a
    multiple of 16, or of 1/8 of the next power of two: at most 8 shapes per doubling.
    """
    if length <= _SMALLEST:
        return length
    step = max(_SMALLEST, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def completion_buckets(max_new_tokens: int) -> list[int]:
    """Lengths that sampled completions are trimmed to before the update: T, T/2, T/4.

    Few, because a program for each is compiled before the first step.
    """
    halves = {-(-max_new_tokens // 2**i) for i in range(3)}
    return sorted(
        {bucket(n) for n in halves if n >= 4 * _SMALLEST and n < max_new_tokens}
        | {max_new_tokens}
    )


def drop_long_prompts(task: Task, limit: int) -> tuple[Task, tuple[int, int]]:
    """(task without the prompts of more than `limit` tokens, numbers of prompts left
    out of its training and held-out part).

    Raises:
        ConfigError: every prompt of a part is longer.
    """
    kept = []
    for name, part in (("trained", task.train), ("held-out", task.heldout)):
        rows = zip(part, encode_prompts(task, part), strict=True)
        kept.append([example for example, ids in rows if len(ids) <= limit])
        if not kept[-1]:
            raise ConfigError(
                f"sampling.max_prompt_tokens is {limit}, and every {name} prompt of "
                f"task {task.name} has more tokens; raise it."
            )
    counts = len(task.train) - len(kept[0]), len(task.heldout) - len(kept[1])
    return dataclasses.replace(task, train=kept[0], heldout=kept[1]), counts


def completion_tokens(task: Task, examples: Sequence[Example] | None = None) -> int:
    """Tokens that a completion needs: the longest answer and EOS; for worked solutions
    of varying length, enough for 99 in 100 of those of the training part.

    Args:
        task: Its answers or solutions are encoded.
        examples: The training part first; None: the task's.

    Raises:
        ConfigError: the task has no answers or solutions to measure.
    """
    examples = task.train + task.heldout if examples is None else examples
    if not callable(task.reward) and not any(e.solution for e in task.train):
        raise ConfigError(
            f"max_new_tokens must be given: the rows of task {task.name} have "
            "no worked solutions that would tell how long a completion is."
        )
    lengths = [len(ids) for ids in encode_imitated(task, examples)]
    if callable(task.reward):
        return max(lengths)
    lengths = sorted(lengths[: len(task.train)])
    return lengths[math.ceil(0.99 * len(lengths)) - 1]
