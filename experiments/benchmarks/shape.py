"""The set-up of one train step of a given shape, and the step itself, for step.py,
real_model.py and weak_scaling.py."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

import grpo_jax as gj
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.loss import scale_weights
from grpo_jax.planning.optimizer import make_optimizer, make_schedule
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.runs.config import OptimizerConfig
from grpo_jax.training.state import Batch, TrainState, init_state
from grpo_jax.training.step import make_train_step

Time = TypeVar("Time")


class DecoderShape(Protocol):
    """The settings of both benchmarks that say how large the model is."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


class Shape(NamedTuple):
    """Rollouts of a step: P prompts of L tokens, G samples each of T tokens."""

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int


class TrainStep(NamedTuple):
    objective: gj.Objective
    rule: gj.PromptWeights
    micro: MicroBatch
    update: Callable[..., Any]  # (state, batch) -> (state, metrics), to be jitted
    init: Callable[[Any], TrainState]  # params -> state


def model_config(c: DecoderShape, **choices: Any) -> gj.ModelConfig:
    return gj.ModelConfig(
        vocab_size=c.vocab,
        num_layers=c.layers,
        width=c.width,
        mlp_width=c.mlp_width,
        num_heads=c.heads,
        num_kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        **choices,
    )


def make_step(
    policy: Policy, objective: str, shape: Shape, micro_batch_tokens: int
) -> TrainStep:
    """The trainer's update without KL, under the weights of the objective's scale."""
    chosen = dataclasses.replace(gj.OBJECTIVES[objective], kl_coef=0.0)
    rule = scale_weights(chosen)
    settings = OptimizerConfig(learning_rate=1e-4)  # constant
    optimizer = make_optimizer(settings, make_schedule(settings, 100))
    micro = micro_batch(*shape, micro_batch_tokens)
    update = make_train_step(
        policy.replace(None),
        chosen,
        optimizer,
        micro=micro,
        temperature=1.0,
        max_length=shape.new_tokens,
    )

    def init(params: Any) -> TrainState:
        return init_state(params, optimizer, rule)

    return TrainStep(chosen, rule, micro, update, init)


def one_step(
    policy: Policy,
    made: TrainStep,
    update: Callable[..., Any],
    state: TrainState,
    prompts: np.ndarray,
    rewards: jax.Array,
    i: int,
    *,
    new_tokens: int,
    now: Callable[[], Time],
) -> tuple[TrainState, gj.Rollouts, tuple[Time, Time, Time]]:
    """(state, rollouts, times at which it began, had sampled, had updated).

    Args:
        update: `made.update`, jitted.
        prompts: [P, L] token ids, without padding.
        rewards: [P, G].
        i: Of the step; its samples are a function of it.
        now: Reads a clock.
    """
    began = now()
    rollouts = gj.sample(
        policy.replace(state.params),
        prompts,
        np.ones_like(prompts),
        group_size=rewards.shape[1],
        max_new_tokens=new_tokens,
        key=jax.random.fold_in(jax.random.key(1), i),
        eos_id=-1,  # no token ends a completion
        pad_id=0,
    )
    jax.block_until_ready(rollouts)
    sampled = now()
    # The ratio is against the sampler's own log-probs.
    batch = Batch(
        rollouts._replace(rewards=rewards),
        rewards,
        made.rule.weights(rewards, ())[0],
        old_logprobs=rollouts.behaviour_logprobs,
    )
    state, _ = update(state, batch)
    jax.block_until_ready(state)
    return state, rollouts, (began, sampled, now())
