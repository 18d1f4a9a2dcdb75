"""Sampling: one prefill per prompt, one compiled loop for all completions.

The loop is one `while_loop` per cache length (32, 64, 128, ... tokens), so that early
tokens do not pay for reading the cache of late ones; each ends as soon as every
completion has. A token's randomness is a function of (key, prompt, sample, token) and
of nothing else, so a sample does not depend on what else is in the batch.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from grpo_jax.logprobs import soft_capped
from grpo_jax.models.attention import causal_attention, shared_prefix_attention
from grpo_jax.models.forward import split_prompts
from grpo_jax.models.lora import LoRALinear
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.token_weights import is_eos
from grpo_jax.parallel.sharding import (
    constrain,
    constrain_params,
    flatten_rows,
    splits_tensor,
)
from grpo_jax.rollouts.draw import _draw
from grpo_jax.rollouts.types import Rollouts

_FIRST_CACHE = 32  # tokens; each next cache is twice as long


def sample(
    policy: Policy,
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    *,
    group_size: int,
    max_new_tokens: int,
    key: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | jax.Array,
    pad_id: int,
    prompt_indices: jax.Array | None = None,
) -> Rollouts:
    """Samples a group of completions for every prompt.

    Args:
        policy: What to sample from.
        prompt_ids: [P, L] int32, padded on either side.
        prompt_mask: [P, L], 1 on tokens; every row holds at least one.
        group_size: G, completions per prompt.
        max_new_tokens: T; a completion without EOS by then is cut there.
        key: One per step, typed: `fold_in(run_key, step)`.
        temperature: Positive; part of the policy, also where log-probs are recomputed.
        top_k, top_p: Truncation of the distribution (evaluation); the log-probs
            returned are those of the truncated, renormalised distribution.
        eos_id: Ends a completion, and is its last token; or several ids that do.
        pad_id: Fills completions after their end.
        prompt_indices: [P] int32 naming the prompts for the randomness, so that a
            prompt gets the same samples in any batch; default 0..P-1.

    Returns:
        `Rollouts` without rewards.

    Raises:
        ValueError: shapes do not fit, or an argument is outside its range.
    """
    if prompt_ids.ndim != 2 or prompt_ids.shape != prompt_mask.shape:
        raise ValueError(
            "prompt_ids and prompt_mask must be [P, L] alike, got "
            f"{prompt_ids.shape} and {prompt_mask.shape}."
        )
    for name, value in (("group_size", group_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; "
            "for greedy decoding use top_k=1."
        )
    if top_k is not None and not 1 <= top_k:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
    if prompt_indices is None:
        prompt_indices = np.arange(prompt_ids.shape[0])
    if np.shape(prompt_indices) != prompt_ids.shape[:1]:
        raise ValueError(
            f"prompt_indices must be [{prompt_ids.shape[0]}], one per prompt, "
            f"got {np.shape(prompt_indices)}."
        )
    return _sample(
        policy,
        jnp.asarray(prompt_ids, jnp.int32),
        jnp.asarray(prompt_mask, jnp.int32),
        jnp.asarray(prompt_indices, jnp.int32),
        key,
        jnp.asarray(temperature, jnp.float32),
        jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32)),
        jnp.asarray(pad_id, jnp.int32),
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        top_p=top_p,
    )


@partial(jax.jit, static_argnames=("group_size", "max_new_tokens", "top_k", "top_p"))
def _sample(
    policy,
    prompts,
    prompt_mask,
    prompt_indices,
    key,
    temperature,
    eos_id,
    pad_id,
    *,
    group_size,
    max_new_tokens,
    top_k,
    top_p,
):
    config, model = policy.config, policy.module()
    num_prompts, g, t_max = prompts.shape[0], group_size, max_new_tokens
    by_prompt = partial(map, lambda x: constrain(x, "prompts"))
    prompts, prompt_mask, prompt_indices = by_prompt(
        (prompts, prompt_mask, prompt_indices)
    )
    split = split_prompts(prompts, prompt_mask)
    prefix_keys, prefix_values = _prefill(model, prompts, split)
    blocks = _unstack(model.layers, config.num_layers)
    unembedding = model.unembedding_matrix()
    sample_keys = jax.vmap(
        lambda i: jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, i)))(
            jnp.arange(g)
        )
    )(prompt_indices)  # [P, G]

    # Made outside the loop: inside, XLA makes it again for every layer and row.
    rotary_by_step = model.rotary(
        split.length[:, None] + jnp.arange(t_max)[:, None, None]
    )

    def step(cache_length, carry):
        t, token, done, keys, values, completions, mask, logprobs = carry
        rotary = jax.tree.map(lambda x: x[t], rotary_by_step)
        slots = jnp.arange(cache_length)
        own_mask = model.masks((slots <= t)[None], t[None], slots)  # [1, U]
        prefix_mask = model.masks(
            split.prefix_mask, split.length[:, None] + t, split.positions
        )
        x = constrain(model.embed(token), "prompts", "samples")  # [P, G, D]
        for i, block in enumerate(blocks):
            slides = i in config.sliding_layers
            q, k, v = block.qkv(x, rotary.of(slides))
            keys[i] = _write(keys[i], k[..., None], t, axis=4)
            values[i] = _write(values[i], v[:, :, :, None], t, axis=3)
            attended = shared_prefix_attention(
                q[:, :, None],
                prefix_keys[i],
                prefix_values[i],
                prefix_mask.of(slides),
                keys[i],
                values[i],
                own_mask.of(slides),
                **model.scores,
            )[:, :, 0]
            x = constrain(block.output(x, attended), "prompts", "samples")
        hidden = flatten_rows(model.final_norm(x))
        logits = jnp.matmul(
            hidden, unembedding, preferred_element_type=jnp.float32
        ).reshape(*token.shape, -1)
        # Made where the unembedding's columns are; a draw sees the whole vocabulary.
        logits = constrain(logits, "prompts", "samples", "vocab")
        logits = constrain(logits, "prompts", "samples")
        logits = soft_capped(logits, config.logit_softcap)
        token, logprob = _draw(sample_keys, t, logits / temperature, top_k, top_p)
        token = jnp.where(done, pad_id, token)
        completions = _write(completions, token[..., None], t, axis=2)
        mask = _write(mask, (~done[..., None]).astype(jnp.int32), t, axis=2)
        logprobs = _write(logprobs, jnp.where(done, 0.0, logprob)[..., None], t, axis=2)
        done = done | is_eos(token, eos_id)
        return t + 1, token, done, keys, values, completions, mask, logprobs

    shape = (num_prompts, g)
    first = jnp.broadcast_to(split.last_token[:, None], shape)
    heads, n = (*shape, config.num_kv_heads), config.num_layers
    dtype = config.compute_dtype
    carry = (
        jnp.zeros((), jnp.int32),
        first,
        jnp.zeros(shape, bool),
        [jnp.zeros((*heads, config.head_dim, 0), dtype)] * n,
        [jnp.zeros((*heads, 0, config.head_dim), dtype)] * n,
        jnp.full((*shape, t_max), pad_id),
        jnp.zeros((*shape, t_max), jnp.int32),
        jnp.zeros((*shape, t_max), jnp.float32),
    )
    cached = ("prompts", "samples", "kv_heads")
    for end in cache_lengths(t_max):
        t, token, done, keys, values, *rest = carry
        keys = [constrain(_lengthen(x, end, axis=4), *cached) for x in keys]
        values = [constrain(_lengthen(x, end, axis=3), *cached) for x in values]
        token, done, *rest = (
            constrain(x, "prompts", "samples") for x in (token, done, *rest)
        )
        carry = jax.lax.while_loop(
            lambda carry, end=end: (carry[0] < end) & ~carry[2].all(),
            partial(step, end),
            (t, token, done, keys, values, *rest),
        )
    completions, mask, logprobs = carry[-3:]
    return Rollouts(prompts, prompt_mask, completions, mask, logprobs)


def cache_lengths(max_new_tokens: int) -> list[int]:
    """The cache lengths a sampling loop goes through, the last being max_new_tokens."""
    lengths, length = [], _FIRST_CACHE
    while length < max_new_tokens:
        lengths.append(length)
        length *= 2
    return [*lengths, max_new_tokens]


def _prefill(model, prompts, split):
    """Each layer's keys [P, KV, d, L] and values [P, KV, L, d] of the prefixes."""

    rotary = model.rotary(split.positions)

    masks = model.masks(split.prefix_mask, split.positions, split.positions)

    def layer(block, x, slides):
        q, k, v = block.qkv(x, rotary.of(slides))
        attended = causal_attention(q, k, v, masks.of(slides), **model.scores)
        x = constrain(block.output(x, attended), "prompts")
        return x, tuple(
            constrain(y, "prompts", "kv_heads")
            for y in (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))
        )

    x = constrain(model.embed(prompts), "prompts")
    _, (keys, values) = model.scan(layer, x)
    return list(keys), list(values)


