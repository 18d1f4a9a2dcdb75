"""Which device stands where in a mesh: tori, parts of them, several slices."""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import jax
import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.parallel.meshes import make_mesh
from grpo_jax.runs.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Device:
    """What `mesh_utils` reads of a device."""

    id: int
    coords: tuple[int, int, int] = (0, 0, 0)
    device_kind: str = "TPU v5p"
    platform: str = "tpu"
    slice_index: int = 0
    core_on_chip: int = 0
    process_index: int = 0


def torus(kind: str, *extents: int, slices: int = 1) -> list[Device]:
    """Devices of slices as a backend lists them: x runs first."""
    corners = [c[::-1] for c in itertools.product(*map(range, extents[::-1]))]
    every = enumerate(itertools.product(range(slices), corners))
    return [Device(i, c, kind, slice_index=part) for i, (part, c) in every]


def meshes(count: int) -> Iterable[MeshConfig]:
    """Every mesh of that many devices."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for data, fsdp in itertools.product(divisors, divisors):
        if count % (data * fsdp) == 0:
            yield MeshConfig(data=data, fsdp=fsdp, tensor=count // (data * fsdp))


def arranged(monkeypatch, devices: list[Device], shape: MeshConfig):
    monkeypatch.setattr(jax, "devices", lambda: devices)
    mesh = make_mesh(shape)
    assert mesh is not None
    assert mesh.devices.shape == (shape.data, shape.fsdp, shape.tensor)
    assert len({d.id for d in mesh.devices.flat}) == mesh.devices.size
    return mesh.devices


@pytest.mark.parametrize(
    ("kind", "extents"),
    [
        ("TPU v5p", (4, 4, 4)),
        ("TPU v4", (2, 2, 4)),
        ("TPU v5 lite", (4, 4, 1)),
        ("TPU v6 lite", (2, 4, 1)),
    ],
    ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)),
)
def test_a_torus_is_arranged_as_any_mesh_of_all_its_devices(monkeypatch, kind, extents):
    devices = torus(kind, *extents)
    for shape in meshes(len(devices)):
        arranged(monkeypatch, devices, shape)


def distance(a: Device, b: Device, size: int = 4) -> int:
    """Links between two chips of a torus of that size along each axis."""
    apart = [abs(i - j) for i, j in zip(a.coords, b.coords, strict=True)]
    return sum(min(n, size - n) for n in apart)


def test_devices_along_tensor_are_neighbours(monkeypatch):
    for row in arranged(
        monkeypatch, torus("TPU v5p", 4, 4, 4), MeshConfig(fsdp=16, tensor=4)
    ).reshape(-1, 4):
        assert {distance(a, b) for a, b in itertools.pairwise(row)} == {1}


@pytest.mark.parametrize("count", [2, 4, 8, 16, 32])
def test_a_part_of_a_torus_is_a_box_of_it(monkeypatch, count):
    for shape in meshes(count):
        found = arranged(monkeypatch, torus("TPU v5p", 4, 4, 4), shape)
        sides = zip(*(d.coords for d in found.flat), strict=True)
        assert math.prod(max(s) - min(s) + 1 for s in sides) == count


def test_a_mesh_that_is_no_box_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="needs 3 of the 4 devices.*divides them"):
        arranged(monkeypatch, torus("TPU v5 lite", 2, 2, 1), MeshConfig(data=3))


def test_more_devices_than_there_are(monkeypatch):
    with pytest.raises(ConfigError, match="data=1, fsdp=8, tensor=1 needs 8.*got 4"):
        arranged(monkeypatch, torus("TPU v4", 2, 2, 1), MeshConfig(fsdp=8))


def test_only_data_crosses_slices(monkeypatch):
    devices = torus("TPU v5 lite", 4, 4, 1, slices=2)
    found = arranged(monkeypatch, devices, MeshConfig(data=4, fsdp=4, tensor=2))
    assert [{d.slice_index for d in part.flat} for part in found] == [
        {0}, {0}, {1}, {1},
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="make data a multiple of 2"):
        arranged(monkeypatch, devices, MeshConfig(fsdp=32))


# Machines of GPUs are slices to jax, and CPU processes from 0.11 on.
@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_elsewhere_devices_stand_in_order(monkeypatch, platform):
    devices = [
        Device(i, device_kind=platform, platform=platform, slice_index=i // 4)
        for i in range(8)
    ]
    found = arranged(monkeypatch, devices, MeshConfig(fsdp=4, tensor=2))
    assert [d.id for d in found.flat] == list(range(8))
