"""Sharding of arrays over a mesh of devices: one table of rules, and its uses.

A mesh has the axes data, fsdp and tensor. Arrays are described by logical axes, which
`RULES` maps to mesh axes. Prompts are split over data and fsdp together; if there are
too few of them, the samples of each prompt are split over the mesh axes that are left.
An axis that its mesh axis does not divide is replicated. Without a mesh every function
is a no-op.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from grpo_jax.parallel.gathers import gathered, gathered_table, rounded

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis; logical axes that are not listed are replicated.
RULES = {
    "vocab": "tensor",
    "heads": "tensor",  # of queries, with their head_dim in a kernel
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",  # of parameters; gathered for each use
}

# (inputs, outputs) of each linear map.
_LINEAR = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}

_PROMPT, _GROUP = ("prompts",), ("prompts", "samples")
# Logical axes of the fields of rollouts and of training batches.
_FIELDS = {
    "prompts": _PROMPT,
    "prompt_mask": _PROMPT,
    "weights": _PROMPT,
    "shaped_rewards": _GROUP,
    "completions": _GROUP,
    "completion_mask": _GROUP,
    "behaviour_logprobs": _GROUP,
    "rewards": _GROUP,
    "solving": _GROUP,
    "added_rewards": _GROUP,
    "old_logprobs": _GROUP,
    "reference_logprobs": _GROUP,
    "token_weights": _GROUP,
}


class MeshShape(Protocol):
    """Numbers of devices along each mesh axis."""

    @property
    def data(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def tensor(self) -> int: ...


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Sets the mesh within the context; None leaves it as it is."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def current_mesh() -> AbstractMesh | None:
    """The abstract mesh in context, if it has the axes of this module; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh is not None and mesh.axis_names == AXES else None


def _sizes(mesh: AbstractMesh) -> dict[str, int]:
    """Devices along each mesh axis; 1 for the manual axes inside `per_device`, where an
    array is one device's shard."""
    return {n: 1 if n in mesh.manual_axes else size for n, size in mesh.shape.items()}


def _dividing(size: int, names: Sequence[str], sizes: dict[str, int]) -> tuple:
    """The subset of mesh axes `names` with the largest product that divides `size`."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(names, n) for n in range(len(names), 0, -1)
    )
    fitting = [s for s in subsets if size % math.prod(sizes[n] for n in s) == 0]
    return max(fitting, key=lambda s: math.prod(sizes[n] for n in s), default=())


def _batch_axes(
    prompts: int, samples: int | None, sizes: dict[str, int]
) -> dict[str, tuple]:
    """Mesh axes of the logical axes "prompts" and "samples"."""
    names = [name for name in BATCH_AXES if sizes[name] > 1]
    first = _dividing(prompts, names, sizes)
    rest = [name for name in names if name not in first]
    second = () if samples is None else _dividing(samples, rest, sizes)
    return {"prompts": first, "samples": second}


def batch_shards(
    num_prompts: int, group_size: int, shape: MeshShape | None = None
) -> tuple[int, int]:
    """Numbers of shards of P and of G.

    Args:
        num_prompts: P.
        group_size: G.
        shape: Of the mesh; None: the mesh in context.
    """
    if shape is not None:
        sizes = {name: getattr(shape, name) for name in AXES}
    elif (mesh := current_mesh()) is not None:
        sizes = _sizes(mesh)
    else:
        return 1, 1
    axes = _batch_axes(num_prompts, group_size, sizes)
    prompts, samples = (
        math.prod(sizes[n] for n in axes[name]) for name in ("prompts", "samples")
    )
    return prompts, samples


def batch_devices() -> int:
    """Devices along data and fsdp together, on the mesh in context; 1 without one."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH_AXES)


def _spec(
    shape: Sequence[int],
    logical: Sequence[str | None],
    sizes: dict[str, int],
    rules: dict[str, str] = RULES,
) -> PartitionSpec:
    """PartitionSpec of an array; axes beyond the `logical` ones are replicated."""
    batch: dict[str, tuple] = {}
    if "prompts" in logical:
        at = logical.index("prompts")
        grouped = "samples" in logical
        batch = _batch_axes(shape[at], shape[at + 1] if grouped else None, sizes)

    def mesh_axes(size, name):
        if name in batch:
            return batch[name] or None
        axis = rules.get(name)
        return axis if axis and size % sizes[axis] == 0 else None

    return PartitionSpec(*map(mesh_axes, shape, logical))


