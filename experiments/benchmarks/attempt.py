"""A `grpo-jax train` in a forked process, to be stopped and killed by soak.py."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Imported for the attempts, which are forked: nothing here may touch a device.
import grpo_jax.training.run  # noqa: F401
from grpo_jax.cli import main as grpo_jax_main


class Attempt:
    """A forked process that runs `grpo-jax train`, its output in a file."""

    def __init__(self, arguments: list[str], log: Path, file_size: int | None = None):
        self.log, self.code = log, None
        # Through a pipe, so that a limit on file sizes does not cut the output.
        with log.open("wb") as file:
            self._cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        self.pid = os.fork()
        if self.pid == 0:
            self._train(arguments, file_size)
        self._cat.stdin.close()

    def _train(self, arguments: list[str], file_size: int | None) -> None:
        """Runs the command in the forked process, and ends it."""
        code = 70
        try:
            os.dup2(self._cat.stdin.fileno(), 1)
            os.dup2(self._cat.stdin.fileno(), 2)
            self._cat.stdin.close()
            if file_size is not None:
                limit = (file_size, resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            code = grpo_jax_main(["train", *arguments])
            sys.stdout.flush()
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code if isinstance(code, int) else 70)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._cat.wait()
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def end(self, seconds: float = 300.0) -> int:
        """The exit code; -9 where it had to be killed for taking longer."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        return self.code

    def signal(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)


def wait_for(
    attempt: Attempt, reached: Callable[[], bool], seconds: float = 300.0
) -> bool:
    """Whether `reached()` came true while the attempt ran."""
    deadline = time.monotonic() + seconds
    while not reached():
        if not attempt.running() or time.monotonic() > deadline:
            return reached()
        time.sleep(0.005)
    return True
