"""The cache directory, the cache of compiled programs, and a count of compilations."""

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from grpo_jax.errors import ConfigError


def cache_directory() -> Path:
    """$GRPO_JAX_CACHE, else grpo_jax in the user's cache directory.

    Raises:
        ConfigError: there is neither, nor a home directory.
    """
    if "GRPO_JAX_CACHE" in os.environ:
        return Path(os.environ["GRPO_JAX_CACHE"])
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(
            f"there is no directory for caches ({error}); set HOME or GRPO_JAX_CACHE."
        ) from error
    return Path(base) / "grpo_jax"


def _print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def use_compile_cache(warn: Callable[[str], None] = _print_warning) -> None:
    """Keeps compiled programs across processes, unless jax has a directory for them.

    Args:
        warn: Called with a sentence where the directory cannot be written; programs are
            compiled anew in every process then.
    """
    # jax defines its flags at run time.
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given is None:
        directory = cache_directory() / "compiled"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            warn(
                f"compiled programs are not kept: {directory} cannot be written "
                f"({error.strerror}); set GRPO_JAX_CACHE to a directory that can."
            )
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
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
