"""Forward passes of a decoder: logits, hidden states and log-probs of completions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from grpo_jax.logprobs import token_logprobs
from grpo_jax.models.attention import causal_attention, shared_prefix_attention
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.policy import Policy
from grpo_jax.parallel.sharding import constrain, per_device


class PromptSplit(NamedTuple):
    """Prompts cut before their last token, which is the first input of completions."""

    prefix_mask: jax.Array  # [P, L] bool, the prompt's tokens without its last
    positions: jax.Array  # [P, L] int32
    last_token: jax.Array  # [P] int32
    length: jax.Array  # [P] int32, tokens before the last: its position


def split_prompts(prompts: jax.Array, prompt_mask: jax.Array) -> PromptSplit:
    """Cuts prompts [P, L], padded on either side, before their last token."""
    mask = prompt_mask.astype(bool)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # [P]
    prefix_mask = mask & (jnp.arange(mask.shape[1]) != last[:, None])
    return PromptSplit(
        prefix_mask,
        _positions(prefix_mask),
        jnp.take_along_axis(prompts, last[:, None], axis=1)[:, 0],
        prefix_mask.sum(1),
    )


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
    positions = _positions(mask.astype(bool))
    rotary = model.rotary(positions)
    masks = model.masks(mask.astype(bool), positions, positions)

    def layer(block, x, slides):
        q, k, v = block.qkv(x, rotary.select(slides))
        attended = causal_attention(q, k, v, masks.select(slides), **model.scores)
        return constrain(block.output(x, attended), "prompts"), None

    x, _ = model.scan(layer, constrain(model.embed(token_ids), "prompts"))
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
    steps = jnp.arange(t)
    causal = model.masks(jnp.tril(jnp.ones((t, t), bool)), steps, steps)
    to_prefix = model.masks(split.prefix_mask, positions[:, 0], split.positions)
    in_prefix = model.masks(split.prefix_mask, split.positions, split.positions)

    def layer(block, carry, slides):
        prefix, x = carry
        prefix_q, prefix_k, prefix_v = block.qkv(prefix, prefix_rotary.select(slides))
        q, k, v = block.qkv(x, rotary.select(slides))
        attended = shared_prefix_attention(
            q,
            prefix_k.transpose(0, 2, 3, 1),
            prefix_v.swapaxes(1, 2),
            to_prefix.select(slides),
            k.transpose(0, 1, 3, 4, 2),
            v.swapaxes(2, 3),
            causal.select(slides),
            **model.scores,
        )
        prefix_attended = causal_attention(
            prefix_q, prefix_k, prefix_v, in_prefix.select(slides), **model.scores
        )
        prefix = constrain(block.output(prefix, prefix_attended), "prompts")
        x = constrain(block.output(x, attended), "prompts", "samples")
        return (prefix, x), None

    carry = (
        constrain(model.embed(constrain(prompts, "prompts")), "prompts"),
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
            with_entropy=entropy,
        )

    return per_device(local_logprobs, policy, (prompts, prompt_mask), completions)
