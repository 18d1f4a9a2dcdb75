"""What is wrong, or worth knowing, of the texts of rows, with the row's place."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.tasks.plain_text import check_characters, control_tokens, names_pattern
from grpo_jax.tasks.types import SourcedExample

_SHOWN = 3  # names of control tokens in a warning


def check_texts(rows: Sequence[SourcedExample]) -> None:
    """Raises ConfigError, naming the row, for an empty prompt or text that is none."""
    for where, example in rows:
        if not example.prompt.strip():
            raise ConfigError(
                f"{where}: a prompt must not be empty, got {example.prompt!r}; correct "
                "the row or remove it."
            )
        for name, text in _texts(example):
            try:
                check_characters(text, name)
            except ConfigError as error:
                raise ConfigError(
                    f"{where}: {error} Correct the row or remove it."
                ) from error


def _texts(example: Example) -> Iterator[tuple[str, str]]:
    """(what it is, text) of all texts of an example."""
    yield from (
        ("the prompt", example.prompt),
        ("the answer", example.answer),
        ("the solution", example.solution),
    )
    yield from (("a tag", value) for _, value in example.tags)
    yield from (("a turn", content) for _, content in example.context)


class Language(Protocol):
    """How a task's text becomes tokens."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def template(self) -> str: ...
    @property
    def system(self) -> str | None: ...
    @property
    def control_tokens(self) -> str: ...


def control_token_warnings(
    rows: Sequence[SourcedExample], language: Language
) -> tuple[str, ...]:
    """Sentences on prompts that name control tokens, and on system turns that take
    the place of the task's."""
    warnings = []
    own = sum(
        any(role == "system" for role, _ in example.context) for _, example in rows
    )
    if language.system is not None and own:
        warnings.append(
            f"{own} of {len(rows)} prompts have a system turn of their own, which "
            "takes the place of task.system."
        )
    pattern = names_pattern(control_tokens(language.tokenizer))
    if pattern is None or language.control_tokens == "keep":
        return tuple(warnings)
    system = [] if language.system is None else pattern.findall(language.system)
    if system:
        warnings.append(
            f"task.system holds the names of control tokens ({_some(system)}), which "
            "are spelt out as text."
        )
    named = [
        (where, names)
        for where, example in rows
        if (names := [n for text in _asked(example) for n in pattern.findall(text)])
    ]
    if named:
        where, names = named[0]
        warnings.append(
            f"{len(named)} of {len(rows)} prompts hold the names of control tokens, "
            f"which are spelt out as text (first: {where}: {_some(names)}); where the "
            "rows were put into the model's template beforehand, give "
            "--task.control-tokens keep --task.template none."
        )
    return tuple(warnings)


def _asked(example: Example) -> tuple[str, ...]:
    """The texts of all turns."""
    return (*(content for _, content in example.context), example.prompt)


def _some(names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    more = ", ..." if len(different) > _SHOWN else ""
    return ", ".join(different[:_SHOWN]) + more
