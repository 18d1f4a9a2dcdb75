"""Log-probs of completions under a policy, teacher-forced."""

import jax
import jax.numpy as jnp

from grpo_jax.models.forward import teacher_forced
from grpo_jax.models.policy import Policy
from grpo_jax.parallel.sharding import constrain
from grpo_jax.rollouts.micro_batches import (
    MicroBatch,
    _joined,
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
    """[P, G, T] log-probs of the completions: the teacher-forced twin of `sample`'s.

    Those of the whole, untruncated distribution; 0 after each completion's end.
    """
    prompts = rollouts.prompts, rollouts.prompt_mask
    logprobs = teacher_forced(policy, *prompts, rollouts.completions, temperature)
    return jnp.where(rollouts.completion_mask.astype(bool), logprobs, 0.0)


def batch_logprobs(
    policy: Policy,
    rollouts: Rollouts,
    temperature: float,
    micro: MicroBatch,
    with_entropy: bool = False,
):
    """[P, G, T] log-probs of the completions, micro-batch by micro-batch; with
    `with_entropy` a pair, the second the entropy at each token."""
    _, g, t = rollouts.completions.shape
    times = g // micro.samples
    prompts = split_batch((rollouts.prompts, rollouts.prompt_mask), micro, False)
    parts = (
        repeat_parts(prompts, times),
        split_batch(rollouts.completions, micro, True),
    )

    def part(x):
        (prompts, prompt_mask), completions = x
        return teacher_forced(
            policy, prompts, prompt_mask, completions, temperature, with_entropy
        )

    def whole(x):  # [parts, p, g, T]
        x = x.reshape(-1, times, micro.prompts, micro.samples, t)
        x = _joined(x.swapaxes(1, 2), 2, micro.shards[1])
        x = constrain(_joined(x, 0, micro.shards[0]), "prompts", "samples")
        return jnp.where(rollouts.completion_mask.astype(bool), x, 0.0)

    return jax.tree.map(whole, jax.lax.map(part, parts))
