"""The parts of a run, made from its context and the policy that it starts from."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax.instrument.live import Instrument
from grpo_jax.instrument.prompts import ProbePrompts
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.loss import needs_entropy
from grpo_jax.objectives.objective import Objective
from grpo_jax.parallel.processes import gather_to_host
from grpo_jax.planning.optimizer import make_optimizer, make_schedule
from grpo_jax.planning.plan import Plan
from grpo_jax.rollouts.checks import check_sampled
from grpo_jax.rollouts.encoding import answer_rollouts
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.rollouts.sampling import sample
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.objects import check_optimizer, made
from grpo_jax.training.collector import Collector
from grpo_jax.training.context import RunContext
from grpo_jax.training.learner import Learner
from grpo_jax.training.pass_rates import PassRates
from grpo_jax.training.programs import rollout_shapes
from grpo_jax.training.prompts import SampleFn, TrainedPrompts
from grpo_jax.training.saving import SamplerFailedError


class Parts(NamedTuple):
    """What a run, or the replay of a step, works with."""

    prompts: TrainedPrompts
    collector: Collector
    learner: Learner
    shapes: list[Rollouts]  # of the update, abstract, longest last
    pass_rates: PassRates
    schedule: optax.Schedule | None  # None: the user's own optimizer has one
    picked: np.ndarray  # all trained prompts in the order that fixed sets take


def make_parts(context: RunContext, start: Policy) -> Parts:
    """The parts of a run that starts from `start`; they keep none of its parameters,
    but for a copy where the objective has a reference policy."""
    config, plan, task = context.config, context.plan, context.plan.task
    policy = start.replace(None)  # parameters are in the train state alone
    own = plan.given.sampler
    sampler = partial(
        sample if own is None else _checked(own, policy.config.vocab_size),
        max_new_tokens=plan.max_new_tokens,
        temperature=config.sampling.temperature,
        eos_id=task.ends,
        pad_id=task.tokenizer.pad_token_id,
    )
    prompts = TrainedPrompts(
        task,
        plan.prompts,
        plan.prompt_length,
        sampler,
        policy,
        context.pool,
        context.processes,
    )
    picked = plan.evaluated.picked
    objective = _settled_objective(context, start, prompts, picked)
    config, plan = context.config, context.plan
    optimizer, schedule = make_optimizer_of(config, plan)
    return Parts(
        prompts,
        _make_collector(context, prompts, objective),
        make_learner(config, plan, objective, optimizer, context.mesh),
        shapes_of_rollouts(config, plan, objective, context.mesh),
        _make_pass_rates(context, policy, sampler),
        schedule,
        picked,
    )


def _checked(sampler: Callable[..., Rollouts], vocab_size: int) -> SampleFn:
    """The user's sampler, with what it returns checked; whatever is wrong is a
    SamplerFailedError."""

    def checked(policy: Policy, prompts: Any, mask: Any, **how: Any) -> Rollouts:
        try:
            rollouts = sampler(policy, prompts, mask, **how)
            check_sampled(
                rollouts,
                prompts,
                group_size=how["group_size"],
                max_new_tokens=how["max_new_tokens"],
                vocab_size=vocab_size,
            )
        except Exception as error:
            raise SamplerFailedError(
                f"the sampler failed: {type(error).__name__}: {error}"
            ) from error
        return rollouts

    return checked


def make_optimizer_of(
    config: TrainConfig, plan: Plan
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """A run's optimizer, and its learning rate's schedule where the config has it."""
    own = plan.given.optimizer
    if own is not None and not callable(own):
        return own, None
    updates = config.steps * config.updates_per_rollout
    schedule = make_schedule(config.optimizer, updates)
    if own is None:
        return make_optimizer(config.optimizer, schedule), schedule
    optimizer = made(
        own, optax.GradientTransformation, check_optimizer, schedule=schedule
    )
    return optimizer, schedule


def _make_collector(
    context: RunContext, prompts: TrainedPrompts, objective: Objective
) -> Collector:
    config, plan = context.config, context.plan
    return Collector(
        prompts,
        objective,
        num_prompts=config.batch.prompts,
        group_size=config.batch.group_size,
        draft_template=plan.refine,
        train_prompt_tokens=plan.train_prompt_length,
        buckets=plan.buckets,
        seed=config.seed,
        keys=context.keys,
        counts_failures=context.pool is not None,
    )


def make_learner(
    config: TrainConfig,
    plan: Plan,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
) -> Learner:
    """A run's learner; on a single device where `mesh` is None."""
    named = config.weights.name != "objective"
    return Learner(
        objective,
        optimizer,
        weights=plan.weights if named else None,
        updates=config.updates_per_rollout,
        temperature=config.sampling.temperature,
        max_new_tokens=plan.max_new_tokens,
        eos_ids=tuple(plan.task.ends),
        micro_batch_tokens=plan.micro_batch_tokens,
        reference_memory=config.reference_memory,
        skip_empty=config.optimizer.skip_empty,
        with_counterfactual=config.instrument.counterfactual_every > 0,
        with_solving=_needs_solving(config, plan, objective),
        mesh=mesh,
    )


