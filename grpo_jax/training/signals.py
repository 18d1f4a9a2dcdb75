"""SIGTERM and SIGINT as a request to save and end.

A signal sets `StopSignals.received`, which `Processes.stopping` reads (with several
processes at their next exchange). `Loop` sees it between the phases of a step and does
not start the next one; `Loop._end` saves the steps made and writes the report;
`grpo-jax train` exits with 0. Of a warm start nothing is kept.

A signal that the process was started to ignore stays ignored, as SIGINT is in the
background jobs of a script (`grpo-jax train ... &`): Ctrl-C is for the foreground.
"""

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any

_HEARD = (
    b"stopping: the phase in progress ends, then the run is saved, if it made a step; "
    b"the same again stops at once, unsaved\n"
)


class StopSignals:
    """Handlers of SIGTERM and SIGINT, where not ignored, while the context is open.

    The first signal asks the run to save and end, which it does when the phase in
    progress is over; the second one kills it.

    Attributes:
        received: Whether a signal came.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller keeps its handlers
                break
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        with contextlib.suppress(OSError):  # nobody may be left to read it
            os.write(2, _HEARD)  # print may be in the middle of a line
        for other in self._previous:
            signal.signal(other, signal.SIG_DFL)  # the next one ends the process

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
