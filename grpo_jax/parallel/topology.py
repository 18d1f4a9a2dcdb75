"""Devices that are not there: what a compiler knows of a topology by its name."""

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError, first_line
from grpo_jax.parallel.cards import CARDS, target_config

_GIB = 2**30


class Chip(NamedTuple):
    """Public figures of a chip."""

    memory: int  # bytes that a program has
    link: float  # bytes a second that it can send to its neighbours, all links together
    ghz: float | None  # its clock, from the peak and the size of its matrix units
    platform: str = "tpu"  # as `compiling_for`


# From the pages of cloud.google.com/tpu/docs on each, and NVIDIA's data sheets.
CHIPS = {
    "v5e": Chip(16 * _GIB, 200e9, 1.5),
    "v5p": Chip(95 * _GIB, 600e9, 1.75),
    "v6e": Chip(32 * _GIB, 448e9, None),
    **{name: Chip(card.memory, 450e9, None, "gpu") for name, card in CARDS.items()},
}
_NAME = re.compile(r"([a-z0-9]+):([0-9]+(?:x[0-9]+){0,2})")
_FLAT = ("v5e", "v6e")  # torus of two axes: a number of chips says the shape
_PER_HOST = 8  # GPUs that NVLink joins
# libtpu asks a cloud's metadata server for these, and complains where there is none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Of its memory jax gives a program three quarters, unless one of these says otherwise.
_FRACTION = 0.75
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class Topology(NamedTuple):
    """Chips and how they are linked."""

    name: str
    chip: Chip
    devices: Sequence[Any]  # that programs can be compiled for


def parse_topology(name: str) -> tuple[str, str]:
    """(chip, shape) of a name such as v5e:2x4, v5e:8, v5p:4x4x4 or h100:8.

    Raises:
        ConfigError: it is no such name, or of a chip without public figures here.
    """
    match = _NAME.fullmatch(name)
    if match is None or match.group(1) not in CHIPS:
        raise ConfigError(
            "--topology must be a chip and the shape of its slice, such as v5e:1, "
            "v5e:2x4 or v5p:4x4x4, or how many GPUs, such as h100:8, of the chips "
            f"{', '.join(CHIPS)}, got {name!r}."
        )
    chip, shape = match.groups()
    if CHIPS[chip].platform == "gpu":
        hosts_of_gpus(name, shape)
    return chip, shape


def hosts_of_gpus(name: str, count: str) -> tuple[int, int]:
    """(hosts, GPUs of each) of so many GPUs, in whole hosts of 8 from there on.

    Raises:
        ConfigError: it is no such number.
    """
    gpus = int(count) if count.isdigit() else 0
    if not gpus or (gpus > _PER_HOST and gpus % _PER_HOST):
        raise ConfigError(
            f"--topology {name} must have 1 to {_PER_HOST} GPUs or a multiple of "
            f"{_PER_HOST}, such as h100:16."
        )
    hosts = max(1, gpus // _PER_HOST)
    return hosts, gpus // hosts


def topology(name: str) -> Topology:
    """The topology of a name; its compiler needs no such device: libtpu, or jax's
    plugin for CUDA.

    Raises:
        ConfigError: as `parse_topology`; there is no such compiler; or it refuses this
            shape.
    """
    chip, shape = parse_topology(name)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ConfigError(
            "--topology needs a compiler which is there for x86-64 Linux alone, "
            f"got {platform.machine()} {platform.system()}; plan without it."
        )
    if CHIPS[chip].platform == "gpu":
        return _of_gpus(name, chip, shape)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology needs the TPU compiler, libtpu: pip install 'grpo-jax[aot]'."
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {}
    if shape in ("1", "1x1", "1x1x1"):
        shape, options = "1x1", {"chips_per_host_bounds": (1, 1, 1)}
    elif shape.isdigit() and chip in _FLAT:
        shape = _rectangle(int(shape))
    devices = _described(name, "tpu", f"{chip}:{shape}", "libtpu", options)
    return Topology(name, CHIPS[chip], devices)


def _rectangle(chips: int) -> str:
    """The slice of so many chips that is nearest to a square, its longer side last."""
    power = chips.bit_length() - 1
    return f"{2 ** (power // 2)}x{chips // 2 ** (power // 2)}"


def _of_gpus(name: str, chip: str, shape: str) -> Topology:
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise ConfigError(
            "--topology needs jax's compiler for NVIDIA GPUs, jax-cuda13-plugin with "
            "nvidia-cuda-nvcc and nvidia-nvvm: pip install 'grpo-jax[aot-cuda]'."
        )
    hosts, each = hosts_of_gpus(name, shape)
    options = {
        "target_config": target_config(CARDS[chip]),
        "topology": f"1x{hosts}x{each}",
    }
    devices = _described(name, "cuda", chip, "jax's plugin for CUDA", options)
    memory = round(_fraction() * CHIPS[chip].memory)
    return Topology(name, CHIPS[chip]._replace(memory=memory), devices)


def _fraction() -> float:
    """The share of a GPU's memory that a program has."""
    for name in _FRACTIONS:
        if text := os.environ.get(name):
            try:
                return float(text)
            except ValueError:
                raise ConfigError(f"{name} must be a number, got {text!r}.") from None
    return _FRACTION


def _described(
    name: str, target: str, topology_name: str, compiler: str, options: dict[str, Any]
) -> Sequence[Any]:
    """The devices that the compiler knows by these names."""
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform=target, topology_name=topology_name, **options
        ).devices
    except Exception as error:  # jaxlib's own kind, which has no public name
        raise ConfigError(
            f"--topology {name} is none that {compiler} knows: {first_line(error)}"
        ) from error
