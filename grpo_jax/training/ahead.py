"""A run's programs for devices that need not be there, from its plan alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.policy import abstract_policy
from grpo_jax.parallel.meshes import make_mesh, mesh_of_one
from grpo_jax.parallel.platform import compiling_for
from grpo_jax.parallel.sharding import on_mesh, with_shardings
from grpo_jax.planning.plan import Plan
from grpo_jax.rollouts.sampling import lower_sample
from grpo_jax.runs.config import TrainConfig
from grpo_jax.training.context import as_planned
from grpo_jax.training.parts import make_learner, make_optimizer_of, shapes_of_rollouts


def lower_ahead(
    config: TrainConfig, plan: Plan, devices: Sequence[Any]
) -> dict[str, Any]:
    """The update of the longest completions and, unless the user's sampler takes its
    place, sampling: `jax.stages.Lowered` for the compiler of `devices`.

    Raises:
        ConfigError: the mesh does not fit the devices.
    """
    config = as_planned(config, plan)
    mesh = make_mesh(config.mesh, devices)
    placed = mesh_of_one(devices[0]) if mesh is None else mesh
    policy = abstract_policy(plan.model)
    base = jnp.bfloat16 if plan.memory.base_bytes == 2 else jnp.float32
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, base), policy.frozen)
    policy = with_shardings(dataclasses.replace(policy, frozen=frozen), placed)
    objective = plan.objective
    optimizer, _ = make_optimizer_of(config, plan)
    learner = make_learner(config, plan, objective, optimizer, mesh)
    rollouts = shapes_of_rollouts(config, plan, objective, mesh)[-1]
    rollouts = with_shardings(rollouts, placed)
    with compiling_for(devices[0].platform):
        lowered: dict[str, Any] = {
            "update": learner.lower(policy, rollouts, placed).update
        }
        if plan.given.sampler is None:
            with on_mesh(mesh):
                lowered["sampling"] = lower_sample(
                    policy,
                    config.batch.prompts,
                    plan.prompt_length,
                    group_size=config.batch.group_size,
                    max_new_tokens=plan.max_new_tokens,
                    ends=len(plan.task.ends),
                )
    return lowered
