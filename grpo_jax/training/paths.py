"""Where things are kept between runs."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$GRPO_JAX_CACHE, else grpo_jax in the user's cache directory."""
    if "GRPO_JAX_CACHE" in os.environ:
        return Path(os.environ["GRPO_JAX_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "grpo_jax"


def use_compile_cache() -> None:
    """Keeps compiled programs across processes, unless jax is already told where."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        directory = str(cache_directory() / "compiled")
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
