"""One decoder for every family: layers stacked, scanned and rematerialised.

A `Policy` is the module split once: a static graph, and a plain dict of float32
parameters that everything else (optax, orbax, the instrument) sees as a pytree.
The prompt is encoded once per group: all G completions attend to the same keys and
values, in training and in sampling alike.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.models.attention import (
    causal_attention,
    rotary_table,
    rotate,
    shared_prefix_attention,
)
from grpo_jax.models.config import ModelConfig


class Block(nnx.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm, each added back."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.compute_dtype)

        def linear(inputs, outputs, bias=False, scale=1.0):
            init = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
            return nnx.Linear(
                inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs
            )

        def norm(width):
            return nnx.RMSNorm(width, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)

        self.config = config
        self.attention_norm, self.mlp_norm = norm(c.width), norm(c.width)
        self.q = linear(c.width, c.num_heads * c.head_dim, c.qk_bias)
        self.k = linear(c.width, c.num_kv_heads * c.head_dim, c.qk_bias)
        self.v = linear(c.width, c.num_kv_heads * c.head_dim, c.qk_bias)
        # Both writers to the residual stream start small, so depth does not add up.
        residual = 1.0 / (2 * c.num_layers)
        self.o = linear(c.num_heads * c.head_dim, c.width, scale=residual)
        self.gate, self.up = (linear(c.width, c.mlp_width) for _ in range(2))
        self.down = linear(c.mlp_width, c.width, scale=residual)
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(c.head_dim), norm(c.head_dim)

    def project(self, x):
        """The three projections of attention, on rows [N, D]."""
        return self.q(x), self.k(x), self.v(x)

    def gate_and_up(self, x):
        return self.gate(x), self.up(x)

    def qkv(self, x, rotary):
        """x [..., D] -> q [..., H, d], k and v [..., KV, d], rotated by `rotary`.

        Matrices of rows, here and below: their weights' gradient is one plain product.
        Contracting several axes at once makes XLA copy both factors to a transposed
        layout first, which on a CPU costs as much as the product.
        """
        c = self.config
        rows = self.attention_norm(x).reshape(-1, c.width)
        q, k, v = (y.reshape(*x.shape[:-1], -1, c.head_dim) for y in self.project(rows))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotary), rotate(k, rotary), v

    def output(self, x, attended):
        """The rest of the layer: x [..., D] and what attention read [..., H, d]."""
        rows = x.reshape(-1, self.config.width)
        rows = rows + self.o(attended.reshape(rows.shape[0], -1))
        gate, up = self.gate_and_up(self.mlp_norm(rows))
        return (rows + self.down(jax.nn.silu(gate) * up)).reshape(x.shape)


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_blocks(rngs):
            return Block(config, rngs=rngs)

        dtype = jnp.dtype(config.compute_dtype)
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=dtype,
            embedding_init=nnx.initializers.normal(config.width**-0.5),
            rngs=rngs,
        )
        self.layers = stacked_blocks(rngs)
        self.final_norm = nnx.RMSNorm(
            config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs
        )
        if not config.tie_embeddings:
            init = nnx.initializers.normal(0.02)
            shape = (config.width, config.vocab_size)
            self.unembedding = nnx.Param(init(rngs.params(), shape, jnp.float32))

    def unembedding_matrix(self) -> jax.Array:
        """[D, V], in the compute dtype."""
        if self.config.tie_embeddings:
            matrix = self.embedding.embedding[...].T
        else:
            matrix = self.unembedding[...]
        return matrix.astype(self.config.compute_dtype)

    def rotary(self, positions):
        return rotary_table(positions, self.config.head_dim, self.config.rope_theta)

    def scan(self, layer, carry):
        """Runs layer(block, carry) -> (carry, output) through the stack."""
        graph, stacked = nnx.split(self.layers)

        def body(carry, params):
            return layer(nnx.merge(graph, params), carry)

        if self.config.remat != "none":
            policy = {
                "full": None,
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            }[self.config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jax.lax.scan(body, carry, stacked)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder split once: static config and graph, and parameters as plain dicts.

    Attributes:
        params: What is trained, float32 in training: all parameters, or with LoRA its
            low-rank factors.
        frozen: With LoRA the base weights, in any float dtype; else None.
    """

    config: ModelConfig = dataclasses.field(metadata=dict(static=True))
    graphdef: Any = dataclasses.field(metadata=dict(static=True))
    params: Any
    frozen: Any = None

    def module(self) -> Decoder:
        return nnx.merge(self.graphdef, merged(self.params, self.frozen))

    def replace(self, params) -> "Policy":
        return dataclasses.replace(self, params=params)


def merged(params: Any, frozen: Any) -> Any:
    """One nested dict of two that share no leaf; `frozen` None: `params` itself."""
    if frozen is None:
        return params
    both = dict(frozen)
    for name, value in params.items():
        both[name] = merged(value, frozen[name]) if name in frozen else value
    return both


def init_policy(config: ModelConfig, key: jax.Array) -> Policy:
    """A policy with fresh random float32 parameters."""

    def build(key):
        return nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(key)))[1])

    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return Policy(config, nnx.split(abstract)[0], jax.jit(build)(key))


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
    rotary = model.rotary(_positions(mask.astype(bool)))

    def layer(block, x):
        q, k, v = block.qkv(x, rotary)
        return block.output(x, causal_attention(q, k, v, mask)), None

    x, _ = model.scan(layer, model.embedding(token_ids))
    return jnp.matmul(
        model.final_norm(x),
        model.unembedding_matrix(),
        preferred_element_type=jnp.float32,
    )


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
    causal = jnp.tril(jnp.ones((t, t), bool))

    def layer(block, carry):
        prefix, own = carry
        prefix_q, prefix_k, prefix_v = block.qkv(prefix, prefix_rotary)
        q, k, v = block.qkv(own, own_rotary)
        attended = shared_prefix_attention(
            q,
            prefix_k.transpose(0, 2, 3, 1),
            prefix_v.swapaxes(1, 2),
            split.prefix_mask,
            k.transpose(0, 1, 3, 4, 2),
            v.swapaxes(2, 3),
            causal,
        )
        prefix_attended = causal_attention(
            prefix_q, prefix_k, prefix_v, split.prefix_mask
        )
        prefix = block.output(prefix, prefix_attended)
        return (prefix, block.output(own, attended)), None

    carry = model.embedding(prompts), model.embedding(inputs)
    (_, own), _ = model.scan(layer, carry)
    return model.final_norm(own)
