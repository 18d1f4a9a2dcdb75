"""Hugging Face's config.json read as a `ModelConfig`, and written from one.

Both spellings of the file are read (transformers 4: `torch_dtype`, `rope_theta`,
`rope_scaling`; transformers 5: `dtype`, `rope_parameters`) and written.
"""

from typing import Any, NoReturn

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.families import FAMILIES, Family, family_of

# Keys that change what a model computes, and the values under which they do not.
_NEUTRAL = {
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
}
_GEMMA_WINDOW = 4096  # written without sliding layers: transformers fails on null


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` of a config.json's values; `where` names the file in errors.

    Raises:
        ConfigError: an unsupported architecture, or a feature of one, by its name.
    """
    kind, family = _family(values, where)
    values = {**family.defaults, **values}
    fields = {**_sizes(values, where), **family.fixed}
    fields |= _family_fields(family, values, where)
    _refuse_unsupported(family, values, where)
    try:
        return ModelConfig(
            **fields,
            **_rope(family, values, where),
            **_windows(kind, family, values, fields["num_layers"], where),
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error}") from error


def _family(values: dict[str, Any], where: str) -> tuple[str, Family]:
    """(model_type, its family)."""
    kind, names = values.get("model_type"), values.get("architectures")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or (names and family.architecture not in names):
        supported = ", ".join(f"{f.architecture} ({k})" for k, f in FAMILIES.items())
        only = " of Gemma 3, text-only checkpoints;" if kind == "gemma3" else ""
        raise ConfigError(
            f"{where}: {', '.join(names or ['a model'])} of model_type {kind!r} is not "
            f"supported;{only} supported: {supported}."
        )
    return str(kind), family


def _sizes(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that every config.json spells alike."""
    fields: dict[str, Any] = dict(
        vocab_size=_integer(values, "vocab_size", where),
        num_layers=_integer(values, "num_hidden_layers", where),
        width=_integer(values, "hidden_size", where),
        mlp_width=_integer(values, "intermediate_size", where),
        num_heads=_integer(values, "num_attention_heads", where),
    )
    for name, theirs, default in (
        ("num_kv_heads", "num_key_value_heads", fields["num_heads"]),
        ("head_dim", "head_dim", fields["width"] // max(1, fields["num_heads"])),
        ("max_positions", "max_position_embeddings", 32_768),
    ):
        value = values.get(theirs)
        fields[name] = default if value is None else _integer(values, theirs, where)
    return fields


def _family_fields(
    family: Family, values: dict[str, Any], where: str
) -> dict[str, Any]:
    """Biases, query scale and caps, as far as the family leaves them open."""
    fields: dict[str, Any] = {}
    if family.joint_bias:
        bias = bool(values.get("attention_bias"))
        fields |= dict(qk_bias=bias, output_bias=bias)
    if family.gemma:
        fields["query_scale"] = _integer(values, "query_pre_attn_scalar", where)
        fields["logit_softcap"] = values.get("final_logit_softcapping")
    if "attention_softcap" not in family.fixed:
        fields["attention_softcap"] = values.get("attn_logit_softcapping")
    return fields


def _integer(values: dict[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    if type(value) is not int:
        raise ConfigError(f"{where}: {key} must be a whole number, got {value!r}.")
    return value


def _refuse(
    where: str, key: str, value: Any, why: str = "is not supported"
) -> NoReturn:
    raise ConfigError(f"{where}: {key}={value!r} {why}.")


def _refuse_unsupported(family: Family, values: dict[str, Any], where: str) -> None:
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


def _rope(family: Family, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of RoPE, from either spelling."""
    full, local = _rope_parameters(family, values, where)
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    full = {**full, **scaling, **({"rope_type": kind} if kind else {})}
    kind = full.get("rope_type", full.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        supported = "is not supported, only default, linear and llama3"
        _refuse(where, "rope_type", kind, supported)
    if full.get("partial_rotary_factor") not in (None, 1.0):
        key = "partial_rotary_factor"
        _refuse(where, f"rope_parameters.{key}", full[key])
    default = values.get("rope_theta", 10_000.0)
    fields: dict[str, Any] = dict(rope_theta=float(full.get("rope_theta", default)))
    if family.local_rope:
        theta = local.get("rope_theta", values["rope_local_base_freq"])
        fields["rope_local_theta"] = float(theta)
    return fields | _rope_scaling(kind, full, values, where)


def _rope_parameters(
    family: Family, values: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """rope_parameters of (full attention, sliding attention if it has its own)."""
    parameters = values.get("rope_parameters") or {}
    types = {"full_attention", "sliding_attention"} & parameters.keys()
    if family.local_rope:
        if parameters and not types:
            _refuse(where, "rope_parameters", parameters, "must be one per layer type")
        local = parameters.get("sliding_attention") or {}
        kind = local.get("rope_type", "default")
        if kind != "default":
            _refuse(where, "rope_parameters.sliding_attention.rope_type", kind)
        return parameters.get("full_attention") or {}, local
    if not types:
        return parameters, {}
    given = [parameters[k] for k in types if parameters[k]]
    if any(x != given[0] for x in given):
        _refuse(where, "rope_parameters", parameters)
    return (given[0] if given else {}), {}


def _rope_scaling(
    kind: str, full: dict[str, Any], values: dict[str, Any], where: str
) -> dict[str, Any]:
    """The fields of how RoPE is stretched; none for kind "default"."""
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }[kind]
    missing = [key for key in needed if not isinstance(full.get(key), int | float)]
    if missing:
        _refuse(where, "rope_type", kind, f"needs a number as {', '.join(missing)}")
    fields: dict[str, Any] = {}
    if kind != "default":
        fields |= dict(rope_scaling=kind, rope_factor=float(full["factor"]))
    if kind == "llama3":
        fields |= dict(
            rope_slow_turns=float(full["low_freq_factor"]),
            rope_fast_turns=float(full["high_freq_factor"]),
            rope_original_length=int(
                full.get("original_max_position_embeddings")
                or values["max_position_embeddings"]
            ),
        )
    return fields


def _windows(
    kind: str, family: Family, values: dict[str, Any], num_layers: int, where: str
) -> dict[str, Any]:
    """The fields of sliding windows; none if no layer slides."""
    if not family.may_slide:
        return {}
    window, types = values.get("sliding_window"), values.get("layer_types")
    if not family.gemma and not values.get("use_sliding_window"):
        window = None
    if types is None:
        slides = _default_slides(kind, values, num_layers, window)
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


def _default_slides(
    kind: str, values: dict[str, Any], num_layers: int, window: int | None
) -> list[bool]:
    """Which layers slide if config.json has no layer_types."""
    if kind == "gemma2":
        return [i % 2 == 0 for i in range(num_layers)]
    if kind == "gemma3_text":
        pattern = values.get("sliding_window_pattern", 6)
        return [(i + 1) % pattern != 0 for i in range(num_layers)]
    first = values["max_window_layers"] if window is not None else num_layers
    return [i >= first for i in range(num_layers)]


def config_json(c: ModelConfig, *, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """The values of a config.json that transformers reads as this model.

    Args:
        c: The model's config.
        dtype: Of the stored parameters.
        ids: Special token ids by their keys in the file.

    Raises:
        ConfigError: no supported family fits.
    """
    kind = family_of(c)
    family = FAMILIES[kind]
    values: dict[str, Any] = {
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
        **_rope_json(family, c),
        **ids,
    }
    if family.local_rope:
        values["rope_local_base_freq"] = c.rope_local_theta
    if family.joint_bias:
        values["attention_bias"] = c.qk_bias
    if family.may_slide:
        values |= _windows_json(family, c)
    if not family.gemma:
        return values | {"hidden_act": "silu"}
    return values | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": c.query_scale or c.head_dim,
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.logit_softcap,
    }


def _rope_json(family: Family, c: ModelConfig) -> dict[str, Any]:
    """RoPE in both spellings."""
    scaling: dict[str, Any] = {
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
    parameters = {"rope_theta": c.rope_theta, **scaling}
    if family.local_rope:
        local = {"rope_type": "default", "rope_theta": c.rope_local_theta}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    return {
        "rope_theta": c.rope_theta,
        "rope_scaling": None if c.rope_scaling == "none" else scaling,
        "rope_parameters": parameters,
    }


def _windows_json(family: Family, c: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "layer_types": [
            "sliding_attention" if i in c.sliding_layers else "full_attention"
            for i in range(c.num_layers)
        ]
    }
    window = c.sliding_window if c.sliding_layers else None
    if family.gemma:
        window = window or _GEMMA_WINDOW
    else:
        values["use_sliding_window"] = window is not None
        values["max_window_layers"] = min(c.sliding_layers, default=c.num_layers)
    return values | {"sliding_window": window}
