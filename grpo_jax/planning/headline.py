"""The first lines of a run."""

import dataclasses

from grpo_jax.instrument.plan import ProbePlan
from grpo_jax.models.config import ModelConfig, num_factors, num_parameters
from grpo_jax.models.tree import SHORT, chosen_attention
from grpo_jax.objectives.objective import Objective
from grpo_jax.planning.evaluated import EvaluatedPrompts, evaluation_text
from grpo_jax.planning.learning_rate import LearningRate
from grpo_jax.planning.memory import readable
from grpo_jax.planning.resolve import weights_text
from grpo_jax.planning.shapes import Lengths, Shapes
from grpo_jax.runs.config import MeshConfig, TrainConfig
from grpo_jax.tasks.ends import named_tokens
from grpo_jax.tasks.types import Task


def headline(
    config: TrainConfig,
    objective: Objective,
    task: Task,
    model: ModelConfig,
    lengths: Lengths,
    shapes: Shapes,
    *,
    stored: str,
    rate: LearningRate | None,
    probe: ProbePlan | None,
    evaluated: EvaluatedPrompts,
    micro_batch: str,
    peak: int,
) -> str:
    """The first lines of a run: its loss written out, shapes, size and memory.

    Args:
        stored: Dtype of the pretrained model's files.
        micro_batch: Its size, and why where it was chosen.
        peak: Bytes on one device.
    """
    parts = [
        f"{config.objective.name} on {task.name}: {objective.formula()}"
        f"{weights_text(config.weights)}",
        *objective.mechanisms(),
        f"{config.batch.prompts} prompts x {config.batch.group_size} samples, "
        f"{shapes.train_prompt_length} + {lengths.max_new_tokens} tokens, "
        f"{micro_batch}",
        f"ends at {named_tokens(task.tokenizer, task.ends)}",
        f"{_size(model)}, {_dtype_text(config, model.dtype, stored)}",
        *attention_text(model, shapes.train_prompt_length, lengths.max_new_tokens),
        *_optimizer_text(config, rate),
    ]
    if config.mesh != MeshConfig():
        sizes = dataclasses.asdict(config.mesh).items()
        parts.append("mesh " + " x ".join(f"{name} {size}" for name, size in sizes))
    parts.append(f"about {readable(peak, 'B')} on the device")
    text = " | ".join(parts)
    text += f"\n{evaluation_text(config, task, evaluated)}"
    if probe:
        text += f"\ninstrument: {probe.text(config.steps)}"
    return text


def _dtype_text(config: TrainConfig, dtype: str, stored: str) -> str:
    """What the model computes in, and why."""
    if config.model.compute_dtype is not None:
        return f"{dtype}, {'as the run began' if config.resume else 'as given'}"
    if config.pretrained is None:
        return f"{dtype}, the default for a new model"
    if dtype == stored:
        return f"{dtype}, as the model is stored"
    return f"{dtype}, the default on CPUs for a model stored in {stored}"


def attention_text(model: ModelConfig, *lengths: int) -> list[str]:
    """How long sequences are attended; nothing of short ones."""
    tokens = max(lengths)
    how = chosen_attention(model.attention, tokens, model.head_dim)
    if tokens <= SHORT:
        return []
    texts = {
        "dense": "attention with all scores at once",
        "blocks": "attention block by block",
        "flash": "attention by a kernel",
    }
    return [texts[how]]


def _optimizer_text(config: TrainConfig, rate: LearningRate | None) -> list[str]:
    """The optimizer where it is not the default, and the config's learning rate."""
    optimizer = config.optimizer
    texts = [f"optimizer {optimizer.name}"] if optimizer.name != "adamw" else []
    if optimizer.mean_dtype != "float32":
        texts.append(f"mean of gradients in {optimizer.mean_dtype}")
    return texts if rate is None else [*texts, rate.text()]


def _size(model: ModelConfig) -> str:
    text = f"{readable(num_parameters(model))} parameters"
    if model.lora_rank:
        text += f", {readable(num_factors(model))} of LoRA trained"
    return text
