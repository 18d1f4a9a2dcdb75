"""Hugging Face's model families: their config.json and tensor names, and ours.

One row per family says which fields of `ModelConfig` it fixes; everything else is read
from config.json. Both spellings of that file are read (transformers 4: `torch_dtype`,
`rope_theta`, `rope_scaling`; transformers 5: `dtype`, `rope_parameters`) and written.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What all models of a family have in common."""

    architecture: str  # transformers' class
    fixed: Mapping[str, Any]  # fields of ModelConfig
    defaults: Mapping[str, Any]  # of config.json, where a key is absent
    one_bias: bool = True  # attention's biases come all together or not at all
    slides: bool = True  # some layers may have a sliding window
    local_rope: bool = False  # sliding layers have a RoPE of their own
    whole_heads: bool = False  # transformers wants num_heads to divide width

    @property
    def gemma(self) -> bool:
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
        defaults={}, slides=False, whole_heads=True,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed=_PLAIN | dict(qk_norm=False, qk_bias=True, output_bias=False),
        defaults=_SLIDING, one_bias=False,
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
        whole_heads=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        fixed=_GEMMA | dict(qk_norm=True, attention_softcap=None),
        defaults=_GEMMA_DEFAULTS | dict(rope_theta=1e6, rope_local_base_freq=1e4),
        local_rope=True, whole_heads=True,
    ),
})  # fmt: skip

# Keys that change what a model computes, and the values under which they do not.
_NEUTRAL = {
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
}


class Tensor(NamedTuple):
    """One tensor of a checkpoint, and its place among the parameters."""

    name: str
    path: tuple[str, ...]
    layer: int | None  # its index along the stacked leaf's first axis
    transposed: bool  # theirs is [outputs, inputs]


