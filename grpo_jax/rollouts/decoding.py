"""The decoder one token at a time: prefill of the prompts, then one step per token."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from grpo_jax.logprobs import soft_capped
from grpo_jax.models.attention import (
    ByLayer,
    Part,
    shared_prefix_attention,
)
from grpo_jax.models.decoder import Block, Decoder
from grpo_jax.models.forward import PromptSplit, tree_of
from grpo_jax.models.lora import LoRALinear
from grpo_jax.parallel.sharding import (
    constrain,
    constrain_params,
    flatten_rows,
    splits_tensor,
)
from grpo_jax.precision import float32_products

Caches = list[jax.Array]  # one per layer


class TokenDecoder(NamedTuple):
    """What every decoding step reads: the model and the prompts' keys and values."""

    model: Decoder
    prompts: PromptSplit
    prefix_keys: Caches  # [P, KV, d, L]
    prefix_values: Caches  # [P, KV, L, d]
    blocks: Sequence[Any]  # one module per layer
    embedding: jax.Array  # [V, D], in the compute dtype
    unembedding: jax.Array  # [D, V], in the compute dtype
    rotary: ByLayer  # tables of positions [T, P, 1], the completions' tokens

    def logits(
        self, token: jax.Array, t: jax.Array, keys: Caches, values: Caches
    ) -> tuple[jax.Array, Caches, Caches]:
        """(logits [P, G, V] of the token after `token`, keys, values).

        Args:
            token: [P, G] int32, the completions' inputs at step t.
            t: [] int32.
            keys: [P, G, KV, d, U] per layer, the caches of U steps, filled below t.
            values: [P, G, KV, U, d] per layer.
        """
        model, prompts = self.model, self.prompts
        rotary = jax.tree.map(lambda x: x[t], self.rotary)
        slots = jnp.arange(keys[0].shape[-1])
        cache_mask = model.masks((slots <= t)[None], t[None], slots)  # [1, U]
        prefix_mask = model.masks(
            prompts.prefix_mask, prompts.length[:, None] + t, prompts.positions
        )
        keys, values = [*keys], [*values]
        x = model.embed(token, self.embedding)  # [P, G, D]
        x = constrain(x, "prompts", "samples")
        with float32_products(model.config.dtype):
            for i, block in enumerate(self.blocks):
                slides = i in model.config.sliding_layers
                q, k, v = block.qkv(x, rotary.select(slides))
                keys[i] = write(keys[i], k[..., None], t, axis=4)
                values[i] = write(values[i], v[:, :, :, None], t, axis=3)
                to_prompt = prefix_mask.select(slides)
                parts = [
                    Part(self.prefix_keys[i], self.prefix_values[i], to_prompt),
                    Part(keys[i], values[i], cache_mask.select(slides)),
                ]
                q = q[:, :, None]
                attended = shared_prefix_attention(q, parts, **model.scores)[:, :, 0]
                x = constrain(block.output(x, attended), "prompts", "samples")
            return self._unembed(x), keys, values

    def _unembed(self, x: jax.Array) -> jax.Array:
        """[P, G, D] -> [P, G, V] float32."""
        hidden = flatten_rows(self.model.final_norm(x))
        logits = jnp.matmul(
            hidden, self.unembedding, preferred_element_type=jnp.float32
        ).reshape(*x.shape[:2], -1)
        # Computed where the unembedding's columns are; a draw needs every column.
        logits = constrain(logits, "prompts", "samples", "vocab")
        logits = constrain(logits, "prompts", "samples")
        return soft_capped(logits, self.model.config.logit_softcap)


def prefill(model: Decoder, prompts: PromptSplit, max_new_tokens: int) -> TokenDecoder:
    """Encodes every prompt once, for all completions of its group.

    Args:
        model: The policy's decoder.
        prompts: Of `split_prompts`.
        max_new_tokens: T, the steps to come.
    """
    keys, values = _encode_prefixes(model, prompts)
    blocks = _unstack(model)
    # Computed outside the loop: inside, XLA repeats it for every layer and row.
    positions = prompts.length[:, None] + jnp.arange(max_new_tokens)[:, None, None]
    return TokenDecoder(
        model=model,
        prompts=prompts,
        prefix_keys=keys,
        prefix_values=values,
        blocks=blocks,
        embedding=model.embedding.embedding[...].astype(model.config.dtype),
        unembedding=model.unembedding_matrix(),
        rotary=model.rotary(positions),
    )


def write(cache: jax.Array, x: jax.Array, t: jax.Array, axis: int) -> jax.Array:
    """The cache [...] with x, of size 1 along `axis`, at index t (scalar) of it."""
    return jax.lax.dynamic_update_slice_in_dim(cache, x, t, axis=axis)


def _encode_prefixes(model: Decoder, prompts: PromptSplit) -> tuple[Caches, Caches]:
    """Each layer's keys [P, KV, d, L] and values [P, KV, L, d] of the prefixes."""
    rotary = model.rotary(prompts.positions)
    attention = model.attention(tree_of(prompts))

    def layer(block, x, slides):
        q, k, v = block.qkv(x, rotary.select(slides))
        attended = attention.prompts(q, k, v, slides)
        x = constrain(block.output(x, attended), "prompts")
        return x, tuple(
            constrain(y, "prompts", "kv_heads")
            for y in (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))
        )

    x = constrain(model.embed(prompts.tokens), "prompts")
    _, (keys, values) = model.scan(layer, x)
    return list(keys), list(values)


def _unstack(model: Decoder) -> list[Any]:
    """One module per layer, its parameters gathered over fsdp.

    Outside the loop over tokens, which should neither slice nor gather the stack at
    every step. Layer by layer, so that no gathered copy of the stack is alive.
    """
    graph, stacked = nnx.split(model.layers)
    dtype = model.config.dtype

    def layer(i):
        sharded = jax.tree.map(lambda x: x[i], stacked)
        block = nnx.merge(graph, constrain_params(sharded, gathered_as=dtype))
        # Over tensor, fusing would mix the columns of different devices.
        if splits_tensor():
            return block
        return _FusedBlock(block, nnx.merge(graph, sharded))

    return [layer(i) for i in range(model.config.num_layers)]


class _FusedBlock:
    """A `Block` whose projections of the same input are one product each: faster for
    the few rows of a decoding step.

    Args:
        block: A `Block` with parameters gathered over fsdp.
        sharded: The same before the gather; kernels are joined first, then gathered.
    """

    def __init__(self, block: Any, sharded: Any):
        self.project = _fuse(block, sharded, ("q", "k", "v"))
        self.gate_and_up = _fuse(block, sharded, ("gate", "up"))
        base: Any = Block  # its methods, with the fused projections
        self.qkv = partial(base.qkv, self)
        self.output = partial(base.output, self)
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def _fuse(
    block: Any, sharded: Any, names: Sequence[str]
) -> Callable[[jax.Array], list[jax.Array]]:
    """Linear maps of one input as one: x [N, D] -> the output of each."""
    linears = [getattr(block, name) for name in names]
    dtype = linears[0].dtype
    kernels = [getattr(sharded, name).kernel[...].astype(dtype) for name in names]
    # Rounded where they are, then gathered.
    kernel = constrain(jnp.concatenate(kernels, axis=1), "embed")
    kernel = constrain(kernel)
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
