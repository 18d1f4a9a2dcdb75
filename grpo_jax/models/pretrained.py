"""Hugging Face checkpoints in and out: config.json and safetensors, without torch.

Reading goes shard by shard and block by block, each straight into its place in the
(possibly sharded) stacked buffers on the device, so the host holds one shard's pages
and one block beside what is placed. Writing goes to temporary names that are renamed
when all is written.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import ConfigError, check_choice
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.families import Tensor, config_json, model_config, tensors
from grpo_jax.models.hub import first_line, local_directory, read_json
from grpo_jax.models.policy import Policy, abstract_policy, merge_lora

_BLOCK_BYTES = 2**23  # of a tensor on the host at a time
_INDEX = "model.safetensors.index.json"
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Entry(NamedTuple):
    """Where a tensor lies on disk."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def load_pretrained(
    directory: str | os.PathLike, *, dtype: str | None = None, shardings: Any = None
) -> Policy:
    """A policy from config.json and safetensors, whole or in shards.

    Args:
        directory: A local directory, or a name on the Hugging Face Hub ("org/name").
        dtype: "float32" or "bfloat16", of parameters and layers alike; None: as on disk
            (float32 where that is float16, or more than one).
        shardings: One sharding per parameter, in a pytree like `Policy.params`; None:
            all on the default device.

    Raises:
        ConfigError: the model is not supported, or files are missing, damaged or do
            not fit each other; the message names the field, tensor or file.
    """
    if dtype is not None:
        check_choice("dtype", dtype, ("float32", "bfloat16"))
    folder = local_directory(directory)
    config = read_config(folder)
    entries = _entries(folder)
    wanted = tensors(config)
    _check(config, wanted, abstract_policy(config).params, entries)
    stored = {_STORED[entries[t.name].dtype] for t in wanted}
    if dtype is None:
        dtype = "bfloat16" if stored == {"bfloat16"} else "float32"
    config = dataclasses.replace(config, compute_dtype=dtype)
    abstract = abstract_policy(config)
    shapes = abstract.params
    places = {t.name: t for t in wanted}
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    wide = [None] * len(leaves) if shardings is None else tree.flatten_up_to(shardings)
    sharding_of = {_path(p): s for (p, _), s in zip(leaves, wide, strict=True)}
    buffers = {
        _path(p): jnp.zeros(x.shape, dtype, device=sharding_of[_path(p)])
        for p, x in leaves
    }
    for file in sorted({entries[name].file for name in places}):
        with _opened(file) as shard:
            names = [n for n in shard.keys() if n in places]
            for name in names:
                place = places[name]
                write = _writer(place.transposed, sharding_of[place.path])
                buffer = buffers.pop(place.path)
                for row, block in _blocks(shard.get_slice(name), entries[name]):
                    buffer = write(buffer, block, _start(place, row, block.ndim))
                    # Blocks waiting to be written would add up on the host.
                    jax.block_until_ready(buffer)
                buffers[place.path] = buffer
    return abstract.replace(tree.unflatten([buffers[_path(p)] for p, _ in leaves]))


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """The config of a checkpoint, without its weights; compute_dtype as it says these
    are stored.

    Raises:
        ConfigError: as `load_pretrained`.
    """
    folder = local_directory(directory)
    values = read_json(folder / "config.json")
    stored = values.get("dtype") or values.get("torch_dtype")
    config = model_config(values, f"{folder}/config.json")
    dtype = "bfloat16" if stored == "bfloat16" else "float32"
    return dataclasses.replace(config, compute_dtype=dtype)


def check_weights(directory: str | os.PathLike) -> None:
    """ConfigError, as `load_pretrained`'s, where the tensors' files do not fit; reads
    their headers alone."""
    folder = local_directory(directory)
    config = read_config(folder)
    _check(config, tensors(config), abstract_policy(config).params, _entries(folder))


