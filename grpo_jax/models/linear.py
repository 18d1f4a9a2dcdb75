"""A linear map in a compute dtype, its gradients added up in that of its parameters."""

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Linear):
    """flax's linear map, except for the gradient of its bias."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] -> [..., outputs], in the compute dtype."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if self.bias is None:
            return y
        # Repeated for every row and then cast: backward, rows are added up in float32.
        return y + jnp.broadcast_to(self.bias[...], y.shape).astype(y.dtype)
