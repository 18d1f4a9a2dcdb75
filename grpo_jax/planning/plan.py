"""What a run will do, in stages: each checks its part of the config and fixes shapes.

Nothing is allocated. `make_plan` runs the stages in order: task, lengths, model,
shapes, weights, probe, memory, headline.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from grpo_jax.errors import ConfigError
from grpo_jax.instrument.plan import ProbePlan, plan_probe
from grpo_jax.instrument.weightings import WEIGHTINGS
from grpo_jax.models.config import ModelConfig, num_factors, num_parameters
from grpo_jax.models.hub import local_directory
from grpo_jax.models.pretrained import check_weights, read_config
from grpo_jax.objectives.objective import Objective
from grpo_jax.planning.devices import check_attention, check_mesh, device_memory
from grpo_jax.planning.evaluated import EvaluatedPrompts, evaluated_prompts
from grpo_jax.planning.headline import headline
from grpo_jax.planning.learning_rate import LearningRate, learning_rate
from grpo_jax.planning.memory import MemoryInputs, readable
from grpo_jax.planning.micro import choose_budget, reductions_text
from grpo_jax.planning.resolve import (
    check_reference_memory,
    resolve_objective,
    resolve_weights,
    warm_start_settings,
)
from grpo_jax.planning.shapes import Lengths, Shapes, lengths_stage, shapes_stage
from grpo_jax.preconditioner import PromptWeights
from grpo_jax.rollouts.demonstrations import Demonstrations
from grpo_jax.rollouts.embedded import check_embedded
from grpo_jax.rollouts.lengths import drop_long_prompts
from grpo_jax.rollouts.micro_batches import TOKENS
from grpo_jax.rollouts.refine import Piece
from grpo_jax.runs.config import InstrumentConfig, TrainConfig
from grpo_jax.runs.objects import Given, given_objects
from grpo_jax.runs.policies import (
    check_language,
    task_of,
    with_settings,
    with_stop_tokens,
)
from grpo_jax.tasks.build import without_heldout
from grpo_jax.tasks.types import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is fixed before anything is allocated."""

    task: Task
    objective: Objective
    weights: PromptWeights
    learning_rate: LearningRate | None  # None: the user's optimizer has its own
    model: ModelConfig  # with the tokenizer's vocabulary and a dtype to compute in
    prompts: list[list[int]]  # token ids of the trained prompts
    prompt_length: int
    refine: list[Piece]  # parts of a prompt with a draft in it; [] without drafts
    train_prompt_length: int  # of the prompts in the update; longer with drafts
    answer_tokens: int  # longest answer and EOS; max_new_tokens if not measured
    max_new_tokens: int
    warm_starts: bool  # supervised learning comes first
    buckets: list[int]  # completion lengths of the update
    probe: ProbePlan | None  # None: no instrument
    evaluated: EvaluatedPrompts
    memory: MemoryInputs
    headline: str
    warnings: list[str]
    given: Given  # the user's own objects

    @property
    def micro_batch_tokens(self) -> int:
        """Of one backward pass on a device, as given or chosen."""
        return self.memory.micro_batch_tokens


class TaskStage(NamedTuple):
    """The task with the prompts that the run uses."""

    task: Task
    warm_starts: bool
    warnings: list[str]


class ModelStage(NamedTuple):
    """The model with the vocabulary of its tokenizer and the dtype it computes in."""

    config: ModelConfig
    base_bytes: int  # of each parameter of a frozen base, as `pretrained_policy`
    stored: str = "float32"  # dtype of the pretrained model's files


class ProbeStage(NamedTuple):
    """What the instrument measures; None: it is off."""

    probe: ProbePlan | None
    warnings: list[str]


class MemoryStage(NamedTuple):
    """What the run's memory depends on, and its peak in bytes on one device."""

    inputs: MemoryInputs
    peak: int
    micro_batch: str  # in words
    warnings: list[str]


