"""The counterfactual step of a run: its batch under other prompt weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.diagnostics.counterfactual import Counterfactual, counterfactual_updates
from grpo_jax.instrument.weightings import RULES
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.objective import Objective
from grpo_jax.rollouts.judging import group_means
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.runs.lines import rounded
from grpo_jax.training.state import Batch, TrainState
from grpo_jax.training.step import make_gradients


def compare_weights(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    policy: Policy,
    state: TrainState,
    batch: Batch,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int | None,
) -> Counterfactual:
    """The run's weights and those of `RULES`, on one batch and optimizer state; pure.

    Args:
        objective: The run's objective.
        optimizer: The run's optimizer.
        policy: Without trained parameters: those are the state's.
        state: Before the update.
        batch: [P, G, T] rollouts with their weights [P].
        micro: Prompts and samples per backward pass.
        temperature: The sampling temperature.
        max_length: Tokens that a completion may have; None: not read.
    """
    params, rollouts = state.params, batch.rollouts
    weights = {"this run": batch.weights}
    for name, rule in RULES.items():
        judged = batch.shaped_rewards
        if rule.pass_rates and rollouts.solving is not None:
            present = jnp.isfinite(judged)
            judged = jnp.where(present, (rollouts.solving != 0) + 0.0, jnp.nan)
        weights[name], _ = rule.weights(judged, rule.init())
    gradients = make_gradients(
        objective, micro=micro, temperature=temperature, max_length=max_length
    )

    def sequence_logprobs(params: Any) -> jax.Array:  # [P, G]
        current = policy.replace(params).with_all_modes()
        return batch_logprobs(current, rollouts, temperature, micro).sum(-1)

    return counterfactual_updates(
        lambda w: gradients(policy.replace(params), batch._replace(weights=w))[0],
        sequence_logprobs,
        params,
        rollouts.scored_rewards,
        weights,
        update_fn=lambda g: optimizer.update(g, state.opt_state, params)[0],
    )


def counterfactual_row(
    step: int, result: Counterfactual, rewards: Any
) -> dict[str, Any]:
    """A row of counterfactual.jsonl; rows and columns of tables are `weightings`.

    Args:
        step: As metrics.jsonl counts.
        result: On the host.
        rewards: [P, G] as scored; `group_mean` is null for a group without rewards.
    """
    norms = np.asarray(result.norms, float)
    return {
        "step": step,
        "weightings": ["this run", *RULES],
        "group_mean": rounded(group_means(rewards)),
        "norm_ratio": rounded(norms / norms[1] if norms[1] > 0 else norms * 0),
        "cosines": rounded(result.cosines),
        "update_norm": rounded(result.update_norms),
        "update_cosines": rounded(result.update_cosines),
        "slope": rounded(result.slopes),
        "curvature": rounded(result.curvatures),
        "predicted_change": rounded(result.predicted_change()),
    }
