"""The processes of one run: how they find each other, and what they exchange.

Every process runs the same program on one mesh. Arrays on the devices of one process
are read by that process; what all must know, or decide alike, is exchanged. A run of
one process is the case without an exchange.
"""

import contextlib
import importlib.util
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import jax
import numpy as np

from grpo_jax.errors import ConfigError, first_line

Value = TypeVar("Value")

_SMALLEST = 2**12  # bytes of a message; a longer one takes a second round, once


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


class LostProcessError(RuntimeError):
    """Another process of the run ended, or does not answer."""


class UnwrittenError(OSError):
    """A file of the run cannot be written."""


class SharedError(UnwrittenError):
    """One process cannot go on; all processes raise this at the same exchange."""


def _is_one_of_several() -> bool:
    """Whether the environment names further processes, in a way by which
    `jax.distributed.initialize` finds them."""
    given = os.environ.get
    counts = given("SLURM_STEP_NUM_TASKS"), given("OMPI_COMM_WORLD_SIZE")
    if any(n is not None and n.isdigit() and int(n) > 1 for n in counts):
        return True
    return "JAX_COORDINATOR_ADDRESS" in os.environ


def _is_on_tpu() -> bool:
    """Whether this host has TPU chips, which may be part of a pod's."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def join(config: Rendezvous) -> None:
    """Connects to the run's other processes, if any; call before a device is used.

    Raises:
        ConfigError: some of them did not connect in time.
    """
    if jax.distributed.is_initialized():
        return  # by the caller
    certain = config.coordinator is not None or _is_one_of_several()
    if not certain and not _is_on_tpu():
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
            return  # a single TPU host
        where = config.coordinator or "the environment"
        raise ConfigError(
            f"the processes of the run did not find each other by {where} "
            f"({first_line(error)[:300]}); is every one of them started, each once, "
            "with the same distributed.coordinator and processes?"
        ) from error


def exit_at_once(message: str) -> None:
    """Ends this process without waiting for the others."""
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Processes:
    """This process among those of the run.

    Args:
        stop_requested: Whether a signal asks this process to stop.
        limit: Seconds to wait for the others at most; then this process ends.

    Attributes:
        index, count: Index of this process, and number of processes.
        is_writer: Whether this is the process that writes files and prints.
        failure: Why this process cannot go on; all end at the next exchange.
    """

    def __init__(
        self,
        stop_requested: Callable[[], bool] = lambda: False,
        limit: float | None = None,
    ):
        self.index, self.count = jax.process_index(), jax.process_count()
        self.is_writer = self.index == 0
        self.failure: str | None = None
        self._stop_requested, self._stop = stop_requested, False
        self._limit, self._message_bytes = limit, _SMALLEST

    @property
    def stopping(self) -> bool:
        """Whether a process was asked to stop. With several processes, as of the last
        exchange, so that all stop at the same place."""
        return self._stop_requested() if self.count == 1 else self._stop

    @property
    def phase_limit(self) -> float | None:
        """Seconds that a phase may take where other processes wait for it."""
        return self._limit if self.count > 1 else None

    @property
    def file_suffix(self) -> str:
        """What tells this process's files from the others'; "" for a single one."""
        return "" if self.count == 1 else f"-process-{self.index}"

    def exchange(self, value: Value) -> list[Value]:
        """The values of all processes, in their order; a call of all of them together.

        Raises:
            SharedError: a process has a `failure`.
        """
        if self.count == 1:
            return [value]
        with self._in_time():
            rows = self._gather((value, self._stop_requested(), self.failure))
        self._stop = any(requested for _, requested, _ in rows)
        failures = [failure for _, _, failure in rows if failure is not None]
        if failures:
            self.failure = None
            raise SharedError(failures[0])
        return [value for value, _, _ in rows]

    def synchronise(self) -> None:
        """Waits for all processes, and fails on all where one has a `failure`.

        Raises:
            SharedError: a process has a `failure`.
        """
        self.exchange(None)

    def is_shared(self, error: UnwrittenError) -> bool:
        """Whether every process is handling this error now."""
        return self.count == 1 or isinstance(error, SharedError)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an OSError inside into a `failure`, which ends all processes at their
        next exchange. A single process raises an UnwrittenError at once."""
        try:
            yield
        except OSError as error:
            if self.count == 1:
                raise UnwrittenError(str(error)) from error
            self.failure = str(error)

    def on_writer(self, write: Callable[[], object]) -> None:
        """Calls `write` in the process that writes; an OSError is a `failure`."""
        if self.is_writer:
            with self.writing():
                write()

    def first(self, value: Value) -> Value:
        """The value of the process that writes; a call of all of them together."""
        return self.exchange(value if self.is_writer else cast(Value, None))[0]

    def together(self, function: Callable[[], Value]) -> Value:
        """function(); a ConfigError in one process is raised in all."""
        if self.count == 1:
            return function()
        result, error = None, None
        try:
            result = function()
        except ConfigError as raised:
            error = raised
        texts = self.exchange(None if error is None else str(error))
        if error is not None:
            raise error
        for index, text in enumerate(texts):
            if text is not None:
                raise ConfigError(f"process {index}: {text}")
        return cast(Value, result)  # it returned

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """Ends this process if the others do not answer within the limit."""
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

    def _gather(self, value: Any) -> list[Any]:
        """The values of all processes, pickled."""
        from jax.experimental import multihost_utils

        data = pickle.dumps(value)
        while True:
            # A fixed size, so that nothing is compiled again: length, bytes.
            message = np.zeros(8 + self._message_bytes, np.uint8)
            message[:8] = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
            part = data[: self._message_bytes]
            message[8 : 8 + len(part)] = np.frombuffer(part, np.uint8)
            rows = np.asarray(multihost_utils.process_allgather(message))
            lengths = [int.from_bytes(row[:8].tobytes(), "little") for row in rows]
            if max(lengths) <= self._message_bytes:
                break
            self._message_bytes = 2 ** (max(lengths) - 1).bit_length()
        return [
            pickle.loads(row[8 : 8 + n].tobytes())
            for row, n in zip(rows, lengths, strict=True)
        ]


def gather_to_host(tree: Any) -> Any:
    """The tree's arrays on the host, gathered from all processes."""

    def gather(x: jax.Array) -> np.ndarray:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return _to_host(tree, gather)


def local_shards_to_host(tree: Any) -> Any:
    """The tree's arrays on the host, 0 where a shard is on other processes only."""

    def fill(x: jax.Array) -> np.ndarray:
        host = np.zeros(x.shape, x.dtype)
        for shard in x.addressable_shards:
            host[shard.index] = shard.data
        return host

    return _to_host(tree, fill)


def _to_host(tree: Any, read_distributed: Callable[[jax.Array], np.ndarray]) -> Any:
    """`read_distributed` reads arrays with shards on other processes only."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return read_distributed(x)

    return jax.tree.map(leaf, tree)


def owned_samples(x: jax.Array | np.ndarray) -> np.ndarray:
    """[P, G] bool: the samples of x [P, G, ...] that this process scores. Every sample
    is owned by exactly one process, which has all of it."""
    owned = np.ones(x.shape[:2], bool)
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return owned
    owners: dict[tuple, int] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        block = tuple(s.indices(n) for s, n in zip(index[:2], x.shape, strict=False))
        process = int(device.process_index or 0)
        owners[block] = min(process, owners.get(block, process))
    for block, owner in owners.items():
        owned[tuple(slice(*s) for s in block)] = owner == jax.process_index()
    return owned
