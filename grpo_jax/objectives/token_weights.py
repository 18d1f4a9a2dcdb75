"""Token weight axis: constant factors on tokens, computed from a batch.

A factor multiplies the surrogate's token, never the KL; any number of them combine by
product. `conflict_weights` is made inside the objective that asks for it; the others
are passed in as `token_weights`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_statistics
from grpo_jax.logprobs import MAX_LOGITS, soft_capped
from grpo_jax.precision import float32_products

# Choices of `Objective.token_weight`, and the symbol that its formula writes.
TOKEN_WEIGHTS = {"none": "", "conflict": "lambda", "nthr": "eta"}


def conflict_weights(
    token_ids: jax.Array, advantages: jax.Array, completion_mask: jax.Array
) -> jax.Array:
    """GTPO's lambda [P, G, T]: 2 or 0 on tokens that both good and bad answers share.

    Completions are aligned at their starts, and again at their ends. From there on, as
    long as some completion with A > 0 has the same token as one with A < 0, a shared
    token gets factor 2 where A > 0 and 0 where A < 0; the two alignments multiply.

    Args:
        token_ids: [P, G, T] int.
        advantages: [P, G]; completions with A = 0 are neither good nor bad.
        completion_mask: [P, G, T]; tokens outside it, as a tool's, are passed over.

    References:
        Simoni et al. 2025, arXiv:2508.03772 (lambda); the paper's code divides the loss
        by a count of conflicts besides, which its formula does not have.
    """
    sampled = completion_mask.astype(bool)
    first = jnp.argsort(~sampled, axis=-1, stable=True)  # sampled tokens first
    token_ids = jnp.take_along_axis(token_ids, first, -1)
    mask = jnp.take_along_axis(sampled, first, -1)
    lengths = mask.sum(-1)  # [P, G]
    positions = jnp.arange(mask.shape[-1])[None, None]
    # Its own inverse inside the mask.
    from_end = jnp.clip(lengths[..., None] - 1 - positions, 0)
    backward = jnp.take_along_axis(token_ids, from_end, -1)

    def factors(ids: jax.Array) -> jax.Array:  # aligned at position 0
        same = ids[:, :, None] == ids[:, None]  # [P, G, G, T]
        same &= mask[:, :, None] & mask[:, None]
        good, bad = advantages > 0, advantages < 0
        opposed = good[:, :, None] & bad[:, None]
        opposed |= opposed.swapaxes(1, 2)
        shared = (same & opposed[..., None]).any(2)  # [P, G, T]
        unbroken = jnp.cumprod(shared.any(1), -1).astype(bool)[:, None]
        factor = jnp.where(advantages > 0, 2.0, 0.0)[..., None]
        return jnp.where(shared & unbroken, factor, 1.0)

    backward = jnp.take_along_axis(factors(backward), from_end, -1)
    both = jnp.take_along_axis(
        factors(token_ids) * backward, jnp.argsort(first, axis=-1), -1
    )
    return jnp.where(sampled, both, 1.0)


def mean_entropy(entropy: jax.Array, completion_mask: jax.Array) -> jax.Array:
    """[P, G] nats: the mean over each completion's tokens of entropy [P, G, T]."""
    mask = completion_mask.astype(bool)
    total = jnp.where(mask, entropy, 0.0).sum(-1)
    return jax.lax.stop_gradient(total / jnp.maximum(mask.sum(-1), 1))


