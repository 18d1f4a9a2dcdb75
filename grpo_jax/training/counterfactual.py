"""The counterfactual step of a run: its batch under other prompt weights."""

from typing import Any

import numpy as np
import optax

from grpo_jax.diagnostics.counterfactual import Counterfactual, counterfactual_updates
from grpo_jax.instrument.weightings import RULES
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.loss import present_mask, shaped_rewards
from grpo_jax.objectives.presets import Objective
from grpo_jax.rollouts.judging import group_means
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.runs.lines import rounded
from grpo_jax.training.state import Batch, TrainState
from grpo_jax.training.step import make_gradients


def look(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    policy: Policy,
    state: TrainState,
    batch: Batch,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int,
) -> Counterfactual:
    """The run's own weights, then `RULES`: one batch, one optimizer state; pure.

    `policy` has no parameters but frozen ones; the others are the state's.
    """
    params = state.params
    rollouts = batch.rollouts
    rewards = shaped_rewards(
        objective,
        rollouts.rewards,
        rollouts.behaviour_logprobs,
        batch.reference_logprobs,
        present_mask(rollouts.completion_mask, rollouts.rewards),
    )
    weights = {"this run": batch.weights}
    for name, rule in RULES.items():
        weights[name], _ = rule.weights(rewards, rule.init())
    gradients = make_gradients(
        objective, micro=micro, temperature=temperature, max_length=max_length
    )

    def sequence_logprobs(params):
        current = policy.replace(params)
        return batch_logprobs(current, rollouts, temperature, micro).sum(-1)

    return counterfactual_updates(
        lambda w: gradients(policy.replace(params), batch._replace(weights=w))[0],
        sequence_logprobs,
        params,
        rollouts.rewards,
        weights,
        update_fn=lambda g: optimizer.update(g, state.opt_state, params)[0],
    )


def record(step: int, found: Counterfactual, rewards: Any) -> dict[str, Any]:
    """One line of counterfactual.jsonl: rows and columns are `weightings`.

    Args:
        found: On the host.
        rewards: [P, G] as scored; `group_mean` is null for a group without any.
    """
    norms = np.asarray(found.norms, float)
    return {
        "step": step,
        "weightings": ["this run", *RULES],
        "group_mean": rounded(group_means(rewards)),
        "norm_ratio": rounded(norms / norms[1] if norms[1] > 0 else norms * 0),
        "cosines": rounded(found.cosines),
        "update_norm": rounded(found.update_norms),
        "update_cosines": rounded(found.update_cosines),
        "slope": rounded(found.slopes),
        "curvature": rounded(found.curvatures),
        "predicted_change": rounded(found.predicted_change()),
    }
