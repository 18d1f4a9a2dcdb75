"""One prompt looked at: its gradient in independent parts, the curvature along it.

A direction that was estimated from some samples must not be measured on them: the
curvature would see its own noise. So a group is cut in halves; each half's gradient is
the direction along which the other half is measured, and the two are averaged. Two
gradients are kept at once (three with an answer), with what making them takes.
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

LogProbFn = Callable[[Any, Any], jax.Array]  # (params, samples) -> [samples]


class Probe(NamedTuple):
    """Along u, one half's gradient estimate, on the other half; a mean over both.

    A half without signal gives no direction: the other then stands alone, and NaN
    stands where neither does. Each half's figure is unbiased given its direction, so in
    means over prompts or looks (where it matters: groups often tied) a figure counts as
    many times as there are `halves` in it.
    """

    vectors: jax.Array  # [H, K], gradients of the parts, hashed or whole
    curvature: jax.Array  # u' H u / |u|^2, unbiased given u; reward / parameter^2
    spread: jax.Array  # (largest - smallest) second derivative of a sequence's
    # likelihood, relative to it, over the samples and the answer: binary rewards have
    # |curvature| <= sigma^2 * its value over all completions
    slope: jax.Array  # grad J . u / |u|, reward / parameter
    exact_curvature: jax.Array  # of the same directions, from the one right answer
    exact_slope: jax.Array
    halves: jax.Array  # 0, 1 or 2 behind the figures
    exact_vector: jax.Array  # [K] gradient of the exact pass rate, hashed like vectors


def num_parts(group_size: int) -> int:
    """4 where each still holds four samples, else 2.

    Raises:
        ValueError: fewer than four samples: no two parts with a baseline each.
    """
    if group_size < 4:
        raise ValueError(f"group_size must be at least 4 to be cut, got {group_size}.")
    return 4 if group_size >= 16 else 2


def probe_prompt(
    log_prob_fn: LogProbFn,
    params: Any,
    samples: Any,
    rewards: jax.Array,
    hash_fn: Callable[[Any], jax.Array],
    answer: Any = None,
) -> Probe:
    """What a group of samples tells of one prompt's gradient and curvature.

    Args:
        log_prob_fn: (params, samples) -> log-probs of whole completions, one each.
        params: Pytree of float arrays.
        samples: Pytree of arrays with a leading axis of G; those beyond a multiple of
            `num_parts` are left out.
        rewards: [G], NaN where missing.
        hash_fn: gradient -> [K]; `gradient_hash` with one key and width.
        answer: Like samples, with a leading axis of 1: the only completion with reward
            1, where there is one (the others' being 0). The exact figures need it.
    """
    parts = num_parts(len(rewards))
    size = len(rewards) // parts
    half = parts // 2

    def cut(x):
        return x[: parts * size].reshape(2, half, size, *x.shape[1:])

    weights = part_weights(rewards[None], parts)[0].reshape(2, half, size)
    samples, rewards = jax.tree.map(cut, samples), cut(rewards)
    # The answer is a part as well, of itself and copies that count nothing.
    alone = jnp.zeros((1, size), weights.dtype).at[0, 0].set(1)

    def one_half(i):
        def part(x):
            samples, weights = x
            return jax.grad(lambda params: weights @ log_prob_fn(params, samples))(
                params
            )

        mine = jax.tree.map(lambda x: x[i], samples)
        # The other half's samples, and the answer behind them.
        measured = jax.tree.map(lambda x: x[1 - i].reshape(-1, *x.shape[3:]), samples)
        other, counted = rewards[1 - i].reshape(1, -1), weights[i]
        if answer is not None:
            measured = jax.tree.map(lambda *x: jnp.concatenate(x), measured, answer)
            mine = jax.tree.map(
                lambda x, y: jnp.concatenate([x, jnp.repeat(y, size, 0)[None]]),
                mine,
                answer,
            )
            counted = jnp.concatenate([counted, alone])

        gradients = jax.lax.map(part, (mine, counted))
        vectors = jax.lax.map(hash_fn, gradients)
        direction = jax.tree.map(lambda x: x[:half].mean(0), gradients)
        length = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(direction)))
        # Tied samples measure 0, rightly; fewer than two measure nothing.
        known = (length > 0) & (jnp.isfinite(other).sum() >= 2)
        scale = 1 / jnp.where(length > 0, length, 1.0)
        direction = jax.tree.map(lambda x: x * scale, direction)
        value, first, second = directional_derivatives(
            lambda params: log_prob_fn(params, measured), params, direction
        )
        bend = first**2 + second
        n = other.size
        exact, vector = jnp.full(2, jnp.nan), jnp.full(vectors.shape[1], jnp.nan)
        if answer is not None:
            exact = jnp.exp(value[n]) * jnp.stack([bend[n], first[n]])
            vector = jnp.exp(value[n]) * vectors[half]
        figures = [
            prompt_curvature(other, first[None, :n], second[None, :n])[0],
            jnp.ptp(bend),
            prompt_slope(other, first[None, :n])[0],
            *exact,
        ]
        figures = [jnp.where(known, x, jnp.nan) for x in figures]
        return vectors[:half], vector, known, figures

    vectors, exact_vector, known, figures = jax.lax.map(one_half, jnp.arange(2))
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
        known.sum(),
        exact_vector[0],
    )
