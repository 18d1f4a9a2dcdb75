"""What rounding parameters to fewer bits takes off what was learnt.

An update is often smaller than the spacing of bfloat16 around the weight that it is
added to (1/256 of the weight): rounded, it is mostly lost.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.errors import ConfigError


class Loss(NamedTuple):
    """The largest relative loss of an update, over parameters and layers."""

    share: float  # |rounded - exact| / |exact - start|, Frobenius norms
    name: str  # of the parameter, such as "layers.q.kernel, layer 3"

    def __str__(self) -> str:
        return f"{100 * self.share:.3g} % of the update of {self.name}"


def rounding_loss(params: Any, start: Any, dtype: str) -> Loss:
    """The largest loss of what `params` learnt since `start`, if rounded to `dtype`.

    Args:
        params, start: Nested dicts of the same arrays, of any shapes; those under
            "layers" are [layers, ...]. Parameters that did not change lose nothing.
        dtype: Of the files.
    """
    worst = Loss(0.0, "nothing")
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    before = tree.flatten_up_to(start)
    for (path, x), old in zip(leaves, before, strict=True):
        keys = [key.key for key in path]
        stacked = keys[0] == "layers"
        pair = (x, old) if stacked else (x[None], old[None])
        shares = _shares(*pair, dtype)
        layer = int(shares.argmax())
        if shares[layer] > worst.share:
            where = f", layer {layer}" if stacked else ""
            worst = Loss(float(shares[layer]), ".".join(keys) + where)
    return worst


def _shares(exact: jax.Array, start: jax.Array, dtype: str) -> jax.Array:
    """[N] relative losses of arrays [N, ...]; 0 where nothing was learnt."""
    axes = tuple(range(1, exact.ndim))
    exact, start = exact.astype(jnp.float32), start.astype(jnp.float32)
    lost = exact.astype(dtype).astype(jnp.float32) - exact
    learnt = jnp.square(exact - start).sum(axes)
    safe = jnp.where(learnt > 0, learnt, 1.0)
    return jnp.where(learnt > 0, jnp.sqrt(jnp.square(lost).sum(axes) / safe), 0.0)


def check_loss(loss: Loss, dtype: str, most: float) -> None:
    """ConfigError where more than `most` of an update would be lost."""
    if loss.share > most:
        raise ConfigError(
            f"{dtype} files would lose {loss}, more than max_loss {most:g}; write "
            "float32 files, or the LoRA factors alone (--adapter, or save_adapter), "
            "or allow the loss with a higher max_loss."
        )