def _names(path: Sequence[Any]) -> list[str]:
    """Names in a tree path: dict keys and attributes."""
    keys = (getattr(k, "key", getattr(k, "name", None)) for k in path)
    return [name for name in keys if isinstance(name, str) and name != "value"]


def logical_axes(names: Sequence[str], rank: int) -> tuple[str | None, ...]:
    """Logical axes of a parameter, or of its gradient or Adam moments.

    Args:
        names: The end of its path in the tree; a prefix is ignored.
        rank: Of the array; one more than a layer's means a leading axis of layers.

    Returns:
        One name or None per axis; () for anything that is no parameter, and for
        adafactor's means over an axis of one: they are small, and replicated.
    """
    axes: tuple[str | None, ...] = ()
    if not {"v_row", "v_col"}.isdisjoint(names):
        return axes
    last, parent = names[-1] if names else "", names[-2] if len(names) > 1 else ""
    if last == "embedding":
        axes = ("vocab", "embed")
    elif last == "unembedding":
        axes = ("embed", "vocab")
    elif parent in _LINEAR:
        inputs, outputs = _LINEAR[parent]
        axes = {
            "kernel": (inputs, outputs),
            "bias": (outputs,),
            "lora_a": (inputs, None),
            "lora_b": (None, outputs),
        }.get(last, ())
    if axes and rank == len(axes) + 1:
        return (None, *axes)
    return axes if rank == len(axes) else ()


def _leaf_axes(path: Sequence[Any], x: Any) -> tuple[str | None, ...]:
    """Logical axes of any leaf: a field of rollouts or a batch, or a parameter."""
    names = _names(path)
    if names and names[-1] in _FIELDS and {*names[:-1]} <= {"rollouts", "history"}:
        before = (None,) if "history" in names else ()  # a leading axis of iterates
        axes = (*before, *_FIELDS[names[-1]])
        return axes if x.ndim >= len(axes) else ()
    return logical_axes(names, x.ndim)


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A `NamedSharding` for every leaf, by the names in its path.

    Args:
        tree: Parameters, a `Policy`, an optimizer state, rollouts, a batch or a
            training state.
        mesh: The devices.
    """
    sizes = dict(mesh.shape)

    def sharding(path, x):
        return NamedSharding(mesh, _spec(x.shape, _leaf_axes(path, x), sizes))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def group_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of an array of shape [P, G, ...]."""
    return NamedSharding(mesh, _spec(shape, _GROUP, dict(mesh.shape)))


