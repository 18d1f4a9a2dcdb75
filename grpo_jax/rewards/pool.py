"""Rewards in worker processes that can be killed, from one event loop.

A completion may make a verifier run for hours (9^{9^{9^9}}), eat all memory, or crash
it. So every check runs in a process of its own group with a memory limit and a hard
deadline; one that hangs or dies costs its sample the reward (0, and it is counted), is
replaced while the other workers go on, and never ends the run.

The workers are plain `python -m grpo_jax.rewards.worker`: this process, which
holds the accelerator, is not forked. They get no environment variables but a few, and
leave with their parent, however it ends.
"""

import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.spec import check_reward
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import shortened

START_LIMIT = 120.0  # seconds for a worker's imports
BAD_STARTS = 3  # in a row, before the pool gives up
CACHE = 20_000  # verdicts on (gold, answer)
LOOK = 0.1  # seconds between looks at whether a worker is still there


class Check(NamedTuple):
    """One reward of one completion; `tokens` is what "length" counts."""

    reward: Reward
    example: Example
    completion: str
    tokens: int | None = None


class Outcome(NamedTuple):
    """A check's value: NaN with an `error` where a user's reward is missing.

    `failed`: the check hung or its worker died; its value is 0.
    """

    value: float
    error: str | None = None
    failed: bool = False


