"""Countdown: reach a target with each number once, generated, nothing to download.

Prompts hold 3 or 4 numbers from 1 to 30 and a target from 1 to 100 that an expression
on all of them reaches, by construction. Every right expression is accepted: a small
model can find its own. The warm start shows one expression per trained prompt.
"""

from typing import NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rewards.verifiers import countdown_gold
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.build import HELDOUT, SourcedExample, TaskRequest, text_task
from grpo_jax.tasks.types import Task

COUNTS = (3, 4)  # numbers in a prompt
LARGEST, TARGET = 30, 100
TRAIN = 8192
MOST = 100_000  # prompts, a fraction of those that exist


def make_countdown(request: TaskRequest) -> Task:
    """Trained and held-out prompts: no set of numbers and target is in both."""
    train_prompts = TRAIN if request.train_prompts is None else request.train_prompts
    heldout_prompts = request.heldout_prompts or HELDOUT
    if train_prompts + heldout_prompts > MOST:
        raise ConfigError(
            f"task.train_prompts and task.heldout_prompts must be at most {MOST} "
            f"together, got {train_prompts} and {heldout_prompts}."
        )
    rng = host_rng(request.seed, Stream.PUZZLES)
    examples: dict[tuple[int, ...], Example] = {}  # one a set of numbers and target
    while len(examples) < train_prompts + heldout_prompts:
        numbers, target, expression = _puzzle(rng)
        puzzle = (target, *sorted(numbers))
        tags = (("numbers", str(len(numbers))),)
        example = Example(
            _prompt(numbers, target),
            countdown_gold(target, numbers),
            expression,
            tags,
        )
        examples.setdefault(puzzle, example)
    rows = [
        SourcedExample(f"puzzle {i}", example)
        for i, example in enumerate(examples.values(), 1)
    ]
    return text_task(
        request._replace(train_prompts=None, heldout_prompts=heldout_prompts),
        name="countdown",
        train=rows[heldout_prompts:],
        heldout=rows[:heldout_prompts],
        default_reward="countdown",
        warm_start_steps=600,
        batch_size=128,
        learning_rate=3e-3,
        note="Held-out puzzles need the same skill as trained ones.",
    )


def _prompt(numbers: list[int], target: int) -> str:
    *others, last = map(str, numbers)
    return (
        f"Use each of the numbers {', '.join(others)} and {last} once, with + - * / "
        f"and parentheses, to make {target}. End with the expression alone on a line.\n"
    )


def _puzzle(rng: np.random.Generator) -> tuple[list[int], int, str]:
    """(numbers in the prompt's order, target, an expression that reaches it)."""
    while True:
        count = COUNTS[rng.integers(len(COUNTS))]
        numbers = [int(n) for n in rng.integers(1, LARGEST + 1, count)]
        parts = [_Part(n, str(n), "") for n in numbers]
        while len(parts) > 1:
            left = parts.pop(rng.integers(len(parts)))
            right = parts.pop(rng.integers(len(parts)))
            joined = _join(left, right, "+-*/"[rng.integers(4)])
            if joined is None:
                break
            parts.append(joined)
        else:
            if parts[0].value <= TARGET:
                return numbers, parts[0].value, parts[0].text


class _Part(NamedTuple):
    """An expression, its value, and the sign of its last operation; "" for a number."""

    value: int
    text: str
    sign: str


def _join(left: _Part, right: _Part, sign: str) -> _Part | None:
    """`left sign right` with as few parentheses as are needed; None where its value is
    not a positive integer."""
    (a, x, inner_x), (b, y, inner_y) = left, right
    if (sign == "/" and a % b) or (sign == "-" and a <= b):
        return None
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    sums = ("+", "-")
    if sign in ("*", "/") and inner_x in sums:
        x = f"({x})"
    if (sign in ("-", "*") and inner_y in sums) or (sign == "/" and inner_y):
        y = f"({y})"
    return _Part(value, f"{x}{sign}{y}", sign)
