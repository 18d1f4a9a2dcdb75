"""Attention over a prompt's keys and values, held once for all of its completions."""

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a fully masked row stays finite too


def rotary_table(positions: jax.Array, head_dim: int, theta: float):
    """(cos, sin) of RoPE, each [..., 1, head_dim / 2], at positions [...]."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Half-split rotary embedding of x [..., heads, head_dim] by its table."""
    cos, sin = table
    half = x.shape[-1] // 2
    first, second = x[..., :half].astype(cos.dtype), x[..., half:].astype(cos.dtype)
    rotated = jnp.concatenate(
        (first * cos - second * sin, second * cos + first * sin), axis=-1
    )
    return rotated.astype(x.dtype)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array):
    """Self-attention of rows: q [B, L, H, d], k and v [B, L, KV, d], mask [B, L]."""
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None, None, :].astype(bool), is_causal=True
    )


def shared_prefix_attention(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    own_mask: jax.Array,
) -> jax.Array:
    """Attention of completions to their prompt (one copy per group) and to themselves.

    One softmax runs over both parts; the two score matrices are never joined, so the
    prompt's keys are read once per group and not copied per completion.

    Args:
        q: [P, G, S, H, d] queries of S completion tokens.
        prefix_k, prefix_v: [P, KV, d, L] and [P, KV, L, d], the prompt's. Keys lie
            transposed: the score product of one token is then 4 times faster on a CPU.
        prefix_mask: [P, L], true where the prompt has a token.
        own_k, own_v: [P, G, KV, d, U] and [P, G, KV, U, d], the completion's U slots.
        own_mask: [S, U], true where query s may look at slot u.

    Returns:
        [P, G, S, H, d], in q's dtype; scores and softmax are float32.
    """
    p, g, s, h, d = q.shape
    kv, u = own_v.shape[2:4]
    r = h // kv  # query heads per key/value head
    q = (q * d**-0.5).astype(q.dtype).reshape(p, g, s, kv, r, d)
    to_prefix = q.transpose(0, 3, 1, 4, 2, 5).reshape(p, kv, g * r * s, d)
    to_own = q.transpose(0, 1, 3, 4, 2, 5).reshape(p, g, kv, r * s, d)
    float32 = dict(preferred_element_type=jnp.float32)

    prefix_scores = jnp.einsum("pkmd,pkdl->pkml", to_prefix, prefix_k, **float32)
    prefix_scores = jnp.where(
        prefix_mask[:, None, None, :].astype(bool), prefix_scores, _MASKED
    )
    own_scores = jnp.einsum("pgkmd,pgkdu->pgkmu", to_own, own_k, **float32)
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
