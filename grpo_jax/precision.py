"""Products of float32 arrays in float32.

By default a TPU multiplies them in bfloat16, and many GPUs in TF32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def float32_products(dtype: Any = jnp.float32) -> Iterator[None]:
    """Within it, or a function it decorates, products are traced as float32 ones.

    So are their derivatives, wherever those are taken. Nothing changes for another
    `dtype` of the computation, or where `jax_default_matmul_precision` was chosen.
    """
    chosen = jax.config.values["jax_default_matmul_precision"] is not None
    if chosen or jnp.dtype(dtype) != jnp.float32:
        yield
    else:
        with jax.default_matmul_precision("float32"):
            yield
