"""One decoder for every family: layers stacked, scanned and rematerialised.

A `Policy` is the module split once: a static graph, and a plain dict of parameters
that everything else (optax, orbax, the instrument) sees as a pytree.
The prompt is encoded once per group: all G completions attend to the same keys and
values, in training and in sampling alike.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from grpo_jax.logprobs import soft_capped
from grpo_jax.models.attention import (
    ATTENDED,
    ByLayer,
    RotaryTable,
    rotary_stretch,
    rotary_table,
    rotate,
    within_window,
)
from grpo_jax.models.config import ModelConfig, linear_sizes
from grpo_jax.models.linear import Linear
from grpo_jax.models.lora import LoRALinear
from grpo_jax.models.tree import Tree, TreeAttention
from grpo_jax.parallel.sharding import constrain_params, flatten_rows
from grpo_jax.precision import float32_products


class OffsetRMSNorm(nnx.Module):
    """RMSNorm that multiplies by 1 + its weight, in float32 (Gemma)."""

    def __init__(self, width: int, *, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        weight = 1 + self.scale[...].astype(wide.dtype)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * jnp.expand_dims(weight, range(x.ndim - 1))).astype(self.dtype)


def _norm(
    config: ModelConfig, width: int, rngs: nnx.Rngs
) -> OffsetRMSNorm | nnx.RMSNorm:
    kind = OffsetRMSNorm if config.norm_offset else nnx.RMSNorm
    dtype = jnp.dtype(config.dtype)
    return kind(width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)


def _linear(
    config: ModelConfig,
    name: str,
    bias: bool = False,
    scale: float = 1.0,
    *,
    rngs: nnx.Rngs,
) -> Linear:
    """The linear map `name` of a layer, with LoRA factors if it is one of the targets;
    `scale` multiplies the variance of its initial kernel."""
    c, (inputs, outputs) = config, linear_sizes(config)[name]
    arguments: dict[str, Any] = dict(
        use_bias=bias,
        dtype=jnp.dtype(c.dtype),
        kernel_init=nnx.initializers.variance_scaling(scale, "fan_in", "normal"),
        rngs=rngs,
    )
    if c.lora_rank and name in c.lora_targets:
        factors = dict(rank=c.lora_rank, scale=c.lora_alpha / c.lora_rank)
        return LoRALinear(inputs, outputs, **factors, **arguments)
    return Linear(inputs, outputs, **arguments)


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each behind an RMSNorm, each added back."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, linear = config, partial(_linear, config, rngs=rngs)

        def norm(width):
            return _norm(c, width, rngs)

        self.config = config
        self.attention_norm, self.mlp_norm = norm(c.width), norm(c.width)
        if c.post_norms:
            self.attention_post_norm = norm(c.width)
            self.mlp_post_norm = norm(c.width)
        self.q = linear("q", c.qk_bias)
        self.k = linear("k", c.qk_bias)
        self.v = linear("v", c.qk_bias)
        # Both maps into the residual stream start small, so depth does not add up.
        residual = 1.0 / (2 * c.num_layers)
        self.o = linear("o", c.output_bias, residual)
        self.gate, self.up = linear("gate"), linear("up")
        self.down = linear("down", scale=residual)
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(c.head_dim), norm(c.head_dim)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [N, H d], keys and values [N, KV d] of rows x [N, D]."""
        return self.q(x), self.k(x), self.v(x)

    def gate_and_up(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inputs [N, mlp_width] of the MLP's product, from rows x [N, D]."""
        return self.gate(x), self.up(x)

    def qkv(
        self, x: jax.Array, rotary: RotaryTable
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., D] -> q [..., H, d] and k [..., KV, d], rotated, and v [..., KV, d].

        Works on matrices of rows, as `output` does: the weights' gradient is then one
        plain product. Contracting several axes at once makes XLA copy both factors to a
        transposed layout first, which on a CPU costs as much as the product.
        """
        c = self.config
        normed = flatten_rows(self.attention_norm(x))
        q, k, v = (
            y.reshape(*x.shape[:-1], -1, c.head_dim) for y in self.project(normed)
        )
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotary), rotate(k, rotary), v

    def output(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The layer's output [..., D] from its input x and `attended` [..., H, d]."""
        c = self.config
        stream = flatten_rows(x)
        mixed = self.o(attended.reshape(*stream.shape[:-1], -1))
        stream = stream + (self.attention_post_norm(mixed) if c.post_norms else mixed)
        gate, up = self.gate_and_up(self.mlp_norm(stream))
        gate = jax.nn.silu(gate) if c.activation == "silu" else jax.nn.gelu(gate)
        mlp = self.down(gate * up)
        mlp = self.mlp_post_norm(mlp) if c.post_norms else mlp
        return (stream + mlp).reshape(x.shape)


class Decoder(nnx.Module):
    """Embedding, stacked layers, final norm and unembedding.

    Attributes:
        tail: Parameters of last layers that are apart from `layers`, stacked as theirs,
            so that derivatives along them need none of the layers below; or None.
    """

    tail: Any = None

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_blocks(rngs):
            return Block(config, rngs=rngs)

        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=dtype,
            embedding_init=nnx.initializers.normal(config.width**-0.5),
            rngs=rngs,
        )
        self.layers = stacked_blocks(rngs)
        self.final_norm = _norm(config, config.width, rngs)
        if not config.tie_embeddings:
            init = nnx.initializers.normal(0.02)
            shape = (config.width, config.vocab_size)
            self.unembedding = nnx.Param(init(rngs.params(), shape, jnp.float32))

    def unembedding_param(self) -> jax.Array:
        """The unembedding [D, V], in the dtype of the parameters."""
        if self.config.tie_embeddings:
            return self.embedding.embedding[...].T
        return self.unembedding[...]

    def unembedding_matrix(self) -> jax.Array:
        """The unembedding [D, V], in the compute dtype."""
        return self.unembedding_param().astype(self.config.dtype)

    def embed(self, token_ids: jax.Array, table: jax.Array | None = None) -> jax.Array:
        """Embeddings [..., D] of token ids [...] int32, in the compute dtype.

        Rows are taken first and then cast, so that the gradients of a token's
        occurrences are added up in the dtype of the parameters. In bfloat16 a sum of
        ones stops at 256.

        Args:
            token_ids: [...] int32.
            table: [V, D], the embedding in any dtype; None: the parameter.
        """
        table = self.embedding.embedding[...] if table is None else table
        x = jnp.take(table, token_ids, axis=0).astype(self.config.dtype)
        if not self.config.scale_embedding:
            return x
        return x * jnp.asarray(
            self.config.width**0.5, x.dtype
        )  # rounded as in transformers

    def rotary(self, positions: jax.Array) -> ByLayer:
        """Rotary tables [..., 1, d / 2] at positions [...]."""
        c = self.config
        stretch: jax.Array | np.ndarray | None = None
        if c.rope_scaling == "linear":
            stretch = jnp.full(c.head_dim // 2, c.rope_factor)
        elif c.rope_scaling == "llama3":
            stretch = rotary_stretch(
                c.head_dim,
                c.rope_theta,
                c.rope_factor,
                (c.rope_slow_turns, c.rope_fast_turns),
                c.rope_original_length,
            )
        full = rotary_table(positions, c.head_dim, c.rope_theta, stretch)
        if c.rope_local_theta is None or not c.sliding_layers:
            return ByLayer(full, full)
        return ByLayer(full, rotary_table(positions, c.head_dim, c.rope_local_theta))

    def masks(self, mask: jax.Array, queries: jax.Array, keys: jax.Array) -> ByLayer:
        """Attention masks: `mask` itself, and combined with the sliding window.

        Args:
            mask: [..., L] or [..., S, L] bool.
            queries: [..., S] int32, positions.
            keys: [..., L] int32, positions.
        """
        window = self.config.sliding_window
        if window is None or not self.config.sliding_layers:
            return ByLayer(mask, mask)
        near = within_window(queries, keys, window)
        mask = mask[..., None, :] if mask.ndim < near.ndim else mask
        return ByLayer(jnp.broadcast_to(mask, near.shape), mask & near)

    @property
    def scores(self) -> dict[str, Any]:
        """Keyword arguments of the attention functions: scale and softcap."""
        c = self.config
        scale = None if c.query_scale is None else c.query_scale**-0.5
        return dict(scale=scale, softcap=c.attention_softcap)

    def attention(self, tree: Tree) -> TreeAttention:
        """Attention of a forward pass over prompts and completions."""
        c = self.config
        return TreeAttention(
            tree=tree,
            window=c.sliding_window if c.sliding_layers else None,
            how=c.attention,
            **self.scores,
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        with float32_products(self.config.dtype):
            logits = jnp.matmul(
                hidden, self.unembedding_matrix(), preferred_element_type=jnp.float32
            )
        return soft_capped(logits, self.config.logit_softcap)

    def scan(self, layer: Callable[..., tuple[Any, Any]], carry: Any) -> tuple:
        """Scans layer(block, carry, slides) -> (carry, output) over the stacked layers.

        `slides` is the argument of `ByLayer.select`: traced, or None if no layer's
        window slides. Returns (carry, outputs with a leading axis of layers).
        """
        c = self.config
        graph, stacked = nnx.split(self.layers)
        stacks = [stacked] if self.tail is None else [stacked, self.tail]
        slides = None
        if c.sliding_layers:
            slides = jnp.array([i in c.sliding_layers for i in range(c.num_layers)])

        def body(carry, x):
            params, slides = x
            params = constrain_params(params, gathered_as=c.dtype)
            return layer(nnx.merge(graph, params), carry, slides)

        if self.config.remat != "none":
            policies = jax.checkpoint_policies
            policy = policies.save_only_these_names(ATTENDED)
            if self.config.remat == "dots":
                dots = policies.dots_with_no_batch_dims_saveable
                policy = policies.save_from_both_policies(policy, dots)
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        outputs, first = [], 0
        for stack in stacks:
            end = first + len(jax.tree.leaves(stack)[0])
            here = None if slides is None else slides[first:end]
            with float32_products(c.dtype):
                carry, output = jax.lax.scan(body, carry, (stack, here))
            outputs.append(output)
            first = end
        return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)
