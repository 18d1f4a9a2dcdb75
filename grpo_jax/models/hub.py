"""Files of a model directory other than its tensors; imports no jax."""

import json
import os
import re
from pathlib import Path
from typing import Any

from grpo_jax.errors import ConfigError, first_line, needs_the_whole_install

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT

# Fetched together: which of them exist decides, for one, the chat template.
_FILES = (
    "*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model", "vocab*",
    "merges.txt",
)  # fmt: skip


def local_directory(directory: str | os.PathLike) -> Path:
    """The directory as a path; for a Hub name "org/name" the snapshot of its files.

    Raises:
        ConfigError: neither a directory nor a model that the Hub can deliver.
    """
    folder = Path(directory).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(directory)
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ConfigError(
            f"{name} is not a directory; give one with config.json and "
            "model.safetensors, or a Hugging Face name ORG/NAME."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # of the Hub, its HTTP client or the system
        raise ConfigError(
            f"{name} is no local directory and cannot be had from the Hugging Face "
            f"Hub: {first_line(error)}"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a local directory holds a LoRA adapter, not a model.

    Raises:
        ConfigError: it holds both.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        return False
    if [*folder.glob("model*.safetensors")]:
        raise ConfigError(
            f"{folder} holds a model and an adapter ({ADAPTER_CONFIG}); which of them "
            "is meant cannot be told: keep them in directories of their own."
        )
    return True


def base_directory(folder: Path) -> Path:
    """The local directory of the model that an adapter is of; `folder` itself where it
    holds no adapter.

    Raises:
        ConfigError: the adapter does not say which, or it cannot be had.
    """
    if not is_adapter(folder):
        return folder
    return local_directory(base_name(folder))


def base_name(folder: Path) -> str:
    """Directory or Hub name of an adapter's base model; a relative directory is looked
    for from here, as PEFT does, and from the adapter's own."""
    file = folder / ADAPTER_CONFIG
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{file} names no base model (base_model_name_or_path {base!r}); write its "
            "directory or Hugging Face name there."
        )
    if not Path(base).is_dir() and (folder / base).is_dir():
        return str(folder / base)
    return base


@needs_the_whole_install("gj.load_tokenizer")
def load_tokenizer(directory: str | os.PathLike) -> Any:
    """The transformers tokenizer of a checkpoint, chat template included; that of the
    base model for an adapter without one.

    Raises:
        ConfigError: the directory has none that can be read.
    """
    folder = local_directory(directory)
    if not [*folder.glob("tokenizer*")]:
        folder = base_directory(folder)
    quiet_transformers()
    from transformers import AutoTokenizer

    if not [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        below = sorted(x.parent.name for x in folder.glob("*/config.json"))
        advice = f"; below it {', '.join(below[:3])} may be one" * bool(below)
        raise ConfigError(
            f"{folder} is no model's directory: it has no tokenizer.json{advice}."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer can be read from {folder}: {first_line(error)}"
        ) from error


def eos_ids(directory: str | os.PathLike) -> tuple[int, ...]:
    """Tokens that end a completion, by generation_config.json, else config.json.

    Empty if neither names any; then only the tokenizer's EOS ends a completion.
    """
    folder = base_directory(local_directory(directory))
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists() or name == "config.json":
            ids = read_json(folder / name).get("eos_token_id")
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if not all(type(i) is int for i in ids):
                    raise ConfigError(
                        f"{folder / name}: eos_token_id must be a whole number or a "
                        f"list of them, got {ids!r}."
                    )
                return tuple(dict.fromkeys(ids))
    return ()


def quiet_transformers() -> None:
    """Silences transformers, which reports that torch is missing when imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON mapping in a file.

    Raises:
        ConfigError: the file is missing, is no JSON, or holds something else.
    """
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {first_line(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping, got {type(values).__name__}.")
    return values
