"""Log-probabilities and entropy of tokens from hidden states, chunk by chunk.

Logits of shape [..., T, V] never exist: each chunk's are made, reduced and dropped,
and made again in the backward pass. The one custom derivative rule, of
`with_derivatives_of`, is linear, so reverse mode, forward mode and forward-over-forward
all work.
"""

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.precision import float32_products, with_derivatives_of

# At most so many float32 logits at once: a larger vocabulary means shorter chunks, so
# that temporary memory does not grow with V. Accelerators need more, or the unembedding
# is read, and its gradient added to, more often than it is multiplied with.
MAX_LOGITS = {"cpu": 2**24, "gpu": 2**28, "tpu": 2**28}
CHUNK = {"cpu": 512, "gpu": 4096, "tpu": 4096}  # tokens, at most


def chunk_tokens(vocab_size: int, platform: str) -> int:
    """Tokens of a chunk on a platform; one position of all rows is the least."""
    return max(1, min(CHUNK[platform], MAX_LOGITS[platform] // vocab_size))


def chunk_length(length: int, rows: int, tokens: int) -> int:
    """Positions of a chunk of at most so many tokens: of the fewest chunks that
    `length` positions of all rows are cut into, all alike."""
    num_chunks = -(-length // max(1, tokens // rows))
    return -(-length // num_chunks)


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """[...] cap * tanh(x / cap) of x [...]: within +-cap; x if cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    token_ids: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    with_entropy: bool = False,
) -> Any:
    """Log-probs of `token_ids` under softmax(hidden @ unembedding / temperature).

    Args:
        hidden: [..., T, D], any float dtype; that of the product with the unembedding.
        unembedding: [D, V], any float dtype. Its gradient is added up over chunks in
            float32 (float64 from float64).
        token_ids: [..., T] int32 in [0, V); the log-prob of another is NaN.
        temperature: The policy's, positive; the log-probs are of the tempered policy.
        softcap: The model's `logit_softcap`, applied before the temperature.
        chunk_size: Tokens of a chunk, counted over all leading axes; None: those of
            `chunk_tokens` on a CPU. The T axis is cut, so the smallest chunk is one
            position of all rows.
        with_entropy: Also return the entropy of each token's distribution.

    Returns:
        [..., T] float32 in nats, or with `with_entropy` a pair of them.

    Raises:
        ValueError: shapes do not fit together, chunk_size < 1, or temperature <= 0.
    """
    _check(hidden, unembedding, token_ids, chunk_size)
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    # -1 would be the last token; as beyond V, there is no such log-prob.
    token_ids = jnp.where(token_ids < 0, unembedding.shape[1], token_ids)
    *lead, length, width = hidden.shape
    # float32 even from bfloat16, float64 from float64.
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    rows = max(1, hidden.size // max(1, length * width))
    tokens = chunk_size or chunk_tokens(unembedding.shape[1], "cpu")
    step = chunk_length(length, rows, tokens)
    num_chunks = -(-length // step)  # T is padded by fewer than one per chunk
    padding = [(0, 0)] * len(lead) + [(0, num_chunks * step - length)]
    copy, wide = unembedding.astype(hidden.dtype), unembedding.astype(dtype)

    def chunked(x: jax.Array, padding: list[tuple[int, int]]) -> jax.Array:
        x = jnp.pad(x, padding)
        x = x.reshape(*lead, num_chunks, step, *x.shape[len(lead) + 1 :])
        return jnp.moveaxis(x, len(lead), 0)

    @jax.checkpoint
    def one_chunk(hidden: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, ...]:
        columns = copy if copy.dtype == dtype else with_derivatives_of(copy, wide)
        flat = hidden.reshape(-1, width)
        with float32_products(hidden.dtype):
            logits = jnp.matmul(flat, columns, preferred_element_type=dtype)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        logits = soft_capped(logits, softcap) / temperature
        log_total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, token_ids[..., None], axis=-1)[..., 0]
        if not with_entropy:
            return (chosen - log_total,)
        logprobs = logits - log_total[..., None]  # first, or the sum cancels
        return chosen - log_total, -(jnp.exp(logprobs) * logprobs).sum(-1)

    outputs = jax.lax.map(
        lambda chunk: one_chunk(*chunk),
        (chunked(hidden, [*padding, (0, 0)]), chunked(token_ids, padding)),
    )
    outputs = [
        jnp.moveaxis(x, 0, len(lead)).reshape(*lead, num_chunks * step)[..., :length]
        for x in outputs
    ]
    return tuple(outputs) if with_entropy else outputs[0]


def _check(
    hidden: jax.Array,
    unembedding: jax.Array,
    token_ids: jax.Array,
    chunk_size: int | None,
) -> None:
    """ValueError for shapes that do not fit together."""
    *lead, length, width = hidden.shape
    if unembedding.ndim != 2 or unembedding.shape[0] != width:
        raise ValueError(
            f"unembedding must be [{width}, V] to fit hidden {hidden.shape}, "
            f"got {unembedding.shape}; transpose an embedding matrix."
        )
    if token_ids.shape != (*lead, length):
        raise ValueError(
            f"token_ids must be {(*lead, length)} to fit hidden {hidden.shape}, "
            f"got {token_ids.shape}."
        )
    if length < 1:
        raise ValueError(f"hidden must hold at least one token, got {hidden.shape}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
