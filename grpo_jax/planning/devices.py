"""Whether this machine has the devices of a mesh, and how much memory they have."""

import dataclasses
import math
import os

import jax

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.flash import HEAD_DIMS
from grpo_jax.parallel.platform import platform
from grpo_jax.parallel.sharding import batch_shards
from grpo_jax.runs.config import MeshConfig, StepBatch


def check_mesh(
    mesh: MeshConfig,
    batch: StepBatch,
    model: ModelConfig,
    *,
    local_devices: bool = True,
) -> None:
    """Refuses a mesh that has no devices, or whose devices would not all have work.

    Args:
        local_devices: The run is on this machine's devices; else only the shape of the
            mesh is checked.

    Raises:
        ConfigError: devices are missing, or left out by one of several processes; or
            the mesh does not divide prompts and samples, or heads.
    """
    sizes = dataclasses.asdict(mesh)
    count = math.prod(sizes.values())
    if count == 1 and (jax.process_count() == 1 or not local_devices):
        return
    text = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if local_devices:
        _check_devices(count, text)
    p, g = batch
    shards = batch_shards(p, g, mesh)
    if math.prod(shards) != mesh.data * mesh.fsdp:
        raise ConfigError(
            f"{text} must split the {p} prompts of a step over data x fsdp = "
            f"{mesh.data * mesh.fsdp} devices, or over one of the two and the "
            f"{g} samples of each over the other; make sampling.prompts a multiple of "
            f"{mesh.data * mesh.fsdp}, or change the mesh."
        )
    for name in ("num_kv_heads", "num_heads"):
        if getattr(model, name) % mesh.tensor:
            raise ConfigError(
                f"mesh.tensor must divide model.{name}={getattr(model, name)}, got "
                f"{mesh.tensor}; lower it and raise mesh.fsdp."
            )


def check_attention(model: ModelConfig) -> None:
    """ConfigError where the model asks for a kernel that its devices do not have."""
    if model.attention != "flash":
        return
    if platform() == "cpu":
        raise ConfigError(
            "model.attention flash is a kernel for TPUs and GPUs, and this machine has "
            "neither; leave it out, and it is taken where it is there."
        )
    if model.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise ConfigError(
            f"model.attention flash is built for a head_dim of {sizes}, and the model "
            f"has {model.head_dim}; choose blocks."
        )


def _check_devices(count: int, text: str) -> None:
    processes, devices = jax.process_count(), jax.devices()
    if processes > 1 and count != len(devices):
        raise ConfigError(
            f"{text} must have all {len(devices)} devices of the {processes} "
            f"processes, got {count}; change one of them."
        )
    if count > len(devices):
        raise ConfigError(
            f"{text} needs {count} devices, and there are {len(devices)} "
            f"({devices[0].device_kind}); lower one of them."
        )


def device_memory() -> int | None:
    """Bytes of one device (of a CPU: of the machine); None if that is unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        if hasattr(os, "sysconf") and all(n in os.sysconf_names for n in names):
            return math.prod(map(os.sysconf, names))
        return None
    return (device.memory_stats() or {}).get("bytes_limit")
