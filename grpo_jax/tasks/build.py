"""From rows of text to a task: what every task on files has in common.

Held-out prompts are never trained on: a prompt that both parts hold is evaluated only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.spec import parse_reward
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import VERIFIERS, check_gold
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.templates import check_template
from grpo_jax.tasks.tokenizers import (
    character_tokenizer,
    check_single_spelling,
    train_tokenizer,
)
from grpo_jax.tasks.types import Task, WarmStart

HELDOUT = 512  # prompts evaluated, where there are that many


class Language(NamedTuple):
    """How a task's text becomes tokens; None and () take the task's own."""

    tokenizer: Any = None
    eos_ids: tuple[int, ...] = ()
    template: str | None = None
    system: str | None = None
    vocab_size: int | None = None


OWN = Language()


class Sourced(NamedTuple):
    """An example and the row it was read from."""

    where: str
    example: Example


def text_task(
    *,
    name: str,
    train: Sequence[Sourced],
    heldout: Sequence[Sourced] | None,
    train_prompts: int | None,
    heldout_prompts: int | None,
    seed: int,
    language: Language,
    rewards: Sequence[str],
    default_reward: str,
    warm_start_steps: int = 600,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    note: str = "",
) -> Task:
    """A task whose completions are free text, judged by rewards by name.

    Args:
        train, heldout: Rows; where `heldout` is None, a tenth of the train rows, 512 at
            most, is held out by seed.
        rewards: As `parse_reward` reads them; empty: `default_reward`.

    Raises:
        ConfigError: a gold answer that no completion could match, more prompts asked
            for than there are, or options that do not go together.
    """
    parsed = tuple(parse_reward(r) for r in rewards or [default_reward])
    check_golds(parsed, [*train, *(heldout or [])])
    rng = host_rng(seed, Stream.DATA_PARTS)
    if heldout is None:
        train, heldout, held = _split(rng, train, heldout_prompts)
        note += f" {held} held-out prompts were split off by task.seed {seed}."
    seen = {_key(row.example) for row in heldout}
    pool = [row.example for row in train if _key(row.example) not in seen]
    if dropped := len(train) - len(pool):
        note += f" {dropped} training rows are held-out prompts and were left out."
    unseen = list({_key(row.example): row.example for row in heldout}.values())
    trained = pick(rng, pool, train_prompts, "train_prompts")
    if heldout_prompts is None:
        heldout_prompts = min(HELDOUT, len(unseen))
    evaluated = pick(rng, unseen, heldout_prompts or None, "heldout_prompts")
    texts = (t for e in pool for t in (e.prompt, e.solution or e.answer))
    tokenizer, eos_ids, template, system = _speak(language, texts)

    def demonstrations(rng, count, spoiled):
        del spoiled  # there is no second stage
        return [trained[i] for i in rng.integers(len(trained), size=count)]

    return Task(
        name=name,
        train=trained,
        heldout=evaluated,
        tokenizer=tokenizer,
        reward=parsed,
        eos_ids=eos_ids,
        template=template,
        system=system,
        warm_start=WarmStart(
            demonstrations=demonstrations,
            max_steps=warm_start_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
        ),
        note=note.strip(),
    )


def single_answer_language(
    language: Language, *, task: str, alphabet: str, answers: Sequence[str]
) -> dict[str, Any]:
    """Fields of a Task of which exactly one completion is right.

    The tokenizer's own EOS alone ends a completion: with another one, two completions
    would be right.

    Raises:
        ConfigError: the tokenizer has several token sequences for an answer.
    """
    tokenizer, eos_ids, template, system = _speak(
        language, (), lambda: character_tokenizer(alphabet)
    )
    if language.tokenizer is not None:
        check_single_spelling(tokenizer, answers, task)
    if tokenizer.eos_token_id is None:
        eos_ids = eos_ids[:1]
    else:
        eos_ids = ()
    return dict(tokenizer=tokenizer, eos_ids=eos_ids, template=template, system=system)


def pick(rng, examples: list, count: int | None, name: str) -> list:
    """`count` of the examples by `rng`; None: all, in their own order."""
    if count is None:
        return list(examples)
    if count > len(examples):
        raise ConfigError(
            f"task.{name} must be at most {len(examples)}, the prompts found, "
            f"got {count}."
        )
    if count == len(examples):
        return list(examples)
    return [examples[i] for i in rng.permutation(len(examples))[:count]]


def check_golds(rewards: Sequence[Reward], rows: Sequence[Sourced]) -> None:
    """ConfigError, naming the row, where a reward could never accept its gold."""
    for row in rows:
        for reward in rewards:
            if reward.name not in VERIFIERS:
                continue
            reason = check_gold(reward.name, row.example.answer)
            if reason is not None:
                raise ConfigError(
                    f"{row.where}: no completion could satisfy reward {reward.name}: "
                    f"{reason}; correct the row or remove it."
                )


def _speak(language, texts, make=None):
    """(tokenizer, eos_ids, template, system), the task's own where none is given.

    The template of a tokenizer made here is what another task would choose for it: a
    model is asked later as it was taught.
    """
    tokenizer, eos_ids, template, system, vocab_size = language
    if tokenizer is None:
        if eos_ids:
            raise ConfigError(
                f"task.eos_ids go with a tokenizer, got {eos_ids} and none; leave them "
                "out."
            )
        tokenizer = make() if make else train_tokenizer(texts, vocab_size)
    elif vocab_size is not None:
        raise ConfigError(
            f"task.vocab_size is of a tokenizer trained here, got {vocab_size} and a "
            "tokenizer; leave one of them out."
        )
    template = template or ("chat" if tokenizer.chat_template else "none")
    check_template(tokenizer, template, system)
    return tokenizer, tuple(eos_ids), template, system


def _split(rng, rows, heldout_prompts):
    """(train, held-out, how many held out), by distinct prompt."""
    keys = list({_key(row.example): None for row in rows})
    count = heldout_prompts or min(HELDOUT, max(1, len(keys) // 10))
    if count >= len(keys):
        raise ConfigError(
            f"task.heldout_prompts must be below {len(keys)}, the prompts in the one "
            f"file there is, got {count}; give more rows or task.heldout_path."
        )
    held = {keys[i] for i in rng.permutation(len(keys))[:count]}
    train = [row for row in rows if _key(row.example) not in held]
    return train, [row for row in rows if _key(row.example) in held], count


def _key(example):
    """What makes two prompts the same: their words."""
    return " ".join(example.prompt.split())
