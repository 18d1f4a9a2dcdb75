"""One decoder for every family: layers stacked, scanned and rematerialised.

A `Policy` is the module split once: a static graph, and a plain dict of parameters
that everything else (optax, orbax, the instrument) sees as a pytree.
The prompt is encoded once per group: all G completions attend to the same keys and
values, in training and in sampling alike.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.logprobs import soft_capped, token_logprobs
from grpo_jax.models.attention import (
    ByLayer,
    causal_attention,
    rotary_stretch,
    rotary_table,
    rotate,
    shared_prefix_attention,
    within_window,
)
from grpo_jax.models.config import LINEAR_MAPS, ModelConfig
from grpo_jax.models.lora import LoRALinear, merge_factors, split_factors, without_lora
from grpo_jax.models.sharding import constrain, constrain_params, per_device, rows


class OffsetRMSNorm(nnx.Module):
    """RMSNorm that multiplies by 1 + its weight, in float32 (Gemma)."""

    def __init__(self, width: int, *, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        weight = 1 + self.scale[...].astype(wide.dtype)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * jnp.expand_dims(weight, range(x.ndim - 1))).astype(self.dtype)


def _norm(config: ModelConfig, width: int, rngs: nnx.Rngs):
    kind = OffsetRMSNorm if config.norm_offset else nnx.RMSNorm
    dtype = jnp.dtype(config.compute_dtype)
    return kind(width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each behind an RMSNorm, each added back."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.compute_dtype)

        def linear(name, inputs, outputs, bias=False, scale=1.0):
            init = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
            kind, factors = nnx.Linear, {}
            if c.lora_rank and name in c.lora_targets:
                kind = LoRALinear
                factors = dict(rank=c.lora_rank, scale=c.lora_alpha / c.lora_rank)
            return kind(
                inputs,
                outputs,
                use_bias=bias,
                dtype=dtype,
                kernel_init=init,
                rngs=rngs,
                **factors,
            )

        def norm(width):
            return _norm(c, width, rngs)

        self.config = config
        self.attention_norm, self.mlp_norm = norm(c.width), norm(c.width)
        if c.post_norms:
            self.attention_post_norm = norm(c.width)
            self.mlp_post_norm = norm(c.width)
        self.q = linear("q", c.width, c.num_heads * c.head_dim, c.qk_bias)
        self.k = linear("k", c.width, c.num_kv_heads * c.head_dim, c.qk_bias)
        self.v = linear("v", c.width, c.num_kv_heads * c.head_dim, c.qk_bias)
        # Both writers to the residual stream start small, so depth does not add up.
        residual = 1.0 / (2 * c.num_layers)
        self.o = linear("o", c.num_heads * c.head_dim, c.width, c.output_bias, residual)
        self.gate, self.up = (linear(n, c.width, c.mlp_width) for n in ("gate", "up"))
        self.down = linear("down", c.mlp_width, c.width, scale=residual)
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
        normed = rows(self.attention_norm(x))
        q, k, v = (
            y.reshape(*x.shape[:-1], -1, c.head_dim) for y in self.project(normed)
        )
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotary), rotate(k, rotary), v

    def output(self, x, attended):
        """The rest of the layer: x [..., D] and what attention read [..., H, d]."""
        c = self.config
        stream = rows(x)
        read = self.o(attended.reshape(*stream.shape[:-1], -1))
        stream = stream + (self.attention_post_norm(read) if c.post_norms else read)
        gate, up = self.gate_and_up(self.mlp_norm(stream))
        gate = jax.nn.silu(gate) if c.activation == "silu" else jax.nn.gelu(gate)
        made = self.down(gate * up)
        made = self.mlp_post_norm(made) if c.post_norms else made
        return (stream + made).reshape(x.shape)


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
        self.final_norm = _norm(config, config.width, rngs)
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

    def embed(self, token_ids):
        """[...] -> [..., D], in the compute dtype."""
        x = self.embedding(token_ids)
        if not self.config.scale_embedding:
            return x
        return x * jnp.asarray(self.config.width**0.5, x.dtype)  # rounded, as theirs

    def rotary(self, positions) -> ByLayer:
        """Rotary tables at positions [...]."""
        c, stretch = self.config, None
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
        whole = rotary_table(positions, c.head_dim, c.rope_theta, stretch)
        if c.rope_local_theta is None or not c.sliding_layers:
            return ByLayer(whole, whole)
        return ByLayer(whole, rotary_table(positions, c.head_dim, c.rope_local_theta))

    def masks(self, mask, queries, keys) -> ByLayer:
        """`mask`, and with the sliding window on top, for positions queries and keys.

        mask: [..., L] or [..., S, L] bool; queries: [..., S]; keys: [..., L].
        """
        window = self.config.sliding_window
        if window is None or not self.config.sliding_layers:
            return ByLayer(mask, mask)
        near = within_window(queries, keys, window)
        mask = mask[..., None, :] if mask.ndim < near.ndim else mask
        return ByLayer(jnp.broadcast_to(mask, near.shape), mask & near)

    @property
    def scores(self) -> dict[str, float | None]:
        """How attention makes its scores."""
        c = self.config
        scale = None if c.query_scale is None else c.query_scale**-0.5
        return dict(scale=scale, softcap=c.attention_softcap)

    def logits(self, hidden):
        """[..., D] -> [..., V] float32."""
        logits = jnp.matmul(
            hidden, self.unembedding_matrix(), preferred_element_type=jnp.float32
        )
        return soft_capped(logits, self.config.logit_softcap)

    def scan(self, layer, carry):
        """Runs layer(block, carry, slides) -> (carry, output) through the stack.

        `slides`, for `ByLayer.of`, rides along as data; None where no layer does.
        """
        c = self.config
        graph, stacked = nnx.split(self.layers)
        slides = None
        if c.sliding_layers:
            slides = jnp.array([i in c.sliding_layers for i in range(c.num_layers)])

        def body(carry, x):
            params, slides = x
            params = constrain_params(params, gathered=True)
            return layer(nnx.merge(graph, params), carry, slides)

        if self.config.remat != "none":
            policy = {
                "full": None,
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            }[self.config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jax.lax.scan(body, carry, (stacked, slides))


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
        params = merged(self.params, self.frozen)
        outer = {k: v for k, v in params.items() if k != "layers"}  # `scan` does those
        params = params | constrain_params(outer, gathered=True)
        return nnx.merge(self.graphdef, params)

    def replace(self, params) -> "Policy":
        return dataclasses.replace(self, params=params)

    def reconfigured(self, **settings: Any) -> "Policy":
        """The same parameters under other settings of how to compute: compute_dtype,
        remat."""
        config = dataclasses.replace(self.config, **settings)
        other = abstract_policy(config)
        return dataclasses.replace(other, params=self.params, frozen=self.frozen)


def merged(params: Any, frozen: Any) -> Any:
    """One nested dict of two that share no leaf; `frozen` None: `params` itself."""
    if frozen is None:
        return params
    both = dict(frozen)
    for name, value in params.items():
        both[name] = merged(value, frozen[name]) if name in frozen else value
    return both


def init_policy(config: ModelConfig, key: jax.Array) -> Policy:
    """A policy with fresh random float32 parameters, LoRA's factors apart."""

    params, frozen = jax.jit(partial(_new_params, config))(key)
    return dataclasses.replace(abstract_policy(config), params=params, frozen=frozen)


