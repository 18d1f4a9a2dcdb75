"""The processes of one run: how they find each other, and what they tell each other.

Every process runs the same program on one mesh. What lies on the devices of one of them
only is read by that one; what all have to know, or to decide alike, is exchanged. A
run of one process is the case in which there is nobody to tell.
"""

import contextlib
import importlib.util
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from grpo_jax.errors import ConfigError

Value = TypeVar("Value")

_LEAST = 2**12  # bytes of a message; longer ones need a second round, once


class Rendezvous(Protocol):
    """How the processes of a run find each other: `DistributedConfig` has it."""

    @property
    def coordinator(self) -> str | None: ...
    @property
    def processes(self) -> int | None: ...
    @property
    def process(self) -> int | None: ...
    @property
    def join_timeout_s(self) -> int: ...
    @property
    def heartbeat_s(self) -> int: ...


class LostProcess(RuntimeError):
    """Another process of the run ended, or does not answer."""


class SharedFailure(OSError):
    """One of the processes is in trouble, and all of them know: they raise this at the
    same exchange."""


def _several() -> bool:
    """Whether something started this process as one of several that belong together,
    in a way that `jax.distributed.initialize` finds the others by."""
    given = os.environ.get
    counts = given("SLURM_STEP_NUM_TASKS"), given("OMPI_COMM_WORLD_SIZE")
    if any(n is not None and n.isdigit() and int(n) > 1 for n in counts):
        return True
    return "JAX_COORDINATOR_ADDRESS" in os.environ


def _on_tpu() -> bool:
    """Whether this host has TPU chips, which may be part of a pod's."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def join(config: Rendezvous) -> None:
    """Joins the run's other processes, if there are any; before any device is used.

    Raises:
        ConfigError: they did not all come.
    """
    if jax.distributed.is_initialized():
        return  # the caller has done it
    certain = config.coordinator is not None or _several()
    if not certain and not _on_tpu():
        return
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            initialization_timeout=config.join_timeout_s,
            heartbeat_timeout_seconds=config.heartbeat_s,
            shutdown_timeout_seconds=config.heartbeat_s,
        )
    except (RuntimeError, ValueError) as error:
        if not certain:
            return  # a TPU host of its own
        where = config.coordinator or "the environment"
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"the processes of the run did not find each other by {where} "
            f"({lines[0][:300]}); is every one of them started, each once, with the "
            "same distributed.coordinator and processes?"
        ) from error


def exit_at_once(message: str) -> None:
    """Ends this process at once: the others can no longer be waited for."""
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Processes:
    """This process among those of the run.

    Args:
        asked: Whether a signal asks this process to stop.
        limit: Seconds to wait for the others at most; then this process ends.

    Attributes:
        index, count: Of this process, and how many there are.
        is_writer: Whether this is the one that writes files and talks.
        failure: What keeps this process from going on; all end at the next exchange.
    """

    def __init__(
        self, asked: Callable[[], bool] = lambda: False, limit: float | None = None
    ):
        self.index, self.count = jax.process_index(), jax.process_count()
        self.is_writer = self.index == 0
        self.failure: str | None = None
        self._asked, self._stop, self._size = asked, False, _LEAST
        self._limit = limit

    @property
    def stopping(self) -> bool:
        """Whether one was asked to stop; of several, as of their last exchange, so that
        they all stop at the same place."""
        return self._asked() if self.count == 1 else self._stop

    def exchange(self, value: Value) -> list[Value]:
        """What each process gave, in their order; all must come here.

        Raises:
            SharedFailure: one of them is in `failure`.
        """
        if self.count == 1:
            return [value]
        with self._in_time():
            found = self._gathered((value, self._asked(), self.failure))
        self._stop = any(asked for _, asked, _ in found)
        troubles = [trouble for _, _, trouble in found if trouble is not None]
        if troubles:
            self.failure = None
            raise SharedFailure(troubles[0])
        return [value for value, _, _ in found]

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What the process that writes does alone; of several, all end where that
        fails, at their next exchange."""
        try:
            yield
        except OSError as error:
            if self.count == 1:
                raise
            self.failure = str(error)

    def first(self, value: Value) -> Value:
        """What the process that writes gave."""
        return self.exchange(value if self.is_writer else None)[0]  # type: ignore

    def together(self, function: Callable[[], Value]) -> Value:
        """function() here; where it raises ConfigError in one process, in all."""
        error = result = None
        try:
            result = function()
        except ConfigError as found:
            error = found
        if self.count == 1:
            if error is not None:
                raise error
            return result  # type: ignore
        told = self.exchange(None if error is None else str(error))
        if error is not None:
            raise error
        for index, text in enumerate(told):
            if text is not None:
                raise ConfigError(f"process {index}: {text}")
        return result  # type: ignore

    @contextlib.contextmanager
    def _in_time(self):
        if self._limit is None:
            yield
            return
        message = (
            f"process {self.index} waited {self._limit:g} s for the others, of which "
            "one is stuck. Continue with the same command and --resume."
        )
        timer = threading.Timer(self._limit, exit_at_once, [message])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _gathered(self, value):
        from jax.experimental import multihost_utils

        data = pickle.dumps(value)
        while True:
            # Of a fixed size, so that nothing is compiled again: length, bytes.
            message = np.zeros(8 + self._size, np.uint8)
            message[:8] = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
            part = data[: self._size]
            message[8 : 8 + len(part)] = np.frombuffer(part, np.uint8)
            found = np.asarray(multihost_utils.process_allgather(message))
            lengths = [int.from_bytes(row[:8].tobytes(), "little") for row in found]
            if max(lengths) <= self._size:
                break
            self._size = 2 ** (max(lengths) - 1).bit_length()
        return [
            pickle.loads(row[8 : 8 + n].tobytes())
            for row, n in zip(found, lengths, strict=True)
        ]


def gather_to_host(tree: Any) -> Any:
    """The tree on the host, gathered from the processes where its parts lie."""

    def gathered(x):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return _on_host(tree, gathered)


def local_shards_to_host(tree: Any) -> Any:
    """The tree on the host, 0 where its parts lie on other processes only."""

    def filled(x):
        host = np.zeros(x.shape, x.dtype)
        for shard in x.addressable_shards:
            host[shard.index] = shard.data
        return host

    return _on_host(tree, filled)


def _on_host(tree, elsewhere):
    """`elsewhere` is called with arrays of which other processes hold parts."""

    def leaf(x):
        if not isinstance(x, jax.Array):
            return x
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return elsewhere(x)

    return jax.tree.map(leaf, tree)


def owned_samples(x: jax.Array) -> np.ndarray:
    """[P, G] bool: which samples of x [P, G, ...] this process answers for. It holds
    them all, and each sample has one process that does."""
    mine = np.ones(x.shape[:2], bool)
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return mine
    keepers = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        place = tuple(s.indices(n) for s, n in zip(index[:2], x.shape, strict=False))
        keepers[place] = min(device.process_index, keepers.get(place, 2**31))
    for place, keeper in keepers.items():
        mine[tuple(slice(*s) for s in place)] = keeper == jax.process_index()
    return mine