def make_plan(
    config: TrainConfig,
    task: Task | None = None,
    *,
    with_weights: bool = True,
    local_devices: bool = True,
    date: str | None = None,
    given: Given | None = None,
    device_bytes: int | None = None,
) -> Plan:
    """Checks a config against its task and fixes every shape.

    Args:
        with_weights: The pretrained model must have its tensors, besides its config
            and tokenizer.
        local_devices: The run is on this machine's devices; else on accelerators, which
            compute in bfloat16 itself, as many as its mesh has.
        date: Of a task that is made here, as in `load_task`.
        given: Objects of the user's own; None: those that the config names.
        device_bytes: Memory of each device; None: of this machine's, if they are used.

    Raises:
        ConfigError: the run cannot work as configured.
    """
    if given is None:
        config, given = given_objects(config)
    objective = resolve_objective(config, given.objective)
    directory = None
    if config.pretrained is not None:
        directory = local_directory(config.pretrained)
    task, warm_starts, left_out = task_stage(
        config, objective, task, directory, date=date
    )
    lengths = lengths_stage(config, objective, task, warm_starts=warm_starts)
    model = model_stage(
        config, task, directory, with_weights=with_weights, local_devices=local_devices
    )
    shapes = shapes_stage(config, objective, task, lengths)
    check_embedded(task, model.config.vocab_size, refine=shapes.refine)
    weights = resolve_weights(config, objective, len(task.train), given.weights)
    rate = None
    if given.optimizer is None or callable(given.optimizer):
        rate = learning_rate(config, lora=bool(model.config.lora_rank))
    slow = directory is not None and local_devices and jax.default_backend() == "cpu"
    probe = probe_stage(config, model.config, len(task.train), lengths, slow=slow)
    if warm_starts:  # its errors come before anything is written
        settings = warm_start_settings(config.warm_start, task)
        Demonstrations(task, settings, lengths.prompt_length, lengths.answer_tokens)
    evaluated = evaluated_prompts(config, task, lengths)
    memory = memory_stage(
        config,
        objective,
        model,
        lengths,
        shapes,
        probe.probe,
        evaluated.sampled(task),
        local_devices=local_devices,
        device_bytes=device_bytes,
    )
    return Plan(
        task=task,
        objective=objective,
        weights=weights,
        learning_rate=rate,
        model=model.config,
        prompts=lengths.prompts,
        prompt_length=lengths.prompt_length,
        refine=shapes.refine,
        train_prompt_length=shapes.train_prompt_length,
        answer_tokens=lengths.answer_tokens,
        max_new_tokens=lengths.max_new_tokens,
        warm_starts=warm_starts,
        buckets=shapes.buckets,
        probe=probe.probe,
        evaluated=evaluated,
        memory=memory.inputs,
        headline=headline(
            config,
            objective,
            task,
            model.config,
            lengths,
            shapes,
            stored=model.stored,
            rate=rate,
            probe=probe.probe,
            evaluated=evaluated,
            micro_batch=memory.micro_batch,
            peak=memory.peak,
        ),
        warnings=[
            *left_out,
            *lengths.warnings,
            *([rate.warning] if rate and rate.warning else []),
            *probe.warnings,
            *memory.warnings,
        ],
        given=given,
    )


def task_stage(
    config: TrainConfig,
    objective: Objective,
    task: Task | None,
    directory: Path | None,
    *,
    date: str | None = None,
) -> TaskStage:
    """The task without prompts that are too long, and with enough of them.

    Args:
        task: None: the one that the config names.
        directory: The pretrained model's, whose tokenizer is used; None: a new model.
        date: As `make_plan`.

    Raises:
        ConfigError: too few prompts, a tokenizer without EOS or padding, or settings of
            a warm start that does not take place.
    """
    if task is None:
        pretrained = None if directory is None else str(directory)
        task = task_of(config.task, pretrained, date=date)
    task = with_stop_tokens(task, config.sampling.stop_tokens)
    warm_starts = bool(
        config.warm_start.enabled and task.warm_start and directory is None
    )
    _check_warm_start(config, warm_starts)
    check_language(task)
    if not task.train or not task.heldout:
        raise ConfigError(
            f"task {task.name} must have trained and held-out prompts, got "
            f"{len(task.train)} and {len(task.heldout)}."
        )
    task, warnings = _only_evaluated(task)
    task, too_long = _short_enough(task, config.sampling.max_prompt_tokens)
    count, prompts = len(task.train), config.batch.prompts
    if count < prompts:
        raise ConfigError(
            f"sampling.prompts must be at most {count}, the task's trained "
            f"prompts, got {prompts}."
        )
    if objective.refills and count < 2 * prompts:
        raise ConfigError(
            f"objective.refills needs at least {2 * prompts} trained prompts, twice a "
            f"step's, got {count}; set it to 0."
        )
    return TaskStage(task, warm_starts, [*task.warnings, *warnings, *too_long])


def _only_evaluated(task: Task) -> tuple[Task, list[str]]:
    """(the task without trained prompts that are held out, a warning if any).

    Raises:
        ConfigError: none is left.
    """
    trained, count = without_heldout(task)
    if not trained.train:
        raise ConfigError(
            f"all {count} trained prompts of task {task.name} are held-out ones too, "
            "which are only evaluated; hold other prompts out."
        )
    if not count:
        return task, []
    return trained, [
        f"{count} of {len(task.train)} trained prompts are held-out ones too, which "
        "are only evaluated, and were left out."
    ]


def _check_warm_start(config: TrainConfig, warm_starts: bool) -> None:
    if warm_starts:
        return
    for name, value in dataclasses.asdict(config.warm_start).items():
        if name != "enabled" and value is not None:
            raise ConfigError(
                f"warm_start.{name} changes nothing: this run has no warm start; leave "
                "it out."
            )


def _short_enough(task: Task, limit: int | None) -> tuple[Task, list[str]]:
    """(the task without prompts of more than `limit` tokens, a warning if any)."""
    if limit is None:
        return task, []
    task, left_out = drop_long_prompts(task, limit)
    if not any(left_out):
        return task, []
    return task, [
        f"{left_out[0]} trained and {left_out[1]} held-out prompts have more "
        f"than sampling.max_prompt_tokens={limit} tokens and are left out."
    ]


