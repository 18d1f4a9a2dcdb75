r"""MATH: competition problems with worked solutions, by level and subject.

Hendrycks et al. 2021, arXiv:2103.03874. The gold answer is the field `answer` where
rows have one (as in MATH-500, to be given as the held-out file), else the last \boxed
of the solution. Two training rows of the published files have level "?", two others an
empty \boxed{} and so no answer: such rows are left out and counted in the task's note.
"""

from collections.abc import Sequence

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.answers import last_boxed
from grpo_jax.rewards.rows import Row, text_of
from grpo_jax.rewards.types import Example
from grpo_jax.tasks.build import SourcedExample, TaskRequest, check_present, text_task
from grpo_jax.tasks.files import read_parts
from grpo_jax.tasks.types import Task


def make_math(
    request: TaskRequest,
    *,
    levels: Sequence[str | int] = (),
    subjects: Sequence[str] = (),
) -> Task:
    """Training problems, and 512 of the test file's by seed, unless sizes are given.

    Args:
        levels, subjects: Only these are trained on, as (3, 4, 5) and ("Algebra",);
            empty: all. Held-out problems are chosen alike, but for those of a
            `heldout_path`, which are all kept.
    """
    if request.path is None:
        raise ConfigError(
            "task.path must be a directory with MATH's train.jsonl and test.jsonl, or "
            "a data set's name for `datasets`."
        )
    rows, test_rows = read_parts(
        request.path, request.heldout_path, fields=["problem", "solution"]
    )
    train, heldout = _examples(rows), _examples(test_rows or [])
    lost = len(rows) + len(test_rows or []) - len(train) - len(heldout)
    note = f"{lost} rows have an empty \\boxed{{}} and were left out."
    train = _select(train, levels, subjects)
    if heldout and request.heldout_path is None:
        heldout = _select(heldout, levels, subjects, part="held-out ")
    return text_task(
        request,
        name="math",
        train=train,
        heldout=None if test_rows is None else heldout,
        default_reward="math",
        note=note if lost else "",
    )


def _examples(rows: Sequence[Row]) -> list[SourcedExample]:
    """The rows that have an answer."""
    examples = [_example(row) for row in rows]
    return [example for example in examples if example is not None]


def _example(row: Row) -> SourcedExample | None:
    """None where the solution's last box is empty."""
    values = row.values
    if values.get("answer") is not None:
        answer = text_of(row, "answer")
    else:
        answer = last_boxed(values["solution"])
        if answer == "":
            return None
    if answer is None:
        raise ConfigError(
            f"{row.where}: there is no answer, neither a field 'answer' nor "
            "a closed \\boxed at the solution's end; correct the row or remove it."
        )
    level = str(values.get("level", "?")).removeprefix("Level").strip()
    subject = str(values.get("subject", values.get("type", "?")))
    tags = (("level", level), ("subject", subject))
    return SourcedExample(
        row.where, Example(values["problem"], answer, values["solution"], tags)
    )


def _select(
    rows: list[SourcedExample],
    levels: Sequence[str | int],
    subjects: Sequence[str],
    part: str = "",
) -> list[SourcedExample]:
    """The rows of those levels and subjects; `part` names held-out rows in errors."""
    for name, wanted in (("level", levels), ("subject", subjects)):
        if not wanted:
            continue
        chosen = {str(value) for value in wanted}
        present = {dict(row.example.tags)[name] for row in rows}
        if not part:
            check_present(f"{name}s", wanted, present)
        rows = [row for row in rows if dict(row.example.tags)[name] in chosen]
    if not rows:
        raise ConfigError(
            f"no {part}problem has the levels and subjects asked for; ask for more."
        )
    return rows