class VerifierPool:
    """Worker processes that compute rewards; close it, or use it as a context.

    Args:
        rewards: What the workers must be able to compute.
        workers: Processes; one core each is enough.
        timeout: Seconds a single check may take.
        memory_gib: Address space of a worker (Linux).

    Raises:
        ConfigError: an unknown reward, or a user's module that cannot be imported.

    A user's "module:function" is imported in the workers, with this process's sys.path
    and working directory; what it prints is dropped. A function that leaves its process
    group (setsid) escapes the kill.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        workers: int = 2,
        timeout: float = 3.0,
        memory_gib: float = 2.0,
    ):
        for name, value in (
            ("workers", workers),
            ("timeout", timeout),
            ("memory_gib", memory_gib),
        ):
            if not value > 0:
                raise ConfigError(f"{name} must be more than 0, got {value}.")
        for reward in rewards:
            check_reward(reward)
        self.timeout = timeout
        self.size = workers
        self._setup = {
            "names": sorted({reward.name for reward in rewards}),
            "memory_gib": memory_gib,
        }
        self._verdicts: dict[tuple, Outcome] = {}
        self._lock = threading.Lock()
        self._bad_starts, self._next_start = 0, 0.0
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._close = weakref.finalize(self, _close, self._workers, self._selector)
        try:
            self._restart(workers)
            while not any(worker.ready for worker in self._workers):
                self._restart(workers)
                self._wait({})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers and all that they started."""
        self._close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, each the leader of its group."""
        return [worker.process.pid for worker in self._workers]

    def run(self, checks: Sequence[Check]) -> list[Outcome]:
        """The outcome of every check, in order."""
        if not self._close.alive:
            raise ValueError("the pool must be open to run checks, got a closed one.")
        with self._lock:
            # The same question is asked once: a group agrees on many of its answers.
            asked: dict[tuple, list[int]] = {}
            texts = [shortened(check.reward.name, check.completion) for check in checks]
            for i, (check, text) in enumerate(zip(checks, texts, strict=True)):
                asked.setdefault(_key(i, check, text), []).append(i)
            answers = {k: self._verdicts[k] for k in asked if k in self._verdicts}
            queue = collections.deque(
                (key, _message(checks[indices[0]], texts[indices[0]]))
                for key, indices in asked.items()
                if key not in answers
            )
            self._work(queue, answers)
        outcomes = [Outcome(0.0)] * len(checks)
        for key, indices in asked.items():
            for i in indices:
                outcomes[i] = answers[key]
        return outcomes

    def _work(self, queue, answers):
        wanted = len(queue) + len(answers)
        try:
            while len(answers) < wanted:
                for worker in [w for w in self._workers if w.idle and w.gone()]:
                    self._remove(worker)
                busy = sum(worker.key is not None for worker in self._workers)
                self._restart(min(self.size, busy + len(queue)))
                for worker in self._workers:
                    if queue and worker.idle:
                        key, message = queue.popleft()
                        worker.ask(key, message, self.timeout)
                        self._flush(worker, answers)
                self._wait(answers)
        finally:  # after an interrupt: what a busy worker says later answers nothing
            for worker in [w for w in self._workers if w.key is not None]:
                self._remove(worker)

    def _wait(self, answers):
        """Handles what happens next: replies, deaths and deadlines."""
        now = time.monotonic()
        limits = [worker.deadline - now for worker in self._workers]
        timeout = min([LOOK, *limits])
        if not self._workers:
            time.sleep(max(0.0, min(LOOK, self._next_start - now)))
            return
        for key, event in self._selector.select(max(0.0, timeout)):
            worker = key.data
            if worker not in self._workers:
                continue
            if event & selectors.EVENT_WRITE:
                self._flush(worker, answers)
            else:
                self._read(worker, answers)
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.has_exited():
                self._read(worker, answers)
                if worker in self._workers:
                    self._lose(worker, answers)
            elif now > worker.deadline:
                self._lose(worker, answers)

    def _flush(self, worker, answers):
        try:
            done = worker.flush()
        except BrokenPipeError:
            return self._lose(worker, answers)
        registered = worker.requests in self._selector.get_map()
        if done and registered:
            self._selector.unregister(worker.requests)
        elif not done and not registered:
            self._selector.register(worker.requests, selectors.EVENT_WRITE, worker)

    def _read(self, worker, answers):
        lines, ended = worker.read()
        for line in lines:
            reply = json.loads(line)
            if "failed" in reply:
                raise ConfigError(
                    f"the rewards cannot be loaded in a worker process: "
                    f"{reply['failed']}; a module of yours must be importable from "
                    f"{os.getcwd()} or sys.path."
                )
            if "ready" in reply:
                worker.ready, worker.deadline = True, float("inf")
                self._bad_starts = 0
            elif worker.key is not None:
                outcome = _outcome(reply)
                answers[worker.key] = outcome
                if worker.key[0] == "math":
                    if len(self._verdicts) >= CACHE:
                        self._verdicts.clear()
                    self._verdicts[worker.key] = outcome
                worker.key, worker.deadline = None, float("inf")
        if ended:
            self._lose(worker, answers)

    def _lose(self, worker, answers):
        """Removes a worker that hung or died; its check, if any, scores 0."""
        if worker.key is not None:
            answers[worker.key] = Outcome(0.0, failed=True)
        self._remove(worker)
        if worker.ready:
            return
        self._bad_starts += 1
        self._next_start = time.monotonic() + 0.1 * 2**self._bad_starts
        if self._bad_starts >= BAD_STARTS:
            self._bad_starts = 0
            raise RuntimeError(
                f"verifier workers must start, {BAD_STARTS} in a row died or hung at "
                f"their imports (status {worker.process.returncode}); try "
                f"`{sys.executable} -c 'import math_verify'`, or more memory_gib than "
                f"{self._setup['memory_gib']:g}."
            )

    def _remove(self, worker):
        self._workers.remove(worker)
        for stream in (worker.replies, worker.requests):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        worker.kill()

    def _restart(self, number):
        while len(self._workers) < number and time.monotonic() >= self._next_start:
            worker = _Worker(self._setup)
            self._workers.append(worker)
            self._selector.register(worker.replies, selectors.EVENT_READ, worker)


class _Worker:
    """One process and the state of its pipes."""

    def __init__(self, setup):
        own = any(":" in name for name in setup["names"])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "grpo_jax.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=None if own else "/",
            env=_environment(own),
            start_new_session=True,  # its own group; a Ctrl-C is not for it
        )
        assert self.process.stdin and self.process.stdout
        self.requests = self.process.stdin.fileno()
        self.replies = self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.ready = False
        self.key: tuple | None = None
        self.deadline = time.monotonic() + START_LIMIT
        self._out = memoryview(_line({**setup, "parent": os.getpid()}))
        self._in = bytearray()
        with contextlib.suppress(BrokenPipeError):  # seen as a death by the reader
            self.flush()

    @property
    def idle(self) -> bool:
        return self.ready and self.key is None

    def gone(self) -> bool:
        """Whether an idle worker has died since it was last used."""
        return self.has_exited() or self.read()[1]

    def ask(self, key, message, timeout):
        self.key, self.deadline = key, time.monotonic() + timeout
        self._out = memoryview(_line(message))

    def flush(self) -> bool:
        """Writes what the pipe takes; whether all is written."""
        while self._out:
            try:
                self._out = self._out[os.write(self.requests, self._out) :]
            except BlockingIOError:
                return False
        return True

    def read(self) -> tuple[list[bytes], bool]:
        """Complete lines that have come, and whether the pipe has ended."""
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
        # Not poll(): the process is reaped only after its group is killed, so that its
        # id is nobody else's. A grandchild may hold the pipe open after the exit.
        if not hasattr(os, "waitid"):
            return False
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is not None

    def kill(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)


def _close(workers, selector):
    while workers:
        workers.pop().kill()
    selector.close()


def _environment(own):
    keep = ["LANG", "LC_ALL", "LD_LIBRARY_PATH"]
    if own:
        keep += ["PATH", "HOME", "TMPDIR", "VIRTUAL_ENV"]
    paths = [os.path.abspath(path) for path in sys.path]  # "" is the working directory
    if own:
        paths.append(os.getcwd())
    return {name: os.environ[name] for name in keep if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONHASHSEED": "0",  # sympy orders terms by hash here and there
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",  # the accelerator is the trainer's
    }


def _key(i, check, text):
    if ":" in check.reward.name:
        return (check.reward.name, i)  # a user's function is called every time
    gold = check.example.answer
    return (check.reward.name, check.reward.options, gold, text, check.tokens)


def _message(check, text):
    options = dict(check.reward.options)
    if check.reward.name == "length":
        if check.tokens is None:
            raise ValueError(
                "tokens must be given for the reward 'length', got None; pass the "
                "completions' token counts, [P, G]."
            )
        options["tokens"] = int(check.tokens)
    example = check.example._asdict()
    example = example if ":" in check.reward.name else {"answer": example["answer"]}
    return {
        "name": check.reward.name,
        "options": options,
        "example": example,
        "text": text,
    }


def _outcome(reply):
    if "error" in reply:
        return Outcome(float("nan"), reply["error"])
    with np.errstate(over="ignore"):
        value = np.float32(reply["value"])
    if not np.isfinite(value):
        return Outcome(float("nan"), f"the reward is {value} in float32")
    return Outcome(float(value))


def _line(message):
    return json.dumps(message).encode() + b"\n"


class PoolLimits(Protocol):
    """Limits of a `VerifierPool`, as `ScoringConfig` has them."""

    @property
    def workers(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def memory_gib(self) -> float: ...


@contextlib.contextmanager
def verifier_pool(
    reward: Callable[[Example, str], float] | Sequence[Reward], limits: PoolLimits
) -> Iterator[VerifierPool | None]:
    """The worker processes of a task's rewards; None for a function, which runs in
    this process."""
    if callable(reward):
        yield None
        return
    with VerifierPool(
        reward,
        workers=limits.workers,
        timeout=limits.timeout_s,
        memory_gib=limits.memory_gib,
    ) as pool:
        yield pool
