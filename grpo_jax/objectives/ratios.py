"""Ratio axis: the log weight that a term sees, log policy - log behaviour policy.

The only axis that mixes tokens. At the token levels a term is a token; at the sequence
levels (`SEQUENCE_RATIOS`) the completion is one action and has one term.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.errors import check_choice

# How `Objective.formula` writes r.
RATIOS = {
    "none": "pi / sg pi",
    "token": "pi / pi_old",
    "standardised": "exp z, z = (d - mean_t d) / max(std_t d, 1), d = log pi / pi_old",
    "sequence_mean_token": "sg(prod_t pi / pi_old)^(1/|o|) pi / sg pi",
    "sequence_mean": "(prod_t pi / pi_old)^(1/|o|)",
    "sequence_sum": "prod_t pi / pi_old",
    "clipped_geometric": "exp mean_t d, d = log pi / pi_old",
}
SEQUENCE_RATIOS = ("sequence_mean", "sequence_sum", "clipped_geometric")


class Level(NamedTuple):
    """What a surrogate sees: [P, G, T] at a token level, [P, G, 1] at a sequence's."""

    z: jax.Array  # log-ratio
    logprobs: jax.Array  # of the action: a token's, or the completion's sum (or mean)
    behaviour: jax.Array  # the same of the behaviour policy; constant
    clipped: jax.Array  # [P, G, T] bool: this axis itself left the token no gradient


def ratio_level(
    kind: str,
    logprobs: jax.Array,
    behaviour: jax.Array,
    live: jax.Array,
    advantages: jax.Array,
    clip: tuple[float | None, float],
) -> Level:
    """The log-ratio of every term.

    Args:
        kind: "none": 0 in value, with the gradient of logprobs. "token".
            "sequence_sum": of the whole completion (TIC-GRPO, RLOO in TRL).
            "sequence_mean": its |o|-th root (GSPO). "sequence_mean_token": GSPO's
            value with each token's own gradient. "clipped_geometric": the mean of
            token log-ratios, each cut at `high` where A >= 0 and at -`low` where A < 0
            (GMPO; the edges are in log space). "standardised": centred over the
            completion's tokens and shrunk to unit spread where its spread exceeds 1;
            mean and spread are constants (what carries over of GRPO-Guard).
        logprobs, behaviour: [P, G, T], finite wherever `live`; behaviour is constant.
        live: [P, G, T] bool.
        advantages: [P, G, 1] or [P, G, T]; only their sign is used.
        clip: (low, high) of "clipped_geometric".
    """
    check_choice("ratio", kind, RATIOS)
    # Padding may hold anything, so it is cut off before it meets exp: 0 * inf is NaN.
    logprobs = jnp.where(live, logprobs, 0.0)
    behaviour = jnp.where(live, jax.lax.stop_gradient(behaviour), 0.0)
    untouched = jnp.zeros_like(live)
    gradient_only = logprobs - jax.lax.stop_gradient(logprobs)
    if kind == "none":
        return Level(gradient_only, logprobs, behaviour, untouched)
    d = logprobs - behaviour
    if kind == "token":
        return Level(d, logprobs, behaviour, untouched)
    lengths = jnp.maximum(live.sum(-1, keepdims=True), 1).astype(d.dtype)

    def mean(x):
        return x.sum(-1, keepdims=True) / lengths

    if kind == "standardised":
        centre = mean(d)
        spread = jnp.sqrt(mean(jnp.where(live, d - centre, 0.0) ** 2))
        centre, spread = jax.lax.stop_gradient((centre, jnp.maximum(spread, 1)))
        z = jnp.where(live, (d - centre) / spread, 0.0)
        return Level(z, logprobs, behaviour, untouched)
    if kind == "sequence_mean_token":
        z = jax.lax.stop_gradient(mean(d)) + gradient_only
        return Level(z, logprobs, behaviour, untouched)
    if kind == "sequence_sum":
        total = (x.sum(-1, keepdims=True) for x in (d, logprobs, behaviour))
        return Level(*total, untouched)
    if kind == "clipped_geometric":
        low, high = clip
        below = jnp.zeros_like(live) if low is None else d < -(low or 0.0)
        clipped = jnp.where(advantages >= 0, d > high, below) & live
        edge = jnp.where(advantages >= 0, high, -(low or 0.0))
        z = mean(jnp.where(clipped, edge, d))
        return Level(z, mean(logprobs), mean(behaviour), clipped)
    return Level(mean(d), mean(logprobs), mean(behaviour), untouched)
