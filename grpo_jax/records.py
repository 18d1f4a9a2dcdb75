"""Records of settings: frozen dataclasses whose values have the types of their fields.

    class SamplingConfig(Record):
        prompts: int = 16
        dtype: Annotated[Literal["float32", "bfloat16"], Dtype()] = "float32"

Lists become tuples, mappings the records that a field is of, paths text, and numpy's
numbers Python's. Anything else of another type is an error that names the field.
"""

import dataclasses
import functools
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np

from grpo_jax.errors import ConfigError, a_kind, nearest

T = TypeVar("T")

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class Dtype:
    """Beside a Literal of dtypes' names: the field takes what `jnp.dtype` takes."""


class Own:
    """Beside the name or the settings of what a user may make: where that goes itself.

    Attributes:
        place: Ends the error for an object in place of its name.
    """

    def __init__(self, place: str):
        self.place = place


class Record:
    """The base of a record: checks and converts what it is made of.

    Attributes:
        given: Names of the fields that it was made with, besides the defaults.
    """

    given: frozenset[str]

    def __new__(cls, *_: Any, **fields: Any) -> Self:
        record = super().__new__(cls)
        object.__setattr__(record, "given", frozenset(fields))
        return record

    def __post_init__(self):
        for name, kind in field_types(type(self)).items():
            value = getattr(self, name)
            typed = as_type(kind, value, name, default_of(type(self), name))
            if typed is not value:
                object.__setattr__(self, name, typed)


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """Field name -> type, of a dataclass, with annotations."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def default_of(cls: type, name: str) -> Any:
    """A field's default; MISSING where it has none."""
    return next(f.default for f in dataclasses.fields(cls) if f.name == name)


def dtype_name(dtype: Any) -> str | None:
    """The name of what `jnp.dtype` accepts, such as "bfloat16"; None for all else."""
    import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)

    try:
        return None if dtype is None else np.dtype(dtype).name
    except TypeError:
        return None


def from_dict(
    cls: type[T],
    values: Any,
    base: T | None = None,
    where: str = "",
    *,
    texts: bool = True,
) -> T:
    """A `cls` from nested dicts, over `base`; strict about keys and types.

    Args:
        cls: A dataclass.
        values: Field name -> value, or a mapping for a field that is a record.
        base: Has the fields that `values` lacks; None: the defaults.
        where: Put before every name in an error, such as "task.".
        texts: Numbers may be text: YAML reads 1e-5 as a string.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a value of another type.
    """
    if not isinstance(values, Mapping):
        what = where.removesuffix(".") or "the config"
        raise ConfigError(
            f"{what} must be a mapping, got {reprlib.repr(values)}; give a dict or a "
            f"{cls.__name__}."
        )
    fields = field_types(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"unknown config key {f'{where}{key}'!r}; {nearest(key, fields)}"
                f"keys here: {', '.join(fields)}."
            )
    changes = {}
    for key, value in values.items():
        old = default_of(cls, key) if base is None else getattr(base, key)
        changes[key] = as_type(fields[key], value, f"{where}{key}", old, texts=texts)
    try:
        made: Any = _made(cls, base, changes, where)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error
    if issubclass(cls, Record):
        object.__setattr__(made, "given", frozenset(changes))
    return made


def _made(cls: Any, base: Any, changes: dict[str, Any], where: str) -> Any:
    """A `cls` of the changes to `base`, or to the defaults where it is None."""
    if base is not None:
        return dataclasses.replace(base, **changes)
    for name in field_types(cls):
        if name not in changes and default_of(cls, name) is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} must be given.")
    return cls(**changes)


def overlaid(base: T, over: T) -> T:
    """`base` with the fields that `over` was made with, nested ones one by one."""
    assert isinstance(over, Record)  # else nobody knows what it was made with
    changes = {}
    for name in over.given:
        value = getattr(over, name)
        nested = isinstance(value, Record)
        changes[name] = overlaid(getattr(base, name), value) if nested else value
    return dataclasses.replace(typing.cast(Any, base), **changes)


def as_type(
    kind: Any, value: Any, name: str, base: Any = None, *, texts: bool = False
) -> Any:
    """The value as a field's type.

    Args:
        kind: The type, as annotated.
        value: Whatever was given.
        name: The field's.
        base: For a field that is a record: has the fields that a mapping lacks.
        texts: As `from_dict`.

    Raises:
        ConfigError: it is of another type.
    """
    if typing.get_origin(kind) is Annotated:
        if any(isinstance(x, Dtype) for x in kind.__metadata__):
            value = dtype_name(value) or value
        for own in (x for x in kind.__metadata__ if isinstance(x, Own)):
            if not (_is_data(value) or isinstance(value, kind.__origin__)):
                raise ConfigError(
                    f"{name} must be {_wanted(kind.__origin__)}, got "
                    f"{reprlib.repr(value)}; {own.place}."
                )
        kind = kind.__origin__
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        return as_type(inner, value, name, base, texts=texts)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value
        base = base if dataclasses.is_dataclass(base) else None
        cls = typing.cast(type[Any], kind)
        return from_dict(cls, value, base, f"{name}.", texts=texts)
    if typing.get_origin(kind) is Literal:
        return _choice(typing.get_args(kind), value, name)
    if typing.get_origin(kind) is tuple:
        return _as_tuple(typing.get_args(kind), value, name, texts=texts)
    typed = _plain(kind, value, texts=texts)
    if typed is None:
        raise ConfigError(f"{name} must be {_wanted(kind)}, got {value!r}.")
    return typed


def _wanted(kind: type) -> str:
    return _WANTED.get(kind, a_kind(kind))


def _is_data(value: Any) -> bool:
    """Whether a config file may hold it; else it is an object that a user made, perhaps
    a NamedTuple."""
    plain = (str, bytes, os.PathLike, numbers.Number, Mapping, list)
    return value is None or isinstance(value, plain) or type(value) is tuple


def _choice(choices: tuple, value: Any, name: str) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return value
    names = ", ".join(map(str, choices))
    raise ConfigError(f"{name} must be one of {names}, got {value!r}.")


def _as_tuple(kinds: tuple, value: Any, name: str, *, texts: bool) -> tuple:
    if isinstance(value, list | tuple):
        each = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        if len(each) == len(value):
            pairs = zip(each, value, strict=True)
            return tuple(as_type(k, v, name, texts=texts) for k, v in pairs)
    count = "a list of" if kinds[1:] == (...,) else len(kinds)
    raise ConfigError(f"{name} must be {count} values, got {value!r}.")


def _plain(kind: Any, value: Any, *, texts: bool) -> Any:
    """The value as an int, float, bool or str; None where it is none."""
    boolean = isinstance(value, bool | np.bool_)
    if kind is bool:
        return bool(value) if boolean else None
    if kind is int:
        whole = isinstance(value, numbers.Integral) and not boolean
        return int(value) if whole else None
    if kind is float:
        if isinstance(value, numbers.Real) and not boolean:
            return _float(value)
        return _float(value) if texts and isinstance(value, str) else None
    if kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        return str(value) if isinstance(value, str) else None
    return value if isinstance(value, kind) else None


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
