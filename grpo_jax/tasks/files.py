"""Reading a task's data, from a path or by name, with errors that name the line."""

import json
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.errors import ConfigError


def read_jsonl(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The objects of a .jsonl file, each with the given text fields.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is not such an object
            (the line's number and what was expected are named).
    """
    expected = _expected(fields)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the data file {path}: {error}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}, line {number}: not JSON ({error.msg}); {expected}."
            ) from error
        rows.append(_checked(row, fields, f"{path}, line {number}"))
    if not rows:
        raise ConfigError(f"the data file {path} is empty; {expected} on each line.")
    return rows


def _expected(fields):
    return f"expected a JSON object with text fields {', '.join(fields)}"


def _checked(row, fields, where):
    """The row, if it is an object with those fields as text."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: {_expected(fields)}.")
    for field in fields:
        if not isinstance(row.get(field), str):
            raise ConfigError(
                f"{where}: field {field!r} is {row.get(field, 'missing')!r}; "
                f"{_expected(fields)}."
            )
    return row


def train_and_test(
    path: str | None, hub_name: tuple[str, ...], fields: Sequence[str]
) -> tuple[list[dict], list[dict]]:
    """Rows of a data set's train and test parts.

    Args:
        path: A directory with train.jsonl and test.jsonl; None loads `hub_name` through
            `datasets`.
    """
    if path is not None:
        directory = Path(path)
        if not directory.is_dir():
            raise ConfigError(
                f"task.path must be a directory with train.jsonl and test.jsonl, "
                f"got {path}."
            )
        return tuple(
            read_jsonl(directory / f"{part}.jsonl", fields)
            for part in ("train", "test")
        )
    name = "/".join(hub_name)
    try:
        from datasets import load_dataset

        parts = [load_dataset(*hub_name, split=p).to_list() for p in ("train", "test")]
    except Exception as error:  # datasets raises a dozen kinds for one fact
        reason = (str(error).splitlines() or [""])[0][:120]
        raise ConfigError(
            f"cannot load {name} through `datasets` ({type(error).__name__}: {reason});"
            " give --task.path DIR with train.jsonl and test.jsonl."
        ) from error
    return tuple(
        [_checked(row, fields, f"{name}, row {i}") for i, row in enumerate(part)]
        for part in parts
    )
