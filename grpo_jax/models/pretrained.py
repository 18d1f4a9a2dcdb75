"""Hugging Face checkpoints in and out: config.json and safetensors, without torch.

Reading goes file by file and block by block, each block straight into the stacked
(possibly sharded) buffers on the device, so the host holds one block and the mapped
pages of one file beside them. Writing goes to a temporary folder whose files are
renamed when all are written.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from grpo_jax.errors import ConfigError
from grpo_jax.models.adapters import load_factors, with_adapter
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.hf_config import config_json, model_config
from grpo_jax.models.hf_tensors import Tensor, checkpoint_tensors, open_tensors
from grpo_jax.models.hub import (
    base_directory,
    is_adapter,
    local_directory,
    read_json,
)
from grpo_jax.models.lora import without_lora
from grpo_jax.models.policy import Policy, abstract_policy, merge_lora
from grpo_jax.models.rounding import check_loss, rounding_loss
from grpo_jax.records import dtype_name

_BLOCK_BYTES = 2**23  # of a tensor on the host at a time
_INDEX = "model.safetensors.index.json"
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Keys = tuple[str, ...]  # path of a parameter in `Policy.params`


class Entry(NamedTuple):
    """One tensor of a safetensors file, by the file's header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def load_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    shardings: Any = None,
) -> Policy:
    """A policy from config.json and safetensors, in one file or several.

    Args:
        directory: A local directory, or a name on the Hugging Face Hub ("org/name").
            For a LoRA adapter as PEFT writes it, the policy is its base model with the
            adapter's factors, in float32.
        dtype: float32 or bfloat16, by name or as `jnp.dtype` takes them, of parameters
            and layers alike; None: as on disk (float32 if that is float16, or more than
            one).
        shardings: One sharding per parameter (of the base, for an adapter), in a pytree
            like `Policy.params`; None: all on the default device.

    Raises:
        ConfigError: the model is not supported, or files are missing, damaged or do
            not fit each other; the message names the field, tensor or file.
    """
    dtype = file_dtype(dtype)
    folder = local_directory(directory)
    if is_adapter(folder):
        base = load_pretrained(base_directory(folder), dtype=dtype, shardings=shardings)
        adapted = abstract_policy(with_adapter(base.config, folder))
        factors = jax.tree.map(jnp.asarray, load_factors(folder, adapted.config))
        return dataclasses.replace(adapted, params=factors, frozen=base.params)
    config = read_config(folder)
    entries = _entries(folder)
    tensors = checkpoint_tensors(config)
    _check(config, tensors, entries)
    if dtype is None:
        stored = {_STORED[entries[t.name].dtype] for t in tensors}
        dtype = "bfloat16" if stored == {"bfloat16"} else "float32"
    policy = abstract_policy(dataclasses.replace(config, compute_dtype=dtype))
    leaves, tree = jax.tree_util.tree_flatten_with_path(policy.params)
    given = [None] * len(leaves) if shardings is None else tree.flatten_up_to(shardings)
    sharding_of = {_path(p): s for (p, _), s in zip(leaves, given, strict=True)}
    buffers = {
        _path(p): jnp.zeros(x.shape, dtype, device=sharding_of[_path(p)])
        for p, x in leaves
    }
    _fill(buffers, sharding_of, tensors, entries)
    return policy.replace(tree.unflatten([buffers[_path(p)] for p, _ in leaves]))


def file_dtype(dtype: DTypeLike | None) -> str | None:
    """The name of a dtype that files may have; None stays None.

    Raises:
        ConfigError: it is another one.
    """
    if dtype is None:
        return None
    name = dtype_name(dtype)
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype must be one of float32, bfloat16, got {dtype!r}.")
    return name


def _fill(
    buffers: dict[Keys, jax.Array],
    sharding_of: dict[Keys, Any],
    tensors: Sequence[Tensor],
    entries: dict[str, Entry],
) -> None:
    """Writes the stored tensors into the parameters' buffers, file by file."""
    by_name = {t.name: t for t in tensors}
    for file in sorted({entries[name].file for name in by_name}):
        with open_tensors(file) as stored:
            names = stored.keys()
            for name in (n for n in names if n in by_name):
                tensor = by_name[name]
                write = _writer(tensor.transposed, sharding_of[tensor.path])
                buffer = buffers.pop(tensor.path)
                for row, block in _blocks(stored.get_slice(name), entries[name]):
                    buffer = write(buffer, block, _start(tensor, row, block.ndim))
                    # Blocks waiting to be written would add up on the host.
                    jax.block_until_ready(buffer)
                buffers[tensor.path] = buffer


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """The config of a checkpoint, its compute_dtype the dtype of the stored weights;
    for an adapter that of its base, with LoRA.

    Raises:
        ConfigError: as `load_pretrained`.
    """
    folder = local_directory(directory)
    if is_adapter(folder):
        return with_adapter(read_config(base_directory(folder)), folder)
    values = read_json(folder / "config.json")
    stored = values.get("dtype") or values.get("torch_dtype")
    config = model_config(values, f"{folder}/config.json")
    dtype = "bfloat16" if stored == "bfloat16" else "float32"
    return dataclasses.replace(config, compute_dtype=dtype)


