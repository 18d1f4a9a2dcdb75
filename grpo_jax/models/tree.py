"""Attention over a tree: prompts, and the completions that go on from each.

The tokens of a prompt see those before them; a completion's see the whole prompt, whose
keys and values are stored once, and those before them. Long sequences are taken block
by block, so that memory grows with their length and not with its square.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.models import flash
from grpo_jax.models.attention import (
    ATTENDED,
    Part,
    scaled,
    shared_prefix_attention,
    within_window,
)
from grpo_jax.parallel.kernels import is_per_device
from grpo_jax.parallel.platform import platform
from grpo_jax.parallel.sharding import current_mesh

SHORT = 256  # tokens of which all scores are computed at once
# Scores of a block, where MIN_BLOCK queries have fewer: what a CPU's cache holds; on
# accelerators more, for fewer and larger products.
MAX_SCORES = {"cpu": 2**22, "gpu": 2**26, "tpu": 2**26}
MIN_BLOCK = 32  # queries
# Blocks are looped over in so many stretches, and see as many keys as the last one of
# theirs: of 4, an eighth of the products is in vain, and 4 loops are compiled.
STRETCHES = 4

Slides = bool | jax.Array | None  # whether a layer's window slides; None: no layer's


def chosen_attention(how: str, tokens: int, head_dim: int) -> str:
    """ "dense", "blocks" or "flash": how sequences of so many tokens are attended.

    Args:
        how: `ModelConfig.attention`.
        tokens: Of the longer of a prompt and a completion.
        head_dim: The kernel is built for some.
    """
    if how == "flash" or tokens <= SHORT:
        return "flash" if how == "flash" else "dense"
    if how == "auto":
        there = platform() != "cpu" and head_dim in flash.HEAD_DIMS
        return "flash" if there else "blocks"
    return how


def of_all_modes(how: str, head_dim: int) -> str:
    """`how`, or what has forward mode too where that would be a kernel."""
    kernel = chosen_attention(how, SHORT + 1, head_dim) == "flash"
    return "blocks" if kernel else how


def block_queries(scores: int) -> int:
    """Queries of a block, a power of 2, of which each has so many scores."""
    most = max(MIN_BLOCK, MAX_SCORES[platform()] // max(1, scores))
    return min(SHORT, 2 ** (most.bit_length() - 1))


class Tree(NamedTuple):
    """Where the tokens are: of P prompts of L, and of completions of each."""

    mask: jax.Array  # [P, L] bool, the prompts' tokens, at the end of each row
    positions: jax.Array  # [P, L] int32
    first: jax.Array  # [P] int32, the position of the completions' first token


@dataclasses.dataclass(frozen=True)
class TreeAttention:
    """Attention of one forward pass.

    Attributes:
        tree: Of the arrays to come.
        window: Tokens that a sliding layer sees; None: no layer slides.
        how: `ModelConfig.attention`.
        scale, softcap: Of the scores.
    """

    tree: Tree
    window: int | None
    how: str
    scale: float | None
    softcap: float | None

    def prompts(
        self, q: jax.Array, k: jax.Array, v: jax.Array, slides: Slides
    ) -> jax.Array:
        """[P, L, H, d] of queries [P, L, H, d] to keys and values [P, L, KV, d]."""
        p, length, heads, d = q.shape
        q = q.reshape(p, 1, length, heads, d)  # one completion of nothing
        if self._how(length, q) == "flash":
            own = (x.reshape(p, 1, *x.shape[1:]) for x in (k, v))
            return self._flash(q, None, tuple(own), slides).reshape(p, length, heads, d)
        tree, size = self.tree, self._block(p * heads * length)
        positions = jnp.pad(tree.positions, ((0, 0), (0, SHORT)))  # the last block's
        kv = k.shape[2]
        k = k.transpose(0, 2, 3, 1).reshape(p, 1, kv, d, length)
        v = v.swapaxes(1, 2).reshape(p, 1, kv, length, d)

        def attend(q, first, keys):
            rows = first + jnp.arange(q.shape[2])
            own = jax.lax.dynamic_slice_in_dim(positions, first, q.shape[2], axis=1)
            seen = (rows[:, None] >= jnp.arange(keys)) & tree.mask[:, None, :keys]
            seen = self._near(seen, own, tree.positions[:, :keys], slides)
            part = Part(k[..., :keys], v[..., :keys, :], seen)
            keep = length > SHORT
            return shared_prefix_attention(q, [part], **self._scores, keep=keep)

        return _by_blocks(attend, q, size).reshape(p, length, heads, d)

    def completions(
        self,
        q: jax.Array,
        prefix: Sequence[jax.Array],
        own: Sequence[jax.Array],
        slides: Slides,
    ) -> jax.Array:
        """[P, G, T, H, d].

        Args:
            q: [P, G, T, H, d].
            prefix: Keys and values [P, L, KV, d] of the prompts.
            own: Keys and values [P, G, T, KV, d] of the completions.
            slides: Whether this layer's window slides.
        """
        tree, t = self.tree, q.shape[2]
        how = self._how(t, q)
        if how == "flash":
            return self._flash(q, prefix, own, slides)
        prefix_k, prefix_v = prefix[0].transpose(0, 2, 3, 1), prefix[1].swapaxes(1, 2)
        arrays = q, own[0].transpose(0, 1, 3, 4, 2), own[1].swapaxes(2, 3)

        def of_samples(arrays):  # [P, G, ...] each
            q, k, v = arrays
            p, g, _, heads, _ = q.shape

            def attend(q, first, keys):
                rows, slots = first + jnp.arange(q.shape[2]), jnp.arange(keys)
                to_prefix = self._near(
                    tree.mask, tree.first[:, None] + rows, tree.positions, slides
                )
                to_own = self._near(rows[:, None] >= slots, rows, slots, slides)
                parts = [
                    Part(prefix_k, prefix_v, to_prefix),
                    Part(k[..., :keys], v[..., :keys, :], to_own),
                ]
                return shared_prefix_attention(q, parts, **self._scores, keep=t > SHORT)

            size = self._block(p * g * heads * (tree.mask.shape[1] + t))
            return _by_blocks(attend, q, size)

        if how == "dense":
            return of_samples(arrays)
        # Sample by sample: of so many scores at once, the largest products.
        by_sample = jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], arrays)
        return jax.lax.map(of_samples, by_sample)[:, :, 0].swapaxes(0, 1)

    @property
    def _scores(self) -> dict[str, Any]:
        return dict(scale=self.scale, softcap=self.softcap)

    def _how(self, tokens: int, q: jax.Array) -> str:
        """How so many tokens with queries q [..., d] are attended."""
        how = chosen_attention(self.how, tokens, q.shape[-1])
        if how == "flash" and self.how == "auto" and not is_per_device():
            return "blocks"  # the compiler would gather all rows for the kernel
        return how

    def _block(self, scores: int) -> int | None:
        """Queries of a block, of which each has so many scores; None: all."""
        return None if self.how == "dense" else block_queries(scores)

    def _near(
        self, mask: jax.Array, queries: jax.Array, keys: jax.Array, slides: Slides
    ) -> jax.Array:
        """The mask [..., L] or [..., S, L], in a sliding layer within its window.

        Args:
            mask: Who may see whom without a window.
            queries: [..., S] positions.
            keys: [..., L] positions.
            slides: Whether this layer's window slides.
        """
        if self.window is None:
            return mask
        near = within_window(queries, keys, self.window) | ~jnp.asarray(slides)
        return near & (mask[..., None, :] if mask.ndim < near.ndim else mask)

    def _flash(
        self,
        q: jax.Array,
        prefix: Sequence[jax.Array] | None,
        own: Sequence[jax.Array],
        slides: Slides,
    ) -> jax.Array:
        """[P, G, T, H, d] by the kernel; arguments as `completions`."""
        p, g, t, heads, d = q.shape
        backend = platform()
        if backend == "cpu":  # for tests
            backend = "interpret"
            if current_mesh() is not None:
                raise ValueError("flash attention on a CPU is for one device.")
        elif d not in flash.HEAD_DIMS:
            raise ValueError(
                f"flash attention is built for heads of {flash.HEAD_DIMS}, got {d}; "
                "choose attention='auto'."
            )
        kernel = flash.Kernel.of(backend, t, self.softcap, d * q.dtype.itemsize)
        q = scaled(q, self.scale)
        # For each of the P G completions: how much padding its prompt begins with.
        first = jnp.repeat((~self.tree.mask).sum(1), g)
        window = None
        if self.window is not None:
            window = jnp.where(jnp.asarray(slides), self.window, flash.ALL)

        def by_head(x):  # [P, G, T, H, d] -> [P G, H, T, d]
            return x.reshape(p * g, *x.shape[2:]).swapaxes(1, 2)

        keys = flash.Keys(*map(by_head, own))
        before = None
        if prefix is not None:
            before = flash.Keys(*(x.swapaxes(1, 2) for x in prefix))

        rows = by_head(q)
        attended = flash.flash_attention(kernel, rows, keys, before, first, window)
        return attended.swapaxes(1, 2).reshape(p, g, t, heads, d)


def _by_blocks(
    attend: Callable[..., jax.Array], q: jax.Array, size: int | None
) -> jax.Array:
    """attend(queries, index of the first, number of keys up to the last) over blocks of
    q [..., S, H, d], joined again."""
    *lead, n, heads, d = q.shape
    if size is None or n <= SHORT:
        return attend(q, 0, n)
    blocks = -(-n // size)
    size = -(-n // blocks)
    padding = [(0, 0)] * len(lead) + [(0, blocks * size - n), (0, 0), (0, 0)]
    parts = jnp.pad(q, padding).reshape(*lead, blocks, size, heads, d)
    parts = jnp.moveaxis(parts, len(lead), 0)
    kept = jax.checkpoint_policies.save_only_these_names(ATTENDED)
    stretch, attended = math.ceil(blocks / STRETCHES), []
    for first in range(0, blocks, stretch):
        some = parts[first : first + stretch]
        keys = min(n, (first + len(some)) * size)
        # Without it, the masks of all blocks would be kept.
        one = jax.checkpoint(partial(attend, keys=keys), policy=kept, prevent_cse=False)
        starts = (first + jnp.arange(len(some))) * size
        attended.append(jax.lax.map(lambda x, one=one: one(*x), (some, starts)))
    joined = jnp.moveaxis(jnp.concatenate(attended), 0, len(lead))
    return joined.reshape(*lead, blocks * size, heads, d)[..., :n, :, :]
