"""Configs from and to files and dicts, strict about keys and types."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from grpo_jax.errors import ConfigError, nearest
from grpo_jax.runs.config import TrainConfig

T = TypeVar("T")


def to_dict(config: Any) -> dict:
    """The config as JSON types, without `distributed` (it may change on resume)."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    values.pop("distributed", None)
    return values


def from_dict(cls: type[T], values: Any, base: T | None = None, where: str = "") -> T:
    """A `cls` from nested dicts, over `base`; strict about keys and types.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a value of another type.
    """
    record: Any = cls() if base is None else base  # a dataclass; types have no bound
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the config'} must be a mapping, got {values!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(record)}
    changes = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            raise ConfigError(
                f"unknown config key {name!r}; {nearest(key, fields)}"
                f"keys here: {', '.join(fields)}."
            )
        if dataclasses.is_dataclass(fields[key]):
            changes[key] = from_dict(
                fields[key], value, getattr(record, key), f"{name}."
            )
        else:
            changes[key] = _coerce(fields[key], value, name)
    try:
        return dataclasses.replace(record, **changes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error


def _coerce(kind: Any, value: Any, name: str) -> Any:
    """The value of a file as a field's type; YAML reads 1e-5 as a string."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise ConfigError(
            f"{name} must be one of {', '.join(typing.get_args(kind))}, got {value!r}."
        )
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[1:] == (...,) and isinstance(value, list | tuple):
            kinds = kinds[:1] * len(value)
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(_coerce(k, v, name) for k, v in zip(kinds, value, strict=True))
        count = "a list of" if kinds[1:] == (...,) else len(kinds)
        raise ConfigError(f"{name} must be {count} values, got {value!r}.")
    if kind is float and isinstance(value, int | float | str):
        try:
            if not isinstance(value, bool):
                return float(value)
        except (ValueError, OverflowError):
            pass  # reported below, with every other value of the wrong type
    if type(value) is kind:
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}
    raise ConfigError(f"{name} must be {wanted.get(kind, 'text')}, got {value!r}.")


def load_config_file(path: str) -> TrainConfig:
    """A TrainConfig from a .yaml, .yml or .json file."""
    file = Path(path)
    if file.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"--config must be a .yaml, .yml or .json file, got {path}.")
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --config {path}: {error}.") from error
    if file.suffix == ".json":
        try:
            return from_dict(TrainConfig, json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from error
    import yaml

    try:
        return from_dict(TrainConfig, yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}.") from error


def differences(old: dict, new: dict, where: str = "") -> list[str]:
    """'field: old -> new' for every leaf that differs between two config dicts."""
    rows = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            rows += differences(a, b, f"{where}{key}.")
        elif a != b:
            rows.append(f"{where}{key}: {a!r} -> {b!r}")
    return rows
