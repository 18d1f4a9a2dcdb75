"""Tasks by name: the table of makers, and `load_task`."""

import json
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from grpo_jax.errors import ConfigError, needs_the_whole_install, unknown_name
from grpo_jax.records import as_type
from grpo_jax.tasks.build import TaskRequest
from grpo_jax.tasks.chains import make_chains
from grpo_jax.tasks.competition_math import make_math
from grpo_jax.tasks.countdown import make_countdown
from grpo_jax.tasks.gsm8k import make_gsm8k
from grpo_jax.tasks.gsm8k_expressions import make_gsm8k_expressions
from grpo_jax.tasks.jsonl import make_jsonl
from grpo_jax.tasks.ladder import make_ladder
from grpo_jax.tasks.own import own_task
from grpo_jax.tasks.types import Task, check_tokenizer

_FILES = ("path", "heldout_path", "rewards", "vocab_size", "thinking")


class _Maker(NamedTuple):
    """How a task is made, and which of `load_task`'s options it honours besides seed,
    train_prompts, heldout_prompts, tokenizer, eos_ids, template, system,
    template_arguments, control_tokens and date, which all tasks do."""

    make: Callable[..., Task]  # (TaskRequest, **options of this task alone)
    honours: tuple[str, ...] = ()


_MAKERS: Mapping[str, _Maker] = MappingProxyType(
    {
        "chains": _Maker(make_chains),
        "countdown": _Maker(make_countdown, ("rewards", "vocab_size", "thinking")),
        "gsm8k": _Maker(make_gsm8k, _FILES),
        "gsm8k-expressions": _Maker(make_gsm8k_expressions, ("path",)),
        "jsonl": _Maker(
            make_jsonl,
            (
                *_FILES,
                "prompt_field",
                "system_field",
                "answer_field",
                "solution_field",
                "tag_fields",
            ),  # fmt: skip
        ),
        "ladder": _Maker(
            make_ladder, ("rewards", "vocab_size", "thinking", "levels", "skills")
        ),
        "math": _Maker(make_math, (*_FILES, "levels", "subjects")),
    }
)
TASKS = tuple(_MAKERS)
_LEAST = {"train_prompts": 1, "heldout_prompts": 0, "seed": 0}


