"""Bad input: the error that says what to change, and the rules that fields obey.

A rule is written beside its field and checked by `check_fields`:

    steps: Annotated[int, at_least(1)] = 120
    surrogate: Annotated[str, OneOf(SURROGATES)]
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union


class ConfigError(ValueError):
    """A run cannot start as it was asked for; the message says what to change."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """The values that a number may have.

    Attributes:
        rule: Ends the sentence "NAME must ...".
        allows: Whether a value obeys the rule.
        why: Appended to the error, such as "; a group of one has no baseline".
    """

    rule: str
    allows: Callable[[Any], bool] = dataclasses.field(repr=False)
    why: str = ""

    def error(self, name: str, value: Any) -> str:
        """The message for a field's value that the rule does not allow."""
        return f"{name} must {self.rule}, got {value}{self.why}."


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """The names that a field may have: a tuple of them, or a registry's keys."""

    choices: Collection[str]

    def __repr__(self) -> str:  # in `help` of a class; a registry's is long
        return f"OneOf({', '.join(self.choices)})"

    def allows(self, value: Any) -> bool:
        """Whether the value is a choice."""
        return value in self.choices

    def error(self, name: str, value: Any) -> str:
        """The message for a field's value that is not a choice."""
        return f"{name} must be one of {', '.join(self.choices)}, got {value!r}."


def at_least(least: int, why: str = "") -> Bound:
    """The values from `least` up."""
    return Bound(f"be at least {least}", lambda x: x >= least, why)


def positive(why: str = "") -> Bound:
    """The values above 0."""
    return Bound("be positive", lambda x: x > 0, why)


UP_TO_ONE = Bound("be in (0, 1]", lambda x: 0 < x <= 1)


class FieldRules(NamedTuple):
    """What a field's annotation says about its values."""

    rules: tuple[Bound | OneOf, ...]
    optional: bool  # None obeys every rule


@functools.cache
def field_rules(cls: type) -> Mapping[str, FieldRules]:
    """Field name -> rules, from the annotations of a dataclass (Literals included)."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        f.name: FieldRules(tuple(_rules(hints[f.name])), _optional(hints[f.name]))
        for f in dataclasses.fields(cls)
    }


def _rules(hint: Any) -> Iterator[Bound | OneOf]:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        yield from (x for x in hint.__metadata__ if isinstance(x, Bound | OneOf))
        yield from _rules(hint.__origin__)
    elif origin is Literal:
        yield OneOf(typing.get_args(hint))
    elif origin in (Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _rules(member)


def _optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def check_fields(
    record: Any, where: str = "", error: type[ValueError] = ValueError
) -> None:
    """Raises `error` for the first field that breaks a rule of its annotation.

    Fields that are dataclasses are checked too; `where` is put before every name.
    """
    for name, (rules, optional) in field_rules(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{where}{name}.", error)
        for rule in rules:
            if not (optional and value is None) and not rule.allows(value):
                raise error(rule.error(f"{where}{name}", value))


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError, listing the choices, unless `value` is one of them."""
    rule = OneOf(choices)
    if not rule.allows(value):
        raise ValueError(rule.error(name, value))


def check_kind(name: str, value: Any, kind: type, advice: str) -> None:
    """ConfigError, ending in `advice`, unless the value is of the kind."""
    if not isinstance(value, kind):
        raise ConfigError(
            f"{name} must be {a_kind(kind)}, got {reprlib.repr(value)}; {advice}."
        )


def a_kind(kind: type) -> str:
    """The name of a class with its article: "a Task", "an Objective"."""
    name = kind.__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def nearest(name: str, choices: Iterable[str]) -> str:
    """'did you mean ...? ', or '' where no choice is close."""
    near = difflib.get_close_matches(str(name), list(choices), n=5, cutoff=0.4)
    # Among the close ones, letters in another order are the likeliest slip.
    near.sort(key=lambda choice: sorted(choice) != sorted(str(name)))
    return f"did you mean {near[0]!r}? " if near else ""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> ConfigError:
    """The error for a name that is not among its choices, with the nearest one."""
    choices = sorted(choices)
    return ConfigError(
        f"unknown {kind} {name!r}; {nearest(name, choices)}"
        f"choices: {', '.join(choices)}."
    )


# Modules that the maths does without (advantages, logprobs, preconditioner, pull_back,
# prompt_weights, objectives, diagnostics): it needs jax, optax and numpy alone.
WHOLE_INSTALL = {
    "datasets", "flax", "huggingface_hub", "jinja2", "latex2sympy2_extended",
    "math_verify", "matplotlib", "orbax", "pyarrow", "rich", "safetensors", "sympy",
    "tokenizers", "transformers", "tyro", "yaml",
}  # fmt: skip


class MissingPackageError(ModuleNotFoundError):
    """A package of the whole install is missing; the message says how to get it."""


@contextlib.contextmanager
def needs_the_whole_install(what: str) -> Iterator[None]:
    """Around code, or as a decorator: where a package of the whole install is missing,
    a MissingPackageError that says what `what` needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in WHOLE_INSTALL:
            raise
        raise MissingPackageError(
            f"{what} needs {package}, which is not installed; `pip install grpo-jax` "
            "brings all that a run needs (the maths needs jax, optax and numpy alone).",
            name=error.name,
        ) from error


def has_the_whole_install() -> bool:
    """Whether every package of it is there; imports none."""
    try:
        return all(importlib.util.find_spec(name) for name in WHOLE_INSTALL)
    except ModuleNotFoundError:
        return False


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def summary(error: BaseException) -> str:
    """An error's type and up to 200 characters of its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
