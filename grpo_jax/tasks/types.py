"""What a task is: prompts with answers, a tokenizer, and a reward."""

import dataclasses
import datetime
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from grpo_jax.errors import (
    UP_TO_ONE,
    ConfigError,
    at_least,
    check_fields,
    check_kind,
    positive,
)
from grpo_jax.records import as_type, field_types
from grpo_jax.rewards.spec import check_reward
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import ANSWERS, ZERO_OR_ONE, refusal
from grpo_jax.user_code import takes

_EXAMPLE = 'gj.Example("What is 1 + 1?", "2")'
_REWARD = """
    reward=lambda example, completion: float(completion == example.answer)
    reward=(gj.Reward(name="exact"), gj.Reward(name="module:function", weight=0.5))"""
_WARM_START = """
    gj.WarmStart(demonstrations=lambda rng, count, spoiled: examples, max_steps=100)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Supervised learning that gives a policy some success, before reinforcement
    learning.

    `demonstrations(rng, count, spoiled)` returns that many Examples to imitate, with
    answers spoiled on purpose in the second stage.
    """

    demonstrations: Callable[[np.random.Generator, int, bool], list[Example]]
    # Has the longest prompt and the longest answer of all demonstrations; None: they
    # are the trained examples, without those too long for a completion.
    longest: Example | None = None
    # Where one completion is right, the first stage stops at this exact pass rate.
    # None: it takes max_steps, and the loss is reported in place of pass rates.
    target_pass_rate: Annotated[float, UP_TO_ONE] | None = None
    max_steps: Annotated[int, at_least(1)]
    noisy_steps: Annotated[int, at_least(0)] = 0
    batch_size: Annotated[int, at_least(1)] = 128
    learning_rate: Annotated[float, positive()] = 3e-3

    def __post_init__(self):
        if not takes(self.demonstrations, None, 1, False):
            raise ConfigError(
                "warm_start.demonstrations must be a function of (rng, count, spoiled) "
                "that gives a list of Examples, got "
                f"{reprlib.repr(self.demonstrations)}; for example{_WARM_START}"
            )
        if self.longest is not None:
            _check_example("warm_start.longest", self.longest)
        _set_typed(self, _NUMBERS, "warm_start")
        check_fields(self, "warm_start.", ConfigError)


_NUMBERS = (
    "target_pass_rate",
    "max_steps",
    "noisy_steps",
    "batch_size",
    "learning_rate",
)


class SourcedExample(NamedTuple):
    """An example and the row it was read from."""

    where: str  # "rows.jsonl, line 3"
    example: Example


def now() -> str:
    """The local time to the second, in ISO format."""
    return datetime.datetime.now().isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts to train on and prompts only to be evaluated.

    Attributes:
        train, heldout: Examples. A run trains on no prompt that is held out.
        tokenizer: A Hugging Face fast tokenizer with padding and EOS tokens.
        reward: (example, completion text without EOS) -> float, called in this process,
            or `Reward`s, computed in worker processes; NaN or an exception means that
            the reward is missing.
        eos_ids: Tokens that end a completion; empty: the tokenizer's EOS.
        template: How a prompt becomes tokens, one of `templates.TEMPLATES`; the same
            in training and evaluation.
        system: The system turn of a chat template, for prompts without one of their
            own; None: the template's default.
        template_arguments: Further variables of the chat template.
        control_tokens: "spell": names of control tokens in a prompt are text; "keep":
            they are these tokens.
        date: What a chat template that prints the date takes for now, in ISO format;
            "": the time of rendering.
        single_answer: Exactly one completion is right, `example.answer` and EOS, so the
            pass rate exp(log-prob of the answer) is exact without sampling.
        warm_start: None where there is nothing to imitate: the model must be one that
            earns rewards.
        refine_template: How a draft joins its prompt, where drafts are refined.
        note: What held-out figures can show, for the report.
        warnings: What to know of the prompts before they are asked.
        places: Example -> the row it was read from, for errors.
    """

    name: str
    train: list[Example]
    heldout: list[Example]
    tokenizer: Any
    reward: Callable[[Example, str], float] | tuple[Reward, ...]
    eos_ids: tuple[int, ...] = ()
    template: str = "none"
    system: str | None = None
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    control_tokens: Literal["spell", "keep"] = "spell"
    date: str = dataclasses.field(default_factory=now, compare=False)
    single_answer: bool = False
    warm_start: WarmStart | None = None
    refine_template: str = "{prompt}{draft}\n{prompt}"
    note: str = ""
    warnings: tuple[str, ...] = ()
    places: Mapping[Example, str] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self):
        _set_typed(self, _PLAIN, "task")
        for part in ("train", "heldout"):
            examples = as_examples(f"task.{part}", getattr(self, part))
            object.__setattr__(self, part, examples)
        check_tokenizer(self.tokenizer)
        check_kind(
            "task.template_arguments", self.template_arguments, Mapping,
            'give {"enable_thinking": False}',
        )  # fmt: skip
        if any(i < 0 for i in self.eos_ids):
            raise ConfigError(
                f"task.eos_ids must be tokens of the vocabulary, got {self.eos_ids}; "
                "leave them out for the tokenizer's EOS."
            )
        if self.warm_start is not None:
            advice = f"leave it out, or give one:{_WARM_START}"
            check_kind("task.warm_start", self.warm_start, WarmStart, advice)
        if not callable(self.reward):
            object.__setattr__(self, "reward", _rewards(self.reward))
            for part in ("train", "heldout"):
                _check_golds(self.reward, getattr(self, part), part)

    @property
    def graded(self) -> bool:
        """Whether rewards may differ from 1 where solved and 0 elsewhere: there are
        several, or one has a weight, is a user's own or grades lengths."""
        if callable(self.reward):
            return self.reward not in ZERO_OR_ONE.values()
        first, *others = self.reward
        return bool(others) or first.weight != 1 or first.name not in ZERO_OR_ONE

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a completion, in the order they were given."""
        return self.eos_ids or (self.tokenizer.eos_token_id,)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a completion, as a set."""
        return frozenset(self.ends)

    @property
    def end_id(self) -> int:
        """The token that ends an answer to be imitated."""
        eos = self.tokenizer.eos_token_id
        return eos if eos in self.stop_ids else self.eos_ids[0]

    @staticmethod
    def imitated(example: Example) -> str:
        """The text to imitate: the worked solution if there is one, else the answer."""
        return example.solution or example.answer