def put_on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """The tree sharded by `tree_shardings`; mesh None: on the default device.

    From an array on the host each process reads only the shards of its devices.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)

    def leaf(x, sharding):
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jax.tree.map(leaf, tree, tree_shardings(tree, mesh))


def with_shardings(shapes: Any, mesh: Mesh | None) -> Any:
    """`jax.ShapeDtypeStruct`s with the shardings of `tree_shardings`; mesh None:
    unchanged."""
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        tree_shardings(shapes, mesh),
    )


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """x [...] with a sharding constraint by its logical axes; trailing axes without a
    name are replicated."""
    mesh = current_mesh()
    if mesh is None:
        return x
    rules = {k: v for k, v in RULES.items() if v not in mesh.manual_axes}
    spec = _spec(x.shape, logical, _sizes(mesh), rules)
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_params(tree: Any, *, gathered_as: Any = None) -> Any:
    """Parameters, or gradients of them, with sharding constraints by `RULES`.

    Args:
        tree: Parameters.
        gathered_as: The dtype that layers compute in: all-gathered over fsdp, still
            sharded over tensor, as they use them. What is gathered is rounded to that
            dtype where it has fewer bits, but keeps its own; gradients are not rounded.
    """
    mesh = current_mesh()
    if mesh is None:
        return tree
    manual = mesh.manual_axes
    left_out = {*manual, *(() if gathered_as is None else ("fsdp",))}
    rules = {k: v for k, v in RULES.items() if v not in left_out}
    sizes = _sizes(mesh)

    def leaf(path, x):
        logical = logical_axes(_names(path), x.ndim)
        spec = _spec(x.shape, logical, sizes, rules)
        if gathered_as is not None and manual:
            x = _gathered(x, logical, manual, spec, gathered_as)
        elif gathered_as is not None:
            split = _spec(x.shape, logical, sizes)
            if split != spec:
                return _moved(x, split, spec, gathered_as)
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _moved(
    x: jax.Array, split: PartitionSpec, whole: PartitionSpec, dtype: Any
) -> jax.Array:
    """A parameter gathered by the compiler."""

    def move(x):  # the first keeps it from gathering what is to be rounded
        x = jax.lax.with_sharding_constraint(x, split)
        return jax.lax.with_sharding_constraint(x, whole)

    return rounded(move, x, dtype, move)


def _gathered(
    x: jax.Array,
    logical: Sequence[str | None],
    manual: Collection[Any],
    spec: PartitionSpec,
    dtype: Any,
) -> jax.Array:
    """A parameter gathered over the manual axes inside `per_device`.

    The transpose of this gather is the one reduce-scatter of the gradient, for all uses
    of the parameter together.
    """
    varying = varying_axes(x)
    invariant = tuple(name for name in manual if name not in varying)
    # pcast comes before all_gather, so that the backward pass reduces the shard, not
    # the full array.
    x = jax.lax.pcast(x, invariant, to="varying") if invariant else x
    if "fsdp" not in varying:  # replicated over fsdp
        return x
    axis = [RULES.get(name or "") for name in logical].index("fsdp")

    gather = partial(gathered, axis=axis)
    by_gradient = gather
    if "vocab" in logical:
        by_gradient = partial(gathered_table, axis=axis)

    def on_tensor(function):
        if not splits_tensor() or "tensor" not in spec:
            return function
        # Manual over tensor too, or the compiler would gather that axis as well.
        return jax.shard_map(
            function, in_specs=spec, out_specs=spec, axis_names={"tensor"}
        )

    return rounded(on_tensor(gather), x, dtype, on_tensor(by_gradient))


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes along which devices have different values of x [...], in shard_map."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def flatten_rows(x: jax.Array) -> jax.Array:
    """[..., D] -> [N, D]; on a mesh unchanged, because joining axes of which a later
    one is sharded would gather it."""
    return x.reshape(-1, x.shape[-1]) if current_mesh() is None else x


def splits_tensor() -> bool:
    """Whether the mesh in context has more than one device along tensor."""
    mesh = current_mesh()
    return mesh is not None and mesh.shape["tensor"] > 1


def per_device(
    function: Callable[[Any, Any, Any], Any],
    policy: Any,
    per_prompt: Any,
    per_sample: Any,
) -> Any:
    """function(policy, per_prompt, per_sample), run by each device on its prompts.

    Left to the compiler, a gradient would be reduced over devices once for every use of
    its parameter: in the prompt, in the completions, in every chunk of logits.

    Args:
        function: Returns leaves [P, G, ...] of the P and G it gets.
        policy: Its parameters; `function` gathers them with `constrain_params`.
        per_prompt: Leaves [P, ...].
        per_sample: Leaves [P, G, ...].
    """
    mesh = current_mesh()
    if mesh is None:
        return function(policy, per_prompt, per_sample)
    sizes = _sizes(mesh)
    p, g = jax.tree.leaves(per_sample)[0].shape[:2]
    axes = _batch_axes(p, g, sizes)
    manual = {*axes["prompts"], *axes["samples"]}
    if not manual:
        return function(policy, per_prompt, per_sample)
    rules = {k: v for k, v in RULES.items() if v in manual}

    def param_spec(path, x):
        return _spec(x.shape, logical_axes(_names(path), x.ndim), sizes, rules)

    prompts = axes["prompts"] or None
    group = PartitionSpec(prompts, axes["samples"] or None)
    return jax.shard_map(
        function,
        in_specs=(
            jax.tree_util.tree_map_with_path(param_spec, policy),
            PartitionSpec(prompts),
            group,
        ),
        out_specs=group,
        axis_names=manual,
    )(policy, per_prompt, per_sample)
