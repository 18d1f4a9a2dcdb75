"""What other prompt weights would have done with the same rollouts.

Per-prompt gradients are the same under every weighting; only their sum turns. Compared
are the sums: the angle between them, their lengths, and what a step along each would do
to every prompt, by its slope and curvature along that direction.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.curvature import (
    directional_derivatives,
    prompt_curvature,
    prompt_slope,
)


class Counterfactual(NamedTuple):
    """K weightings in the order given, P prompts.

    Slopes and curvatures are along each update's unit vector, so they compare
    directions at one step length, whatever the learning rate or the optimizer.
    """

    cosines: jax.Array  # [K, K] between the updates
    norms: jax.Array  # [K] of the gradients
    slopes: jax.Array  # [K, P] reward units per unit of parameter distance
    curvatures: jax.Array  # [K, P] and per its square

    def predicted_change(self, length: jax.Array | float) -> jax.Array:
        """[K, P] change of each prompt's expected reward, to second order."""
        return length * self.slopes + length**2 / 2 * self.curvatures


def counterfactual_updates(
    gradient_fn: Callable[[jax.Array], Any],
    log_prob_fn: Callable[[Any], jax.Array],
    params: Any,
    rewards: jax.Array,
    weights: Mapping[str, jax.Array],
) -> Counterfactual:
    """The updates -gradient_fn(w) of several weightings w, compared.

    The slopes are measured on the rollouts that made the gradients. Between different
    prompts they are unbiased; a prompt's own share counts its sampling noise as gain,
    w_x tr Cov(g_x) / P, alike in kind for every weighting.

    Args:
        gradient_fn: weights [P] -> the loss's gradient, a pytree like params. From
            losses [P] of centred advantages: `pull_back = jax.vjp(losses, params)[1]`
            and `lambda w: pull_back(w / P)[0]`.
        log_prob_fn: params -> [P, G] log-probs of whole completions.
        params: Where both are taken. Holds K gradients of its size at once.
        rewards: [P, G], NaN where missing.
        weights: Name -> [P].
    """
    gradients = [gradient_fn(w) for w in weights.values()]
    norms = jnp.stack([optax.tree.norm(g) for g in gradients])
    scales = jnp.where(norms > 0, -1 / jnp.where(norms > 0, norms, 1.0), 0.0)
    units = [optax.tree.scale(s, g) for s, g in zip(scales, gradients, strict=True)]
    cosines = jnp.stack(
        [jnp.stack([optax.tree.vdot(a, b) for b in units]) for a in units]
    )
    slopes, curvatures = [], []
    for unit in units:
        _, first, second = directional_derivatives(log_prob_fn, params, unit)
        slopes.append(prompt_slope(rewards, first))
        curvatures.append(prompt_curvature(rewards, first, second))
    return Counterfactual(cosines, norms, jnp.stack(slopes), jnp.stack(curvatures))
