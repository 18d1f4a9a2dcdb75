"""A worker process of `pool.VerifierPool`: one check after another, JSON lines.

Started as `python -m grpo_jax.rewards.worker`. The first line on stdin says what to
load; each further line is a check and gets one line back. The worker sets its own
limits: it dies with its parent, and writes no core.
"""

import contextlib
import ctypes
import functools
import importlib
import json
import math
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from grpo_jax.rewards.types import Example, reward_number

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answers checks until stdin ends."""
    requests, replies = _take_the_pipes()
    setup = json.loads(requests.readline())
    _limit(setup)
    try:
        functions = _load(setup["names"])
    except BaseException as error:  # whatever a user's module does when imported
        _reply(replies, {"failed": f"{type(error).__name__}: {error}"})
        return
    _reply(replies, {"ready": True})
    for line in requests:
        check = json.loads(line)
        _reply(replies, _answer(check, functions))


def _take_the_pipes() -> tuple[TextIO, TextIO]:
    """(requests, replies): stdin and stdout, out of reach of a user function's
    prints."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8", errors="surrogatepass")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    return requests, replies


def _limit(setup: dict[str, Any]) -> None:
    if sys.platform == "linux":
        # It also fires when the thread that started this process ends: the pool then
        # starts another worker.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != setup["parent"]:
        sys.exit("the parent has gone")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS has no limit of this kind that holds
        memory = int(setup["memory_gib"] * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if not any(":" in name for name in setup["names"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _load(names: list[str]) -> dict[str, Callable[..., Any]]:
    from grpo_jax.rewards.verifiers import VERIFIERS

    functions: dict[str, Callable[..., Any]] = dict(VERIFIERS)
    if "math" in names:
        from grpo_jax.rewards.symbolic import same_math

        # sympy's first call is slow; it should not count against a completion.
        same_math(r"\frac{1}{2}", "2^{-1}", spelling=False)
    for name in names:
        if ":" in name:
            functions[name] = _user_function(name)
    return functions


def _user_function(name: str) -> Callable[..., Any]:
    module, _, attributes = name.partition(":")
    value: Any = importlib.import_module(module)
    return functools.reduce(getattr, attributes.split("."), value)


def _answer(
    check: dict[str, Any], functions: dict[str, Callable[..., Any]]
) -> dict[str, Any]:
    """The reply to a check: its `value`, or an `error`."""
    name = check["name"]
    is_users = ":" in name
    example = _example(check["example"]) if is_users else _gold(check["example"])
    function, keep = functions[name], check.get("trial", False)
    try:
        with preserved_streams() if keep else contextlib.nullcontext():
            value = function(example, check["text"], **check["options"])
            value = reward_number(value)
    except MemoryError:
        os._exit(1)  # what is left of this process cannot be trusted
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"[:500]
        # A verifier fails closed; a user's reward is missing.
        return {"error": message, "raised": True} if is_users else {"value": 0.0}
    if not math.isfinite(value):  # JSON has no NaN
        return {"error": f"the reward is {value}"}
    return {"value": value}


@contextlib.contextmanager
def preserved_streams() -> Iterator[None]:
    """Leaves the global streams of `random` and numpy as they were found."""
    python, arrays = random.getstate(), sys.modules.get("numpy.random")
    state = None if arrays is None else arrays.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if arrays is not None:
            arrays.set_state(state)


def _gold(example: dict[str, Any]) -> Example:
    return Example("", example["answer"])


def _example(example: dict[str, Any]) -> Example:
    tags = tuple((key, value) for key, value in example["tags"])
    context = tuple((role, content) for role, content in example["context"])
    return Example(**{**example, "tags": tags, "context": context})


def _reply(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
