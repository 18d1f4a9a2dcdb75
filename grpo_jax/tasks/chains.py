"""Chains: mod-10 arithmetic with a scratchpad, generated, nothing to download.

Prompt `3+4*2=`, answer `7,4`: the running value mod 10 after each operation, left to
right, for 1 to 4 operations from + - *. Exactly one completion is right. The warm start
first learns the task, then demonstrations whose steps are spoiled, multiplications
most: a policy with very different pass rates from prompt to prompt.
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from grpo_jax.rewards.types import Example
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.build import TaskRequest, single_answer_task
from grpo_jax.tasks.types import Task, WarmStart

OPERATIONS = "+-*"
LENGTHS = (1, 2, 3, 4)  # operations in a prompt
# Share of steps whose stated result is replaced by a random digit in the second stage.
SPOILED = {"+": 0.1, "-": 0.4, "*": 0.7}
ALPHABET = "0123456789" + OPERATIONS + "=,"


def make_chains(request: TaskRequest) -> Task:
    """Trained and held-out prompts, equally many of each length as far as they go.

    Held-out prompts are in neither stage of the warm start.
    """
    train, heldout = _pick_prompts(
        host_rng(request.seed, Stream.PUZZLES),
        request.train_prompts or 2048,
        request.heldout_prompts or 512,
    )
    excluded = frozenset(heldout)

    def demonstrations(
        rng: np.random.Generator, count: int, spoiled: bool
    ) -> list[Example]:
        examples = []
        while len(examples) < count:
            prompt = _random_prompt(rng, int(rng.choice(LENGTHS)))
            if prompt not in excluded:
                rates = SPOILED if spoiled else dict.fromkeys(OPERATIONS, 0.0)
                examples.append(Example(prompt, _spoiled_answer(prompt, rng, rates)))
        return examples

    return single_answer_task(
        request,
        name="chains",
        train=[Example(prompt, _answer(prompt)) for prompt in train],
        heldout=[Example(prompt, _answer(prompt)) for prompt in heldout],
        alphabet=ALPHABET,
        warm_start=WarmStart(
            demonstrations=demonstrations,
            longest=Example("0+0+0+0+0=", "0,0,0,0"),
            target_pass_rate=0.85,
            max_steps=1200,
            noisy_steps=150,
        ),
        refine_template="{prompt}{draft},{prompt}",
        note="Held-out prompts need the same skill as trained ones and were in neither "
        "the warm start nor the training: their pass rate measures generalisation.",
    )


def _pick_prompts(
    rng: np.random.Generator, train_prompts: int, heldout_prompts: int
) -> tuple[list[str], list[str]]:
    """(training, held-out) prompts, all different."""
    train, heldout = [], []
    for i, operations in enumerate(LENGTHS):
        heldout_count, train_count = (
            n // len(LENGTHS) + (i < n % len(LENGTHS))
            for n in (heldout_prompts, train_prompts)
        )
        count = heldout_count + train_count
        prompts = _distinct_prompts(rng, operations, count)
        if len(prompts) < count:  # too few: a tenth of them is held out
            heldout_count = min(heldout_count, len(prompts) // 10)
        heldout += prompts[:heldout_count]
        train += prompts[heldout_count : heldout_count + train_count]
    return train, heldout


def _random_prompt(rng: np.random.Generator, operations: int) -> str:
    digits = rng.integers(10, size=operations + 1)
    signs = rng.choice(list(OPERATIONS), size=operations)
    return "".join(f"{d}{s}" for d, s in zip(digits, [*signs, "="], strict=True))


def _distinct_prompts(
    rng: np.random.Generator, operations: int, count: int
) -> list[str]:
    """`count` different prompts in random order; all that exist, if they are fewer."""
    total = 10 * 30**operations
    if count * 2 > total:
        every = [
            "".join(parts) + "="
            for parts in itertools.product(
                "0123456789", *([OPERATIONS, "0123456789"] * operations)
            )
        ]
        return [every[i] for i in rng.permutation(len(every))][:count]
    prompts = {}
    while len(prompts) < count:
        prompts[_random_prompt(rng, operations)] = None
    return list(prompts)


def _answer(prompt: str) -> str:
    """The right scratchpad."""
    return _scratchpad(prompt, lambda value, sign: value)


def _spoiled_answer(
    prompt: str, rng: np.random.Generator, rates: Mapping[str, float]
) -> str:
    """A scratchpad of which steps are replaced by a random digit at `rates`, by
    operation; the next step goes on from that digit."""

    def spoil(value: int, sign: str) -> int:
        return int(rng.integers(10)) if rng.random() < rates[sign] else value

    return _scratchpad(prompt, spoil)


def _scratchpad(prompt: str, change: Callable[[int, str], int]) -> str:
    """The running values, each after `change(value, operation)`."""
    value, results = int(prompt[0]), []
    for sign, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        b = int(digit)
        value = {"+": value + b, "-": value - b, "*": value * b}[sign] % 10
        value = change(value, sign)
        results.append(str(value))
    return ",".join(results)
