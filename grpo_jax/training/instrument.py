"""A first look at why normalisation matters: a fixed set of probe prompts, watched.

Per probe prompt its pass rate and the std that a sampled group shows, and the cosines
between the prompts' gradients. Where one answer is right, grad p_x = p_x grad log p_x:
the gradient's direction is that of the answer's log-prob, exact, nothing sampled.
"""

from functools import partial

import jax
import numpy as np

from grpo_jax.gradient_geometry import cosine_statistics, exact_cosines
from grpo_jax.models.decoder import Policy
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training.step import MicroBatch, batch_logprobs

MAX_GRADIENT_BYTES = 2 * 1024**3  # all probe prompts' gradients, held at once


@jax.jit
def _cosines(policy, answers, temperature):
    def log_pass_rate(params, answer):
        one = jax.tree.map(lambda x: x[None], answer)
        return batch_logprobs(
            policy.replace(params), one, temperature, MicroBatch(1, 1)
        ).sum()

    cosines = exact_cosines(log_pass_rate, policy.params, answers)
    return cosines, cosine_statistics(cosines)


def look(
    policy: Policy,
    answers: Rollouts,
    group_std: np.ndarray,
    pass_rates: np.ndarray,
    temperature: float,
) -> tuple[dict, dict[str, float]]:
    """(a row of instrument.jsonl, metrics of the step).

    Args:
        answers: [P, 1, T], the probe prompts' right answers.
        group_std: [P] of rewards sampled for them now.
        pass_rates: [P], exact.
    """
    cosines, statistics = _cosines(policy, answers, np.float32(temperature))
    rounded = partial(np.round, decimals=5)
    row = {
        "pass_rate": rounded(pass_rates.astype(float)).tolist(),
        "group_std": rounded(group_std.astype(float)).tolist(),
        "cosines": rounded(np.asarray(cosines, float)).tolist(),
    }
    return row, {
        "geometry/mean_abs_cosine": float(statistics.mean_abs),
        "geometry/std_cosine": float(statistics.std),
        "geometry/small_fraction": float(statistics.small_fraction),
    }
