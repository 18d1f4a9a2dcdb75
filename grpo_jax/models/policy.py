"""A `Policy`: a decoder split once into a static graph and a dict of parameters."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.models.config import COMPUTATION, LINEAR_MAPS, ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.lora import merge_factors, split_factors, without_lora
from grpo_jax.models.tree import of_all_modes
from grpo_jax.parallel.sharding import constrain_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder split once: static config and graph, and parameters as plain dicts.

    Attributes:
        config: The decoder's shape and how it computes.
        graphdef: flax's static part of the decoder.
        params: Trained parameters, float32 in training: all of them, or with LoRA its
            low-rank factors.
        frozen: With LoRA the base weights, in any float dtype; else None.
        tail: Of the last layers, where `params` have the others alone; else None.
    """

    config: ModelConfig = dataclasses.field(metadata=dict(static=True))
    graphdef: Any = dataclasses.field(metadata=dict(static=True), repr=False)
    params: Any = dataclasses.field(repr=False)
    frozen: Any = dataclasses.field(default=None, repr=False)
    tail: Any = dataclasses.field(default=None, repr=False)

    def module(self) -> Decoder:
        """The decoder, its parameters outside the layers gathered over fsdp."""
        params = combined_params(self.params, self.frozen)
        outer = {k: v for k, v in params.items() if k != "layers"}  # gathered by `scan`
        params = params | constrain_params(outer, gathered_as=self.config.dtype)
        model = nnx.merge(self.graphdef, params)
        if self.tail is not None:
            model.tail = nnx.data(self.tail)
        return model

    def replace(self, params: Any) -> "Policy":
        """The policy with other trained parameters."""
        return dataclasses.replace(self, params=params)

    def reconfigured(self, **settings: Any) -> "Policy":
        """The same parameters with other config fields of COMPUTATION."""
        config = dataclasses.replace(self.config, **settings)
        other = abstract_policy(config)
        return dataclasses.replace(self, config=other.config, graphdef=other.graphdef)

    def computed_as(self, config: ModelConfig) -> "Policy":
        """The same parameters, computed as another config says."""
        return self.reconfigured(**{n: getattr(config, n) for n in COMPUTATION})

    def with_all_modes(self) -> "Policy":
        """The policy with an attention that has forward mode too."""
        c = self.config
        how = of_all_modes(c.attention, c.head_dim)
        return self if how == c.attention else self.reconfigured(attention=how)


def combined_params(params: Any, frozen: Any) -> Any:
    """One nested dict of two without common leaves; `params` if `frozen` is None."""
    if frozen is None:
        return params
    both = dict(frozen)
    for name, value in params.items():
        both[name] = combined_params(value, frozen[name]) if name in frozen else value
    return both


def init_policy(config: ModelConfig, key: jax.Array) -> Policy:
    """A policy with random float32 parameters; with LoRA the base ones in `frozen`.

    Raises:
        ValueError: the config has no vocabulary.
    """
    if config.vocab_size < 1:
        raise ValueError(
            f"vocab_size must be at least 1 in a model, got {config.vocab_size}; give "
            "the tokenizer's length."
        )
    params, frozen = jax.jit(partial(_new_params, config))(key)
    return dataclasses.replace(abstract_policy(config), params=params, frozen=frozen)


def abstract_policy(config: ModelConfig) -> Policy:
    """A policy whose parameters are `jax.ShapeDtypeStruct`s; its config has the dtype
    that it computes in."""
    config = dataclasses.replace(config, compute_dtype=config.dtype)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(decoder)
    return Policy(config, graphdef, *_parts(config, nnx.to_pure_dict(state)))


def _new_params(config: ModelConfig, key: jax.Array) -> tuple[dict, dict | None]:
    state = nnx.split(Decoder(config, rngs=nnx.Rngs(key)))[1]
    return _parts(config, constrain_params(nnx.to_pure_dict(state)))


def _parts(config: ModelConfig, params: dict) -> tuple[dict, dict | None]:
    """(params, frozen) of a `Policy` from all parameters of a decoder."""
    return split_factors(params) if config.lora_rank else (params, None)


def add_lora(
    policy: Policy,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = LINEAR_MAPS,
    key: jax.Array,
) -> Policy:
    """The policy with low-rank factors to train; its parameters become frozen.

    Args:
        policy: Without factors.
        rank: Of the factors, at least 1.
        alpha: The factors' product is multiplied by alpha / rank.
        targets: Linear maps that get factors, of `LINEAR_MAPS`.
        key: Draws the first factor; the second one is 0.

    Raises:
        ValueError: the policy has factors, or a setting is outside its range.
    """
    if policy.frozen is not None:
        raise ValueError("the policy has LoRA factors already; merge_lora them first.")
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}.")
    config = dataclasses.replace(
        policy.config, lora_rank=rank, lora_alpha=alpha, lora_targets=targets
    )

    def factors(key):  # XLA drops the random base parameters
        return _new_params(config, key)[0]

    adapted = abstract_policy(config)
    return dataclasses.replace(
        adapted, params=jax.jit(factors)(key), frozen=policy.params
    )


def merge_lora(policy: Policy) -> Policy:
    """The policy with its factors added to the kernels: equal up to float32's rounding.

    Its parameters are float32, also of a bfloat16 base: rounded back, most of what the
    factors learnt would be lost.
    """
    if policy.frozen is None:
        return policy
    c = policy.config
    plain = abstract_policy(without_lora(c))
    return plain.replace(
        _merged(policy.frozen, policy.params, c.lora_alpha / c.lora_rank)
    )


@jax.jit
def _merged(frozen: dict, factors: dict, scale: float) -> dict:
    """All parameters of a decoder, at least float32."""

    def widened(x: jax.Array) -> jax.Array:  # [...]
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(widened, merge_factors(frozen, factors, scale))
