"""Checkpoints: orbax, asynchronous, the latest few and the best.

A checkpoint is the whole `TrainState` and the data position. What is half written when
a process dies is never taken for a checkpoint, and one that cannot be read is passed
over for the one before it, with a warning.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.parallel.processes import Processes
from grpo_jax.runs.params import _first_line


class Checkpoints:
    """Saves and restores; a context manager, so that every exit waits for saves."""

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
        if read_only:  # a run may be writing one
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            if self._processes.is_writer:
                with self._processes.writing():
                    self._mend_scores()
            self._processes.exchange(None)  # the others read them next
            options = self._keeping(keep)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        # The newest step that is saved, or being saved; None where saving it failed.
        self.saved = self._manager.latest_step()

    def _keeping(self, keep):
        policies = self._ocp.checkpoint_managers
        return self._ocp.CheckpointManagerOptions(
            best_fn=_score,
            best_mode="max",
            cleanup_tmp_directories=True,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(
                        n=1,
                        get_metric_fn=_score,
                        reverse=False,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
        )

    def _mend_scores(self):
        """Forgets scores that cannot be read, without which orbax opens nothing."""
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

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.wait()
        try:
            self._manager.close()
        except Exception as error:
            self._warn(f"closing the checkpoints failed: {_first_line(error)}")

    def save(self, step: int, state: Any, data: dict, score: float | None) -> None:
        """Starts saving `step`; a failure is a warning, now or at the next call.

        Args:
            score: What "best" goes by; None where this step was not evaluated.
        """
        if step == self.saved:
            return
        self.wait()  # so that a failure is told of the step it belongs to
        obstacle = self._obstacle(step, state)
        if obstacle is not None:
            self._failed(step, OSError(obstacle))
            return
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state._asdict()),
            data=self._ocp.args.JsonSave(data),
        )
        try:
            score = float("-inf") if score is None else float(score)
            self._manager.save(step, args=args, metrics={"score": score})
            self.saved = step
        except Exception as error:  # a full disk must not end a run that still learns
            self._failed(step, error)

    def _obstacle(self, step, state) -> str | None:
        """What will keep several processes from saving, where the others would wait for
        the one that fails; None: nothing foreseen, or there is one."""
        if self._processes.count == 1:
            return None
        reason = None
        if self._processes.is_writer:
            trial = self._directory / f"{step}.trial"
            try:
                trial.mkdir(parents=True)
                trial.rmdir()
                need = sum(x.nbytes for x in jax.tree.leaves(state))
                free = shutil.disk_usage(self._directory).free
                if free < need:
                    reason = f"{need:,} bytes are needed and {free:,} are free"
            except OSError as error:
                reason = str(error)
        return self._agreed(reason)

    def wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(self.saved, error)

    def newest(self) -> int | None:
        """The newest step on disk; None: there is none."""
        return max(self._steps_on_disk(), default=None)

    def _steps_on_disk(self):
        self._manager.reload()
        return self._manager.all_steps()

    def _failed(self, step, error):
        self.saved = None
        steps = self._steps_on_disk()
        newest = f"the newest whole one is of step {max(steps)}" if steps else "none is"
        self._warn(
            f"checkpoint of step {step} failed ({_first_line(error)}); {newest}."
        )

    def restore(
        self, template: Any, before: int | None = None
    ) -> tuple[Any, dict] | None:
        """(state, data) of the newest checkpoint that can be read; None: there is none.

        Newer ones that cannot be read are moved out of the directory (unless it is only
        read), so that their steps can be saved again.

        Args:
            template: A state of the same shapes, dtypes and shardings.
            before: Only checkpoints of earlier steps.

        Raises:
            ConfigError: there are checkpoints and none can be read; nothing is moved.
        """
        unreadable = []
        ocp = self._ocp
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            template._asdict(),
        )
        steps = [s for s in self._steps_on_disk() if before is None or s < before]
        steps = self._processes.first(
            steps
        )  # a shared file system may show others fewer
        for step in sorted(steps, reverse=True):
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                data=ocp.args.JsonRestore(),
            )
            reason = self._damage(step, abstract)
            if reason is None:
                try:
                    found = self._manager.restore(step, args=args)
                except Exception as error:  # orbax has one for every way to be broken
                    reason = _first_line(error)
                reason = self._agreed(reason)
            if reason is not None:
                self._warn(
                    f"checkpoint of step {step} cannot be read ({reason}); trying the "
                    "one before it."
                )
                unreadable.append(step)
                continue
            if not self._read_only:
                if self._processes.is_writer:
                    with self._processes.writing():
                        self._set_aside(unreadable)
                self._processes.exchange(None)
                self._manager.reload()
            self.saved = step
            return type(template)(**found["state"]), found["data"]
        if unreadable:
            raise ConfigError(
                f"none of the checkpoints {unreadable} in {self._directory} can be "
                "read (see the warnings above); nothing was changed. Were they written "
                "by other versions of the packages?"
            )
        self.saved = None
        return None

    def _damage(self, step, abstract) -> str | None:
        """Why several processes cannot read the checkpoint; None: they can, or there is
        one. Restored together, one that fails leaves the others waiting: so each reads
        its share of the arrays alone first."""
        if self._processes.count == 1:
            return None
        index, reason = self._processes.index, None
        alone = self._ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}
        )
        handler = self._ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        leaves, tree = jax.tree.flatten(abstract)
        skip, host = self._ocp.PLACEHOLDER, self._ocp.RestoreArgs(np.ndarray)
        try:
            for i in range(index, len(leaves), self._processes.count):
                item = [leaf if i == j else skip for j, leaf in enumerate(leaves)]
                args = self._ocp.args.PyTreeRestore(
                    item=tree.unflatten(item),
                    restore_args=tree.unflatten([host] * len(leaves)),
                )
                handler.restore(
                    self._directory.absolute() / str(step) / "state", args=args
                )
        except Exception as error:
            reason = _first_line(error)
        return self._agreed(reason)

    def _agreed(self, reason):
        """The first process's that has one."""
        return next(filter(None, self._processes.exchange(reason)), None)

    def _set_aside(self, steps):
        for step in steps:
            target = self._directory.parent / f"unreadable-checkpoint-{step}"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier resume
            (self._directory / str(step)).rename(target)


def _score(metrics):
    return metrics["score"]
