"""Reading a task's data, from a path or by name."""

import re
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.rows import (
    UNREAD,
    Row,
    check_fields,
    in_own_precision,
    read_rows,
)

SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name or owner/name:config


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
    elif (
        local.is_file()
        or not _HUB.fullmatch(path)
        or local.suffix in {*SUFFIXES, *UNREAD}
    ):
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
    """The directory's file of a part; where none exists one of another format, or the
    .jsonl file, for the error."""
    files = [directory / f"{name}{suffix}" for suffix in (*SUFFIXES, *sorted(UNREAD))]
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
        parts = [
            in_own_precision(data[part].to_list(), data[part].features.arrow_schema)
            for part in names
        ]
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
        check_fields(row, fields)
    return rows
