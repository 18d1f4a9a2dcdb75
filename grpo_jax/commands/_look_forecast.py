"""How long `grpo-jax look` will take, and how much memory."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.errors import ConfigError
from grpo_jax.instrument.plan import (
    GRADIENT,
    SECOND_ORDER,
    kept_coordinates,
    look_cost,
    vector_bytes,
)
from grpo_jax.models.config import num_parameters
from grpo_jax.models.policy import Policy
from grpo_jax.planning.memory import estimate_look, readable
from grpo_jax.precision import float32_products
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training.console import format_seconds

COMPILING = 800 * 10**6  # bytes that the compiler takes beside a CPU's arrays, about


class Forecast(NamedTuple):
    """What a measurement will take."""

    seconds: float
    peak_bytes: int  # of an accelerator's memory; on a CPU of the whole process

    def text(self) -> str:
        return (
            f"about {format_seconds(self.seconds)} and {readable(self.peak_bytes, 'B')}"
        )


def forecast(
    policy: Policy,
    rollouts: Rollouts,
    micro_batch_tokens: int = 2**14,
    layers: int | None = None,
) -> Forecast:
    """Time and peak memory of `look` on rollouts [P, G, T], without compiling it.

    From a count of products, at the rate at which this device multiplies two matrices
    of the model's sizes now; and from the formulas of `grpo-jax plan`.
    """
    count, group_size, tokens = rollouts.completions.shape
    length, model = rollouts.prompts.shape[1], policy.config
    width, _ = kept_and_all(policy, layers, count, group_size)
    base = policy.params if policy.frozen is None else policy.frozen
    passes = count * look_cost(group_size, length, tokens, *_passes(policy, layers))
    look = estimate_look(
        model,
        group_size=group_size,
        prompt_tokens=length,
        max_new_tokens=tokens,
        micro_batch_tokens=micro_batch_tokens,
        sums=vector_bytes(count, group_size, width),
        base_bytes=max(x.dtype.itemsize for x in jax.tree.leaves(base)),
        widened=jax.default_backend() == "cpu",
        layers=layers,
    )
    held = sum(x.nbytes for x in jax.tree.leaves((policy.params, policy.frozen)))
    if jax.default_backend() == "cpu":  # the arrays are memory of the process
        held = max(held, resident_bytes()) + COMPILING
    seconds = (
        2 * num_parameters(model) * passes / _product_rate(model.width, model.dtype)
    )
    return Forecast(seconds, held + look)


def _passes(policy: Policy, layers: int | None) -> tuple[float, float]:
    """Forward passes that a gradient counts as, and derivatives along a direction.

    Of LoRA's factors no products with the base's gradients or directions are needed; of
    the last layers, none below them.
    """
    if layers is not None:
        share = layers / policy.config.num_layers
        return 1 + share * (GRADIENT - 1), 1 + share * (SECOND_ORDER - 1)
    return (3, 3) if policy.frozen is not None else (GRADIENT, SECOND_ORDER)


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def kept_and_all(
    policy: Policy, layers: int | None, prompts: int, group_size: int
) -> tuple[int, int]:
    """(coordinates kept of a gradient, coordinates that it has).

    Args:
        policy: Whose trained parameters are measured, or
        layers: so many of its last layers.
        prompts: P.
        group_size: G.

    Raises:
        ConfigError: it has fewer layers.
    """
    params = policy.params if layers is None else policy.params["layers"]
    size = sum(x.size for x in jax.tree.leaves(params))
    if layers is not None:
        total = policy.config.num_layers
        if layers > total:
            raise ConfigError(f"layers must be at most {total}, got {layers}.")
        size = size * layers // total
    return kept_coordinates(prompts, group_size, size), size


def _product_rate(width: int, dtype: str) -> float:
    """Floating-point operations a second in products of the model's width."""
    x = jnp.ones((512, width), dtype)
    w = jnp.ones((width, 4 * width), dtype)
    product = jax.jit(float32_products(dtype)(lambda x, w: x @ w))
    product(x, w).block_until_ready()
    began, repeats = time.monotonic(), 10
    for _ in range(repeats):
        product(x, w).block_until_ready()
    return repeats * 2 * x.size * w.shape[1] / (time.monotonic() - began)
