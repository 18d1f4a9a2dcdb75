"""Ratio axis: the log weight each token sees, log policy - log behaviour policy."""

import jax

from grpo_jax.errors import check_choice

RATIOS = ("none", "token")


def log_ratio(kind: str, logprobs: jax.Array, behaviour: jax.Array) -> jax.Array:
    """[P, G, T]; "none": 0 in value, with the gradient of logprobs."""
    check_choice("ratio", kind, RATIOS)
    if kind == "none":
        return logprobs - jax.lax.stop_gradient(logprobs)
    return logprobs - behaviour
