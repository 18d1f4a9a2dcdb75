"""Devices that are not there: what a compiler knows of a topology by its name."""

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError, first_line

_GIB = 2**30


class Chip(NamedTuple):
    """Public figures of a chip."""

    memory: int  # bytes
    link: float  # bytes a second that it can send to its neighbours, all links together
    ghz: float | None  # its clock, from the peak and the size of its matrix units


# From the pages of cloud.google.com/tpu/docs on each.
CHIPS = {
    "v5e": Chip(16 * _GIB, 200e9, 1.5),
    "v5p": Chip(95 * _GIB, 600e9, 1.75),
    "v6e": Chip(32 * _GIB, 448e9, None),
}
_NAME = re.compile(r"([a-z0-9]+):([0-9]+(?:x[0-9]+){0,2})")
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


class Topology(NamedTuple):
    """Chips and how they are linked."""

    name: str
    chip: Chip
    devices: Sequence[Any]  # that programs can be compiled for


def parse_topology(name: str) -> tuple[str, str]:
    """(chip, shape) of a name such as v5e:2x4, v5p:4x4x4 or v5e:1.

    Raises:
        ConfigError: it is no such name, or of a chip without public figures here.
    """
    match = _NAME.fullmatch(name)
    if match is None or match.group(1) not in CHIPS:
        raise ConfigError(
            "--topology must be a chip and the shape of its slice, such as v5e:1, "
            f"v5e:2x4 or v5p:4x4x4, of the chips {', '.join(CHIPS)}, got {name!r}."
        )
    return match.group(1), match.group(2)


def topology(name: str) -> Topology:
    """The topology of a name; its compiler is libtpu, which needs no TPU.

    Raises:
        ConfigError: as `parse_topology`; there is no libtpu; or the chip is not built
            in this shape.
    """
    chip, shape = parse_topology(name)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ConfigError(
            "--topology needs the TPU compiler, which is there for x86-64 Linux alone, "
            f"got {platform.machine()} {platform.system()}; plan without it."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology needs the TPU compiler, libtpu: pip install 'grpo-jax[aot]'."
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if shape in ("1", "1x1", "1x1x1"):
        shape, options = "1x1", {"chips_per_host_bounds": (1, 1, 1)}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:{shape}", **options
        )
    except Exception as error:  # jaxlib's own kind, which has no public name
        raise ConfigError(
            f"--topology {name} is none that libtpu knows: {first_line(error)}"
        ) from error
    return Topology(name, CHIPS[chip], described.devices)
