"""The set-up of one train step of a given shape, for step.py and weak_scaling.py."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import grpo_jax as gj
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.loss import scale_weights
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.runs.config import OptimizerConfig
from grpo_jax.training.optimizer import make_optimizer, make_schedule
from grpo_jax.training.state import TrainState, init_state
from grpo_jax.training.step import make_train_step


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
