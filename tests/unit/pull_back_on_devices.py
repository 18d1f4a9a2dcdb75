"""Eight virtual devices: `python -m tests.unit.pull_back_on_devices`.

The number of devices is fixed when jax starts, so this is a process. Prints one line of
JSON: the largest difference from the global batch on one device, by case.
"""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

import grpo_jax as gj

chex.set_n_cpu_devices(8)
jax.config.update("jax_disable_most_optimizations", True)

RULES = {
    "std": gj.std_weights(),
    "batch_std": gj.batch_std_weights(),
    "posterior": gj.posterior_weights(32),
}
P, G, D = 16, 4, 8
rng = np.random.default_rng(0)
REWARDS = rng.choice([0.0, 1.0], (P, G), p=[0.6, 0.4]).astype(np.float32)
REWARDS[3, 1] = np.nan
IDS = rng.permutation(32)[:P].astype(np.int32)
INPUTS = rng.normal(size=(P, D)).astype(np.float32)
PARAMS = {"w": rng.normal(size=D).astype(np.float32), "b": np.float32(0.5)}
BOTH, SPLIT = ("data", "fsdp"), PartitionSpec(("data", "fsdp"))


def losses(params, inputs):
    return jnp.sin(inputs @ params["w"] + params["b"]) * params["b"]


def losses_of_shards(params, inputs):
    """The same, of w split over fsdp."""
    w = jax.lax.all_gather(params["w"], "fsdp", tiled=True)
    return losses(params | {"w": w}, inputs)


def run(f, axis_name, params, inputs, rewards, ids):
    """Values, gradients and states of two batches, the second with the state."""
    first = f(params, inputs, rewards=rewards, prompt_ids=ids, axis_name=axis_name)
    second = f(
        params, inputs, rewards=1 - rewards, state=first[2], prompt_ids=ids,
        axis_name=axis_name,
    )  # fmt: skip
    return first, second


def gap(actual, expected):
    """The largest absolute difference of two trees."""
    actual, expected = map(jax.tree.leaves, (actual, expected))
    pairs = zip(actual, expected, strict=True)
    return max(float(np.abs(np.asarray(a) - b).max()) for a, b in pairs)


def main():
    mesh = jax.make_mesh((4, 2), BOTH, axis_types=(AxisType.Auto,) * 2)
    replicated = {"w": PartitionSpec(), "b": PartitionSpec()}
    fsdp = {"w": PartitionSpec("fsdp"), "b": PartitionSpec()}
    # Losses, axis_name, where prompts and parameters are, micro_batches, check_vma.
    cases = {
        "both axes": (losses, BOTH, SPLIT, replicated, 2, True),
        "both axes, unchecked": (losses, BOTH, SPLIT, replicated, 1, False),
        "one axis": (losses, "data", PartitionSpec("data"), replicated, 1, True),
        "fsdp": (losses_of_shards, BOTH, SPLIT, fsdp, 2, True),
    }
    gaps = {}
    for name, rule in RULES.items():
        whole = gj.weighted_value_and_grad(losses, rule)
        expected = run(whole, None, PARAMS, INPUTS, REWARDS, IDS)
        for case, (function, axes, prompts, params, parts, check) in cases.items():
            f = gj.weighted_value_and_grad(function, rule, micro_batches=parts)
            sharded = jax.shard_map(
                lambda *arrays, f=f, axes=axes: run(f, axes, *arrays),
                mesh=mesh,
                in_specs=(params, prompts, prompts, prompts),
                out_specs=((PartitionSpec(), params, PartitionSpec()),) * 2,
                check_vma=check,
            )
            actual = jax.jit(sharded)(PARAMS, INPUTS, REWARDS, IDS)
            gaps[f"{name}, {case}"] = gap(actual, expected)
    print(json.dumps(gaps))


if __name__ == "__main__":
    main()
