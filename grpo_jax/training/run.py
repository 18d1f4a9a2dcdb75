"""A training run from its config to its result."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from grpo_jax.errors import check_kind, first_line
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.objective import Objective
from grpo_jax.parallel.meshes import make_mesh
from grpo_jax.parallel.processes import LostProcessError, Processes, exit_at_once, join
from grpo_jax.parallel.sharding import on_mesh
from grpo_jax.planning.devices import device_memory
from grpo_jax.planning.plan import make_plan
from grpo_jax.preconditioner import PromptWeights
from grpo_jax.records import as_type
from grpo_jax.rewards.pool import VerifierPool, verifier_pool
from grpo_jax.rewards.trial import try_rewards
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.config_files import to_dict
from grpo_jax.runs.directory import (
    check_same_config,
    check_task_is_found,
    read_facts,
    record,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.objects import Given, given_objects
from grpo_jax.runs.paths import count_compiles, use_compile_cache
from grpo_jax.runs.policies import task_to_continue
from grpo_jax.runs.recorded import continued
from grpo_jax.runs.sinks import SinkRun, Sinks, find_sinks
from grpo_jax.tasks.types import Task, now
from grpo_jax.training.console import Console
from grpo_jax.training.context import RunContext, as_planned
from grpo_jax.training.due import Due
from grpo_jax.training.handle import OnStep, RunHandle, StepListener
from grpo_jax.training.journal import Journal, RowMaker
from grpo_jax.training.loop import Loop, TrainResult
from grpo_jax.training.observers import Observers
from grpo_jax.training.parts import Parts, make_instrument, make_parts
from grpo_jax.training.saving import Saver
from grpo_jax.training.signals import StopSignals
from grpo_jax.training.start import (
    Resumed,
    claim_directory,
    facts_of,
    resume,
    starting_policy,
)
from grpo_jax.training.watchdog import Watchdog


def train(
    config: TrainConfig,
    *,
    task: Task | None = None,
    objective: Objective | None = None,
    weights: PromptWeights | Callable[..., PromptWeights] | None = None,
    optimizer: optax.GradientTransformation
    | Callable[..., optax.GradientTransformation]
    | None = None,
    policy: Policy | Callable[[], Policy] | None = None,
    sampler: Callable[..., Rollouts] | None = None,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Runs (or continues) a training run, from prompts to a finished report.

    Objects given here take the place of what the config names. The run records them by
    name and digest; to resume it, give them again. Named as "module:name" in the config
    they are found again by themselves.

    Args:
        config: What to run. With `resume`, what it was not made with is the run's.
        task: A task made in code, instead of the one config.task names.
        objective: Instead of a row named in config.objective, whose overrides apply.
        weights: The prompt weights, instead of the objective's scale; or a function of
            `num_prompts`, the number of trained prompts, that makes them.
        optimizer: Instead of one by name; or a function of `schedule` that makes one,
            the learning rate by optimizer update as config.optimizer has it.
        policy: Where to start, instead of a new model; or a function that makes it, of
            which the run keeps nothing. It is copied.
        sampler: Is called as `gj.sample` is, with all of its keywords but top_k and
            top_p, and returns `Rollouts` alike: in training, evaluation and probes.
        on_step: Is called as on_step(row, run) with every line of metrics.jsonl and a
            `RunHandle`, that stops, evaluates or saves. An exception in it ends the run
            once that is saved.

    Returns:
        `TrainResult`: the run's directory, the last step's metrics, and whether the run
        made all its steps (a signal may have stopped it).

    Raises:
        ConfigError: the run cannot start as configured; no step was made.
        RuntimeError: on_step raised; what was trained is saved.
        NonFiniteGradientsError: five updates in a row had to be skipped.
        RewardsFailedError: every sample of a step was left without a reward.
        SamplerFailedError: `sampler` raised or returned no rollouts; what was trained
            is saved.
        OSError: a row or the last checkpoint could not be written (a full disk); what
            was computed is in a checkpoint where that could be saved.
        LostProcessError: another process of the run ended; to be resumed.
    """
    config = continued(as_type(TrainConfig, config, "config"))
    if task is not None:
        check_kind("task", task, Task, "name one in config.task, or give load_task's")
        named = dataclasses.replace(config.task, name=task.name)
        config = dataclasses.replace(config, task=named)
    own = Given(objective, weights, optimizer, policy, sampler, on_step)
    join(config.distributed)
    handle = RunHandle(Path())
    with StopSignals() as signals:
        processes = Processes(
            lambda: signals.received or handle.stopped, config.distributed.timeout_s
        )
        if processes.count == 1:
            return _train(config, task, processes, own, handle)
        try:
            return _train(config, task, processes, own, handle)
        except jax.errors.JaxRuntimeError as error:
            raise LostProcessError(
                f"process {processes.index} cannot go on "
                f"({first_line(error)[:300]}); where that is no fault "
                "of its own, another process ended, whose output says why. Continue "
                "with the same command and --resume."
            ) from error


