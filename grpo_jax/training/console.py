"""Progress of a run: a live bar in a terminal, plain lines elsewhere."""

import math
import sys
import time
from typing import Any


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def show(value: float | None, pattern: str = ".3f") -> str:
    """The number, or "none" in place of None and NaN."""
    missing = value is None or math.isnan(value)
    return "none" if missing else format(value, pattern)


def step_facts(metrics: dict[str, Any]) -> str:
    """A step's numbers on one line, for the progress bar and for plain lines."""
    get = metrics.get
    facts = [
        f"reward {show(get('reward/mean'))}",
        f"informative {show(get('group/informative'), '.0%')}",
        f"std {show(get('group/std_mean'))}",
    ]
    if "kl/mean" in metrics:
        facts.append(f"kl {show(get('kl/mean'), '.4f')}")
    facts += [
        f"entropy {show(get('entropy/sampled'), '.2f')}",
        f"mismatch {show(get('mismatch/max_abs'), '.0e')}",
    ]
    phases = ("sample", "score", "reference", "update", "evaluation", "instrument")
    facts += [
        f"{phase} {show(metrics[f'time/{phase}_s'], '.2f')}s"
        for phase in phases
        if f"time/{phase}_s" in metrics
    ]
    if metrics.get("completion/cut_off"):
        facts.append(f"cut off {metrics['completion/cut_off']:.0%}")
    if metrics.get("reward/missing"):
        facts.append(f"MISSING REWARDS {metrics['reward/missing']:.0f}")
    if metrics.get("update/skipped_in_a_row"):
        facts.append("UPDATE SKIPPED")
    return "  ".join(facts)


LINE_S = 15  # seconds without a line that the next step's follows


class _Bar:
    """A live progress bar over a line of facts."""

    def __init__(self, done: int, total: int):
        from rich import live, progress

        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[speed]}"),
        )
        self._task = self._progress.add_task("", total=total, completed=done, speed="")
        self._live = live.Live(self._progress)
        self._live.start()

    def print(self, message: str) -> None:
        self._live.console.print(message, markup=False, highlight=False)

    def update(self, done: int, speed: str, facts: str) -> None:
        from rich import console, text

        # The facts are on a line of their own: a narrow terminal wraps them.
        self._progress.update(self._task, completed=done, speed=speed)
        self._live.update(console.Group(self._progress, text.Text(facts)))

    def stop(self) -> None:
        self._live.stop()


class Console:
    """Prints to stdout, and shows progress between `start` and `stop`.

    Args:
        lines_every: Steps between lines where there is no terminal; slow steps have one
            at least every LINE_S seconds.
        process: Index; only process 0 prints, but for the alerts of others.
    """

    def __init__(self, lines_every: int, *, process: int = 0):
        self._lines_every, self._process = lines_every, process
        self._terminal = sys.stdout.isatty() and not process
        self._bar: _Bar | None = None
        self._first = self._total = 0
        self._began = self._said = time.monotonic()

    def say(self, message: str) -> None:
        if self._process:
            return
        if self._bar is not None:
            self._bar.print(message)
        else:
            print(message, flush=True)

    def warn(self, message: str) -> None:
        self.say(f"warning: {message}")

    def alert(self, message: str) -> None:
        """A warning that may concern this process only, printed by any process."""
        if self._process:
            print(f"process {self._process}: warning: {message}", file=sys.stderr)
        else:
            self.warn(message)

    def start(self, done: int, total: int) -> None:
        """Begins to show progress, from `done` of `total` steps."""
        self._first, self._total, self._began = done, total, time.monotonic()
        if self._terminal:
            self._bar = _Bar(done, total)

    def step(self, done: int, metrics: dict[str, Any]) -> None:
        """Shows a step that was made.

        Args:
            done: Steps so far.
            metrics: The metrics of that step, on the host.
        """
        elapsed = time.monotonic() - self._began
        rate = (done - self._first) / max(elapsed, 1e-9)
        left = format_seconds((self._total - done) / max(rate, 1e-9))
        speed = f"{rate:.2f} step/s  ETA {left}"
        facts = step_facts(metrics)
        if self._bar is not None:
            self._bar.update(done, speed, facts)
        elif (
            done % self._lines_every == 0
            or done in (self._first + 1, self._total)
            or time.monotonic() - self._said > LINE_S
        ):
            self._said = time.monotonic()
            self.say(f"step {done}/{self._total}  {speed}  {facts}")

    def stop(self) -> None:
        """Ends the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
