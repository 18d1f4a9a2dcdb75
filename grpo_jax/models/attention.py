"""Attention over a prompt's keys and values, stored once for all completions."""

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from grpo_jax.logprobs import soft_capped
from grpo_jax.precision import float32_products

ATTENDED = "attended"  # the name of what a backward pass reads, for jax.checkpoint
MASKED = -1e30  # finite, so that a fully masked row stays finite too


RotaryTable = tuple[jax.Array, jax.Array]  # cos and sin


def rotary_table(
    positions: jax.Array | np.ndarray,
    head_dim: int,
    theta: float,
    stretch: jax.Array | np.ndarray | None = None,
) -> RotaryTable:
    """(cos, sin) of RoPE, each [..., 1, head_dim / 2] float32, at positions [...].

    `stretch` [head_dim / 2] multiplies the wavelengths; None is 1.
    """
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if stretch is not None:
        frequencies = frequencies / stretch
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotary_stretch(
    head_dim: int, theta: float, factor: float, turns: tuple[float, float], length: int
) -> np.ndarray:
    """Factors [head_dim / 2] by which Llama 3.1 and later stretch each wavelength.

    A frequency with at most turns[0] turns within the original `length` tokens is
    divided by `factor`, one with at least turns[1] is kept; in between, the frequency
    is interpolated linearly in its number of turns.
    """
    slow, fast = turns
    half = head_dim // 2
    frequencies = theta ** (-np.arange(half) / half)
    turns_of_each = length * frequencies / (2 * math.pi)
    kept = np.clip((turns_of_each - slow) / (fast - slow), 0, 1)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)


def rotate(x: jax.Array, table: RotaryTable) -> jax.Array:
    """Half-split rotary embedding of x [..., heads, head_dim] by its table."""
    cos, sin = table
    half = x.shape[-1] // 2
    first, second = x[..., :half].astype(cos.dtype), x[..., half:].astype(cos.dtype)
    rotated = jnp.concatenate(
        (first * cos - second * sin, second * cos + first * sin), axis=-1
    )
    return rotated.astype(x.dtype)


class ByLayer(NamedTuple):
    """A rotary table or a mask in two versions: of full and of sliding attention."""

    full: Any
    sliding: Any

    def select(self, slides: bool | jax.Array | None) -> Any:
        """The version of one layer.

        Args:
            slides: Scalar, whether the layer's window slides; may be traced, None if no
                layer's does.
        """
        if slides is None or isinstance(slides, bool):
            return self.sliding if slides else self.full
        return jax.tree.map(partial(jnp.where, slides), self.sliding, self.full)


def within_window(queries: jax.Array, keys: jax.Array, window: int) -> jax.Array:
    """Mask [..., S, L] bool: keys less than `window` positions before their query.

    Args:
        queries: [..., S] int, positions.
        keys: [..., L] int, positions.
        window: Positions counted with the query's own, so 1 is the query alone.
    """
    return queries[..., :, None] - keys[..., None, :] < window


def scaled(q: jax.Array, scale: float | None) -> jax.Array:
    """Queries [..., d] times the scale of scores, by default 1/sqrt(d)."""
    return (q * (q.shape[-1] ** -0.5 if scale is None else scale)).astype(q.dtype)


class Part(NamedTuple):
    """Keys and values of a part of the tree, and who may see which of them."""

    k: jax.Array  # [P, KV, d, L] of the prompts, or [P, G, KV, d, U] of completions
    v: jax.Array  # [P, KV, L, d], or [P, G, KV, U, d]
    mask: jax.Array  # [P, L] or [P, S, L], or [S, U] or [P, S, U], bool


