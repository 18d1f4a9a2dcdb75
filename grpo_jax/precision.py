"""What is computed in float32 beside arrays that are not.

By default a TPU multiplies float32 arrays in bfloat16, and many GPUs in TF32.
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


@jax.custom_jvp
def with_derivatives_of(copy: jax.Array, original: jax.Array) -> jax.Array:
    """`copy` [...], with derivatives as if it were `original` [...].

    Where the copy is the original rounded to fewer bits, gradients of all its uses are
    added up in the dtype of the original, and nothing but the copy is read. Second
    derivatives that are taken backwards through a forward mode add up in the copy's.
    """
    del original
    return copy


@with_derivatives_of.defjvp
def _derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Were the rule applied to it again, a loop's backward pass would hold the original.
    copy, _ = primals
    return copy, tangents[1].astype(copy.dtype)
