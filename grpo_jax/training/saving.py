"""What is kept of a run: checkpoints, rows that could not be written, the report."""

import contextlib
from typing import Any

import numpy as np

from grpo_jax.parallel.sharding import on_mesh, single_device_mesh
from grpo_jax.report.page import write_report
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.training.context import RunContext
from grpo_jax.training.journal import Journal
from grpo_jax.training.state import TrainState
from grpo_jax.training.watchdog import Watchdog

SKIPPED_LIMIT = 5  # non-finite gradients in a row that end a run


class NonFiniteGradientsError(RuntimeError):
    """Too many updates in a row had no finite gradient; the batch was saved."""


class Saver:
    """Saves the state of a run, and what a failure leaves.

    Args:
        context: The run.
        checkpoints: Where the state goes.
        journal: Whose rows may be unwritten.
        watchdog: Warns of slow phases.
    """

    def __init__(
        self,
        context: RunContext,
        checkpoints: Checkpoints,
        journal: Journal,
        watchdog: Watchdog,
    ):
        self._context, self._checkpoints = context, checkpoints
        self._journal, self._watchdog = journal, watchdog

    def save(
        self, state: TrainState, step: int, row: dict[str, Any], **more: Any
    ) -> None:
        """Starts saving the state.

        Args:
            state: After `step` steps.
            step: Names the checkpoint.
            row: The row of the step; its held-out pass rate is the checkpoint's score.
            more: JSON, kept beside the state.
        """
        score = row.get("eval/heldout_pass_rate")
        with self._watchdog.phase("saving"):
            self._checkpoints.save(step, state, {"step": step} | more, score)

    def wait(self) -> None:
        """Waits for the save in progress."""
        with self._watchdog.phase("saving"):
            self._checkpoints.wait()

    def save_unwritten(self, state: TrainState, step: int, error: OSError) -> OSError:
        """The error to raise where a file cannot be written: a full disk, say.

        A step whose row of metrics.jsonl is not on disk is saved if possible, with the
        row. Where a row of another file is missing, the steps since the checkpoint
        before are made again on resume.
        """
        context, journal = self._context, self._journal
        context.console.stop()
        # Where writing the step's row failed, it is among the unwritten ones already.
        if not journal.unwritten()["metrics"]:
            with contextlib.suppress(OSError):  # it is among them now
                journal.flush()
            context.processes.failure = None  # all processes end here anyway
        unwritten = journal.unwritten()
        if step and unwritten["metrics"]:
            self.save(state, step, {}, unwritten=unwritten)
        self._checkpoints.wait()
        newest = self._checkpoints.newest()
        saved = "nothing is saved" if newest is None else f"step {newest} is saved"
        return OSError(
            f"{error}; stopped at step {step}, {saved}. Make room, then continue with "
            f"--resume --run-dir {context.directory}"
        )

    def unsaved(self, step: int) -> OSError | None:
        """The error to raise where the last save failed; None where `step` is saved."""
        checkpoints, context = self._checkpoints, self._context
        if not any(context.processes.exchange(checkpoints.saved != step)):
            return None
        why = f" ({checkpoints.failure})" if checkpoints.failure else ""
        newest = checkpoints.newest()
        kept = "no step is" if newest is None else f"the newest saved is {newest}"
        return OSError(
            f"step {step} could not be saved{why}; {kept}. Make room, then continue "
            f"with --resume --run-dir {context.directory}"
        )

    def save_rollouts(self, rollouts: Rollouts, step: int) -> NonFiniteGradientsError:
        """The error to raise where updates have no finite gradient; the rollouts
        [P, G, T] of the last one are saved."""
        directory, processes = self._context.directory, self._context.processes
        file = directory / f"nonfinite-step-{step}{processes.file_suffix}.npz"
        arrays: dict[str, Any] = rollouts._asdict()
        np.savez(file, step=step, **arrays)
        self._checkpoints.wait()
        self.report(finished=False)
        return NonFiniteGradientsError(
            f"{SKIPPED_LIMIT} updates in a row had a non-finite gradient; stopped at "
            f"step {step}. Its rollouts are in {file}, the parameters (not touched by "
            "the skipped updates) in the checkpoint of the same step; `grpo-jax replay "
            f"{directory} {step}` computes it again. A new run with a lower "
            "optimizer.learning_rate or a warm-up is the usual cure."
        )

    def report(self, finished: bool) -> None:
        """Writes report.html; a failure is a warning."""
        context = self._context
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
