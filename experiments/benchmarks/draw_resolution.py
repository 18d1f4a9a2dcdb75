"""Total variation between the sampler's draw of a token and the exact distribution.

    python experiments/benchmarks/draw_resolution.py

A uniform is one of 2^23 numbers, so every token's probability is a count of them. The
counts are found by bisection, in the float32 arithmetic of `inverse_cdf`: with one
uniform for a block of tokens and the token in it, and with one for each.

It prints the total variation for softmaxes of normal logits. Seconds on a CPU.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.rollouts.draw import inverse_cdf

BLOCK = 128
STEPS = 2**23  # a uniform is k / STEPS; the draw adds half a step
CASES = [(v, spread) for v in (2_048, 32_000, 151_936) for spread in (0.0, 1.0, 3.0)]


def uniforms_below(edges: np.ndarray, total: np.ndarray) -> np.ndarray:
    """How many of the STEPS uniforms u have fl((u + half a step) * total) < edges.

    Args:
        edges: [...] float32.
        total: [...] float32, of the sums that they are edges of.
    """
    low, high = np.zeros(edges.shape, np.int64), np.full(edges.shape, STEPS)
    while (low < high).any():
        middle = (low + high) // 2
        u = ((middle + 0.5) / STEPS).astype(np.float32)
        below = (u * total < edges) & (low < high)
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    return low


def token_probabilities(weights: np.ndarray, uniforms: int) -> np.ndarray:
    """[V] float64 probabilities of the draw with one or two `uniforms`.

    Args:
        weights: [V] float32, positive; V a multiple of BLOCK.
        uniforms: 1 or 2.
    """
    blocks = jnp.asarray(weights.reshape(-1, BLOCK))
    sums = blocks.sum(-1)
    cumulated, inside = (np.asarray(jnp.cumsum(x, -1)) for x in (sums, blocks))
    # The first entry above a target is counted: order does not matter.
    ends = uniforms_below(np.sort(cumulated), cumulated[-1])
    ends[-1] = STEPS
    starts = np.append(0, ends[:-1])
    if uniforms == 1:
        before = np.append(np.float32(0), cumulated[:-1])[:, None]
        edges = uniforms_below(np.sort(before + inside), cumulated[-1])
        edges[:, -1] = STEPS
        edges = np.clip(edges, starts[:, None], ends[:, None])
        counts = np.diff(edges, axis=1, prepend=starts[:, None])
        return (counts / STEPS).ravel()
    edges = uniforms_below(np.sort(inside), np.asarray(sums)[:, None])
    edges[:, -1] = STEPS
    shares = np.diff(edges, axis=1, prepend=0) / STEPS
    return (shares * (ends - starts)[:, None] / STEPS).ravel()


def agrees_with_the_draw(weights: np.ndarray, uniforms: int) -> bool:
    """Whether `inverse_cdf` draws, of 2^15 uniforms evenly spread, what is counted."""
    some = np.arange(0, STEPS, 2**8, dtype=np.int64)
    u = (some / STEPS).astype(np.float32)
    draw = jax.jit(jax.vmap(inverse_cdf, (0, None, None if uniforms == 1 else 0)))
    if uniforms == 1:
        drawn = np.asarray(draw(u, weights, None)[0])
        ends = np.cumsum(token_probabilities(weights, 1)) * STEPS
        return (drawn == np.searchsorted(ends, some, side="right")).all()
    drawn = np.asarray(draw(u, weights, np.full_like(u, 0.5))[0]) // BLOCK
    by_block = token_probabilities(weights, 2).reshape(-1, BLOCK).sum(1)
    ends = np.rint(np.cumsum(by_block) * STEPS)
    return (drawn == np.searchsorted(ends, some, side="right")).all()


def total_variation(weights: np.ndarray, uniforms: int) -> float:
    """Half the sum of absolute differences to weights / their sum, in float64."""
    exact = weights / weights.sum(dtype=np.float64)
    return 0.5 * np.abs(token_probabilities(weights, uniforms) - exact).sum()


def main() -> None:
    print("V        std of logits  one uniform  two uniforms")
    for v, spread in CASES:
        logits = spread * np.random.default_rng(0).normal(size=v).astype(np.float32)
        weights = np.exp(logits - logits.max())
        one, two = (total_variation(weights, n) for n in (1, 2))
        assert all(agrees_with_the_draw(weights, n) for n in (1, 2))
        print(f"{v:<8,} {spread:<14} {one:<12.1e} {two:.1e}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
