"""Batches [P, G, ...] cut into micro-batches, and joined again."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.parallel.sharding import batch_shards, constrain


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """How a batch is split: `prompts` x `samples` at a time, divisors of P and G.

    `shards` are the parts that P and G are cut into over devices: every part of the
    batch holds the same share of each.
    """

    prompts: int
    samples: int
    shards: tuple[int, int] = (1, 1)

    @property
    def on_device(self) -> tuple[int, int]:
        """Prompts and samples of one part that one device works on."""
        return self.prompts // self.shards[0], self.samples // self.shards[1]


def micro_batch(
    num_prompts: int,
    group_size: int,
    prompt_tokens: int,
    max_tokens: int,
    budget: int,
    shards: tuple[int, int] | None = None,
) -> MicroBatch:
    """The largest split into equal parts of at most `budget` tokens (at least 1 x 1).

    A part of p prompts and g samples holds p * (prompt_tokens + g * max_tokens) tokens.
    Whole groups are preferred: their prompt is encoded once.

    Args:
        budget: Tokens on one device.
        shards: What P and G are cut into over devices; None: by the mesh that is set.
    """
    shards = batch_shards(num_prompts, group_size) if shards is None else shards
    num_prompts, group_size = num_prompts // shards[0], group_size // shards[1]

    def fits(p, g):
        return p * (prompt_tokens + g * max_tokens) <= budget

    def of(p, g):
        return MicroBatch(p * shards[0], g * shards[1], shards)

    for p in _divisors(num_prompts):
        if fits(p, group_size):
            return of(p, group_size)
    for g in _divisors(group_size):
        if fits(1, g):
            return of(1, g)
    return of(1, 1)


def _divisors(n):
    """Of n, the largest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)


def split_batch(tree: Any, micro: MicroBatch, group_axis: bool) -> Any:
    """Leaves [P, ...] or [P, G, ...] to [parts, p, ...] or [parts, p, g, ...]."""

    def split(x):
        x = _cut(x, 0, micro.prompts, micro.shards[0])  # [parts, p, ...]
        if not group_axis:
            return constrain(x, None, "prompts")
        x = _cut(x, 2, micro.samples, micro.shards[1])  # [parts, p, parts, g, ...]
        p, g = x.shape[0], x.shape[2]
        x = x.swapaxes(1, 2).reshape(p * g, *x.shape[1:2], *x.shape[3:])
        return constrain(x, None, "prompts", "samples")

    return jax.tree.map(split, tree)


def _cut(x, axis, size, shards):
    """An axis as [parts, size]: of each of its `shards`, every part has as much."""
    before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if shards == 1:
        return x.reshape(*before, n // size, size, *after)
    x = x.reshape(*before, shards, n // size, size // shards, *after)
    return x.swapaxes(axis, axis + 1).reshape(*before, n // size, size, *after)


def _joined(x, axis, shards):
    """The inverse of `_cut`: axes [parts, size] as one."""
    before, (parts, size), after = (
        x.shape[:axis],
        x.shape[axis:][:2],
        x.shape[axis:][2:],
    )
    if shards > 1:
        x = x.reshape(*before, parts, shards, size // shards, *after)
        x = x.swapaxes(axis, axis + 1)
    return x.reshape(*before, parts * size, *after)


def repeat_parts(tree: Any, times: int) -> Any:
    """Prompt-wise leaves [parts, p, ...] once per split of their groups."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)
