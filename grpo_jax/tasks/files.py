"""Reading a task's data, from a path or by name, with errors that name the row."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name or owner/name:config


class Row(NamedTuple):
    """A row of a data file or data set."""

    where: str  # "rows.jsonl, line 3"
    values: dict[str, Any]


def read_rows(path: Path, fields: Sequence[str] = ()) -> list[Row]:
    """Reads the objects of a .jsonl, .json (an array) or .parquet file.

    Args:
        path: The file; an unknown ending is read as .jsonl.
        fields: Text fields that each row must have.

    Raises:
        ConfigError: the file cannot be read, is empty, or a row is not such an object
            (its number and what was expected are named).
    """
    readers = {".json": _read_array, ".parquet": _read_parquet}
    try:
        objects = readers.get(path.suffix, _read_lines)(path, fields)
        rows = [Row(f"{path}, {place}", values) for place, values in objects]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the data file {path}: {error}.") from error
    if not rows:
        raise ConfigError(
            f"the data file {path} is empty; {_expected(fields)} in each row."
        )
    for row in rows:
        _check(row, fields)
    return rows


_Objects = Iterable[tuple[str, Any]]  # place in the file, such as "line 3", and value


def _read_lines(path: Path, fields: Sequence[str]) -> _Objects:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{path}, line {number}: not JSON ({error.msg}); "
                    f"{_expected(fields)}."
                ) from error


def _read_array(path: Path, fields: Sequence[str]) -> _Objects:
    del fields
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


def _read_parquet(path: Path, fields: Sequence[str]) -> _Objects:
    del fields
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"cannot read the data file {path}: {error}.") from error
    return ((f"row {i}", value) for i, value in enumerate(values, 1))


def _expected(fields: Sequence[str]) -> str:
    """What a row must be, in words."""
    named = f" with text fields {', '.join(fields)}" if fields else ""
    return f"expected a JSON object{named}"


def _check(row: Row, fields: Sequence[str]) -> None:
    """Raises ConfigError unless the row is an object with those fields as text."""
    where, values = row
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {_expected(fields)}.")
    for field in fields:
        if not isinstance(values.get(field), str):
            actual = repr(values[field]) if field in values else "missing"
            raise ConfigError(
                f"{where}: field {field!r} is {actual}; {_expected(fields)}."
            )


def read_parts(
    path: str | None,
    heldout_path: str | None = None,
    hub_name: tuple[str, ...] | None = None,
    fields: Sequence[str] = (),
) -> tuple[list[Row], list[Row] | None]:
    """(rows to train on, rows only to evaluate); the latter None for a single file.

    Args:
        path: A directory with train and test files (.jsonl, .json or .parquet), one
            file, or a data set's name for `datasets` ("owner/name" or
            "owner/name:config"); None loads `hub_name`.
        heldout_path: A file used in place of the test part.
        hub_name: The arguments of `datasets.load_dataset`.
        fields: Text fields that each row must have.
    """
    if path is None:
        if hub_name is None:
            raise ConfigError(
                "task.path must name the data: a file, a directory or a data set."
            )
        parts = _from_hub(hub_name, fields, test=heldout_path is None)
    elif (local := Path(path)).is_dir():
        parts = [read_rows(_part(local, "train"), fields)]
        if heldout_path is None:
            parts.append(read_rows(_part(local, "test"), fields))
    elif local.is_file() or not _HUB.fullmatch(path) or local.suffix in SUFFIXES:
        if not local.is_file():
            raise ConfigError(
                f"task.path must be a file or a directory with train.jsonl and "
                f"test.jsonl, got {path}, which is not there."
            )
        parts = [read_rows(local, fields)]
    else:
        parts = _from_hub(tuple(path.split(":")), fields, test=heldout_path is None)
    if heldout_path is not None:
        if not Path(heldout_path).is_file():
            raise ConfigError(f"task.heldout_path must be a file, got {heldout_path}.")
        return parts[0], read_rows(Path(heldout_path), fields)
    return parts[0], parts[1] if len(parts) > 1 else None


def _part(directory: Path, name: str) -> Path:
    """The directory's file of a part; the .jsonl file where none exists, for the
    error."""
    files = [directory / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def _from_hub(
    hub_name: tuple[str, ...], fields: Sequence[str], test: bool
) -> list[list[Row]]:
    """Rows of the data set's train part and, if wanted, of its test part."""
    name = "/".join(hub_name)
    try:
        from datasets import load_dataset

        dataset, *config = hub_name
        data = load_dataset(dataset, next(iter(config), None))
        names = [n for n in ("train", "test") if n == "train" or (test and n in data)]
        parts = [data[part].to_list() for part in names]
    except Exception as error:  # datasets raises a dozen types for a missing data set
        reason = (str(error).splitlines() or [""])[0][:120]
        raise ConfigError(
            f"cannot load {name} through `datasets` ({type(error).__name__}: {reason});"
            " give --task.path DIR with train.jsonl and test.jsonl."
        ) from error
    rows = [
        [Row(f"{name}, row {i}", values) for i, values in enumerate(part, 1)]
        for part in parts
    ]
    for row in (row for part in rows for row in part):
        _check(row, fields)
    return rows