@needs_the_whole_install("gj.load_task")
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
    template_arguments: Mapping[str, Any] | Sequence[str] = (),
    control_tokens: Literal["spell", "keep"] = "spell",
    date: str | None = None,
    rewards: Sequence[str] = (),
    levels: Sequence[str | int] = (),
    subjects: Sequence[str] = (),
    skills: Sequence[str] = (),
    prompt_field: str | None = None,
    system_field: str | None = None,
    answer_field: str | None = None,
    solution_field: str | None = None,
    tag_fields: Sequence[str] = (),
    vocab_size: int | None = None,
    thinking: bool = False,
) -> Task:
    """Makes a task by its name.

    Args:
        name: One of `TASKS`, or "module:name" of your own: a `Task`, or a function that
            returns one and is called with those of the options here that it names.
        path: The data: a directory with train and test files; for most tasks also a
            single file or a data set's name for `datasets`.
        heldout_path: A file to evaluate on in place of the test part.
        train_prompts, heldout_prompts: Their numbers; default: the task's. 0 held-out
            prompts: all that a file has.
        seed: Decides which prompts these are, and what is generated.
        tokenizer: A pretrained model's; None: one is made for the task.
        eos_ids: Tokens that end a completion; default: the tokenizer's EOS and the
            token with which its chat template ends a turn.
        template: One of `templates.TEMPLATES`; default: chat where the tokenizer has a
            chat template, as one made for a task of texts has, else none.
        system: The system turn of a chat template, for rows without one of their own.
        template_arguments: Further variables of the chat template, as a mapping or as
            "enable_thinking=false" with JSON values.
        control_tokens: Names of control tokens in prompts are spelt out ("spell"), or
            become these tokens ("keep"), for data that are in the model's template
            already; the default template is none then.
        date: What a chat template that prints the date takes for now, in ISO format;
            default: the time of this call.
        rewards: Such as "math", "r1_format=0.2" or "module:function=0.5", added up; the
            first decides what is solved. Default: the task's own.
        levels: MATH problems, or questions of the ladder, to keep.
        subjects, skills: The same, of MATH and of the ladder.
        prompt_field, system_field, answer_field, solution_field, tag_fields: Fields of
            a jsonl task's rows.
        vocab_size: Size of a tokenizer trained for the task.
        thinking: Only what follows </think> is read as an answer. False reads the whole
            completion, unfinished thoughts included.

    Raises:
        ConfigError: an unknown task, an option that it does not honour, or data that
            does not fit.
    """
    own = ":" in as_type(str, name, "task.name")
    if not own and name not in _MAKERS:
        raise unknown_name("task", name, [*TASKS, "module:name"])
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    language = _typed(
        seed=seed, train_prompts=train_prompts, heldout_prompts=heldout_prompts,
        eos_ids=eos_ids, template=template, system=system,
        control_tokens=control_tokens, date=date,
    )  # fmt: skip
    options = _typed(
        path=path, heldout_path=heldout_path, rewards=rewards, levels=levels,
        subjects=subjects, skills=skills, prompt_field=prompt_field,
        system_field=system_field, answer_field=answer_field,
        solution_field=solution_field, tag_fields=tag_fields,
        vocab_size=vocab_size, thinking=thinking,
    )  # fmt: skip
    options["thinking"] = options["thinking"] or None
    given = {key: value for key, value in options.items() if value not in (None, ())}
    if own:
        language["template_arguments"] = _arguments(template_arguments)
        return own_task(name, tokenizer, language, given)
    _check_honoured(name, given)
    shared = {key: given.pop(key) for key in [*given] if key in TaskRequest._fields}
    arguments = _arguments(template_arguments)
    request = TaskRequest(
        tokenizer=tokenizer, template_arguments=arguments, **language, **shared
    )
    return _MAKERS[name].make(request, **given)


def _typed(**options: Any) -> dict[str, Any]:
    """The options as the types that `load_task` annotates, sequences as tuples."""
    hints = typing.get_type_hints(load_task)
    typed = {}
    for key, value in options.items():
        name, hint = f"task.{key}", hints[key]
        if typing.get_origin(hint) is Sequence:
            typed[key] = _as_values(typing.get_args(hint)[0], value, name)
        else:
            typed[key] = as_type(hint, value, name)
        least = _LEAST.get(key)
        if least is not None and typed[key] is not None and typed[key] < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")
    return typed


def _as_values(kind: Any, given: Any, name: str) -> tuple:
    """A sequence as a tuple of values of the kind, which may be a union."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ConfigError(f"{name} must be a list of values, got {given!r}.")
    values = tuple(given)
    kinds = typing.get_args(kind) or (kind,)
    if len(kinds) == 1:
        return as_type(tuple[kind, ...], values, name)
    for value in values:
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(f"{name} must be values of {names}, got {value!r}.")
    return values


_WORDS = {"true": True, "false": False, "none": None, "null": None}  # in any case


def _arguments(given: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Variables of a chat template, with values of JSON where they are text."""
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, list | tuple) or not all(
        isinstance(text, str) for text in given
    ):
        raise ConfigError(
            "task.template_arguments must be a mapping or a list of NAME=VALUE, got "
            f"{given!r}; give {{'NAME': VALUE}} or ['NAME=VALUE']."
        )
    arguments = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"task.template_arguments must be NAME=VALUE, got {text!r}."
            )
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = _WORDS.get(value.lower(), value)
    return arguments


def _check_honoured(name: str, options: Mapping[str, Any]) -> None:
    """ConfigError for an option that would change nothing for the task."""
    for key, value in options.items():
        if key not in _MAKERS[name].honours:
            why = "changes nothing for"
            if key == "path":
                why = "names data, but nothing is read by"
            raise ConfigError(
                f"task.{key} {why} task {name}, got {value!r}; leave it out."
            )
