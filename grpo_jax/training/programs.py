"""The compiled programs of an update, for completions of one padded length."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax.models.policy import Policy
from grpo_jax.objectives.objective import Objective
from grpo_jax.parallel.sharding import group_sharding, tree_shardings, with_shardings
from grpo_jax.preconditioner import PromptWeights
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training import counterfactual
from grpo_jax.training.state import Batch, TrainState, part_of, push_history
from grpo_jax.training.step import make_train_step
from grpo_jax.training.weighing import has_token_weights, token_weights, weigh

Program = Callable[..., Any]  # compiled ahead of time, for fixed shapes


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """What the programs of an update are made from.

    Attributes:
        rule: From rewards to prompt weights.
        policy: Config and graph, with frozen parameters but without trained ones.
        reference: The policy at step 0, where the objective has a KL term; on the
            devices or on the host.
        max_new_tokens: Tokens that a completion may have, T or more; None where the
            objective does not read it.
        stop_ids: Tokens that end a completion.
        updates: Updates made of one rollout.
        micro_batch_tokens: Tokens per backward pass, on each device.
        with_counterfactual: Also compile the comparison with other prompt weights.
        with_solving: Rollouts come with what is paid for solving (`Rollouts.solving`).
        skip_empty: Leave out updates whose gradient is 0 everywhere.
        mesh: None for a single device.
    """

    objective: Objective
    rule: PromptWeights
    optimizer: optax.GradientTransformation
    policy: Policy
    reference: Policy | None
    max_new_tokens: int | None
    temperature: float
    stop_ids: tuple[int, ...]
    updates: int
    micro_batch_tokens: int
    with_counterfactual: bool
    with_solving: bool
    skip_empty: bool
    mesh: Mesh | None

    @property
    def parts(self) -> int:
        """Equal parts of a batch's prompts, one for each update of a rollout."""
        return self.updates if self.objective.disjoint else 1

    @property
    def freeze_gradient_point(self) -> bool:
        """Whether all updates of a rollout take the gradient at the sampling
        parameters, because the objective has no importance ratio."""
        return self.updates > 1 and not self.objective.has_ratio()

    @property
    def rescore_old(self) -> bool:
        """Whether old log-probs are recomputed once per rollout. Rollouts of a history
        keep their samplers' log-probs instead."""
        several = self.updates > 1 and not self.freeze_gradient_point
        return several and self.objective.history == 1

    @property
    def rescores(self) -> bool:
        """Whether log-probs of a rollout are computed again before its updates."""
        return self.rescore_old or self.reference is not None

    def micro(self, prompts: int, rollouts: Rollouts) -> MicroBatch:
        """The split of `prompts` groups of rollouts [P, G, T]."""
        _, group_size, tokens = rollouts.completions.shape
        length = rollouts.prompts.shape[1]
        budget = self.micro_batch_tokens
        return micro_batch(prompts, group_size, length, tokens, budget)


def rollout_shapes(
    prompts: int,
    group_size: int,
    prompt_tokens: int,
    tokens: int,
    *,
    with_solving: bool,
    mesh: Mesh | None,
) -> Rollouts:
    """Abstract `Rollouts` [P, G, tokens], with shardings on a mesh."""
    p, g = prompts, group_size
    shape: Any = jax.ShapeDtypeStruct
    prompt = shape((p, prompt_tokens), jnp.int32)
    ids = shape((p, g, tokens), jnp.int32)
    logprobs = shape((p, g, tokens), jnp.float32)
    rewards = shape((p, g), jnp.float32)
    solving = rewards if with_solving else None
    rollouts = Rollouts(prompt, prompt, ids, ids, logprobs, rewards, solving)
    return with_shardings(rollouts, mesh)


class Programs(NamedTuple):
    """Compiled programs; None where the objective needs none.

    Attributes:
        weigh: (rollouts, reference_logprobs, prompt_ids, weights_state) -> `Weighed`.
        update: (state, batch, index of the part, where the gradient is taken, frozen
            parameters) -> (state, metrics); the state is donated.
        rescore: (policy, rollouts) -> log-probs [P, G, T].
        token_weights: (policy, rollouts) -> [P, G, T].
        push_history: (history, batch) -> (history, batch of all iterates).
        counterfactual: (policy, state, batch) -> `Counterfactual`.
    """

    weigh: Program
    update: Program
    rescore: Program | None
    token_weights: Program | None
    push_history: Program | None
    counterfactual: Program | None


def compile_programs(
    settings: UpdateSettings, state: TrainState, rollouts: Rollouts
) -> Programs:
    """Compiles the programs for rollouts [P, G, T], arrays or their abstract forms."""
    lowered = lower_programs(settings, state, rollouts)
    return Programs(*(x if x is None else x.compile() for x in lowered))  # pyright: ignore


