"""What other prompt weights would have done with the same rollouts.

Per-prompt gradients are the same under every weighting; only their sum turns. Compared
are the sums (angles and lengths), the updates that an optimizer makes of them, and what
each update would do to every prompt: its slope and curvature along it.
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


class Counterfactual(NamedTuple):
    """K weightings in the order given, P prompts."""

    norms: jax.Array  # [K] of the gradients
    cosines: jax.Array  # [K, K] between the gradients
    update_norms: jax.Array  # [K]
    update_cosines: jax.Array  # [K, K]
    slopes: jax.Array  # [K, P] reward units per update made
    curvatures: jax.Array  # [K, P] and per its square

    def predicted_change(self, length: jax.Array | float = 1.0) -> jax.Array:
        """[K, P] change of each prompt's expected reward, to second order, after
        `length` times the update."""
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
    """Several weightings of one batch, compared.

    The slopes are measured on the rollouts that made the gradients. Between different
    prompts they are unbiased; a prompt's own share counts its sampling noise as gain,
    w_x tr Cov(g_x) / P under plain gradient steps, alike in kind for every weighting.

    Args:
        gradient_fn: weights [P] -> the loss's gradient, a pytree like params. From
            losses [P] of centred advantages: `pull_back = jax.vjp(losses, params)[1]`
            and `lambda w: pull_back(w / P)[0]`.
        log_prob_fn: params -> [P, G] log-probs of whole completions.
        params: Where all is taken. Holds 2 K pytrees of its size at once.
        rewards: [P, G], NaN where missing.
        weights: Name -> [P].
        update_fn: gradient -> the change of params that would be made of it, such as
            `lambda g: optimizer.update(g, opt_state, params)[0]`; default: minus the
            gradient.
    """

    def effect(update):
        _, first, second = directional_derivatives(log_prob_fn, params, update)
        return prompt_slope(rewards, first), prompt_curvature(rewards, first, second)

    # One after the other, each compiled once.
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


def _norms_and_cosines(trees):
    """Of K trees, stacked: (norms [K], cosines [K, K])."""
    rows = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(trees)]
    parts = [x @ x.T for x in rows]
    products = sum(parts[1:], parts[0])
    norms = jnp.sqrt(jnp.diagonal(products))
    unit = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1.0), 0.0)
    return norms, products * unit[:, None] * unit[None, :]
