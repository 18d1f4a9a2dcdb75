"""Surrogate axis: each token's loss, elementwise. The trust region lives only here.

Every function is positively homogeneous in the advantages, so a positive weight on a
prompt may be applied to its advantages, its loss or its gradient alike.
"""

import jax
import jax.numpy as jnp

SURROGATES = ("logp", "ppo")
_MAX_LOG_RATIO = 20.0  # exp overflows float32 at 88, its products long before


def logp(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """-A log pi: REINFORCE."""
    return -advantages * logprobs


def ppo(
    log_ratio: jax.Array, advantages: jax.Array, clip: tuple[float, float]
) -> jax.Array:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = exp log_ratio (arXiv:1707.06347)."""
    low, high = clip
    ratio = jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def ppo_clipped(
    log_ratio: jax.Array, advantages: jax.Array, clip: tuple[float, float]
) -> jax.Array:
    """True where `ppo` has no gradient: the ratio left the region in A's direction."""
    low, high = clip
    above = (log_ratio > jnp.log1p(high)) & (advantages > 0)
    return above | ((log_ratio < jnp.log1p(-low)) & (advantages < 0))
