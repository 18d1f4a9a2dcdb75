"""From examples to a task: what the makers of all tasks share.

Held-out prompts are never trained on: a prompt in both parts is evaluated only.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.spec import parse_reward
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import ANSWERS, refusal, verbatim
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.ends import completion_ends, turn_end_warnings
from grpo_jax.tasks.jinja import check_arguments
from grpo_jax.tasks.row_checks import check_texts, control_token_warnings
from grpo_jax.tasks.templates import Turns, check_template
from grpo_jax.tasks.tokenizers import (
    character_tokenizer,
    check_single_spelling,
    train_tokenizer,
)
from grpo_jax.tasks.types import SourcedExample, Task, WarmStart, now

HELDOUT = 512  # prompts evaluated, where there are that many


class TaskRequest(NamedTuple):
    """Options of `load_task` that several tasks share; None and () take the task's
    defaults."""

    seed: int = 0
    path: str | None = None
    heldout_path: str | None = None
    train_prompts: int | None = None
    heldout_prompts: int | None = None
    rewards: tuple[str, ...] = ()
    tokenizer: Any = None
    eos_ids: tuple[int, ...] = ()
    template: str | None = None
    system: str | None = None
    template_arguments: Mapping[str, Any] = MappingProxyType({})
    control_tokens: Literal["spell", "keep"] = "spell"
    date: str | None = None
    vocab_size: int | None = None
    thinking: bool = False


def text_task(
    request: TaskRequest,
    *,
    name: str,
    train: Sequence[SourcedExample],
    heldout: Sequence[SourcedExample] | None,
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
        default_reward: Used where the request has no rewards; both as `parse_reward`
            reads them.
        warm_start_steps, batch_size, learning_rate: Of supervised learning.
        note: For the report; what was split off or left out is added.

    Raises:
        ConfigError: a gold answer that no completion could match, more prompts asked
            for than there are, or options that do not go together.
    """
    rewards = tuple(parse_reward(r) for r in request.rewards or [default_reward])
    if request.thinking:
        rewards = _after_thinking(rewards)
    check_texts([*train, *(heldout or [])])
    check_golds(rewards, [*train, *(heldout or [])])
    parts = _pick_parts(request, train, heldout)
    texts = (t for e in parts.pool for t in (e.prompt, e.solution or e.answer))
    language = make_language(
        request, lambda: train_tokenizer(texts, request.vocab_size)
    )

    used = {*parts.train, *parts.heldout}
    sourced = [row for row in [*train, *(heldout or [])] if row.example in used]

    def demonstrations(
        rng: np.random.Generator, count: int, spoiled: bool
    ) -> list[Example]:
        del spoiled  # there is no second stage
        return [parts.train[i] for i in rng.integers(len(parts.train), size=count)]

    return Task(
        name=name,
        train=parts.train,
        heldout=parts.heldout,
        reward=rewards,
        warm_start=WarmStart(
            demonstrations=demonstrations,
            max_steps=warm_start_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
        ),
        note=f"{note} {parts.note}".strip(),
        warnings=(
            *parts.left_out,
            *control_token_warnings(sourced, language),
            *turn_end_warnings(*language[:3]),
        ),
        places={row.example: row.where for row in reversed(sourced)},
        **language._asdict(),
    )


def single_answer_task(
    request: TaskRequest,
    *,
    name: str,
    train: list[Example],
    heldout: list[Example],
    alphabet: str,
    warm_start: WarmStart,
    refine_template: str,
    note: str,
) -> Task:
    """A task of which exactly one completion is right.

    Only the tokenizer's own EOS ends a completion: with a second one, two completions
    would be right.

    Args:
        alphabet: Characters of the tokenizer that is made where none is given.

    Raises:
        ConfigError: the tokenizer has several token sequences for an answer.
    """
    language = make_language(request, lambda: character_tokenizer(alphabet))
    tokenizer = language.tokenizer
    if request.tokenizer is not None:
        answers = [example.answer for example in train + heldout]
        check_single_spelling(tokenizer, answers, name)
    eos_ids = language.eos_ids[:1] if tokenizer.eos_token_id is None else ()
    return Task(
        name=name,
        train=train,
        heldout=heldout,
        reward=verbatim,
        single_answer=True,
        warm_start=warm_start,
        refine_template=refine_template,
        note=note,
        **language._replace(eos_ids=eos_ids)._asdict(),
    )


def pick(
    rng: np.random.Generator, examples: list[Example], count: int | None, name: str
) -> list[Example]:
    """`count` of the examples by `rng`; all, in their order, where it is None.

    Raises:
        ConfigError: there are fewer than `count`; names the option task.`name`.
    """
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


def default_template(request: TaskRequest) -> str:
    """The template requested, else that of the tokenizer; one made here has chat."""
    keep = request.control_tokens == "keep"  # data that have their template
    chat = request.tokenizer is None or bool(request.tokenizer.chat_template)
    return request.template or ("chat" if chat and not keep else "none")


def check_present(name: str, wanted: Sequence[Any], present: Iterable[Any]) -> None:
    """Raises ConfigError where a value of the option task.`name` is not present."""
    found = {str(value) for value in present}
    if absent := {str(value) for value in wanted} - found:
        raise ConfigError(
            f"task.{name} must be among {', '.join(sorted(found))}, "
            f"got {', '.join(sorted(absent))}."
        )


def check_golds(rewards: Sequence[Reward], rows: Sequence[SourcedExample]) -> None:
    """Raises ConfigError, naming the row, where a reward could never accept its
    gold answer."""
    for row in rows:
        for reward in rewards:
            reason = refusal(reward.name, row.example.answer)
            if reason is not None:
                raise ConfigError(
                    f"{row.where}: no completion could satisfy reward {reward.name}: "
                    f"{reason}; correct the row or remove it."
                )


