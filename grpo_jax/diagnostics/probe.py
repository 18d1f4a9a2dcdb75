"""Gradient and curvature of one prompt from a group of samples.

A direction estimated from some samples must not be measured on them: the curvature
would see its own noise. So a group is split in two halves; the gradient of each half is
the direction along which the other half is measured, and the two results are averaged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.diagnostics.curvature import (
    directional_derivatives,
    prompt_curvature,
    prompt_slope,
)
from grpo_jax.diagnostics.geometry import part_weights

LogProbFn = Callable[[Any, Any], jax.Array]  # (params, samples) -> [samples], in nats


class Probe(NamedTuple):
    """Gradients of one prompt in H parts, and figures along unit directions u.

    u is the gradient estimate of one half of the group; figures are measured on the
    other half and averaged over both ways. If one half is tied, the estimate uses the
    other half's direction only; NaN if both are. Each is unbiased given its direction,
    so weight by `halves` (0, 1, 2) when averaging over prompts or measurements.
    """

    vectors: jax.Array  # [H, K] gradients of the parts, as `hash_fn` returns them
    curvature: jax.Array  # scalar u' H u, unbiased given u; reward / parameter^2
    spread: jax.Array  # scalar max - min of (d2/dt2 p(y)) / p(y) along u, p(y) the
    # likelihood of a sequence y, over the samples and the answer. For 0/1 rewards
    # |curvature| <= sigma^2 * the spread over all completions
    slope: jax.Array  # scalar grad J . u, unbiased given u; reward / parameter
    exact_curvature: jax.Array  # scalar, along the same u, from the one right answer
    exact_slope: jax.Array  # scalar
    halves: jax.Array  # scalar 0, 1 or 2: directions that the figures average over
    exact_vector: jax.Array  # [K] gradient of the exact pass rate, hashed like vectors


def num_parts(group_size: int) -> int:
    """Parts of a group of this size: 4 if each has at least four samples, else 2.

    Raises:
        ValueError: fewer than four samples, too few for two parts with a baseline each.
    """
    if group_size < 4:
        raise ValueError(
            f"group_size must be at least 4 to be split, got {group_size}."
        )
    return 4 if group_size >= 16 else 2


def probe_prompt(
    log_prob_fn: LogProbFn,
    params: Any,
    samples: Any,
    rewards: jax.Array,
    hash_fn: Callable[[Any], jax.Array],
    answer: Any = None,
) -> Probe:
    """Estimates one prompt's gradient and curvature from a group of samples.

    Two gradients are in memory at once (three with an answer).

    Args:
        log_prob_fn: (params, samples) -> [n] sequence log-probs of n samples, in nats.
        params: Pytree of float arrays.
        samples: Pytree of arrays [G, ...]; those beyond a multiple of `num_parts` are
            left out.
        rewards: [G] float, NaN where missing.
        hash_fn: gradient -> [K]; `gradient_hash` with one key and width.
        answer: Like samples, [1, ...]: the only completion with reward 1 (the others
            have 0); None where there is no such one. The exact figures need it.

    Raises:
        ValueError: fewer than four samples.
    """
    parts = num_parts(len(rewards))
    size = len(rewards) // parts
    half = parts // 2

    def split(x: jax.Array) -> jax.Array:  # [2, H / 2, size, ...]
        return x[: parts * size].reshape(2, half, size, *x.shape[1:])

    weights = part_weights(rewards[None], parts)[0].reshape(2, half, size)
    samples, rewards = jax.tree.map(split, samples), split(rewards)

    def one_half(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, list]:
        this = jax.tree.map(lambda x: x[i], samples)
        other = jax.tree.map(lambda x: x[1 - i].reshape(-1, *x.shape[3:]), samples)
        other_rewards = rewards[1 - i].reshape(1, -1)
        this_weights = weights[i]
        if answer is not None:
            other = jax.tree.map(lambda *x: jnp.concatenate(x), other, answer)
            this, this_weights = _with_answer(this, this_weights, answer)
        gradients = _part_gradients(log_prob_fn, params, this, this_weights)
        vectors = jax.lax.map(hash_fn, gradients)  # [H / 2, K], and the answer's
        direction, length = _unit_mean(gradients, half)
        # A tied half measures 0, correctly; one without two rewards measures nothing.
        usable = (length > 0) & (jnp.isfinite(other_rewards).sum() >= 2)
        derivatives = directional_derivatives(
            lambda params: log_prob_fn(params, other), params, direction
        )
        figures = _figures(derivatives, other_rewards, with_answer=answer is not None)
        figures = [jnp.where(usable, x, jnp.nan) for x in figures]
        exact_vector = jnp.full(vectors.shape[1], jnp.nan)
        if answer is not None:
            likelihood = jnp.exp(derivatives[0][other_rewards.size])
            exact_vector = likelihood * vectors[half]
        return vectors[:half], exact_vector, usable, figures

    vectors, exact_vector, usable, figures = jax.lax.map(one_half, jnp.arange(2))
    curvature, spread, slope, exact_curvature, exact_slope = (
        jnp.nanmean(x) for x in figures
    )
    return Probe(
        vectors.reshape(parts, -1),
        curvature,
        spread,
        slope,
        exact_curvature,
        exact_slope,
        usable.sum(),
        exact_vector[0],
    )


def _with_answer(samples: Any, weights: jax.Array, answer: Any) -> tuple[Any, Any]:
    """Samples [h, n, ...] and weights [h, n] with the answer as one more part.

    The part is n copies of the answer, of which one has weight 1 and the others 0.
    """
    n = weights.shape[1]
    alone = jnp.zeros((1, n), weights.dtype).at[0, 0].set(1)
    samples = jax.tree.map(
        lambda x, y: jnp.concatenate([x, jnp.repeat(y, n, 0)[None]]), samples, answer
    )
    return samples, jnp.concatenate([weights, alone])


def _part_gradients(
    log_prob_fn: LogProbFn, params: Any, samples: Any, weights: jax.Array
) -> Any:
    """Gradients [h, *param_shape] of sum weight * log-prob over each of h parts."""

    def gradient(part: tuple[Any, jax.Array]) -> Any:
        samples, weights = part
        return jax.grad(lambda x: (weights * log_prob_fn(x, samples)).sum())(params)

    return jax.lax.map(gradient, (samples, weights))


def _unit_mean(gradients: Any, count: int) -> tuple[Any, jax.Array]:
    """Mean of the first `count` gradients, scaled to length 1, and its length.

    The length is a scalar; of length 0 the mean is returned as it is.
    """
    mean = jax.tree.map(lambda x: x[:count].mean(0), gradients)
    length = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(mean)))
    scale = 1 / jnp.where(length > 0, length, 1.0)
    return jax.tree.map(lambda x: x * scale, mean), length


def _figures(
    derivatives: tuple[jax.Array, jax.Array, jax.Array],
    rewards: jax.Array,
    *,
    with_answer: bool,
) -> list[jax.Array]:
    """Curvature, spread, slope, exact curvature and exact slope, each a scalar.

    Args:
        derivatives: Log-probs of n samples, and of the answer behind them, with their
            first and second derivatives along the direction; each [n] or [n + 1].
        rewards: [1, n] of the samples.
        with_answer: Whether the last entry is the answer's.
    """
    value, first, second = derivatives
    n = rewards.size
    relative = first**2 + second  # (d2/dt2 p) / p, p the likelihood of a sequence
    exact = jnp.full(2, jnp.nan)
    if with_answer:
        exact = jnp.exp(value[n]) * jnp.stack([relative[n], first[n]])
    return [
        prompt_curvature(rewards, first[None, :n], second[None, :n])[0],
        jnp.ptp(relative),
        prompt_slope(rewards, first[None, :n])[0],
        *exact,
    ]
