"""Baseline axis: what is taken off each reward of a group."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.advantages import (
    centred_advantages,
    group_statistics,
    leave_one_out_advantages,
)

if TYPE_CHECKING:  # objective.py imports this module
    from grpo_jax.objectives.objective import Objective


class Baseline(NamedTuple):
    """A row of `BASELINES`.

    Attributes:
        advantages: (objective, rewards [P, G]) -> [P, G] reward minus baseline,
            constant, 0 where the reward is missing.
        text: What `Objective.formula` writes after R.
        uses: The objective's numbers that it reads.
    """

    advantages: Callable[["Objective", jax.Array], jax.Array]
    text: str
    uses: tuple[str, ...] = ()


def plain_rewards(rewards: jax.Array) -> jax.Array:
    """[P, G] the rewards themselves, 0 where missing."""
    present = group_statistics(rewards).present
    return jax.lax.stop_gradient(jnp.where(present, rewards, 0))


BASELINES = {
    "none": Baseline(lambda o, r: plain_rewards(r), ""),
    "mean": Baseline(lambda o, r: centred_advantages(r), " - mean"),
    "leave_one_out": Baseline(
        lambda o, r: leave_one_out_advantages(r), " - mean of others"
    ),
}
