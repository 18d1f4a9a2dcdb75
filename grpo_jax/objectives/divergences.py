"""Divergence axis: per-token estimators of KL(policy || reference), in nats.

Schulman's k1 = -log rho, k2 = (log rho)^2 / 2 and k3 = rho - 1 - log rho, with
rho = reference / policy. k1 is unbiased in value but its gradient in a loss has mean
zero on policy, so it belongs in the reward; k2's gradient is the exact one in
expectation on policy; k3 is unbiased in value and non-negative.
"""

import jax
import jax.numpy as jnp

from grpo_jax.errors import check_choice

DIVERGENCES = ("k1", "k2", "k3")
_MAX_LOG_RATIO = 20.0


def divergence(kind: str, logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """[P, G, T]. The log-ratio is clamped to +-20, so exp never overflows, and beyond
    the clamp the gradient is 0 rather than 0 * inf."""
    check_choice("divergence", kind, DIVERGENCES)
    log_rho = jnp.clip(reference - logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if kind == "k1":
        return -log_rho
    if kind == "k2":
        return log_rho**2 / 2
    return jnp.expm1(log_rho) - log_rho
