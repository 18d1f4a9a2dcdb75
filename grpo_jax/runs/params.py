"""Parameters as safetensors files, and read from a checkpoint without its state."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import ConfigError, summary


def restore_params(directory: Path) -> Any:
    """The parameters of a checkpoint, on this process's first device, on whatever
    devices they were written.

    Raises:
        ConfigError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    path: Any = directory.absolute() / "state"
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    try:
        # Not by a Checkpointer: it misses the metadata of a whole checkpoint there.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(path).tree["params"]
            item = {"params": jax.tree.map(abstract, tree)}
            restore_args = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.PyTreeRestore(
                item=item, restore_args=restore_args, partial_restore=True
            )
            params = handler.restore(path, args=args)["params"]
    except Exception as error:  # orbax has many kinds of errors for a damaged file
        raise ConfigError(
            f"the checkpoint {directory} cannot be read ({summary(error)})."
        ) from error
    # By way of the host: placed like a new policy's, so that no program is compiled
    # again.
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)


def params_digest(params: Any) -> str:
    """A hash of parameters, by names, shapes and up to 4,096 values of each."""
    digest = hashlib.sha256()
    for name, x in named_arrays(params).items():
        stride = max(1, x.size // 4096)
        some = np.asarray(jnp.ravel(x)[::stride])
        digest.update(f"{name}{x.shape}{x.dtype}".encode() + some.tobytes())
    return digest.hexdigest()[:20]


def save_params(
    path: Path, params: Any, metadata: dict[str, str] | None = None
) -> None:
    """Writes a dict of parameters as one safetensors file; an OSError leaves none."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on other hosts may write the same file, and have the same id.
    writer = f"{jax.process_index()}-{os.getpid()}"
    temporary = path.with_name(f"{path.name}.{writer}.tmp")
    arrays = {name: np.ascontiguousarray(x) for name, x in named_arrays(params).items()}
    try:
        save_file(arrays, temporary, metadata=metadata)
    except Exception as error:  # of safetensors; a full disk is one of its causes
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error
    temporary.replace(path)


def load_params(path: Path, template: Any) -> tuple[Any, dict[str, str]]:
    """(parameters shaped like `template`, the file's metadata).

    Raises:
        ConfigError: the file cannot be read, or a parameter is missing or has another
            shape.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path}: {error}.") from error
    for name, x in named_arrays(template).items():
        shape = tensors[name].shape if name in tensors else "nothing"
        if shape != x.shape:
            raise ConfigError(f"{path}: {name} must be {x.shape}, found {shape}.")
    leaves = [tensors[name] for name in named_arrays(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), metadata


def named_arrays(params: Any) -> dict[str, Any]:
    """A nested dict of parameters by dotted names, such as "layers.mlp.up.kernel"."""
    return {
        ".".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
