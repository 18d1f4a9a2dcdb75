"""The update: a pure function of state and rollouts, jitted once.

One `jax.vjp` of the [P] losses per micro-batch, pulled back through the prompt weights:
the cotangent form of the preconditioner. Group statistics, denominators and weights are
those of the whole batch, so how it is split changes no gradient.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.advantages import group_statistics, group_std, overlong_punishment
from grpo_jax.models.decoder import Policy, completion_hidden, teacher_forced
from grpo_jax.models.sharding import (
    batch_shards,
    constrain,
    constrain_params,
)
from grpo_jax.objectives.aggregation import token_coefficients
from grpo_jax.objectives.loss import (
    baselined,
    needs_entropy,
    present_mask,
    prompt_terms,
    shaped_rewards,
)
from grpo_jax.objectives.presets import Objective
from grpo_jax.objectives.token_weights import (
    conflict_weights,
    nthr_weights,
    overlong_weights,
    truncated_importance_weights,
)
from grpo_jax.preconditioner import PromptWeights, apply_weights
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training.config import OptimizerConfig

# Of rewards on the host: one small program, compiled in a run's first step.
compiled_statistics = jax.jit(group_statistics)


def group_means(rewards: Any) -> np.ndarray:
    """[P] mean reward of each group [P, G], on the host; NaN for one without any."""
    statistics = jax.device_get(compiled_statistics(rewards))
    return np.where(statistics.count > 0, statistics.mean, np.nan)


class TrainState(NamedTuple):
    """All that an update changes; checkpointed whole."""

    params: Any  # float32
    opt_state: Any
    weights_state: Any  # of the prompt weights
    history: Any  # `History`; () where an update sees the newest rollouts alone
    updates: jax.Array  # int32, optimizer updates applied
    skipped: jax.Array  # int32, updates skipped for a non-finite gradient
    skipped_in_a_row: jax.Array  # int32, of these, since the last applied one


class Batch(NamedTuple):
    """Scored rollouts, and what the objective needs beside them."""

    rollouts: Rollouts
    old_logprobs: jax.Array | None  # [P, G, T] before the first of several updates
    reference_logprobs: jax.Array | None  # [P, G, T] of the starting policy
    weights: jax.Array  # [P], of the prompts
    token_weights: jax.Array | None = None  # [P, G, T]


class History(NamedTuple):
    """Rollouts of past iterates, newest first, with the weights they had."""

    rollouts: Rollouts  # leaves [n, P, ...]
    weights: jax.Array  # [n, P]
    valid: jax.Array  # [n] bool: the iterate exists


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """How a batch is split: `prompts` x `samples` at a time, divisors of P and G.

    `shards` are the parts that P and G are cut into over devices: every part of the
    batch holds the same share of each.
    """

    prompts: int
    samples: int
    shards: tuple[int, int] = (1, 1)

    @property
    def on_device(self) -> tuple[int, int]:
        """Prompts and samples of one part that one device works on."""
        return self.prompts // self.shards[0], self.samples // self.shards[1]


def micro_batch(
    num_prompts: int,
    group_size: int,
    prompt_tokens: int,
    max_tokens: int,
    budget: int,
    shards: tuple[int, int] | None = None,
) -> MicroBatch:
    """The largest split into equal parts of at most `budget` tokens (at least 1 x 1).

    A part of p prompts and g samples holds p * (prompt_tokens + g * max_tokens) tokens.
    Whole groups are preferred: their prompt is encoded once.

    Args:
        budget: Tokens on one device.
        shards: What P and G are cut into over devices; None: by the mesh that is set.
    """
    shards = batch_shards(num_prompts, group_size) if shards is None else shards
    num_prompts, group_size = num_prompts // shards[0], group_size // shards[1]

    def fits(p, g):
        return p * (prompt_tokens + g * max_tokens) <= budget

    def of(p, g):
        return MicroBatch(p * shards[0], g * shards[1], shards)

    for p in _divisors(num_prompts):
        if fits(p, group_size):
            return of(p, group_size)
    for g in _divisors(group_size):
        if fits(1, g):
            return of(1, g)
    return of(1, 1)


def _divisors(n):
    """Of n, the largest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)


def split_batch(tree: Any, micro: MicroBatch, group_axis: bool) -> Any:
    """Leaves [P, ...] or [P, G, ...] to [parts, p, ...] or [parts, p, g, ...]."""

    def split(x):
        x = _cut(x, 0, micro.prompts, micro.shards[0])  # [parts, p, ...]
        if not group_axis:
            return constrain(x, None, "prompts")
        x = _cut(x, 2, micro.samples, micro.shards[1])  # [parts, p, parts, g, ...]
        p, g = x.shape[0], x.shape[2]
        x = x.swapaxes(1, 2).reshape(p * g, *x.shape[1:2], *x.shape[3:])
        return constrain(x, None, "prompts", "samples")

    return jax.tree.map(split, tree)


