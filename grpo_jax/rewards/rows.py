"""Rows of a data file, with errors that name the row."""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.numbers import too_many_digits
from grpo_jax.rewards.spelling import Written, spelled

MOST_DIGITS = 4000  # of an integer that is read as a number; longer ones are text
# Endings of other formats; a file of an unknown ending is read as .jsonl.
UNREAD = frozenset(
    f".{name}"
    for name in (
        *("csv", "tsv", "xls", "xlsx", "ods", "yaml", "yml", "toml", "xml", "arrow"),
        *("feather", "orc", "avro", "pkl", "pickle", "npy", "npz", "db", "sqlite"),
        *("gz", "bz2", "xz", "zst", "zip", "tar", "tgz"),
    )
)
_SEPARATOR = re.compile(r"[\s,]*")


class Row(NamedTuple):
    """A row of a data file or data set."""

    where: str  # "rows.jsonl, line 3"
    values: dict[str, Any]


def lookup(values: dict[str, Any], field: str) -> Any:
    """The value of a field, "a.b" being field b of the object in field a.

    Raises:
        KeyError: there is none.
    """
    if field in values:
        return values[field]
    head, dot, rest = field.partition(".")
    if not dot or not isinstance(values.get(head), dict):
        raise KeyError(field)
    return lookup(values[head], rest)


def read_rows(path: Path, fields: Sequence[str] = ()) -> list[Row]:
    """Reads the objects of a .jsonl, .json (an array) or .parquet file.

    Args:
        path: The file; an unknown ending is read as .jsonl.
        fields: Text fields that each row must have.

    Raises:
        ConfigError: the file cannot be read, is empty, or a row is not such an object
            (its number and what was expected are named).
    """
    if path.suffix.lower() in UNREAD:
        raise ConfigError(
            f"{path}: {path.suffix[1:]} is not read; give .jsonl (an object a line), "
            ".json (an array of objects) or .parquet."
        )
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
        check_fields(row, fields)
    return rows


_Objects = Iterable[tuple[str, Any]]  # place in the file, such as "line 3", and value


def _read_lines(path: Path, fields: Sequence[str]) -> _Objects:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        line = line.lstrip("\ufeff")  # of files joined end to end
        if line.strip():
            try:
                yield f"line {number}", _loads(line)
            except (ValueError, RecursionError) as error:
                array = (
                    "" if line.strip() != "[" else "; an array goes into a .json file"
                )
                raise ConfigError(
                    f"{path}, line {number}: not JSON ({_reason(error)}); "
                    f"{_expected(fields)}{array}."
                ) from error


