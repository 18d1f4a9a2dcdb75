"""The step of a training loop: weighs scored rollouts and makes their updates.

    learner = gj.Learner("grpo", optax.adamw(1e-6))
    state = learner.init(policy)
    state, metrics = learner.step(state, rollouts)
    policy = learner.policy(state)

The trainer uses this object. Its programs are compiled for each shape of rollouts, so
shapes should be few.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax.diagnostics.counterfactual import Counterfactual
from grpo_jax.errors import ConfigError
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.loss import scale_weights
from grpo_jax.objectives.objective import Objective
from grpo_jax.parallel.memories import on_device, on_host
from grpo_jax.parallel.processes import gather_to_host
from grpo_jax.parallel.sharding import on_mesh, put_on_mesh, with_shardings
from grpo_jax.planning.resolve import check_reference_memory, check_updates
from grpo_jax.preconditioner import PromptWeights, whole_ids
from grpo_jax.rollouts.checks import check_rollouts
from grpo_jax.rollouts.micro_batches import TOKENS
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.objects import (
    as_objective,
    check_optimizer,
    check_policy,
    check_weights,
)
from grpo_jax.training.programs import (
    Programs,
    UpdateSettings,
    compile_programs,
    lower_programs,
)
from grpo_jax.training.state import Batch, TrainState, empty_history, init_state


class WeighedBatch(NamedTuple):
    """A batch ready for its updates."""

    state: TrainState  # its weights_state has seen these rewards
    batch: Batch
    metrics: dict[str, jax.Array]  # scalars of the rewards, on the device


class Learner:
    """Makes a first state, and from a state and rollouts the next one.

    Args:
        objective: An `Objective`, or a name of `OBJECTIVES`. Its drafts and refills are
            how rollouts are sampled, and left to the loop around.
        optimizer: Any optax optimizer; it sees the gradient of the loss, prompt weights
            applied.
        weights: The prompt weights, in place of the objective's own scale.
        reference: The policy that a KL term keeps near; by default the one of `init`.
        updates: Updates made of one rollout. From the second one on the ratio is to
            the policy that sampled, whose log-probs are computed again.
        temperature: Of sampling; it belongs to the policy.
        max_new_tokens: Tokens that a completion may have, where the objective divides
            by them or punishes long ones.
        eos_ids: Tokens that end a completion, where the objective leaves out those that
            were cut off.
        micro_batch_tokens: Tokens of a backward pass on a device; how a batch is split
            changes nothing but memory and rounding.
        reference_memory: "device", or "host": the reference lies in the memory of the
            devices' host, and on the devices only while it scores.
        skip_empty: Leave out updates whose gradient is 0 everywhere.
        with_counterfactual: Compile `compare_weights` too.
        with_solving: Use `Rollouts.solving` where it is there.
        mesh: Of `make_mesh`; None for a single device.

    Raises:
        ConfigError: an argument is of the wrong kind, or they do not go together.
    """

    def __init__(
        self,
        objective: Objective | str,
        optimizer: optax.GradientTransformation,
        *,
        weights: PromptWeights | None = None,
        reference: Policy | None = None,
        updates: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        eos_ids: int | Sequence[int] = (),
        micro_batch_tokens: int = TOKENS,
        reference_memory: str = "device",
        skip_empty: bool = True,
        with_counterfactual: bool = False,
        with_solving: bool = True,
        mesh: Mesh | None = None,
    ):
        objective = as_objective(objective)
        check_optimizer(optimizer)
        if weights is None:
            weights = scale_weights(objective)
        else:
            check_weights(weights)
            objective = dataclasses.replace(objective, scale="none")
        ends = (eos_ids,) if isinstance(eos_ids, int) else tuple(eos_ids)
        _check_needs(objective, max_new_tokens, ends)
        check_updates(objective, updates, None, "this objective")
        check_reference_memory(reference_memory, objective, lora=False)
        self._reference, self._reference_memory = reference, reference_memory
        self._settings: UpdateSettings | None = None
        self._programs: dict[Any, Programs] = {}
        # The policy is that of `init`.
        self._method: dict[str, Any] = dict(
            objective=objective,
            rule=weights,
            optimizer=optimizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=ends,
            updates=updates,
            micro_batch_tokens=micro_batch_tokens,
            with_counterfactual=with_counterfactual,
            with_solving=with_solving,
            skip_empty=skip_empty,
            mesh=mesh,
        )

    @property
    def settings(self) -> UpdateSettings:
        """What the programs are made from, the policy of `init` included.

        Raises:
            ConfigError: there is none yet.
        """
        if self._settings is None:
            raise ConfigError("a learner starts with `state = learner.init(policy)`.")
        return self._settings

    def init(
        self,
        policy: Policy,
        *,
        rollouts: Rollouts | None = None,
        donate: bool = False,
    ) -> TrainState:
        """The state before any update.

        A later `init` begins anew: states made before it are not this learner's.

        Args:
            policy: Its `params` are trained, its `frozen` ones (LoRA's base) are not.
            rollouts: [P, G, T] of the shapes to come, for an objective with a history.
            donate: Take the policy's parameters instead of a copy; it cannot be used
                afterwards.

        Raises:
            ConfigError: the policy does not go with the learner's arguments.
        """
        check_policy(policy)
        objective = self._method["objective"]
        if objective.history > 1 and rollouts is None:
            raise ConfigError(
                f"an objective with history {objective.history} keeps rollouts, of "
                "fixed shapes: give init(policy, rollouts=...), an example of them."
            )
        if rollouts is not None:
            _ = rollouts.scored_rewards  # raises where there are none
        lora = policy.frozen is not None
        check_reference_memory(self._reference_memory, objective, lora=lora)
        policy = put_on_mesh(policy, self._method["mesh"])
        kept = trained = policy.params
        is_reference = objective.kl_coef and self._reference is None
        if not donate:
            trained = jax.tree.map(jnp.copy, trained)
        elif is_reference and self._reference_memory == "device":
            kept = jax.tree.map(jnp.copy, kept)
        self._settings = UpdateSettings(
            policy=policy.replace(None),
            reference=self._reference_of(policy.replace(kept)),
            **self._method,
        )
        self._programs.clear()
        s = self._settings
        history = () if rollouts is None else empty_history(objective, rollouts)
        with on_mesh(s.mesh):
            state = init_state(trained, s.optimizer, s.rule, history)
            return put_on_mesh(state, s.mesh)

    def _reference_of(self, start: Policy) -> Policy | None:
        """The reference policy; None where the objective has no KL term."""
        if not self._method["objective"].kl_coef:
            return None
        given = start if self._reference is None else self._reference
        check_policy(given)
        if given.config != start.config:
            raise ConfigError(
                "reference must be a policy of the same config as the one of `init` "
                "(with LoRA: with factors too, as they are at the start), got another; "
                "leave it out for the policy of `init` itself."
            )
        given = put_on_mesh(given, self._method["mesh"])
        return on_host(given) if self._reference_memory == "host" else given

    def policy(self, state: TrainState) -> Policy:
        """The policy with a state's parameters; the next step donates them."""
        return self.settings.policy.replace(state.params)

    def step(
        self,
        state: TrainState,
        rollouts: Rollouts,
        *,
        prompt_ids: jax.Array | np.ndarray | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """(new state, scalar metrics) after the updates of one batch of rollouts.

        The state given is donated. Metrics are named as the fields of metrics.jsonl.

        Args:
            state: Of `init` or an earlier step.
            rollouts: [P, G, T] completions with log-probs of the policy that sampled
                them and rewards [P, G]. New shapes are compiled for.
            prompt_ids: [P], for prompt weights that remember prompts.

        Raises:
            ValueError: prompt_ids are no integers, or the rollouts have no rewards,
                wrong shapes, tokens outside the vocabulary, or log-probs that are none
                or not known.
        """
        s = self.settings
        check_rollouts(rollouts, s.policy.config.vocab_size)
        _ = rollouts.scored_rewards, rollouts.sampler_logprobs  # raise where missing
        if prompt_ids is None:
            if s.rule.by_prompt:
                raise ConfigError(
                    "these prompt weights remember each prompt: give step(..., "
                    "prompt_ids=ids), ids [P] from 0."
                )
            prompt_ids = np.arange(len(rollouts.prompts))
        ids = whole_ids(prompt_ids)
        if np.shape(ids) != (len(rollouts.prompts),):
            raise ConfigError(
                f"prompt_ids must be [P], one of each of {len(rollouts.prompts)} "
                f"prompts, got shape {np.shape(ids)}."
            )
        longest = int(rollouts.completion_mask.sum(-1).max())
        if s.max_new_tokens is not None and longest > s.max_new_tokens:
            raise ConfigError(
                f"completions have up to {longest} tokens, and this learner was made "
                f"with max_new_tokens={s.max_new_tokens}; raise it."
            )
        weighed = self.weigh(state, _of_own_types(rollouts), ids)
        state, metrics = self.update(weighed.state, weighed.batch)
        return state, weighed.metrics | metrics

    def compile(
        self,
        state: TrainState,
        shapes: Sequence[Rollouts],
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Compiles for rollouts [P, G, T] of some shapes ahead; less if `stopping`."""
        for rollouts in shapes:
            if stopping():
                return
            self._programs_for(state, rollouts)

    def lower(self, policy: Policy, rollouts: Rollouts, mesh: Mesh) -> Programs:
        """The programs of this learner as `jax.stages.Lowered`, for a policy and
        rollouts [P, G, T] that are shapes, and devices that need not be there.

        Args:
            policy: Abstract, with shardings.
            rollouts: Abstract, with shardings.
            mesh: Where everything lies: the learner's, or one of a single device.
        """
        s = UpdateSettings(
            policy=policy.replace(None),
            reference=policy if self._method["objective"].kl_coef else None,
            **self._method,
        )

        def start(params: Any) -> TrainState:
            history = empty_history(s.objective, rollouts)
            return init_state(params, s.optimizer, s.rule, history)

        with on_mesh(s.mesh):
            state = with_shardings(jax.eval_shape(start, policy.params), mesh)
            return lower_programs(s, state, rollouts)

    def weigh(
        self,
        state: TrainState,
        rollouts: Rollouts,
        prompt_ids: jax.Array | np.ndarray,
    ) -> WeighedBatch:
        """Prompt weights of scored rollouts, and the other constants of their updates.

        Args:
            state: Before the updates.
            rollouts: [P, G, T] with rewards.
            prompt_ids: [P] indices of the prompts among the trained ones.
        """
        s = self.settings
        if not s.with_solving:
            rollouts = rollouts._replace(solving=None)
        with on_mesh(s.mesh):
            rollouts = put_on_mesh(rollouts, s.mesh)
            programs = self._programs_for(state, rollouts)
            policy = s.policy.replace(state.params)
            old = reference = factors = None
            if programs.rescore is not None and s.rescore_old:
                old = programs.rescore(policy, rollouts)
            if programs.rescore is not None and s.reference is not None:
                reference = programs.rescore(on_device(s.reference), rollouts)
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
        mismatch: dict[str, Any] = {}
        for i in range(s.updates):
            part = np.int32(i % s.parts)
            state, metrics = programs.update(state, batch, part, at, s.policy.frozen)
            if i == 0:  # later updates no longer have the parameters that sampled
                names = ("mismatch/max_abs", "mismatch/mean_abs")
                mismatch = {name: metrics[name] for name in names}
            if s.objective.stop_deviation is not None and metrics["update/stopped"]:
                break
        return jax.block_until_ready(state), metrics | mismatch

    def compare_weights(self, state: TrainState, batch: Batch) -> Counterfactual:
        """What other prompt weights would do with the batch, on the host."""
        compare = self._programs_of(batch.rollouts).counterfactual
        if compare is None:
            raise ConfigError("Learner needs with_counterfactual=True for this.")
        return gather_to_host(compare(self.settings.policy, state, batch))

    def _programs_of(self, rollouts: Rollouts) -> Programs:
        return self._programs[_shapes(rollouts)]

    def _programs_for(self, state: TrainState, rollouts: Rollouts) -> Programs:
        """The programs for rollouts, compiled where they are new."""
        key, s = _shapes(rollouts), self.settings
        if key not in self._programs:
            prompts = len(rollouts.prompts)
            check_updates(s.objective, s.updates, prompts, "this objective")
            with on_mesh(s.mesh):
                self._programs[key] = compile_programs(s, state, rollouts)
        return self._programs[key]


def _shapes(rollouts: Rollouts) -> tuple:
    """What programs of rollouts depend on: shapes, and which fields are there."""
    return jax.tree.structure(rollouts), *(x.shape for x in jax.tree.leaves(rollouts))


def _of_own_types(rollouts: Rollouts) -> Rollouts:
    """The rollouts with the dtypes that `Rollouts` states, whatever they came in:
    rewards that are bool or int, say."""
    whole = ("prompts", "prompt_mask", "completions", "completion_mask")
    changed: dict[str, Any] = {
        name: x.astype(jnp.int32 if name in whole else jnp.float32)
        for name, x in rollouts._asdict().items()
        if x is not None
    }
    return rollouts._replace(**changed)


def _check_needs(
    objective: Objective, max_new_tokens: int | None, ends: Sequence[int]
) -> None:
    """ConfigError where the objective reads what was not given."""
    if max_new_tokens is None and (
        objective.aggregation == "constant" or objective.overlong == "punish"
    ):
        raise ConfigError(
            "this objective measures completions by the most tokens that they may have "
            f"({objective.formula()}): give Learner(..., max_new_tokens=T)."
        )
    if not ends and objective.overlong == "mask":
        raise ConfigError(
            "this objective leaves out completions that were cut off: give "
            "Learner(..., eos_ids=ids), the tokens that end one."
        )
