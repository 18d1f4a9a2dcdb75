"""The calculator annotations of GSM8K, `<<48/2=24>>`: left side in, right side out.

Real data at the size of a laptop (Cobbe et al. 2021, arXiv:2110.14168). Exactly one
completion is right. To a small model these are facts more than a skill: expect trained
prompts to be memorised and held-out ones to stay where they are.
"""

import re
from pathlib import Path

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rewards.verifiers import exact
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.build import OWN, Language, single_answer_language
from grpo_jax.tasks.files import read_parts
from grpo_jax.tasks.types import Task, WarmStart

ALPHABET = "0123456789+-*/().="
MAX_PROMPT, MAX_ANSWER = 12, 6  # characters, without the prompt's "="
_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]+)>>")


def make_gsm8k_expressions(
    *,
    path: str | None = None,
    train_prompts: int | None = None,
    heldout_prompts: int | None = None,
    seed: int,
    language: Language = OWN,
) -> Task:
    """A pool of training expressions; held-out ones are of the test file only."""
    train_prompts, heldout_prompts = train_prompts or 256, heldout_prompts or 512
    if path is not None and not Path(path).is_dir():
        raise ConfigError(
            f"task.path must be a directory with train.jsonl and test.jsonl, "
            f"got {path}."
        )
    train_rows, test_rows = read_parts(
        path, hub_name=("openai/gsm8k", "main"), fields=["answer"]
    )
    known, unseen = _expressions(train_rows), _expressions(test_rows)
    seen = {example.prompt for example in known}
    unseen = [example for example in unseen if example.prompt not in seen]
    for name, wanted, available in (
        ("train_prompts", train_prompts, len(known)),
        ("heldout_prompts", heldout_prompts, len(unseen)),
    ):
        if available < wanted:
            raise ConfigError(
                f"task.{name} must be at most {available}, the expressions found, "
                f"got {wanted}."
            )
    rng = host_rng(seed, Stream.DATA_PARTS)
    pool = [known[i] for i in rng.permutation(len(known))[:train_prompts]]
    heldout = [unseen[i] for i in rng.permutation(len(unseen))[:heldout_prompts]]

    def demonstrations(rng, count, spoiled):
        del spoiled  # every demonstration is right: facts half learned are noisy enough
        return [known[i] for i in rng.integers(len(known), size=count)]

    return Task(
        name="gsm8k-expressions",
        train=pool,
        heldout=heldout,
        **single_answer_language(
            language,
            task="gsm8k-expressions",
            alphabet=ALPHABET,
            answers=[e.answer for e in pool + heldout],
        ),
        reward=exact,
        single_answer=True,
        warm_start=WarmStart(
            demonstrations=demonstrations,
            longest=Example(
                max((e.prompt for e in known), key=len),
                max((e.answer for e in known), key=len),
            ),
            target_pass_rate=0.22,
            max_steps=1500,
            batch_size=256,
        ),
        refine_template="{prompt}{draft}={prompt}",
        note="These are facts, not a shared skill: a model this small memorises the "
        "trained expressions, and nothing carries over to the held-out ones.",
    )


def _expressions(rows):
    """Distinct short expressions in order of appearance; those with two answers go."""
    answers = {}
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