def shared_prefix_attention(
    q: jax.Array,
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    keep: bool = False,
) -> jax.Array:
    """Attention of completions to their prompt (one copy per group) and to themselves.

    One softmax runs over all parts; their score matrices are never joined, so a
    prompt's keys are read once per group and not copied per completion. Differentiated,
    scores are computed again: nothing of their size is kept. All modes work, and modes
    of modes.

    Args:
        q: [P, G, S, H, d] queries of S completion tokens.
        parts: The prompts', the completions' own, or both. Keys are transposed: the
            score product of one token is then 4 times faster on a CPU.
        scale: Multiplies the scores; default 1/sqrt(d).
        softcap: Caps the scaled scores.
        keep: A rematerialised layer keeps the output for its backward pass.

    Returns:
        [P, G, S, H, d], in q's dtype; scores and softmax are float32 (float64 from it).
    """
    p, g, s, h, d = q.shape
    kv = parts[0].v.shape[-3]
    q = scaled(q, scale)
    rows = q.reshape(p, g, s, kv, h // kv, d).transpose(0, 1, 3, 4, 2, 5)
    masks = [part.mask for part in parts]
    pairs = [(part.k, part.v) for part in parts]
    rows = rows.reshape(p, g, kv, -1, d)
    attended, _ = _attend(softcap, keep, rows, pairs, masks)
    attended = attended.reshape(p, g, kv, h // kv, s, d)
    return attended.transpose(0, 1, 4, 2, 3, 5).reshape(p, g, s, h, d)


Pairs = list[tuple[jax.Array, jax.Array]]  # keys and values of parts


class _Layout(NamedTuple):
    """How the rows of P x G x KV products lie for a part: [P, G, KV, M, ...], or
    [P, KV, G M, ...] where a group shares its keys."""

    groups: int
    shared: bool

    def rows(self, x: jax.Array) -> jax.Array:
        """x [P, G, KV, M, ...] as rows of the part's products."""
        if not self.shared:
            return x
        p, g, kv, m = x.shape[:4]
        return x.swapaxes(1, 2).reshape(p, kv, g * m, *x.shape[4:])

    def back(self, x: jax.Array) -> jax.Array:
        """[P, G, KV, M, ...] from rows x."""
        if not self.shared:
            return x
        p, kv, n = x.shape[:3]
        x = x.reshape(p, kv, self.groups, n // self.groups, *x.shape[3:])
        return x.swapaxes(1, 2)

    def masked(
        self, scores: jax.Array, mask: jax.Array, other: float = MASKED
    ) -> jax.Array:
        """Scores of rows, another number where the `Part`'s mask is false."""
        if self.shared and mask.ndim == 2:
            return jnp.where(mask[:, None, None], scores, other)
        queries = mask.shape[-2]
        by_query = scores.reshape(*scores.shape[:-2], -1, queries, scores.shape[-1])
        if mask.ndim == 3:
            mask = mask.reshape(len(mask), *(1,) * (by_query.ndim - 3), *mask.shape[1:])
        return jnp.where(mask, by_query, other).reshape(scores.shape)


def _layouts(q: jax.Array, pairs: Pairs) -> list[_Layout]:
    """Of each part, for q [P, G, KV, M, d]."""
    return [_Layout(q.shape[1], k.ndim == 4) for k, _ in pairs]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(
    softcap: float | None,
    keep: bool,
    q: jax.Array,
    pairs: Pairs,
    masks: list[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """(attended [P, G, KV, M, d], logs of the softmax's sums [P, G, KV, M]).

    Args:
        softcap: Caps the scores.
        keep: As in `shared_prefix_attention`.
        q: [P, G, KV, M, d], scaled; M are the query heads of a key head, times S.
        pairs, masks: Of `Part`s.
    """
    parts = list(zip(_layouts(q, pairs), pairs, masks, strict=True))
    scores = [
        at.masked(soft_capped(_product(at.rows(q), k), softcap), mask)
        for at, (k, _), mask in parts
    ]
    highest = (at.back(s.max(-1)) for (at, _, _), s in zip(parts, scores, strict=True))
    top = reduce(jnp.maximum, highest)
    total, mixed = jnp.zeros_like(top), 0.0
    for (at, (_, v), _), s in zip(parts, scores, strict=True):
        weights = jnp.exp(s - at.rows(top)[..., None])
        total += at.back(weights.sum(-1))
        mixed += at.back(_product(weights.astype(v.dtype), v))
    return (mixed / total[..., None]).astype(q.dtype), top + jnp.log(total)


@_attend.defjvp
def _attend_jvp(softcap, keep, primals, tangents):
    q, pairs, masks = primals
    dq, dpairs, _ = tangents
    attended, log_total = _attend(softcap, keep, q, pairs, masks)
    if keep:
        attended = checkpoint_name(attended, ATTENDED)
        log_total = checkpoint_name(log_total, ATTENDED)
    # Linear in the tangents; transposed, it is the backward pass.
    tangent = jax.checkpoint(partial(_tangent, softcap), prevent_cse=False)
    changes = tangent(q, pairs, masks, attended, log_total, dq, dpairs)
    return (attended, log_total), changes


def _tangent(softcap, q, pairs, masks, attended, log_total, dq, dpairs):
    """Derivatives of `_attend` along dq and dpairs: with weights w of scores s,
    d(attended) = sum w dv + sum w ds (v - attended), d(log_total) = sum w ds."""
    mixed, moved = 0.0, jnp.zeros_like(log_total)
    parts = zip(_layouts(q, pairs), pairs, dpairs, masks, strict=True)
    for at, (k, v), (dk, dv), mask in parts:
        rows = at.rows(q)
        s = soft_capped(_product(rows, k), softcap)
        ds = _product(at.rows(dq), k) + _product(rows, dk)
        if softcap is not None:
            ds *= 1 - (s / softcap) ** 2
        weights = jnp.exp(at.masked(s, mask) - at.rows(log_total)[..., None])
        weights = at.masked(weights, mask, 0.0)  # of a row that sees nothing too
        ds *= weights
        mixed += at.back(_product(weights.astype(v.dtype), dv))
        mixed += at.back(_product(ds.astype(v.dtype), v))
        moved += at.back(ds.sum(-1))
    change = mixed - attended.astype(moved.dtype) * moved[..., None]
    return change.astype(attended.dtype), moved


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Matrix products [..., M, N] of x [..., M, K] and y [..., K, N], in float32, or
    float64 from it; the rule of `_attend` is traced outside of the decoder."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    with float32_products(x.dtype):
        return jnp.matmul(x, y, preferred_element_type=wide)
