"""Where a policy and its task come from: a model directory, a run, or a new model."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.errors import ConfigError
from grpo_jax.models.adapters import load_factors
from grpo_jax.models.config import COMPUTATION, ModelConfig
from grpo_jax.models.hub import (
    ADAPTER_CONFIG,
    base_directory,
    eos_ids,
    is_adapter,
    load_tokenizer,
    local_directory,
    read_json,
)
from grpo_jax.models.lora import without_lora
from grpo_jax.models.policy import Policy, abstract_policy, add_lora
from grpo_jax.models.pretrained import load_pretrained, read_config
from grpo_jax.parallel.sharding import put_on_mesh, tree_shardings
from grpo_jax.rewards.types import Example
from grpo_jax.runs.config import TaskConfig, TrainConfig
from grpo_jax.runs.directory import read_facts
from grpo_jax.runs.params import load_params
from grpo_jax.tasks.ends import completion_ends, stop_token_ids
from grpo_jax.tasks.registry import load_task
from grpo_jax.tasks.types import Task

# Settings of `model` that may be given beside `pretrained`.
FREE = (*COMPUTATION, "lora_rank", "lora_alpha", "lora_targets")

_BLOCK, _BLOCKS = 2**16, 256  # bytes of a block, and blocks, that a fingerprint reads


def task_of(
    config: TaskConfig, pretrained: str | None, *, date: str | None = None
) -> Task:
    """The task, in the tokens of the pretrained model if there is one.

    Args:
        date: As in `load_task`.

    Raises:
        ConfigError: the task, its data or the tokenizer cannot be had.
    """
    if pretrained is None:
        return _load(config, date=date)
    directory = local_directory(pretrained)
    tokenizer = _tokenizer(directory)
    ends = completion_ends(tokenizer, eos_ids(directory))
    return _load(config, tokenizer=tokenizer, eos_ids=ends, date=date)


def with_stop_tokens(task: Task, names: Sequence[str]) -> Task:
    """The task whose completions also end at the tokens of those names.

    Raises:
        ConfigError: a name is no token, or exactly one completion of the task is right.
    """
    if not names:
        return task
    if task.single_answer:
        raise ConfigError(
            f"stop_tokens do not go with task {task.name}, of which exactly one "
            "completion, with one end, is right; leave them out."
        )
    ids = (*task.ends, *stop_token_ids(task.tokenizer, names))
    return dataclasses.replace(task, eos_ids=tuple(dict.fromkeys(ids)))


def task_to_continue(config: TaskConfig, run_dir: Path) -> Task | None:
    """The task of a run that is continued or repeated, in the run's own tokens and
    template; None where the run was stopped before it had written its tokenizer."""
    if not (run_dir / "tokenizer").is_dir():
        return None
    return task_for_run(config, run_dir)


def task_for_run(config: TaskConfig, run_dir: Path) -> Task:
    """The task in a run's tokens, and in its template unless another is given.

    Raises:
        ConfigError: the directory holds no run, or as `task_of`.
    """
    facts = read_facts(run_dir)
    made = facts["config"]["task"].get("vocab_size")
    if config.vocab_size not in (None, made):
        raise ConfigError(
            f"task.vocab_size is of a new tokenizer, and {run_dir} has one, got "
            f"{config.vocab_size}; leave it out."
        )
    template = config.template or facts.get("template")
    like_run = template == facts.get("template")
    asked = dataclasses.replace(
        config,
        vocab_size=None,
        template=template,
        system=facts.get("system")
        if config.system is None and like_run
        else config.system,
    )
    arguments: Any = config.template_arguments
    if not arguments and like_run:
        arguments = facts.get("template_arguments", ())
    return _load(
        asked,
        tokenizer=_tokenizer(run_dir / "tokenizer"),
        eos_ids=facts.get("eos_ids", ()),
        template_arguments=arguments,
        date=facts.get("date"),
    )


def _load(config: TaskConfig, **language: Any) -> Task:
    """The task of a config; `language`: an existing tokenizer and its end tokens."""
    options = dataclasses.asdict(config)
    name = options.pop("name")
    return load_task(name, **(options | language))


def _tokenizer(directory: Path) -> Any:
    tokenizer = load_tokenizer(directory)
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_language(task: Task) -> None:
    """ConfigError where no completion could end."""
    tokenizer = task.tokenizer
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        missing = "EOS" if tokenizer.eos_token_id is None else "padding"
        raise ConfigError(
            f"the tokenizer of task {task.name} has no {missing} token; set one "
            "(a completion could never end)."
        )


def default_dtype(stored: str, *, local_devices: bool = True) -> str:
    """What a pretrained model computes in where nothing is asked for: bfloat16 on
    accelerators if it is stored in it, else float32.

    Args:
        stored: The dtype of its files.
        local_devices: On this machine's devices; else on accelerators.
    """
    accelerated = not local_devices or jax.default_backend() != "cpu"
    return "bfloat16" if accelerated and stored == "bfloat16" else "float32"


def with_settings(
    stored: ModelConfig, asked: ModelConfig, *, local_devices: bool = True
) -> ModelConfig:
    """A pretrained model's config with the settings `FREE` to be a run's; an adapter's
    LoRA settings are its own.

    Args:
        stored: From `read_config`.
        asked: A run's `model`.
        local_devices: As `default_dtype`.

    Raises:
        ConfigError: `asked` has another shape than the default.
    """
    plain = ModelConfig()
    free = [x for x in FREE if not (stored.lora_rank and x.startswith("lora_"))]
    for field in dataclasses.fields(ModelConfig):
        name, value = field.name, getattr(asked, field.name)
        repeated = stored.lora_rank and value == getattr(stored, name)
        if name not in free and value != getattr(plain, name) and not repeated:
            raise ConfigError(
                f"model.{name} is the pretrained model's own "
                f"({getattr(stored, name)!r}), got {getattr(asked, name)!r}; leave it "
                "out, or leave out pretrained."
            )
    settings = {name: getattr(asked, name) for name in free}
    if asked.compute_dtype is None:
        settings["compute_dtype"] = default_dtype(
            stored.dtype, local_devices=local_devices
        )
    return dataclasses.replace(stored, **settings)


def fingerprint(directory: Path) -> str:
    """A hash of a model directory: its config, and each tensor file's size, header and
    blocks spread over it; of an adapter also its base model's."""
    if is_adapter(directory):
        settings = read_json(directory / ADAPTER_CONFIG)
        settings["base_model_name_or_path"] = fingerprint(base_directory(directory))
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    else:
        digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:20]


