"""What prompt weights multiply, and what is added after them: derived advantages."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import OBJECTIVES, Rollouts, per_prompt_losses
from grpo_jax.objectives.baselines import BASELINES
from grpo_jax.objectives.loss import scale_weights, shaped_rewards
from grpo_jax.objectives.scales import SCALES
from grpo_jax.preconditioner import PromptWeights
from grpo_jax.prompt_weights import WEIGHTS
from grpo_jax.rewards.pool import Outcome
from grpo_jax.rewards.scoring import _weighted_sum
from grpo_jax.rewards.types import Reward
from grpo_jax.tasks.tokenizers import character_tokenizer
from grpo_jax.tasks.types import Task
from grpo_jax.training.state import Batch
from grpo_jax.training.step import batch_terms
from grpo_jax.training.weighing import weigh

G = 4
ONE_SOLVED, ALL, NONE = [1, 0, 0, 0], [1] * G, [0] * G
KL = np.array([3.0, 1, 0, 0])  # nats, a completion
CENTRED_KL = KL - KL.mean()


def objective(**changes):
    """REINFORCE with k1 in the reward: a loss of -A log pi."""
    defaults = dict(kl_coef=0.1, kl_in="reward", divergence="k1")
    return dataclasses.replace(OBJECTIVES["reinforce"], **defaults | changes)


@functools.cache
def compiled(objective):
    def loss(logprobs, kl, rewards, solving):
        return per_prompt_losses(
            objective,
            logprobs=logprobs,
            behaviour_logprobs=kl,  # k1 is behaviour less reference, exactly
            reference_logprobs=jnp.zeros_like(kl),
            rewards=rewards,
            completion_mask=jnp.ones_like(logprobs),
            solving=solving,
        )[0].sum()

    return jax.jit(jax.grad(loss))


def advantages(objective, rewards, kl=KL, solving=None):
    """[P, G] read off the gradient, completions of one token that has KL kl."""
    rewards = np.float32(rewards)
    kl = np.broadcast_to(np.float32(kl), rewards.shape)[..., None]
    logprobs = np.full_like(kl, -5.0)
    gradient = compiled(objective)(logprobs, kl, rewards, solving)
    return -np.asarray(gradient)[..., 0] * rewards.shape[1]


@functools.cache
def weigher(objective, rule, max_length):
    return jax.jit(partial(weigh, objective, rule, max_length=max_length))


def in_a_run(objective, rewards, kl=KL, rule=None, max_length=8, **more):
    """(advantages times cotangents [P, G], `Weighed`) as the trainer makes them."""
    rewards = np.float32(rewards)
    lengths = np.broadcast_to(more.pop("lengths", 1), rewards.shape)
    mask = np.arange(max_length) < lengths[..., None]
    kl = np.broadcast_to(np.float32(kl), rewards.shape)
    first = np.arange(max_length) == 0
    prompt = np.zeros((len(rewards), 1), np.int32)
    rollouts = Rollouts(
        prompt, prompt, mask * 1, mask * 1, kl[..., None] * first, rewards, **more
    )
    rule = scale_weights(objective) if rule is None else rule
    reference = np.zeros(mask.shape, np.float32) if objective.kl_coef else None
    weighed = weigher(objective, rule, max_length)(
        rollouts, reference, np.arange(len(rewards)), rule.init()
    )
    batch = Batch(
        weighed.rollouts,
        weighed.shaped_rewards,
        weighed.weights,
        added_rewards=weighed.added_rewards,
    )
    part = batch_terms(objective, batch, max_length)
    cotangent = np.asarray(part.prompt.surrogate_cotangent) * len(rewards)
    return np.asarray(part.sample.advantages) * cotangent[:, None], weighed


# R = (1, 0, 0, 0): centred (3/4, -1/4 ...), std sqrt(3)/4, so (sqrt 3, -1/sqrt 3, ...);
# 0.1 nats of the centred KL (2, 0, -1, -1) are taken off as they are.
def test_kl_is_added_after_the_division():
    actual = advantages(objective(scale="std", std_eps=0.0), [ONE_SOLVED])
    expected = np.array([3**0.5] + [-(3**-0.5)] * 3) - 0.1 * CENTRED_KL
    np.testing.assert_allclose(actual[0], expected, rtol=1e-6)


TIED = [ALL, NONE, [0.35] * G]


@pytest.mark.parametrize(
    ("scale", "baseline"), [(x, "mean") for x in SCALES] + [("std", "leave_one_out")]
)
def test_a_tied_group_has_its_kl_undivided(scale, baseline):
    """A = -coef (K - mean), linear in both: gaps of rounding size stay that small."""
    factor = G / (G - 1) if baseline == "leave_one_out" else 1
    method = objective(scale=scale, baseline=baseline, std_eps=0.0)
    for gap in (1e-6, 1.0):
        actual = advantages(method, [ONE_SOLVED, *TIED], gap * KL)
        expected = -0.1 * gap * CENTRED_KL * factor
        np.testing.assert_allclose(actual[1:], [expected] * 3, rtol=1e-4, atol=1e-12)
    trained, weighed = in_a_run(method, [ONE_SOLVED, *TIED], gap * KL)
    np.testing.assert_allclose(trained, actual, rtol=1e-5, atol=1e-7)
    assert weighed.metrics["group/informative"] == 1 / 4


def test_the_coefficient_counts_in_a_tied_group():
    actual = advantages(objective(scale="std", kl_coef=0.2), [ALL])
    np.testing.assert_allclose(actual[0], -0.2 * CENTRED_KL, rtol=1e-6)


def test_a_tied_group_without_a_baseline_has_its_kl_undivided():
    actual = advantages(objective(scale="std", baseline="none"), [ALL])
    np.testing.assert_allclose(actual[0], -0.1 * KL, rtol=1e-6)


@pytest.mark.parametrize("scale", sorted(set(SCALES) - {"leave_one_out_std"}))
def test_weights_are_those_of_the_rewards_without_kl(scale):
    batch = [ONE_SOLVED, ALL, [1, 1, 0, 0]]
    _, weighed = in_a_run(objective(scale=scale), batch)
    _, plain = in_a_run(objective(scale=scale, kl_coef=0.0), batch)
    np.testing.assert_array_equal(weighed.weights, plain.weights)
    if scale not in ("none", "batch_std"):
        assert (np.asarray(weighed.weights) > 0).tolist() == [True, False, True]
    np.testing.assert_allclose(weighed.metrics["group/informative"], 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_named_weights_leave_kl_alone(name):
    """Of two coefficients only the added part differs, by their difference."""
    rule = WEIGHTS[name].build({}, 5)
    got = [
        in_a_run(objective(kl_coef=c), [ONE_SOLVED, ALL], rule=rule)[0]
        for c in (0.1, 0.3)
    ]
    np.testing.assert_allclose(got[1] - got[0], [-0.2 * CENTRED_KL] * 2, atol=1e-6)


# Without a scale it is the same as taking KL off the reward: (1 - .3, -.1, 0, 0).
@pytest.mark.parametrize("baseline", BASELINES)
def test_without_a_scale_kl_may_be_taken_off_first(baseline):
    method = objective(baseline=baseline)
    actual = advantages(method, [ONE_SOLVED])
    less = np.array([ONE_SOLVED]) - 0.1 * KL
    expected = advantages(method, less, 0 * KL)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_missing_reward_has_no_kl_either():
    actual = advantages(objective(scale="std", std_eps=0.0), [[1, np.nan, 0, np.nan]])
    # KL of 3 and 0, mean 1.5; two samples of four: each counts twice.
    np.testing.assert_allclose(actual[0] / 2, [1 - 0.15, 0, -1 + 0.15, 0], rtol=1e-5)


# length_std: R/|o| and K/|o|. Two tokens each but the last with four.
def test_kl_is_divided_by_length_with_the_rewards():
    method = objective(scale="length_std", std_eps=0.0)
    lengths = np.array([2, 2, 2, 4])
    actual, _ = in_a_run(method, [NONE], lengths=lengths)
    per_token = KL / lengths
    np.testing.assert_allclose(actual[0], -0.1 * (per_token - per_token.mean()), 1e-5)


# ---- overlong punishment, over the last 2 of 8 tokens: -1/2 at 7, -1 at 8


PUNISHING = dataclasses.replace(
    OBJECTIVES["grpo"], kl_coef=0.0, overlong="punish", overlong_share=0.25,
    std_eps=0.0,
)  # fmt: skip
LENGTHS = np.array([7, 6, 8, 3])
PUNISHMENT = np.array([-0.5, 0, -1, 0])


def test_a_punishment_is_a_reward_where_the_group_is_not_tied():
    actual, _ = in_a_run(PUNISHING, [ONE_SOLVED], lengths=LENGTHS)
    rewards = np.array([1.0, 0, 0, 0]) + PUNISHMENT
    expected = (rewards - rewards.mean()) / rewards.std()
    np.testing.assert_allclose(actual[0], expected, rtol=1e-5)


# Divided by its own std one token over the edge would weigh as much as an answer.
def test_a_punishment_is_added_undivided_where_the_group_is_tied():
    actual, weighed = in_a_run(PUNISHING, [ALL, ONE_SOLVED], lengths=LENGTHS)
    expected = PUNISHMENT - PUNISHMENT.mean()
    np.testing.assert_allclose(actual[0], expected, rtol=1e-6)
    assert weighed.weights[0] == 0 and weighed.metrics["group/informative"] == 1 / 2


# R = (1, 0) and a punishment of 1 for the right one: all 0, and not informative.
def test_rewards_that_a_punishment_ties_are_not_informative():
    actual, weighed = in_a_run(PUNISHING, [[1, 0]], 0.0, lengths=[8, 3])
    assert not actual.any() and weighed.weights[0] == 0
    assert weighed.metrics["group/informative"] == 0


# ---- rules made of pass rates, with several rewards


def graded(solved, others, weight=1.0):
    """(rewards, what they hold for solving), [1, G] each."""
    solving = np.float32([solved]) * weight
    return solving + np.float32([others]), solving


# .7 for the right one of 8, -.1 for each wrong one: the mean is 0, the pass rate 1/8.
# The sum .025 of another shape would make 40 of the weight 8.
def test_the_weight_is_that_of_what_is_solved():
    rewards, solving = graded([1] + [0] * 7, [-0.3] + [-0.1] * 7)
    rule = WEIGHTS["group_mean"].build({"eps": 0.0}, 1)
    method = OBJECTIVES["reinforce"]
    actual, weighed = in_a_run(method, rewards, 0.0, rule, solving=solving)
    np.testing.assert_allclose(weighed.weights, [8], rtol=1e-6)
    others = np.array([-0.3] + [-0.1] * 7)
    solved = np.array([1.0] + [0] * 7)
    expected = 8 * (solved - 1 / 8) + others - others.mean()
    np.testing.assert_allclose(actual[0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(n for n, r in WEIGHTS.items() if r.pass_rates))
@pytest.mark.parametrize("solved", [ONE_SOLVED, NONE, ALL])
def test_other_rewards_are_added_as_they_are(name, solved):
    rule, others = WEIGHTS[name].build({}, 1), np.array([0.5, 0, -2, 30])
    rewards, solving = graded(solved, others, weight=2.0)
    method = OBJECTIVES["reinforce"]
    actual, weighed = in_a_run(method, rewards, 0.0, rule, solving=solving)
    _, alone = in_a_run(method, [solved], 0.0, rule)
    np.testing.assert_array_equal(weighed.weights, alone.weights)
    centred = np.array(solved) - np.mean(solved)
    expected = 2 * float(alone.weights[0]) * centred + others - others.mean()
    np.testing.assert_allclose(actual[0], expected, rtol=1e-5)
    assert weighed.metrics["group/informative"] == (solved == ONE_SOLVED)


@pytest.mark.parametrize("name", ["unit", "std", "batch_std"])
def test_other_rules_weigh_the_sum(name):
    rewards, solving = graded(ONE_SOLVED, [0.5, 0, -2, 30])
    rule = WEIGHTS[name].build({}, 1)
    told, _ = in_a_run(OBJECTIVES["reinforce"], rewards, 0.0, rule, solving=solving)
    plain, _ = in_a_run(OBJECTIVES["reinforce"], rewards, 0.0, rule)
    np.testing.assert_array_equal(told, plain)


@pytest.mark.parametrize("scale", ["group_mean", "beta"])
def test_a_scale_of_pass_rates_takes_what_was_solved(scale):
    rewards, solving = graded(ONE_SOLVED, [0.5, 0, -2, 30])
    method = objective(scale=scale)
    actual = advantages(method, rewards, solving=solving)
    trained, _ = in_a_run(method, rewards, solving=solving)
    np.testing.assert_allclose(actual, trained, rtol=1e-5)
    with pytest.raises(ValueError, match=r"rewards must be in \[0, 1\] for weights"):
        per_prompt_losses(
            objective(scale=scale, kl_coef=0.0),
            logprobs=jnp.zeros((1, G, 1)),
            behaviour_logprobs=jnp.zeros((1, G, 1)),
            rewards=jnp.asarray(rewards),
            completion_mask=jnp.ones((1, G, 1)),
        )
    with pytest.raises(ValueError, match=r"solving must be \(1, 4\)"):
        advantages(method, rewards, solving=np.zeros((G, 1)))


def task(reward):
    tokenizer = character_tokenizer("ab")
    return Task(name="t", train=[], heldout=[], tokenizer=tokenizer, reward=reward)


@pytest.mark.parametrize(
    ("reward", "graded"),
    [
        ((Reward(name="math"),), False),
        ((Reward(name="math", weight=2.0),), True),
        ((Reward(name="math"), Reward(name="r1_format", weight=0.2)), True),
        ((Reward(name="length", options=(("start", 1), ("end", 2))),), True),
        ((Reward(name="mine:judge"),), True),
        (lambda example, text: 0.5, True),
    ],
)
def test_which_rewards_are_graded(reward, graded):
    assert task(reward).graded == graded


# In float32 .1 + .2 is not .3: a group of equal sums would not be tied.
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_equal_sums_of_different_parts_are_tied(scale):
    weights = [0.1 * scale, 0.2 * scale, 0.3 * scale]
    rewards = [Reward(name="math", weight=w) for w in weights]
    parts = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1]]).T
    outcomes = [Outcome(float(x), None, False) for x in parts.ravel()]
    scores = _weighted_sum(rewards, outcomes, (1, 4))
    assert len(set(scores.rewards[0].tolist())) == 1


def test_parts_add_up_to_the_reward():
    rewards, solving = graded(ONE_SOLVED, [0.5, 0, -2, 30], weight=2.0)
    shaped = shaped_rewards(
        objective(),
        jnp.asarray(rewards),
        jnp.asarray(KL, jnp.float32)[None, :, None],
        jnp.zeros((1, G, 1)),
        jnp.ones((1, G, 1)),
        solving=jnp.asarray(solving),
    )
    assert shaped.added is not None
    total = shaped.weighed + shaped.added
    np.testing.assert_allclose(total, rewards - 0.1 * KL, rtol=1e-6)
    np.testing.assert_array_equal(shaped.judged, [ONE_SOLVED])


def test_a_rule_of_ones_own_may_ask_for_what_is_solved():
    seen = PromptWeights(
        lambda: (), lambda rewards, state: (rewards.sum(1), state), pass_rates=True
    )
    rewards, solving = graded([1, 1, 0, 0], [0.5, 0, -2, 30], weight=3.0)
    _, weighed = in_a_run(OBJECTIVES["reinforce"], rewards, 0.0, seen, solving=solving)
    np.testing.assert_array_equal(weighed.weights, [2])
