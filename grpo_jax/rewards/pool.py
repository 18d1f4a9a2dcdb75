"""Rewards in worker processes that can be killed, from one event loop.

A completion may make a verifier run for hours (9^{9^{9^9}}), eat all memory, or crash
it. So every check runs in a process of its own group with a memory limit and a hard
deadline; one that hangs or dies costs its sample the reward (0, and it is counted), is
replaced while the other workers go on, and never ends the run.

The workers are started as `python -m grpo_jax.rewards.worker`, since a process that
holds an accelerator must not be forked. They get a few environment variables, with
those that are named, and end with their parent, however it ends.
"""

import collections
import contextlib
import json
import os
import selectors
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.pipes import OF_WORKERS, Key, Message, WorkerProcess
from grpo_jax.rewards.spec import check_reward
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import shortened

BAD_STARTS = 3  # in a row, before the pool gives up
CACHE = 20_000  # verdicts on (gold, answer)
POLL = 0.1  # seconds between checks that the workers are alive


class Check(NamedTuple):
    """One reward of one completion; `tokens` is what "length" counts."""

    reward: Reward
    example: Example
    completion: str
    tokens: int | None = None


class Outcome(NamedTuple):
    """The result of a check."""

    value: float
    error: str | None = None  # why a user's reward is missing; `value` is NaN then
    failed: bool = False  # the check hung or its worker died; `value` is 0 then
    raised: bool = False  # `error` is that of an exception


_Answers = dict[Key, Outcome]
_Queue = collections.deque[tuple[Key, Message]]


class VerifierPool:
    """Worker processes that compute rewards; close it, or use it as a context.

    Args:
        rewards: What the workers must be able to compute.
        workers: Processes; one core each is enough.
        timeout: Seconds a single check may take.
        memory_gib: Address space of a worker (Linux).
        environment: Names of this process's environment variables that the workers get
            beside the few that they need; None: all of them.

    Raises:
        ConfigError: an unknown reward, a user's module that cannot be imported, or an
            environment variable that is not set.

    A user's "module:function" is imported in the workers, with this process's sys.path
    and working directory; its prints are dropped. A function that leaves its process
    group (setsid) escapes the kill.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        workers: int = 2,
        timeout: float = 3.0,
        memory_gib: float = 2.0,
        environment: Sequence[str] | None = (),
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
        self._variables = _variables(environment)
        self._verdicts: _Answers = {}
        self._lock = threading.Lock()
        self._bad_starts, self._next_start = 0, 0.0
        self._workers: list[WorkerProcess] = []
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers and all processes that they started."""
        self._close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, each the leader of its group."""
        return [worker.process.pid for worker in self._workers]

    def run(self, checks: Sequence[Check], *, trial: bool = False) -> list[Outcome]:
        """The outcome of every check, in order; a `trial` leaves the global random
        streams of the workers as they were."""
        if not self._close.alive:
            raise ValueError("the pool must be open to run checks, got a closed one.")
        with self._lock:
            # Equal checks run once: a group agrees on many of its answers.
            texts = [_text(check) for check in checks]
            keys = [_key(i, checks[i], text) for i, text in enumerate(texts)]
            answers = {k: self._verdicts[k] for k in keys if k in self._verdicts}
            first = {key: i for i, key in reversed([*enumerate(keys)])}
            queue = collections.deque(
                (key, _message(checks[first[key]], texts[first[key]], trial))
                for key in dict.fromkeys(keys)
                if key not in answers
            )
            self._work(queue, answers)
        return [answers[key] for key in keys]

    def _work(self, queue: _Queue, answers: _Answers) -> None:
        """Runs the checks of the queue and puts their outcomes into `answers`."""
        wanted = len(queue) + len(answers)
        try:
            while len(answers) < wanted:
                for worker in [w for w in self._workers if w.idle and w.has_died()]:
                    self._remove(worker)
                busy = sum(worker.key is not None for worker in self._workers)
                self._restart(min(self.size, busy + len(queue)))
                for worker in self._workers:
                    if queue and worker.idle:
                        key, message = queue.popleft()
                        worker.start(key, message, self.timeout)
                        self._flush(worker, answers)
                self._wait(answers)
        finally:  # after an interrupt: late replies must not answer later checks
            for worker in [w for w in self._workers if w.key is not None]:
                self._remove(worker)

    def _wait(self, answers: _Answers) -> None:
        """Handles what happens next: replies, deaths and deadlines."""
        now = time.monotonic()
        limits = [worker.deadline - now for worker in self._workers]
        timeout = min([POLL, *limits])
        if not self._workers:
            time.sleep(max(0.0, min(POLL, self._next_start - now)))
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

    def _flush(self, worker: WorkerProcess, answers: _Answers) -> None:
        """Writes the worker's message as far as its pipe takes it."""
        try:
            done = worker.flush()
        except BrokenPipeError:
            self._lose(worker, answers)
            return
        registered = worker.requests in self._selector.get_map()
        if done and registered:
            self._selector.unregister(worker.requests)
        elif not done and not registered:
            self._selector.register(worker.requests, selectors.EVENT_WRITE, worker)

    def _read(self, worker: WorkerProcess, answers: _Answers) -> None:
        """Handles the worker's replies so far."""
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
                answers[worker.key] = outcome = _outcome(reply)
                self._remember(worker.key, outcome)
                worker.key, worker.deadline = None, float("inf")
        if ended:
            self._lose(worker, answers)

    def _remember(self, key: Key, outcome: Outcome) -> None:
        """Caches the outcomes of `math`, the slow verifier."""
        if key[0] == "math":
            if len(self._verdicts) >= CACHE:
                self._verdicts.clear()
            self._verdicts[key] = outcome

    def _lose(self, worker: WorkerProcess, answers: _Answers) -> None:
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

    def _remove(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        for stream in (worker.replies, worker.requests):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        worker.kill()

    def _restart(self, number: int) -> None:
        """Starts workers until there are `number`."""
        while len(self._workers) < number and time.monotonic() >= self._next_start:
            worker = WorkerProcess(self._setup, self._variables)
            self._workers.append(worker)
            self._selector.register(worker.replies, selectors.EVENT_READ, worker)


class PoolLimits(Protocol):
    """Limits of a `VerifierPool`, as `ScoringConfig` has them."""

    @property
    def workers(self) -> int: ...

    @property
    def timeout_s(self) -> float: ...

    @property
    def memory_gib(self) -> float: ...

    @property
    def environment(self) -> Sequence[str]: ...


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
        environment=limits.environment,
    ) as pool:
        yield pool


