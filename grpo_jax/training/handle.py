"""What a user's `on_step` may ask of a run."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.parallel.processes import Processes

OnStep = Callable[[dict[str, Any], "RunHandle"], object]


class Requests(NamedTuple):
    """What is done once at the end of a step, due or not."""

    evaluation: bool = False
    saving: bool = False


class RunHandle:
    """A run in progress, as `on_step(row, run)` gets it; any thread may use it.

    A row is written, and on_step called, while the device samples the next step: that
    step ends a stop, and carries out what else was asked.

    Attributes:
        directory: The run's.
        step: Steps made, of the newest row.
    """

    def __init__(self, directory: Path):
        self.directory, self.step = directory, 0
        self._stop = threading.Event()
        self._lock, self._requests = threading.Lock(), Requests()

    def stop(self) -> None:
        """Saves what was trained and ends the run, to be resumed; as a first Ctrl-C."""
        self._stop.set()

    def evaluate(self) -> None:
        """Evaluates pass rates at the end of the step in progress."""
        self._ask(evaluation=True)

    def save(self) -> None:
        """Saves a checkpoint at the end of the step in progress."""
        self._ask(saving=True)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def take_requests(self) -> Requests:
        """What was asked since the last call."""
        with self._lock:
            requests, self._requests = self._requests, Requests()
        return requests

    def _ask(self, **what: bool) -> None:
        with self._lock:
            self._requests = self._requests._replace(**what)


class StepListener:
    """Hands the rows of metrics.jsonl to a user's function, in the writing process.

    Args:
        on_step: The function; None: nobody listens, and nothing is ever asked.
        handle: What it gets beside the row.
        processes: The processes of the run.

    Attributes:
        error: What the function raised; the run is asked to stop.
    """

    def __init__(self, on_step: OnStep | None, handle: RunHandle, processes: Processes):
        self._on_step, self._handle, self._processes = on_step, handle, processes
        self.error: Exception | None = None

    def tell(self, row: dict[str, Any]) -> None:
        """Calls the function with a row of its own."""
        if self._on_step is None or self.error is not None:
            return
        self._handle.step = row["step"]
        try:
            self._on_step(dict(row), self._handle)
        except Exception as error:  # raised again when the run is saved
            self.error = error
            self._handle.stop()

    def requests(self) -> Requests:
        """What was asked for, on all processes; a call of all of them together."""
        if self._on_step is None:
            return Requests()
        return self._processes.first(self._handle.take_requests())
