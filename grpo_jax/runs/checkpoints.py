"""Checkpoints: orbax, asynchronous, the latest few and the best.

A checkpoint is the `TrainState` and the data position. One that a dying process left
half written never counts as a checkpoint, and one that cannot be read is passed over
for the one before it, with a warning.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from grpo_jax.errors import ConfigError, summary
from grpo_jax.parallel.processes import Processes


class Checkpoints:
    """Saves and restores; a context manager, so that every exit waits for saves.

    Args:
        directory: One checkpoint a subdirectory, by step.
        keep: Latest checkpoints to keep, besides the best one.
        warn: Called with a sentence.
        processes: The processes of the run, which must call `save` and `restore`
            together.
        read_only: Leave the directory as it is: a run may be writing to it.

    Attributes:
        saved: The newest step that is saved, or being saved; None where saving failed.
        failure: Why it failed, last time it did.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 1,
        warn: Callable[[str], None],
        processes: Processes | None = None,
        read_only: bool = False,
    ):
        import orbax.checkpoint as ocp

        self._ocp, self._warn, self._read_only = ocp, warn, read_only
        self._directory, self._processes = directory, processes or Processes()
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            self._processes.on_writer(self._mend_scores)
            self._processes.synchronise()  # all processes read the scores next
            options = self._keeping(keep)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self.saved: int | None = self._manager.latest_step()
        self.failure: str | None = None

    def _keeping(self, keep: int) -> Any:
        """Orbax's options: the latest `keep`, and the best of those with a score."""
        policies = self._ocp.checkpoint_managers
        best = policies.BestN(
            n=1,
            get_metric_fn=_score,
            reverse=False,
            keep_checkpoints_without_metrics=False,
        )
        return self._ocp.CheckpointManagerOptions(
            best_fn=_score,
            best_mode="max",
            cleanup_tmp_directories=True,
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), best]
            ),
        )

    def _mend_scores(self) -> None:
        """Replaces scores that cannot be read: one of them keeps orbax from opening any
        checkpoint."""
        for state in self._directory.glob("*/state"):
            file = state.parent / "metrics" / "metrics"
            if not state.parent.name.isdigit():
                continue  # half written
            try:
                float(json.loads(file.read_text())["score"])
            except (OSError, ValueError, KeyError, TypeError):
                self._warn(
                    f"the score of checkpoint {state.parent.name} cannot be read; it "
                    "no longer counts as the best one."
                )
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps({"score": float("-inf")}))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.wait()
        try:
            self._manager.close()
        except Exception as failure:
            self._warn(f"closing the checkpoints failed: {summary(failure)}")

    def save(
        self, step: int, state: Any, data: dict[str, Any], score: float | None
    ) -> None:
        """Starts saving `step`; a failure is a warning, now or at the next call.

        Args:
            step: Names the checkpoint.
            state: A NamedTuple of arrays.
            data: JSON, beside it.
            score: What "best" goes by; None where this step was not evaluated, NaN
                where the evaluation had no rewards.
        """
        if step == self.saved:
            return
        self.wait()  # so that a failure is reported for the step it belongs to
        obstacle = self._obstacle(step, state)
        if obstacle is not None:
            self._failed(step, OSError(obstacle))
            return
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state._asdict()),
            data=self._ocp.args.JsonSave(data),
        )
        try:
            if score is None or not math.isfinite(score):
                score = float("-inf")
            self._manager.save(step, args=args, metrics={"score": float(score)})
            self.saved = step
        except Exception as error:  # a full disk must not end a run that still learns
            self._failed(step, error)

    def _obstacle(self, step: int, state: Any) -> str | None:
        """Why saving would fail, as far as it can be foreseen; else None.

        Several processes would wait for the one that fails. A single process gets the
        error itself, so nothing is foreseen for it."""
        if self._processes.count == 1:
            return None
        reason = self._no_room(step, state) if self._processes.is_writer else None
        return self._agreed(reason)

    def _no_room(self, step: int, state: Any) -> str | None:
        trial = self._directory / f"{step}.trial"
        try:
            trial.mkdir(parents=True)
            trial.rmdir()
            need = sum(x.nbytes for x in jax.tree.leaves(state))
            free = shutil.disk_usage(self._directory).free
        except OSError as error:
            return str(error)
        if free < need:
            return f"{need:,} bytes are needed and {free:,} are free"
        return None

    def wait(self) -> None:
        """Waits for the save in progress; its failure is a warning."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(self.saved, error)

    def newest(self) -> int | None:
        """The newest step on disk; None where the directory has no checkpoint."""
        return max(self._steps_on_disk(), default=None)

    def _steps_on_disk(self) -> list[int]:
        self._manager.reload()
        return list(self._manager.all_steps())

    def _failed(self, step: int | None, error: Exception) -> None:
        self.saved, self.failure = None, summary(error)
        steps = self._steps_on_disk()
        newest = (
            f"the newest complete one is of step {max(steps)}" if steps else "none is"
        )
        self._warn(f"checkpoint of step {step} failed ({summary(error)}); {newest}.")

    def restore(
        self, template: Any, before: int | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """(state, data) of the newest readable checkpoint; None where there is none.

        Newer ones that cannot be read are moved out of the directory (unless it is
        read-only), so that their steps can be saved again.

        Args:
            template: A state of the same shapes, dtypes and shardings.
            before: Only checkpoints of earlier steps.

        Raises:
            ConfigError: there are checkpoints and none can be read; nothing is moved.
        """
        unreadable: list[int] = []
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            template._asdict(),
        )
        steps = [s for s in self._steps_on_disk() if before is None or s < before]
        # A shared file system may list fewer of them to the other processes.
        for step in sorted(self._processes.first(steps), reverse=True):
            restored, reason = self._read(step, abstract)
            if restored is None:
                self._warn(
                    f"checkpoint of step {step} cannot be read ({reason}); trying the "
                    "one before it."
                )
                unreadable.append(step)
                continue
            if not self._read_only:
                self._set_aside(unreadable)
            self.saved = step
            return type(template)(**restored["state"]), restored["data"]
        if unreadable:
            raise ConfigError(
                f"none of the checkpoints {unreadable} in {self._directory} can be "
                "read (see the warnings above); nothing was changed. Were they written "
                "by other versions of the packages?"
            )
        self.saved = None
        return None

    def _read(self, step: int, abstract: Any) -> tuple[Any, str | None]:
        """(checkpoint, None), or (None, the reason why a process cannot read it)."""
        restored, reason = None, self._damage(step, abstract)
        if reason is not None:
            return None, reason
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(abstract),
            data=self._ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # orbax has many kinds of errors for a damaged file
            reason = summary(error)
        reason = self._agreed(reason)
        return (restored, None) if reason is None else (None, reason)

    def _damage(self, step: int, abstract: Any) -> str | None:
        """Why one of several processes cannot read the checkpoint; None for a single
        process.

        In a joint restore, a process that fails leaves the others waiting. So each
        process first reads its share of the arrays alone.
        """
        if self._processes.count == 1:
            return None
        index, reason = self._processes.index, None
        alone = self._ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}
        )
        handler = self._ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        leaves, tree = jax.tree.flatten(abstract)
        skip, host = self._ocp.PLACEHOLDER, self._ocp.RestoreArgs(np.ndarray)
        file = self._directory.absolute() / str(step) / "state"
        try:
            for i in range(index, len(leaves), self._processes.count):
                item = [leaf if i == j else skip for j, leaf in enumerate(leaves)]
                args = self._ocp.args.PyTreeRestore(
                    item=tree.unflatten(item),
                    restore_args=tree.unflatten([host] * len(leaves)),
                )
                handler.restore(file, args=args)
        except Exception as error:
            reason = summary(error)
        return self._agreed(reason)

    def _agreed(self, reason: str | None) -> str | None:
        """The first reason that a process gives."""
        return next(filter(None, self._processes.exchange(reason)), None)

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Moves checkpoints that cannot be read out of the directory."""

        def move() -> None:
            for step in steps:
                target = self._directory.parent / f"unreadable-checkpoint-{step}"
                shutil.rmtree(target, ignore_errors=True)  # of an earlier resume
                (self._directory / str(step)).rename(target)

        self._processes.on_writer(move)
        self._processes.synchronise()
        self._manager.reload()


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]
