"""The counterfactual step of a run: its batch under other prompt weights."""

from typing import Any

import jax
import numpy as np

from grpo_jax.advantages import group_statistics
from grpo_jax.counterfactual import Counterfactual, counterfactual_updates
from grpo_jax.models.decoder import Policy
from grpo_jax.objectives.presets import Objective
from grpo_jax.preconditioner import posterior_weights, std_weights, unit_weights
from grpo_jax.training.metrics import JsonLines
from grpo_jax.training.step import Batch, MicroBatch, batch_logprobs, make_gradients

# Compared besides the run's own weights, which come first.
RULES = {
    "reinforce": unit_weights(),
    "std": std_weights(),
    "shrunk": posterior_weights(),
    "1/std^2": std_weights(power=2.0),
}


def look(
    policy: Policy,
    objective: Objective,
    params: Any,
    batch: Batch,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int,
) -> Counterfactual:
    """The run's own weights, then `RULES`, on one batch; pure."""
    rewards = batch.rollouts.rewards
    weights = {"this run": batch.weights}
    for name, rule in RULES.items():
        weights[name], _ = rule.weights(rewards, rule.init())
    gradients = make_gradients(
        policy, objective, micro=micro, temperature=temperature, max_length=max_length
    )

    def sequence_logprobs(params):
        current = policy.replace(params)
        return batch_logprobs(current, batch.rollouts, temperature, micro).sum(-1)

    return counterfactual_updates(
        lambda w: gradients(params, batch._replace(weights=w))[0],
        sequence_logprobs,
        params,
        rewards,
        weights,
    )


def record(
    file: JsonLines, step: int, found: Counterfactual, rewards: Any, length: float
) -> None:
    """One line of counterfactual.jsonl.

    Args:
        length: Of the update that the run made, in parameter space: every weighting's
            predicted change is for a step as long.
    """
    changes = np.asarray(found.predicted_change(length), float)
    statistics = jax.device_get(group_statistics(rewards))
    norms = np.asarray(found.norms, float)
    file.write(
        {
            "step": step,
            "weightings": ["this run", *RULES],
            "length": length,
            "group_mean": _rounded(statistics.mean),
            "cosines": _rounded(found.cosines),
            "norm_ratio": _rounded(norms / norms[1] if norms[1] > 0 else norms * 0),
            "slope": _rounded(found.slopes),
            "curvature": _rounded(found.curvatures),
            "predicted_change": _rounded(changes),
        }
    )


def _rounded(values):
    """Six significant digits."""
    values = np.asarray(values, float)
    return [
        _rounded(v) if isinstance(v, np.ndarray) else float(f"{v:.6g}") for v in values
    ]
