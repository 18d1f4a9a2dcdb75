"""Flash attention over the tree of a prompt and its completions, in Pallas.

One set of kernels for TPUs and, through Triton, for NVIDIA GPUs. Scores exist block by
block on the chip, forward and backward, and a prompt's keys and values are read where
they are, once for all completions. Scores are held transposed, [keys, queries], so that
what belongs to a query (its maximum, its sum) is a row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from grpo_jax.models.attention import ATTENDED, MASKED
from grpo_jax.models.block import (
    KEYS,
    QUERIES,
    product,
    scores_of,
    weights_and_change,
)
from grpo_jax.parallel.kernels import per_head, shape_like, varying_alike

HEAD_DIMS = (64, 128, 256)  # that the kernels are built for
_LONG_ROW = 512  # bytes
_TOGETHER = 32 * 2**20  # bytes of queries, beside their cotangents, of a program
ALL = 2**30  # a window that nothing is outside of
_BLOCKS = {"tpu": (512, 256, 128), "gpu": (64,), "interpret": (16,)}


class Keys(NamedTuple):
    """Keys and values of a part of the tree."""

    k: jax.Array  # [B, KV, N, d]
    v: jax.Array  # [B, KV, N, d]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is fixed when the kernels are compiled.

    Attributes:
        backend: "tpu", "gpu", or "interpret" for any machine, slowly.
        block: Queries, and keys, of a block.
        softcap: Caps the scores; None: not.
    """

    backend: str
    block: int
    softcap: float | None = None

    def blocks(self, tokens: int) -> int:
        """How many blocks so many tokens are."""
        return -(-tokens // self.block)

    @staticmethod
    def of(
        backend: str, tokens: int, softcap: float | None, row_bytes: int
    ) -> "Kernel":
        """Blocks as large as so many tokens fill to seven eighths, on a GPU half as
        large for rows of queries of 512 bytes or more."""
        if backend == "gpu" and row_bytes >= _LONG_ROW:
            return Kernel(backend, 32, softcap)
        *larger, smallest = _BLOCKS[backend]
        for block in larger:
            if 7 * -(-tokens // block) * block <= 8 * tokens:
                return Kernel(backend, block, softcap)
        return Kernel(backend, smallest, softcap)


def flash_attention(
    kernel: Kernel,
    q: jax.Array,
    own: Keys,
    prefix: Keys | None,
    first: jax.Array,
    window: jax.Array | int | None,
) -> jax.Array:
    """[B, H, T, d]: attention of queries to the keys up to them; reverse mode only.

    Args:
        kernel: Sizes and soft cap.
        q: [B, H, T, d], scaled.
        own: [B, KV, T, d], of the queries' own tokens; query t attends to keys 0 to t.
        prefix: [P, KV, L, d] before them, seen by all; each is shared by B / P rows of
            q that follow each other.
        first: [B] int32, the first token that is there of all L + T.
        window: A query sees so many tokens up to its own; scalar, None: all.
    """
    t = q.shape[2]
    parts = [Keys(*(_filled(kernel, x, 0) for x in own))]
    if prefix is not None:  # filled up in front, and counted from there
        parts.append(Keys(*(_filled(kernel, x, 1) for x in prefix)))
        first = first + parts[1].k.shape[2] - prefix.k.shape[2]
    limit = ALL if window is None else window
    bounds = jnp.concatenate([first, jnp.broadcast_to(limit, first.shape)])
    by_head = (1, own.k.shape[1], bounds.size)  # every device has some
    bounds = jnp.broadcast_to(bounds.astype(jnp.int32), by_head)
    arrays: Any = varying_alike((bounds, _filled(kernel, q, 0), parts))
    attended: jax.Array = _flash(kernel, *arrays)
    return attended[:, :, :t]


def _filled(kernel: Kernel, x: jax.Array, front: int) -> jax.Array:
    """x [B, N, T, d] with zeros up to whole blocks, after T or in `front` of it."""
    missing = kernel.blocks(x.shape[2]) * kernel.block - x.shape[2]
    padding = (missing, 0) if front else (0, missing)
    return jnp.pad(x, ((0, 0), (0, 0), padding, (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    kernel: Kernel, bounds: jax.Array, q: jax.Array, parts: list[Keys]
) -> jax.Array:
    """[B, H, T, d]; arguments as `_forward`."""
    return per_head(partial(_forward, kernel), (bounds, q, parts))[0]


def _flash_forward(kernel, bounds, q, parts):
    attended, log_total = per_head(partial(_forward, kernel), (bounds, q, parts))
    attended = checkpoint_name(attended, ATTENDED)
    log_total = checkpoint_name(log_total, ATTENDED)
    return attended, (bounds, q, parts, attended, log_total)


def _flash_backward(kernel, residuals, cotangent):
    return None, *per_head(partial(_backward, kernel), (*residuals, cotangent))


_flash.defvjp(_flash_forward, _flash_backward)


def _forward(
    kernel: Kernel, by_head: tuple[jax.Array, jax.Array, list[Keys]]
) -> tuple[jax.Array, jax.Array]:
    """(attended [B, H, T, d], logs of the softmax's sums [B, H, 1, T]).

    Args:
        kernel: Sizes and soft cap.
        by_head: Bounds [1, KV, 2 B] int32: for each of B sequences how many tokens of
            padding it begins with, then for each its window; queries [B, H, T, d], T a
            multiple of the block; and the keys and values of the queries' own tokens,
            then of the prefix if there is one.
    """
    bounds, q, parts = by_head
    c, size = _Call(kernel, q, parts), kernel.block

    def body(bounds, q, *refs):
        *keys, out, log_total = refs
        q = q[0, 0]

        def add(carry, k, v, seen):
            top, total, mixed = carry
            s = jnp.where(seen, scores_of(kernel.softcap, k, q), MASKED)
            new_top = jnp.maximum(top, s.max(KEYS, keepdims=True))
            kept, weights = jnp.exp(top - new_top), jnp.exp(s - new_top)
            mixed = mixed * kept + product(v, weights.astype(v.dtype), KEYS, KEYS)
            return new_top, total * kept + weights.sum(KEYS, keepdims=True), mixed

        row = (1, size)
        carry = (
            jnp.full(row, MASKED, c.wide),
            jnp.zeros(row, c.wide),
            jnp.zeros((q.shape[1], size), c.wide),
        )
        top, total, mixed = c.over_keys(bounds, keys, add, carry)
        out[0, 0] = (mixed / total).T.astype(out.dtype)
        log_total[0, 0] = top + jnp.log(total)

    row = c.shape((*q.shape[:2], 1, q.shape[2]), c.wide)
    specs = [c.query_block, *c.all_keys]
    outs = [c.query_block, c.row_block]
    call = c.call(body, specs, outs, [c.shape(q.shape, q.dtype), row], c.products(2))
    return call(bounds, q, *c.flat)


def _backward(kernel: Kernel, by_head: tuple[Any, ...]) -> tuple[jax.Array, list[Keys]]:
    """Gradients of queries [B, H, T, d] and of parts.

    Args:
        kernel: Sizes and soft cap.
        by_head: Those of `_forward`, what it returned, and the cotangent.
    """
    bounds, q, parts, attended, log_total, cotangent = by_head
    wide = log_total.dtype
    inner = (cotangent.astype(wide) * attended.astype(wide)).sum(-1)[:, :, None]
    rows = (log_total, inner)  # [B, H, 1, T]
    dq = _query_gradient(kernel, bounds, q, parts, cotangent, rows)
    dparts = [
        _key_gradients(kernel, bounds, q, parts, i, cotangent, rows)
        for i in range(len(parts))
    ]
    return dq, dparts


def _query_gradient(
    kernel: Kernel,
    bounds: jax.Array,
    q: jax.Array,
    parts: list[Keys],
    cotangent: jax.Array,
    rows: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """[B, H, T, d]; `cotangent` [B, H, T, d], `rows` [B, H, 1, T] each."""
    c = _Call(kernel, q, parts)

    def body(bounds, q, cotangent, log_total, inner, *refs):
        *keys, out = refs
        q, cotangent = q[0, 0], cotangent[0, 0]
        log_total, inner = log_total[0, 0], inner[0, 0]

        def add(total, k, v, seen):
            _, change = weights_and_change(
                kernel.softcap, k, v, q, cotangent, log_total, inner, seen
            )
            return total + product(k, change.astype(k.dtype), KEYS, KEYS)

        start = jnp.zeros((q.shape[1], kernel.block), c.wide)
        out[0, 0] = c.over_keys(bounds, keys, add, start).T.astype(out.dtype)

    specs = [c.query_block, c.query_block, c.row_block, c.row_block, *c.all_keys]
    shape = c.shape(q.shape, q.dtype)
    call = c.call(body, specs, [c.query_block], [shape], c.products(3))
    return call(bounds, q, cotangent, *rows, *c.flat)[0]


def _key_gradients(
    kernel: Kernel,
    bounds: jax.Array,
    q: jax.Array,
    parts: list[Keys],
    which: int,
    cotangent: jax.Array,
    rows: tuple[jax.Array, jax.Array],
) -> Keys:
    """Gradients of part `which`, as its arrays; other arguments as `_query_gradient`.

    Those of a prefix are written apart for every row that shares it, and those of long
    sequences for every query head; they are added afterwards, so that all blocks are
    independent.
    """
    c, size, part = _Call(kernel, q, parts), kernel.block, parts[which]
    shared, kv, n, d = len(q) // len(part.k), *part.k.shape[1:]
    heads = q.shape[1] // kv  # of queries, for each of keys: together, if they fit
    large = 4 * heads * c.tokens * d * q.dtype.itemsize > _TOGETHER
    apart = heads if large else 1
    heads, alone = heads // apart, apart == shared == 1
    ahead = c.prefix if which == 0 else 0  # tokens before this part

    def body(bounds, q, cotangent, log_total, inner, k, v, dk, dv):
        row, j = pl.program_id(0), pl.program_id(2)
        first, window = c.bounds(bounds, row)
        k, v = k[0, 0], v[0, 0]
        start = ahead + j * size  # of these keys, among all tokens
        # Queries from the first that sees one of them, to the last.
        low = j if which == 0 else 0
        last = jnp.clip(start + size - 1 + window - c.prefix, 0, c.tokens)
        high = _divided(last + size - 1, size)
        high = jnp.where(start + size <= first, low, high)

        def add(head, i, carry):
            dk, dv = carry
            at = pl.ds(pl.multiple_of(i * size, size), size)
            qs, cotangents = q[0, head, at, :], cotangent[0, head, at, :]
            seen = c.seen(start, c.prefix + i * size, first, window)
            weights, change = weights_and_change(
                kernel.softcap, k, v, qs, cotangents, log_total[0, head, :, at],
                inner[0, head, :, at], seen,
            )  # fmt: skip
            dv += product(weights.astype(qs.dtype), cotangents, QUERIES, 0)
            dk += product(change.astype(qs.dtype), qs, QUERIES, 0)
            return dk, dv

        def add_head(head, carry):
            return jax.lax.fori_loop(low, high, partial(add, head), carry)

        zeros = jnp.zeros((size, d), c.wide)
        total = jax.lax.fori_loop(0, heads, add_head, (zeros, zeros))
        dk[0, 0], dv[0, 0] = (x.astype(dk.dtype) for x in total)

    keys = pl.BlockSpec(
        (1, 1, size, d),
        lambda b, h, i: (_divided(b, shared), _divided(h, apart), i, 0),
    )
    out = pl.BlockSpec((1, 1, size, d), lambda b, h, i: (b, h, i, 0))
    queries = pl.BlockSpec((1, heads, c.tokens, d), lambda b, h, i: (b, h, 0, 0))
    row = pl.BlockSpec((1, heads, 1, c.tokens), lambda b, h, i: (b, h, 0, 0))
    shape = c.shape((len(q), kv * apart, n, d), q.dtype if alone else c.wide)
    call = c.call(
        body,
        [queries, queries, row, row, keys, keys],
        [out, out],
        [shape, shape],
        c.products(4, keys=n if which else n // 2),
        (kv * apart, n // size),
    )
    gradients = call(bounds, q, cotangent, *rows, *part)
    if alone:
        return Keys(*gradients)
    sums = (x.reshape(-1, shared, kv, apart, n, d).sum((1, 3)) for x in gradients)
    return Keys(*(x.astype(q.dtype) for x in sums))


class _Call:
    """Block specs of one tree's arrays, and the loop over the keys of a query block.

    A program is (row, head, block), of queries or of keys.
    """

    def __init__(self, kernel: Kernel, q: jax.Array, parts: Sequence[Keys]):
        self.kernel, self.q = kernel, q
        self.flat = [x for part in parts for x in part]
        self.tokens, self.dim = q.shape[2:]
        self.blocks = self.tokens // kernel.block
        self.prefix = parts[1].k.shape[2] if len(parts) > 1 else 0
        self.wide = jnp.promote_types(q.dtype, jnp.float32)
        size, d = kernel.block, self.dim
        self.query_block = pl.BlockSpec((1, 1, size, d), lambda b, h, i: (b, h, i, 0))
        self.row_block = pl.BlockSpec((1, 1, 1, size), lambda b, h, i: (b, h, 0, i))
        self.all_keys = [self._all(x) for x in self.flat]

    def _all(self, x: jax.Array) -> pl.BlockSpec:
        """All keys x [B or P, KV, N, d] of a program's query head."""
        shared, heads = len(self.q) // len(x), self.q.shape[1] // x.shape[1]
        return pl.BlockSpec(
            (1, 1, *x.shape[2:]),
            lambda b, h, i: (_divided(b, shared), _divided(h, heads), 0, 0),
        )

    def bounds(self, bounds: Any, row: Any) -> tuple[jax.Array, jax.Array]:
        """(first token, window) of a row."""
        return bounds[0, 0, row], bounds[0, 0, len(self.q) + row]

    def shape(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        """Of an output, which differs between devices as the queries do."""
        return shape_like(self.q, shape, dtype)

    def products(self, count: int, keys: int | None = None) -> pl.CostEstimate:
        """The work of so many products of scores' size, for the compiler's schedule."""
        rows, heads = self.q.shape[:2]
        seen = self.prefix + self.tokens / 2 if keys is None else keys
        pairs = int(rows * heads * self.tokens * seen)
        read = sum(x.size * x.dtype.itemsize for x in (self.q, self.q, *self.flat))
        return pl.CostEstimate(
            flops=2 * count * pairs * self.dim,
            transcendentals=pairs,
            bytes_accessed=read,
        )

    def seen(self, keys: Any, queries: Any, first: Any, window: Any) -> jax.Array:
        """[block, block] bool: which keys queries see, from the index of the first of
        each among all tokens."""
        shape = (self.kernel.block,) * 2
        key = keys + jax.lax.broadcasted_iota(jnp.int32, shape, KEYS)
        query = queries + jax.lax.broadcasted_iota(jnp.int32, shape, QUERIES)
        return (key <= query) & (query - key < window) & (key >= first)

    def over_keys(
        self, bounds: Any, keys: Sequence[Any], add: Callable[..., Any], carry: Any
    ) -> Any:
        """The carry after add(carry, k, v, seen) for every block of keys that a query
        block sees a part of."""
        size, row, i = self.kernel.block, pl.program_id(0), pl.program_id(2)
        first, window = self.bounds(bounds, row)
        queries = self.prefix + i * size
        lowest = jnp.maximum(jnp.maximum(first, queries - window + 1), 0)

        def loop(part, ahead, low, high, carry):
            k, v = part

            def step(j, carry):
                at = pl.ds(pl.multiple_of(j * size, size), size)
                seen = self.seen(ahead + j * size, queries, first, window)
                return add(carry, k[0, 0, at, :], v[0, 0, at, :], seen)

            return jax.lax.fori_loop(low, high, step, carry)

        if len(keys) > 2:
            low = _divided(jnp.minimum(lowest, self.prefix), size)
            carry = loop(keys[2:], 0, low, self.prefix // size, carry)
        # A row that sees nothing still has its own block.
        low = _divided(jnp.maximum(lowest - self.prefix, 0), size)
        low = jnp.minimum(low, i)
        return loop(keys[:2], self.prefix, low, i + 1, carry)

    def call(
        self,
        body: Callable[..., None],
        in_specs: list[pl.BlockSpec],
        out_specs: list[pl.BlockSpec],
        out_shapes: list[Any],
        work: pl.CostEstimate,
        programs: tuple[int, int] | None = None,
    ) -> Callable[..., Any]:
        """The kernel: `body` for every program; `bounds` are its first argument.

        Args:
            body: Of references.
            in_specs, out_specs, out_shapes: Beside those of `bounds`.
            work: In all.
            programs: Heads and blocks, if not those of the queries.
        """
        programs = programs or (self.q.shape[1], self.blocks)
        spec, params = _of_backend(self.kernel.backend)
        return pl.pallas_call(
            body,
            grid=(len(self.q), *programs),
            in_specs=[spec, *in_specs],
            out_specs=out_specs,
            out_shape=out_shapes,
            interpret=self.kernel.backend == "interpret",
            compiler_params=params,
            cost_estimate=work,
        )


def _of_backend(backend: str) -> tuple[pl.BlockSpec, Any]:
    """(where the bounds are, the compiler's parameters)."""
    if backend == "tpu":
        from jax.experimental.pallas import tpu

        # A program holds all keys and values of a head, and loads the next ones.
        params = tpu.CompilerParams(
            dimension_semantics=("parallel",) * 3, vmem_limit_bytes=64 * 2**20
        )
        return pl.BlockSpec(memory_space=tpu.SMEM), params
    if backend == "gpu":
        from jax.experimental.pallas import triton

        return pl.BlockSpec(), triton.CompilerParams(num_warps=4, num_stages=2)
    return pl.BlockSpec(), None


def _divided(x: Any, y: int) -> jax.Array:
    """x / y rounded down, of a scalar of at least 0: `//` asks for its sign, which
    Mosaic lowers for known devices only."""
    return jax.lax.div(jnp.int32(x), jnp.int32(y))