def _unstack(layers, num_layers):
    """One module per layer: a loop over time should not slice the stack every token,
    nor gather it. Layer by layer: the whole stack is never held beside them."""
    graph, stacked = nnx.split(layers)

    def layer(i):
        cut = jax.tree.map(lambda x: x[i], stacked)
        block = nnx.merge(graph, constrain_params(cut, gathered=True))
        # Side by side, maps that are split over devices would have to be dealt anew.
        return block if splits_tensor() else _FusedBlock(block, nnx.merge(graph, cut))

    return [layer(i) for i in range(num_layers)]


class _FusedBlock:
    """A block whose parallel projections are one product each, for short rows.

    Args:
        block: Its parameters whole.
        cut: The same as they lie; joined before they are gathered.
    """

    def __init__(self, block, cut):
        self.project = _side_by_side(block, cut, ("q", "k", "v"))
        self.gate_and_up = _side_by_side(block, cut, ("gate", "up"))
        self.qkv = partial(type(block).qkv, self)
        self.output = partial(type(block).output, self)
        self._block = block

    def __getattr__(self, name):
        return getattr(self._block, name)


def _side_by_side(block, cut, names):
    """The linear maps of one input as one: x -> their outputs."""
    linears = [getattr(block, name) for name in names]
    kernels = [getattr(cut, name).kernel[...] for name in names]
    dtype = linears[0].dtype
    kernel = constrain(jnp.concatenate(kernels, axis=1).astype(dtype))
    ends = np.cumsum([x.kernel.shape[1] for x in linears])[:-1]
    biases = [x.bias[...] for x in linears if x.bias is not None]
    bias = jnp.concatenate(biases).astype(dtype) if biases else None

    def apply(x):
        y = x @ kernel
        parts = jnp.split(y if bias is None else y + bias, ends, axis=-1)
        return [
            y + linear.low_rank(x) if isinstance(linear, LoRALinear) else y
            for y, linear in zip(parts, linears, strict=True)
        ]

    return apply


def _write(cache, x, t, axis):
    return jax.lax.dynamic_update_slice_in_dim(cache, x, t, axis=axis)


def _lengthen(cache, length, axis):
    padding = [(0, 0)] * cache.ndim
    padding[axis] = (0, length - cache.shape[axis])
    return jnp.pad(cache, padding)
