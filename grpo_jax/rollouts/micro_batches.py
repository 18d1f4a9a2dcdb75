"""Batches [P, G, ...] cut into micro-batches, and joined again."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.parallel.sharding import batch_shards, constrain

TOKENS = 2**14  # of one backward pass on a device, where nothing asks for others


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """How a batch is split: `prompts` x `samples` at a time, divisors of P and G.

    Attributes:
        prompts, samples: Of one micro-batch, over all devices.
        shards: Numbers of shards of P and of G over devices; a micro-batch takes the
            same number of rows from each.
    """

    prompts: int
    samples: int
    shards: tuple[int, int] = (1, 1)

    @property
    def on_device(self) -> tuple[int, int]:
        """(prompts, samples) of a micro-batch that one device works on."""
        return self.prompts // self.shards[0], self.samples // self.shards[1]

    def tokens(self, prompt_tokens: int, max_tokens: int) -> int:
        """Tokens on a device: p (L + g T)."""
        p, g = self.on_device
        return p * (prompt_tokens + g * max_tokens)


def micro_batch(
    num_prompts: int,
    group_size: int,
    prompt_tokens: int,
    max_tokens: int,
    budget: int,
    shards: tuple[int, int] | None = None,
) -> MicroBatch:
    """The largest micro-batch of at most `budget` tokens on a device (at least 1 x 1).

    Of those in budget it computes the fewest tokens: a group in k parts has
    k prompt_tokens + group_size max_tokens, its prompt encoded k times.

    Args:
        num_prompts: P.
        group_size: G.
        prompt_tokens: L.
        max_tokens: T.
        budget: Tokens on one device.
        shards: Numbers of shards of P and of G; None: those of the mesh in context.
    """
    options = splits(num_prompts, group_size, shards)
    fitting = (x for x in options if x.tokens(prompt_tokens, max_tokens) <= budget)
    return next(fitting, options[-1])


def splits(
    num_prompts: int, group_size: int, shards: tuple[int, int] | None = None
) -> list[MicroBatch]:
    """The micro-batches there are, largest first: whole groups, then parts of one.

    Args:
        num_prompts, group_size, shards: As `micro_batch`.
    """
    shards = batch_shards(num_prompts, group_size) if shards is None else shards
    p, g = num_prompts // shards[0], group_size // shards[1]
    sizes = [(n, g) for n in _divisors(p)] + [(1, n) for n in _divisors(g)[1:]]
    return [MicroBatch(a * shards[0], b * shards[1], shards) for a, b in sizes]


def _divisors(n: int) -> list[int]:
    """Divisors of n, largest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)


def split_batch(tree: Any, micro: MicroBatch, group_axis: bool) -> Any:
    """Leaves [P, ...] or [P, G, ...] to [parts, p, ...] or [parts, p, g, ...].

    Args:
        tree: Arrays.
        micro: Sizes of a part.
        group_axis: Whether the leaves have the axis G.
    """

    def split(x):
        x = _split_axis(x, 0, micro.prompts, micro.shards[0])  # [parts, p, ...]
        if not group_axis:
            return constrain(x, None, "prompts")
        x = _split_axis(x, 2, micro.samples, micro.shards[1])  # [parts, p, parts, g]
        p, g = x.shape[0], x.shape[2]
        x = x.swapaxes(1, 2).reshape(p * g, *x.shape[1:2], *x.shape[3:])
        return constrain(x, None, "prompts", "samples")

    return jax.tree.map(split, tree)


def join_batch(tree: Any, micro: MicroBatch, group_size: int) -> Any:
    """The inverse of `split_batch`: leaves [parts, p, g, ...] to [P, G, ...]."""

    def join(x):
        x = x.reshape(-1, group_size // micro.samples, *x.shape[1:])
        x = _join_axis(x.swapaxes(1, 2), 2, micro.shards[1])
        return constrain(_join_axis(x, 0, micro.shards[0]), "prompts", "samples")

    return jax.tree.map(join, tree)


def _split_axis(x: jax.Array, axis: int, size: int, shards: int) -> jax.Array:
    """An axis as two, [parts, size]; every part has as much of each shard."""
    before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if shards == 1:
        return x.reshape(*before, n // size, size, *after)
    x = x.reshape(*before, shards, n // size, size // shards, *after)
    return x.swapaxes(axis, axis + 1).reshape(*before, n // size, size, *after)


def _join_axis(x: jax.Array, axis: int, shards: int) -> jax.Array:
    """The inverse of `_split_axis`: axes [parts, size] as one."""
    before, after = x.shape[:axis], x.shape[axis + 2 :]
    parts, size = x.shape[axis : axis + 2]
    if shards > 1:
        x = x.reshape(*before, parts, shards, size // shards, *after)
        x = x.swapaxes(axis, axis + 1)
    return x.reshape(*before, parts * size, *after)


def repeat_parts(tree: Any, times: int) -> Any:
    """Leaves [parts, p, ...] of prompts to [parts * times, p, ...], each part repeated
    for the `times` splits of its groups."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)
