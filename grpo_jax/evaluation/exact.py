"""Exact pass rates, where exactly one completion is right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import gather_to_host
from grpo_jax.parallel.sharding import batch_devices
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.rollouts.types import Rollouts


@partial(jax.jit, static_argnames="micro")
def _sum_logprobs(
    policy: Policy, rollouts: Rollouts, temperature: float, micro: MicroBatch
) -> jax.Array:
    """[N, 1] log-probs of completions [N, 1, T]."""
    return batch_logprobs(policy, rollouts, temperature, micro).sum(-1)


def exact_pass_rates(
    policy: Policy,
    answers: Rollouts,
    temperature: float,
    budget: int = 2**16,
) -> np.ndarray:
    """[N] exact pass rates of answers [N, 1, T], each the only right completion.

    Args:
        policy: Its parameters may be sharded.
        answers: [N, 1, T] completions, padded to one length.
        temperature: Of sampling.
        budget: Tokens in a micro-batch of each device, about.
    """
    return np.exp(_answer_logprobs(policy, answers, temperature, budget))


def token_loss(policy: Policy, answers: Rollouts, budget: int = 2**14) -> float:
    """Mean -log-prob of the tokens of answers [N, 1, T], EOS included, in nats."""
    logprobs = _answer_logprobs(policy, answers, 1.0, budget)
    return float(-logprobs.sum() / answers.completion_mask.sum())


def _answer_logprobs(
    policy: Policy, answers: Rollouts, temperature: float, budget: int
) -> np.ndarray:
    """[N] log-probs of answers [N, 1, T], about `budget` tokens at a time."""
    n, _, t = answers.completions.shape
    devices = batch_devices()
    part = max(1, budget // (answers.prompts.shape[1] + t)) * devices
    part = min(part, -(-n // devices) * devices)
    # Padded to full micro-batches with rows of its own, which are cut off again.
    padded = np.resize(np.arange(n), -(-n // part) * part)
    answers = jax.tree.map(lambda x: np.asarray(x)[padded], answers)
    logprobs = _sum_logprobs(
        policy, answers, jnp.float32(temperature), MicroBatch(part, 1)
    )
    return gather_to_host(logprobs)[:n, 0]
