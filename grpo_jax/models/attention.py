"""Attention over a prompt's keys and values, stored once for all completions."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.logprobs import soft_capped

_MASKED = -1e30  # finite, so that a fully masked row stays finite too


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


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Causal self-attention within rows, [B, L, H, d].

    Args:
        q: [B, L, H, d].
        k, v: [B, L, KV, d].
        mask: [B, L], true on tokens, or [B, L, L], true where a query may attend to a
            key; combined with the causal mask.
        scale: Multiplies the scores; default 1/sqrt(d).
        softcap: Caps the scaled scores.
    """
    mask = mask.astype(bool)
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    if softcap is None:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=True
        )
    b, n, h, d = q.shape
    kv = k.shape[2]
    q = (q * (d**-0.5 if scale is None else scale)).astype(q.dtype)
    q = q.reshape(b, n, kv, h // kv, d)
    float32 = dict(preferred_element_type=jnp.float32)
    scores = jnp.einsum("blkrd,bmkd->bkrlm", q, k, **float32)
    seen = mask & jnp.tril(jnp.ones((n, n), bool))  # [B, 1, L, L]
    scores = jnp.where(seen[:, None], soft_capped(scores, softcap), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkrlm,bmkd->blkrd", weights, v, **float32)
    return mixed.astype(q.dtype).reshape(b, n, h, d)


def shared_prefix_attention(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    suffix_k: jax.Array,
    suffix_v: jax.Array,
    suffix_mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of completions to their prompt (one copy per group) and to themselves.

    One softmax runs over both parts; the two score matrices are never joined, so the
    prompt's keys are read once per group and not copied per completion.

    Args:
        q: [P, G, S, H, d] queries of S completion tokens.
        prefix_k, prefix_v: [P, KV, d, L] and [P, KV, L, d], the prompt's. Keys are
            transposed: the score product of one token is then 4 times faster on a CPU.
        prefix_mask: [P, L], true on the prompt's tokens; or [P, S, L], true where query
            s may attend to one.
        suffix_k, suffix_v: [P, G, KV, d, U] and [P, G, KV, U, d], the completion's U
            slots.
        suffix_mask: [S, U], true where query s may attend to slot u.
        scale: Multiplies the scores; default 1/sqrt(d).
        softcap: Caps the scaled scores.

    Returns:
        [P, G, S, H, d], in q's dtype; scores and softmax are float32.
    """
    p, g, s, h, d = q.shape
    kv, u = suffix_v.shape[2:4]
    r = h // kv  # query heads per key/value head
    q = (q * (d**-0.5 if scale is None else scale)).astype(q.dtype)
    q = q.reshape(p, g, s, kv, r, d)
    to_prefix = q.transpose(0, 3, 1, 4, 2, 5).reshape(p, kv, g * r * s, d)
    to_suffix = q.transpose(0, 1, 3, 4, 2, 5).reshape(p, g, kv, r * s, d)
    float32 = dict(preferred_element_type=jnp.float32)

    prefix_scores = jnp.einsum("pkmd,pkdl->pkml", to_prefix, prefix_k, **float32)
    prefix_scores = soft_capped(prefix_scores, softcap)
    if prefix_mask.ndim == 2:
        prefix_scores = jnp.where(
            prefix_mask[:, None, None, :].astype(bool), prefix_scores, _MASKED
        )
    else:
        by_query = prefix_scores.reshape(p, kv, g * r, s, -1)
        by_query = jnp.where(prefix_mask[:, None, None], by_query, _MASKED)
        prefix_scores = by_query.reshape(prefix_scores.shape)
    suffix_scores = jnp.einsum("pgkmd,pgkdu->pgkmu", to_suffix, suffix_k, **float32)
    suffix_scores = soft_capped(suffix_scores, softcap)
    suffix_scores = jnp.where(
        suffix_mask, suffix_scores.reshape(p, g, kv, r, s, u), _MASKED
    ).reshape(p, g, kv, r * s, u)

    prefix_max = prefix_scores.max(-1).reshape(p, kv, g, r * s).swapaxes(1, 2)
    top = jax.lax.stop_gradient(jnp.maximum(prefix_max, suffix_scores.max(-1)))
    top_flat = top.swapaxes(1, 2).reshape(p, kv, g * r * s)
    prefix_weights = jnp.exp(prefix_scores - top_flat[..., None])
    suffix_weights = jnp.exp(suffix_scores - top[..., None])  # [P, G, KV, R*S, U]
    total = prefix_weights.sum(-1).reshape(p, kv, g, r * s).swapaxes(
        1, 2
    ) + suffix_weights.sum(-1)

    from_prefix = jnp.einsum(
        "pkml,pkld->pkmd", prefix_weights.astype(prefix_v.dtype), prefix_v, **float32
    )
    from_suffix = jnp.einsum(
        "pgkmu,pgkud->pgkmd", suffix_weights.astype(suffix_v.dtype), suffix_v, **float32
    )
    mixed = from_prefix.reshape(p, kv, g, r * s, d).swapaxes(1, 2) + from_suffix
    mixed = (mixed / total[..., None]).astype(q.dtype)
    return (
        mixed.reshape(p, g, kv, r, s, d)
        .transpose(0, 1, 4, 2, 3, 5)
        .reshape(p, g, s, h, d)
    )