def abstract_policy(config: ModelConfig) -> Policy:
    """A policy with `jax.ShapeDtypeStruct`s for parameters."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(decoder)
    return Policy(config, graphdef, *_parts(config, nnx.to_pure_dict(state)))


def _new_params(config, key):
    state = nnx.split(Decoder(config, rngs=nnx.Rngs(key)))[1]
    return _parts(config, constrain_params(nnx.to_pure_dict(state)))


def _parts(config, params):
    """(params, frozen) of a `Policy`, from all of a decoder's."""
    return split_factors(params) if config.lora_rank else (params, None)


def add_lora(
    policy: Policy,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = LINEAR_MAPS,
    key: jax.Array,
) -> Policy:
    """The policy with low-rank factors to train beside its own, frozen, parameters.

    Raises:
        ValueError: it has some already, or a setting is outside its range.
    """
    if policy.frozen is not None:
        raise ValueError("the policy has LoRA factors already; merge_lora them first.")
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}.")
    config = dataclasses.replace(
        policy.config, lora_rank=rank, lora_alpha=alpha, lora_targets=tuple(targets)
    )

    def factors(key):  # the rest of the random parameters is never made
        return _new_params(config, key)[0]

    adapted = abstract_policy(config)
    return dataclasses.replace(
        adapted, params=jax.jit(factors)(key), frozen=policy.params
    )


def merge_lora(policy: Policy) -> Policy:
    """A policy without factors that computes the same, up to rounding."""
    if policy.frozen is None:
        return policy
    c = policy.config
    merge = jax.jit(partial(merge_factors, scale=c.lora_alpha / c.lora_rank))
    plain = abstract_policy(without_lora(c))
    return plain.replace(merge(policy.frozen, policy.params))


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
