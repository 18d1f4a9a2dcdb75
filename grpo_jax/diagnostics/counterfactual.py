"""Comparison of several prompt weights on the same rollouts.

The per-prompt gradients are the same under all of them; their weighted sum differs.
Compared are the sums (angles and norms), the updates that an optimizer makes of them,
and slope and curvature of every prompt's expected reward along each update.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.diagnostics.curvature import (
    directional_derivatives,
    prompt_curvature,
    prompt_slope,
)
from grpo_jax.precision import float32_products


class Counterfactual(NamedTuple):
    """Gradients and updates of K prompt weights, in the order given, for P prompts."""

    norms: jax.Array  # [K] of the gradients
    cosines: jax.Array  # [K, K] between the gradients; 0 where one of them is 0
    update_norms: jax.Array  # [K]
    update_cosines: jax.Array  # [K, K]
    slopes: jax.Array  # [K, P] reward units per update
    curvatures: jax.Array  # [K, P] reward units per update squared

    def predicted_change(self, length: jax.Array | float = 1.0) -> jax.Array:
        """[K, P] change of each prompt's expected reward, in reward units, to second
        order, by `length` (scalar) times the update."""
        return length * self.slopes + length**2 / 2 * self.curvatures


def counterfactual_updates(
    gradient_fn: Callable[[jax.Array], Any],
    log_prob_fn: Callable[[Any], jax.Array],
    params: Any,
    rewards: jax.Array,
    weights: Mapping[str, jax.Array],
    *,
    update_fn: Callable[[Any], Any] | None = None,
) -> Counterfactual:
    """Compares the gradients and updates of K prompt weights on one batch.

    Slopes are measured on the rollouts that the gradients are estimated from. What one
    prompt's gradient does to another prompt is unbiased; what it does to its own prompt
    counts sampling noise as gain, w_x tr Cov(g_x) / P under plain gradient steps, under
    all weights alike.

    Args:
        gradient_fn: weights [P] -> the loss's gradient, a pytree like params. From
            losses [P] of centred advantages: `pull_back = jax.vjp(losses, params)[1]`
            and `lambda w: pull_back(w / P)[0]`.
        log_prob_fn: params -> [P, G] sequence log-probs, in nats.
        params: Pytree at which gradients and derivatives are taken. 2 K pytrees of its
            size are in memory at once.
        rewards: [P, G] float, NaN where missing.
        weights: name -> [P]; K of them.
        update_fn: gradient -> the change of params that is made of it, such as
            `lambda g: optimizer.update(g, opt_state, params)[0]`; default: minus the
            gradient.
    """

    def effect(update: Any) -> tuple[jax.Array, jax.Array]:
        _, first, second = directional_derivatives(log_prob_fn, params, update)
        return prompt_slope(rewards, first), prompt_curvature(rewards, first, second)

    # lax.map: one at a time, compiled once for all K.
    gradients = jax.lax.map(gradient_fn, jnp.stack(list(weights.values())))
    if update_fn is None:
        updates = jax.tree.map(jnp.negative, gradients)
    else:
        updates = jax.lax.map(update_fn, gradients)
    slopes, curvatures = jax.lax.map(effect, updates)
    return Counterfactual(
        *_norms_and_cosines(gradients),
        *_norms_and_cosines(updates),
        slopes,
        curvatures,
    )


@float32_products()
def _norms_and_cosines(trees: Any) -> tuple[jax.Array, jax.Array]:
    """(norms [K], cosines [K, K]) of K pytrees, stacked on the leaves' first axis."""
    rows = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(trees)]
    parts = [x @ x.T for x in rows]
    products = sum(parts[1:], parts[0])
    norms = jnp.sqrt(jnp.diagonal(products))
    unit = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1.0), 0.0)
    return norms, products * unit[:, None] * unit[None, :]