def check_weights(directory: str | os.PathLike) -> None:
    """Checks the tensors' names, shapes and dtypes; reads only the files' headers.

    Raises:
        ConfigError: as `load_pretrained`.
    """
    folder = local_directory(directory)
    config = read_config(folder)
    if is_adapter(folder):
        load_factors(folder, config)
        config, folder = without_lora(config), base_directory(folder)
    _check(config, checkpoint_tensors(config), _entries(folder))


def save_pretrained(
    policy: Policy,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    eos_ids: Sequence[int] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: DTypeLike | None = None,
    max_loss: float = 0.01,
) -> None:
    """Writes a directory that `transformers.AutoModelForCausalLM` loads.

    config.json, generation_config.json, safetensors (several above a size, with an
    index) and the tokenizer, chat template included. Parameters keep their dtype and
    every bit, unless `dtype` is given. Files of the same names are replaced, each at
    once.

    Args:
        policy: Its config decides the architecture. LoRA's factors are merged, which
            makes float32 of a bfloat16 base: rounded, most of what they learnt would be
            lost. `save_adapter` leaves the base as it is.
        directory: Made if it does not exist.
        tokenizer: A transformers tokenizer, saved beside the model; its ids for
            padding, begin and end are written into both configs.
        eos_ids: Tokens that end a completion, if not the tokenizer's EOS.
        max_shard_bytes: Of one safetensors file, unless a single tensor is larger.
        dtype: float32 or bfloat16, of the files.
        max_loss: Largest relative loss of what LoRA's factors learnt that rounding to
            `dtype` may cause.

    Raises:
        ConfigError: no supported architecture is this model, the dtype is another, or
            the loss is larger.
    """
    target, dtype, base = Path(directory).expanduser(), file_dtype(dtype), policy.frozen
    policy = merge_lora(policy)
    if dtype is not None:
        if base is not None:
            check_loss(rounding_loss(policy.params, base, dtype), dtype, max_loss)
        policy = policy.replace(jax.tree.map(lambda x: x.astype(dtype), policy.params))
    leaves = jax.tree_util.tree_flatten_with_path(policy.params)[0]
    params = {_path(p): x for p, x in leaves}
    dtypes = {x.dtype.name for x in params.values()}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        raise ConfigError(
            "parameters must be all float32 or all bfloat16, got "
            f"{', '.join(sorted(dtypes))}; cast them first."
        )
    ids = _special_ids(tokenizer, eos_ids)
    config = config_json(policy.config, dtype=dtypes.pop(), ids=ids)
    files = _split(checkpoint_tensors(policy.config), params, max_shard_bytes)
    target.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=target))
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial_folder)
        _write_weights(files, params, partial_folder)
        _write_json(
            partial_folder / "generation_config.json",
            {key: value for key, value in ids.items() if value is not None},
        )
        _write_json(partial_folder / "config.json", config)
        _publish(partial_folder, target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """Moves the files of a finished export into its directory."""
    written = [f for f in folder.rglob("*") if f.is_file()]
    written.sort(key=lambda f: f.name == "config.json")  # last: it makes a model
    for file in folder.glob("*.safetensors"):  # safetensors writes them mode 0600
        shutil.copymode(folder / "config.json", file)
    names = [f.relative_to(folder) for f in written]
    for file, name in zip(written, names, strict=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target / name)
    # Files of an earlier export would be read as part of this one.
    for stale in (*target.glob("model*.safetensors"), target / _INDEX):
        if Path(stale.name) not in names:
            stale.unlink(missing_ok=True)


def _path(keys: Sequence[Any]) -> Keys:
    return tuple(k.key for k in keys)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a directory, from the headers of its files."""
    index, single = folder / _INDEX, folder / "model.safetensors"
    weight_map: dict[str, str] = {}
    if single.exists():
        files = [single]
    elif index.exists():
        values = read_json(index).get("weight_map")
        if not isinstance(values, dict) or not values:
            raise ConfigError(f"{index} has no weight_map.")
        weight_map = values
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        other = "; convert its .bin files first" if [*folder.glob("*.bin")] else ""
        raise ConfigError(f"{folder} has no model.safetensors and no {_INDEX}{other}.")
    entries = {}
    for file in files:
        with open_tensors(file) as stored:
            names = stored.keys()
            for name in names:
                x = stored.get_slice(name)
                entries[name] = Entry(file, x.get_dtype(), tuple(x.get_shape()))
    for name, file in weight_map.items():
        if name not in entries or entries[name].file.name != file:
            raise ConfigError(f"{index} places {name} in {file}, which lacks it.")
    return entries


def _check(
    config: ModelConfig, tensors: Sequence[Tensor], entries: dict[str, Entry]
) -> None:
    """Checks that the files hold exactly the tensors of the config."""
    params = abstract_policy(config).params
    for tensor in tensors:
        name, shape = tensor.name, _stored_shape(tensor, params)
        if name not in entries:
            raise ConfigError(f"{name} {list(shape)} is missing from the checkpoint.")
        file, dtype, stored_shape = entries[name]
        if stored_shape != shape:
            raise ConfigError(
                f"{name} must be {list(shape)} by config.json, got "
                f"{list(stored_shape)} in {file}."
            )
        if dtype not in _STORED:
            raise ConfigError(
                f"{name} must be one of {', '.join(_STORED)}, got {dtype} in {file}."
            )
    for name in sorted(set(entries) - {t.name for t in tensors}):
        _check_extra(name, config, entries)


def _check_extra(name: str, config: ModelConfig, entries: dict[str, Entry]) -> None:
    """Refuses a tensor that the config does not have, unless it repeats another."""
    if name.endswith("rotary_emb.inv_freq"):
        return  # old exports hold a table that follows from the config
    extra = f"{name} {list(entries[name].shape)} in {entries[name].file}"
    if name != "lm_head.weight" or not config.tie_embeddings:
        raise ConfigError(f"{extra} is no tensor of this architecture.")
    if not _head_is_embedding(entries[name], entries["model.embed_tokens.weight"]):
        raise ConfigError(
            f"{extra} differs from the embedding, but config.json has "
            "tie_word_embeddings true; set it to false."
        )


def _head_is_embedding(head: Entry, embedding: Entry) -> bool:
    """Whether lm_head and the embedding are stored with the same bits."""
    if head[1:] != embedding[1:]:
        return False
    with open_tensors(head.file) as left, open_tensors(embedding.file) as right:
        pairs = zip(
            _blocks(left.get_slice("lm_head.weight"), head),
            _blocks(right.get_slice("model.embed_tokens.weight"), embedding),
            strict=True,
        )
        return all(np.array_equal(x[1], y[1]) for x, y in pairs)


def _stored_shape(tensor: Tensor, params: dict[str, Any]) -> tuple[int, ...]:
    leaf: Any = params
    for key in tensor.path:
        leaf = leaf[key]
    shape = leaf.shape if tensor.layer is None else leaf.shape[1:]
    return shape[::-1] if tensor.transposed else shape


def _blocks(stored: Any, entry: Entry) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a tensor on disk, about `_BLOCK_BYTES` at a time."""
    size = 4 if entry.dtype == "F32" else 2
    row_bytes = max(1, int(np.prod(entry.shape[1:]))) * size
    rows = max(1, _BLOCK_BYTES // row_bytes)
    for first in range(0, entry.shape[0], rows):
        yield first, stored[first : min(first + rows, entry.shape[0])]


def _start(tensor: Tensor, row: int, rank: int) -> tuple[int, ...]:
    """Index of a block's first element in its parameter."""
    start = [0] * rank
    start[-1 if tensor.transposed else 0] = row
    return tuple(start if tensor.layer is None else [tensor.layer, *start])


@lru_cache(maxsize=64)
def _writer(transposed: bool, sharding: Any) -> Callable[..., jax.Array]:
    """write(buffer, block, start) -> the buffer with the block in it; donates it."""

    def write(buffer, block, start):
        block = block.T if transposed else block
        block = block.reshape((1,) * (buffer.ndim - block.ndim) + block.shape)
        return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), start)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _split(
    tensors: Sequence[Tensor], params: dict[Keys, jax.Array], limit: int
) -> list[list[Tensor]]:
    """Tensors in order, cut into lists of at most `limit` bytes."""
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        x = params[tensor.path]
        nbytes = x.nbytes // (1 if tensor.layer is None else x.shape[0])
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += nbytes
    return files


def _write_weights(
    files: Sequence[Sequence[Tensor]], params: dict[Keys, jax.Array], folder: Path
) -> None:
    from safetensors.numpy import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        name = name if len(files) > 1 else "model.safetensors"
        arrays = {t.name: _to_host(t, params[t.path]) for t in tensors}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(x.nbytes for x in arrays.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / _INDEX, index)


_layer_of = jax.jit(partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False))


def _to_host(tensor: Tensor, param: jax.Array) -> np.ndarray:
    x = np.asarray(param if tensor.layer is None else _layer_of(param, tensor.layer))
    return np.ascontiguousarray(x.T if tensor.transposed else x)


def _special_ids(tokenizer: Any, eos_ids: Sequence[int] | None) -> dict[str, Any]:
    """Special token ids by their keys in config.json."""
    ids: dict[str, Any] = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None)
        for kind in ("bos", "eos", "pad")
    }
    if eos_ids is not None:
        given = [int(i) for i in eos_ids]
        ids["eos_token_id"] = given[0] if len(given) == 1 else given or None
    return ids