# Fields of a task that are text, numbers, or lists of them.
_PLAIN = (
    "name", "eos_ids", "template", "system", "control_tokens", "date", "single_answer",
    "refine_template", "note", "warnings",
)  # fmt: skip


def _set_typed(record: Any, names: Sequence[str], where: str) -> None:
    """Gives fields the types of their annotations; ConfigError where that cannot be."""
    kinds = field_types(type(record))
    for name in names:
        value = as_type(kinds[name], getattr(record, name), f"{where}.{name}")
        object.__setattr__(record, name, value)


def check_tokenizer(tokenizer: Any) -> None:
    """ConfigError unless it can decode."""
    if not hasattr(tokenizer, "decode"):
        raise ConfigError(
            f"task.tokenizer must be a tokenizer, got {reprlib.repr(tokenizer)}; "
            "gj.load_tokenizer(DIR) reads that of a model, gj.character_tokenizer("
            '"abc") makes one.'
        )


def as_examples(where: str, given: Any) -> list[Example]:
    """The list; ConfigError, which names `where`, unless it is one of Examples."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise ConfigError(
            f"{where} must be a list of Examples, got {reprlib.repr(given)}; give "
            f"[{_EXAMPLE}, ...]."
        )
    for i, example in enumerate(given):
        _check_example(f"{where}[{i}]", example)
    return list(given)


def _check_example(where: str, example: Any) -> None:
    """ConfigError unless it is an Example of texts."""
    check_kind(where, example, Example, f"give {_EXAMPLE}")
    for name in ("prompt", "answer", "solution"):
        if not isinstance(text := getattr(example, name), str):
            raise ConfigError(
                f"{where}.{name} must be text, got {reprlib.repr(text)}; give "
                f"str(...), and let the reward read it from there."
            )
    for name, pair in (("tags", '("level", "3")'), ("context", '("user", "Hello")')):
        if not _are_pairs(pairs := getattr(example, name)):
            raise ConfigError(
                f"{where}.{name} must be a tuple of pairs of text, got "
                f"{reprlib.repr(pairs)}; give ({pair},)."
            )


def _are_pairs(value: Any) -> bool:
    """Whether it is a tuple of (text, text)."""
    return isinstance(value, tuple) and all(
        isinstance(x, tuple) and [type(y) for y in x] == [str, str] for x in value
    )


def _rewards(given: Any) -> tuple[Reward, ...]:
    """Rewards by name as a tuple; ConfigError unless each is one that exists."""
    rewards = tuple(given) if isinstance(given, list | tuple) else ()
    if not rewards or not all(isinstance(reward, Reward) for reward in rewards):
        raise ConfigError(
            "task.reward must be a function of (example, completion) or a tuple of "
            f"Rewards, got {reprlib.repr(given)}; for example{_REWARD}"
        )
    for reward in rewards:
        check_reward(reward)
    return rewards


def _check_golds(
    rewards: Sequence[Reward], examples: Sequence[Example], part: str
) -> None:
    """ConfigError for a gold answer that a reward by name could never accept."""
    for i, example in enumerate(examples):
        for reward in rewards:
            if reward.name not in ANSWERS:
                continue
            if (reason := refusal(reward.name, example.answer)) is not None:
                raise ConfigError(
                    f"{part}[{i}] of the task: reward {reward.name} refuses its gold "
                    f"answer: {reason}; correct the example or remove it."
                )
