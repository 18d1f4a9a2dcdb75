"""Gathers of parameters over fsdp, whose transposes reduce-scatter the gradients."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from grpo_jax.parallel.platform import platform
from grpo_jax.precision import with_derivatives_of

# libtpu 0.0.42 sends a reduce-scatter in spans of tiles, and all-reduces an array in
# which it finds none, as in one of 1187 x 128 columns. It does in multiples of:
_SPANS = 4096
_in_one_part: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "in_one_part", default=False
)


@contextlib.contextmanager
def in_one_part() -> Iterator[None]:
    """Gradients traced within are an update's, not one of several parts' of it.

    Those of several parts a TPU's compiler adds up before it all-reduces the table's,
    once, which it would not do if they were padded to be reduce-scattered.
    """
    token = _in_one_part.set(True)
    try:
        yield
    finally:
        _in_one_part.reset(token)


def gathered(x: jax.Array, axis: int) -> jax.Array:
    """A device's part of a parameter [...], gathered along `axis`, inside a shard_map
    over fsdp."""
    return jax.lax.all_gather(x, axis_name="fsdp", axis=axis, tiled=True)


def gathered_table(x: jax.Array, axis: int) -> jax.Array:
    """`gathered`, of x [V, D / F] or [D / F, V], with a gradient that a TPU's compiler
    reduce-scatters too."""
    size = x.shape[1 - axis]
    more = -size % _SPANS
    at_once = platform() == "tpu" and _in_one_part.get()
    if not at_once or not 0 < 8 * more <= size:
        return gathered(x, axis)
    y = jnp.pad(x if axis == 0 else x.T, ((0, 0), (0, more)))  # [D / F, V + more]
    y = with_layout_constraint(gathered(y, 0), Layout(major_to_minor=(0, 1)))
    y = y[:, :size]
    return y if axis == 0 else y.T


def rounded(
    move: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    dtype: Any,
    by_gradient: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """move(x), of x [...] rounded to a dtype of fewer bits, with the derivatives of
    by_gradient(x), which is not rounded."""
    is_smaller = jnp.dtype(dtype).itemsize < x.dtype.itemsize
    copy = move(x.astype(dtype)).astype(x.dtype) if is_smaller else move(x)
    return with_derivatives_of(copy, by_gradient(x))
