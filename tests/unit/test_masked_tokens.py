"""Tokens within a completion that the policy did not sample, and groups that lack
samples: attended to or absent, and in no loss and no statistic."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax as gj
from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.instrument.measurement import group_logprobs, measure
from grpo_jax.objectives.token_weights import conflict_weights, overlong_weights
from grpo_jax.rollouts.encoding import decode_groups
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.rollouts.types import completion_lengths
from grpo_jax.training.step import make_gradients
from tests.helpers import random_rollouts, tiny_policy, weighed

P, G, T = 4, 6, 7
HOLES = slice(2, 4)  # a tool's tokens


def talks(seed=0):
    """Rollouts whose completions are 7 tokens with a tool's in the middle."""
    rollouts = random_rollouts(tiny_policy(), P, G, 5, T, seed)
    rng = np.random.default_rng(seed)
    completions = rng.integers(2, 19, (P, G, T)).astype(np.int32)
    mask = np.ones((P, G, T), np.int32)
    mask[..., HOLES] = 0
    rollouts = rollouts._replace(
        completions=jnp.asarray(completions), completion_mask=jnp.asarray(mask)
    )
    logprobs = gj.completion_logprobs(tiny_policy(), rollouts)
    return rollouts._replace(behaviour_logprobs=logprobs)


def set_in_holes(array, value):
    return jnp.asarray(array).at[..., HOLES].set(value)


# By the definition: one long sequence, its next-token logits, gathered.
def test_tokens_of_others_are_attended_to_and_have_no_log_prob():
    policy, rollouts = tiny_policy(), talks()
    actual = gj.completion_logprobs(policy, rollouts)
    for p, g in ((0, 0), (2, 3)):
        prompt = rollouts.prompts[p][rollouts.prompt_mask[p] > 0]
        ids = jnp.concatenate([prompt, rollouts.completions[p, g]])
        logits = gj.next_token_logits(policy, ids[None, :-1])[0]
        logprobs = jax.nn.log_softmax(logits)[jnp.arange(len(ids) - 1), ids[1:]]
        expected = np.where(rollouts.completion_mask[p, g], logprobs[-T:], 0)
        np.testing.assert_allclose(actual[p, g], expected, rtol=1e-4, atol=1e-5)


def test_another_token_of_a_tool_changes_what_comes_after_it_alone():
    policy, rollouts = tiny_policy(), talks()
    other = (rollouts.completions[..., HOLES] + 1) % 19
    changed = rollouts._replace(completions=set_in_holes(rollouts.completions, other))
    before = gj.completion_logprobs(policy, rollouts)
    after = gj.completion_logprobs(policy, changed)
    np.testing.assert_array_equal(before[..., :4], after[..., :4])
    assert (np.abs(before - after)[..., 4:] > 1e-4).any((0, 1)).all()


# Every objective: arrays in the holes may hold anything, NaN included.
@pytest.mark.parametrize("name", gj.OBJECTIVES)
def test_no_loss_reads_what_stands_in_the_holes(name):
    objective, rollouts = gj.OBJECTIVES[name], talks()
    rng = np.random.default_rng(0)
    arrays = {
        "logprobs": rollouts.behaviour_logprobs + 0.1,
        "behaviour_logprobs": rollouts.behaviour_logprobs,
        "reference_logprobs": rollouts.behaviour_logprobs - 0.1,
        "entropy": rng.uniform(0, 1, (P, G, T)).astype(np.float32),
        "token_weights": np.ones((P, G, T), np.float32),
    }
    same = dict(
        rewards=rollouts.rewards,
        completion_mask=rollouts.completion_mask,
        token_ids=rollouts.completions,
    )

    @jax.jit
    def loss_and_gradient(arrays):
        def loss(logprobs):
            given = arrays | {"logprobs": logprobs}
            return gj.policy_loss(objective, **given, **same)[0]

        return jax.value_and_grad(loss)(arrays["logprobs"])

    expected = loss_and_gradient(arrays)
    actual = loss_and_gradient(
        {name: set_in_holes(x, jnp.nan) for name, x in arrays.items()}
    )
    np.testing.assert_array_equal(expected[0], actual[0])
    np.testing.assert_array_equal(expected[1], actual[1])
    assert np.isfinite(actual[0]) and not np.asarray(actual[1])[..., HOLES].any()


