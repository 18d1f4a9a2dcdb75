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
def _answer_logprobs(policy, rollouts, temperature, micro):
    return batch_logprobs(policy, rollouts, temperature, micro).sum(-1)


def exact_pass_rates(
    policy: Policy,
    answers: Rollouts,
    temperature: float,
    budget: int = 2**16,
) -> np.ndarray:
    """[N] exact pass rates of answers [N, 1, T], each the one right completion.

    At most about `budget` tokens are looked at in one go, on each device.
    """
    return np.exp(_answers_logprobs(policy, answers, temperature, budget))


def token_loss(policy: Policy, answers: Rollouts, budget: int = 2**14) -> float:
    """Mean -log-prob of the answers' tokens [N, 1, T], their EOS included, in nats."""
    logprobs = _answers_logprobs(policy, answers, 1.0, budget)
    return float(-logprobs.sum() / answers.completion_mask.sum())


def _answers_logprobs(policy, answers, temperature, budget):
    """[N] log-probs of answers [N, 1, T], about `budget` tokens at a time."""
    n, _, t = answers.completions.shape
    devices = batch_devices()
    part = max(1, budget // (answers.prompts.shape[1] + t)) * devices
    part = min(part, -(-n // devices) * devices)
    # Filled up to whole parts with rows that are there already, and cut again.
    filled = np.resize(np.arange(n), -(-n // part) * part)
    answers = jax.tree.map(lambda x: np.asarray(x)[filled], answers)
    micro, temperature = MicroBatch(part, 1), jnp.float32(temperature)
    logprobs = _answer_logprobs(policy, answers, temperature, micro)
    return gather_to_host(logprobs)[:n, 0]
