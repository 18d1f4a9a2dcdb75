"""Log-probs of completions under a policy, teacher-forced."""

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.forward import check_token_ids, teacher_forced
from grpo_jax.models.policy import Policy
from grpo_jax.rollouts.micro_batches import (
    MicroBatch,
    join_batch,
    repeat_parts,
    split_batch,
)
from grpo_jax.rollouts.types import Rollouts


def completion_logprobs(
    policy: Policy,
    rollouts: Rollouts,
    *,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """Log-probs [P, G, T] float32 of the completions: the teacher-forced twin of those
    that `sample` recorded.

    Of the full, untruncated distribution; 0 after each completion's end.

    Args:
        policy: The distribution.
        rollouts: [P, G, T] completions.
        temperature: Divides the logits, as in `sample`.

    Raises:
        ValueError: shapes do not fit, the temperature is not positive, or ids are
            outside the vocabulary (where they are known: not while traced).
    """
    _check(policy, rollouts, temperature)
    prompts = rollouts.prompts, rollouts.prompt_mask
    logprobs = teacher_forced(policy, *prompts, rollouts.completions, temperature)
    return jnp.where(rollouts.completion_mask.astype(bool), logprobs, 0.0)


def _check(policy: Policy, rollouts: Rollouts, temperature: float | jax.Array) -> None:
    prompts, mask = rollouts.prompts.shape, rollouts.prompt_mask.shape
    if len(prompts) != 2 or prompts != mask:
        raise ValueError(
            f"prompts and prompt_mask must be [P, L] alike, got {prompts} and {mask}."
        )
    shape, mask = rollouts.completions.shape, rollouts.completion_mask.shape
    if len(shape) != 3 or shape != mask or shape[:1] != prompts[:1]:
        raise ValueError(
            f"completions and completion_mask must be [{prompts[0]}, G, T] alike, got "
            f"{shape} and {mask}."
        )
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    for name in ("prompts", "completions"):
        check_token_ids(name, getattr(rollouts, name), policy.config.vocab_size)


def batch_logprobs(
    policy: Policy,
    rollouts: Rollouts,
    temperature: float | jax.Array,
    micro: MicroBatch,
    with_entropy: bool = False,
) -> Any:
    """`completion_logprobs` [P, G, T], micro-batch by micro-batch.

    Args:
        policy: The distribution.
        rollouts: [P, G, T] completions.
        temperature: Divides the logits.
        micro: Sizes of the micro-batches.
        with_entropy: Return a pair, the second the entropies [P, G, T] in nats.
    """
    g = rollouts.completions.shape[1]
    prompts = split_batch((rollouts.prompts, rollouts.prompt_mask), micro, False)
    parts = (
        repeat_parts(prompts, g // micro.samples),
        split_batch(rollouts.completions, micro, True),
    )

    def part(x):
        (prompts, prompt_mask), completions = x
        return teacher_forced(
            policy, prompts, prompt_mask, completions, temperature, with_entropy
        )

    def masked(x):  # [P, G, T]
        return jnp.where(rollouts.completion_mask.astype(bool), x, 0.0)

    return jax.tree.map(masked, join_batch(jax.lax.map(part, parts), micro, g))
