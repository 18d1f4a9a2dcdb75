"""Where else the rows of metrics.jsonl go: TensorBoard, wandb, trackio, your own.

A sink is a function of the run that gives a function of a row. It has a thread and a
queue of its own: one that fails or hangs is left out, and the run goes on. Without jax;
the packages are imported by the sinks' threads.
"""

import json
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError, summary, unknown_name
from grpo_jax.runs.files import replace_text
from grpo_jax.user_code import find_object, takes

CLOSE_S = 30  # seconds that all sinks together have to end with the run
MOST_WAITING = 1000  # rows that wait for a slow sink; what comes then is left out

_EXAMPLE = """
    def sink(run):  # run.name, run.directory, run.config, run.step
        return lambda row: print(run.name, row["step"], row.get("reward/mean"))"""


class SinkRun(NamedTuple):
    """The run whose rows a sink gets.

    Attributes:
        name: Its directory's name.
        directory: Where it writes.
        config: As JSON types.
        step: Of the checkpoint that it resumes from; 0 at the start. The rows after it
            come, some of them again where the run had been further.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    step: int


Sink = Callable[[SinkRun], Any]


class TensorBoard:
    """Event files in the run's directory; `tensorboard --logdir runs` names the run."""

    def __init__(self, run: SinkRun):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        purged = None
        if any(run.directory.glob("events.out.tfevents.*")):  # of rows made again
            purged = run.step + 1 if run.step else 0
        self._writer = SummaryWriter(
            str(run.directory), purge_step=purged, filename_suffix=f".{run.step}"
        )
        text = json.dumps(run.config, indent=2)
        self._writer.add_text("config", f"```json\n{text}\n```", run.step)

    def __call__(self, row: dict[str, Any]) -> None:
        for name, value in figures(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, in $WANDB_PROJECT, online or as $WANDB_MODE says."""

    def __init__(self, run: SinkRun):
        import wandb  # pyright: ignore[reportMissingImports]

        online = wandb.setup().settings.mode == "online"
        if online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError(
                "not logged in; call `wandb login`, or set WANDB_MODE=offline"
            )
        self._sent = _Sent(run, "wandb")
        if not self._sent.facts:
            self._sent.keep(id=uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "grpo-jax"),
            name=run.name,
            id=self._sent.facts["id"],
            dir=run.directory,
            config=run.config,
            resume="allow",
            allow_val_change=True,
            reinit="create_new",  # beside a run that the caller has
            settings=wandb.Settings(console="off", finish_timeout=CLOSE_S),
        )

    def __call__(self, row: dict[str, Any]) -> None:
        self._sent.once(row, partial(self._run.log, commit=True))

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


class Trackio:
    """A run of trackio, in $TRACKIO_PROJECT; on this machine unless the environment
    names a server of it."""

    def __init__(self, run: SinkRun):
        import trackio  # pyright: ignore[reportMissingImports]

        self._sent = _Sent(run, "trackio")
        project = os.environ.get("TRACKIO_PROJECT", "grpo-jax")
        again = bool(self._sent.facts)
        if not again:
            try:
                taken = {other.name for other in trackio.Api().runs(project)}
            except ValueError:  # no such project yet
                taken = set()
            name = f"{run.name}-{uuid.uuid4().hex[:4]}" if run.name in taken else None
            self._sent.keep(name=name or run.name)
        self._run = trackio.init(
            project=project,
            name=self._sent.facts["name"],  # by which it is found again
            config=run.config,
            resume="allow" if again else "never",
            embed=False,
        )

    def __call__(self, row: dict[str, Any]) -> None:
        self._sent.once(row, self._run.log)

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()


SINKS: Mapping[str, Sink] = MappingProxyType(
    {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
)


def figures(row: dict[str, Any]) -> dict[str, int | float]:
    """The finite numbers of a row, without its step."""
    return {
        name: x
        for name, x in row.items()
        if name != "step" and isinstance(x, int | float) and math.isfinite(x)
    }


class _Sent:
    """What a service was sent that takes no row back: kept beside the run, so that rows
    which a resumed run makes again are not sent twice."""

    def __init__(self, run: SinkRun, name: str):
        self._file, self._first = run.directory / f"sink-{name}.json", run.step
        self.facts: dict[str, Any] = {}
        if self._file.exists():
            self.facts = json.loads(self._file.read_text())

    def keep(self, **facts: Any) -> None:
        self.facts |= facts
        replace_text(self._file, json.dumps(self.facts))

    def once(self, row: dict[str, Any], log: Callable[..., object]) -> None:
        """Calls log(figures, step=...), but for a row that was sent before it was made
        again; what a stop had left out of the first step's row was not."""
        step, newest = row["step"], self.facts.get("step", -1)
        added = step == self._first > 0
        if step > newest or added:
            self.keep(step=max(step, newest))  # first: killed in between, it is missing
            log(figures(row), step=step)


def check_sinks(names: Collection[str]) -> None:
    """ConfigError for a name that no sink has, or that comes twice."""
    for name in names:
        if ":" not in name and name not in SINKS:
            raise unknown_name("log.to", name, [*SINKS, "module:function"])
    if len({*names}) < len(names):
        raise ConfigError(f"log.to names a sink twice: {', '.join(names)}.")


def find_sinks(names: Collection[str]) -> dict[str, Sink]:
    """Name -> sink, of SINKS or of the user's own.

    Raises:
        ConfigError: one of the user's own cannot be found or called.
    """
    sinks = {name: SINKS.get(name) or find_object(name, "log.to") for name in names}
    for name, sink in sinks.items():
        if not takes(sink, None):
            raise ConfigError(
                f"log.to {name} must be a function of the run that gives a function of "
                f"a row, got {sink!r}; for example{_EXAMPLE}"
            )
    return sinks


_AT_START = "at its start"


class Sinks:
    """Hands rows to sinks; none of them holds up or ends the run.

    Args:
        sinks: Name -> sink; `find_sinks` gives them.
        run: The run, as each is called with it.
        warn: Gets a sentence where a sink fails or is too slow; any thread calls it.
    """

    def __init__(
        self, sinks: Mapping[str, Sink], run: SinkRun, warn: Callable[[str], None]
    ):
        self._feeds = [_Feed(name, sink, run, warn) for name, sink in sinks.items()]

    def log(self, row: dict[str, Any]) -> None:
        """Hands on a row; returns at once."""
        for feed in self._feeds:
            feed.put(row)

    def close(self) -> None:
        """Lets every sink take the rows that wait, for CLOSE_S seconds at most."""
        deadline = time.monotonic() + CLOSE_S
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.wait(deadline)


class _Feed:
    """One sink, its thread, and the rows that wait for it."""

    def __init__(
        self, name: str, sink: Sink, run: SinkRun, warn: Callable[[str], None]
    ):
        self._name, self._warn = f"log.to {name}", warn
        self._rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._silent = self._full = False
        self._thread = threading.Thread(
            target=self._work, args=(sink, run), name=self._name, daemon=True
        )
        self._thread.start()

    def put(self, row: dict[str, Any]) -> None:
        if not self._thread.is_alive():
            return
        if self._rows.qsize() < MOST_WAITING:
            self._rows.put(dict(row))
        elif not self._full:
            self._full = True
            self._warn(
                f"{self._name} takes rows more slowly than they come; from step "
                f"{row['step']} on, some are left out there. metrics.jsonl has all."
            )

    def end(self) -> None:
        self._rows.put(None)

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._silent = True
            self._warn(
                f"{self._name} did not end within {CLOSE_S} s and is left; the last "
                "rows may be missing there. metrics.jsonl has all."
            )

    def _work(self, sink: Sink, run: SinkRun) -> None:
        log: Any = None
        where = _AT_START
        try:
            log = sink(run)
            if not callable(log):
                raise TypeError(f"it gave {log!r} in place of a function of a row")
            while (row := self._rows.get()) is not None:
                where = f"at step {row['step']}"
                log(row)
            where = "at its end"
        except (Exception, SystemExit) as error:
            self._left_out(error, where)
        try:
            getattr(log, "close", lambda: None)()
        except (Exception, SystemExit) as error:
            self._left_out(error, where)

    def _left_out(self, error: BaseException, where: str) -> None:
        """Says, once, what went wrong; of a user's sink, how it is called too."""
        if self._silent:
            return
        self._silent = True
        what = f"failed {where} ({summary(error)})"
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            what = f"needs {package}, which is not installed; `pip install {package}`"
        elif where == _AT_START and ":" in self._name:
            what += "; it is called once, with the run, and gives a function of a row"
        self._warn(f"{self._name} {what}. The run goes on without it.")
