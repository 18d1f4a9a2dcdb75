"""Configs from and to files and dicts, strict about keys and types."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.errors import ConfigError
from grpo_jax.records import from_dict
from grpo_jax.runs.config import TrainConfig


def to_dict(config: Any) -> dict:
    """The config as JSON types, without `distributed` (it may change on resume)."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    values.pop("distributed", None)
    return values


def load_config_file(path: str) -> TrainConfig:
    """A TrainConfig from a .yaml, .yml or .json file.

    Of a run's own config.json all settings but its directory: a new run like it.
    """
    file = Path(path)
    if file.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"--config must be a .yaml, .yml or .json file, got {path}.")
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --config {path}: {error}.") from error
    if file.suffix == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from error
        if isinstance(values, dict) and {"config", "versions"} <= values.keys():
            return _settings_of_run(file, values)
        return from_dict(TrainConfig, values)
    import yaml

    try:
        return from_dict(TrainConfig, yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}.") from error


def with_paths(config: TrainConfig, change: Callable[[str], str]) -> TrainConfig:
    """The config with its paths of data and of the pretrained model changed."""

    def changed(path: str | None) -> str | None:
        return path if path is None else change(path)

    task = dataclasses.replace(
        config.task,
        path=changed(config.task.path),
        heldout_path=changed(config.task.heldout_path),
    )
    return dataclasses.replace(config, task=task, pretrained=changed(config.pretrained))


def _settings_of_run(file: Path, facts: dict[str, Any]) -> TrainConfig:
    # Which reads configs with what is above.
    from grpo_jax.runs.recorded import recorded_config

    config = recorded_config(file.absolute().parent, facts)
    return dataclasses.replace(config, run_dir=None, resume=False)


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
