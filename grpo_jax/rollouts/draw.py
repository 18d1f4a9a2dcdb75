"""One token from each row of logits."""

import jax
import jax.numpy as jnp

from grpo_jax.parallel.sharding import constrain

_BLOCK = 128  # tokens whose probabilities are summed before one of them is searched


def draw_tokens(
    sample_keys: jax.Array,
    t: jax.Array,
    logits: jax.Array,
    top_k: int | None,
    top_p: float | None,
) -> tuple[jax.Array, jax.Array]:
    """(tokens [P, G] int32, their log-probs [P, G] float32) of tempered logits.

    Args:
        sample_keys: [P, G] typed keys, one per completion.
        t: [] int32, the token's index in its completion, folded into each key.
        logits: [P, G, V] float32, divided by the temperature.
        top_k, top_p: As in `sample`; the log-probs are those of the truncated
            distribution.
    """
    logits = _keep_top_k(logits, top_k)
    logits = _keep_top_p(logits, top_p)
    u = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t))))(
        sample_keys
    )
    u = constrain(u, "prompts", "samples")
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    token, total = inverse_cdf(u, weights)
    chosen = jnp.take_along_axis(logits - top, token[..., None], axis=-1)[..., 0]
    return token, chosen - jnp.log(total)


def _keep_top_k(logits: jax.Array, top_k: int | None) -> jax.Array:
    """Logits [..., V] with -inf at all but the `top_k` largest."""
    if top_k is None:
        return logits
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def _keep_top_p(logits: jax.Array, top_p: float | None) -> jax.Array:
    """Logits [..., V] with -inf outside the smallest set of likeliest tokens whose
    probabilities sum to at least `top_p`."""
    if top_p is None or top_p >= 1:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    mass_before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    mass_before = mass_before - jax.nn.softmax(ordered, axis=-1)
    last = (mass_before < top_p).sum(-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(ordered, last, axis=-1)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def inverse_cdf(u: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token where the cumulated weights first exceed u times their total.

    One uniform per token instead of V Gumbels: 13 times faster at V = 2,048 on a CPU.
    In two levels, blocks and then one block's tokens, which keeps the rounding of the
    sums at that of V / 128 terms and of 128.

    Args:
        u: [...] uniform in [0, 1).
        weights: [..., V] non-negative, not all zero.

    Returns:
        Tokens [...] int32, never one of weight 0, and the weights' total [...].
    """
    *lead, v = weights.shape
    padded = jnp.pad(weights, [(0, 0)] * len(lead) + [(0, -v % _BLOCK)])
    blocks = padded.reshape(*lead, -1, _BLOCK)
    cumulated = jnp.cumsum(blocks.sum(-1), axis=-1)  # [..., V / block]
    total = cumulated[..., -1]
    target = u * total
    index = _first_above(cumulated, target)
    before = jnp.where(
        index > 0,
        jnp.take_along_axis(cumulated, jnp.maximum(index - 1, 0)[..., None], -1)[
            ..., 0
        ],
        0.0,
    )
    block = jnp.take_along_axis(blocks, index[..., None, None], axis=-2)[..., 0, :]
    within = _first_above(before[..., None] + jnp.cumsum(block, axis=-1), target)
    # Rounding may leave the block's sum below the target: its last possible token.
    last = _BLOCK - 1 - jnp.argmax((block > 0)[..., ::-1], axis=-1)
    return index * _BLOCK + jnp.minimum(within, last), total


def _first_above(cumulated: jax.Array, target: jax.Array) -> jax.Array:
    """Index [...] of the first entry of `cumulated` [..., N] above `target` [...]; the
    last index if none is."""
    below = (cumulated <= target[..., None]).sum(-1)
    return jnp.minimum(below, cumulated.shape[-1] - 1)
