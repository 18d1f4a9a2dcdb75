"""Countdown: reach a target with each number once, generated, nothing to download.

Prompts hold 3 or 4 numbers from 1 to 30 and a target from 1 to 100 that an expression
on all of them reaches, by construction. Every right expression is accepted: a small
model can find its own. The warm start shows one expression per trained prompt.
"""

from collections.abc import Sequence

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rewards.verifiers import countdown_gold
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.build import OWN, Language, Sourced, text_task
from grpo_jax.tasks.types import Task

COUNTS = (3, 4)  # numbers in a prompt
LARGEST, TARGET = 30, 100
TRAIN, HELDOUT = 8192, 512
MOST = 100_000  # prompts, a fraction of all there are


def make_countdown(
    *,
    train_prompts: int | None = None,
    heldout_prompts: int | None = None,
    seed: int = 0,
    language: Language = OWN,
    rewards: Sequence[str] = (),
) -> Task:
    """Trained and held-out prompts: no set of numbers and target is in both."""
    train_prompts = TRAIN if train_prompts is None else train_prompts
    heldout_prompts = heldout_prompts or HELDOUT
    if train_prompts + heldout_prompts > MOST:
        raise ConfigError(
            f"task.train_prompts and task.heldout_prompts must be at most {MOST} "
            f"together, got {train_prompts} and {heldout_prompts}."
        )
    rng = host_rng(seed, Stream.PUZZLES)
    found: dict[tuple, Example] = {}
    while len(found) < train_prompts + heldout_prompts:
        numbers, target, expression = _puzzle(rng)
        puzzle = (target, *sorted(numbers))
        tags = (("numbers", str(len(numbers))),)
        example = Example(
            _prompt(numbers, target),
            countdown_gold(target, numbers),
            expression,
            tags,
        )
        found.setdefault(puzzle, example)
    rows = [
        Sourced(f"puzzle {i}", example) for i, example in enumerate(found.values(), 1)
    ]
    return text_task(
        name="countdown",
        train=rows[heldout_prompts:],
        heldout=rows[:heldout_prompts],
        train_prompts=None,
        heldout_prompts=heldout_prompts,
        seed=seed,
        language=language,
        rewards=rewards,
        default_reward="countdown",
        warm_start_steps=600,
        batch_size=128,
        learning_rate=3e-3,
        note="Held-out puzzles need the same skill as trained ones.",
    )


def _prompt(numbers, target):
    *others, last = map(str, numbers)
    return (
        f"Use each of the numbers {', '.join(others)} and {last} once, with + - * / "
        f"and parentheses, to make {target}. End with the expression alone on a line.\n"
    )


def _puzzle(rng):
    """(numbers in the prompt's order, target, an expression that reaches it)."""
    while True:
        count = COUNTS[rng.integers(len(COUNTS))]
        numbers = [int(n) for n in rng.integers(1, LARGEST + 1, count)]
        parts = [(n, str(n), "number") for n in numbers]
        while len(parts) > 1:
            left = parts.pop(rng.integers(len(parts)))
            right = parts.pop(rng.integers(len(parts)))
            joined = _joined(left, right, "+-*/"[rng.integers(4)])
            if joined is None:
                break
            parts.append(joined)
        else:
            value, expression, _ = parts[0]
            if value <= TARGET:
                return numbers, value, expression


def _joined(left, right, sign):
    """The two parts and the sign between, in as few parentheses as are needed; None
    where a step is no positive whole number."""
    (a, x, of_a), (b, y, of_b) = left, right
    if (sign == "/" and a % b) or (sign == "-" and a <= b):
        return None
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    loose = ("+", "-")
    if sign in ("*", "/") and of_a in loose:
        x = f"({x})"
    if (sign in ("-", "*") and of_b in loose) or (sign == "/" and of_b != "number"):
        y = f"({y})"
    return value, f"{x}{sign}{y}", sign
