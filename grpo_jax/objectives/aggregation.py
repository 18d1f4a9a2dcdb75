"""Aggregation axis: a constant weight per token, [P, G, T].

The weights of one prompt's tokens turn token losses into that prompt's loss; the mean
over all P prompts is the objective's loss. They are computed from the whole batch
before any micro-batching, so every split of the batch gives the same gradient.
"""

import jax
import jax.numpy as jnp

from grpo_jax.errors import check_choice

# How `Objective.formula` writes them.
AGGREGATIONS = {
    "sequence_mean_token_mean": "mean_i mean_t",
    "sequence_mean_token_sum": "mean_i sum_t",
    "group_token_mean": "mean_(i,t)",
    "batch_token_mean": "mean_(batch's i,t)",
    "constant": "mean_i sum_t/T",
    "first_rest": "({first:g} mean_(batch's i) at t=0, + mean_(batch's i,t) at t>0)",
    "first_rest_sequence_mean": "mean_i ({first:g} at t=0, + mean_t at t>0)",
}


def token_coefficients(
    kind: str,
    completion_mask: jax.Array,
    max_length: int | None = None,
    first_weight: float = 1.0,
) -> jax.Array:
    """Weights of tokens [P, G, T] within their prompt's loss.

    Args:
        kind: With n the prompt's non-empty completions: "sequence_mean_token_mean"
            1 / (n |o_i|), "sequence_mean_token_sum" 1 / n, "constant"
            1 / (n max_length); "group_token_mean" 1 / the group's tokens;
            "batch_token_mean" P / the batch's tokens, so that the mean over prompts is
            the mean over tokens. Thinkless' two: first_weight on each completion's
            first token, and the rest by mean over the batch's other tokens
            ("first_rest", its code) or completion by completion
            ("first_rest_sequence_mean", its paper).
        completion_mask: [P, G, T], all 0 in a completion that is missing.
        max_length: Tokens the "constant" kind divides by; default T.
        first_weight: Of the first token, for the last two.
    """
    check_choice("aggregation", kind, AGGREGATIONS)
    mask = completion_mask.astype(float)
    prompts = mask.shape[0]
    lengths = mask.sum(-1, keepdims=True)
    count = (lengths > 0).sum(1, keepdims=True)  # [P, 1, 1]
    share = mask / jnp.maximum(count, 1)

    def mean_over(part, axes):
        return part / jnp.maximum(part.sum(axes, keepdims=True), 1)

    if kind == "sequence_mean_token_sum":
        return share
    if kind == "sequence_mean_token_mean":
        return share / jnp.maximum(lengths, 1)
    if kind == "constant":
        return share / (mask.shape[-1] if max_length is None else max_length)
    if kind == "group_token_mean":
        return mean_over(mask, (1, 2))
    if kind == "batch_token_mean":
        return prompts * mean_over(mask, (0, 1, 2))
    first = mask * (jnp.cumsum(mask, -1) == 1)
    rest = mask - first
    if kind == "first_rest":
        everywhere = (0, 1, 2)
        first, rest = mean_over(first, everywhere), mean_over(rest, everywhere)
        return prompts * (first_weight * first + rest)
    rest = rest / jnp.maximum(lengths - 1, 1)
    return (first_weight * first + rest) / jnp.maximum(count, 1)
