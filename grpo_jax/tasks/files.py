"""Reading a task's data, from a path or by name, with errors that name the row."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name or owner/name:config


class Row(NamedTuple):
    where: str  # "rows.jsonl, line 3"
    values: dict[str, Any]


def read_rows(path: Path, fields: Sequence[str] = ()) -> list[Row]:
    """The objects of a .jsonl, .json (an array) or .parquet file, each with the given
    text fields.

    Raises:
        ConfigError: the file cannot be read, is empty, or a row is not such an object
            (its number and what was expected are named).
    """
    readers = {".json": _read_array, ".parquet": _read_parquet}
    try:
        found = readers.get(path.suffix, _read_lines)(path, fields)
        rows = [Row(f"{path}, {place}", values) for place, values in found]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the data file {path}: {error}.") from error
    if not rows:
        raise ConfigError(
            f"the data file {path} is empty; {_expected(fields)} in each row."
        )
    for row in rows:
        _check(row, fields)
    return rows


def _read_lines(path, fields):
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{path}, line {number}: not JSON ({error.msg}); "
                    f"{_expected(fields)}."
                ) from error


def _read_array(path, fields):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); expected an array."
        ) from error
    if not isinstance(values, list):
        raise ConfigError(
            f"{path} must be a JSON array, got {type(values).__name__}; "
            "name a file of one object a line .jsonl."
        )
    return ((f"row {i}", value) for i, value in enumerate(values, 1))


def _read_parquet(path, fields):
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"cannot read the data file {path}: {error}.") from error
    return ((f"row {i}", value) for i, value in enumerate(values, 1))


def _expected(fields):
    named = f" with text fields {', '.join(fields)}" if fields else ""
    return f"expected a JSON object{named}"


def _check(row, fields):
    """ConfigError unless the row is an object with those fields as text."""
    where, values = row
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {_expected(fields)}.")
    for field in fields:
        if not isinstance(values.get(field), str):
            found = repr(values[field]) if field in values else "missing"
            raise ConfigError(
                f"{where}: field {field!r} is {found}; {_expected(fields)}."
            )


def read_parts(
    path: str | None,
    heldout_path: str | None = None,
    hub_name: tuple[str, ...] | None = None,
    fields: Sequence[str] = (),
) -> tuple[list[Row], list[Row] | None]:
    """Rows to train on, and rows only to be evaluated (None: there is one file alone).

    Args:
        path: A directory with train and test files (.jsonl, .json or .parquet), one
            file, or a data set's name for `datasets` ("owner/name" or
            "owner/name:config"); None loads `hub_name`.
        heldout_path: A file that takes the place of the test part.
        fields: Text fields that each row must have.
    """
    if path is None:
        if hub_name is None:
            raise ConfigError(
                "task.path must name the data: a file, a directory or a data set."
            )
        parts = _from_hub(hub_name, fields, test=heldout_path is None)
    elif (found := Path(path)).is_dir():
        parts = [read_rows(_part(found, "train"), fields)]
        if heldout_path is None:
            parts.append(read_rows(_part(found, "test"), fields))
    elif found.is_file() or not _HUB.fullmatch(path) or found.suffix in SUFFIXES:
        if not found.is_file():
            raise ConfigError(
                f"task.path must be a file or a directory with train.jsonl and "
                f"test.jsonl, got {path}, which is not there."
            )
        parts = [read_rows(found, fields)]
    else:
        parts = _from_hub(tuple(path.split(":")), fields, test=heldout_path is None)
    if heldout_path is not None:
        if not Path(heldout_path).is_file():
            raise ConfigError(f"task.heldout_path must be a file, got {heldout_path}.")
        return parts[0], read_rows(Path(heldout_path), fields)
    return parts[0], parts[1] if len(parts) > 1 else None


def _part(directory, name):
    """The directory's file of that part; .jsonl where there is none, to be missed."""
    files = [directory / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def _from_hub(hub_name, fields, test):
    name = "/".join(hub_name)
    try:
        from datasets import load_dataset

        data = load_dataset(*hub_name)
        names = [n for n in ("train", "test") if n == "train" or (test and n in data)]
        parts = [data[part].to_list() for part in names]
    except Exception as error:  # datasets raises a dozen kinds for one fact
        reason = (str(error).splitlines() or [""])[0][:120]
        raise ConfigError(
            f"cannot load {name} through `datasets` ({type(error).__name__}: {reason});"
            " give --task.path DIR with train.jsonl and test.jsonl."
        ) from error
    found = [
        [Row(f"{name}, row {i}", values) for i, values in enumerate(part, 1)]
        for part in parts
    ]
    for row in (row for part in found for row in part):
        _check(row, fields)
    return found
