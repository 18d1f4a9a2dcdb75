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
    expected = f"expected a JSON object with text fields {', '.join(fields)}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: {expected}.")
        for field in fields:
            if not isinstance(row.get(field), str):
                raise ConfigError(
                    f"{path}, line {number}: field {field!r} is "
                    f"{row.get(field, 'missing')!r}; {expected}."
                )
        rows.append(row)
    if not rows:
        raise ConfigError(f"the data file {path} is empty; {expected} on each line.")
    return rows


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
    try:
        from datasets import load_dataset

        return tuple(
            load_dataset(*hub_name, split=p).to_list() for p in ("train", "test")
        )
    except Exception as error:  # datasets raises a dozen kinds for one fact
        raise ConfigError(
            f"cannot load {'/'.join(hub_name)} through `datasets` "
            f"({type(error).__name__}: {str(error).splitlines()[0][:120]}); give "
            "--task.path DIR with train.jsonl and test.jsonl."
        ) from error
