"""The exactly solvable policy of the theory: softmax over K fixed responses.

pi(k | x) = softmax_k(features[x, k] . theta + offsets[x, k]). With rewards per response
everything is a finite sum: pass rates, gradients, Hessians, and the flows of the family
of weights w = sigma^-power (power 0 REINFORCE, 1 GRPO, 2 log-odds). For binary rewards

    grad J_x = sigma^2 Delta_x,   grad 2 asin sqrt p_x = sigma Delta_x,
    grad logit p_x = Delta_x,     Delta_x = E[x | r = 1] - E[x | r = 0],

so the family's members turn no prompt's gradient; they only scale it.

References:
    Ge et al. 2026, arXiv:2601.23135 (the setting, theorems 3.1 and 3.2). The sharp
    constants, the log-odds member and chi are derived here and tested.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.precision import float32_products


class LogLinear(NamedTuple):
    """P prompts, K responses each, D parameters."""

    features: jax.Array  # [P, K, D]
    rewards: jax.Array  # [P, K]
    offsets: jax.Array | float = 0.0  # [P, K], logits of a frozen base


class Exact(NamedTuple):
    """The policy's expectations at one theta."""

    probabilities: jax.Array  # [P, K]
    pass_rates: jax.Array  # [P], expected rewards
    sigma: jax.Array  # [P], std of the reward
    gradients: jax.Array  # [P, D], of each expected reward


@float32_products()
def exact(policy: LogLinear, theta: jax.Array) -> Exact:
    """Exact pass rates and gradients at theta [D]."""
    logits = policy.features @ theta + policy.offsets
    probabilities = jax.nn.softmax(logits, axis=-1)
    mean = (probabilities * policy.rewards).sum(-1)
    centred = policy.rewards - mean[:, None]
    variance = (probabilities * centred**2).sum(-1)
    gradients = jnp.einsum("pk,pk,pkd->pd", probabilities, centred, policy.features)
    return Exact(probabilities, mean, jnp.sqrt(variance), gradients)


@float32_products()
def hessians(policy: LogLinear, theta: jax.Array) -> jax.Array:
    """[P, D, D] the Hessian of each J_x at theta [D]: E[(r - p) s s^T].

    s are the features less their mean.
    """
    now = exact(policy, theta)
    mean = jnp.einsum("pk,pkd->pd", now.probabilities, policy.features)
    scores = policy.features - mean[:, None]
    centred = policy.rewards - now.pass_rates[:, None]
    return jnp.einsum("pk,pkd,pke->pde", now.probabilities * centred, scores, scores)


@float32_products()
def deltas(policy: LogLinear, theta: jax.Array) -> jax.Array:
    """[P, D] E[x | right] - E[x | wrong] at theta [D], for binary rewards."""
    p = exact(policy, theta).probabilities

    def conditional(weights: jax.Array) -> jax.Array:
        weights = p * weights
        total = weights.sum(-1, keepdims=True)
        return jnp.einsum("pk,pkd->pd", weights / total, policy.features)

    return conditional(policy.rewards) - conditional(1 - policy.rewards)


def diameters(policy: LogLinear) -> jax.Array:
    """[P] largest distance between the features of two responses."""
    gaps = policy.features[:, :, None] - policy.features[:, None]
    return jnp.sqrt((gaps**2).sum(-1)).max((1, 2))


# ---- bounds, with sharp constants


def hessian_bound(p: jax.Array, diameter: jax.Array) -> jax.Array:
    """[P] largest ||H_x||_2 at pass rate p [P], binary rewards: kappa sigma^2 D^2 / 4.

    D is the diameter [P] of the features.
    """
    q = jnp.minimum(p, 1 - p)
    near_half = 1 / (2 * jnp.maximum(q, 0.25))
    kappa = jnp.where(q <= 0.25, 4 * (1 - 2 * q), near_half)
    return kappa / 4 * p * (1 - p) * diameter**2


def smoothness(power: int, diameter: jax.Array) -> jax.Array:
    """[P] smoothness constant of what power 0, 1 or 2 ascends (`ascended`).

    diameter: [P], of the features.
    """
    constant = {0: 1 / (6 * math.sqrt(3)), 1: math.sqrt(3) / 12, 2: 1 / 4}[power]
    return constant * diameter**2


def safe_step(power: int, diameter: jax.Array) -> jax.Array:
    """[P] 4 * 2^(2 - power) / D^2, D the diameter [P] of the features.

    With this step theta += step * sigma^(2 - power) * Delta gains at least
    `log_odds_gain`. The three powers coincide at p = 1/2.
    """
    return 4 * 2 ** (2 - power) / diameter**2


def log_odds_gain(
    p: jax.Array, power: int, delta_norm: jax.Array, diameter: jax.Array
) -> jax.Array:
    """[P] least gain of logit p by a `safe_step`: (2 |Delta|^2 / D^2) s (2 - s).

    s = (2 sigma)^(2 - power); p, delta_norm and diameter are [P].
    """
    s = (2 * jnp.sqrt(p * (1 - p))) ** (2 - power)
    return 2 * delta_norm**2 / diameter**2 * s * (2 - s)


def ascended(power: int, p: jax.Array) -> jax.Array:
    """[...] the function of pass rates p [...] that weights sigma^-power ascend."""
    return {
        0: lambda: p,
        1: lambda: 2 * jnp.arcsin(jnp.sqrt(p)),
        2: lambda: jnp.log(p) - jnp.log1p(-p),
    }[power]()


def flow_time(power: int, start: float, end: float) -> float:
    """Time of the gradient flow from pass rate `start` to `end`, at |Delta| = 1."""

    def antiderivative(p: float) -> float:
        odds = math.log(p / (1 - p))
        if power == 2:
            return odds
        if power == 1:
            return 2 * (2 * p - 1) / math.sqrt(p * (1 - p))
        return (2 * p - 1) / (p * (1 - p)) + 2 * odds

    return antiderivative(end) - antiderivative(start)


@float32_products()
def interference(policy: LogLinear) -> jax.Array:
    """chi in [1, P], a scalar: by how much prompts' curvatures can add up.

    It is the largest eigenvalue of sum_x P_x, P_x the projector onto the span of prompt
    x's centred features.
    """
    centred = policy.features - policy.features.mean(1, keepdims=True)
    _, values, rows = jnp.linalg.svd(centred, full_matrices=False)
    kept = values > 1e-9 * values.max(1, keepdims=True)
    rows = jnp.where(kept[..., None], rows, 0)
    return jnp.linalg.eigvalsh(jnp.einsum("pkd,pke->de", rows, rows))[-1]


@float32_products()
def ascend(
    policy: LogLinear, theta: jax.Array, power: float, step: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """(theta [D] after, pass rates [steps + 1, P]) of ascent by exact gradients.

    theta += step * sum_x sigma_x^-power grad J_x.
    """

    def one(theta: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        now = exact(policy, theta)
        sigma = jnp.maximum(now.sigma, 1e-30)
        update = (sigma**-power) @ now.gradients
        return theta + step * update, now.pass_rates

    theta, rates = jax.lax.scan(one, theta, length=steps)
    return theta, jnp.concatenate([rates, exact(policy, theta).pass_rates[None]])
