"""What a task is: prompts with answers, a tokenizer, and a reward."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from grpo_jax.rewards.types import Example, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStart:
    """How a task's model learns to answer at all, before reinforcement learning.

    `demonstrations(rng, count, spoiled)` returns that many Examples to imitate, with
    answers spoiled on purpose in the second stage.
    """

    demonstrations: Callable[[np.random.Generator, int, bool], list[Example]]
    # No demonstration has a longer prompt or a longer answer; None: they are examples
    # of the trained prompts, and those too long for a completion are left out.
    longest: Example | None = None
    # Clean learning stops when this is measured: of tasks where one completion is
    # right. None: it takes max_steps, and its loss is reported in place of pass rates.
    target_pass_rate: float | None = None
    max_steps: int
    noisy_steps: int = 0
    batch_size: int = 128
    learning_rate: float = 3e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts to train on and prompts only to be evaluated.

    Attributes:
        train, heldout: Disjoint examples.
        tokenizer: A Hugging Face fast tokenizer with padding and EOS tokens.
        reward: (example, completion text without EOS) -> float, called in this process,
            or `Reward`s, computed in worker processes; NaN or an exception mean that
            the reward is missing.
        eos_ids: Tokens that end a completion; empty: the tokenizer's EOS.
        template: How a prompt becomes tokens, a name of `templates.py`; the same in
            training and evaluation.
        system: What a chat template is told before the prompt; None: nothing, or what
            the template itself says.
        single_answer: Exactly one completion is right, `example.answer` and EOS, so the
            pass rate exp(log-prob of the answer) is exact without sampling.
        warm_start: None where the model must come with a policy worth training.
        refine_template: How a draft joins its prompt, where drafts are refined.
        note: One sentence for the report on what held-out figures can show.
    """

    name: str
    train: list[Example]
    heldout: list[Example]
    tokenizer: Any
    reward: Callable[[Example, str], float] | tuple[Reward, ...]
    eos_ids: tuple[int, ...] = ()
    template: str = "none"
    system: str | None = None
    single_answer: bool = False
    warm_start: WarmStart | None = None
    refine_template: str = "{prompt}{draft}\n{prompt}"
    note: str = ""

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a completion, in the order they were given."""
        return self.eos_ids or (self.tokenizer.eos_token_id,)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The same as a set."""
        return frozenset(self.ends)

    @property
    def end_id(self) -> int:
        """The one of them that answers to be imitated end with."""
        eos = self.tokenizer.eos_token_id
        return eos if eos in self.stop_ids else self.eos_ids[0]

    @staticmethod
    def imitated(example: Example) -> str:
        """What a model may imitate of an example: the worked text where there is one,
        the answer otherwise."""
        return example.solution or example.answer
