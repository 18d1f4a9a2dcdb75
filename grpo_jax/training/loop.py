"""The training loop: one step is sample, score, weigh, update.

The device's results are waited for where they are needed: completions before scoring,
new parameters before they are sampled from. A step's row is written while the device
samples the next step.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.parallel.processes import (
    LostProcess,
    Processes,
    exit_at_once,
    join,
)
from grpo_jax.parallel.sharding import make_mesh, on_mesh, single_device_mesh
from grpo_jax.planning.plan import make_plan
from grpo_jax.report.page import write_report
from grpo_jax.rewards.pool import verifier_pool
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.directory import record
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.paths import count_compiles, use_compile_cache
from grpo_jax.tasks.types import Task
from grpo_jax.training.collector import Collected, Collector, tied_groups
from grpo_jax.training.console import Console
from grpo_jax.training.context import RunContext
from grpo_jax.training.due import Due
from grpo_jax.training.journal import Journal, RowMaker
from grpo_jax.training.learner import Learner
from grpo_jax.training.observers import BeforeUpdate, Observers
from grpo_jax.training.parts import Parts, make_instrument, make_parts
from grpo_jax.training.signals import StopSignals
from grpo_jax.training.start import (
    Resumed,
    claim_directory,
    facts_of,
    resume,
    starting_policy,
)
from grpo_jax.training.watchdog import Watchdog

SKIPPED_LIMIT = 5  # non-finite gradients in a row that end a run


class TrainResult(NamedTuple):
    """Where a run's files are, and how it ended."""

    run_dir: Path
    metrics: dict[str, Any]  # the last row of metrics.jsonl
    finished: bool  # False: stopped by a signal, to be resumed


class NonFiniteGradients(RuntimeError):
    """Too many updates in a row had no finite gradient; the batch was saved."""


def train(config: TrainConfig, *, task: Task | None = None) -> TrainResult:
    """Runs (or continues) a training run, from prompts to a finished report.

    Args:
        config: What to run.
        task: A task made in code, instead of the one config.task names.

    Returns:
        `TrainResult`: the run's directory and the last step's metrics.

    Raises:
        ConfigError: the run cannot start as configured; nothing was written.
        NonFiniteGradients: five updates in a row had to be skipped.
        OSError: a row could not be written (a full disk); what was computed is in a
            checkpoint where that could be saved.
        LostProcess: another process of the run ended; to be resumed.
    """
    if task is not None:
        named = dataclasses.replace(config.task, name=task.name)
        config = dataclasses.replace(config, task=named)
    join(config.distributed)
    with StopSignals() as signals:
        processes = Processes(lambda: signals.received, config.distributed.timeout_s)
        if processes.count == 1:
            return _train(config, task, processes)
        try:
            return _train(config, task, processes)
        except jax.errors.JaxRuntimeError as error:
            raise LostProcess(
                f"process {processes.index} cannot go on "
                f"({str(error).strip().splitlines()[0][:300]}); where that is no fault "
                "of its own, another process ended, whose output says why. Continue "
                "with the same command and --resume."
            ) from error


def _train(config: TrainConfig, task: Task | None, processes: Processes) -> TrainResult:
    plan = processes.together(lambda: make_plan(config, task))
    mesh = processes.together(lambda: make_mesh(config.mesh))
    with verifier_pool(plan.task.reward, config.scoring) as pool, on_mesh(mesh):
        directory = claim_directory(config, facts_of(config, plan), processes)
        use_compile_cache()
        console = Console(config.log.lines_every, process=processes.index)
        return _run(RunContext(config, plan, directory, processes, pool, mesh, console))


def _run(context: RunContext) -> TrainResult:
    """The run, from its headline to its result."""
    compiles, watchdog = count_compiles(), _watchdog(context)
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
        state = parts.learner.init(policy)
        del policy  # its parameters are the state's now, to be donated
        with watchdog.phase("restoring"):
            resumed = resume(context, checkpoints, state)
        if context.config.resume:  # a new run was recorded when it was claimed
            facts = facts_of(context.config, context.plan)
            context.processes.on_writer(
                partial(record, context.directory, context.config, facts)
            )
        loop = _make_loop(context, parts, checkpoints, watchdog, resumed, compiles)
        del state, resumed
        try:
            return loop.run()
        finally:
            watchdog.stop()
            context.console.stop()
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
    console.say(f"run directory: {directory}")
    tokenizer = plan.task.tokenizer
    context.processes.on_writer(
        lambda: tokenizer.save_pretrained(directory / "tokenizer")
    )


def _make_loop(
    context: RunContext,
    parts: Parts,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    resumed: Resumed,
    compiles: Callable[[], int],
) -> "Loop":
    """The loop from `resumed` on, with the files of the run opened there."""
    step, processes = resumed.step, context.processes
    rows = [  # of earlier measurements, what later ones have to know
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
    )
    instrument = make_instrument(context, parts, [r for r in rows if r["step"] < step])
    observers = Observers(
        due, parts.pass_rates, instrument, parts.learner, journal, watchdog, processes
    )
    measured = due.measurement(step) or any(row["step"] == step for row in rows)
    return Loop(
        context,
        parts,
        observers,
        journal,
        checkpoints,
        watchdog,
        due,
        resumed,
        keep_measurement=measured,
    )


