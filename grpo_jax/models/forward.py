"""Forward passes of a decoder: logits, hidden states and log-probs of completions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.logprobs import token_logprobs
from grpo_jax.models.attention import causal_attention, shared_prefix_attention
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.policy import Policy
from grpo_jax.parallel.sharding import constrain, per_device


class PromptSplit(NamedTuple):
    """Prompts cut before their last token: the first input of their completions."""

    prefix_mask: jax.Array  # [P, L], the prompt's tokens without its last
    positions: jax.Array  # [P, L]
    last_token: jax.Array  # [P]
    length: jax.Array  # [P], tokens before the last: the position of the last


def split_prompts(prompts: jax.Array, prompt_mask: jax.Array) -> PromptSplit:
    """Finds each prompt's last token, wherever the padding is."""
    mask = prompt_mask.astype(bool)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # [P]
    prefix_mask = mask & (jnp.arange(mask.shape[1]) != last[:, None])
    return PromptSplit(
        prefix_mask,
        _positions(prefix_mask),
        jnp.take_along_axis(prompts, last[:, None], axis=1)[:, 0],
        prefix_mask.sum(1),
    )


def _positions(mask):
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def next_token_logits(
    policy: Policy, token_ids: jax.Array, attention_mask: jax.Array | None = None
) -> jax.Array:
    """Logits of the token after each position, for evaluation and parity checks.

    Args:
        token_ids: [B, L] int32.
        attention_mask: [B, L], 1 on tokens, 0 on padding on either side; None: all 1.

    Returns:
        [B, L, V] float32. Training never forms this array.
    """
    model = policy.module()
    mask = jnp.ones_like(token_ids) if attention_mask is None else attention_mask
    positions = _positions(mask.astype(bool))
    rotary = model.rotary(positions)
    masks = model.masks(mask.astype(bool), positions, positions)

    def layer(block, x, slides):
        q, k, v = block.qkv(x, rotary.of(slides))
        attended = causal_attention(q, k, v, masks.of(slides), **model.scores)
        return constrain(block.output(x, attended), "prompts"), None

    x, _ = model.scan(layer, constrain(model.embed(token_ids), "prompts"))
    return model.logits(model.final_norm(x))


def completion_hidden(
    model: Decoder, prompts: jax.Array, prompt_mask: jax.Array, completions: jax.Array
) -> jax.Array:
    """Hidden states that predict each completion token, prompts encoded once per group.

    Args:
        prompts, prompt_mask: [P, L].
        completions: [P, G, T]; what follows a completion's end is never looked at.

    Returns:
        [P, G, T, D] in the compute dtype, after the final norm.
    """
    p, g, t = completions.shape
    split = split_prompts(prompts, prompt_mask)
    first = jnp.broadcast_to(split.last_token[:, None, None], (p, g, 1))
    inputs = jnp.concatenate((first, completions[..., :-1]), axis=-1)
    positions = split.length[:, None, None] + jnp.arange(t)  # [P, 1, T]
    own_rotary, prefix_rotary = model.rotary(positions), model.rotary(split.positions)
    steps = jnp.arange(t)
    causal = model.masks(jnp.tril(jnp.ones((t, t), bool)), steps, steps)
    to_prefix = model.masks(split.prefix_mask, positions[:, 0], split.positions)
    in_prefix = model.masks(split.prefix_mask, split.positions, split.positions)

    def layer(block, carry, slides):
        prefix, own = carry
        prefix_q, prefix_k, prefix_v = block.qkv(prefix, prefix_rotary.of(slides))
        q, k, v = block.qkv(own, own_rotary.of(slides))
        attended = shared_prefix_attention(
            q,
            prefix_k.transpose(0, 2, 3, 1),
            prefix_v.swapaxes(1, 2),
            to_prefix.of(slides),
            k.transpose(0, 1, 3, 4, 2),
            v.swapaxes(2, 3),
            causal.of(slides),
            **model.scores,
        )
        prefix_attended = causal_attention(
            prefix_q, prefix_k, prefix_v, in_prefix.of(slides), **model.scores
        )
        prefix = constrain(block.output(prefix, prefix_attended), "prompts")
        own = constrain(block.output(own, attended), "prompts", "samples")
        return (prefix, own), None

    carry = (
        constrain(model.embed(constrain(prompts, "prompts")), "prompts"),
        constrain(
            model.embed(constrain(inputs, "prompts", "samples")), "prompts", "samples"
        ),
    )
    (_, own), _ = model.scan(layer, carry)
    return model.final_norm(own)


def teacher_forced(
    policy: Policy, prompts, prompt_mask, completions, temperature, entropy=False
):
    """[P, G, T] log-probs of the completions' tokens (and entropies), each device on
    its own prompts."""

    def own(policy, prompts, completions):
        model = policy.module()
        return token_logprobs(
            completion_hidden(model, *prompts, completions),
            model.unembedding_matrix(),
            completions,
            temperature=temperature,
            softcap=policy.config.logit_softcap,
            with_entropy=entropy,
        )

    return per_device(own, policy, (prompts, prompt_mask), completions)
