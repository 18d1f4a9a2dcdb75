"""A worker process as its parent sees it: pipes that never block, and a deadline."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

START_LIMIT = 120.0  # seconds for a worker's imports

# Environment variables of every worker, where it is not given others.
OF_WORKERS = {
    "PYTHONHASHSEED": "0",  # sympy orders some terms by hash
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",  # the accelerator belongs to the trainer
}

Key = tuple[Any, ...]  # of a check: equal keys have equal outcomes
Message = dict[str, Any]  # JSON


class WorkerProcess:
    """A worker process and the state of its pipes.

    Args:
        setup: Names of the rewards and limits, sent as the first line.
        variables: Environment variables that it gets beside those that it needs.
    """

    def __init__(self, setup: Message, variables: Mapping[str, str]):
        users = any(":" in name for name in setup["names"])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "grpo_jax.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=None if users else "/",
            env=_environment(users, variables),
            start_new_session=True,  # a process group of its own, without Ctrl-C
        )
        assert self.process.stdin and self.process.stdout
        self.requests = self.process.stdin.fileno()
        self.replies = self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.ready = False
        self.key: Key | None = None  # of the check that is running
        self.deadline = time.monotonic() + START_LIMIT
        self._out = memoryview(_line({**setup, "parent": os.getpid()}))
        self._in = bytearray()
        with contextlib.suppress(BrokenPipeError):  # seen as a death by the reader
            self.flush()

    @property
    def idle(self) -> bool:
        """Whether it waits for a check."""
        return self.ready and self.key is None

    def has_died(self) -> bool:
        """Whether an idle worker has died since its last check."""
        return self.has_exited() or self.read()[1]

    def start(self, key: Key, message: Message, timeout: float) -> None:
        """Makes a check the one to run; `flush` sends it."""
        self.key, self.deadline = key, time.monotonic() + timeout
        self._out = memoryview(_line(message))

    def flush(self) -> bool:
        """Writes as much as the pipe takes; returns whether all is written."""
        while self._out:
            try:
                self._out = self._out[os.write(self.requests, self._out) :]
            except BlockingIOError:
                return False
        return True

    def read(self) -> tuple[list[bytes], bool]:
        """(complete lines so far, whether the pipe has ended)."""
        ended = False
        while True:
            try:
                data = os.read(self.replies, 65536)
            except BlockingIOError:
                break
            if not data:
                ended = True
                break
            self._in += data
        *lines, rest = bytes(self._in).split(b"\n")
        self._in = bytearray(rest)
        return lines, ended

    def has_exited(self) -> bool:
        """Whether the process has ended; a grandchild may keep its pipe open then."""
        # Not poll(): the process must be reaped only after its group is killed, so that
        # its id cannot be another process's by then.
        if not hasattr(os, "waitid"):
            return False
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is not None

    def kill(self) -> None:
        """Kills the process with its group, and reaps it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)


def _environment(users: bool, variables: Mapping[str, str]) -> dict[str, str]:
    """A worker's environment variables; more where it imports a user's module, and
    those given."""
    keep = ["LANG", "LC_ALL", "LD_LIBRARY_PATH"]
    if users:
        keep += ["PATH", "HOME", "TMPDIR", "VIRTUAL_ENV"]
    paths = [os.path.abspath(path) for path in sys.path]  # "" is the working directory
    if users:
        paths.append(os.getcwd())
    kept = {name: os.environ[name] for name in keep if name in os.environ}
    # sys.path has the entries of this process's PYTHONPATH already.
    path = {"PYTHONPATH": os.pathsep.join(paths)}
    return {**kept, **OF_WORKERS, **variables, **path}


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"