def model_stage(
    config: TrainConfig,
    task: Task,
    directory: Path | None,
    *,
    with_weights: bool = True,
    local_devices: bool = True,
) -> ModelStage:
    """The shape of the model, checked against the mesh.

    Args:
        directory: The pretrained model's; None: a new model.
        with_weights, local_devices: As `make_plan`.

    Raises:
        ConfigError: the model cannot be read, or cannot be split over the mesh.
    """
    model, stored, base_bytes = config.model, "float32", 4
    if directory is not None:
        if with_weights:
            check_weights(directory)
        read = read_config(directory)
        model = with_settings(read, config.model, local_devices=local_devices)
        stored = read.dtype
        base_bytes = 2 if {stored, model.dtype} == {"bfloat16"} else 4
    vocab_size = model.vocab_size or len(task.tokenizer)
    model = dataclasses.replace(model, vocab_size=vocab_size, compute_dtype=model.dtype)
    check_mesh(config.mesh, config.batch, model, local_devices=local_devices)
    check_attention(model)
    return ModelStage(model, base_bytes, stored)


def probe_stage(
    config: TrainConfig,
    model: ModelConfig,
    train_prompts: int,
    lengths: Lengths,
    *,
    slow: bool,
) -> ProbeStage:
    """The probe prompts; the default instrument is switched off, with a warning, where
    it does not fit.

    Args:
        slow: A measurement takes long: by default none comes before the first step.

    Raises:
        ConfigError: the instrument was configured and does not fit.
    """
    wanted = config.instrument
    try:
        probe = plan_probe(
            config,
            parameters=num_factors(model) or num_parameters(model),
            train_prompts=train_prompts,
            prompt_tokens=lengths.prompt_length,
            max_new_tokens=lengths.max_new_tokens,
            slow_start=slow,
        )
    except ConfigError as error:
        if wanted != InstrumentConfig():
            raise
        return ProbeStage(None, [f"the instrument is off: {error}"])
    warnings = []
    if probe and wanted.prompts and probe.share > 1.1 * wanted.max_overhead:
        warnings.append(
            f"the instrument will take about {100 * probe.share:.0f} % of step time, "
            f"more than instrument.max_overhead; lower instrument.prompts or raise "
            "instrument.every."
        )
    return ProbeStage(probe, warnings)


def memory_stage(
    config: TrainConfig,
    objective: Objective,
    model: ModelStage,
    lengths: Lengths,
    shapes: Shapes,
    probe: ProbePlan | None,
    evaluation_prompts: int,
    *,
    local_devices: bool = True,
    device_bytes: int | None = None,
) -> MemoryStage:
    """What memory depends on, with warnings where the model or the device is too small.

    Args:
        evaluation_prompts: How many have their answers sampled in an evaluation.
        local_devices, device_bytes: As `make_plan`.

    Raises:
        ConfigError: a reference policy should be on the host and cannot.
    """
    check_reference_memory(
        config.reference_memory, objective, lora=bool(model.config.lora_rank)
    )
    inputs = MemoryInputs(
        model=model.config,
        prompts=config.batch.prompts,
        group_size=config.batch.group_size,
        prompt_tokens=shapes.train_prompt_length,
        max_new_tokens=lengths.max_new_tokens,
        micro_batch_tokens=config.micro_batch_tokens or TOKENS,
        history=objective.history,
        parts=config.updates_per_rollout if objective.disjoint else 1,
        reference=bool(objective.kl_coef),
        reference_memory=config.reference_memory,
        copies=config.updates_per_rollout > 1 and not objective.has_ratio(),
        probe_prompts=probe.prompts if probe else 0,
        probe_group=probe.group_size if probe else 0,
        probe_bytes=probe.vector_bytes if probe else 0,
        weightings=WEIGHTINGS * (config.instrument.counterfactual_every > 0),
        evaluation_samples=config.evaluation.samples,
        evaluation_prompts=evaluation_prompts,
        base_bytes=model.base_bytes,
        widened=jax.default_backend() == "cpu" and local_devices,
        optimizer=config.optimizer,
        mesh=config.mesh,
    )
    available, text = device_bytes, ""
    if available is None and local_devices:
        available = device_memory()
    if config.micro_batch_tokens is None:
        tokens, text = choose_budget(inputs, available)
        inputs = dataclasses.replace(inputs, micro_batch_tokens=tokens)
    memory, warnings = inputs.estimate(), []
    positions = inputs.prompt_tokens + inputs.max_new_tokens
    if config.pretrained and positions > model.config.max_positions:
        warnings.append(
            f"prompts and completions have up to {positions} tokens, and the model was "
            f"made for {model.config.max_positions} (max_position_embeddings)."
        )
    if available is not None and memory.peak > available:
        warnings.append(
            f"about {readable(memory.peak, 'B')} are needed, and the device has "
            f"{readable(available, 'B')}: {memory.advice()}."
        )
    micro = inputs.micro
    text += reductions_text(inputs)
    said = f"micro-batch {micro.prompts} x {micro.samples}{text}"
    return MemoryStage(inputs, memory.peak, said, warnings)
