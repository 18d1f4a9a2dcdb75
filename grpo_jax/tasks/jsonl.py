"""Your own data: a prompt and an answer in each row, judged by rewards of your choice.

Rows are read from .jsonl, .json or .parquet files, or from a data set by name; you say
which of their fields are used.
"""

from collections.abc import Sequence

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.rows import Row, lookup, text_of
from grpo_jax.rewards.spec import parse_reward
from grpo_jax.rewards.spelling import Written
from grpo_jax.rewards.types import Example
from grpo_jax.tasks.build import SourcedExample, TaskRequest, text_task
from grpo_jax.tasks.files import read_parts
from grpo_jax.tasks.messages import read_prompt, read_system
from grpo_jax.tasks.templates import Turns
from grpo_jax.tasks.types import Task


def make_jsonl(
    request: TaskRequest,
    *,
    prompt_field: str | None = None,
    system_field: str | None = None,
    answer_field: str | None = None,
    solution_field: str | None = None,
    tag_fields: Sequence[str] = (),
) -> Task:
    """A task on the user's rows.

    Args:
        request: Its path is a file (a tenth of it, 512 rows at most, is held out by
            seed unless there is a `heldout_path`), a directory with train and test
            files, or a data set; its rewards are names of verifiers or module:function
            with weights, default: exact.
        prompt_field, answer_field: Default "prompt" and "answer". A prompt is text or a
            list of messages, the last one the user's; an answer may be a number.
            "a.b" is field b of the object in field a, here and below.
        system_field: The system turn of each row's chat, in place of `system`.
        solution_field: Worked text for a warm start to imitate; default: the answer is.
        tag_fields: What evaluation is broken down by.
    """
    prompt_field, answer_field = prompt_field or "prompt", answer_field or "answer"

    def example(row: Row) -> SourcedExample:
        context, prompt = _read_turns(row, prompt_field, system_field)
        answer = text_of(row, answer_field)
        tags = tuple((name, text_of(row, name)) for name in tag_fields)
        solution = lookup(row.values, solution_field) if solution_field else ""
        read = Example(prompt, answer, solution, tags, context)
        return SourcedExample(row.where, read)

    fields = [solution_field] if solution_field else []
    train, heldout = read_parts(request.path, request.heldout_path, fields=fields)
    return text_task(
        request,
        name="jsonl",
        train=[example(row) for row in train],
        heldout=None if heldout is None else [example(row) for row in heldout],
        default_reward="exact",
        note=_respelled([*train, *(heldout or [])], answer_field, request.rewards),
    )


def _respelled(rows: Sequence[Row], field: str, rewards: Sequence[str]) -> str:
    """What the task's note says of golds that are compared as texts, and are numbers
    that the file writes in another way."""
    if not {parse_reward(r).name for r in rewards or ("exact",)} & {
        "exact",
        "verbatim",
    }:
        return ""
    changed = [
        f"{row.where}: {value.text} as {text_of(row, field)}"
        for row in rows
        if isinstance(value := lookup(row.values, field), Written)
        and value.text != text_of(row, field)
    ]
    if not changed:
        return ""
    return (
        f"{len(changed)} answers are numbers with exponents, spelt as plain decimals "
        f"(first: {changed[0]})."
    )


def _read_turns(
    row: Row, prompt_field: str, system_field: str | None
) -> tuple[Turns, str]:
    """(turns before the prompt, the prompt) of a row."""
    context, prompt = read_prompt(*_value(row, prompt_field))
    if system_field is None:
        return context, prompt
    system = read_system(*_value(row, system_field))
    if system and any(role == "system" for role, _ in context):
        raise ConfigError(
            f"{row.where}: fields {prompt_field!r} and {system_field!r} both have a "
            "system turn; leave one out."
        )
    return system + context, prompt


def _value(row: Row, field: str) -> tuple[object, str]:
    """(a field's value, its place for errors)."""
    try:
        return lookup(row.values, field), f"{row.where}: field {field!r}"
    except KeyError:
        raise ConfigError(
            f"{row.where}: field {field!r} is missing; expected text, or a list of "
            "messages with role and content."
        ) from None
