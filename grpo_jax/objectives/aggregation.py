"""Aggregation axis: a constant weight per token, [P, G, T].

The weights of one prompt's tokens turn token losses into that prompt's loss; the mean
over all P prompts is the objective's loss. They are computed from the whole batch
before any micro-batching, so every split of the batch gives the same gradient.
"""

import jax
import jax.numpy as jnp

from grpo_jax.errors import check_choice

AGGREGATIONS = ("sequence_mean_token_mean", "sequence_mean_token_sum", "constant")


def token_coefficients(
    kind: str, completion_mask: jax.Array, max_length: int | None = None
) -> jax.Array:
    """Weights of tokens [P, G, T] within their prompt's loss.

    Args:
        kind: "sequence_mean_token_mean" 1 / (n |o_i|), "sequence_mean_token_sum" 1 / n,
            "constant" 1 / (n max_length); n counts the prompt's non-empty completions.
        completion_mask: [P, G, T], all 0 in a completion that is missing.
        max_length: Tokens the "constant" kind divides by; default T.
    """
    check_choice("aggregation", kind, AGGREGATIONS)
    mask = completion_mask.astype(float)
    lengths = mask.sum(-1, keepdims=True)
    count = (lengths > 0).sum(1, keepdims=True)  # [P, 1, 1]
    share = mask / jnp.maximum(count, 1)
    if kind == "sequence_mean_token_mean":
        return share / jnp.maximum(lengths, 1)
    if kind == "constant":
        return share / (mask.shape[-1] if max_length is None else max_length)
    return share
