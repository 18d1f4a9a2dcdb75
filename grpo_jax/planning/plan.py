"""What a run will do, worked out before anything is allocated."""

import dataclasses
import math
from typing import Any

import jax

from grpo_jax.errors import ConfigError
from grpo_jax.instrument.plan import ProbePlan, plan_probe
from grpo_jax.instrument.weightings import WEIGHTINGS
from grpo_jax.models.config import num_factors, num_parameters
from grpo_jax.models.pretrained import check_weights, read_config
from grpo_jax.objectives.presets import Objective
from grpo_jax.parallel.sharding import batch_shards
from grpo_jax.planning.devices import check_mesh, device_memory
from grpo_jax.planning.memory import MemoryInputs, readable
from grpo_jax.planning.resolve import (
    resolve_objective,
    resolve_weights,
    warm_start_settings,
    weights_text,
)
from grpo_jax.preconditioner import PromptWeights
from grpo_jax.rollouts.demonstrations import Demonstrations
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.rollouts.lengths import (
    bucket,
    completion_buckets,
    completion_tokens,
    within,
)
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.rollouts.refine import refined_length, template_pieces
from grpo_jax.runs.config import (
    InstrumentConfig,
    MeshConfig,
    TrainConfig,
)
from grpo_jax.runs.policies import check_language, task_of, with_settings
from grpo_jax.tasks.types import Task


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before anything is allocated."""

    task: Task
    objective: Objective
    weights: PromptWeights
    model: Any  # ModelConfig with the tokenizer's vocabulary
    prompts: list[list[int]]  # token ids of the trained prompts
    prompt_length: int
    refine: list  # pieces of the prompt that a draft has joined; [] without drafts
    train_prompt_length: int  # of the prompts in the update; longer with drafts
    answer_tokens: int  # the longest answer and EOS, where they are known
    max_new_tokens: int
    warm_starts: bool  # supervised learning comes first
    buckets: list[int]  # completion lengths of the update
    micro: Any  # MicroBatch, of the longest bucket
    probe: ProbePlan | None  # None: no instrument
    memory: MemoryInputs
    headline: str
    warnings: list[str]


def make_plan(
    config: TrainConfig,
    task: Task | None = None,
    *,
    with_weights: bool = True,
    elsewhere: bool = False,
) -> Plan:
    """Checks a config against its task and fixes every shape.

    Args:
        with_weights: The pretrained model's tensors must be there, not its config and
            tokenizer alone.
        elsewhere: It will run on other devices than this machine's: on accelerators,
            which compute bfloat16 as it is, and as many as it asks for.

    Raises:
        ConfigError: the run cannot work as configured.
    """
    objective = resolve_objective(config)
    if task is None:
        task = task_of(config.task, config.pretrained)
    warm_starts = bool(
        config.warm_start.enabled and task.warm_start and not config.pretrained
    )
    settings = _without(config.warm_start, "enabled")
    given = [name for name, value in settings.items() if value is not None]
    if given and not warm_starts:
        raise ConfigError(
            f"warm_start.{given[0]} changes nothing: this run has no warm start; leave "
            "it out."
        )
    tokenizer, sampling = task.tokenizer, config.sampling
    check_language(task)
    if not task.train or not task.heldout:
        raise ConfigError(
            f"task {task.name} must have trained and held-out prompts, got "
            f"{len(task.train)} and {len(task.heldout)}."
        )
    warnings: list[str] = []
    limit = sampling.max_prompt_tokens
    if limit is not None:
        task, left_out = within(task, limit)
        if any(left_out):
            warnings.append(
                f"{left_out[0]} trained and {left_out[1]} held-out prompts have more "
                f"than sampling.max_prompt_tokens={limit} tokens and are left out."
            )
    if len(task.train) < sampling.prompts:
        raise ConfigError(
            f"sampling.prompts must be at most {len(task.train)}, the task's trained "
            f"prompts, got {sampling.prompts}."
        )
    examples = task.train + task.heldout
    if warm_starts and task.warm_start.longest:
        examples = [*examples, task.warm_start.longest]
    prompts = encode_prompts(task, examples)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    max_new_tokens, needed = sampling.max_new_tokens, 1
    if task.single_answer or max_new_tokens is None:
        needed = completion_tokens(task, examples)
    if max_new_tokens is None:
        max_new_tokens = needed + math.ceil(needed * _spare(objective))
    if max_new_tokens < needed:
        raise ConfigError(
            f"sampling.max_new_tokens must be at least {needed} for task {task.name}, "
            f"its longest answer and EOS, got {max_new_tokens}."
        )
    free = max_new_tokens * (1 - objective.overlong_share)
    if objective.overlong == "punish" and 1 < needed and needed > math.ceil(free):
        warnings.append(
            f"the longest right answer has {needed} of {max_new_tokens} tokens and "
            "will be punished for its length; raise sampling.max_new_tokens to "
            f"{needed + math.ceil(needed * _spare(objective))} or leave it out."
        )
    model, base_bytes = config.model, 4
    if config.pretrained:
        if with_weights:
            check_weights(config.pretrained)
        stored = read_config(config.pretrained)
        model = with_settings(stored, config.model)
        base_bytes = 2 if stored.compute_dtype == "bfloat16" else 4
    vocab_size = model.vocab_size or len(tokenizer)
    model = dataclasses.replace(model, vocab_size=vocab_size)
    check_language(task, model)
    check_mesh(config.mesh, sampling, model, here=not elsewhere)
    prompt_length = bucket(len(prompts[longest]))
    p, g = sampling.prompts, sampling.group_size
    refine, train_prompt_length = [], prompt_length
    if objective.drafts:
        template = sampling.refine_template or task.refine_template
        refine = template_pieces(tokenizer, template)
        trained = max(len(ids) for ids in prompts[: len(task.train)])
        train_prompt_length = bucket(refined_length(refine, trained, max_new_tokens))
    elif sampling.refine_template is not None:
        raise ConfigError(
            f"sampling.refine_template changes nothing: {config.objective.name} has no "
            "drafts; set objective.drafts or leave it out."
        )
    if objective.refills and len(task.train) < 2 * p:
        raise ConfigError(
            f"objective.refills needs at least {2 * p} trained prompts, twice a "
            f"step's, got {len(task.train)}; set it to 0."
        )
    weights = resolve_weights(config, objective, len(task.train))
    seen = objective.history * p
    micro = micro_batch(
        seen,
        g,
        train_prompt_length,
        max_new_tokens,
        config.micro_batch_tokens,
        batch_shards(seen, g, config.mesh),
    )
    try:
        probe = plan_probe(
            config,
            parameters=num_factors(model) or num_parameters(model),
            train_prompts=len(task.train),
            prompt_tokens=prompt_length,
            max_new_tokens=max_new_tokens,
        )
    except ConfigError as error:
        if config.instrument != InstrumentConfig():
            raise
        probe = None  # nobody asked for it
        warnings.append(f"the instrument is off: {error}")
    wanted = config.instrument
    if probe and wanted.prompts and probe.share > 1.1 * wanted.max_overhead:
        warnings.append(
            f"the instrument will take about {100 * probe.share:.0f} % of step time, "
            f"more than instrument.max_overhead; lower instrument.prompts or raise "
            "instrument.every."
        )
    if warm_starts:  # its errors belong here, before anything is written
        settings = warm_start_settings(config.warm_start, task)
        length = needed if needed > 1 else max_new_tokens
        Demonstrations(task, settings, prompt_length, length)
    positions = train_prompt_length + max_new_tokens
    if config.pretrained and positions > model.max_positions:
        warnings.append(
            f"prompts and completions have up to {positions} tokens, and the model was "
            f"made for {model.max_positions} (max_position_embeddings)."
        )
    inputs = MemoryInputs(
        model=model,
        prompts=p,
        group_size=g,
        prompt_tokens=train_prompt_length,
        max_new_tokens=max_new_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        history=objective.history,
        parts=config.updates_per_rollout if objective.disjoint else 1,
        reference=bool(objective.kl_coef),
        copies=config.updates_per_rollout > 1 and not objective.has_ratio(),
        probe_prompts=probe.prompts if probe else 0,
        probe_group=probe.group_size if probe else 0,
        probe_bytes=probe.vector_bytes if probe else 0,
        weightings=_weightings(config),
        evaluation_samples=config.evaluation.samples,
        base_bytes=base_bytes,
        widened=jax.default_backend() == "cpu" and not elsewhere,
        mesh=config.mesh,
    )
    memory = inputs.estimate()
    available = device_memory()
    if not elsewhere and available is not None and memory.peak > available:
        warnings.append(
            f"about {readable(memory.peak, 'B')} are needed, and the device has "
            f"{readable(available, 'B')}: {memory.advice()}."
        )
    mechanisms = "".join(f" | {text}" for text in objective.mechanisms())
    devices = ""
    if config.mesh != MeshConfig():
        sizes = dataclasses.asdict(config.mesh).items()
        devices = " | mesh " + " x ".join(f"{name} {size}" for name, size in sizes)
    headline = (
        f"{config.objective.name} on {task.name}: {objective.formula()}"
        f"{weights_text(config.weights)}{mechanisms} | "
        f"{p} prompts x {g} samples, {train_prompt_length} + {max_new_tokens} tokens, "
        f"micro-batch {micro.prompts} x {micro.samples} | "
        f"{_size(model)}, {model.compute_dtype}{devices} | "
        f"about {readable(memory.peak, 'B')} on the device"
    )
    if probe:
        headline += f"\ninstrument: {probe.text(config.instrument.every)}"
    return Plan(
        task,
        objective,
        weights,
        model,
        prompts[: len(task.train)],
        prompt_length,
        refine,
        train_prompt_length,
        needed if needed > 1 else max_new_tokens,
        max_new_tokens,
        warm_starts,
        # A history holds rollouts of many steps: one length for all.
        [max_new_tokens] if seen > p else completion_buckets(max_new_tokens),
        micro,
        probe,
        inputs,
        headline,
        warnings,
    )


def _size(model):
    text = f"{readable(num_parameters(model))} parameters"
    if model.lora_rank:
        text += f", {readable(num_factors(model))} of LoRA trained"
    return text


def _spare(objective):
    """Tokens beyond the longest answer, as a share of it: where length is punished, the
    punished part should lie there."""
    share = objective.overlong_share if objective.overlong == "punish" else 0.0
    return 1.0 if share == 1 else share / (1 - share)


def _weightings(config):
    """Compared in a counterfactual step; 0: there is none."""
    return WEIGHTINGS * (config.instrument.counterfactual_every > 0)


def _without(record, name):
    values = dataclasses.asdict(record)
    del values[name]
    return values
