"""Your own data: a prompt and an answer in each row, judged by rewards of your choice.

Rows are read from .jsonl, .json or .parquet files, or from a data set by name; which
fields they use is yours to say.
"""

from collections.abc import Sequence

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.tasks.build import OWN, Language, Sourced, text_task
from grpo_jax.tasks.files import Row, read_parts
from grpo_jax.tasks.types import Task


def make_jsonl(
    *,
    path: str | None = None,
    heldout_path: str | None = None,
    train_prompts: int | None = None,
    heldout_prompts: int | None = None,
    seed: int = 0,
    language: Language = OWN,
    rewards: Sequence[str] = (),
    prompt_field: str | None = None,
    answer_field: str | None = None,
    solution_field: str | None = None,
    tag_fields: Sequence[str] = (),
) -> Task:
    """A task on the user's rows.

    Args:
        path: A file (a tenth of it, 512 rows at most, is held out by seed unless there
            is a `heldout_path`), a directory with train and test files, or a data set.
        rewards: Names of verifiers or module:function, with weights; default: exact.
        prompt_field, answer_field: Default "prompt" and "answer"; an answer may be a
            number.
        solution_field: Worked text for a warm start to imitate; default: the answer is.
        tag_fields: What evaluation is broken down by.
    """
    prompt_field, answer_field = prompt_field or "prompt", answer_field or "answer"
    fields = [prompt_field, *([solution_field] if solution_field else [])]
    rows, test_rows = read_parts(path, heldout_path, None, fields)

    def example(row: Row) -> Sourced:
        for name in (answer_field, *tag_fields):
            value = row.values.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                found = repr(row.values[name]) if name in row.values else "missing"
                raise ConfigError(
                    f"{row.where}: field {name!r} is {found}; expected text or a "
                    "number."
                )
        values = row.values
        solution = values[solution_field] if solution_field else ""
        tags = tuple((name, str(values[name])) for name in tag_fields)
        prompt, answer = values[prompt_field], str(values[answer_field])
        return Sourced(row.where, Example(prompt, answer, solution, tags))

    return text_task(
        name="jsonl",
        train=[example(row) for row in rows],
        heldout=None if test_rows is None else [example(row) for row in test_rows],
        train_prompts=train_prompts,
        heldout_prompts=heldout_prompts,
        seed=seed,
        language=language,
        rewards=rewards,
        default_reward="exact",
    )
