"""LoRA adapters as PEFT writes them: adapter_config.json beside the factors.

A directory of an adapter stands for its base model with the factors added, so it can be
given wherever a model's directory can.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import LINEAR_MAPS, ModelConfig, linear_sizes
from grpo_jax.models.hf_tensors import checkpoint_tensors, open_tensors
from grpo_jax.models.hub import ADAPTER_CONFIG, read_json

_TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT that make another model of the same factors, and when they do not.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    # Others than these change the base's weights too.
    "init_lora_weights": (True, False, None, "gaussian"),
}


class Factor(NamedTuple):
    """One low-rank factor of one layer in an adapter's file."""

    name: str  # in the file
    target: str  # its linear map, of LINEAR_MAPS
    ours: str  # "lora_a" or "lora_b"
    layer: int
    shape: tuple[int, int]  # as stored


def with_adapter(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config of a base model with the LoRA fields of an adapter.

    Raises:
        ConfigError: the adapter is of another kind, or of another model.
    """
    file = folder / ADAPTER_CONFIG
    values = read_json(file)
    for name, plain in _PLAIN.items():
        value = values.get(name, plain[0])
        if not any(type(value) is type(x) and value == x for x in plain):
            raise ConfigError(
                f"{file}: {name} must be {' or '.join(map(repr, plain))}, got "
                f"{value!r}; merge the adapter into its base with PEFT first."
            )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"{file}: r must be a whole number above 0, got {rank!r}.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise ConfigError(f"{file}: lora_alpha must be above 0, got {alpha!r}.")
    if values.get("use_rslora"):  # scaled by alpha / sqrt(rank), not alpha / rank
        alpha *= math.sqrt(rank)
    return dataclasses.replace(
        config,
        lora_rank=rank,
        lora_alpha=float(alpha),
        lora_targets=_targets(config, folder / _TENSORS),
    )


def load_factors(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """`Policy.params` of an adapter, stacked over layers, float32, on the host.

    Args:
        folder: Of the adapter.
        config: From `with_adapter`.

    Raises:
        ConfigError: a factor is missing or has another shape.
    """
    file, arrays = folder / _TENSORS, {}
    with open_tensors(file) as stored:
        names = set(stored.keys())
        for factor in factors_of(config):
            if factor.name not in names:
                raise ConfigError(f"{factor.name} is missing from {file}.")
            x = stored.get_tensor(factor.name)
            if x.shape != factor.shape:
                raise ConfigError(
                    f"{factor.name} must be {list(factor.shape)} by the base model and "
                    f"{ADAPTER_CONFIG}, got {list(x.shape)} in {file}."
                )
            arrays[factor] = np.asarray(x, np.float32).T
    layers: dict[str, dict[str, Any]] = {}
    for target in config.lora_targets:
        for ours in ("lora_a", "lora_b"):
            wanted = target, ours
            parts = [x for f, x in arrays.items() if (f.target, f.ours) == wanted]
            layers.setdefault(target, {})[ours] = np.stack(parts)
    return {"layers": layers}


def factors_of(c: ModelConfig) -> Iterator[Factor]:
    """Every factor of a model with LoRA, by its name in an adapter's file."""
    sizes, rank = linear_sizes(c), c.lora_rank
    for tensor in checkpoint_tensors(c):
        target = tensor.path[1] if tensor.path[0] == "layers" else ""
        if target not in c.lora_targets or tensor.path[-1] != "kernel":
            continue
        assert tensor.layer is not None  # kernels of layers are stacked
        stem = tensor.name.removesuffix(".weight")
        inputs, outputs = sizes[target]
        for ours, theirs, shape in (
            ("lora_a", "lora_A", (rank, inputs)),
            ("lora_b", "lora_B", (outputs, rank)),
        ):
            name = f"{_PREFIX}{stem}.{theirs}.weight"
            yield Factor(name, target, ours, tensor.layer, shape)


def _targets(config: ModelConfig, file: Path) -> tuple[str, ...]:
    """The linear maps that have factors in the file.

    Raises:
        ConfigError: it has other tensors too, or none.
    """
    if not file.exists():
        other = "; save it as safetensors" if [*file.parent.glob("*.bin")] else ""
        raise ConfigError(f"{file} does not exist{other}.")
    every = dataclasses.replace(config, lora_rank=1, lora_targets=LINEAR_MAPS)
    known = {f.name: f.target for f in factors_of(every)}
    with open_tensors(file) as stored:
        names = list(stored.keys())
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{name} in {file} is no factor of a layer's linear map in the base "
                "model; merge the adapter into its base with PEFT first."
            )
    found = {known[name] for name in names}
    if not found:
        raise ConfigError(f"{file} has no factors.")
    return tuple(name for name in LINEAR_MAPS if name in found)
