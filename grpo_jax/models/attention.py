"""Attention over a prompt's keys and values, held once for all of its completions."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.logprobs import soft_capped

_MASKED = -1e30  # finite, so that a fully masked row stays finite too


def rotary_table(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    stretch: jax.Array | np.ndarray | None = None,
):
    """(cos, sin) of RoPE, each [..., 1, head_dim / 2], at positions [...].

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
    """[head_dim / 2] by how much Llama 3.1 and later stretch each wavelength.

    A frequency with at most turns[0] turns within the original `length` tokens is
    divided by `factor`, one with at least turns[1] is kept; in between, the frequency
    is interpolated linearly in its number of turns.
    """
    slow, fast = turns
    half = head_dim // 2
    frequencies = theta ** (-np.arange(half) / half)
    own_turns = length * frequencies / (2 * math.pi)
    kept = np.clip((own_turns - slow) / (fast - slow), 0, 1)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Half-split rotary embedding of x [..., heads, head_dim] by its table."""
    cos, sin = table
    half = x.shape[-1] // 2
    first, second = x[..., :half].astype(cos.dtype), x[..., half:].astype(cos.dtype)
    rotated = jnp.concatenate(
        (first * cos - second * sin, second * cos + first * sin), axis=-1
    )
    return rotated.astype(x.dtype)


class ByLayer(NamedTuple):
    """Two versions of one thing: for layers that see everything, and that slide."""

    whole: Any
    sliding: Any

    def of(self, slides: bool | jax.Array | None):
        """The one for a layer; `slides` may be traced, None where no layer does."""
        if slides is None or isinstance(slides, bool):
            return self.sliding if slides else self.whole
        return jax.tree.map(partial(jnp.where, slides), self.sliding, self.whole)


def within_window(queries: jax.Array, keys: jax.Array, window: int) -> jax.Array:
    """[..., S, L]: whether positions keys [..., L] are the last `window` of queries'.

    queries: [..., S]; a position counts itself, so a window of 1 is itself alone.
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
    """Self-attention of rows: q [B, L, H, d], k and v [B, L, KV, d].

    `mask` is [B, L], where there is a token, or [B, L, L], which keys each query may
    look at; on top of it nothing looks ahead. `scale` multiplies the scores, 1/sqrt(d)
    by default, before they are capped.
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
    own_k: jax.Array,
    own_v: jax.Array,
    own_mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of completions to their prompt (one copy per group) and to themselves.

    One softmax runs over both parts; the two score matrices are never joined, so the
    prompt's keys are read once per group and not copied per completion.

    Args:
        q: [P, G, S, H, d] queries of S completion tokens.
        prefix_k, prefix_v: [P, KV, d, L] and [P, KV, L, d], the prompt's. Keys lie
            transposed: the score product of one token is then 4 times faster on a CPU.
        prefix_mask: [P, L], true where the prompt has a token; or [P, S, L], where
            query s may look at one.
        own_k, own_v: [P, G, KV, d, U] and [P, G, KV, U, d], the completion's U slots.
        own_mask: [S, U], true where query s may look at slot u.
        scale: Multiplies the scores; default 1/sqrt(d).
        softcap: Caps the scaled scores.

    Returns:
        [P, G, S, H, d], in q's dtype; scores and softmax are float32.
    """
    p, g, s, h, d = q.shape
    kv, u = own_v.shape[2:4]
    r = h // kv  # query heads per key/value head
    q = (q * (d**-0.5 if scale is None else scale)).astype(q.dtype)
    q = q.reshape(p, g, s, kv, r, d)
    to_prefix = q.transpose(0, 3, 1, 4, 2, 5).reshape(p, kv, g * r * s, d)
    to_own = q.transpose(0, 1, 3, 4, 2, 5).reshape(p, g, kv, r * s, d)
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
    own_scores = jnp.einsum("pgkmd,pgkdu->pgkmu", to_own, own_k, **float32)
    own_scores = soft_capped(own_scores, softcap)
    own_scores = jnp.where(
        own_mask, own_scores.reshape(p, g, kv, r, s, u), _MASKED
    ).reshape(p, g, kv, r * s, u)

    prefix_max = prefix_scores.max(-1).reshape(p, kv, g, r * s).swapaxes(1, 2)
    top = jax.lax.stop_gradient(jnp.maximum(prefix_max, own_scores.max(-1)))
    top_flat = top.swapaxes(1, 2).reshape(p, kv, g * r * s)
    prefix_weights = jnp.exp(prefix_scores - top_flat[..., None])
    own_weights = jnp.exp(own_scores - top[..., None])  # [P, G, KV, R*S, U]
    total = prefix_weights.sum(-1).reshape(p, kv, g, r * s).swapaxes(
        1, 2
    ) + own_weights.sum(-1)

    from_prefix = jnp.einsum(
        "pkml,pkld->pkmd", prefix_weights.astype(prefix_v.dtype), prefix_v, **float32
    )
    from_own = jnp.einsum(
        "pgkmu,pgkud->pgkmd", own_weights.astype(own_v.dtype), own_v, **float32
    )
    mixed = from_prefix.reshape(p, kv, g, r * s, d).swapaxes(1, 2) + from_own
    mixed = (mixed / total[..., None]).astype(q.dtype)
    return (
        mixed.reshape(p, g, kv, r, s, d)
        .transpose(0, 1, 4, 2, 3, 5)
        .reshape(p, g, s, h, d)
    )
