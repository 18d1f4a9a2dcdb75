"""Which memory arrays lie in: their devices' own, or that of the devices' host."""

from typing import Any

import jax

from grpo_jax.errors import ConfigError

MEMORIES = ("device", "host")
_HOST = "pinned_host"  # the kind that devices read without a copy by the host


def on_host(tree: Any) -> Any:
    """The tree in memory of the devices' hosts, each shard on its device's.

    Raises:
        ConfigError: the devices have no such memory.
    """

    def leaf(x: jax.Array) -> jax.Array:  # [...]
        kinds = [memory.kind for memory in _device_of(x).addressable_memories()]
        if _HOST not in kinds:
            raise ConfigError(
                f"the devices must have memory of kind {_HOST} on their host, got "
                f"{', '.join(kinds)}; leave arrays on the devices."
            )
        return _moved(x, _HOST)

    return jax.tree.map(leaf, tree)


def on_device(tree: Any) -> Any:
    """The tree in the devices' own memory; what is there already is not copied."""
    return jax.tree.map(lambda x: _moved(x, _device_of(x).default_memory().kind), tree)


def _device_of(x: jax.Array) -> Any:
    """One of this process's devices that x [...] lies on."""
    return x.addressable_shards[0].device


def _moved(x: jax.Array, kind: str) -> jax.Array:
    """x [...] in another memory of the same devices."""
    if x.sharding.memory_kind == kind:
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(kind))