def _train(
    config: TrainConfig,
    task: Task | None,
    processes: Processes,
    own: Given,
    handle: RunHandle,
) -> TrainResult:
    began = time.monotonic()
    # After `join`: a module of the user's may make arrays.
    config, own = processes.together(
        lambda: given_objects(config, own, starting=_starts(config))
    )
    processes.together(lambda: find_sinks(config.log.to))
    date = processes.first(now())  # one for all, where a template prints it
    # Of the smallest device: all processes must split a batch alike.
    memory = [x for x in processes.exchange(device_memory()) if x is not None]
    plan = processes.together(
        lambda: make_plan(
            config,
            _task(config, task, date),
            date=date,
            given=own,
            device_bytes=min(memory, default=None),
        )
    )
    config = as_planned(config, plan)
    mesh = processes.together(lambda: make_mesh(config.mesh))
    console = Console(config.log.lines_every, process=processes.index)
    with verifier_pool(plan.task.reward, config.scoring) as pool, on_mesh(mesh):
        processes.together(lambda: _try_rewards(plan.task, pool, console))
        facts = facts_of(config, plan) | {"task_in_code": task is not None}
        changed = _changed_objects(config, facts)
        directory = handle.directory = claim_directory(config, facts, processes)
        if changed:
            console.warn(changed)
        use_compile_cache(console.warn)
        context = RunContext(
            config, plan, directory, processes, pool, mesh, console, began
        )
        return _run(context, facts, handle)


def _starts(config: TrainConfig) -> bool:
    """Whether the run has no starting policy in its directory yet; one that was stopped
    early has none although it began."""
    if not config.resume or config.run_dir is None:
        return True
    return not (Path(config.run_dir) / "initial.safetensors").exists()


def _changed_objects(config: TrainConfig, facts: dict[str, Any]) -> str | None:
    """A warning where a resumed run gets other objects than at its last start."""
    if not config.resume or config.run_dir is None:
        return None
    if not (Path(config.run_dir) / "config.json").exists():
        return None
    before = read_facts(Path(config.run_dir)).get("given", {})
    changed = [name for name, x in facts["given"].items() if before.get(name, x) != x]
    if not changed:
        return None
    return (
        f"{', '.join(changed)}: the code or its values changed since the run's last "
        "start (what it calls by name is not compared)."
    )


def _try_rewards(task: Task, pool: VerifierPool | None, console: Console) -> None:
    example = task.train[0]
    try_rewards(task.reward, example, task.imitated(example), pool, console.alert)


def _task(config: TrainConfig, task: Task | None, date: str) -> Task | None:
    """The task: of a resumed run as that run asked it; None: the config's."""
    if config.resume and config.run_dir is not None:
        run_dir = Path(config.run_dir)
        if (run_dir / "config.json").exists():
            check_same_config(run_dir, config)
            facts = read_facts(run_dir)
            if task is None:
                check_task_is_found(
                    facts,
                    config.task.name,
                    "give it again, gj.train(config, task=...), or say where it is, "
                    "--task module:name",
                )
                task = task_to_continue(config.task, run_dir)
            date = facts.get("date", date)
    return task and dataclasses.replace(task, date=date)


def _run(context: RunContext, facts: dict[str, Any], handle: RunHandle) -> TrainResult:
    """The run, from its headline to its result."""
    watchdog = _watchdog(context)
    try:
        return _run_watched(context, facts, handle, watchdog)
    finally:
        watchdog.stop()
        context.console.stop()


