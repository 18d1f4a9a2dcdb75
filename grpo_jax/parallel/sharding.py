"""Where arrays lie on a mesh of devices: one table, and what follows from it.

A mesh has the axes data, fsdp and tensor. Arrays are described by logical axes, which
`RULES` maps to mesh axes; prompts are split over data and fsdp together, and where
there are too few of them, the samples of each take what is left. An axis that its mesh
axis does not divide stays whole. Without a mesh everything here does nothing.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axes of parameters and activations; what is not here stays whole.
RULES = {
    "vocab": "tensor",
    "heads": "tensor",  # of queries, with their head_dim in a kernel
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",  # of parameters; gathered where they are used
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
# Fields of what is sampled and trained on.
_FIELDS = {
    "prompts": _PROMPT,
    "prompt_mask": _PROMPT,
    "weights": _PROMPT,
    "shaped_rewards": _GROUP,
    "completions": _GROUP,
    "completion_mask": _GROUP,
    "behaviour_logprobs": _GROUP,
    "rewards": _GROUP,
    "old_logprobs": _GROUP,
    "reference_logprobs": _GROUP,
    "token_weights": _GROUP,
}


class MeshShape(Protocol):
    """Devices along each axis."""

    @property
    def data(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def tensor(self) -> int: ...


def make_mesh(shape: MeshShape) -> Mesh | None:
    """The mesh of the first data * fsdp * tensor devices; None for one device.

    Raises:
        ValueError: there are fewer devices.
    """
    sizes = tuple(getattr(shape, name) for name in AXES)
    count, devices = math.prod(sizes), jax.devices()
    if count == 1:
        return None
    if count > len(devices):
        raise ValueError(
            f"a mesh of data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} needs "
            f"{count} devices, got {len(devices)}."
        )
    return _mesh(sizes, devices[:count])


def _mesh(sizes, devices):
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Everything inside runs on the mesh; None changes nothing."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def current_mesh():
    """The abstract mesh that is set, if it has this module's axes; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh is not None and mesh.axis_names == AXES else None


def _sizes(mesh) -> dict[str, int]:
    """Devices along each axis that arrays are still cut over: inside `per_device` an
    array is one device's part."""
    return {n: 1 if n in mesh.manual_axes else size for n, size in mesh.shape.items()}


def _dividing(size: int, names: Sequence[str], sizes: dict[str, int]) -> tuple:
    """Of the mesh axes in `names`, those of the largest product that divides size."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(names, n) for n in range(len(names), 0, -1)
    )
    fitting = [s for s in subsets if size % math.prod(sizes[n] for n in s) == 0]
    return max(fitting, key=lambda s: math.prod(sizes[n] for n in s), default=())


def _batch_axes(prompts: int, samples: int | None, sizes) -> dict[str, tuple]:
    """Mesh axes of "prompts" and of "samples"."""
    names = [name for name in BATCH_AXES if sizes[name] > 1]
    first = _dividing(prompts, names, sizes)
    rest = [name for name in names if name not in first]
    second = () if samples is None else _dividing(samples, rest, sizes)
    return {"prompts": first, "samples": second}


def batch_shards(
    num_prompts: int, group_size: int, shape: MeshShape | None = None
) -> tuple[int, int]:
    """Into how many parts P and G are cut; `shape` None: by the mesh that is set."""
    if shape is not None:
        sizes = {name: getattr(shape, name) for name in AXES}
    elif (mesh := current_mesh()) is not None:
        sizes = _sizes(mesh)
    else:
        return 1, 1
    axes = _batch_axes(num_prompts, group_size, sizes)
    return tuple(math.prod(sizes[n] for n in axes[k]) for k in ("prompts", "samples"))


def batch_devices() -> int:
    """Over how many devices prompts are spread on the mesh that is set."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH_AXES)


def _spec(shape: Sequence[int], logical: Sequence[str | None], sizes, rules=RULES):
    """PartitionSpec of an array; axes that `logical` does not reach are whole."""
    batch: dict[str, tuple] = {}
    if "prompts" in logical:
        at = logical.index("prompts")
        grouped = "samples" in logical
        batch = _batch_axes(shape[at], shape[at + 1] if grouped else None, sizes)

    def place(size, name):
        if name in batch:
            return batch[name] or None
        axis = rules.get(name)
        return axis if axis and size % sizes[axis] == 0 else None

    return PartitionSpec(*map(place, shape, logical))


def _names(path) -> list[str]:
    """The names in a tree path, of dict keys and of attributes."""
    found = (getattr(k, "key", getattr(k, "name", None)) for k in path)
    return [name for name in found if isinstance(name, str) and name != "value"]


def logical_axes(names: Sequence[str], rank: int) -> tuple[str | None, ...]:
    """Logical axes of the parameter at a path of names, and of what is shaped like it
    (a gradient, Adam's moments); () for anything else.

    A rank higher than one layer's means a leading axis of layers.
    """
    axes: tuple[str | None, ...] = ()
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


