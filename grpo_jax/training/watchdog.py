"""Says what a run waits for, once it waits far longer than it usually does."""

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

    Until a phase was timed three times it may be compiling: only `unknown` counts.

    Args:
        warn: Called with a sentence, from a thread.
        least: Seconds below which no wait is worth a word.
        unknown: Seconds a phase without a median may take.
        limit: Seconds after which `end` is called, with a sentence on the wait.
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
        self._seconds: dict[str, deque] = defaultdict(lambda: deque(maxlen=100))
        self._changed = threading.Condition()
        self._now: tuple[str, float, float] | None = None  # (phase, began, next word)
        self._thread: threading.Thread | None = None
        self._ended = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what happens inside; a phase inside another belongs to that one."""
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
        """Nothing is said after this returns."""
        with self._changed:
            self._ended = True
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _allowed(self, name):
        median = self._median(name)
        if median is None:
            return self._unknown
        return max(self._least, self._factor * median)

    def _median(self, name):
        seconds = self._seconds[name]
        return statistics.median(seconds) if len(seconds) >= 3 else None

    def _watch(self):
        with self._changed:
            while not self._ended:
                # Woken at the next word, and by a phase that begins in between; one
                # that ends wakes nobody.
                if self._now is None:
                    self._changed.wait()
                    continue
                name, began, word = self._now
                waited = time.monotonic() - began
                if waited >= self._limit and self._end is not None:
                    self._end(f"waited {format_seconds(waited)} for {name}")
                    return
                if waited < word:
                    self._changed.wait(min(word, self._limit) - waited)
                    continue
                self._now = (name, began, 2 * word)
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