@float32_products()
def nthr_weights(
    hidden: jax.Array,
    unembedding: jax.Array,
    token_ids: jax.Array,
    rewards: jax.Array,
    completion_mask: jax.Array,
    *,
    beta: float = 1.0,
    eta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> jax.Array:
    """NTHR's factors [P, G, T]: eta on wrong answers' tokens that hurt the right ones.

    With h the last hidden state before a token and e = onehot(token) - pi its softmax
    error, <h, h'> <e, e'> is how much a gradient step on one token moves another's
    logit. A token of a wrong completion is damped to eta where its influence, summed
    over all tokens of the group's right completions, exceeds tau: beta times the
    smallest, over right completions, of one's mean influence on the others' tokens
    (per completion first, then over completions).

    A group's [G T, G T] influences are formed, never its [G T, V] softmax: the
    vocabulary is summed over in chunks.

    Args:
        hidden: [P, G, T, D], the states that predict each token.
        unembedding: [D, V].
        token_ids, completion_mask: [P, G, T].
        rewards: [P, G]; above the group's mean a completion is right, below it wrong.
        beta, eta: 1 and 0 in the paper's experiments.
        temperature: The policy's.
        softcap: The model's `logit_softcap`. pi is that of the capped logits; the cap's
            slope is left out of e, as the temperature is (not in the paper).

    References:
        Deng et al. 2025, arXiv:2505.18830 Eq. 7 and Sec. 5.3. With a single right
        completion "the others" is empty; its influence on itself is used (not in the
        paper).
    """
    mask = completion_mask.astype(bool)
    centred = group_statistics(rewards).centred
    right, wrong = (centred > 0).astype(float), centred < 0

    def one_prompt(prompt: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, ids, mask, right = prompt  # [G, T, D], [G, T], [G, T], [G]
        g, t, width = hidden.shape
        amask = mask.reshape(-1)
        h = hidden.reshape(g * t, width).astype(float)
        h = jnp.where(amask[:, None], h, 0.0)
        errors = _error_gram(
            h, unembedding.astype(float), ids.reshape(-1), temperature, softcap
        )
        pairs = errors * (h @ h.T)  # 0 where either is not a token
        influence = pairs.reshape(g, t, g, t).sum(1)  # [G, G, T], of each on a token
        lengths = jnp.maximum(mask.sum(-1), 1)
        on_completion = influence.sum(-1) / lengths[None]  # [G, G], mean over tokens
        others = right[:, None] * right[None] * (1 - jnp.eye(g))
        count = others.sum(1)
        mean = (on_completion * others).sum(1) / jnp.maximum(count, 1)
        mean = jnp.where(count == 0, jnp.diagonal(on_completion), mean)
        tau = beta * jnp.where(right > 0, mean, jnp.inf).min()
        return jnp.einsum("i,ijt->jt", right, influence), tau

    influence, tau = jax.lax.map(one_prompt, (hidden, token_ids, mask, right))
    damped = wrong[..., None] & (influence > tau[:, None, None]) & mask
    return jax.lax.stop_gradient(jnp.where(damped, eta, 1.0))


def _error_gram(
    hidden: jax.Array,
    unembedding: jax.Array,
    token_ids: jax.Array,
    temperature: float,
    softcap: float | None,
) -> jax.Array:
    """[N, N] <e, e'> of e = onehot - softmax, from hidden [N, D] and [D, V]."""
    rows, vocab = hidden.shape[0], unembedding.shape[1]
    width = max(1, min(vocab, MAX_LOGITS["cpu"] // rows))
    chunks = -(-vocab // width)
    columns = jnp.pad(unembedding, [(0, 0), (0, chunks * width - vocab)])
    columns = columns.reshape(-1, chunks, width).swapaxes(0, 1)
    positions = jnp.arange(chunks * width).reshape(chunks, width)

    def logits_of(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        columns, positions = chunk
        logits = soft_capped(hidden @ columns, softcap) / temperature
        return jnp.where(positions[None] < vocab, logits, -jnp.inf)

    log_total = jax.lax.map(
        lambda chunk: jax.nn.logsumexp(logits_of(chunk), axis=-1), (columns, positions)
    )
    log_total = jax.nn.logsumexp(log_total, axis=0)

    def add(
        gram: jax.Array, chunk: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        softmax = jnp.exp(logits_of(chunk) - log_total[:, None])
        errors = (token_ids[:, None] == chunk[1][None]) - softmax
        return gram + errors @ errors.T, None

    zero = jnp.zeros((rows, rows), hidden.dtype)
    return jax.lax.scan(add, zero, (columns, positions))[0]


def is_eos(token_ids: jax.Array, eos_id: int | Sequence[int] | jax.Array) -> jax.Array:
    """[...] bool: which tokens [...] are the id, or one of the ids."""
    ids = jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))
    return (token_ids[..., None] == ids).any(-1)


def overlong_weights(
    token_ids: jax.Array,
    completion_mask: jax.Array,
    eos_id: int | Sequence[int] | jax.Array,
) -> jax.Array:
    """[P, G, T]: 0 on completions cut off before EOS (DAPO's overlong filtering).

    They stay in their group's statistics and in token counts. The last sampled token
    decides: in a talk of several turns each ends with one.

    Args:
        token_ids, completion_mask: [P, G, T].
        eos_id: The id of the token that ends a completion, or several ids.
    """
    mask = completion_mask.astype(bool)
    last = (mask * jnp.arange(mask.shape[-1])).argmax(-1, keepdims=True)
    final = jnp.take_along_axis(token_ids, last, -1)  # [P, G, 1]
    ended = is_eos(final, eos_id) & mask.any(-1, keepdims=True)
    return jnp.broadcast_to(ended, mask.shape).astype(float)


def truncated_importance_weights(
    logprobs: jax.Array, sampled_logprobs: jax.Array, cap: float = 2.0
) -> jax.Array:
    """[P, G, T] min(trainer's pi / sampler's pi, cap): truncated importance sampling.

    Corrects for a sampler whose numbers differ from the trainer's (Yao et al. 2025).
    """
    gap = jnp.clip(jax.lax.stop_gradient(logprobs - sampled_logprobs), -20.0, 20.0)
    return jnp.minimum(jnp.exp(gap), cap)


def dense_step_weights(values: jax.Array, completion_mask: jax.Array) -> jax.Array:
    """[P, G, T] Q_t / mean_t Q of positive per-token values; mean 1 over a completion.

    The part of VGPO's temporal weights (arXiv:2512.12387) that carries over: its Q is a
    flow model's one-step projection, values [P, G, T] are any process reward of a
    prefix. A completion whose values sum to 0 keeps weight 1.
    """
    mask = completion_mask.astype(bool)
    values = jnp.where(mask, jax.lax.stop_gradient(values), 0.0)
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    mean = values.sum(-1, keepdims=True) / count
    return jnp.where(mask & (mean > 0), values / jnp.where(mean > 0, mean, 1.0), 1.0)