def _cut(x, axis, size, shards):
    """An axis as [parts, size]: of each of its `shards`, every part has as much."""
    before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if shards == 1:
        return x.reshape(*before, n // size, size, *after)
    x = x.reshape(*before, shards, n // size, size // shards, *after)
    return x.swapaxes(axis, axis + 1).reshape(*before, n // size, size, *after)


def _joined(x, axis, shards):
    """The inverse of `_cut`: axes [parts, size] as one."""
    before, (parts, size), after = (
        x.shape[:axis],
        x.shape[axis:][:2],
        x.shape[axis:][2:],
    )
    if shards > 1:
        x = x.reshape(*before, parts, shards, size // shards, *after)
        x = x.swapaxes(axis, axis + 1)
    return x.reshape(*before, parts * size, *after)


def repeat_parts(tree: Any, times: int) -> Any:
    """Prompt-wise leaves [parts, p, ...] once per split of their groups."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def batch_logprobs(
    policy: Policy,
    rollouts: Rollouts,
    temperature: float,
    micro: MicroBatch,
    with_entropy: bool = False,
):
    """[P, G, T] log-probs of the completions, micro-batch by micro-batch; with
    `with_entropy` a pair, the second the entropy at each token."""
    _, g, t = rollouts.completions.shape
    times = g // micro.samples
    prompts = split_batch((rollouts.prompts, rollouts.prompt_mask), micro, False)
    parts = (
        repeat_parts(prompts, times),
        split_batch(rollouts.completions, micro, True),
    )

    def part(x):
        (prompts, prompt_mask), completions = x
        return teacher_forced(
            policy, prompts, prompt_mask, completions, temperature, with_entropy
        )

    def whole(x):  # [parts, p, g, T]
        x = x.reshape(-1, times, micro.prompts, micro.samples, t)
        x = _joined(x.swapaxes(1, 2), 2, micro.shards[1])
        x = constrain(_joined(x, 0, micro.shards[0]), "prompts", "samples")
        return jnp.where(rollouts.completion_mask.astype(bool), x, 0.0)

    return jax.tree.map(whole, jax.lax.map(part, parts))


def has_token_weights(objective: Objective) -> bool:
    """Whether `token_weights` makes any for the objective."""
    return objective.token_weight != "none" or objective.overlong == "mask"


def token_weights(
    objective: Objective,
    policy: Policy,
    rollouts: Rollouts,
    *,
    temperature: float,
    eos_id: int | Sequence[int],
) -> jax.Array:
    """[P, G, T]: the product of the factors that the objective asks for."""
    mask = present_mask(rollouts.completion_mask, rollouts.rewards)
    weights = jnp.ones_like(mask)
    if objective.token_weight == "conflict":
        signs = baselined(objective, rollouts.rewards)
        weights *= conflict_weights(rollouts.completions, signs, mask)
    if objective.token_weight == "nthr":

        def one_prompt(x):
            prompt, prompt_mask, completions, rewards, mask = (y[None] for y in x)
            model = policy.module()
            hidden = completion_hidden(model, prompt, prompt_mask, completions)
            return nthr_weights(
                hidden,
                model.unembedding_matrix(),
                completions,
                rewards,
                mask,
                temperature=temperature,
                softcap=policy.config.logit_softcap,
            )[0]

        groups = (
            rollouts.prompts,
            rollouts.prompt_mask,
            rollouts.completions,
            rollouts.rewards,
            mask,
        )
        weights *= jax.lax.map(one_prompt, groups)
    if objective.overlong == "mask":
        weights *= overlong_weights(rollouts.completions, mask, eos_id)
    return weights


def weigh(
    objective: Objective,
    rule: PromptWeights,
    rollouts: Rollouts,
    reference_logprobs: jax.Array | None,
    prompt_ids: jax.Array,
    state: Any,
    *,
    max_length: int,
) -> tuple[Rollouts, jax.Array, Any, dict[str, jax.Array]]:
    """(rollouts to train on, weights [P], the rule's new state, metrics).

    Once per rollouts, however many updates are made from them. The metrics are of the
    rewards as scored; what is trained on may have been punished for its length.
    """
    trained = rollouts
    if objective.overlong == "punish":
        cache = max(1, round(objective.overlong_share * max_length))
        lengths = rollouts.completion_mask.sum(-1)
        punished = rollouts.rewards + overlong_punishment(lengths, max_length, cache)
        trained = rollouts._replace(rewards=punished.astype(rollouts.rewards.dtype))
    rewards = shaped_rewards(
        objective,
        trained.rewards,
        rollouts.behaviour_logprobs,
        reference_logprobs,
        present_mask(rollouts.completion_mask, rollouts.rewards),
    )
    weights, state = apply_weights(rule, rewards, state, prompt_ids)
    return trained, weights, state, group_metrics(rollouts, weights)


def empty_history(objective: Objective, rollouts: Rollouts) -> Any:
    """A `History` of the iterates that an objective looks back on, none there yet.

    Args:
        rollouts: Of the shapes to come; only shapes and dtypes are read.
    """
    n = objective.history - 1
    if not n:
        return ()
    stacked = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), rollouts)
    weights = jnp.zeros((n, rollouts.prompts.shape[0]), stacked.rewards.dtype)
    return History(stacked, weights, jnp.zeros(n, bool))


def with_history(history: History, batch: Batch) -> tuple[History, Batch]:
    """(history with the batch in it, batch of all iterates' rollouts, newest first).

    Each sample keeps the log-probs of the policy that sampled it. Until enough iterates
    exist, the newest stands in the empty places.
    """
    newest = (batch.rollouts, batch.weights)

    def place(old, new):
        valid = history.valid.reshape(-1, *[1] * new.ndim)
        filled = jnp.where(valid, old, new[None])
        return jnp.concatenate([new[None], filled]).reshape(-1, *new.shape[1:])

    def shift(old, new):
        return jnp.concatenate([new[None], old])[:-1]

    past = (history.rollouts, history.weights)
    rollouts, weights = jax.tree.map(place, past, newest)
    past = jax.tree.map(shift, past, newest)
    history = History(*past, shift(history.valid, jnp.asarray(True)))
    return history, Batch(rollouts, rollouts.behaviour_logprobs, None, weights)


def part_of(batch: Batch, index: jax.Array | int, parts: int) -> Batch:
    """The index-th of equal parts of a batch's prompts."""
    size = batch.weights.shape[0] // parts
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), batch
    )


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate over optimizer updates: linear warm-up, then the named decay."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = max(1, total_updates - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay),
    }[config.schedule]()
    if not warmup:
        return after
    # The first update moves already: rate peak / warmup, not 0.
    rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW; decay on matrices only (not norms, not biases)."""
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


DECAYED = ("kernel", "embedding", "unembedding", "lora_a", "lora_b")


def _decayed(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in DECAYED, params
    )


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    weights: PromptWeights,
    history: Any = (),
) -> TrainState:
    # Three arrays, not one thrice: a donated buffer may be given away only once.
    zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
    opt_state = optimizer.init(params)
    return TrainState(params, opt_state, weights.init(), history, *zeros)


def make_gradients(
    objective: Objective,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int,
):
    """gradients(policy, batch) -> (grads, metrics): the loss's, under batch.weights,
    by policy.params.

    On policy (batch.old_logprobs is None) the behaviour policy is the current one:
    `stop_gradient(logprobs)` stands for it and the ratio is exactly 1. The sampler's
    own log-probs serve the mismatch metric, and KL where it is in the reward.
    """
    wants_entropy = needs_entropy(objective)

    def gradients(policy, batch):
        params = policy.params
        rollouts, weights = batch.rollouts, batch.weights
        mask = present_mask(rollouts.completion_mask, rollouts.rewards)
        rewards = shaped_rewards(
            objective,
            rollouts.rewards,
            rollouts.behaviour_logprobs,
            batch.reference_logprobs,
            mask,
        )
        per_sample = {
            "completions": rollouts.completions,
            "sampled_logprobs": rollouts.behaviour_logprobs,
            "old_logprobs": batch.old_logprobs,
            "reference_logprobs": batch.reference_logprobs,
            "token_weights": batch.token_weights,
            "advantages": baselined(objective, rewards),
            "coefficients": token_coefficients(
                objective.aggregation, mask, max_length, objective.first_token_weight
            ),
            "token_shares": mask / jnp.maximum(mask.sum(), 1),
            # The first iterate's; of older ones the policy that sampled is gone.
            "newest": rollouts.completion_mask.astype(bool)
            & (jnp.arange(len(weights)) < len(weights) // objective.history)[
                :, None, None
            ],
        }
        per_prompt = {
            "prompts": rollouts.prompts,
            "prompt_mask": rollouts.prompt_mask,
            "cotangent": (
                weights / weights.size,
                jnp.full_like(weights, 1 / weights.size),
            ),
        }
        parts = repeat_parts(
            split_batch(per_prompt, micro, False),
            rollouts.completions.shape[1] // micro.samples,
        ) | split_batch(per_sample, micro, True)

        def add_part(total, part):
            result = _part_gradients(params, part)
            return jax.tree.map(jnp.add, total, result[:2]), result[2]

        def _part_gradients(params, part):
            def losses(params):
                logprobs = teacher_forced(
                    policy.replace(params),
                    part["prompts"],
                    part["prompt_mask"],
                    part["completions"],
                    temperature,
                    entropy=wants_entropy,
                )
                logprobs, entropy = logprobs if wants_entropy else (logprobs, None)
                old, sampled = part["old_logprobs"], part["sampled_logprobs"]
                before = logprobs if old is None else old
                factors = (
                    [part["token_weights"]] if batch.token_weights is not None else []
                )
                if objective.tis_cap is not None:
                    factors.append(
                        truncated_importance_weights(before, sampled, objective.tis_cap)
                    )
                surrogate, penalty, metrics = prompt_terms(
                    objective,
                    logprobs=logprobs,
                    behaviour_logprobs=before,
                    advantages=part["advantages"],
                    coefficients=part["coefficients"],
                    token_shares=part["token_shares"],
                    reference_logprobs=part["reference_logprobs"],
                    entropy=entropy,
                    token_weights=factors,
                )
                shares, live = part["token_shares"], part["token_shares"] > 0
                metrics["entropy/sampled"] = -(
                    shares * jnp.where(live, logprobs, 0)
                ).sum()
                now = logprobs if objective.history > 1 else before
                gap = jnp.where(part["newest"], now - sampled, 0)
                metrics["loss/policy"] = part["cotangent"][0] @ surrogate
                metrics["loss/penalty"] = part["cotangent"][1] @ penalty
                return (surrogate, penalty), (metrics, jnp.abs(gap).max())

            _, pull_back, (metrics, gap) = jax.vjp(losses, params, has_aux=True)
            (grads,) = pull_back(part["cotangent"])
            grads = constrain_params(grads)
            return grads, jax.lax.stop_gradient(metrics), gap

        first = jax.tree.map(lambda x: x[0], parts)
        if micro.prompts == rollouts.prompts.shape[0] and (
            micro.samples == rollouts.completions.shape[1]
        ):
            grads, metrics, gaps = _part_gradients(params, first)
        else:
            shapes = jax.eval_shape(_part_gradients, params, first)[:2]
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), gaps = jax.lax.scan(add_part, zeros, parts)
        metrics["mismatch/max_abs"] = gaps.max()
        return grads, metrics

    return gradients


def make_train_step(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    micro: MicroBatch,
    temperature: float,
    max_length: int,
):
    """train_step(state, batch, at=None, frozen=None) -> (state, metrics), pure; jit it
    with donated state.

    `policy` is a template without parameters. `frozen` ones are an argument of the
    step: closed over, they would be constants of the program. The gradient is taken at
    the parameters `at`, by default the state's own: without an importance ratio, all
    updates of one rollout take it where that was sampled.

    An update that is not finite changes nothing but the counts of skipped ones; nor
    does one after the objective's `stop_deviation` was passed.
    """
    gradients = make_gradients(
        objective, micro=micro, temperature=temperature, max_length=max_length
    )

    def train_step(state: TrainState, batch: Batch, at: Any = None, frozen: Any = None):
        params = state.params if at is None else at
        current = dataclasses.replace(policy, params=params, frozen=frozen)
        grads, metrics = gradients(current, batch)
        norm = optax.tree.norm(grads)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        change_norm = optax.tree.norm(changes)
        finite = jnp.isfinite(norm) & jnp.isfinite(change_norm)
        applied = finite
        if objective.stop_deviation is not None:
            stopped = metrics["ratio/deviation"] > objective.stop_deviation
            applied = finite & ~stopped
            metrics["update/stopped"] = stopped.astype(jnp.int32)
        params = optax.apply_updates(state.params, changes)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        params, opt_state = constrain_params((params, opt_state))
        state = state._replace(
            params=params,
            opt_state=opt_state,
            updates=state.updates + applied,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "gradient/norm": norm,
            "update/norm": jnp.where(applied, change_norm, 0.0),
            "update/applied": state.updates,
            "update/skipped": state.skipped,
            "update/skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step


def group_metrics(rollouts: Rollouts, weights: jax.Array) -> dict[str, jax.Array]:
    """What the rewards of a batch look like, group by group."""
    statistics = group_statistics(rollouts.rewards)
    std, tied = group_std(rollouts.rewards)
    present = statistics.present.sum()
    total = (statistics.mean * statistics.count).sum()
    lengths = rollouts.completion_mask.sum(-1)
    informative = ~tied
    return {
        "reward/mean": total / jnp.maximum(present, 1),
        "reward/missing": statistics.present.size - present,
        "group/informative": informative.mean(),
        "group/std_mean": std.mean(),
        "weights/mean": weights.mean(),
        "weights/max": weights.max(),
        "completion/length_mean": lengths.mean(),
        "tokens/completion": lengths.sum(),
    }