def model_config(values: dict, where: str) -> ModelConfig:
    """config.json as a `ModelConfig`; `where` names the file in errors.

    Raises:
        ConfigError: an unsupported architecture, or a feature of one, by its name.
    """
    kind, names = values.get("model_type"), values.get("architectures")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or (names and family.architecture not in names):
        supported = ", ".join(f"{f.architecture} ({k})" for k, f in FAMILIES.items())
        only = " of Gemma 3, text-only checkpoints;" if kind == "gemma3" else ""
        raise ConfigError(
            f"{where}: {', '.join(names or ['a model'])} of model_type {kind!r} is not "
            f"supported;{only} supported: {supported}."
        )
    read = {**family.defaults, **values}
    fields: dict[str, Any] = dict(
        vocab_size=_whole(read, "vocab_size", where),
        num_layers=_whole(read, "num_hidden_layers", where),
        width=_whole(read, "hidden_size", where),
        mlp_width=_whole(read, "intermediate_size", where),
        num_heads=_whole(read, "num_attention_heads", where),
    )
    for name, theirs, default in (
        ("num_kv_heads", "num_key_value_heads", fields["num_heads"]),
        ("head_dim", "head_dim", fields["width"] // max(1, fields["num_heads"])),
        ("max_positions", "max_position_embeddings", 32_768),
    ):
        value = read.get(theirs)
        fields[name] = default if value is None else _whole(read, theirs, where)
    fields |= family.fixed
    if family.one_bias:
        bias = bool(read.get("attention_bias"))
        fields |= dict(qk_bias=bias, output_bias=bias)
    if family.gemma:
        fields["query_scale"] = _whole(read, "query_pre_attn_scalar", where)
        fields["logit_softcap"] = read.get("final_logit_softcapping")
    if "attention_softcap" not in family.fixed:
        fields["attention_softcap"] = read.get("attn_logit_softcapping")
    _refuse_what_we_lack(family, read, where)
    try:
        return ModelConfig(
            **fields,
            **_rope(family, read, where),
            **_windows(kind, family, read, fields["num_layers"], where),
            norm_eps=float(read.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(read.get("tie_word_embeddings", False)),
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error}") from error


def _whole(values, key, where):
    value = values.get(key)
    if type(value) is not int:
        raise ConfigError(f"{where}: {key} must be a whole number, got {value!r}.")
    return value


def _refuse(where, key, value, why="is not supported"):
    raise ConfigError(f"{where}: {key}={value!r} {why}.")


def _refuse_what_we_lack(family, values, where):
    for key, value in values.items():
        neutral = (None, *_NEUTRAL[key]) if key in _NEUTRAL else None
        if (neutral and value not in neutral) or ("expert" in key and value):
            _refuse(where, key, value)
    act = "hidden_activation" if family.gemma else "hidden_act"
    wanted = "gelu_pytorch_tanh" if family.gemma else "silu"
    if values.get(act) not in (None, wanted):
        _refuse(where, act, values[act], f"is not supported, only {wanted!r}")
    if family.local_rope and values.get("attn_logit_softcapping") is not None:
        key = "attn_logit_softcapping"
        _refuse(where, key, values[key], "is not what transformers computes either")


def _rope(family, values, where) -> dict[str, Any]:
    """The fields of RoPE, from either spelling."""
    parameters = values.get("rope_parameters") or {}
    nested = {"full_attention", "sliding_attention"} & parameters.keys()
    if nested and not family.local_rope:
        kinds = [parameters[k] for k in nested if parameters[k]]
        if any(kind != kinds[0] for kind in kinds):
            _refuse(where, "rope_parameters", parameters)
        parameters, nested = kinds[0] if kinds else {}, set()
    if parameters and not nested and family.local_rope:
        _refuse(where, "rope_parameters", parameters, "must be one per layer type")
    whole, local = parameters, {}
    if family.local_rope:
        whole = parameters.get("full_attention") or {}
        local = parameters.get("sliding_attention") or {}
        kind = local.get("rope_type", "default")
        if kind != "default":
            _refuse(where, "rope_parameters.sliding_attention.rope_type", kind)
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    whole = {**whole, **scaling, **({"rope_type": kind} if kind else {})}
    kind = whole.get("rope_type", whole.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        supported = "is not supported, only default, linear and llama3"
        _refuse(where, "rope_type", kind, supported)
    if whole.get("partial_rotary_factor") not in (None, 1.0):
        key = "partial_rotary_factor"
        _refuse(where, f"rope_parameters.{key}", whole[key])
    default = values.get("rope_theta", 10_000.0)
    fields: dict[str, Any] = dict(rope_theta=float(whole.get("rope_theta", default)))
    if family.local_rope:
        theta = local.get("rope_theta", values["rope_local_base_freq"])
        fields["rope_local_theta"] = float(theta)
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }[kind]
    missing = [key for key in needed if not isinstance(whole.get(key), int | float)]
    if missing:
        _refuse(where, "rope_type", kind, f"needs a number as {', '.join(missing)}")
    if kind != "default":
        fields |= dict(rope_scaling=kind, rope_factor=float(whole["factor"]))
    if kind == "llama3":
        fields |= dict(
            rope_slow_turns=float(whole["low_freq_factor"]),
            rope_fast_turns=float(whole["high_freq_factor"]),
            rope_original_length=int(
                whole.get("original_max_position_embeddings")
                or values["max_position_embeddings"]
            ),
        )
    return fields


def _windows(kind, family, values, num_layers, where) -> dict[str, Any]:
    """The fields of sliding windows."""
    if not family.slides:
        return {}
    window, types = values.get("sliding_window"), values.get("layer_types")
    if not family.gemma and not values.get("use_sliding_window"):
        window = None
    if types is None:
        if kind == "gemma2":
            slides = [i % 2 == 0 for i in range(num_layers)]
        elif kind == "gemma3_text":
            pattern = values.get("sliding_window_pattern", 6)
            slides = [(i + 1) % pattern != 0 for i in range(num_layers)]
        else:
            first = values["max_window_layers"] if window is not None else num_layers
            slides = [i >= first for i in range(num_layers)]
    else:
        other = sorted({*types} - {"full_attention", "sliding_attention"})
        if other:
            _refuse(where, "layer_types", other[0])
        if len(types) != num_layers:
            _refuse(where, "layer_types", types, f"must have {num_layers} entries")
        slides = [x == "sliding_attention" for x in types]
    layers = tuple(i for i in range(num_layers) if slides[i])
    if layers and window is None:
        _refuse(where, "sliding_window", window, "with sliding layers has no meaning")
    return dict(sliding_window=window, sliding_layers=layers) if layers else {}


def family_of(config: ModelConfig) -> str:
    """The model_type that a config can be exported as.

    Raises:
        ConfigError: none fits; says what the nearest ones would need.
    """
    lacks = {kind: _lacks(family, config) for kind, family in FAMILIES.items()}
    fewest = min(len(x) for x in lacks.values())
    nearest = [kind for kind, x in lacks.items() if len(x) == fewest]
    if fewest:
        needs = "; ".join(f"{kind} needs {', '.join(lacks[kind])}" for kind in nearest)
        raise ConfigError(f"no supported architecture is this model: {needs}.")
    return nearest[0]


def _lacks(family, c):
    values = dataclasses.asdict(c)
    lacks = [
        f"{name}={wanted!r} (has {values[name]!r})"
        for name, wanted in family.fixed.items()
        if values[name] != wanted
    ]
    if family.one_bias and c.qk_bias != c.output_bias:
        lacks.append(f"output_bias=qk_bias (has {c.output_bias} and {c.qk_bias})")
    if not family.slides and c.sliding_layers:
        lacks.append(f"no sliding_layers (has {c.sliding_layers})")
    if family.local_rope != (c.rope_local_theta is not None):
        wanted = "a rope_local_theta" if family.local_rope else "no rope_local_theta"
        lacks.append(f"{wanted} (has {c.rope_local_theta})")
    if family.whole_heads and c.width % c.num_heads:
        lacks.append(f"num_heads dividing width={c.width} (has {c.num_heads})")
    return lacks


def config_json(c: ModelConfig, *, dtype: str, ids: dict[str, Any]) -> dict:
    """What transformers reads as this model; `ids` are its special tokens'."""
    kind = family_of(c)
    family = FAMILIES[kind]
    rope: dict[str, Any] = {
        "none": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": c.rope_factor},
        "llama3": {
            "rope_type": "llama3",
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_slow_turns,
            "high_freq_factor": c.rope_fast_turns,
            "original_max_position_embeddings": c.rope_original_length,
        },
    }[c.rope_scaling]
    values = {
        "architectures": [family.architecture],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_theta": c.rope_theta,
        "rope_scaling": None if c.rope_scaling == "none" else rope,
        "rope_parameters": {"rope_theta": c.rope_theta, **rope},
        **ids,
    }
    if family.local_rope:
        local = {"rope_type": "default", "rope_theta": c.rope_local_theta}
        values["rope_local_base_freq"] = c.rope_local_theta
        values["rope_parameters"] = {
            "full_attention": values["rope_parameters"],
            "sliding_attention": local,
        }
    if family.one_bias:
        values["attention_bias"] = c.qk_bias
    if family.slides:
        values["layer_types"] = [
            "sliding_attention" if i in c.sliding_layers else "full_attention"
            for i in range(c.num_layers)
        ]
        window = c.sliding_window if c.sliding_layers else None
        if family.gemma:
            window = window or 4096  # theirs fails without one, even unused
        else:
            values["use_sliding_window"] = window is not None
            values["max_window_layers"] = min(c.sliding_layers, default=c.num_layers)
        values["sliding_window"] = window
    if family.gemma:
        values |= {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": c.query_scale or c.head_dim,
            "attn_logit_softcapping": c.attention_softcap,
            "final_logit_softcapping": c.logit_softcap,
        }
    else:
        values["hidden_act"] = "silu"
    return values


def tensors(c: ModelConfig) -> list[Tensor]:
    """All tensors of a checkpoint, in the order they are written."""
    found = [
        Tensor("model.embed_tokens.weight", ("embedding", "embedding"), None, False)
    ]
    for i in range(c.num_layers):

        def add(theirs, ours, leaf, transposed=False, i=i):
            name = f"model.layers.{i}.{theirs}"
            found.append(Tensor(name, ("layers", ours, leaf), i, transposed))

        biased = "qkv" * c.qk_bias + "o" * c.output_bias
        for x in "qkvo":
            add(f"self_attn.{x}_proj.weight", x, "kernel", True)
            if x in biased:
                add(f"self_attn.{x}_proj.bias", x, "bias")
        for x in "qk" * c.qk_norm:
            add(f"self_attn.{x}_norm.weight", f"{x}_norm", "scale")
        for x in ("gate", "up", "down"):
            add(f"mlp.{x}_proj.weight", x, "kernel", True)
        norms = {"input_layernorm": "attention_norm"}
        if c.post_norms:
            norms |= {
                "post_attention_layernorm": "attention_post_norm",
                "pre_feedforward_layernorm": "mlp_norm",
                "post_feedforward_layernorm": "mlp_post_norm",
            }
        else:
            norms |= {"post_attention_layernorm": "mlp_norm"}
        for theirs, ours in norms.items():
            add(f"{theirs}.weight", ours, "scale")
    found.append(Tensor("model.norm.weight", ("final_norm", "scale"), None, False))
    if not c.tie_embeddings:
        found.append(Tensor("lm_head.weight", ("unembedding",), None, True))
    return found