def _run_watched(
    context: RunContext, facts: dict[str, Any], handle: RunHandle, watchdog: Watchdog
) -> TrainResult:
    compiles = count_compiles()
    _announce(context)
    policy = starting_policy(context)
    if policy is None:
        context.console.say(
            "stopped during the warm start, of which nothing is kept; start again "
            f"with --resume --run-dir {context.directory}"
        )
        return TrainResult(context.directory, {}, False)
    parts = make_parts(context, policy)
    with Checkpoints(
        context.directory / "checkpoints",
        keep=context.config.checkpoint.keep,
        warn=context.console.alert,
        processes=context.processes,
    ) as checkpoints:
        state = parts.learner.init(policy, rollouts=parts.shapes[-1], donate=True)
        del policy  # its parameters are the state's now, to be donated
        with watchdog.phase("restoring"):
            resumed = resume(context, checkpoints, state)
        if context.config.resume:  # a new run was recorded when it was claimed
            context.processes.on_writer(
                partial(record, context.directory, context.config, facts)
            )
        on_step = context.plan.given.on_step
        listener = StepListener(on_step, handle, context.processes)
        loop = _make_loop(
            context, parts, checkpoints, watchdog, resumed, listener, compiles
        )
        del state, resumed
        try:
            return loop.run()
        finally:
            loop.journal.close()


def _watchdog(context: RunContext) -> Watchdog:
    """Warns of long phases; ends the process where others wait for it in vain."""

    def end(waited: str) -> None:
        exit_at_once(
            f"process {context.processes.index} {waited}; it, or another one, is "
            "stuck. Continue with the same command, --resume and --run-dir "
            f"{context.directory}."
        )

    limit = context.processes.phase_limit
    return Watchdog(context.console.alert, limit=limit, end=end)


def _announce(context: RunContext) -> None:
    plan, console, directory = context.plan, context.console, context.directory
    console.say(plan.headline)
    for warning in plan.warnings:
        console.warn(warning)
    if plan.task.note:
        console.say(f"{plan.task.name}: {plan.task.note}")
    console.say(f"run directory: {directory}")
    context.processes.on_writer(lambda: _save_tokenizer(plan.task, directory))


def _save_tokenizer(task: Task, directory: Path) -> None:
    """Writes the tokenizer as a whole; a resumed run keeps the one it has."""
    if (directory / "tokenizer").is_dir():
        return
    unfinished = directory / "tokenizer.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    task.tokenizer.save_pretrained(unfinished)
    unfinished.rename(directory / "tokenizer")


def _make_sinks(context: RunContext, step: int) -> Sinks | None:
    """Where else rows go, in the process that writes; those after `step` follow."""
    if not context.processes.is_writer:
        return None
    directory, config = context.directory, context.config
    run = SinkRun(directory.resolve().name, directory, to_dict(config), step)
    return Sinks(find_sinks(config.log.to), run, context.console.warn)


def _make_loop(
    context: RunContext,
    parts: Parts,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    resumed: Resumed,
    listener: StepListener,
    compiles: Callable[[], int],
) -> Loop:
    """The loop that starts at `resumed`, with the run's files opened at its step."""
    step, processes = resumed.step, context.processes
    rows = [  # what later measurements need of earlier ones
        {name: row[name] for name in ("step", "phase")}
        for row in read_lines(context.directory / "instrument.jsonl")
    ]
    rows = processes.first(rows)
    due = Due(context.config, context.plan.probe is not None)
    journal = Journal(
        context.directory,
        processes,
        context.console,
        RowMaker(parts.schedule, compiles),
        step=step,
        unwritten=resumed.unwritten,
        tell=listener.tell,
        sinks=_make_sinks(context, step),
    )
    instrument = make_instrument(context, parts, [r for r in rows if r["step"] < step])
    observers = Observers(
        due,
        parts.pass_rates,
        instrument,
        parts.learner,
        journal,
        watchdog,
        processes,
        context.console.say,
    )
    measured = due.measurement(step) or any(row["step"] == step for row in rows)
    return Loop(
        context,
        parts,
        observers,
        journal,
        Saver(context, checkpoints, journal, watchdog),
        watchdog,
        due,
        resumed,
        listener,
        keep_measurement=measured,
    )
