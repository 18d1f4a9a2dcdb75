"""From completions to rewards; a reward that fails is missing or 0, never fatal."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from grpo_jax.errors import unknown_name
from grpo_jax.rewards.pool import Check, VerifierPool
from grpo_jax.rewards.spec import reward_text
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import VERIFIERS

_TASK_VERIFIERS = {"chains": "exact", "gsm8k-expressions": "exact"}


class Scores(NamedTuple):
    """Rewards of P prompts' G completions each.

    Attributes:
        rewards: [P, G] float32, the weighted sum; NaN where missing.
        errors: Why, one per missing reward.
        solved: [P, G] bool, the first reward is 1 or more before its weight.
        parts: Each reward's own values, [P, G], where there are several.
        failures: Checks that hung or whose worker died; they score 0.
    """

    rewards: np.ndarray
    errors: list[str]
    solved: np.ndarray
    parts: dict[str, np.ndarray]
    failures: int


def score(
    reward: Callable[[Example, str], float] | Sequence[Reward],
    examples: Sequence[Example],
    completions: Sequence[Sequence[str]],
    *,
    tokens: np.ndarray | None = None,
    pool: VerifierPool | None = None,
) -> Scores:
    """Rewards of P examples' G completions each.

    A callable runs in this process; `Reward`s run in `pool`, or in one that lives for
    this call. A reward function that raises, or returns NaN, no number at all, or what
    is infinite in float32, leaves that sample's reward missing (NaN): it has no part in
    the update. A check that hangs or kills its worker scores 0 and is counted.

    Args:
        tokens: [P, G] int, lengths of the completions, for the reward "length".
    """
    if callable(reward):
        return _score_here(reward, examples, completions)
    if pool is None:
        with VerifierPool(reward) as pool:
            return score(reward, examples, completions, tokens=tokens, pool=pool)
    shape = (len(completions), len(completions[0]))
    counts = [None] * shape[0] * shape[1] if tokens is None else np.ravel(tokens)
    samples = [
        (example, completion)
        for example, group in zip(examples, completions, strict=True)
        for completion in group
    ]
    outcomes = pool.run(
        [
            Check(one, example, completion, count)
            for one in reward
            for (example, completion), count in zip(samples, counts, strict=True)
        ]
    )
    values = np.array([outcome.value for outcome in outcomes], np.float32)
    values = values.reshape(len(reward), *shape)
    weights = np.array([one.weight for one in reward], np.float32)
    with np.errstate(over="ignore"):
        total = np.einsum("r,rpg->pg", weights, values)
    total[~np.isfinite(total)] = np.nan
    errors = [
        # A sample is missing once, whichever of its rewards is.
        next((o.error for o in outcomes[i :: len(samples)] if o.error), "overflow")
        for i in np.flatnonzero(np.isnan(total))
    ]
    names = [reward_text(one) for one in reward]
    return Scores(
        rewards=total,
        errors=errors,
        solved=values[0] >= 1,
        parts=dict(zip(names, values, strict=True)) if len(reward) > 1 else {},
        failures=sum(outcome.failed for outcome in outcomes),
    )


def _score_here(reward, examples, completions):
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
    return Scores(rewards, errors, solved=rewards >= 1, parts={}, failures=0)


def verify(task: str, gold: str, completion: str) -> float:
    """The verdict that training uses on a completion, isolated and time-limited.

    Args:
        task: A task or verifier by name: "gsm8k", "math", "countdown", "chains", ...
        gold: The gold answer, as `Example.answer` has it.
        completion: The model's text, without EOS.

    Returns:
        1 or 0; 0 also where the check took longer than 3 seconds or died.

    Raises:
        ConfigError: no such task.
    """
    names = {name: name for name in VERIFIERS if name != "length"} | _TASK_VERIFIERS
    if task not in names:
        raise unknown_name("task to verify", task, names)
    check = Check(Reward(name=names[task]), Example("", gold), completion)
    [outcome] = _shared_pool(os.getpid()).run([check])
    return outcome.value


@functools.cache
def _shared_pool(pid):
    del pid  # a forked child must not read its parent's pipes
    return VerifierPool([Reward(name="math")], workers=1)
