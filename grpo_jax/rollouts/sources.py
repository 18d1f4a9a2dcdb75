"""Where rows of rollouts come from: memory, a file, a directory of files."""

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from grpo_jax.errors import ConfigError, check_kind
from grpo_jax.rewards.rows import Row, read_rows

_PLAIN = {int, float, str, bool, type(None)}


def as_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows in memory, arrays in them as lists.

    Raises:
        ConfigError: there is none, or one is no mapping.
    """
    wrong = isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable)
    if wrong or hasattr(rows, "to_dict"):
        advice = (
            "give table.to_dict('records')"
            if hasattr(rows, "to_dict")
            else "a file is read by Rollouts.from_jsonl"
        )
        raise ConfigError(
            "rows must be mappings such as {'prompt': '1+1=', 'completion': '2', "
            f"'reward': 1.0}}, got {type(rows).__name__}; {advice}."
        )
    made = []
    for i, values in enumerate(rows):
        check_kind(f"row {i}", values, Mapping, "give its fields by name")
        lists = {name: _as_list(value) for name, value in values.items()}
        made.append(Row(f"row {i}", lists))
    if not made:
        raise ConfigError("rows must hold at least one completion, got none.")
    return made


def _as_list(value: Any) -> Any:
    """The value with arrays, scalars of arrays and tuples as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if not isinstance(value, list | tuple):
        return value
    if set(map(type, value)) <= _PLAIN:  # of many tokens
        return list(value)
    return [_as_list(x) for x in value]


def file_rows(path: str | PathLike[str], suffix: str) -> list[Row]:
    """The rows of a file, or of all files with the suffix in a directory.

    Raises:
        ConfigError: none is there, or one cannot be read.
    """
    files = files_of(path, suffix)
    if suffix == ".parquet" and files[0].suffix != suffix:
        raise ConfigError(f"a parquet file must be named .parquet, got {files[0]}.")
    return [row for file in files for row in read_file(file)]


def files_of(path: str | PathLike[str], *suffixes: str) -> list[Path]:
    """The file, or a directory's files with a suffix in the order of their numbers."""
    top = Path(path)
    if not top.is_dir():
        return [top]
    found = [f for f in top.rglob("*") if f.suffix in suffixes and f.is_file()]
    if not found:
        raise ConfigError(f"{top} has no file {' or '.join(suffixes)}.")
    return sorted(found, key=lambda f: _by_number(str(f)))


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers in names as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(x), "") if x.isdigit() else (-1, x) for x in parts]


def read_file(file: Path) -> list[Row]:
    """The rows of a file; where its path names a step and a row has none, that one."""
    named = re.findall(r"step[_-]?(\d+)", str(file))
    rows = read_rows(file)
    if named:
        rows = [Row(w, {"step": int(named[-1])} | values) for w, values in rows]
    return rows