def _after_thinking(rewards: Sequence[Reward]) -> tuple[Reward, ...]:
    """The rewards, those that read an answer looking for it after </think> only."""
    if not any(reward.name in ANSWERS for reward in rewards):
        raise ConfigError(
            f"task.thinking is for rewards that read an answer ({', '.join(ANSWERS)}), "
            f"got {', '.join(reward.name for reward in rewards)}; leave it out."
        )
    option = ("thinking", 1.0)
    return tuple(
        dataclasses.replace(reward, options=(*reward.options, option))
        if reward.name in ANSWERS
        else reward
        for reward in rewards
    )


def without_heldout(task: Task) -> tuple[Task, int]:
    """(the task without trained prompts that are held-out ones, number left out)."""
    heldout = {_asked(example) for example in task.heldout}
    train = [example for example in task.train if _asked(example) not in heldout]
    count = len(task.train) - len(train)
    return (dataclasses.replace(task, train=train) if count else task), count


class _Language(NamedTuple):
    """Fields of a Task that say how its text becomes tokens."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    template: str
    system: str | None
    template_arguments: Mapping[str, Any]
    control_tokens: Literal["spell", "keep"]
    date: str


def make_language(request: TaskRequest, make_tokenizer: Callable[[], Any]) -> _Language:
    """The language requested; `make_tokenizer` where there is no tokenizer.

    The template of a tokenizer made here is the one that another task would choose for
    it, so that a model is evaluated later on prompts of the form it was taught.
    """
    tokenizer, eos_ids = request.tokenizer, request.eos_ids
    if tokenizer is None:
        if eos_ids:
            raise ConfigError(
                f"task.eos_ids go with a tokenizer, got {eos_ids} and none; leave them "
                "out."
            )
        tokenizer = make_tokenizer()
    elif request.vocab_size is not None:
        raise ConfigError(
            f"task.vocab_size is of a tokenizer trained here, got {request.vocab_size} "
            "and a tokenizer; leave one of them out."
        )
    template = default_template(request._replace(tokenizer=tokenizer))
    check_template(tokenizer, template, request.system)
    check_arguments(tokenizer, template, request.template_arguments)
    return _Language(
        tokenizer=tokenizer,
        eos_ids=eos_ids or completion_ends(tokenizer),
        template=template,
        system=request.system,
        template_arguments=request.template_arguments,
        control_tokens=request.control_tokens,
        date=request.date or now(),
    )


class _Parts(NamedTuple):
    """Examples of a task's parts."""

    pool: list[Example]  # all that may be trained on
    train: list[Example]  # the requested number of the pool
    heldout: list[Example]
    note: str  # what was split off or left out
    left_out: tuple[str, ...]  # its sentences on rows that are in no part


def _pick_parts(
    request: TaskRequest,
    train: Sequence[SourcedExample],
    heldout: Sequence[SourcedExample] | None,
) -> _Parts:
    """The requested numbers of training and held-out examples, with no prompt in
    both."""
    rng, notes = host_rng(request.seed, Stream.DATA_PARTS), []
    if heldout is None:
        train, heldout, count = _split(rng, train, request.heldout_prompts)
        seed = request.seed
        total = count + len({_asked(row.example) for row in train})
        notes.append(
            f"{count} of {total} prompts were held out, chosen by task.seed {seed}."
        )
    evaluated: dict[tuple[Turns, str], Example] = {}
    for row in heldout:
        evaluated.setdefault(_asked(row.example), row.example)  # of repeats the first
    pool = [r.example for r in train if _asked(r.example) not in evaluated]
    left_out = []
    if dropped := len(train) - len(pool):
        left_out.append(
            f"{dropped} training rows are held-out prompts and were left out."
        )
    if repeated := len(heldout) - len(evaluated):
        left_out.append(f"{repeated} held-out rows repeat a prompt and were left out.")
    trained = pick(rng, pool, request.train_prompts, "train_prompts")
    count = request.heldout_prompts
    if count is None:
        count = min(HELDOUT, len(evaluated))
    picked = pick(rng, list(evaluated.values()), count or None, "heldout_prompts")
    return _Parts(pool, trained, picked, " ".join([*notes, *left_out]), tuple(left_out))


def _split(
    rng: np.random.Generator,
    rows: Sequence[SourcedExample],
    heldout_prompts: int | None,
) -> tuple[list[SourcedExample], list[SourcedExample], int]:
    """(training rows, held-out rows, number of held-out prompts)."""
    prompts = list(dict.fromkeys(_asked(row.example) for row in rows))
    count = heldout_prompts or min(HELDOUT, max(1, len(prompts) // 10))
    if count >= len(prompts):
        raise ConfigError(
            f"task.heldout_prompts must be below {len(prompts)}, the prompts in the "
            f"one file there is, got {count}; give more rows or task.heldout_path."
        )
    chosen = {prompts[i] for i in rng.permutation(len(prompts))[:count]}
    train, heldout = [], []
    for row in rows:
        part = heldout if _asked(row.example) in chosen else train
        part.append(row)
    return train, heldout, count


def _asked(example: Example) -> tuple[Turns, str]:
    """What makes prompts the same: their text, after the same turns."""
    return example.context, same_prompt(example.prompt)


def same_prompt(prompt: str) -> str:
    """What two prompts have in common that count as one: their text, where \\r\\n is a
    line break like any other, without the line breaks before it and the white space
    after it.

    All other line breaks and spaces tell prompts apart, as in grids and programs.
    """
    return prompt.replace("\r\n", "\n").lstrip("\n").rstrip()