def _variables(names: Sequence[str] | None) -> dict[str, str]:
    """The environment variables by these names; None: all but those of workers."""
    if names is None:
        return {n: value for n, value in os.environ.items() if n not in OF_WORKERS}
    for name in names:
        if name not in os.environ:
            raise ConfigError(
                f"scoring.environment names the environment variable {name}, which is "
                f"not set; export {name} first, or leave it out."
            )
    return {name: os.environ[name] for name in names}


def _close(workers: list[WorkerProcess], selector: selectors.BaseSelector) -> None:
    while workers:
        workers.pop().kill()
    selector.close()


def _text(check: Check) -> str:
    """What a worker is sent of the completion."""
    thinking = dict(check.reward.options).get("thinking", 0.0)
    return shortened(check.reward.name, check.completion, thinking)


def _key(i: int, check: Check, text: str) -> Key:
    if ":" in check.reward.name:
        return (check.reward.name, i)  # a user's function is called every time
    gold = check.example.answer
    return (check.reward.name, check.reward.options, gold, text, check.tokens)


def _message(check: Check, text: str, trial: bool) -> Message:
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
        "trial": trial,
    }


def _outcome(reply: Message) -> Outcome:
    if "error" in reply:
        raised = reply.get("raised", False)
        return Outcome(float("nan"), reply["error"], raised=raised)
    with np.errstate(over="ignore"):
        value = np.float32(reply["value"])
    if not np.isfinite(value):
        return Outcome(float("nan"), f"the reward is {value} in float32")
    return Outcome(float(value))
