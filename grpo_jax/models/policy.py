"""A `Policy`: a decoder split once into a static graph and a dict of parameters."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx

from grpo_jax.models.config import LINEAR_MAPS, ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.lora import merge_factors, split_factors, without_lora
from grpo_jax.parallel.sharding import constrain_params


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
        params = combined_params(self.params, self.frozen)
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


def combined_params(params: Any, frozen: Any) -> Any:
    """One nested dict of two that share no leaf; `frozen` None: `params` itself."""
    if frozen is None:
        return params
    both = dict(frozen)
    for name, value in params.items():
        both[name] = combined_params(value, frozen[name]) if name in frozen else value
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
