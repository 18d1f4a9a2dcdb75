"""The cache directory, the cache of compiled programs, and a count of compilations."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import jax


def cache_directory() -> Path:
    """$GRPO_JAX_CACHE, else grpo_jax in the user's cache directory."""
    if "GRPO_JAX_CACHE" in os.environ:
        return Path(os.environ["GRPO_JAX_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "grpo_jax"


def use_compile_cache() -> None:
    """Keeps compiled programs across processes, unless jax has a directory for them."""
    # jax defines its flags at run time.
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given is None:
        directory = str(cache_directory() / "compiled")
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@functools.cache
def _compile_events() -> list[str]:
    """A list that grows by one per program that this process compiles."""
    events: list[str] = []

    def on_event(event: str, duration_secs: float, **metadata: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    return events


def count_compiles() -> Callable[[], int]:
    """A function that counts the programs compiled since this call."""
    events = _compile_events()
    before = len(events)
    return lambda: len(events) - before
