"""A model directory's files besides its tensors; no jax here."""

import json
import os
import re
from pathlib import Path
from typing import Any

from grpo_jax.errors import ConfigError

# All at once: what is there of a snapshot decides, among other things, the template.
_FILES = (
    "*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model", "vocab*",
    "merges.txt",
)  # fmt: skip


def local_directory(directory: str | os.PathLike) -> Path:
    """The directory itself, or of a Hub name the snapshot of a model's files."""
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
    except Exception as error:  # the hub's own, its HTTP client's, or the system's
        raise ConfigError(
            f"{name} is no local directory and cannot be had from the Hugging Face "
            f"Hub: {first_line(error)}"
        ) from error


def load_tokenizer(directory: str | os.PathLike) -> Any:
    """The transformers tokenizer of a checkpoint, chat template included."""
    folder = local_directory(directory)
    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer can be read from {folder}: {first_line(error)}"
        ) from error


def eos_ids(directory: str | os.PathLike) -> tuple[int, ...]:
    """The tokens that end a completion: generation_config.json's, else config.json's.

    Empty where neither says; the tokenizer's EOS is then all there is.
    """
    folder = local_directory(directory)
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
    """Before its first import: it reports torch's absence, which is no news."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def read_json(file: Path) -> dict[str, Any]:
    """The mapping that a file holds; ConfigError for anything else."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {first_line(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping, got {type(values).__name__}.")
    return values


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
