"""Which kind of device a program is traced for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "gpu", "tpu")

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "target", default=None
)


def platform() -> str:
    """The platform that programs are traced for now: "cpu", "gpu" or "tpu".

    That of this machine's devices, unless within `compiling_for`.
    """
    target = _target.get() or jax.default_backend()
    return target if target in PLATFORMS else "gpu"  # "cuda" and "rocm"


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Programs traced within are for another machine's devices.

    A program traced for two platforms needs two `jax.jit`s: a trace is kept by shapes.

    Args:
        target: One of PLATFORMS.
    """
    if target not in PLATFORMS:
        raise ValueError(f"target must be one of {', '.join(PLATFORMS)}, got {target}.")
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)
