"""Flags without which a version of jaxlib computes wrong numbers."""

import os
from importlib import metadata

# On a CPU, jaxlib 0.10.2 gives sums, also of small products, to YNNPACK, and gets the
# last rows of long arrays wrong (jax-ml/jax#39103). Products alone it gets right.
_BROKEN = "0.10.2"
_NAME, _VALUE = "--xla_cpu_experimental_ynn_fusion_type", "individual_dot"


def set_compiler_flags() -> None:
    """Adds to XLA_FLAGS what the installed jaxlib needs, unless it is given there.

    jaxlib reads them when it starts its first backend; later they change nothing.
    """
    try:
        installed = metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        return
    given = os.environ.get("XLA_FLAGS", "")
    if installed == _BROKEN and _NAME not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_NAME}={_VALUE}".strip()
