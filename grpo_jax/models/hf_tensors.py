"""Names of a Hugging Face checkpoint's tensors, and the parameters they are."""

from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError, first_line
from grpo_jax.models.config import ModelConfig


class Tensor(NamedTuple):
    """One tensor of a checkpoint, and the parameter it is."""

    name: str
    path: tuple[str, ...]  # of the parameter
    layer: int | None  # its index along the stacked parameter's first axis
    transposed: bool  # stored as [outputs, inputs]


def open_tensors(file: Path) -> Any:
    """safetensors' reader of a file.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist.") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file} is damaged or cut off: {first_line(error)}."
        ) from error


def checkpoint_tensors(c: ModelConfig) -> list[Tensor]:
    """All tensors of a checkpoint, in the order they are written."""
    embedding = "model.embed_tokens.weight", ("embedding", "embedding")
    tensors = [Tensor(*embedding, layer=None, transposed=False)]
    for i in range(c.num_layers):
        tensors += [
            Tensor(f"model.layers.{i}.{name}", ("layers", *path), i, transposed)
            for name, path, transposed in _layer_tensors(c)
        ]
    final_norm = "model.norm.weight", ("final_norm", "scale")
    tensors.append(Tensor(*final_norm, layer=None, transposed=False))
    if not c.tie_embeddings:
        tensors.append(Tensor("lm_head.weight", ("unembedding",), None, True))
    return tensors


def _layer_tensors(c: ModelConfig) -> list[tuple[str, tuple[str, str], bool]]:
    """(name, path, transposed) of one layer's tensors, both within the layer."""
    tensors: list[tuple[str, tuple[str, str], bool]] = []
    biased = "qkv" * c.qk_bias + "o" * c.output_bias
    for x in "qkvo":
        tensors.append((f"self_attn.{x}_proj.weight", (x, "kernel"), True))
        if x in biased:
            tensors.append((f"self_attn.{x}_proj.bias", (x, "bias"), False))
    norms = {f"self_attn.{x}_norm": f"{x}_norm" for x in "qk" * c.qk_norm}
    tensors += _norm_tensors(norms)
    tensors += [
        (f"mlp.{x}_proj.weight", (x, "kernel"), True) for x in ("gate", "up", "down")
    ]
    norms = {"input_layernorm": "attention_norm"}
    if c.post_norms:
        norms |= {
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    else:
        norms |= {"post_attention_layernorm": "mlp_norm"}
    return tensors + _norm_tensors(norms)


def _norm_tensors(norms: dict[str, str]) -> list[tuple[str, tuple[str, str], bool]]:
    return [
        (f"{theirs}.weight", (ours, "scale"), False) for theirs, ours in norms.items()
    ]
