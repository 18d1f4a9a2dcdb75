"""Your own data: a prompt and an answer in each row, judged by rewards of your choice.

Rows are read from .jsonl, .json or .parquet files, or from a data set by name; you say
which of their fields are used.
"""

from collections.abc import Sequence

from grpo_jax.rewards.types import Example
from grpo_jax.tasks.build import SourcedExample, TaskRequest, text_task
from grpo_jax.tasks.files import Row, read_parts, text_of
from grpo_jax.tasks.types import Task


def make_jsonl(
    request: TaskRequest,
    *,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    solution_field: str | None = None,
    tag_fields: Sequence[str] = (),
) -> Task:
    """A task on the user's rows.

    Args:
        request: Its path is a file (a tenth of it, 512 rows at most, is held out by
            seed unless there is a `heldout_path`), a directory with train and test
            files, or a data set; its rewards are names of verifiers or module:function
            with weights, default: exact.
        prompt_field, answer_field: Default "prompt" and "answer"; an answer may be a
            number.
        solution_field: Worked text for a warm start to imitate; default: the answer is.
        tag_fields: What evaluation is broken down by.
    """
    prompt_field, answer_field = prompt_field or "prompt", answer_field or "answer"

    def example(row: Row) -> SourcedExample:
        values = row.values
        solution = values[solution_field] if solution_field else ""
        tags = tuple((name, text_of(row, name)) for name in tag_fields)
        prompt, answer = values[prompt_field], text_of(row, answer_field)
        return SourcedExample(row.where, Example(prompt, answer, solution, tags))

    fields = [prompt_field, *([solution_field] if solution_field else [])]
    train, heldout = read_parts(request.path, request.heldout_path, fields=fields)
    return text_task(
        request,
        name="jsonl",
        train=[example(row) for row in train],
        heldout=None if heldout is None else [example(row) for row in heldout],
        default_reward="exact",
    )