def _leaf_axes(path, x) -> tuple[str | None, ...]:
    names = _names(path)
    if names and names[-1] in _FIELDS and {*names[:-1]} <= {"rollouts", "history"}:
        before = (None,) if "history" in names else ()  # of iterates
        axes = (*before, *_FIELDS[names[-1]])
        return axes if x.ndim >= len(axes) else ()
    return logical_axes(names, x.ndim)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """One `NamedSharding` per leaf of a tree of parameters, a `Policy`, an optimizer's
    state, rollouts, a batch, or a whole training state: by the names in its path."""
    sizes = dict(mesh.shape)

    def sharding(path, x):
        return NamedSharding(mesh, _spec(x.shape, _leaf_axes(path, x), sizes))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def group_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Of one array [P, G, ...]."""
    return NamedSharding(mesh, _spec(shape, _GROUP, dict(mesh.shape)))


def put_on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """The tree on the mesh, as `tree_shardings` says; None: on the default device.

    Of an array on the host every process reads only what its own devices will hold.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)

    def leaf(x, sharding):
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jax.tree.map(leaf, tree, tree_shardings(tree, mesh))


def single_device_mesh(mesh: Mesh | None) -> Mesh | None:
    """A mesh of one of this process's devices, for what the others have no part in."""
    if mesh is None:
        return None
    return _mesh((1, 1, 1), jax.local_devices()[:1])


def with_shardings(shapes: Any, mesh: Mesh | None) -> Any:
    """`jax.ShapeDtypeStruct`s that say where they will lie; None: as they are."""
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        tree_shardings(shapes, mesh),
    )


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """x laid out by its logical axes, the trailing ones whole; no-op without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    rules = {k: v for k, v in RULES.items() if v not in mesh.manual_axes}
    spec = _spec(x.shape, logical, _sizes(mesh), rules)
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_params(tree: Any, *, gathered: bool = False) -> Any:
    """Parameters, or what is shaped like them, laid out by `RULES`.

    Args:
        gathered: As they are used: whole over fsdp, still split over tensor.
    """
    mesh = current_mesh()
    if mesh is None:
        return tree
    manual = mesh.manual_axes
    left_out = {*manual, *(("fsdp",) if gathered else ())}
    rules = {k: v for k, v in RULES.items() if v not in left_out}
    sizes = _sizes(mesh)

    def leaf(path, x):
        logical = logical_axes(_names(path), x.ndim)
        spec = _spec(x.shape, logical, sizes, rules)
        if manual and gathered:
            x = _gathered(x, logical, manual, spec)
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _gathered(x, logical, manual, spec):
    """Inside `per_device`: a parameter whole over the batch axes, as each device's own.
    Going back, its gradients are added up over devices here, once for all its uses."""
    here = _differs(x)
    rest = tuple(name for name in manual if name not in here)
    # First: going back it is a part that is added up, not the whole.
    x = jax.lax.pcast(x, rest, to="varying") if rest else x
    if "fsdp" not in here:  # it is not cut
        return x
    at = [RULES.get(name) for name in logical].index("fsdp")
    gather = partial(jax.lax.all_gather, axis_name="fsdp", axis=at, tiled=True)
    if not splits_tensor() or "tensor" not in spec:
        return gather(x)
    # Each device's part over tensor too, or the compiler would gather that as well.
    over_tensor = jax.shard_map(
        gather, in_specs=spec, out_specs=spec, axis_names={"tensor"}
    )
    return over_tensor(x)


def _differs(x) -> frozenset[str]:
    """Mesh axes along which devices hold different x, inside `per_device`."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def flatten_rows(x: jax.Array) -> jax.Array:
    """[..., D] -> [N, D]. On a mesh as it is: axes of which a later one is split
    cannot be joined without gathering it."""
    return x.reshape(-1, x.shape[-1]) if current_mesh() is None else x


def splits_tensor() -> bool:
    """Whether the mesh that is set has more than one device along tensor."""
    mesh = current_mesh()
    return mesh is not None and mesh.shape["tensor"] > 1


def per_device(function, policy: Any, per_prompt: Any, per_sample: Any) -> Any:
    """function(policy, per_prompt, per_sample), each device on its own prompts.

    Left to the compiler, a gradient would be added up over devices once for every use
    of its parameter: in the prompt, in the completions, in every chunk of logits.

    Args:
        policy: Gathered by `constrain_params` where it is used.
        per_prompt: Leaves [P, ...].
        per_sample: Leaves [P, G, ...], as the results' are.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(policy, per_prompt, per_sample)
    sizes = _sizes(mesh)
    axes = _batch_axes(*jax.tree.leaves(per_sample)[0].shape[:2], sizes)
    manual = {*axes["prompts"], *axes["samples"]}
    if not manual:
        return function(policy, per_prompt, per_sample)
    rules = {k: v for k, v in RULES.items() if v in manual}

    def lies(path, x):
        return _spec(x.shape, logical_axes(_names(path), x.ndim), sizes, rules)

    prompts = axes["prompts"] or None
    group = PartitionSpec(prompts, axes["samples"] or None)
    return jax.shard_map(
        function,
        in_specs=(
            jax.tree_util.tree_map_with_path(lies, policy),
            PartitionSpec(prompts),
            group,
        ),
        out_specs=group,
        axis_names=manual,
    )(policy, per_prompt, per_sample)
