"""The fields of rows, by the names of a form: one record a completion."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError, nearest
from grpo_jax.rewards.rows import Row, lookup
from grpo_jax.rollouts.forms import ROW_FORMS, RowForm, explaining, number
from grpo_jax.rollouts.transcripts import Value, kind_of

_LARGEST = float(np.finfo(np.float32).max)


class Record(NamedTuple):
    """One completion of a row."""

    where: str
    step: int | None
    group: str | None  # None: its prompt's tokens
    prompt: Value
    completion: Value
    reward: float  # NaN where missing
    logprobs: list[Any] | None
    mask: list[Any] | None
    truncated: bool
    advantage: float  # NaN where not known


def records_by_step(
    rows: Sequence[Row], form: RowForm
) -> tuple[dict[int | None, list[Record]], Mapping[str, float]]:
    """(completions of each step in the order of the rows, weights of the fields that
    their rewards are made of)."""
    if form.unpack is not None:
        where = rows[0].where
        rows = [one for row in rows for one in form.unpack(row)]
        if not rows:
            raise ConfigError(f"{where}: no row has a completion that was trained on.")
    known = [f.optional() for f in ROW_FORMS.values()]  # whose files may lack a field
    for kind, name in form.optional().items():
        own = name not in {names[kind] for names in known}
        if own and not any(_has(row, name) for row in rows):
            raise ConfigError(_missing(rows[0], name, form, f"; {kind} is called so"))
    weights = form.weights() or _reward_fields(rows, form)
    steps: dict[int | None, list[Record]] = {}
    for row in rows:
        for record in _records(row, form, weights):
            steps.setdefault(record.step, []).append(record)
    return steps, weights


def _has(row: Row, field: str) -> bool:
    try:
        lookup(row.values, field)
    except KeyError:
        return False
    return True


def _get(row: Row, field: str) -> Any:
    """A field's value; None where it is missing or null."""
    return lookup(row.values, field) if _has(row, field) else None


def _needed(row: Row, field: str, form: RowForm) -> Any:
    value = _get(row, field)
    if value is None:
        raise ConfigError(_missing(row, field, form))
    return value


def _missing(row: Row, field: str, form: RowForm, more: str = "") -> str:
    there = ", ".join(repr(name) for name in row.values)
    known = [f"form={name!r} (--form {name})" for name in explaining(row.values, form)]
    return (
        f"{row.where}: field {field!r} is missing{more}; {nearest(field, row.values)}"
        f"the row has {there}: "
        + (f"it may be of {' or '.join(known)}; else " if known else "")
        + "say what fields are called with form=gj.RowForm(...), or --rewards NAME."
    )


def _reward_fields(rows: Sequence[Row], form: RowForm) -> dict[str, float]:
    """Every field that is a number in some row, and a number or null in all."""
    there = dict.fromkeys(name for row in rows for name in row.values)
    names = [name for name in there if name not in form.named()]

    def numeric(name: str) -> bool:
        values = [row.values.get(name) for row in rows]
        present = [x for x in values if x is not None]
        return bool(present) and all(
            not isinstance(x, bool | str | list | dict) for x in present
        )

    found = {name: 1.0 for name in names if numeric(name)}
    if not found:
        first = rows[0].values
        truths = [x for x in names if isinstance(first.get(x), bool)]
        if truths:
            raise ConfigError(
                f"{rows[0].where}: no field has numbers; of true and false a reward is "
                f"made by name alone: gj.RowForm(rewards={truths[0]!r}), or --rewards "
                f"{truths[0]}."
            )
        raise ConfigError(
            _missing(rows[0], "reward", form, ": no other field has numbers")
        )
    return found


def _records(row: Row, form: RowForm, weights: Mapping[str, float]) -> Iterator[Record]:
    """The completions of a row: one, or a list of them."""
    prompt = _value(row, form.prompt, form)
    completions = _needed(row, form.completion, form)
    several = kind_of(completions) == "several"
    if not several:
        completions = [_value(row, form.completion, form)]
    n = len(completions)

    def each(field: str) -> list[Any]:
        """The field's value for each completion; None where it is missing."""
        value = _get(row, field)
        if not several or value is None:
            return [value] * n
        if not isinstance(value, list) or len(value) != n:
            held = f"{len(value)} values" if isinstance(value, list) else repr(value)
            raise ConfigError(
                f"{row.where}: field {field!r} must be a list of {n}, one for each "
                f"completion, got {held:.100}."
            )
        return value

    for field in weights if form.rewards is not None else ():
        if not _has(row, field):
            raise ConfigError(_missing(row, field, form))
    parts = {field: each(field) for field in weights}
    names = form.of_completions()
    group, step = _get(row, form.group), _step(row, form.step)
    optional = {kind: each(names[kind]) for kind in names}
    for i, completion in enumerate(completions):
        where = f"{row.where}, completion {i}" if several else row.where
        if completion != "" and kind_of(completion) in ("", "several"):
            raise ConfigError(_no_value(where, form.completion, completion))
        yield Record(
            where,
            step,
            None if group is None else repr(group),
            prompt,
            completion,
            _reward({name: x[i] for name, x in parts.items()}, weights, where),
            optional["logprobs"][i],
            optional["mask"][i],
            bool(optional["truncated"][i]),
            number(optional["advantage"][i], f"{where}: field {form.advantage!r}"),
        )


def _value(row: Row, field: str, form: RowForm) -> Value:
    """A field that is text, token ids or messages; "" is for the caller to refuse."""
    value = _needed(row, field, form)
    if value != "" and kind_of(value) in ("", "several"):
        raise ConfigError(_no_value(f"{row.where}: field {field!r}", field, value))
    return value


def _no_value(where: str, field: str, value: Any) -> str:
    return (
        f"{where}: {field} must be text, token ids (whole numbers) or messages with "
        f"role and content, and not empty; got {value!r:.100}."
    )


def _step(row: Row, field: str) -> int | None:
    value = _get(row, field)
    if value is None:
        return None
    try:
        step = int(value)
    except (TypeError, ValueError, OverflowError):
        step = None
    if step is None or (not isinstance(value, str) and step != value):
        raise ConfigError(
            f"{row.where}: field {field!r} must be a whole number, got {value!r:.100}."
        )
    return step


def _reward(
    values: Mapping[str, Any], weights: Mapping[str, float], where: str
) -> float:
    """The weighted sum of those that are there; NaN where none is."""
    numbers = {
        name: number(value, f"{where}: field {name!r}")
        for name, value in values.items()
    }
    present = [weights[name] * x for name, x in numbers.items() if not np.isnan(x)]
    total = float(sum(present)) if present else float("nan")
    if abs(total) > _LARGEST:
        raise ConfigError(f"{where}: a reward of {total:g} is more than float32 holds.")
    return total
