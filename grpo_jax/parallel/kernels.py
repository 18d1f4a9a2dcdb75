"""Kernels on a mesh: the compiler cannot split them, so each device runs its own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from grpo_jax.parallel.sharding import AXES, BATCH_AXES, current_mesh, varying_axes


def is_per_device() -> bool:
    """Whether arrays are one device's prompts and samples: without a mesh, and inside
    `per_device`."""
    mesh = current_mesh()
    if mesh is None:
        return True
    return all(n in mesh.manual_axes or mesh.shape[n] == 1 for n in BATCH_AXES)


def per_head(function: Callable[[Any], Any], by_head: Any) -> Any:
    """function(by_head), run by each device on its heads.

    For kernels, which the compiler cannot split. It is not to be differentiated: a
    rematerialised layer could not keep what is inside.

    Args:
        function: Returns leaves [B, heads, ...].
        by_head: Leaves [B, heads, ...].
    """
    mesh = current_mesh()
    left = set() if mesh is None else {*AXES} - {*mesh.manual_axes}
    if not left:
        return function(by_head)
    spec = PartitionSpec(None, "tensor")
    return jax.shard_map(function, in_specs=(spec,), out_specs=spec, axis_names=left)(
        by_head
    )


def varying_alike(tree: Any) -> Any:
    """Arrays [...] that all differ along the mesh axes along which one of them does."""
    leaves = jax.tree.leaves(tree)
    union = frozenset().union(*map(varying_axes, leaves))

    def alike(x):
        missing = tuple(union - varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(alike, tree) if union else tree


def shape_like(x: jax.Array, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype, differing between devices as x [...] does."""
    kind = jax.typeof(x)
    name = "vma" if hasattr(kind, "vma") else "manual_axis_type"
    return jax.ShapeDtypeStruct(tuple(shape), dtype, **{name: getattr(kind, name)})
