"""Tasks by name: the table of makers, and `load_task`."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from grpo_jax.errors import ConfigError, unknown_name
from grpo_jax.tasks.build import Language
from grpo_jax.tasks.chains import make_chains
from grpo_jax.tasks.competition_math import make_math
from grpo_jax.tasks.countdown import make_countdown
from grpo_jax.tasks.gsm8k import make_gsm8k
from grpo_jax.tasks.gsm8k_expressions import make_gsm8k_expressions
from grpo_jax.tasks.jsonl import make_jsonl
from grpo_jax.tasks.types import Task

_FILES = ("path", "heldout_path", "rewards", "vocab_size")
# name -> how it is made, and which options of `load_task` it honours besides sizes,
# seed, tokenizer, eos_ids, template and system, which all do.
_MAKERS: Mapping[str, tuple[Callable[..., Task], tuple[str, ...]]] = MappingProxyType(
    {
        "chains": (make_chains, ()),
        "countdown": (make_countdown, ("rewards", "vocab_size")),
        "gsm8k": (make_gsm8k, _FILES),
        "gsm8k-expressions": (make_gsm8k_expressions, ("path",)),
        "jsonl": (
            make_jsonl,
            (*_FILES, "prompt_field", "answer_field", "solution_field", "tag_fields"),
        ),
        "math": (make_math, (*_FILES, "levels", "subjects")),
    }
)
TASKS = tuple(_MAKERS)


def load_task(
    name: str,
    *,
    path: str | None = None,
    heldout_path: str | None = None,
    train_prompts: int | None = None,
    heldout_prompts: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    eos_ids: Sequence[int] = (),
    template: str | None = None,
    system: str | None = None,
    rewards: Sequence[str] = (),
    levels: Sequence[str | int] = (),
    subjects: Sequence[str] = (),
    prompt_field: str | None = None,
    answer_field: str | None = None,
    solution_field: str | None = None,
    tag_fields: Sequence[str] = (),
    vocab_size: int | None = None,
) -> Task:
    """The task of that name.

    Args:
        path: The data: a directory with train and test files, for most tasks also one
            file or a data set's name for `datasets`.
        heldout_path: A file to evaluate on in place of the test part.
        train_prompts, heldout_prompts: How many; default: the task's. 0 held-out ones:
            all that a file holds.
        seed: Of which they are, and of what is generated.
        tokenizer: A pretrained model's; None: one made for the task.
        eos_ids: Tokens that end a completion; default: the tokenizer's EOS.
        template: One of `templates.TEMPLATES`; default: chat where the tokenizer has a
            chat template, as one made for a task of texts has, else none.
        system: What a chat template is told first.
        rewards: Such as "math", "r1_format=0.2" or "module:function=0.5", added up; the
            first says what is solved. Default: the task's own.
        levels, subjects: Of MATH.
        prompt_field, answer_field, solution_field, tag_fields: Of a jsonl task's rows.
        vocab_size: Of a tokenizer trained for the task.

    Raises:
        ConfigError: no such task, an option that it does not honour, or data that does
            not fit.
    """
    if name not in _MAKERS:
        raise unknown_name("task", name, TASKS)
    make, honoured = _MAKERS[name]
    options: dict[str, Any] = dict(
        path=path, heldout_path=heldout_path, rewards=tuple(rewards),
        levels=tuple(levels), subjects=tuple(subjects), prompt_field=prompt_field,
        answer_field=answer_field, solution_field=solution_field,
        tag_fields=tuple(tag_fields), vocab_size=vocab_size,
    )  # fmt: skip
    given = {key: value for key, value in options.items() if value not in (None, ())}
    for key, value in given.items():
        if key not in honoured:
            why = "changes nothing for"
            if key == "path":
                why = "names data, but nothing is read by"
            raise ConfigError(
                f"task.{key} {why} task {name}, got {value!r}; leave it out."
            )
    given.pop("vocab_size", None)
    return make(
        train_prompts=train_prompts,
        heldout_prompts=heldout_prompts,
        seed=seed,
        language=Language(tokenizer, tuple(eos_ids), template, system, vocab_size),
        **given,
    )
