"""LoRA: linear maps trained through low-rank factors, the base weights frozen.

y = x W + (alpha / rank) (x A) B, with B = 0 at the start, so that training starts from
the base policy (Hu et al. 2021, arXiv:2106.09685). The base is shared with the
reference policy, which takes no further memory.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.hf_tensors import checkpoint_tensors
from grpo_jax.models.linear import Linear

FACTORS = ("lora_a", "lora_b")


class LoRALinear(Linear):
    """A linear map with low-rank factors beside its kernel."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rank: int,
        scale: float,
        rngs: nnx.Rngs,
        **arguments: Any,
    ):
        super().__init__(inputs, outputs, rngs=rngs, **arguments)
        bound = inputs**-0.5
        a = jax.random.uniform(rngs.params(), (inputs, rank), minval=-1, maxval=1)
        self.lora_a = nnx.Param(bound * a)
        self.lora_b = nnx.Param(jnp.zeros((rank, outputs)))
        self.scale = scale

    def low_rank(self, x: jax.Array) -> jax.Array:
        """(alpha / rank) (x A) B of x [..., inputs], in the compute dtype."""
        a, b = (p[...].astype(self.dtype) for p in (self.lora_a, self.lora_b))
        return self.scale * ((x.astype(self.dtype) @ a) @ b)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] -> [..., outputs]."""
        return super().__call__(x) + self.low_rank(x)


def split_factors(params: dict) -> tuple[dict, dict]:
    """(low-rank factors, other parameters), two nested dicts of one."""
    factors, rest = {}, {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner, outer = split_factors(value)
            if inner:
                factors[name] = inner
            if outer:
                rest[name] = outer
        else:
            (factors if name in FACTORS else rest)[name] = value
    return factors, rest


def merge_factors(params: dict, factors: dict, scale: float) -> dict:
    """Base parameters with scale * A B added to each kernel; the sums are float32, or
    wider where the kernel is."""
    result = {}
    for name, value in params.items():
        inner = factors.get(name)
        if inner is None:
            result[name] = value
        elif "lora_a" in inner:
            delta = scale * jnp.matmul(
                inner["lora_a"], inner["lora_b"], precision="highest"
            )
            kernel = value["kernel"]
            wide = jnp.promote_types(kernel.dtype, jnp.float32)
            result[name] = value | {"kernel": kernel.astype(wide) + delta}
        else:
            result[name] = merge_factors(value, inner, scale)
    return result


def without_lora(config: ModelConfig) -> ModelConfig:
    """The config of the base model: LoRA's fields at their defaults."""
    plain = ModelConfig()
    names = ("lora_rank", "lora_alpha", "lora_targets")
    return dataclasses.replace(config, **{n: getattr(plain, n) for n in names})


def save_adapter(
    factors: dict, config: ModelConfig, directory: Path | str, *, base: str | None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them.

    Args:
        factors: `Policy.params` of a policy with LoRA.
        config: Of the policy.
        directory: Made if it does not exist.
        base: Directory or Hub name of the base model, as the file should give it.

    Raises:
        ConfigError: the policy has no LoRA factors.
    """
    from safetensors.numpy import save_file

    if not config.lora_rank:
        raise ConfigError(
            "the policy has no LoRA factors; save the model with save_pretrained."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays, modules = _peft_arrays(factors, config)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [modules[name] for name in config.lora_targets],
    }
    save_file(arrays, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(values, indent=2))


def _peft_arrays(
    factors: dict, config: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by PEFT's names, PEFT's module name of each of our linear maps)."""
    arrays, modules = {}, {}
    for tensor in checkpoint_tensors(config):
        name = tensor.path[1] if tensor.path[0] == "layers" else None
        if name not in config.lora_targets or tensor.path[-1] != "kernel":
            continue
        stem = tensor.name.removesuffix(".weight")
        modules[name] = stem.rpartition(".")[2]
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            factor = np.asarray(factors["layers"][name][ours][tensor.layer])
            key = f"base_model.model.{stem}.{theirs}.weight"
            arrays[key] = np.ascontiguousarray(factor.T)
    return arrays, modules
