"""From a config to a first state: directory, starting policy, resumed checkpoint."""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.errors import ConfigError
from grpo_jax.models.hub import local_directory
from grpo_jax.models.lora import without_lora
from grpo_jax.models.policy import Policy, init_policy
from grpo_jax.parallel.processes import Processes, gather_to_host
from grpo_jax.parallel.sharding import put_on_mesh
from grpo_jax.planning.plan import Plan
from grpo_jax.planning.resolve import warm_start_settings
from grpo_jax.rewards.verifiers import VERIFIERS
from grpo_jax.rollouts.asked import asked_facts
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.config_files import to_dict
from grpo_jax.runs.directory import claim
from grpo_jax.runs.params import save_params
from grpo_jax.runs.paths import cache_directory
from grpo_jax.runs.policies import (
    data_fingerprint,
    fingerprint,
    load_base,
    with_factors,
)
from grpo_jax.tasks.types import Task
from grpo_jax.training.context import RunContext
from grpo_jax.training.state import TrainState
from grpo_jax.training.warm_start import warm_start
from grpo_jax.user_code import code_digest

_PATIENCE = 30  # seconds for a shared file system to show what was written


def facts_of(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """What config.json has besides the config: what was resolved of the task and the
    model, and fingerprints of the data and of the pretrained model."""
    task, rate, base = plan.task, plan.learning_rate, ""
    if config.pretrained:
        base = fingerprint(local_directory(config.pretrained))
    return {
        "note": task.note,
        "formula": plan.objective.formula(),
        "eos_ids": list(task.ends),
        "template": task.template,
        "system": task.system,
        "template_arguments": dict(task.template_arguments),
        "date": task.date,
        "max_new_tokens": plan.max_new_tokens,
        "learning_rate_from": rate.source if rate else "the optimizer's own",
        "model": dataclasses.asdict(plan.model),
        "data": data_fingerprint(task),
        "prompts": asked_facts(task, plan.prompts),
        "base": base,
        "given": plan.given.digests() | _reward_digest(task),
    }


def _reward_digest(task: Task) -> dict[str, str]:
    """What tells a reward that is a user's function from another one; {} of others."""
    own = callable(task.reward) and task.reward not in VERIFIERS.values()
    return {"task.reward": code_digest(task.reward)} if own else {}


def claim_directory(
    config: TrainConfig, facts: dict[str, Any], processes: Processes
) -> Path:
    """The run's directory, claimed by the process that writes and seen by all.

    Raises:
        ConfigError: it cannot be claimed, the processes were not given the same config
            and data, or they do not share a file system.
    """
    given = (to_dict(config), facts)

    def check_alike() -> None:
        for index, other in enumerate(processes.exchange(given)):
            if other != given:
                raise ConfigError(
                    f"process {processes.index} was given another config or other data "
                    f"than process {index}; give all of them the same."
                )

    def claim_on_writer() -> Path | None:
        if processes.is_writer:
            with processes.writing():
                return claim(config, facts)
        return None

    processes.together(check_alike)
    directory = processes.first(processes.together(claim_on_writer))
    assert directory is not None  # else `first` has raised

    def wait_for_it() -> None:
        for _ in range(_PATIENCE):
            if (directory / "config.json").exists():
                return
            time.sleep(1)
        raise ConfigError(
            f"process {processes.index} does not see {directory.absolute()}, which "
            "process 0 wrote to; all need --run-dir on a file system that they share."
        )

    processes.together(wait_for_it)
    return directory


def starting_policy(context: RunContext) -> Policy | None:
    """The policy at step 0, which is also the reference; None if asked to stop."""
    policy, model = _base_policy(context), context.plan.model
    if policy is None:
        return None
    policy = put_on_mesh(policy, context.mesh)
    if not model.lora_rank:
        return policy
    key, pretrained = context.keys.lora, context.config.pretrained
    return put_on_mesh(with_factors(policy, model, key, pretrained), context.mesh)


def _base_policy(context: RunContext) -> Policy | None:
    """All parameters to start from, without LoRA factors."""
    config, plan, processes = context.config, context.plan, context.processes
    file = context.directory / "initial.safetensors"
    if config.pretrained or processes.first(file.exists()):
        return load_base(context.directory, plan.model, config.pretrained, context.mesh)
    if plan.given.policy is not None:  # a copy: the first update donates it
        given = plan.given.policy.take()
        policy = given.replace(jax.tree.map(jnp.copy, given.params))
        policy = policy.computed_as(plan.model)
    else:
        policy = init_policy(without_lora(plan.model), context.keys.init)
    if plan.warm_starts:
        policy = _warm_started(context, policy)
        if policy is None:
            return None
    params = gather_to_host(policy.params)
    processes.on_writer(lambda: save_params(file, params))
    processes.synchronise()
    return policy


def _warm_started(context: RunContext, policy: Policy) -> Policy | None:
    config, plan, console = context.config, context.plan, context.console
    settings = warm_start_settings(config.warm_start, plan.task)
    began = time.monotonic()

    def report(stage: str, step: int, figure: str) -> None:
        if step % 100 == 0:
            console.say(f"warm start, {stage}: step {step}, {figure}")

    result = warm_start(
        policy,
        plan.task,
        settings,
        seed=config.seed,
        prompt_length=plan.prompt_length,
        length=plan.answer_tokens,
        temperature=config.sampling.temperature,
        cache=cache_directory() / "warm_starts",
        report=report,
        warn=console.alert,
        processes=context.processes,
    )
    if result is None:
        return None
    how = "cached" if result.cached else f"{time.monotonic() - began:.0f} s"
    console.say(f"warm start: {result.steps} supervised steps, {result} ({how})")
    if not result.reached:
        console.warn(
            "the warm start ended at its step limit, not at its target pass "
            f"rate of {settings.target_pass_rate}."
        )
    return result.policy


class Resumed(NamedTuple):
    """Where a run starts or continues."""

    state: TrainState
    step: int
    unwritten: dict[str, list[dict]]  # rows that the checkpoint kept, by file


def resume(context: RunContext, checkpoints: Checkpoints, state: TrainState) -> Resumed:
    """The newest readable checkpoint, or the start where there is none.

    Args:
        context: The run.
        checkpoints: The checkpoints of the run.
        state: The one before any update.

    Raises:
        ConfigError: the run is already past the steps that it should make.
    """
    start = Resumed(state, 0, {})
    if not context.config.resume:
        return start
    restored = checkpoints.restore(state)
    if restored is None:
        context.console.warn(
            "no readable checkpoint to resume from; starting at step 0."
        )
        return start
    state, data = restored
    if data["step"] > context.config.steps:
        raise ConfigError(
            f"steps must be at least {data['step']}, where {context.directory} is "
            f"already, got {context.config.steps}."
        )
    context.console.say(f"resumed at step {data['step']}.")
    return Resumed(state, data["step"], data.get("unwritten", {}))
