import dataclasses
import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import (
    OBJECTIVES,
    ModelConfig,
    Rollouts,
    centred_advantages,
    completion_logprobs,
    init_policy,
    posterior_weights,
)
from grpo_jax.planning.optimizer import make_optimizer, make_schedule
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import (
    MicroBatch,
    micro_batch,
    repeat_parts,
    split_batch,
)
from grpo_jax.runs.config import OptimizerConfig
from grpo_jax.runs.fields import FIELDS
from grpo_jax.training.loop import effect_of_ties
from grpo_jax.training.state import Batch, empty_history, part_of, push_history
from grpo_jax.training.step import make_train_step
from grpo_jax.training.weighing import group_metrics, weigh
from tests.helpers import random_rollouts, tiny_policy, train_step, weighed

P, G, T = 4, 6, 3
SPLITS = [(4, 6), (2, 6), (1, 6), (2, 3), (4, 1), (1, 2), (1, 1)]
NAN = float("nan")
REINFORCE = OBJECTIVES["reinforce"]


# A part of p prompts and g samples holds p * (10 + g * 20) tokens.
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (10_000, (4, 6)),
        (4 * 130, (4, 6)),
        (4 * 130 - 1, (2, 6)),
        (130, (1, 6)),
        (129, (1, 3)),
        (70, (1, 3)),
        (69, (1, 2)),
        (49, (1, 1)),
        (1, (1, 1)),
    ],
)
def test_micro_batch_golden(budget, expected):
    assert micro_batch(4, 6, 10, 20, budget) == MicroBatch(*expected)


def test_micro_batch_is_the_largest_that_fits():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p, g, prompt, tokens = (int(n) for n in rng.integers(1, 25, 4))
        budget = int(rng.integers(1, 8000))
        micro = micro_batch(p, g, prompt, tokens, budget)
        assert p % micro.prompts == 0 and g % micro.samples == 0
        assert micro.samples == g or micro.prompts == 1
        sizes = [
            (a * (prompt + b * tokens), MicroBatch(a, b))
            for a, b in itertools.product(range(1, p + 1), range(1, g + 1))
            if p % a == 0 and g % b == 0 and (b == g or a == 1)
        ]
        fitting = [pair[1] for pair in sizes if pair[0] <= budget]
        largest = max(fitting, key=lambda m: m.prompts * m.samples, default=None)
        assert micro == (largest or MicroBatch(1, 1))


