"""Meshes of devices: which device stands where.

On a torus (TPU) jax's `mesh_utils` finds places where neighbours along an axis are near
each other, and data alone crosses slices. Elsewhere devices stand in order.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from grpo_jax.errors import ConfigError
from grpo_jax.parallel.sharding import AXES, MeshShape


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh | None:
    """A mesh of data * fsdp * tensor of the devices, by default the visible ones; None
    for one device.

    Raises:
        ConfigError: there are fewer devices, or their links do not fit the mesh.
    """
    sizes = tuple(getattr(shape, name) for name in AXES)
    count = math.prod(sizes)
    devices = jax.devices() if devices is None else devices
    if count == 1:
        return None
    if count > len(devices):
        raise _refused(sizes, f"needs {count} devices, got {len(devices)}")
    return _mesh(_placed(sizes, devices))


def single_device_mesh(mesh: Mesh | None) -> Mesh | None:
    """A mesh of one local device, for programs that other processes do not run."""
    return None if mesh is None else mesh_of_one(jax.local_devices()[0])


def mesh_of_one(device: Any) -> Mesh:
    """A mesh of one device."""
    return _mesh(np.array([device]).reshape(1, 1, 1))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def _refused(sizes: Sequence[int], why: str, advice: str = "") -> ConfigError:
    text = ", ".join(f"{n}={size}" for n, size in zip(AXES, sizes, strict=True))
    return ConfigError(f"a mesh of {text} {why}; {advice or 'lower one of them'}.")


def _placed(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices of a mesh, in its shape."""
    count = math.prod(sizes)
    if devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices[:count])
    slices = defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    each = len(devices) // len(slices)
    used = -(-count // each)
    if sizes[0] % used:
        raise _refused(
            sizes,
            f"covers {used} slices of {each} devices",
            f"make data a multiple of {used}: only data crosses slices",
        )
    within = (sizes[0] // used, *sizes[1:])
    parts = [_on_torus(within, slices[i], sizes) for i in sorted(slices)[:used]]
    return np.concatenate(parts)


def _on_torus(
    within: tuple[int, ...], devices: Sequence[Any], sizes: Sequence[int]
) -> np.ndarray:
    """The mesh on one slice, physical axes split where the sizes ask for it."""
    chosen = _box(math.prod(within), devices)
    if chosen is None:
        raise _refused(
            sizes,
            f"needs {math.prod(within)} of the {len(devices)} devices of a torus, "
            "which no box of neighbours has",
            "take a number of devices that divides them",
        )
    return mesh_utils.create_device_mesh(within, chosen, allow_split_physical_axes=True)


def _box(count: int, devices: Sequence[Any]) -> list[Any] | None:
    """`count` devices whose coordinates fill the most compact box at the first corner;
    None if there is none."""
    chips = defaultdict(list)
    for device in devices:
        chips[tuple(device.coords)].append(device)
    axes = [sorted(set(values)) for values in zip(*chips, strict=True)]
    shapes = itertools.product(*(range(1, len(axis) + 1) for axis in axes))
    # The longer side first along x, the order in which devices are listed.
    for shape in sorted(shapes, key=lambda s: (sum(s), s[::-1])):
        corner = [axis[:n] for axis, n in zip(axes, shape, strict=True)]
        inside = set(itertools.product(*corner))
        chosen = [device for device in devices if tuple(device.coords) in inside]
        if len(chosen) == count and inside <= chips.keys():
            return chosen
    return None