def save_pretrained(
    policy: Policy,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    eos_ids: Sequence[int] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes what `transformers.AutoModelForCausalLM.from_pretrained` loads.

    config.json, generation_config.json, safetensors (in shards above a size, with an
    index) and the tokenizer, chat template included. Parameters keep their dtype and
    every bit. Files of the same names are replaced, each at once.

    Args:
        policy: Its config decides the architecture; LoRA's factors are merged.
        directory: Made if it does not exist.
        tokenizer: A transformers tokenizer, saved beside the model; its ids for
            padding, begin and end are written into both configs.
        eos_ids: Tokens that end a completion, where they are not the tokenizer's EOS.
        max_shard_bytes: Of one safetensors file, unless a single tensor is larger.

    Raises:
        ConfigError: no supported architecture is this model, or the dtype is another.
    """
    target = Path(directory).expanduser()
    policy = merge_lora(policy)
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
    shards = _split(tensors(policy.config), params, max_shard_bytes)
    target.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=target))
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial_folder)
        _write_weights(shards, params, partial_folder)
        _write_json(
            partial_folder / "generation_config.json",
            {key: value for key, value in ids.items() if value is not None},
        )
        _write_json(partial_folder / "config.json", config)
        written = [f for f in partial_folder.rglob("*") if f.is_file()]
        written.sort(key=lambda f: f.name == "config.json")  # last: it makes a model
        for file in partial_folder.glob("*.safetensors"):  # made for the owner alone
            shutil.copymode(partial_folder / "config.json", file)
        names = [f.relative_to(partial_folder) for f in written]
        for file, name in zip(written, names, strict=True):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target / name)
        # What an earlier export left would be read as part of this one.
        for stale in (*target.glob("model*.safetensors"), target / _INDEX):
            if Path(stale.name) not in names:
                stale.unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _path(keys):
    return tuple(k.key for k in keys)


def _write_json(file, values):
    file.write_text(json.dumps(values, indent=2) + "\n")


def _opened(file):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist.") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file} is damaged or cut off: {first_line(error)}."
        ) from error


def _entries(folder) -> dict[str, Entry]:
    """Every tensor of a directory, from the headers of its files."""
    index, whole = folder / _INDEX, folder / "model.safetensors"
    where = None
    if whole.exists():
        files = [whole]
    elif index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ConfigError(f"{index} has no weight_map.")
        files = [folder / name for name in sorted(set(where.values()))]
    else:
        other = "; convert its .bin files first" if [*folder.glob("*.bin")] else ""
        raise ConfigError(f"{folder} has no model.safetensors and no {_INDEX}{other}.")
    entries = {}
    for file in files:
        with _opened(file) as shard:
            for name in shard.keys():
                x = shard.get_slice(name)
                entries[name] = Entry(file, x.get_dtype(), tuple(x.get_shape()))
    for name, file in (where or {}).items():
        if name not in entries or entries[name].file.name != file:
            raise ConfigError(f"{index} places {name} in {file}, which lacks it.")
    return entries


def _check(config, wanted, shapes, entries):
    """ConfigError unless the files hold exactly the tensors of the config."""
    for t in wanted:
        shape = _stored_shape(t, shapes)
        if t.name not in entries:
            raise ConfigError(f"{t.name} {list(shape)} is missing from the checkpoint.")
        file, dtype, found = entries[t.name]
        if found != shape:
            raise ConfigError(
                f"{t.name} must be {list(shape)} by config.json, got {list(found)} in "
                f"{file}."
            )
        if dtype not in _STORED:
            raise ConfigError(
                f"{t.name} must be one of {', '.join(_STORED)}, got {dtype} in {file}."
            )
    extra = sorted(set(entries) - {t.name for t in wanted})
    for name in extra:
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old exports hold a table that follows from the config
        found = f"{name} {list(entries[name].shape)} in {entries[name].file}"
        if name != "lm_head.weight" or not config.tie_embeddings:
            raise ConfigError(f"{found} is no tensor of this architecture.")
        if not _same(entries[name], entries["model.embed_tokens.weight"]):
            raise ConfigError(
                f"{found} differs from the embedding, but config.json has "
                "tie_word_embeddings true; set it to false."
            )


def _same(a, b):
    """Whether lm_head and the embedding hold the same bits."""
    if a[1:] != b[1:]:
        return False
    with _opened(a.file) as left, _opened(b.file) as right:
        pairs = zip(
            _blocks(left.get_slice("lm_head.weight"), a),
            _blocks(right.get_slice("model.embed_tokens.weight"), b),
            strict=True,
        )
        return all(np.array_equal(x[1], y[1]) for x, y in pairs)


def _stored_shape(t: Tensor, shapes) -> tuple[int, ...]:
    leaf = shapes
    for key in t.path:
        leaf = leaf[key]
    shape = leaf.shape if t.layer is None else leaf.shape[1:]
    return shape[::-1] if t.transposed else shape


def _blocks(x, entry):
    """(first row, rows) of a tensor on disk, some `_BLOCK_BYTES` at a time."""
    size = 4 if entry.dtype == "F32" else 2
    row_bytes = max(1, int(np.prod(entry.shape[1:]))) * size
    rows = max(1, _BLOCK_BYTES // row_bytes)
    for first in range(0, entry.shape[0], rows):
        yield first, x[first : min(first + rows, entry.shape[0])]


def _start(t: Tensor, row: int, rank: int):
    """Where in its leaf a block goes."""
    start = [0] * rank
    start[-1 if t.transposed else 0] = row
    return tuple(start if t.layer is None else [t.layer, *start])


@lru_cache(maxsize=64)
def _writer(transposed, sharding):
    """write(buffer, block, start): the buffer, given away, with the block in it."""

    def write(buffer, block, start):
        block = block.T if transposed else block
        block = block.reshape((1,) * (buffer.ndim - block.ndim) + block.shape)
        return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), start)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _split(wanted, params, limit):
    """Tensors in order, cut into lists of at most `limit` bytes."""
    shards, size = [[]], 0
    for t in wanted:
        x = params[t.path]
        nbytes = x.nbytes // (1 if t.layer is None else x.shape[0])
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += nbytes
    return shards


def _write_weights(shards, params, folder):
    from safetensors.numpy import save_file

    where, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        arrays = {t.name: _to_host(t, params[t.path]) for t in shard}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(arrays, name)
        total += sum(x.nbytes for x in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / _INDEX, index)


_layer_of = jax.jit(partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False))


def _to_host(t: Tensor, leaf):
    x = np.asarray(leaf if t.layer is None else _layer_of(leaf, t.layer))
    return np.ascontiguousarray(x.T if t.transposed else x)


def _special_ids(tokenizer, eos):
    ids: dict[str, Any] = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None)
        for kind in ("bos", "eos", "pad")
    }
    if eos is not None:
        eos = [int(i) for i in eos]
        ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    return ids
