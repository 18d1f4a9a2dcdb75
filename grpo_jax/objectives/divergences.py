"""Divergence axis: per-token estimators of KL(policy || reference), in nats.

Schulman's k1 = -log rho, k2 = (log rho)^2 / 2 and k3 = rho - 1 - log rho, with
rho = reference / policy. On policy k1 and k3 have the mean KL(policy || reference) of
the next token, k3 without ever being negative; k2 has another.

As a term of the loss each is differentiated with the prefix as it was sampled. In
expectation on policy k1's gradient is 0, so it belongs in the reward; k2's is
sum_t grad KL(policy || reference) and k3's sum_t grad KL(reference || policy), both of
token t given its prefix. The KL of whole completions has another gradient: a token also
changes which prefixes come after it,

    grad KL = E sum_t grad log pi_t (k1_t + k1_(t+1) + ... + k1_T).

k1 in the reward has exactly that in expectation (on policy, tokens summed, no clip), up
to 1 - 1/G with the group's mean as baseline. k2 and k3 in the reward have the gradient
of their mean less that of their value.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.errors import check_choice

_MAX_LOG_RATIO = 20.0


class Divergence(NamedTuple):
    """A row of `DIVERGENCES`.

    Attributes:
        estimate: log rho -> the estimate, elementwise.
        in_loss: Its gradient constrains the policy, so it may be a term of the loss.
    """

    estimate: Callable[[jax.Array], jax.Array]
    in_loss: bool = True


DIVERGENCES = {
    "k1": Divergence(lambda log_rho: -log_rho, in_loss=False),
    "k2": Divergence(lambda log_rho: log_rho**2 / 2),
    "k3": Divergence(lambda log_rho: jnp.expm1(log_rho) - log_rho),
}


def divergence(kind: str, logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """[P, G, T] nats of log-probs [P, G, T] and those of the reference policy.

    The log-ratio is clamped to +-20, so exp never overflows, and beyond the clamp the
    gradient is 0 rather than 0 * inf.
    """
    check_choice("divergence", kind, DIVERGENCES)
    log_rho = jnp.clip(reference - logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return DIVERGENCES[kind].estimate(log_rho)