def shapes_of_rollouts(
    config: TrainConfig, plan: Plan, objective: Objective, mesh: Mesh | None
) -> list[Rollouts]:
    """The abstract rollouts [P, G, T] of a run's updates, of each bucket's T."""
    return [
        rollout_shapes(
            *config.batch,
            plan.train_prompt_length,
            tokens,
            with_solving=_needs_solving(config, plan, objective),
            mesh=mesh,
        )
        for tokens in plan.buckets
    ]


def _needs_solving(config: TrainConfig, plan: Plan, objective: Objective) -> bool:
    """Whether a rule for pass rates meets rewards that are none."""
    compares = config.instrument.counterfactual_every > 0
    changed = plan.task.graded or objective.overlong == "punish"
    return changed and (plan.weights.pass_rates or compares)


def _make_pass_rates(
    context: RunContext, policy: Policy, sampler: SampleFn
) -> PassRates:
    config, plan = context.config, context.plan
    return PassRates(
        plan.task,
        *plan.evaluated.examples(plan.task),
        policy,
        sampler,
        context.keys.evaluation,
        samples=config.evaluation.samples,
        rows=math.prod(config.batch),  # as many as a step samples
        prompt_tokens=plan.prompt_length,
        max_new_tokens=plan.max_new_tokens,
        temperature=config.sampling.temperature,
        micro_batch_tokens=plan.micro_batch_tokens,
        pool=context.pool,
        processes=context.processes,
        warn=context.console.warn,
    )


def make_instrument(
    context: RunContext, parts: Parts, earlier: Sequence[dict[str, Any]]
) -> Instrument | None:
    """The run's instrument; None where it is off.

    Args:
        context: The run.
        parts: Its parts.
        earlier: Rows of instrument.jsonl before this start.
    """
    config, plan, probe = context.config, context.plan, context.plan.probe
    if probe is None:
        return None
    indices = parts.picked[: probe.prompts]
    answers = None
    if plan.task.single_answer:
        examples = [plan.task.train[i] for i in indices]
        answers = answer_rollouts(
            plan.task, examples, plan.prompt_length, plan.max_new_tokens
        )
    probe_prompts = ProbePrompts(
        parts.prompts,
        indices,
        group_size=probe.group_size,
        step_samples=math.prod(config.batch),
        warn=context.console.warn,
    )
    sigmas = [row["phase"]["mean_sigma"] for row in earlier]
    return Instrument(
        probe,
        parts.learner.settings.policy,
        probe_prompts,
        answers,
        prompts=indices,
        temperature=config.sampling.temperature,
        prompt_tokens=plan.prompt_length,
        max_new_tokens=plan.max_new_tokens,
        micro_batch_tokens=plan.micro_batch_tokens,
        key=context.keys.probe,
        sigma_history=[float("nan") if x is None else x for x in sigmas],
    )


def _settled_objective(
    context: RunContext, start: Policy, prompts: TrainedPrompts, picked: np.ndarray
) -> Objective:
    """The plan's objective, without an entropy limit that the start already exceeds."""
    objective = context.plan.objective
    if not needs_entropy(objective) or objective.entropy_limit is None:
        return objective
    config = context.config
    first = picked[: config.batch.prompts]
    group = prompts.sample(start.params, first, context.keys.evaluation, 1)
    _, entropy = batch_logprobs(
        start, group, config.sampling.temperature, MicroBatch(1, 1), with_entropy=True
    )
    entropy, mask = gather_to_host((entropy, group.completion_mask))
    mean = float(entropy[mask > 0].mean())
    if mean <= objective.entropy_limit:
        return objective
    context.console.say(
        f"the mean entropy at the start is {mean:.3f} nats, above the limit of "
        f"{objective.entropy_limit:.3f}: completions are not filtered by entropy"
    )
    return dataclasses.replace(objective, entropy_limit=None)
