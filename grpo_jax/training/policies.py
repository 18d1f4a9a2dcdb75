"""Where a policy and its task come from: a model directory, a run, or nothing yet."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Policy, abstract_policy, add_lora
from grpo_jax.models.hub import eos_ids, load_tokenizer, local_directory
from grpo_jax.models.lora import without_lora
from grpo_jax.models.pretrained import load_pretrained, read_config
from grpo_jax.tasks import Task, load_task
from grpo_jax.training.checkpoint import load_params
from grpo_jax.training.config import TaskConfig, TrainConfig

# What of `model` may be given beside `pretrained`: how to compute, not what.
FREE = ("compute_dtype", "remat", "lora_rank", "lora_alpha", "lora_targets")


def task_of(config: TaskConfig, pretrained: str | None) -> Task:
    """The task, asked in the tokens of the pretrained model where there is one.

    Raises:
        ConfigError: the task, its data or the tokenizer cannot be had.
    """
    options = dataclasses.asdict(config)
    name = options.pop("name")
    if pretrained is not None:
        directory = local_directory(pretrained)
        tokenizer = load_tokenizer(directory)
        if tokenizer.pad_token is None:  # masks tell padding, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
        options |= {"tokenizer": tokenizer, "eos_ids": eos_ids(directory)}
    return load_task(name, **options)


def with_settings(found: ModelConfig, asked: ModelConfig) -> ModelConfig:
    """A pretrained model's config with the settings that are the run's own.

    Raises:
        ConfigError: `asked` has a shape of its own.
    """
    plain = ModelConfig()
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        if name not in FREE and getattr(asked, name) != getattr(plain, name):
            raise ConfigError(
                f"model.{name} is the pretrained model's own "
                f"({getattr(found, name)!r}), got {getattr(asked, name)!r}; leave it "
                "out, or leave out pretrained."
            )
    return dataclasses.replace(found, **{name: getattr(asked, name) for name in FREE})


def fingerprint(directory: Path) -> str:
    """Of a model directory: its config, and its tensors' files by name and size."""
    sizes = sorted((f.name, f.stat().st_size) for f in directory.glob("*.safetensors"))
    text = (directory / "config.json").read_text() + repr(sizes)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def data_fingerprint(task: Task) -> str:
    """Of a task's prompts, answers and vocabulary."""
    vocabulary = sorted(task.tokenizer.get_vocab().items())
    asked = [task.train, task.heldout, task.template, task.system]
    text = json.dumps([*asked, sorted(task.stop_ids), vocabulary])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def pretrained_policy(name: str, settings: ModelConfig) -> Policy:
    """The policy of a model directory (or Hub name) with the run's own settings.

    What is trained is float32; with LoRA the frozen base keeps the dtype it is stored
    in. `settings` are what `with_settings` returned: factors are not made here.
    """
    dtype = None if settings.lora_rank else "float32"
    policy = load_pretrained(local_directory(name), dtype=dtype)
    return policy.reconfigured(
        compute_dtype=settings.compute_dtype, remat=settings.remat
    )


def with_factors(policy: Policy, model: ModelConfig, key: jax.Array) -> Policy:
    """The policy with the LoRA factors that `model` asks for, fresh."""
    return add_lora(
        policy,
        rank=model.lora_rank,
        alpha=model.lora_alpha,
        targets=model.lora_targets,
        key=key,
    )


def load_base(run_dir: Path, model: ModelConfig, pretrained: str | None) -> Policy:
    """The policy that a run started from, without factors.

    Args:
        model: The run's, with the vocabulary of its tokenizer.

    Raises:
        ConfigError: its file is missing or does not fit.
    """
    if pretrained is not None:
        return pretrained_policy(pretrained, model)
    policy = abstract_policy(without_lora(model))
    params, _ = load_params(run_dir / "initial.safetensors", policy.params)
    return policy.replace(jax.tree.map(jnp.asarray, params))


def model_of_run(run_dir: Path, config: TrainConfig) -> ModelConfig:
    """A run's model, with the vocabulary that its config may leave to the tokenizer."""
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
