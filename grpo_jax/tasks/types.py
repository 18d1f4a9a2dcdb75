"""What a task is: prompts with answers, a tokenizer, and a reward."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import ANSWERS, ZERO_OR_ONE, refusal


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
    target_pass_rate: float | None = None
    max_steps: int
    noisy_steps: int = 0
    batch_size: int = 128
    learning_rate: float = 3e-3


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
        train, heldout: Examples, without a common prompt.
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
    control_tokens: str = "spell"
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
        if not callable(self.reward):
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


def _check_golds(
    rewards: Sequence[Reward], examples: Sequence[Example], part: str
) -> None:
    """ConfigError for a gold answer that a reward by name could never accept."""
    for i, example in enumerate(examples):
        for reward in rewards:
            reason = None
            if not isinstance(example.answer, str) and reward.name in ANSWERS:
                reason = f"it must be text, got {example.answer!r}"
            elif reward.name in ANSWERS:
                reason = refusal(reward.name, example.answer)
            if reason is not None:
                raise ConfigError(
                    f"{part}[{i}] of the task: reward {reward.name} refuses its gold "
                    f"answer: {reason}; correct the example or remove it."
                )