class Stopwatch:
    """Seconds of a step's phases, one after the other."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._began = self._phase_began = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a phase and begins the next one."""
        now = time.monotonic()
        self.times[name], self._phase_began = now - self._phase_began, now

    def restart(self) -> None:
        """Leaves out what happened since the last phase ended."""
        self._phase_began = time.monotonic()

    def total(self, name: str) -> None:
        """Ends the step."""
        self.times[name] = time.monotonic() - self._began


class Loop:
    """The steps of a run, and what follows them.

    Args:
        context: The run.
        parts: What samples, scores, weighs and updates.
        observers: What is measured on the way.
        journal: Where rows go.
        checkpoints: Where the state goes.
        watchdog: Names the phases.
        due: What follows which step.
        resumed: The first state and step.
        keep_measurement: Whether the measurement at the first step belongs into
            instrument.jsonl.

    Attributes:
        state, step: After the newest update.
    """

    def __init__(
        self,
        context: RunContext,
        parts: Parts,
        observers: Observers,
        journal: Journal,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        due: Due,
        resumed: Resumed,
        *,
        keep_measurement: bool,
    ):
        self.context, self.journal = context, journal
        self.state, self.step = resumed.state, resumed.step
        self._collector: Collector = parts.collector
        self._learner: Learner = parts.learner
        self._observers, self._checkpoints = observers, checkpoints
        self._watchdog, self._due = watchdog, due
        self._keep_measurement, self._warned_of_ties = keep_measurement, False

    def run(self) -> TrainResult:
        """Makes the steps that are left, or as many as there are before a stop."""
        processes, config = self.context.processes, self.context.config
        try:
            self._prepare()
            self.context.console.start(self.step, config.steps)
            while self.step < config.steps and not processes.stopping:
                self._make_step()
            self.journal.flush()
            self._observers.write_measurement()
            processes.synchronise()
        except OSError as error:
            if not processes.knows(error):
                raise  # the others learn of it at the end of this process
            raise self._save_unwritten(error) from error
        return self._end()

    def _make_step(self) -> None:
        """Samples, scores, weighs and updates; returns early if asked to stop."""
        collector, learner, observers = self._collector, self._learner, self._observers
        watch = Stopwatch()
        with self._watchdog.phase("sampling"):
            sampling = collector.sample(self.state.params, self.step)
            self.journal.flush()  # the last step's row, while the device samples
            sampled = collector.fetch(sampling)
        watch.lap("time/sample_s")
        if self.context.processes.stopping:
            return  # the resumed run makes the step again, identically
        with self._watchdog.phase("scoring"):
            collected = collector.score(self.state.params, self.step, sampling, sampled)
            weighed = learner.weigh(self.state, collected.rollouts, collected.indices)
        watch.lap("time/score_s")
        if self.context.processes.stopping:
            return
        with self._watchdog.phase("update"):
            before = observers.before_update(weighed, self.state.params, self.step + 1)
            watch.restart()
            self.state, updated = learner.update(weighed.state, weighed.batch)
        watch.lap("time/update_s")
        self.step += 1  # the step is made, whatever fails from here on
        metrics = weighed.metrics | updated
        self.journal.record(self.step, metrics, watch.times | collected.metrics)
        observed = self._observe(before, collected, watch)
        self.journal.record(
            self.step, metrics, watch.times | collected.metrics | observed
        )
        self._save_if_due(collected.rollouts)

    def _observe(
        self, before: BeforeUpdate, collected: Collected, watch: Stopwatch
    ) -> dict[str, Any]:
        """Everything that follows an update: warnings, samples, measurements."""
        step, params, spent_s = self.step, self.state.params, "time/instrument_s"
        rewards = collected.rollouts.scored_rewards
        compared = self._observers.after_update(before, params, rewards, step)
        self._warn(collected)
        if self._due.samples(step):
            log, train = self.context.config.log, self.context.plan.task.train
            self.journal.samples(step, collected, train, log.samples_prompts)
        observed = self._observers.observe(params, step)
        spent = observed.pop(spent_s, 0) + compared.get(spent_s, 0)
        if spent:
            watch.times[spent_s] = spent
        watch.total("time/step_s")
        return observed

    def _save_if_due(self, rollouts: Rollouts) -> None:
        failed = int(self.state.skipped_in_a_row) >= SKIPPED_LIMIT
        if not (failed or self._due.checkpoint(self.step)):
            return
        # The row first: metrics.jsonl always has the row of a checkpoint's step.
        self.journal.flush()
        self.context.processes.synchronise()
        self._save(self.journal.last_row)
        if failed:
            self._observers.write_measurement()
            self._give_up(rollouts)

    def _prepare(self) -> None:
        """Compiles what a step needs and measures the start; less if asked to stop."""
        began, processes, step = time.monotonic(), self.context.processes, self.step
        with self._watchdog.phase("compilation"):
            self._learner.compile(self.state, lambda: processes.stopping)
        if processes.stopping:
            return
        observed = self._observers.prepare(
            self.state.params, step, self._keep_measurement
        )
        if processes.stopping:
            return
        if step == 0:
            self.journal.record(0, {}, observed)
            self.journal.flush()
        else:  # a stop may have left them out of the step's row
            evaluated, measured = (
                self._due.evaluation(step),
                self._due.measurement(step),
            )
            late = {
                name: value
                for name, value in observed.items()
                if (evaluated if name.startswith("eval/") else measured)
            }
            self.journal.complete(step, late)
        self.context.console.say(f"ready after {time.monotonic() - began:.1f} s")

    def _end(self) -> TrainResult:
        """Saves the last step and reports the run."""
        step, context = self.step, self.context
        if step:
            self._save(self.journal.last_row)
            with self._watchdog.phase("saving"):
                self._checkpoints.wait()
        context.console.stop()
        last = self.journal.last_metrics()
        # A stop may have left the last measurement out.
        wanted = {"eval/heldout_pass_rate"}
        if self._due.measurement(step):
            wanted.add("phase/label")
        finished = step >= context.config.steps and wanted <= last.keys()
        if not finished:
            saved = ", saved" if step else ""
            context.console.say(
                f"stopped at step {step}{saved}; continue with --resume "
                f"--run-dir {context.directory}"
            )
        with self._watchdog.phase("report"):
            self._report(finished)
            context.processes.synchronise()  # no process ends before the others
        return TrainResult(context.directory, last, finished)

    def _save_unwritten(self, error: OSError) -> OSError:
        """The error to raise where a file cannot be written: a full disk, say.

        A step whose row of metrics.jsonl is not on disk is saved if possible, with the
        row. Where a row of another file is missing, the checkpoint before makes the
        steps since then again.
        """
        step, context = self.step, self.context
        context.console.stop()
        # Where writing the step's row failed, it is among the unwritten ones already.
        failed = bool(self.journal.unwritten()["metrics"])
        if not failed:
            with contextlib.suppress(OSError):  # it is among them now
                self.journal.flush()
            context.processes.failure = None  # all processes end here anyway
        unwritten = self.journal.unwritten()
        if step and unwritten["metrics"]:
            self._save({}, unwritten=unwritten)
        self._checkpoints.wait()
        newest = self._checkpoints.newest()
        saved = "nothing is saved" if newest is None else f"step {newest} is saved"
        return OSError(
            f"{error}; stopped at step {step}, {saved}. Make room, then continue with "
            f"--resume --run-dir {context.directory}"
        )

    def _warn(self, collected: Collected) -> None:
        """Warns of rewards that are missing, of hung checks, of groups all tied."""
        console, cost, step = self.context.console, collected.cost, self.step
        if cost.errors:
            console.warn(
                f"step {step}: {len(cost.errors)} rewards missing: "
                f"{cost.errors[0][:200]}"
            )
        if cost.failures:
            console.warn(
                f"step {step}: {cost.failures} checks hung or died; they score 0."
            )
        if (
            tied_groups(collected.rollouts.scored_rewards).all()
            and not self._warned_of_ties
        ):
            self._warned_of_ties = True
            console.warn(
                f"step {step}: no group is informative, all its prompts have "
                "weight 0 (said once; see group/informative in metrics.jsonl)."
            )

    def _give_up(self, rollouts: Rollouts) -> None:
        """Saves the rollouts [P, G, T] that gave no finite gradient.

        Raises:
            NonFiniteGradients: always.
        """
        step, directory = self.step, self.context.directory
        suffix = self.context.processes.file_suffix
        file = directory / f"nonfinite-step-{step}{suffix}.npz"
        np.savez(file, step=step, **rollouts._asdict())
        self._checkpoints.wait()
        self._report(finished=False)
        raise NonFiniteGradients(
            f"{SKIPPED_LIMIT} updates in a row had a non-finite gradient; stopped at "
            f"step {step}. Its rollouts are in {file}, the parameters (not touched by "
            "the skipped updates) in the checkpoint of the same step; `grpo-jax replay "
            f"{directory} {step}` computes it again. A new run with a lower "
            "optimizer.learning_rate or a warm-up is the usual cure."
        )

    def _save(self, row: dict[str, Any], **more: Any) -> None:
        """Starts saving the state, scored by the held-out pass rate of its row."""
        score = row.get("eval/heldout_pass_rate")
        with self._watchdog.phase("saving"):
            data = {"step": self.step} | more
            self._checkpoints.save(self.step, self.state, data, score)

    def _report(self, finished: bool) -> None:
        context = self.context
        if not context.processes.is_writer:
            return
        try:
            with on_mesh(single_device_mesh(context.mesh)):
                path = write_report(
                    [context.directory], context.directory / "report.html"
                )
        except Exception as error:  # the run's results are safe in other files
            context.console.warn(
                f"the report could not be written ({type(error).__name__}: {error})."
            )
            return
        if finished:
            context.console.say(f"report: {path}")