def _read_text(path: Path) -> str:
    """The file's text in UTF-8, or as its byte order mark says."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if wide else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise ConfigError(
            f"{path}, line {line}: not {encoding.upper()} text (byte "
            f"{data[error.start]:#04x}: {error.reason}); save the file as UTF-8."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _loads(text: str) -> Any:
    """The JSON value. A number that is no integer keeps its digits, and so does one too
    long for Python: a gold answer is what the file says."""
    return json.loads(text, **_PARSERS)


def _decimal(text: str) -> Written:
    try:
        return Written(text)
    except InvalidOperation as error:
        raise ValueError(f"the exponent of {text[:40]} is too large") from error


def _int(text: str) -> int | str | Written:
    if text == "-0":
        return Written(text)
    return int(text) if len(text) <= MOST_DIGITS else text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return values


_PARSERS: Any = {
    "parse_float": _decimal,
    "parse_int": _int,
    "object_pairs_hook": _object,
}


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", str(error))


def _unreadable_row(text: str) -> int:
    """The first element of an array that cannot be read, from 1."""
    decoder = json.JSONDecoder(**_PARSERS)
    row, start = 1, text.find("[") + 1
    while True:
        start = _SEPARATOR.match(text, start).end()  # type: ignore[union-attr]
        try:
            _, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return row
        row += 1


def _read_array(path: Path, fields: Sequence[str]) -> _Objects:
    del fields
    text = _read_text(path)
    try:
        values = _loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        place = f"row {_unreadable_row(text)}" if line is None else f"line {line}"
        raise ConfigError(
            f"{path}, {place}: not JSON ({_reason(error)}); expected an array."
        ) from error
    if not isinstance(values, list):
        raise ConfigError(
            f"{path} must be a JSON array of objects, {_instead(values)}."
        )
    return ((f"row {i}", value) for i, value in enumerate(values, 1))


def _instead(value: Any) -> str:
    """What a .json file holds in place of an array, and what to do."""
    lists = _lists(value)
    if len(lists) > 1 and len(lists) == len(value):
        return (
            f"got a table by columns ({_some(lists)}); write one object for each row, "
            "with a value of each column"
        )
    if lists:
        return (
            f"got an object with a list in {_some(lists)}; give the list alone, "
            "without the object around it"
        )
    return (
        f"got {type(value).__name__}; name a file of one object a line .jsonl, and "
        "write rows of an array as [{...}, {...}]"
    )


def _lists(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return []
    return [name for name, rows in value.items() if isinstance(rows, list)]


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _read_parquet(path: Path, fields: Sequence[str]) -> _Objects:
    del fields
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: parquet needs pyarrow, which is not installed; pip install "
            "pyarrow, or write the rows as .jsonl."
        ) from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"cannot read the data file {path}: {error}.") from error
    values = in_own_precision(table.to_pylist(), table.schema)
    return ((f"row {i}", value) for i, value in enumerate(values, 1))


def in_own_precision(rows: list[dict[str, Any]], schema: Any) -> list[dict[str, Any]]:
    """Rows of a pyarrow schema, with float32's 0.1 as 0.1 and not as 0.100000001."""
    narrow = [field for field in schema if _has_narrow_floats(field.type)]
    for row in rows:
        row |= {f.name: _narrowed(row[f.name], f.type) for f in narrow}
    return rows


def _has_narrow_floats(kind: Any) -> bool:
    import pyarrow.types

    if pyarrow.types.is_floating(kind):
        return kind.bit_width < 64
    return any(_has_narrow_floats(kind.field(i).type) for i in range(kind.num_fields))


def _narrowed(value: Any, kind: Any) -> Any:
    """A value of a pyarrow type, its floats the shortest of their precision."""
    import pyarrow.types

    if value is None or not _has_narrow_floats(kind):
        return value
    if pyarrow.types.is_struct(kind):
        return {f.name: _narrowed(value[f.name], f.type) for f in kind}
    if isinstance(value, list):
        return [_narrowed(v, kind.value_type) for v in value]
    if pyarrow.types.is_floating(kind):
        precision = np.float32 if kind.bit_width == 32 else np.float16
        return float(str(precision(value)))
    return value


def text_of(row: Row, field: str) -> str:
    """A field that is text or a number, as text.

    Raises:
        ConfigError: it is missing or anything else; NaN is no number.
    """
    value, actual = _shown(row.values, field)
    text = spelled(value)
    long = isinstance(value, int | Decimal) and too_many_digits(actual)
    if text is None and long:
        raise ConfigError(
            f"{row.where}: field {field!r} {long}; correct the row or remove it."
        )
    if text is None:
        raise ConfigError(
            f"{row.where}: field {field!r} is {actual[:200]}; expected text or a "
            "number that is finite."
        )
    return text


def _shown(values: dict[str, Any], field: str) -> tuple[Any, str]:
    """(a field's value or None, what an error shows of it)."""
    try:
        value = lookup(values, field)
    except KeyError:
        return None, "missing"
    return value, repr(value)


def _expected(fields: Sequence[str]) -> str:
    """What a row must be, in words."""
    named = f" with text fields {', '.join(fields)}" if fields else ""
    return f"expected a JSON object{named}"


def check_fields(row: Row, fields: Sequence[str]) -> None:
    """Raises ConfigError unless the row is an object with those fields as text."""
    where, values = row
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {_expected(fields)}.")
    for field in fields:
        value, actual = _shown(values, field)
        if not isinstance(value, str):
            raise ConfigError(
                f"{where}: field {field!r} is {actual}; {_expected(fields)}."
            )