def _as_recorded(examples: Sequence[Example]) -> list[list]:
    """Examples as older versions had them, as lists: without a context where there is
    none, and with the 110 of a solution's \\boxed{110}_2 for the answer 110_2."""
    recorded = []
    for example in examples:
        number, _, base = example.answer.partition("_")
        if base and f"\\boxed{{{number}}}_{base}" in example.solution:
            example = example._replace(answer=number)
        recorded.append(list(example if example.context else example[:-1]))
    return recorded


def data_fingerprint(task: Task) -> str:
    """A hash of a task's prompts, answers and vocabulary."""
    vocabulary = sorted(task.tokenizer.get_vocab().items())
    train, heldout = (_as_recorded(part) for part in (task.train, task.heldout))
    asked = [train, heldout, task.template, task.system]
    text = json.dumps([*asked, sorted(task.stop_ids), vocabulary])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def pretrained_policy(
    name: str, settings: ModelConfig, mesh: Mesh | None = None
) -> Policy:
    """The policy of a model directory (or Hub name), without LoRA factors: an adapter's
    base model.

    Trained parameters are float32. So is LoRA's frozen base where the run computes in
    float32 (every program would make such a copy of it); else it keeps its stored
    dtype.

    Args:
        name: A directory, or a Hub name.
        settings: From `with_settings`.
        mesh: Where every device loads its own shards; None for a single device.
    """
    kept = settings.lora_rank and settings.dtype != "float32"
    dtype = None if kept else "float32"
    directory, shardings = base_directory(local_directory(name)), None
    if mesh is not None:
        shapes = abstract_policy(without_lora(settings)).params
        shardings = tree_shardings(shapes, mesh)
    policy = load_pretrained(directory, dtype=dtype, shardings=shardings)
    return policy.computed_as(settings)


def with_factors(
    policy: Policy, model: ModelConfig, key: jax.Array, pretrained: str | None
) -> Policy:
    """The policy with LoRA factors as `model` asks for: those of the adapter that it
    starts from, else new ones."""
    adapted = add_lora(
        policy,
        rank=model.lora_rank,
        alpha=model.lora_alpha,
        targets=model.lora_targets,
        key=key,
    )
    folder = None if pretrained is None else local_directory(pretrained)
    if folder is None or not is_adapter(folder):
        return adapted
    factors = load_factors(folder, model)
    return adapted.replace(jax.tree.map(jnp.asarray, factors))


def load_base(
    run_dir: Path, model: ModelConfig, pretrained: str | None, mesh: Mesh | None = None
) -> Policy:
    """The policy that a run started from, without factors.

    Args:
        run_dir: The run's directory, with initial.safetensors for a new model.
        model: The run's model, with the vocabulary size of its tokenizer.
        pretrained: The model directory (or Hub name) that the run began with.
        mesh: None for a single device.

    Raises:
        ConfigError: a file is missing or does not fit.
    """
    if pretrained is not None:
        return pretrained_policy(pretrained, model, mesh)
    policy = abstract_policy(without_lora(model))
    params, _ = load_params(run_dir / "initial.safetensors", policy.params)
    return policy.replace(put_on_mesh(params, mesh))


def model_of_run(run_dir: Path, config: TrainConfig) -> ModelConfig:
    """A run's model config, with the vocabulary size of its tokenizer."""
    if config.pretrained is not None:
        return with_settings(read_config(config.pretrained), config.model)
    from safetensors import SafetensorError, safe_open

    start = run_dir / "initial.safetensors"
    try:
        with safe_open(start, framework="numpy") as file:
            vocab_size = file.get_slice("embedding.embedding").get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {start}: {error}.") from error
    return dataclasses.replace(config.model, vocab_size=vocab_size)
