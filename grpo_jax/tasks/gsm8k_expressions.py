"""The calculator annotations of GSM8K, `<<48/2=24>>`: left side in, right side out.

Real data at the size of a laptop (Cobbe et al. 2021, arXiv:2110.14168). Exactly one
completion is right. To a small model these are facts more than a skill: expect trained
prompts to be memorised and held-out ones to stay where they are.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.rows import Row
from grpo_jax.rewards.types import Example
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.build import TaskRequest, single_answer_task
from grpo_jax.tasks.files import read_parts
from grpo_jax.tasks.types import Task, WarmStart

ALPHABET = "0123456789+-*/().="
MAX_PROMPT, MAX_ANSWER = 12, 6  # characters, without the prompt's "="
_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]+)>>")


def make_gsm8k_expressions(request: TaskRequest) -> Task:
    """A sample of the training file's expressions; the held-out ones are only in the
    test file."""
    path = request.path
    if path is not None and not Path(path).is_dir():
        raise ConfigError(
            f"task.path must be a directory with train.jsonl and test.jsonl, "
            f"got {path}."
        )
    train_rows, test_rows = read_parts(
        path, hub_name=("openai/gsm8k", "main"), fields=["answer"]
    )
    pool, test_pool = _expressions(train_rows), _expressions(test_rows or [])
    pool_prompts = {example.prompt for example in pool}
    test_pool = [e for e in test_pool if e.prompt not in pool_prompts]
    train_prompts = request.train_prompts or 256
    heldout_prompts = request.heldout_prompts or 512
    _check_count("train_prompts", train_prompts, len(pool))
    _check_count("heldout_prompts", heldout_prompts, len(test_pool))
    rng = host_rng(request.seed, Stream.DATA_PARTS)
    # Not `pick`, which keeps the order where all are taken: these are shuffled then.
    train = [pool[i] for i in rng.permutation(len(pool))[:train_prompts]]
    heldout = [test_pool[i] for i in rng.permutation(len(test_pool))[:heldout_prompts]]

    def demonstrations(
        rng: np.random.Generator, count: int, spoiled: bool
    ) -> list[Example]:
        del spoiled  # every demonstration is right: facts half learned are noisy enough
        return [pool[i] for i in rng.integers(len(pool), size=count)]

    return single_answer_task(
        request,
        name="gsm8k-expressions",
        train=train,
        heldout=heldout,
        alphabet=ALPHABET,
        warm_start=WarmStart(
            demonstrations=demonstrations,
            longest=Example(
                max((e.prompt for e in pool), key=len),
                max((e.answer for e in pool), key=len),
            ),
            target_pass_rate=0.22,
            max_steps=1500,
            batch_size=256,
        ),
        refine_template="{prompt}{draft}={prompt}",
        note="These are facts, not a shared skill: what a small model memorises of the "
        "trained expressions need not carry over to the held-out ones.",
    )


def _check_count(name: str, wanted: int, available: int) -> None:
    if available < wanted:
        raise ConfigError(
            f"task.{name} must be at most {available}, the expressions found, "
            f"got {wanted}."
        )


def _expressions(rows: Sequence[Row]) -> list[Example]:
    """Distinct short expressions in order of appearance, without those that have two
    answers."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        for left, right in _ANNOTATION.findall(row.values["answer"]):
            short = len(left) <= MAX_PROMPT and len(right) <= MAX_ANSWER
            if short and set(left + right) <= set(ALPHABET):
                answers.setdefault(left, set()).add(right)
    return [
        Example(f"{left}=", next(iter(rights)))
        for left, rights in answers.items()
        if len(rights) == 1
    ]
