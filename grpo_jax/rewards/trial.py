"""Each reward called once on an example, before a run depends on it."""

import os
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.pool import Check, VerifierPool
from grpo_jax.rewards.types import Example, Reward, reward_number
from grpo_jax.rewards.verifiers import VERIFIERS
from grpo_jax.rewards.worker import preserved_streams


def try_rewards(
    reward: Callable[[Example, str], float] | Sequence[Reward],
    example: Example,
    completion: str,
    pool: VerifierPool | None,
    warn: Callable[[str], None],
) -> None:
    """Calls each reward of the user's once; the verifiers of this package cannot raise.

    The global random streams of `random` and numpy stay as they are. A function that
    runs in this process has no time limit.

    Args:
        reward: A function, or rewards by name.
        example: One of the task's.
        completion: What a model should answer to it.
        pool: Workers that can compute the rewards; None where a function is given.
        warn: Called with a sentence where a check hangs, dies or gives no number.

    Raises:
        ConfigError: a reward raises.
    """
    if callable(reward):
        if reward not in VERIFIERS.values():
            _try_here(reward, example, completion)
        return
    assert pool is not None  # rewards by name are computed in workers
    checks = [Check(r, example, completion) for r in reward if ":" in r.name]
    for check, outcome in zip(checks, pool.run(checks, trial=True), strict=True):
        name = check.reward.name
        if outcome.raised:
            _refuse(name, outcome.error or "", example, completion)
        if outcome.failed:
            warn(
                f"reward {name}: a first call with an example's own answer hung or "
                f"died (the limit is {pool.timeout:g} s, scoring.timeout_s); such "
                "checks score 0."
            )
        elif outcome.error:
            warn(
                f"reward {name}: a first call with an example's own answer gave no "
                f"reward ({outcome.error}); such samples are left out."
            )


def _try_here(
    reward: Callable[[Example, str], float], example: Example, completion: str
) -> None:
    """Calls a function in this process."""
    try:
        with preserved_streams():
            reward_number(reward(example, completion))
    except (Exception, SystemExit) as error:  # a user's code can raise any
        name = getattr(reward, "__qualname__", repr(reward))
        _refuse(name, f"{type(error).__name__}: {error}", example, completion)


def _refuse(name: str, error: str, example: Example, completion: str) -> NoReturn:
    unset = [n for n in os.environ if re.search(rf"\b{re.escape(n)}\b", error)]
    hint = ""
    if unset and ":" in name:
        names = " ".join(unset)
        hint = (
            f" Workers get only the environment variables that they are given: "
            f"--scoring.environment {names}."
        )
    raise ConfigError(
        f"reward {name} fails on the first example: {error[:300].rstrip('.')}. It is "
        f"called as {name.rpartition(':')[2]}(example, completion), here with the "
        f"prompt {_short(example.prompt)} and the completion {_short(completion)}, and "
        f"must return a number.{hint}"
    )


def _short(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
