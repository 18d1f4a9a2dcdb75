"""GSM8K: grade-school word problems with worked solutions.

Cobbe et al. 2021, arXiv:2110.14168. The completion must end on the right number. The
worked solutions, without their calculator annotations, are what a warm start imitates.
"""

import re

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.answers import several_answers
from grpo_jax.rewards.rows import Row
from grpo_jax.rewards.types import Example
from grpo_jax.tasks.build import SourcedExample, TaskRequest, text_task
from grpo_jax.tasks.files import read_parts
from grpo_jax.tasks.types import Task

_THOUSANDS = re.compile(r"-?\$?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?")
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def make_gsm8k(request: TaskRequest) -> Task:
    """All training questions, and 512 of the test file's by seed, unless sizes are
    given."""
    train, heldout = read_parts(
        request.path,
        request.heldout_path,
        hub_name=("openai/gsm8k", "main"),
        fields=["question", "answer"],
    )
    return text_task(
        request,
        name="gsm8k",
        train=[_example(row) for row in train],
        heldout=None if heldout is None else [_example(row) for row in heldout],
        default_reward="gsm8k",
    )


def _example(row: Row) -> SourcedExample:
    question, text = row.values["question"], row.values["answer"]
    worked, marker, number = text.rpartition("####")
    if not marker:
        raise ConfigError(
            f"{row.where}: field 'answer' has no '#### number' at its end; correct the "
            "row or remove it."
        )
    if several := several_answers(text):
        raise ConfigError(
            f"{row.where}: field 'answer' marks several answers "
            f"({', '.join(several[:3])}); correct the row or remove it."
        )
    number = number.strip()
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    worked = _ANNOTATION.sub("", worked).rstrip()
    solution = f"{worked}\n#### {number}".lstrip()
    return SourcedExample(row.where, Example(question, number, solution))
