"""Aggregation axis: a constant weight per token, [P, G, T].

The weights of one prompt's tokens turn token losses into that prompt's loss; the mean
over all P prompts is the objective's loss. They are computed from the whole batch
before any micro-batching, so every split of the batch gives the same gradient.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.errors import check_choice

if TYPE_CHECKING:  # objective.py imports this module
    from grpo_jax.objectives.objective import Objective


def sequence_mean_token_sum(mask: jax.Array) -> jax.Array:
    """[P, G, T] 1 / n, n the prompt's completions that are not empty."""
    count = (mask.sum(-1, keepdims=True) > 0).sum(1, keepdims=True)  # [P, 1, 1]
    return mask / jnp.maximum(count, 1)


def sequence_mean_token_mean(mask: jax.Array) -> jax.Array:
    """[P, G, T] 1 / (n |o_i|): the mean over completions of means over tokens."""
    return sequence_mean_token_sum(mask) / jnp.maximum(_lengths(mask), 1)


def constant(mask: jax.Array, max_length: int) -> jax.Array:
    """[P, G, T] 1 / (n max_length), whatever the completion's length (Dr. GRPO)."""
    return sequence_mean_token_sum(mask) / max_length


def group_token_mean(mask: jax.Array) -> jax.Array:
    """[P, G, T] 1 / the group's tokens (DAPO)."""
    return _mean_over(mask, (1, 2))


def batch_token_mean(mask: jax.Array) -> jax.Array:
    """[P, G, T] P / the batch's tokens: the mean over prompts is that over tokens."""
    return mask.shape[0] * _mean_over(mask, (0, 1, 2))


def first_rest(mask: jax.Array, first_weight: float) -> jax.Array:
    """[P, G, T] each completion's first token weighted apart (Thinkless' code).

    First tokens and the others are two means over the batch.
    """
    first = _first_tokens(mask)
    rest = mask - first
    everywhere = (0, 1, 2)
    first, rest = _mean_over(first, everywhere), _mean_over(rest, everywhere)
    return mask.shape[0] * (first_weight * first + rest)


def first_rest_sequence_mean(mask: jax.Array, first_weight: float) -> jax.Array:
    """[P, G, T] the same completion by completion (Thinkless' paper)."""
    first = _first_tokens(mask)
    lengths = _lengths(mask)
    rest = (mask - first) / jnp.maximum(lengths - 1, 1)
    count = (lengths > 0).sum(1, keepdims=True)
    return (first_weight * first + rest) / jnp.maximum(count, 1)


def _lengths(mask: jax.Array) -> jax.Array:
    return mask.sum(-1, keepdims=True)


def _first_tokens(mask: jax.Array) -> jax.Array:
    return mask * (jnp.cumsum(mask, -1) == 1)


def _mean_over(part: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return part / jnp.maximum(part.sum(axes, keepdims=True), 1)


class Aggregation(NamedTuple):
    """A row of `AGGREGATIONS`.

    Attributes:
        coefficients: (mask [P, G, T] float, max_length, first_weight) -> [P, G, T].
        text: objective -> how `Objective.formula` writes it.
        sequence_text: The same where a completion is one term, shared equally by its
            tokens; None: `text` and 1/|o|.
        uses: The objective's numbers that it reads.
    """

    coefficients: Callable[[jax.Array, int, float], jax.Array]
    text: Callable[["Objective"], str]
    sequence_text: str | None = None
    uses: tuple[str, ...] = ()


AGGREGATIONS = {
    "sequence_mean_token_mean": Aggregation(
        lambda mask, length, first: sequence_mean_token_mean(mask),
        lambda o: "mean_i mean_t",
        "mean_i 1/|o|",
    ),
    "sequence_mean_token_sum": Aggregation(
        lambda mask, length, first: sequence_mean_token_sum(mask),
        lambda o: "mean_i sum_t",
        "mean_i",
    ),
    "group_token_mean": Aggregation(
        lambda mask, length, first: group_token_mean(mask), lambda o: "mean_(i,t)"
    ),
    "batch_token_mean": Aggregation(
        lambda mask, length, first: batch_token_mean(mask),
        lambda o: "mean_(batch's i,t)",
    ),
    "constant": Aggregation(
        lambda mask, length, first: constant(mask, length),
        lambda o: "mean_i sum_t/T",
        "1/T mean_i",
    ),
    "first_rest": Aggregation(
        lambda mask, length, first: first_rest(mask, first),
        lambda o: (
            f"({o.first_token_weight:g} mean_(batch's i) at t=0, "
            "+ mean_(batch's i,t) at t>0)"
        ),
        uses=("first_token_weight",),
    ),
    "first_rest_sequence_mean": Aggregation(
        lambda mask, length, first: first_rest_sequence_mean(mask, first),
        lambda o: f"mean_i ({o.first_token_weight:g} at t=0, + mean_t at t>0)",
        uses=("first_token_weight",),
    ),
}


def token_coefficients(
    kind: str,
    completion_mask: jax.Array,
    max_length: int | None = None,
    first_weight: float = 1.0,
) -> jax.Array:
    """Weights of tokens [P, G, T] within their prompt's loss.

    Args:
        kind: A key of `AGGREGATIONS`.
        completion_mask: [P, G, T], all 0 in a completion that is missing.
        max_length: The tokens that "constant" divides by; default T.
        first_weight: The first token's weight, in the "first_rest" kinds.
    """
    check_choice("aggregation", kind, AGGREGATIONS)
    mask = completion_mask.astype(float)
    length = mask.shape[-1] if max_length is None else max_length
    return AGGREGATIONS[kind].coefficients(mask, length, first_weight)
