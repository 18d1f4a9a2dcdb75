"""What is kept of a run: checkpoints, rows that could not be written, the report."""

import contextlib
import time
from typing import Any

import numpy as np

from grpo_jax.parallel.meshes import single_device_mesh
from grpo_jax.parallel.processes import UnwrittenError
from grpo_jax.parallel.sharding import on_mesh
from grpo_jax.report.page import write_report
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.lines import read_lines
from grpo_jax.training.context import RunContext
from grpo_jax.training.journal import Journal
from grpo_jax.training.state import TrainState
from grpo_jax.training.watchdog import Watchdog

# checkpoint.best -> the metric that is a checkpoint's score.
SCORES = {"pass_rate": "eval/heldout_pass_rate", "reward": "eval/heldout_reward"}
SKIPPED_LIMIT = 5  # non-finite gradients in a row that end a run


class NonFiniteGradientsError(RuntimeError):
    """Too many updates in a row had no finite gradient; the batch was saved."""


class RewardsFailedError(RuntimeError):
    """No sample of a step got a reward; the steps before it were saved."""


class SamplerFailedError(RuntimeError):
    """The user's sampler raised, or returned no rollouts; the steps before it were
    saved."""


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
        self._last_save = time.monotonic()

    def overdue(self) -> bool:
        """Whether `checkpoint.minutes` passed since the last save, or since the start,
        by the clock of the process that writes; a call of all processes together."""
        limit_s = 60 * self._context.config.checkpoint.minutes
        if not limit_s:
            return False
        elapsed = time.monotonic() - self._last_save
        return self._context.processes.first(elapsed >= limit_s)

    def save(
        self, state: TrainState, step: int, row: dict[str, Any], **more: Any
    ) -> None:
        """Starts saving the state.

        Args:
            state: After `step` steps.
            step: Names the checkpoint.
            row: The row of the step, with the score that `checkpoint.best` names.
            more: JSON, kept beside the state.
        """
        self._last_save = time.monotonic()
        score = row.get(SCORES[self._context.config.checkpoint.best])
        with self._watchdog.phase("saving"):
            self._checkpoints.save(step, state, {"step": step} | more, score)

    def wait(self) -> None:
        """Waits for the save in progress."""
        with self._watchdog.phase("saving"):
            self._checkpoints.wait()

    def save_unwritten(
        self, state: TrainState, step: int, error: OSError
    ) -> UnwrittenError:
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
            self.save(state, step, unwritten["metrics"][-1], unwritten=unwritten)
        return UnwrittenError(
            f"{error}; stopped at step {step}, {self._saved()}. Make room, then "
            f"continue with --resume --run-dir {context.directory}"
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

    def save_before(
        self,
        state: TrainState,
        step: int,
        reason: str,
        *,
        kind: type[RuntimeError] = RewardsFailedError,
        remedy: str = "Mend the reward",
    ) -> RuntimeError:
        """The error to raise where no next step can be made: no sample of it got a
        reward, or none was sampled.

        Args:
            state: After `step` steps, which is saved.
            step: Whose row is the journal's last one.
            reason: Why, without a full stop.
            kind: Of the error.
            remedy: What to do before the run is continued.
        """
        if step:
            self.save(state, step, self._journal.last_row)
        saved = self._saved()
        self.report()
        return kind(
            f"{reason}; stopped at step {step}, {saved}. {remedy}, then "
            f"continue with --resume --run-dir {self._context.directory}"
        )

    def _saved(self) -> str:
        """Which step is on disk, once the save in progress has ended."""
        self.wait()
        newest = self._checkpoints.newest()
        return "no step is saved" if newest is None else f"step {newest} is saved"

    def save_rollouts(
        self, rollouts: Rollouts, step: int, odd_weights: str | None = None
    ) -> NonFiniteGradientsError:
        """The error to raise where updates have no finite gradient; the rollouts
        [P, G, T] of the last one are saved.

        Args:
            rollouts: Of the last update.
            step: The last one.
            odd_weights: What is wrong with its prompt weights, if anything.
        """
        directory, processes = self._context.directory, self._context.processes
        file = directory / f"nonfinite-step-{step}{processes.file_suffix}.npz"
        fields = rollouts._asdict().items()
        arrays: dict[str, Any] = {k: x for k, x in fields if x is not None}
        kept = f"Its rollouts are in {file}"
        try:
            np.savez(file, step=step, **arrays)
        except OSError as error:
            file.unlink(missing_ok=True)
            kept = f"Its rollouts could not be written ({error})"
        saved = self._saved()
        self.report()
        cure = (
            "A new run with a lower optimizer.learning_rate or a warm-up is the usual "
            "cure."
        )
        if odd_weights is not None:
            cure = (
                f"In the last step {odd_weights}; mend the rule, or the rewards that "
                "it sees."
            )
        return NonFiniteGradientsError(
            f"{SKIPPED_LIMIT} updates in a row had a non-finite gradient; stopped at "
            f"step {step}, {saved}, with the parameters that the skipped updates left "
            f"as they were. {kept}; `grpo-jax replay {directory} {step}` computes it "
            f"again. {cure}"
        )

    def report(self) -> None:
        """Writes report.html, unless there is no step yet; a failure is a warning."""
        context = self._context
        if not context.processes.is_writer:
            return
        if not read_lines(context.directory / "metrics.jsonl"):
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
        context.console.say(f"report: {path}")
