"""Losses and gradients of the presets, worked out by hand on tiny arrays."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from grpo_jax import OBJECTIVES, Objective, per_prompt_losses, policy_loss

NAN = float("nan")
LN2 = math.log(2)
RAGGED = [[[1, 1, 1], [1, 0, 0]]]  # P = 1, G = 2: completions of 3 tokens and of 1
# std_eps 0, so that rewards (1, 0) have std 1/2 and advantages exactly (1, -1).
GRPO = dataclasses.replace(OBJECTIVES["grpo"], std_eps=0.0, kl_coef=0.0)


def float32(x):
    return None if x is None else np.array(x, np.float32)


def loss_and_grad(
    objective,
    logprobs,
    mask,
    *,
    rewards=((1, 0),),
    behaviour=None,
    reference=None,
    token_weights=None,
    max_length=None,
    entropy=None,
    token_ids=None,
):
    """(loss, gradient in logprobs, metrics); behaviour defaults to on policy."""

    def loss(logprobs):
        return policy_loss(
            objective,
            logprobs=logprobs,
            behaviour_logprobs=float32(behaviour if behaviour is not None else start),
            rewards=float32(rewards),
            completion_mask=np.array(mask, np.int32),
            reference_logprobs=float32(reference),
            token_weights=float32(token_weights),
            max_length=max_length,
            entropy=float32(entropy),
            token_ids=token_ids,
        )

    start = float32(logprobs)
    (value, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(start)
    return value, grad, metrics


def check(actual, value, grad):
    np.testing.assert_allclose(actual[0], value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(actual[1], grad, rtol=1e-5, atol=1e-7)


# A = (1/2, -1/2), and 1/G = 1/2 before the sum over tokens:
# 1/2 * (-(1/2) * (-1 - 2) + (1/2) * (-1)) = 1/2; each token's gradient is -A / 2.
def test_reinforce():
    logprobs = [[[-1, -2], [-1, -9]]]
    actual = loss_and_grad(OBJECTIVES["reinforce"], logprobs, [[[1, 1], [1, 0]]])
    check(actual, 1 / 2, [[[-1 / 4, -1 / 4], [1 / 4, 0]]])


# Leave-one-out doubles the advantages of two: A = (1, -1).
def test_rloo_without_a_reference():
    objective = dataclasses.replace(OBJECTIVES["rloo"], kl_coef=0.0)
    logprobs = [[[-1, -2], [-1, -9]]]
    actual = loss_and_grad(objective, logprobs, [[[1, 1], [1, 0]]])
    check(actual, 1.0, [[[-1 / 2, -1 / 2], [1 / 2, 0]]])


# Completion 1: log(pi / ref) = 1/2 + 1/2, so R = 1 - 0.5 * 1 = 1/2; completion 2 has
# none on its one token (the padding's 7 - 0 does not count), R = 0. A = (1/2, -1/2),
# and KL in the reward has no gradient of its own.
def test_rloo_with_kl_in_the_reward():
    objective = dataclasses.replace(OBJECTIVES["rloo"], kl_coef=0.5)
    logprobs, reference = [[[-1, -2], [-1, 7]]], [[[-1.5, -2.5], [-1, 0]]]
    mask = [[[1, 1], [1, 0]]]
    actual = loss_and_grad(objective, logprobs, mask, reference=reference)
    check(actual, 1 / 2, [[[-1 / 4, -1 / 4], [1 / 4, 0]]])


# The reward's KL is that of the policy that sampled, wherever the current one is:
# behaviour / reference = e on one token of completion 1, so R = (0, 0), A = 0.
def test_kl_in_the_reward_is_the_behaviour_policys():
    objective = dataclasses.replace(OBJECTIVES["rloo"], kl_coef=1.0)
    arrays = dict(behaviour=[[[-1], [-1]]], reference=[[[-2], [-1]]])
    actual = loss_and_grad(objective, [[[-5], [-4]]], [[[1], [1]]], **arrays)
    check(actual, 0.0, [[[0], [0]]])


# Ratios (1.5, 0.5, 1.1), clip to [0.8, 1.2]. A = 1: min(r, clip r) = 1.2, 0.5, 1.1,
# the first without gradient. A = -1: max(r, clip r) = 1.5, 0.8, 1.1, the second
# without. Loss (3.4 - 2.8) / (G T = 6) = 0.1; a live token's gradient is -r A / 6.
def test_grpo_clips_either_sign_on_one_side():
    behaviour = np.full((1, 2, 3), -3.0)
    logprobs = behaviour + np.log([1.5, 0.5, 1.1])
    mask = np.ones((1, 2, 3))
    *actual, metrics = loss_and_grad(GRPO, logprobs, mask, behaviour=behaviour)
    check(actual, 0.1, np.array([[[0, -0.5, -1.1], [1.5, 0, 1.1]]]) / 6)
    np.testing.assert_allclose(metrics["ratio/clipped"], 2 / 6, rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio/mean"], 3.1 / 3, rtol=1e-6)


# The same with [0.7, 1.6]: 1.5 is inside now, and 0.5 goes up to 0.7 where A = -1.
# Loss (1.5 + 0.7 + 1.1 - 1.5 - 0.5 - 1.1) / 6 = 0.2 / 6.
def test_clip_is_low_then_high():
    behaviour = np.full((1, 2, 3), -3.0)
    logprobs = behaviour + np.log([1.5, 0.5, 1.1])
    objective = dataclasses.replace(GRPO, clip=(0.3, 0.6))
    mask = np.ones((1, 2, 3))
    actual = loss_and_grad(objective, logprobs, mask, behaviour=behaviour)
    check(actual, 0.2 / 6, np.array([[[-1.5, -0.5, -1.1], [1.5, 0, 1.1]]]) / 6)


# On policy every ratio is 1. Each completion is a mean over its own tokens, so the
# losses -1 and +1 cancel, and a token's gradient is -A / (G |o|): 1/6 or 1/2.
def test_grpo_weighs_a_short_completions_tokens_more():
    actual = loss_and_grad(GRPO, np.full((1, 2, 3), -2.0), RAGGED)
    check(actual, 0.0, [[[-1 / 6, -1 / 6, -1 / 6], [1 / 2, 0, 0]]])


# Tied rewards leave the KL alone. rho = ref / pi = (2, 1/2) and (2): k3 = rho - 1 -
# log rho = 1 - ln 2 or ln 2 - 1/2, gradient 1 - rho = -1 or 1/2. Completion 1 means
# (1/2) / 2 = 1/4; the loss is 0.04 * (1/4 + 1 - ln 2) / 2.
def test_grpo_with_k3_in_the_loss():
    logprobs, mask = np.full((1, 2, 2), -2.0), [[[1, 1], [1, 0]]]
    reference = [[[-2 + LN2, -2 - LN2], [-2 + LN2, 50]]]
    *actual, metrics = loss_and_grad(
        OBJECTIVES["grpo"], logprobs, mask, rewards=[[0.35, 0.35]], reference=reference
    )
    grad = 0.04 * np.array([[[-1 / 4, 1 / 8], [-1 / 2, 0]]])
    check(actual, 0.04 * (1.25 - LN2) / 2, grad)
    np.testing.assert_allclose(metrics["kl/mean"], (1.5 - LN2) / 3, rtol=1e-5)


# A = (1/2, -1/2), ratio 1, every token divided by G * 3 whatever its completion's
# length: (-(1/2) * 3 + (1/2) * 1) / 6 = -1/6. With max_length 10 by G * 10 instead.
@pytest.mark.parametrize(("max_length", "divisor"), [(None, 6), (10, 20)])
def test_dr_grpo(max_length, divisor):
    actual = loss_and_grad(
        OBJECTIVES["dr_grpo"], np.full((1, 2, 3), -2.0), RAGGED, max_length=max_length
    )
    check(actual, -1 / divisor, np.array([[[-0.5, -0.5, -0.5], [0.5, 0, 0]]]) / divisor)


# Weights scale tokens and no denominator: (-(1/2) * (2 + 0 + 1) + (1/2) * 4) / 6.
def test_token_weights_scale_the_surrogate():
    actual = loss_and_grad(
        OBJECTIVES["dr_grpo"],
        np.full((1, 2, 3), -2.0),
        RAGGED,
        token_weights=[[[2, 0, 1], [4, 9, 9]]],
    )
    check(actual, 0.5 / 6, np.array([[[-1, 0, -0.5], [2, 0, 0]]]) / 6)


# The reward's advantage is 0, so all of the loss is KL: 0.04 * (1 - ln 2), not * 5.
def test_token_weights_leave_the_kl_alone():
    logprobs = np.full((1, 2, 1), -2.0)
    arrays = dict(reference=logprobs + LN2, token_weights=np.full((1, 2, 1), 5.0))
    actual = loss_and_grad(
        OBJECTIVES["grpo"], logprobs, [[[1], [1]]], rewards=[[1, 1]], **arrays
    )
    check(actual, 0.04 * (1 - LN2), np.full((1, 2, 1), -0.02))


# No baseline: A = R = (3, 1): (-3 * -1 - 1 * -2) / 2 = 5/2.
def test_no_baseline():
    objective = dataclasses.replace(OBJECTIVES["reinforce"], baseline="none")
    mask = [[[1], [1]]]
    actual = loss_and_grad(objective, [[[-1], [-2]]], mask, rewards=[[3, 1]])
    check(actual, 5 / 2, [[[-3 / 2], [-1 / 2]]])


# Two prompts: the first as in test_reinforce with one token, A = (1/2, -1/2) and
# 1/2 * (1/2 * 1 - 1/2 * 3) = -1/2; the second tied, so 0. Their mean is the loss.
def test_the_loss_is_the_mean_over_prompts_tied_ones_included():
    arrays = dict(
        logprobs=float32([[[-1], [-3]], [[-1], [-3]]]),
        rewards=float32([[1, 0], [1, 1]]),
        completion_mask=np.ones((2, 2, 1), np.int32),
    )
    arrays["behaviour_logprobs"] = arrays["logprobs"]
    reinforce: Objective = OBJECTIVES["reinforce"]
    losses, _ = jax.jit(lambda a: per_prompt_losses(reinforce, **a))(arrays)
    np.testing.assert_allclose(losses, [-1 / 2, 0], rtol=1e-6)
    loss, _ = jax.jit(lambda a: policy_loss(reinforce, **a))(arrays)
    np.testing.assert_allclose(loss, -1 / 4, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_missing_reward_leaves_the_group_of_the_others(name):
    rng = np.random.default_rng(0)
    logprobs = rng.normal(-2, 0.3, (1, 4, 3))
    behaviour, reference = logprobs + rng.normal(0, 0.2, (2, 1, 4, 3))
    mask = np.array([[[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]])
    arrays = dict(logprobs=logprobs, mask=mask, behaviour=behaviour)
    arrays |= dict(reference=reference, rewards=np.array([[1.0, 0.0, NAN, 0.7]]))
    arrays |= dict(
        token_weights=rng.uniform(0.5, 2.0, (1, 4, 3)),
        entropy=rng.uniform(0.2, 0.6, (1, 4, 3)),
        token_ids=rng.integers(9, size=(1, 4, 3)),
    )
    whole = loss_and_grad(OBJECTIVES[name], **arrays)
    kept = {k: x[:, [0, 1, 3]] for k, x in arrays.items()}
    value, grad, metrics = loss_and_grad(OBJECTIVES[name], **kept)
    check(whole, value, np.insert(grad, 2, 0, axis=1))
    assert np.abs(grad).max() > 0.01
    for statistic, x in metrics.items():
        np.testing.assert_allclose(whole[2][statistic], x, rtol=1e-5)
