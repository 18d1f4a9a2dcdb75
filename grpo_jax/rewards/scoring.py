"""From completions to rewards; a reward that fails is missing or 0, never fatal."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError, needs_the_whole_install, unknown_name
from grpo_jax.rewards.pool import Check, Outcome, VerifierPool
from grpo_jax.rewards.spec import reward_text
from grpo_jax.rewards.spelling import spelled
from grpo_jax.rewards.types import Example, Reward, reward_number
from grpo_jax.rewards.verifiers import VERIFIERS

_TASK_VERIFIERS = {
    "chains": "verbatim",
    "gsm8k-expressions": "verbatim",
    "ladder": "number_or_exact",
}


class Scores(NamedTuple):
    """Rewards of P prompts' G completions each.

    Attributes:
        rewards: [P, G] float32, the weighted sum; NaN where missing.
        errors: The reason for each missing reward.
        solved: [P, G] bool, the first reward is 1 or more before its weight.
        parts: Name of each reward -> its values [P, G], where there are several.
        failed: [P, G] int, the sample's checks that hung or whose worker died; each
            scores 0.
    """

    rewards: np.ndarray
    errors: list[str]
    solved: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray

    @property
    def failures(self) -> int:
        """Checks of all samples that hung or whose worker died."""
        return int(self.failed.sum())


def score(
    reward: Callable[[Example, str], float] | Sequence[Reward],
    examples: Sequence[Example],
    completions: Sequence[Sequence[str]],
    *,
    tokens: np.ndarray | None = None,
    pool: VerifierPool | None = None,
    environment: Sequence[str] | None = None,
) -> Scores:
    """Rewards of P examples' G completions each.

    A callable runs in this process; `Reward`s run in `pool`, or in a pool made for this
    call. A reward function that raises, or whose value is not a number that is finite
    in float32, leaves that sample's reward missing (NaN): it is left out of the update.
    A check that hangs or kills its worker scores 0 and is counted.

    Args:
        reward: A function, or rewards by name that are added up.
        examples: [P].
        completions: [P][G] texts, without EOS.
        tokens: [P, G] int, lengths of the completions, for the reward "length".
        pool: Workers that can compute the rewards.
        environment: Environment variables, by name, that the workers of a pool made for
            this call get; None: all of this process's, as for a function called here.
            The workers of a run get those that `scoring.environment` names.
    """
    if callable(reward):
        return _score_in_process(reward, examples, completions)
    if pool is None:
        with VerifierPool(reward, environment=environment) as pool:
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
    return _weighted_sum(reward, outcomes, shape)


def _weighted_sum(
    rewards: Sequence[Reward], outcomes: Sequence[Outcome], shape: tuple[int, int]
) -> Scores:
    """Scores [P, G] of outcomes that are listed by reward, prompt and sample."""
    exact = np.array([outcome.value for outcome in outcomes], float)
    exact = exact.reshape(len(rewards), *shape)
    weights = np.array([reward.weight for reward in rewards])
    with np.errstate(over="ignore"):
        values = exact.astype(np.float32)
        # In float64: sums of other parts that are equal (.1 + .2, .3) stay equal.
        total = np.einsum("r,rpg->pg", weights, exact).astype(np.float32)
    total[~np.isfinite(total)] = np.nan
    names = [reward_text(reward) for reward in rewards]

    def error(sample: int) -> str:
        """That of its first missing reward, by name where there are several."""
        for name, outcome in zip(names, outcomes[sample :: total.size], strict=True):
            if outcome.error:
                return outcome.error if len(names) == 1 else f"{name}: {outcome.error}"
        return "overflow"

    errors = [error(i) for i in np.flatnonzero(np.isnan(total)).tolist()]
    return Scores(
        rewards=total,
        errors=errors,
        solved=values[0] >= 1,
        parts=dict(zip(names, values, strict=True)) if len(rewards) > 1 else {},
        failed=np.reshape([o.failed for o in outcomes], values.shape).sum(0),
    )


def _score_in_process(
    reward: Callable[[Example, str], float],
    examples: Sequence[Example],
    completions: Sequence[Sequence[str]],
) -> Scores:
    rewards = np.full((len(completions), len(completions[0])), np.nan, np.float32)
    errors = []
    for p, (example, group) in enumerate(zip(examples, completions, strict=True)):
        for g, completion in enumerate(group):
            try:
                with np.errstate(over="ignore"):
                    value = np.float32(reward_number(reward(example, completion)))
            except (Exception, SystemExit) as error:  # a user's code can raise any
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if np.isfinite(value):
                rewards[p, g] = value
            else:
                errors.append(f"the reward is {value}")
    failed = np.zeros(rewards.shape, int)
    return Scores(rewards, errors, solved=rewards >= 1, parts={}, failed=failed)


@needs_the_whole_install("gj.verify")
def verify(task: str, gold: str | float, completion: str) -> float:
    """The verdict that training uses on a completion, isolated and time-limited.

    Args:
        task: A task or verifier by name: "gsm8k", "math", "countdown", "chains", ...
        gold: The gold answer, as `Example.answer` has it, or a number.
        completion: The model's text, without EOS.

    Returns:
        1 or 0; 0 also where the check took longer than 3 seconds or died.

    Raises:
        ConfigError: an unknown task, or a gold that is neither text nor a number, or a
            completion that is no text.
    """
    if not isinstance(completion, str):
        raise ConfigError(f"completion must be text, got {completion!r}.")
    names = {name: name for name in VERIFIERS if name != "length"} | _TASK_VERIFIERS
    if task not in names:
        raise unknown_name("task to verify", task, names)
    answer = spelled(gold)
    if answer is None:
        raise ConfigError(f"gold must be text or a finite number, got {gold!r}.")
    check = Check(Reward(name=names[task]), Example("", answer), completion)
    [outcome] = _shared_pool(os.getpid()).run([check])
    return outcome.value


@functools.cache
def _shared_pool(pid: int) -> VerifierPool:
    del pid  # a forked child must not read its parent's pipes
    if importlib.util.find_spec("math_verify") is None:  # else a worker would say so
        raise ModuleNotFoundError("no math_verify", name="math_verify")
    return VerifierPool([Reward(name="math")], workers=1)
