"""Forward passes of a decoder: logits, hidden states and log-probs of completions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from grpo_jax.logprobs import chunk_tokens, token_logprobs
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.policy import Policy
from grpo_jax.models.tree import Tree
from grpo_jax.parallel.platform import platform
from grpo_jax.parallel.sharding import constrain, per_device


class PromptSplit(NamedTuple):
    """Prompts cut before their last token, which is the first input of completions; the
    others are moved to the end of their row."""

    tokens: jax.Array  # [P, L] int32
    prefix_mask: jax.Array  # [P, L] bool, the prompt's tokens without its last
    positions: jax.Array  # [P, L] int32
    last_token: jax.Array  # [P] int32
    length: jax.Array  # [P] int32, tokens before the last: its position


def split_prompts(prompts: jax.Array, prompt_mask: jax.Array) -> PromptSplit:
    """Cuts prompts [P, L], padded on either side, before their last token."""
    mask = prompt_mask.astype(bool)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # [P]
    prefix_mask = mask & (jnp.arange(mask.shape[1]) != last[:, None])
    order = _to_the_end(prefix_mask)
    last_token = jnp.take_along_axis(prompts, last[:, None], axis=1)[:, 0]
    prompts = jnp.take_along_axis(prompts, order, axis=1)
    prefix_mask = jnp.take_along_axis(prefix_mask, order, axis=1)
    return PromptSplit(
        prompts,
        prefix_mask,
        _positions(prefix_mask),
        last_token,
        prefix_mask.sum(1),
    )


def _to_the_end(mask: jax.Array) -> jax.Array:
    """[B, L] indices that move the tokens of mask [B, L] to the end of their rows."""
    return jnp.argsort(mask, axis=1, stable=True)


def tree_of(prompts: PromptSplit) -> Tree:
    """Where the tokens of prompts and their completions are."""
    return Tree(prompts.prefix_mask, prompts.positions, prompts.length)


def _positions(mask: jax.Array) -> jax.Array:
    """Positions [B, L] of the tokens in mask [B, L], padding not counted."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def check_token_ids(name: str, ids: jax.Array | np.ndarray, vocab_size: int) -> None:
    """Checks token ids, of any shape [...].

    Raises:
        ValueError: they are no integers, or outside [0, vocab_size), which is not known
            while they are traced or on other hosts.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {ids.dtype}.")
    if isinstance(ids, Tracer) or not ids.size:
        return
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return
    host = np.asarray(ids)
    if host.min() < 0 or host.max() >= vocab_size:
        raise ValueError(
            f"{name} must be in [0, {vocab_size}), the model's vocabulary, got ids "
            f"from {host.min()} to {host.max()}."
        )


def next_token_logits(
    policy: Policy, token_ids: jax.Array, attention_mask: jax.Array | None = None
) -> jax.Array:
    """Logits of the token after each position, for evaluation and parity checks.

    Args:
        token_ids: [B, L] int32.
        attention_mask: [B, L], 1 on tokens, 0 on padding on either side; None: all 1.

    Returns:
        [B, L, V] float32. Training never forms this array.

    Raises:
        ValueError: shapes do not fit, or ids are outside the vocabulary (where they are
            known: not while traced).
    """
    mask_shape = None if attention_mask is None else attention_mask.shape
    if token_ids.ndim != 2 or mask_shape not in (None, token_ids.shape):
        raise ValueError(
            "token_ids and attention_mask must be [B, L] alike, got "
            f"{token_ids.shape} and {mask_shape}."
        )
    check_token_ids("token_ids", token_ids, policy.config.vocab_size)
    token_ids = jnp.asarray(token_ids)
    model = policy.module()
    mask = jnp.ones_like(token_ids) if attention_mask is None else attention_mask
    order = _to_the_end(mask.astype(bool))
    mask = jnp.take_along_axis(mask.astype(bool), order, axis=1)
    token_ids = jnp.take_along_axis(token_ids, order, axis=1)
    positions = _positions(mask)
    rotary = model.rotary(positions)
    attention = model.attention(Tree(mask, positions, mask.sum(1)))

    def layer(block, x, slides):
        q, k, v = block.qkv(x, rotary.select(slides))
        attended = attention.prompts(q, k, v, slides)
        return constrain(block.output(x, attended), "prompts"), None

    x, _ = model.scan(layer, constrain(model.embed(token_ids), "prompts"))
    x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
    return model.logits(model.final_norm(x))


def completion_hidden(
    model: Decoder, prompts: jax.Array, prompt_mask: jax.Array, completions: jax.Array
) -> jax.Array:
    """Hidden states that predict each completion token, prompts encoded once per group.

    Args:
        model: The policy's decoder.
        prompts, prompt_mask: [P, L].
        completions: [P, G, T]; tokens after a completion's end affect only themselves.

    Returns:
        [P, G, T, D] in the compute dtype, after the final norm.
    """
    p, g, t = completions.shape
    split = split_prompts(prompts, prompt_mask)
    first = jnp.broadcast_to(split.last_token[:, None, None], (p, g, 1))
    inputs = jnp.concatenate((first, completions[..., :-1]), axis=-1)
    positions = split.length[:, None, None] + jnp.arange(t)  # [P, 1, T]
    rotary, prefix_rotary = model.rotary(positions), model.rotary(split.positions)
    attention = model.attention(tree_of(split))

    def layer(block, carry, slides):
        prefix, x = carry
        prefix_q, prefix_k, prefix_v = block.qkv(prefix, prefix_rotary.select(slides))
        q, k, v = block.qkv(x, rotary.select(slides))
        attended = attention.completions(q, (prefix_k, prefix_v), (k, v), slides)
        prefix_attended = attention.prompts(prefix_q, prefix_k, prefix_v, slides)
        prefix = constrain(block.output(prefix, prefix_attended), "prompts")
        x = constrain(block.output(x, attended), "prompts", "samples")
        return (prefix, x), None

    carry = (
        constrain(model.embed(constrain(split.tokens, "prompts")), "prompts"),
        constrain(
            model.embed(constrain(inputs, "prompts", "samples")), "prompts", "samples"
        ),
    )
    (_, x), _ = model.scan(layer, carry)
    return model.final_norm(x)


def teacher_forced(
    policy: Policy,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    completions: jax.Array,
    temperature: float | jax.Array,
    entropy: bool = False,
) -> Any:
    """Log-probs [P, G, T] float32 of the completions' tokens; with `entropy` a pair,
    the second the entropies [P, G, T]. Each device computes those of its prompts.

    Args:
        policy: Its parameters and config.
        prompts, prompt_mask: [P, L].
        completions: [P, G, T].
        temperature: Divides the logits.
    """

    def local_logprobs(policy, prompts, completions):
        model, (ids, mask) = policy.module(), prompts
        return token_logprobs(
            completion_hidden(model, ids, mask, completions),
            model.unembedding_param(),
            completions,
            temperature=temperature,
            softcap=policy.config.logit_softcap,
            chunk_size=chunk_tokens(policy.config.vocab_size, platform()),
            with_entropy=entropy,
        )

    return per_device(local_logprobs, policy, (prompts, prompt_mask), completions)