def test_advantages_of_masked_tokens_change_nothing():
    rollouts, objective = talks(), gj.OBJECTIVES["reinforce"]
    advantages = np.random.default_rng(1).normal(size=(P, G, T)).astype(np.float32)

    @jax.jit
    def loss(advantages):
        return gj.policy_loss(
            objective,
            logprobs=rollouts.behaviour_logprobs,
            behaviour_logprobs=rollouts.behaviour_logprobs,
            rewards=rollouts.rewards,
            completion_mask=rollouts.completion_mask,
            advantages=advantages,
        )[0]

    expected, actual = loss(advantages), loss(set_in_holes(advantages, 1e3))
    np.testing.assert_array_equal(expected, actual)


def with_nan_in_holes(rollouts):
    logprobs = set_in_holes(rollouts.behaviour_logprobs, jnp.nan)
    return rollouts._replace(behaviour_logprobs=logprobs)


def test_a_gradient_reads_no_log_prob_of_a_tool_and_may_be_split():
    policy, objective = tiny_policy(num_layers=1), gj.OBJECTIVES["gspo"]
    sizes = dict(temperature=1.0, max_length=T)
    whole, split = (
        jax.jit(make_gradients(objective, micro=MicroBatch(*n), **sizes))
        for n in ((P, G), (2, 3))
    )
    old = talks().behaviour_logprobs - 0.05
    batch = weighed(objective, talks(), old, old)
    other = batch._replace(
        rollouts=with_nan_in_holes(batch.rollouts),
        old_logprobs=set_in_holes(old, jnp.nan),
        reference_logprobs=set_in_holes(old, jnp.nan),
    )
    expected, noisy = whole(policy, batch)[0], whole(policy, other)[0]
    jax.tree.map(np.testing.assert_array_equal, expected, noisy)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, expected, split(policy, batch)[0])
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-3


# An objective that keeps the rollouts of several iterates, and their log-probs.
def test_a_history_reads_no_log_prob_of_a_tool():
    learner = gj.Learner("rt_pg", optax.sgd(0.1))
    start = learner.init(tiny_policy(num_layers=1), rollouts=talks())
    ends = []
    for given in (talks(), with_nan_in_holes(talks())):
        state = jax.tree.map(jnp.copy, start)  # a step donates it
        for _ in range(2):
            state, metrics = learner.step(state, given)
        assert metrics["update/applied"] == 2 and metrics["tokens/completion"] == 120
        ends.append(state.params)
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
def test_other_weights_are_compared_on_sampled_tokens():
    learner = gj.Learner("reinforce", optax.sgd(0.1), with_counterfactual=True)
    state = learner.init(tiny_policy(num_layers=1))

    def compare(rollouts):
        ids = np.arange(len(rollouts.prompts))
        return learner.compare_weights(state, learner.weigh(state, rollouts, ids).batch)

    expected, actual = compare(talks()), compare(with_nan_in_holes(talks()))
    jax.tree.map(np.testing.assert_array_equal, expected, actual)
    assert np.isfinite(compare(ragged()).slopes).all()


def test_the_instrument_sums_sampled_tokens():
    policy, rollouts = tiny_policy(), talks()
    prompt = rollouts.prompts[1], rollouts.prompt_mask[1]
    samples = rollouts.completions[1], rollouts.completion_mask[1]
    actual = group_logprobs(policy.replace, 1.0, 1000, prompt, policy.params, samples)
    expected = gj.completion_logprobs(policy, rollouts)[1].sum(-1)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


# Groups of 4, 8 and 2 samples beside one of 8: the places between hold none.
def ragged():
    rollouts = random_rollouts(tiny_policy(), 3, 8, 5, T)
    rows, left = [], {0: 4, 1: 8, 2: 2}
    for row in rollouts.to_rows():
        left[row["group"]] -= 1
        if left[row["group"]] >= 0:
            rows.append(row)
    return gj.Rollouts.from_rows(rows, None, pad_to=T)


