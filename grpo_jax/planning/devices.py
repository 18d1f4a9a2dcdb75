"""Whether the devices are there, and how much memory they have."""

import dataclasses
import math
import os

import jax

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig
from grpo_jax.parallel.sharding import batch_shards
from grpo_jax.runs.config import (
    MeshConfig,
    SamplingConfig,
)


def check_mesh(
    mesh: MeshConfig,
    sampling: SamplingConfig,
    model: ModelConfig,
    *,
    here: bool = True,
) -> None:
    """ConfigError where the devices are not there (if they should be `here`), or would
    not all have work."""
    sizes = dataclasses.asdict(mesh)
    count = math.prod(sizes.values())
    processes, devices = jax.process_count(), jax.devices()
    if count == 1 and (processes == 1 or not here):
        return
    text = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if here and processes > 1 and count != len(devices):
        raise ConfigError(
            f"{text} must have all {len(devices)} devices of the {processes} "
            f"processes, got {count}; change one of them."
        )
    if here and count > len(devices):
        raise ConfigError(
            f"{text} needs {count} devices, and there are {len(devices)} "
            f"({devices[0].device_kind}); lower one of them."
        )
    p, g = sampling.prompts, sampling.group_size
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


def device_memory() -> int | None:
    """Bytes of one device; on a CPU the machine's; None where it is not known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        known = hasattr(os, "sysconf") and all(n in os.sysconf_names for n in names)
        return math.prod(map(os.sysconf, names)) if known else None
    return (device.memory_stats() or {}).get("bytes_limit")