def lower_programs(
    settings: UpdateSettings, state: TrainState, rollouts: Rollouts
) -> Programs:
    """The programs of `compile_programs` as `jax.stages.Lowered`, not yet compiled."""
    s, objective = settings, settings.objective
    prompts = rollouts.prompts.shape[0]
    logprobs = rollouts.behaviour_logprobs
    policy = s.policy.replace(state.params)
    micro = s.micro(prompts, rollouts)
    lower = partial(_lower, mesh=s.mesh)

    rescore = weights_of_tokens = compare = push = token_shapes = None
    if s.rescores:
        score = partial(batch_logprobs, temperature=s.temperature, micro=micro)
        rescore, _ = lower(score, policy, rollouts, out_shardings=_by_group)
    reference = None if s.reference is None else logprobs
    weigh_program, weighed = lower(
        partial(weigh, objective, s.rule, max_length=s.max_new_tokens),
        rollouts,
        reference,
        jax.ShapeDtypeStruct((prompts,), jnp.int32),
        state.weights_state,
        out_shardings=tree_shardings,
    )
    if has_token_weights(objective):
        factors = partial(
            token_weights, objective, temperature=s.temperature, eos_id=s.stop_ids
        )
        weights_of_tokens, token_shapes = lower(
            factors, policy, rollouts, out_shardings=_by_group
        )
    batch = Batch(
        weighed.rollouts,
        weighed.shaped_rewards,
        weighed.weights,
        logprobs if s.rescore_old else None,
        reference,
        token_shapes,
        weighed.added_rewards,
    )
    if s.with_counterfactual:
        compare_weights = partial(
            counterfactual.compare_weights,
            objective,
            s.optimizer,
            micro=micro,
            temperature=s.temperature,
            max_length=s.max_new_tokens,
        )
        compare, _ = lower(compare_weights, s.policy, state, batch)
    if objective.history > 1:
        push, (_, batch) = lower(
            partial(push_history, objective),
            state.history,
            batch,
            out_shardings=_of_history,
        )
    update = _lower_update(settings, state, batch)
    return Programs(weigh_program, update, rescore, weights_of_tokens, push, compare)


def _lower_update(s: UpdateSettings, state: TrainState, batch: Batch) -> Any:
    prompts = batch.weights.shape[0] // s.parts
    step = make_train_step(
        dataclasses.replace(s.policy, frozen=None),
        s.objective,
        s.optimizer,
        micro=s.micro(prompts, batch.rollouts),
        temperature=s.temperature,
        max_length=s.max_new_tokens,
        skip_empty=s.skip_empty,
    )

    def update(state: TrainState, batch: Batch, index: Any, at: Any, frozen: Any):
        return step(state, part_of(batch, index, s.parts), at, frozen)

    at = state.params if s.freeze_gradient_point else None
    program, _ = _lower(
        update,
        state,
        batch,
        np.int32(0),
        at,
        s.policy.frozen,
        mesh=s.mesh,
        donate=(0,),
        out_shardings=tree_shardings,
    )
    return program


def _by_group(shapes: Any, mesh: Mesh) -> Any:
    """Shardings of arrays [P, G, ...]."""
    return jax.tree.map(lambda x: group_sharding(x.shape, mesh), shapes)


def _of_history(shapes: tuple[Any, Any], mesh: Mesh) -> tuple[Any, Any]:
    """Shardings of (history, batch): they go by names, outermost field included."""
    history, batch = shapes
    named = tree_shardings({"history": history}, mesh)
    return named["history"], tree_shardings(batch, mesh)


def _lower(
    function: Callable,
    *arguments: Any,
    mesh: Mesh | None,
    donate: tuple[int, ...] = (),
    out_shardings: Callable[[Any, Mesh], Any] | None = None,
) -> tuple[Any, Any]:
    """(`jax.stages.Lowered`, its abstract outputs).

    Args:
        function: What to lower.
        arguments: Arrays or their abstract forms.
        mesh: None for a single device, where nothing is sharded.
        donate: Arguments whose buffers the program may overwrite.
        out_shardings: Maps the outputs' shapes to shardings on the mesh; None lets XLA
            choose.
    """
    if mesh is None or out_shardings is None:
        lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
        return lowered, lowered.out_info
    shapes = jax.eval_shape(function, *arguments)
    shardings = out_shardings(shapes, mesh)
    jitted = jax.jit(function, donate_argnums=donate, out_shardings=shardings)
    outputs = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )
    return jitted.lower(*arguments), outputs