def test_a_ragged_group_has_the_loss_of_its_samples():
    rollouts, policy = ragged(), tiny_policy()
    np.testing.assert_array_equal(
        np.isfinite(rollouts.rewards).sum(1), np.array([4, 8, 2])
    )
    current = gj.completion_logprobs(policy, rollouts) + 0.1
    for name in ("grpo", "dr_grpo"):
        objective = dataclasses.replace(gj.OBJECTIVES[name], kl_coef=0.0)
        losses = []
        for p in range(3):
            present = np.flatnonzero(np.isfinite(rollouts.rewards[p]))
            group = jax.tree.map(lambda x, p=p: x[p : p + 1], rollouts)
            small = {
                x: getattr(group, x)[:, present]
                for x in ("completion_mask", "behaviour_logprobs", "rewards")
            }
            small |= {"logprobs": current[p : p + 1, present], "max_length": T}
            losses.append(float(gj.policy_loss(objective, **small)[0]))
        whole, _ = gj.per_prompt_losses(
            objective,
            logprobs=current,
            behaviour_logprobs=rollouts.behaviour_logprobs,
            rewards=rollouts.rewards,
            completion_mask=rollouts.completion_mask,
            max_length=T,
        )
        np.testing.assert_allclose(whole, losses, rtol=1e-4, atol=1e-6)


def test_the_places_of_a_small_group_are_spread_over_its_parts():
    rewards = np.asarray(ragged().rewards)
    assert num_parts(8) == 2
    in_halves = np.isfinite(rewards).reshape(3, 2, 4).sum(2)
    np.testing.assert_array_equal(in_halves, [[2, 2], [4, 4], [1, 1]])


def test_the_instrument_measures_ragged_groups():
    policy, rollouts = tiny_policy(), ragged()
    rollouts = rollouts._replace(
        rewards=jnp.where(jnp.isnan(rollouts.rewards), jnp.nan, jnp.arange(8.0))
    )
    call = partial(measure, width=4096, exact=False)
    args = policy, rollouts, None, 1.0, jax.random.key(0)
    measured = jax.jit(call)(*args)
    # Two samples leave one in each half, which has no baseline; four leave two.
    np.testing.assert_array_equal(measured.probes.halves, [2, 2, 0])
    assert np.isfinite(measured.probes.curvature[:2]).all()


# With the holes taken out, the same tokens are aligned.
def test_conflict_tokens_are_found_among_sampled_ones():
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 3, (2, 4, 9))
    mask = rng.random((2, 4, 9)) < 0.7
    advantages = rng.normal(size=(2, 4)).astype(np.float32)
    actual = np.asarray(jax.jit(conflict_weights)(ids, advantages, mask))
    dense_ids, dense_mask = np.zeros_like(ids), np.zeros_like(mask)
    for i in np.ndindex(2, 4):
        n = mask[i].sum()
        dense_ids[i][:n], dense_mask[i][:n] = ids[i][mask[i]], True
    dense = np.asarray(jax.jit(conflict_weights)(dense_ids, advantages, dense_mask))
    for i in np.ndindex(2, 4):
        np.testing.assert_array_equal(actual[i][mask[i]], dense[i][dense_mask[i]])
    assert (actual[~mask] == 1).all() and len(np.unique(actual)) == 3


# EOS (1) ends the first turn of both; the second was cut off in its last one.
def test_the_end_of_an_earlier_turn_ends_no_completion():
    ids = np.array([[[5, 1, 7, 5, 1], [5, 1, 7, 5, 6]]])
    mask = np.array([[[1, 1, 0, 1, 1], [1, 1, 0, 1, 1]]])
    actual = jax.jit(overlong_weights, static_argnums=2)(ids, mask, 1)
    np.testing.assert_array_equal(actual[0], [[1] * 5, [0] * 5])


def test_lengths_reach_to_the_last_sampled_token():
    mask = np.array([[[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(completion_lengths(mask), [[3, 2, 0]])
    np.testing.assert_array_equal(completion_lengths(jnp.asarray(mask)), [[3, 2, 0]])


def test_a_reward_sees_what_tools_wrote(chains_task):
    ids = chains_task.tokenizer("1+2=3", add_special_tokens=False)["input_ids"]
    mask = np.array([[[1, 1, 0, 0, 1]]])
    assert decode_groups(chains_task, np.array([[ids]]), mask) == [["1+2=3"]]


@pytest.fixture(scope="module")
def chains_task():
    return gj.load_task("chains")
