"""Hugging Face's model families that a `ModelConfig` covers.

One row per family says which fields of `ModelConfig` it fixes; the other fields are
read from config.json (`hf_config`).
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What all models of a family have in common."""

    architecture: str  # transformers' class
    fixed: Mapping[str, Any]  # fields of ModelConfig
    defaults: Mapping[str, Any]  # of config.json, where a key is absent
    joint_bias: bool = True  # all attention projections have a bias, or none has
    may_slide: bool = True  # layers may have a sliding window
    local_rope: bool = False  # sliding layers have a separate RoPE
    heads_divide_width: bool = False  # transformers requires it

    @property
    def gemma(self) -> bool:
        """Whether this is one of Gemma's generations."""
        return self.fixed["norm_offset"]


_PLAIN = dict(
    activation="silu", norm_offset=False, post_norms=False, scale_embedding=False,
    query_scale=None, attention_softcap=None, logit_softcap=None,
)  # fmt: skip
_GEMMA = dict(
    activation="gelu_tanh", norm_offset=True, post_norms=True, scale_embedding=True
)
_GEMMA_DEFAULTS = dict(
    head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
    tie_word_embeddings=True,
)  # fmt: skip
_SLIDING = dict(sliding_window=4096, max_window_layers=28)

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "llama": Family(
        architecture="LlamaForCausalLM",
        fixed=_PLAIN | dict(qk_norm=False),
        defaults={}, may_slide=False, heads_divide_width=True,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed=_PLAIN | dict(qk_norm=False, qk_bias=True, output_bias=False),
        defaults=_SLIDING, joint_bias=False,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fixed=_PLAIN | dict(qk_norm=True),
        defaults=_SLIDING | dict(head_dim=128),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        fixed=_GEMMA | dict(qk_norm=False),
        defaults=_GEMMA_DEFAULTS
        | dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
        heads_divide_width=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        fixed=_GEMMA | dict(qk_norm=True, attention_softcap=None),
        defaults=_GEMMA_DEFAULTS | dict(rope_theta=1e6, rope_local_base_freq=1e4),
        local_rope=True, heads_divide_width=True,
    ),
})  # fmt: skip


def family_of(config: ModelConfig) -> str:
    """The model_type that a config can be exported as.

    Raises:
        ConfigError: no family fits; the message says what the nearest ones need.
    """
    mismatches = {kind: _mismatches(f, config) for kind, f in FAMILIES.items()}
    fewest = min(len(x) for x in mismatches.values())
    nearest = [kind for kind, x in mismatches.items() if len(x) == fewest]
    if fewest:
        needs = "; ".join(
            f"{kind} needs {', '.join(mismatches[kind])}" for kind in nearest
        )
        raise ConfigError(f"no supported architecture is this model: {needs}.")
    return nearest[0]


def _mismatches(family: Family, c: ModelConfig) -> list[str]:
    """What a config would have to be to belong to the family; empty if it does."""
    values = dataclasses.asdict(c)
    needed = [
        f"{name}={wanted!r} (has {values[name]!r})"
        for name, wanted in family.fixed.items()
        if values[name] != wanted
    ]
    if family.joint_bias and c.qk_bias != c.output_bias:
        needed.append(f"output_bias=qk_bias (has {c.output_bias} and {c.qk_bias})")
    if not family.may_slide and c.sliding_layers:
        needed.append(f"no sliding_layers (has {c.sliding_layers})")
    if family.local_rope != (c.rope_local_theta is not None):
        wanted = "a rope_local_theta" if family.local_rope else "no rope_local_theta"
        needed.append(f"{wanted} (has {c.rope_local_theta})")
    if family.heads_divide_width and c.width % c.num_heads:
        needed.append(f"num_heads dividing width={c.width} (has {c.num_heads})")
    return needed