@pytest.mark.parametrize("micro", SPLITS)
def test_parts_hold_every_sample_beside_its_prompt(micro):
    micro = MicroBatch(*micro)
    prompts, samples = np.indices((P, G))
    parts = jax.jit(lambda x: split_batch(x, micro, True))((prompts, samples))
    rows = split_batch(np.arange(P), micro, False)
    rows = repeat_parts(rows, G // micro.samples)
    chex.assert_shape(parts, (len(rows), micro.prompts, micro.samples))
    expected = np.broadcast_to(np.asarray(rows)[..., None], parts[0].shape)
    np.testing.assert_array_equal(parts[0], expected)
    pairs = set(zip(*(np.asarray(x).ravel().tolist() for x in parts), strict=True))
    assert pairs == set(itertools.product(range(P), range(G)))


def test_split_keeps_trailing_axes():
    x = np.arange(P * G * T).reshape(P, G, T)
    parts = split_batch({"x": x}, MicroBatch(1, 2), True)["x"]
    chex.assert_shape(parts, (P * G // 2, 1, 2, T))
    np.testing.assert_array_equal(parts[4, 0, 1], x[1, 3])


@pytest.fixture(scope="module")
def policy():
    config = ModelConfig(
        vocab_size=9, num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1,
        head_dim=4, remat="none",
    )  # fmt: skip
    return init_policy(config, jax.random.key(0))


def rollouts(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (P, G, 1))
    return Rollouts(
        prompts=rng.integers(0, 9, (P, 2)).astype(np.int32),
        prompt_mask=np.ones((P, 2), np.int32),
        completions=rng.integers(0, 9, (P, G, T)).astype(np.int32),
        completion_mask=(np.arange(T) < lengths).astype(np.int32),
        behaviour_logprobs=np.zeros((P, G, T), np.float32),
        rewards=rng.integers(0, 2, (P, G)).astype(np.float32),
    )


@pytest.mark.parametrize("micro", [(2, 6), (1, 3)])
def test_batch_logprobs_are_the_same_in_any_split(policy, micro):
    expected = jax.jit(completion_logprobs)(policy, rollouts(), temperature=2.0)
    parts = jax.jit(batch_logprobs, static_argnums=3)
    actual = parts(policy, rollouts(), 2.0, MicroBatch(*micro))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_logits_are_capped_as_the_samplers():
    policy = tiny_policy(logit_softcap=0.5)
    rollouts = random_rollouts(policy, num_prompts=2, group_size=2)
    logprobs = jax.jit(batch_logprobs, static_argnums=3)
    actual = logprobs(policy, rollouts, 1.0, MicroBatch(1, 2))
    np.testing.assert_allclose(actual, rollouts.behaviour_logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def stepper(policy):
    """(train_step, a fresh state) of plain reinforce under sgd at rate 1."""
    step, init = train_step(policy, REINFORCE, MicroBatch(P, G), optax.sgd(1.0), T)
    return jax.jit(step), init(policy.params)


def test_an_update_counts_and_reports(stepper):
    step, before = stepper
    after, metrics = step(before, weighed(REINFORCE, rollouts()))
    assert (after.updates, after.skipped_in_a_row) == (1, 0)
    assert set(metrics) <= set(FIELDS)
    chex.assert_rank(list(metrics.values()), 0)
    chex.assert_tree_all_finite((after, metrics))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    change = jax.tree.map(jnp.subtract, after.params, before.params)
    np.testing.assert_allclose(metrics["update/norm"], optax.tree.norm(change), 1e-4)
    # sgd at rate 1 moves by the gradient.
    np.testing.assert_allclose(metrics["update/norm"], metrics["gradient/norm"], 1e-6)
    assert metrics["gradient/norm"] > 1e-3
    # Gradient times change is minus the squared norm; coefficients are the mask over G.
    batch = weighed(REINFORCE, rollouts())
    advantages = centred_advantages(batch.rollouts.rewards)
    lengths = batch.rollouts.completion_mask.sum(-1)
    squares = (lengths * advantages**2).mean() * lengths.mean()
    expected = metrics["gradient/norm"] ** 2 / squares**0.5
    np.testing.assert_allclose(metrics["update/log_prob_change"], expected, 1e-4)
    np.testing.assert_allclose(metrics["ratio/mean"], 1, rtol=1e-6)


def test_updates_of_one_shape_are_traced_once(policy):
    chex.clear_trace_counter()
    step, init = train_step(policy, REINFORCE, MicroBatch(P, 3), max_length=T)
    step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    state = init(jax.tree.map(jnp.copy, policy.params))
    for seed in range(3):
        state, _ = step(state, weighed(REINFORCE, rollouts(seed)))
    assert state.updates == 3


def test_an_update_makes_better_samples_likelier(stepper, policy):
    step, state = stepper
    batch = rollouts()
    after, _ = step(state, weighed(REINFORCE, batch))
    twin = jax.jit(completion_logprobs)
    gained = (twin(policy.replace(after.params), batch) - twin(policy, batch)).sum(-1)
    advantages = batch.rewards - batch.rewards.mean(1, keepdims=True)
    assert (advantages * np.asarray(gained)).sum() > 0


def test_a_batch_without_signal_changes_nothing(stepper):
    step, state = stepper
    tied = rollouts()._replace(rewards=np.full((P, G), 0.35, np.float32))
    after, metrics = step(state, weighed(REINFORCE, tied))
    assert metrics["gradient/norm"] == 0
    chex.assert_trees_all_equal(after.params, state.params)


@pytest.fixture(scope="module")
def moved(policy):
    """(state, objective -> train step) after an AdamW update with weight decay."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, schedule="cosine")
    optimizer = make_optimizer(config, make_schedule(config, 10))

    def steps(objective=REINFORCE, **options):
        _, init = train_step(policy, objective, MicroBatch(P, G), optimizer, T)
        fixed = dict(micro=MicroBatch(P, G), temperature=1.0, max_length=T)
        step = make_train_step(policy, objective, optimizer, **fixed, **options)
        return jax.jit(step), init(policy.params)

    step, state = steps()
    state, metrics = step(state, weighed(REINFORCE, rollouts()))
    assert metrics["update/empty"] == 0
    return state, steps


TIED = rollouts()._replace(rewards=np.full((P, G), 0.35, np.float32))


def test_without_a_gradient_neither_moments_nor_decay_move_anything(moved):
    state, steps = moved
    after, metrics = steps()[0](state, weighed(REINFORCE, TIED))
    chex.assert_trees_all_equal(after, state._replace(skipped_in_a_row=0))
    assert after.updates == 1 and after.skipped == 0  # nor the schedule's count
    assert metrics["update/empty"] == 1
    assert metrics["update/norm"] == metrics["gradient/norm"] == 0


def test_an_older_run_goes_on_with_adams_moments(moved):
    state, steps = moved
    step, _ = steps(skip_empty=False)
    after, metrics = step(state, weighed(REINFORCE, TIED))
    assert metrics["update/empty"] == 1 and metrics["update/norm"] > 1e-3
    assert after.updates == 2


# What a tied group still has a gradient of: its reward itself, and KL.
@pytest.mark.parametrize(
    "objective",
    [
        dataclasses.replace(REINFORCE, baseline="none"),
        dataclasses.replace(REINFORCE, kl_coef=0.1),
    ],
    ids=["without a baseline", "with KL"],
)
def test_tied_groups_with_a_gradient_make_an_update(moved, objective):
    state, steps = moved
    reference = np.full((P, G, T), -1.0, np.float32) if objective.kl_coef else None
    batch = weighed(objective, TIED, reference=reference)
    after, metrics = steps(objective)[0](state, batch)
    assert metrics["update/empty"] == 0 and metrics["gradient/norm"] > 1e-4
    assert after.updates == 2 and metrics["update/norm"] > 0


def test_what_tied_groups_leave_of_an_update_is_said():
    kl = dataclasses.replace(REINFORCE, kl_coef=0.1)
    others = [{"kl_coef": 0.0}, {"baseline": "none"}, {"entropy_coef": 0.1}]
    said = [
        effect_of_ties(True, kl, skips=True),
        effect_of_ties(True, kl, skips=False),
        effect_of_ties(False, kl, skips=True),
        *(
            effect_of_ties(False, dataclasses.replace(kl, **more), skips=True)
            for more in others
        ),
    ]
    parts = ["left out", "'s mean", "starting policy (KL)", *["in a group"] * 3]
    for text, part in zip(said, parts, strict=True):
        assert [x for x in dict.fromkeys(parts) if x in text] == [part]


def test_a_batch_without_rewards_has_no_means_over_tokens(stepper):
    step, state = stepper
    missing = rollouts()._replace(rewards=np.full((P, G), NAN, np.float32))
    after, metrics = step(state, weighed(REINFORCE, missing))
    chex.assert_trees_all_equal(after.params, state.params)
    none = {name for name, value in metrics.items() if np.isnan(value)}
    assert none == {"ratio/mean", "ratio/deviation", "ratio/clipped", "entropy/sampled"}


def test_a_gradient_that_is_not_finite_is_skipped(stepper):
    step, state = stepper
    spoiled = jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params)
    state = state._replace(params=spoiled)
    for times in (1, 2):
        state, metrics = step(state, weighed(REINFORCE, rollouts()))
        assert (state.updates, state.skipped_in_a_row) == (0, times)
        assert metrics["update/norm"] == 0
    chex.assert_trees_all_equal(state.params, spoiled)


# Under sgd at rate 1 the step from a is a less the gradient at b.
def test_the_gradient_may_be_taken_elsewhere(stepper):
    step, state = stepper
    batch = weighed(REINFORCE, rollouts())
    elsewhere = jax.tree.map(lambda x: 1.5 * x, state.params)
    expected, _ = step(state._replace(params=elsewhere), batch)
    after, metrics = step(state, batch, elsewhere)

    def moved(new, old):
        return jax.tree.map(jnp.subtract, new, old)

    chex.assert_trees_all_close(
        moved(after.params, state.params),
        moved(expected.params, elsewhere),
        rtol=1e-4,
        atol=1e-6,
    )
    ordinary, _ = step(state, batch)
    difference = optax.tree.norm(moved(after.params, ordinary.params))
    assert difference > 1e-3 and after.updates == 1
    np.testing.assert_allclose(metrics["ratio/deviation"], 0, atol=1e-6)


# ESPO stops past 0.25: log-ratios of 0.2 are r = 1.22, of 0.3 r = 1.35.
@pytest.mark.parametrize(("gap", "stopped"), [(0.0, 0), (0.2, 0), (0.3, 1), (-0.4, 1)])
def test_past_the_deviation_an_update_changes_nothing(stopper, policy, gap, stopped):
    objective, step, state = stopper
    batch = rollouts()
    old = jax.jit(completion_logprobs)(policy, batch) - np.float32(gap)
    after, metrics = step(state, weighed(objective, batch, old=old))
    assert metrics["update/stopped"] == stopped and metrics["gradient/norm"] > 0
    assert set(metrics) <= set(FIELDS)
    np.testing.assert_allclose(metrics["ratio/deviation"], abs(np.expm1(gap)), 1e-4)
    counts = after.updates, after.skipped, after.skipped_in_a_row
    assert counts == (1 - stopped, 0, 0)
    assert (metrics["update/norm"] == 0) == stopped
    kept = (after.params, after.opt_state), (state.params, state.opt_state)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *kept)
    assert all(jax.tree.leaves(same)) == stopped


@pytest.fixture(scope="module")
def stopper(policy):
    objective = OBJECTIVES["espo"]
    step, init = train_step(policy, objective, MicroBatch(P, G), max_length=T)
    return objective, jax.jit(step), init(policy.params)


def test_a_gradient_that_is_not_finite_is_skipped_rather_than_stopped(stopper):
    objective, step, state = stopper
    spoiled = jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params)
    old = np.zeros((P, G, T), np.float32)
    batch = weighed(objective, rollouts(), old=old)
    after, metrics = step(state._replace(params=spoiled), batch)
    assert metrics["update/stopped"] == 0
    assert (after.updates, after.skipped, after.skipped_in_a_row) == (0, 1, 1)


# Prompt 2 of [1, 0, 0, 0, 0, 0] at prior 1/2: (1.5, 5.5) of 7.
def test_weighing_moves_the_weights_state_and_updates_do_not(stepper):
    step, state = stepper
    rule, ids = posterior_weights(9), np.int32([2, 4, 6, 8])
    batch = rollouts()._replace(rewards=np.eye(P, G, dtype=np.float32))
    call = jax.jit(partial(weigh, REINFORCE, rule, max_length=T))
    _, shaped, _, weights, rule_state, metrics = call(batch, None, ids, rule.init())
    np.testing.assert_allclose(weights, [7 / 8.25**0.5] * P, rtol=1e-6)
    np.testing.assert_array_equal(rule_state.successes, [0, 0, 1, 0, 1, 0, 1, 0, 1])
    assert rule_state.count == 1
    np.testing.assert_allclose(metrics["weights/mean"], weights.mean(), rtol=1e-6)
    state = state._replace(weights_state=rule_state)
    for _ in range(2):
        state, _ = step(state, Batch(batch, shaped, weights))
    chex.assert_trees_all_equal(state.weights_state, rule_state)


def marked(value):
    """A batch in which every entry is one number."""
    marks = jax.tree.map(lambda x: np.full_like(x, value), rollouts())
    return Batch(marks, marks.rewards, np.full(P, value, np.float32))


# Three iterates: until there are three, the newest one fills the empty places.
def test_a_history_is_newest_first_and_shifts():
    objective = dataclasses.replace(OBJECTIVES["rt_pg"], history=3)
    history = empty_history(objective, rollouts())
    assert not history.valid.any()
    call = jax.jit(partial(push_history, objective))
    for value, expected in (
        (1, [1, 1, 1]),
        (2, [2, 1, 2]),
        (3, [3, 2, 1]),
        (4, [4, 3, 2]),
    ):
        history, batch = call(history, marked(value))
        for x in jax.tree.leaves((batch.rollouts, batch.shaped_rewards, batch.weights)):
            chex.assert_axis_dimension(x, 0, 3 * P)
            rows = np.asarray(x).reshape(3, -1)
            np.testing.assert_array_equal(rows, np.full_like(rows, 1) * np.c_[expected])
        np.testing.assert_array_equal(
            batch.old_logprobs, batch.rollouts.behaviour_logprobs
        )
        assert batch.reference_logprobs is None and batch.token_weights is None
    np.testing.assert_array_equal(history.weights, np.c_[[4, 3]] * np.ones((1, P)))
    assert history.valid.all()


def test_a_history_keeps_shapes_and_dtypes():
    objective = OBJECTIVES["rt_pg"]
    history = empty_history(objective, rollouts())
    after, batch = jax.jit(partial(push_history, objective))(history, marked(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, history)
    chex.assert_trees_all_equal_dtypes(batch.rollouts, rollouts())


def test_one_iterate_needs_no_history():
    assert empty_history(REINFORCE, rollouts()) == ()


@pytest.mark.parametrize(("index", "parts", "rows"), [(0, 1, 4), (1, 2, 2), (3, 4, 1)])
def test_part_of_a_batch_is_some_of_its_prompts(index, parts, rows):
    numbers = np.arange(P, dtype=np.float32)
    per_token = numbers[:, None, None] * np.ones((1, G, T))
    rewards = rollouts().rewards
    batch = Batch(rollouts(), rewards, numbers, per_token, None, per_token)
    part = jax.jit(part_of, static_argnums=(1, 2))(batch, index, parts)
    kept = numbers[index * rows : (index + 1) * rows]
    np.testing.assert_array_equal(part.weights, kept)
    np.testing.assert_array_equal(part.old_logprobs[:, 0, 0], kept)
    np.testing.assert_array_equal(part.token_weights[:, 0, 0], kept)
    expected = rollouts().rewards[index * rows : (index + 1) * rows]
    np.testing.assert_array_equal(part.rollouts.rewards, expected)
    np.testing.assert_array_equal(part.shaped_rewards, expected)
    assert part.reference_logprobs is None


def test_means_of_no_rewards_are_no_numbers():
    batch = rollouts()._replace(rewards=np.full((P, G), NAN, np.float32))
    zeros = np.zeros(P, np.float32)
    metrics = jax.jit(group_metrics)(batch, zeros, batch.rewards)
    assert np.isnan(metrics["reward/mean"]) and np.isnan(metrics["group/std_mean"])
    assert metrics["reward/missing"] == P * G and metrics["group/informative"] == 0


# Rewards (1, 0, 0, missing), (1, 1, 1, 1), (missing x 4): 5 solved of 7 present; the
# first has std sqrt(2) / 3, the second 0, the third none; completions of 1, 2, 3 and 0
# tokens each. The last places of the first and third group hold no sample: 3 rewards
# of 10 samples are missing.
def test_group_metrics():
    batch = Rollouts(
        *[None] * 3,
        completion_mask=np.tile(np.tri(4, 3, -1, np.int32)[[1, 2, 3, 0]], (3, 1, 1)),
        behaviour_logprobs=None,
        rewards=np.float32([[1, 0, 0, NAN], [1] * 4, [NAN] * 4]),
    )
    weights = np.float32([2, 0, 1])
    metrics = jax.jit(group_metrics)(batch, weights, batch.rewards)
    expected = {
        "reward/mean": 5 / 7,
        "reward/missing": 3,
        "group/informative": 1 / 3,
        "group/std_mean": 2**0.5 / 6,
        "weights/mean": 1,
        "weights/min": 0,
        "weights/max": 2,
        "completion/length_mean": 18 / 10,
        "tokens/completion": 18,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def rates(updates=10, **changes):
    config = OptimizerConfig(learning_rate=1.0, **changes)
    return [float(make_schedule(config, updates)(i)) for i in range(updates)]


def test_schedules_after_warm_up():
    assert rates(4) == [1, 1, 1, 1]
    np.testing.assert_allclose(rates(4, warmup_steps=4), [0.25, 0.5, 0.75, 1])
    linear = rates(6, warmup_steps=2, schedule="linear")
    np.testing.assert_allclose(linear, [0.5, 1, 1, 0.75, 0.5, 0.25], atol=1e-6)
    cosine = rates(4, schedule="cosine")
    np.testing.assert_allclose(cosine, (1 + np.cos(np.arange(4) * np.pi / 4)) / 2)


def updates_of(grads, params, **changes):
    config = OptimizerConfig(**changes)
    optimizer = make_optimizer(config, optax.constant_schedule(1.0))
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


def test_weight_decay_is_on_matrices_only():
    params = {
        "q": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
        "embedding": {"embedding": jnp.ones((3, 2))},
        "unembedding": jnp.ones((2, 3)),
    }
    grads = jax.tree.map(jnp.zeros_like, params)
    updates = updates_of(grads, params, weight_decay=0.1)
    moved = jax.tree.map(lambda x: float(x.ravel()[0]), updates)
    np.testing.assert_allclose(moved["q"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(moved["embedding"]["embedding"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(moved["unembedding"], -0.1, rtol=1e-6)
    assert moved["q"]["bias"] == moved["norm"]["scale"] == 0


# A huge Adam eps makes its first step m / eps = grad / eps, which shows the clipping.
@pytest.mark.parametrize(("clip_norm", "factor"), [(1.0, 1 / 5), (10.0, 1), (0.0, 1)])
def test_clipping_is_by_the_global_norm(clip_norm, factor):
    params = {"a": {"bias": jnp.zeros(1)}, "b": {"bias": jnp.zeros(1)}}
    grads = {"a": {"bias": jnp.array([3.0])}, "b": {"bias": jnp.array([4.0])}}
    updates = updates_of(grads, params, clip_norm=clip_norm, eps=1e6)
    np.testing.assert_allclose(updates["a"]["bias"], -3e-6 * factor, rtol=1e-4)
    np.testing.assert_allclose(updates["b"]["bias"], -4e-6 * factor, rtol=1e-4)
