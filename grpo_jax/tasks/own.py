"""A task of a user's own, by "module:name"."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.errors import ConfigError
from grpo_jax.tasks.build import TaskRequest, make_language
from grpo_jax.tasks.types import Task
from grpo_jax.user_code import find_object, named_by

_EXAMPLE = """a task is such as
    def reverse(*, tokenizer=None, seed=0):  # options of --task, those you name
        return gj.Task(name="reverse", train=examples, heldout=others,
                       tokenizer=tokenizer or gj.character_tokenizer("abc"),
                       reward=lambda example, text: float(text == example.answer))"""
# Options that every task honours: of the language its prompts are asked in.
_LANGUAGE = (
    "eos_ids", "template", "system", "template_arguments", "control_tokens", "date",
)  # fmt: skip
# Options that ask for nothing; evaluation asks for all held-out prompts, 0.
_UNASKED = (("seed", 0), ("heldout_prompts", 0))


def own_task(
    name: str, tokenizer: Any, shared: Mapping[str, Any], options: Mapping[str, Any]
) -> Task:
    """The task that "module:name" names, in the tokenizer's tokens if one is given.

    Args:
        name: Of a `Task`, or of a function that makes one.
        tokenizer: A pretrained model's; None: the task's own.
        shared: Options of `load_task` that all tasks have.
        options: Those given of the others; the function must name them.

    Raises:
        ConfigError: there is no such task, it does not take an option, or it is none.
    """
    found = find_object(name, "task.name")
    language = {key: shared[key] for key in _LANGUAGE}
    others = {
        key: value
        for key, value in {**shared, **options}.items()
        if key not in _LANGUAGE and value is not None
    }
    task = found
    if not isinstance(found, Task):
        task = _call(name, found, {"tokenizer": tokenizer, **others})
        others = {}
    for key, value in others.items():
        if (key, value) not in _UNASKED:
            raise ConfigError(
                f"task.{key} changes nothing for {name}, a Task that is made already, "
                f"got {value!r}; leave it out, or name a function of {key}."
            )
    if not isinstance(task, Task):
        raise ConfigError(f"{name} must give a Task, got {task!r}; {_EXAMPLE}")
    return _in_language(task, tokenizer, language)


def _call(name: str, function: Any, given: Mapping[str, Any]) -> Any:
    """Calls the function with the options that it names."""
    if not isinstance(function, Callable):
        raise ConfigError(f"{name} must be a Task or make one; {_EXAMPLE}")
    known = named_by(function, given)
    for key, value in given.items():
        unasked = key == "tokenizer" or (key, value) in _UNASKED
        if key not in known and not unasked:
            raise ConfigError(
                f"task.{key} changes nothing for {name}, which has no parameter {key}, "
                f"got {value!r}; leave it out."
            )
    return function(**known)


def _in_language(task: Task, tokenizer: Any, options: dict[str, Any]) -> Task:
    """The task with what was asked of its language, in the tokenizer given."""
    if tokenizer is None:  # its own, and what it says itself where nothing is asked
        own = {key: getattr(task, key) for key in _LANGUAGE}
        kept = ("eos_ids", "template", "system", "template_arguments", "date")
        options = options | {key: own[key] for key in kept if not options[key]}
        if options["control_tokens"] == "spell":
            options["control_tokens"] = own["control_tokens"]
    request = TaskRequest(tokenizer=tokenizer or task.tokenizer, **options)
    return dataclasses.replace(task, **make_language(request, _none)._asdict())


def _none() -> Any:
    raise AssertionError("there is a tokenizer")
