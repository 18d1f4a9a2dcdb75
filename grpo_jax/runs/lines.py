"""JSON-lines files that survive a full disk and a killed process."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.runs.files import replace_text


class JsonLines:
    """An append-only file of objects; every line is on disk when `write` returns.

    Attributes:
        unwritten: Objects whose line could not be written; the next `write` tries them
            again first.
    """

    def __init__(self, path: Path):
        self.unwritten: list[dict[str, Any]] = []
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a line; one that fails leaves no part of it.

        Raises:
            OSError: it cannot be written; the row is `unwritten`.
        """
        self.unwritten.append(without_nan(row))
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in self.unwritten]
        data, size = "".join(lines).encode(), os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            reason = error.strerror or error
            raise OSError(f"cannot write {self._path}: {reason}") from error
        self.unwritten = []

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_json(path: Path, value: Any) -> None:
    """Writes the value as indented JSON, with null for NaN and infinities."""
    text = json.dumps(without_nan(value), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, without a last line that a killed process cut short."""
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise
    return rows


class NoLines:
    """Takes the place of `JsonLines` where another process writes."""

    def __init__(self) -> None:
        self.unwritten: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def keep_until(path: Path, step: int) -> None:
    """Drops the rows after `step`, which a resumed run will write again."""
    rewrite(path, [row for row in read_lines(path) if row["step"] <= step])


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file by one with these rows, in one rename."""
    lines = [json.dumps(without_nan(row), allow_nan=False) + "\n" for row in rows]
    replace_text(path, "".join(lines))


def without_nan(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {name: without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_numbers(metrics: dict[str, Any]) -> dict[str, float | int]:
    """Device scalars as Python numbers."""
    return {name: np.asarray(x).item() for name, x in jax.device_get(metrics).items()}


def rounded(values: Any) -> Any:
    """An array as (nested) lists of numbers of six significant digits, for JSON."""
    values = np.asarray(values, float)
    if values.ndim == 0:
        return float(f"{values:.6g}")
    return [rounded(value) for value in values]
