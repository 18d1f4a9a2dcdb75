"""What an update reads and changes: the train state, the batch, past rollouts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.objectives.loss import ShapedRewards, present_mask, shaped_rewards
from grpo_jax.objectives.objective import Objective
from grpo_jax.preconditioner import PromptWeights
from grpo_jax.rollouts.types import Rollouts


class TrainState(NamedTuple):
    """Everything that an update changes, and everything that a checkpoint saves."""

    params: Any  # float32
    opt_state: Any
    weights_state: Any  # of the prompt weights
    history: Any  # `History`; () where an update sees the newest rollouts alone
    updates: jax.Array  # int32, optimizer updates applied
    skipped: jax.Array  # int32, updates skipped for a non-finite gradient
    skipped_in_a_row: jax.Array  # int32, of these, since the last applied one


class Batch(NamedTuple):
    """Scored and weighed rollouts, with what the objective needs beside them."""

    rollouts: Rollouts
    shaped_rewards: jax.Array  # [P, G], what the prompt weights multiply
    weights: jax.Array  # [P], of the prompts
    old_logprobs: jax.Array | None = (
        None  # [P, G, T] before the first of several updates
    )
    reference_logprobs: jax.Array | None = None  # [P, G, T] of the starting policy
    token_weights: jax.Array | None = None  # [P, G, T]
    added_rewards: jax.Array | None = None  # [P, G], not multiplied by the weights


class History(NamedTuple):
    """Rollouts of past iterates, newest first, with the weights they had."""

    rollouts: Rollouts  # leaves [n, P, ...]
    weights: jax.Array  # [n, P]
    valid: jax.Array  # [n] bool: the iterate exists


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    weights: PromptWeights,
    history: Any = (),
) -> TrainState:
    """The state before any update."""
    # Three separate arrays: a donated buffer may be given away only once.
    zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
    opt_state = optimizer.init(params)
    return TrainState(params, opt_state, weights.init(), history, *zeros)


def empty_history(objective: Objective, rollouts: Rollouts) -> Any:
    """A `History` without valid iterates; () for an objective that keeps none.

    Args:
        objective: `history` counts the iterates of an update, the newest included.
        rollouts: [P, G, T], of the shapes to come; only shapes and dtypes are read.
    """
    n = objective.history - 1
    if not n:
        return ()
    stacked = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), rollouts)
    weights = jnp.zeros((n, rollouts.prompts.shape[0]), stacked.rewards.dtype)
    return History(stacked, weights, jnp.zeros(n, bool))


def push_history(
    objective: Objective, history: History, batch: Batch
) -> tuple[History, Batch]:
    """(history with the batch in it, batch of all iterates' rollouts, newest first).

    Each sample keeps the log-probs of the policy that sampled it. Until enough iterates
    exist, the newest one fills the empty places.
    """
    newest = (batch.rollouts, batch.weights)

    def join(old: jax.Array, new: jax.Array) -> jax.Array:
        valid = history.valid.reshape(-1, *[1] * new.ndim)
        filled = jnp.where(valid, old, new[None])
        return jnp.concatenate([new[None], filled]).reshape(-1, *new.shape[1:])

    def shift(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([new[None], old])[:-1]

    past = (history.rollouts, history.weights)
    rollouts, weights = jax.tree.map(join, past, newest)
    past = jax.tree.map(shift, past, newest)
    valid = shift(history.valid, jnp.asarray(True))
    history = History(past[0], past[1], valid)
    # Punishments are in the rewards that are kept, and weighed with them.
    shaped = shape_rewards(objective, rollouts, None)
    joined = Batch(
        rollouts,
        shaped.weighed,
        weights,
        old_logprobs=rollouts.behaviour_logprobs,
        added_rewards=shaped.added,
    )
    return history, joined


def shape_rewards(
    objective: Objective,
    rollouts: Rollouts,
    reference_logprobs: jax.Array | None,
    punishment: jax.Array | None = None,
) -> ShapedRewards:
    """`shaped_rewards` [P, G] of scored rollouts [P, G, T].

    Args:
        objective: Whose KL and scale.
        rollouts: [P, G, T]; their `solving` only where a rule for pass rates needs it.
        reference_logprobs: [P, G, T], needed by KL in the reward.
        punishment: [P, G] to add to the rewards.
    """
    return shaped_rewards(
        objective,
        rollouts.scored_rewards,
        rollouts.behaviour_logprobs,
        reference_logprobs,
        present_mask(rollouts.completion_mask, rollouts.scored_rewards),
        solving=rollouts.solving,
        punishment=punishment,
    )


def part_of(batch: Batch, index: jax.Array | int, parts: int) -> Batch:
    """The index-th of equal parts of a batch's prompts: leaves [P / parts, ...].

    Args:
        batch: Leaves [P, ...].
        index: Scalar, from 0.
        parts: How many there are.
    """
    size = batch.weights.shape[0] // parts
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), batch
    )
