"""From completions to rewards; a reward that fails is missing, not fatal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from grpo_jax.tasks.types import Example


class Scores(NamedTuple):
    rewards: np.ndarray  # [P, G] float32, NaN where missing
    errors: list[str]  # why, one per missing reward


def score(
    reward: Callable[[Example, str], float],
    examples: Sequence[Example],
    completions: Sequence[Sequence[str]],
) -> Scores:
    """Rewards of P examples' G completions each.

    A reward function that raises, or returns NaN, no number at all, or what is infinite
    in float32, leaves that sample's reward missing (NaN): it has no part in the update.
    """
    rewards = np.full((len(completions), len(completions[0])), np.nan, np.float32)
    errors = []
    for p, (example, group) in enumerate(zip(examples, completions, strict=True)):
        for g, completion in enumerate(group):
            try:
                with np.errstate(over="ignore"):
                    value = np.float32(float(reward(example, completion)))
            except (Exception, SystemExit) as error:  # a user's code may do anything
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if np.isfinite(value):
                rewards[p, g] = value
            else:
                errors.append(f"the reward is {value}")
    return Scores(rewards, errors)
