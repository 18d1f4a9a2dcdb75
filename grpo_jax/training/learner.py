"""Weighs scored rollouts and makes a rollout's updates, with compiled programs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.diagnostics.counterfactual import Counterfactual
from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import gather_to_host
from grpo_jax.parallel.sharding import put_on_mesh
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training.programs import Programs, UpdateSettings, compile_programs
from grpo_jax.training.state import Batch, TrainState, empty_history, init_state


class WeighedBatch(NamedTuple):
    """A batch ready for its updates."""

    state: TrainState  # its weights_state has seen these rewards
    batch: Batch
    metrics: dict[str, jax.Array]  # scalars of the rewards, on the device


class Learner:
    """Makes the initial state, weighs rollouts and updates the state.

    Args:
        settings: What the programs are made from.
        buckets: Padded completion lengths, one set of programs each.
    """

    def __init__(self, settings: UpdateSettings, buckets: Sequence[int]):
        self.settings, self._buckets = settings, buckets
        self._programs: dict[int, Programs] = {}

    def init(self, policy: Policy) -> TrainState:
        """The state before any update; takes over the policy's parameters."""
        s = self.settings
        history = empty_history(s.objective, s.rollout_shapes(s.max_new_tokens))
        state = init_state(policy.params, s.optimizer, s.rule, history)
        return put_on_mesh(state, s.mesh)

    def compile(self, state: TrainState, stopping: Callable[[], bool]) -> None:
        """Compiles every program, so that no step waits for one; less if `stopping`."""
        for tokens in self._buckets:
            if stopping():
                return
            self._programs[tokens] = compile_programs(self.settings, state, tokens)

    def weigh(
        self, state: TrainState, rollouts: Rollouts, prompt_ids: np.ndarray
    ) -> WeighedBatch:
        """Prompt weights of scored rollouts, and the other constants of their updates.

        Args:
            state: Before the updates.
            rollouts: [P, G, T] with rewards, T one of the buckets.
            prompt_ids: [P] indices of the prompts among the trained ones.
        """
        s, programs = self.settings, self._programs_of(rollouts)
        policy = s.policy.replace(state.params)
        if not s.with_solving:
            rollouts = rollouts._replace(solving=None)
        rollouts = put_on_mesh(rollouts, s.mesh)
        old = reference = factors = None
        if programs.rescore is not None and s.rescore_old:
            old = programs.rescore(policy, rollouts)
        if programs.rescore is not None and s.reference is not None:
            reference = programs.rescore(s.reference, rollouts)
        ids = jnp.asarray(prompt_ids, jnp.int32)
        weighed = programs.weigh(rollouts, reference, ids, state.weights_state)
        if programs.token_weights is not None:
            factors = programs.token_weights(policy, weighed.rollouts)
        batch = Batch(
            weighed.rollouts,
            weighed.shaped_rewards,
            weighed.weights,
            old,
            reference,
            factors,
            weighed.added_rewards,
        )
        state = state._replace(weights_state=weighed.weights_state)
        return WeighedBatch(state, jax.block_until_ready(batch), weighed.metrics)

    def update(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """(new state, scalar metrics) after the updates of one batch [P, G, T], all or
        those before the objective's stop. The state given is donated.

        Metrics are those of the last update, but for the mismatch, of the first.
        """
        s, programs = self.settings, self._programs_of(batch.rollouts)
        if programs.push_history is not None:
            history, batch = programs.push_history(state.history, batch)
            state = state._replace(history=history)
        at = jax.tree.map(jnp.copy, state.params) if s.freeze_gradient_point else None
        metrics: dict[str, Any] = {}
        mismatch = None
        for i in range(s.updates):
            part = np.int32(i % s.parts)
            state, metrics = programs.update(state, batch, part, at, s.policy.frozen)
            if i == 0:  # later updates no longer have the parameters that sampled
                mismatch = metrics["mismatch/max_abs"]
            if s.objective.stop_deviation is not None and metrics["update/stopped"]:
                break
        metrics = metrics | {"mismatch/max_abs": mismatch}
        return jax.block_until_ready(state), metrics

    def compare_weights(self, state: TrainState, batch: Batch) -> Counterfactual:
        """What other prompt weights would do with the batch, on the host."""
        compare = self._programs_of(batch.rollouts).counterfactual
        if compare is None:
            raise ValueError(
                "UpdateSettings.with_counterfactual must be True, got False."
            )
        return gather_to_host(compare(self.settings.policy, state, batch))

    def _programs_of(self, rollouts: Rollouts) -> Programs:
        return self._programs[rollouts.completions.shape[-1]]
