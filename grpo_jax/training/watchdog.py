"""Warns of a phase that takes far longer than it usually does."""

import contextlib
import math
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from grpo_jax.training.console import format_seconds


class Watchdog:
    """Warns of a phase that takes more than `factor` times its median, and again at
    every doubling of that time.

    A phase that was timed fewer than three times may be compiling: it has no median
    yet, and `unknown` bounds it.

    Args:
        warn: Called with a sentence, from a thread.
        factor: Times the median.
        least: Seconds below which there is no warning.
        unknown: Seconds that a phase without a median may take.
        limit: Seconds after which `end` is called.
        end: Called with a sentence on the wait.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        *,
        factor: float = 10.0,
        least: float = 2.0,
        unknown: float = 300.0,
        limit: float | None = None,
        end: Callable[[str], None] | None = None,
    ):
        self._warn = warn
        self._factor, self._least, self._unknown = factor, least, unknown
        self._limit, self._end = math.inf if limit is None else limit, end
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=100))
        self._changed = threading.Condition()
        self._now: tuple[str, float, float] | None = (
            None  # (phase, began, next warning)
        )
        self._thread: threading.Thread | None = None
        self._ended = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the phase; one inside another counts as the outer one."""
        with self._changed:
            outer, began = self._now is not None, time.monotonic()
            if not outer:
                self._now = (name, began, self._allowed(name))
                if self._thread is None and not self._ended:
                    self._thread = threading.Thread(target=self._watch, daemon=True)
                    self._thread.start()
                self._changed.notify()
        try:
            yield
        finally:
            if not outer:
                with self._changed:
                    self._now = None
                    self._seconds[name].append(time.monotonic() - began)

    def stop(self) -> None:
        """Ends the thread; no warning follows."""
        with self._changed:
            self._ended = True
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _allowed(self, name: str) -> float:
        """Seconds before the first warning."""
        median = self._median(name)
        if median is None:
            return self._unknown
        return max(self._least, self._factor * median)

    def _median(self, name: str) -> float | None:
        seconds = self._seconds[name]
        return statistics.median(seconds) if len(seconds) >= 3 else None

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                # Woken at the next warning, and by a phase that begins before it; one
                # that ends does not wake it.
                if self._now is None:
                    self._changed.wait()
                    continue
                name, began, warn_at = self._now
                waited = time.monotonic() - began
                if waited >= self._limit and self._end is not None:
                    self._end(f"waited {format_seconds(waited)} for {name}")
                    return
                if waited < warn_at:
                    self._changed.wait(min(warn_at, self._limit) - waited)
                    continue
                self._now = (name, began, 2 * warn_at)
                median = self._median(name)
                usual = (
                    "the first ones may compile"
                    if median is None
                    else f"its median is {median:.2f} s"
                )
                self._warn(
                    f"still waiting for {name}, for {format_seconds(waited)} now "
                    f"({usual})."
                )
