import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import centred_advantages, counterfactual_updates, inverse_std

P, G, K, D = 3, 4, 5, 6  # prompts, samples, answers, parameters
RNG = np.random.default_rng(0)
THETA = RNG.normal(size=D)
FEATURES = RNG.normal(size=(P, K, D))
ANSWERS = RNG.integers(K, size=(P, G))
REWARDS = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0.5, 2, 1]])

pytestmark = pytest.mark.usefixtures("x64")


def log_probs(theta, features=FEATURES, answers=ANSWERS):
    logits = jax.nn.log_softmax(jnp.tanh(features @ theta))
    return jnp.take_along_axis(logits, answers, 1)


def compared(weights, rewards=REWARDS, theta=THETA, log_probs=log_probs, **more):
    """`counterfactual_updates` of the losses of centred advantages."""

    def losses(theta):
        return -(centred_advantages(rewards) * log_probs(theta)).mean(1)

    @jax.jit
    def compare(theta):
        pull_back = jax.vjp(losses, theta)[1]
        return counterfactual_updates(
            lambda w: pull_back(w / len(w))[0],
            log_probs,
            theta,
            rewards,
            weights,
            **more,
        )

    return compare(theta)


def weightings(rewards=REWARDS):
    std = inverse_std(rewards)
    return {"unit": jnp.ones(len(rewards)), "std": std, "log_odds": std**2}


# The default update is minus the gradient; the other one is a step of each sign.
@pytest.mark.parametrize("update_fn", [None, lambda g: -0.1 * jnp.sign(g)])
def test_against_gradients_and_hessians(update_fn):
    actual = compared(weightings(), update_fn=update_fn)
    scores = np.asarray(jax.jit(jax.jacobian(log_probs))(THETA))  # [P, G, D]
    hessians = np.asarray(jax.jit(jax.hessian(log_probs))(THETA))
    centred = REWARDS - REWARDS.mean(1, keepdims=True)
    per_prompt = -(centred[..., None] * scores).mean(1)
    loo = centred * G / (G - 1)
    gradients = [np.mean(np.c_[w] * per_prompt, 0) for w in weightings().values()]
    updates = [-g if update_fn is None else update_fn(g) for g in gradients]
    for norms, cosines, vectors in (
        (actual.norms, actual.cosines, np.array(gradients)),
        (actual.update_norms, actual.update_cosines, np.array(updates)),
    ):
        lengths = np.linalg.norm(vectors, axis=1)
        np.testing.assert_allclose(norms, lengths, rtol=1e-10)
        units = vectors / lengths[:, None]
        np.testing.assert_allclose(cosines, units @ units.T, rtol=1e-10)
    for k, update in enumerate(updates):
        first, second = scores @ update, hessians @ update @ update
        np.testing.assert_allclose(actual.slopes[k], (loo * first).mean(1), rtol=1e-9)
        curvature = (loo * (first**2 + second)).mean(1)
        np.testing.assert_allclose(actual.curvatures[k], curvature, rtol=1e-9)
    assert actual.cosines[0, 2] < 0.999


# mean_p w_p slope_p = G / (G - 1) |gradient|^2: weighed, the prompts gain together.
def test_plain_updates_raise_what_they_ascend():
    actual = compared(weightings())
    gain = (np.stack(list(weightings().values())) * actual.slopes).mean(1)
    np.testing.assert_allclose(gain, actual.norms**2 * G / (G - 1), rtol=1e-9)


# Twice the weights are twice the update; each slope and curvature goes with them.
def test_slopes_and_curvatures_are_of_the_update_made():
    actual = compared({"one": jnp.ones(P), "two": 2 * jnp.ones(P)})
    np.testing.assert_allclose(actual.slopes[1], 2 * actual.slopes[0], rtol=1e-10)
    np.testing.assert_allclose(actual.curvatures[1], 4 * actual.curvatures[0], 1e-10)
    change = actual.predicted_change()
    np.testing.assert_allclose(change, actual.slopes + actual.curvatures / 2)
    twice = actual.predicted_change(2.0)
    np.testing.assert_allclose(twice[0], change[1], rtol=1e-10)


def test_one_prompt_has_one_direction():
    one = compared(
        weightings(REWARDS[:1]),
        REWARDS[:1],
        log_probs=lambda x: log_probs(x, FEATURES[:1], ANSWERS[:1]),
    )
    np.testing.assert_allclose(one.cosines, np.ones((3, 3)), rtol=1e-12)
    np.testing.assert_allclose(one.update_cosines, np.ones((3, 3)), rtol=1e-12)
    per_length = one.slopes[:, 0] / one.update_norms
    np.testing.assert_allclose(per_length, [per_length[0]] * 3, rtol=1e-10)
    std = REWARDS[0].std()
    np.testing.assert_allclose(one.norms[0] / one.norms[1], std, rtol=1e-5)


def test_groups_of_one_std_have_one_direction():
    rewards = np.array([[1.0, 0, 0, 0], [0, 1, 1, 1], [7, 7, 6, 7]])
    same = compared(weightings(rewards), rewards)
    np.testing.assert_allclose(same.cosines, np.ones((3, 3)), rtol=1e-12)
    factor = 4 / 3**0.5
    np.testing.assert_allclose(same.slopes[1], factor * same.slopes[0], rtol=1e-5)


def test_an_update_of_nothing_is_zero_and_finite():
    actual = compared({"none": jnp.zeros(P), "unit": jnp.ones(P)})
    for cosines in (actual.cosines, actual.update_cosines):
        np.testing.assert_allclose(cosines, [[0, 0], [0, 1]], atol=1e-12)
    assert actual.norms[0] == 0 and not np.asarray(actual.slopes[0]).any()
    chex.assert_tree_all_finite(actual)


# A missing sample keeps its place in the mean over the group: 3/4 of the gradient.
def test_missing_rewards_take_no_part():
    gaps = REWARDS.copy()
    gaps[:, 1] = np.nan
    kept = [0, 2, 3]
    actual = compared(weightings(gaps), gaps)
    without = compared(
        weightings(REWARDS[:, kept]),
        REWARDS[:, kept],
        log_probs=lambda x: log_probs(x, answers=ANSWERS[:, kept]),
    )
    np.testing.assert_allclose(actual.norms, without.norms * 3 / 4, rtol=1e-10)
    np.testing.assert_allclose(actual.slopes, without.slopes * 3 / 4, rtol=1e-10)
    curvatures = without.curvatures * 9 / 16
    np.testing.assert_allclose(actual.curvatures, curvatures, rtol=1e-10)
    np.testing.assert_allclose(actual.cosines, without.cosines, rtol=1e-10)


# The group holds each answer as often as the policy gives it, (2, 1, 1) of 4, so the
# leave-one-out estimates are G / (G - 1) times the exact slope and curvature.
def test_the_predicted_change_is_the_true_one_of_a_small_step(rate=0.1):
    rng, offsets = np.random.default_rng(1), np.log([[0.5, 0.25, 0.25]])
    features, right = rng.normal(size=(2, 3, D)), np.array([[1.0, 0, 0], [0, 0, 1]])
    group = np.array([[0, 0, 1, 2]] * 2)

    def all_log_probs(theta):
        return jax.nn.log_softmax(features @ theta + offsets)

    def group_log_probs(theta):
        return jnp.take_along_axis(all_log_probs(theta), group, 1)

    def losses(theta):
        return -(centred_advantages(rewards) * group_log_probs(theta)).mean(1)

    rewards, start = np.take_along_axis(right, group, 1), np.zeros(D)
    weights = {"unit": jnp.ones(2), "other": jnp.array([3.0, 1.0])}

    @jax.jit
    def compare(rate):
        """(comparison, the updates made, true changes after half and all of each)."""
        pull_back = jax.vjp(losses, start)[1]
        actual = counterfactual_updates(
            lambda w: pull_back(w / 2)[0], group_log_probs, start, rewards, weights,
            update_fn=lambda gradient: -rate * gradient,
        )  # fmt: skip
        updates = jnp.stack([-rate * pull_back(w / 2)[0] for w in weights.values()])
        steps = jnp.stack([updates / 2, updates])
        after = jnp.exp(jax.vmap(jax.vmap(all_log_probs))(steps))
        true = ((after - jnp.exp(offsets)[None, None]) * right[None, None]).sum(-1)
        return actual, updates, true

    actual, made, true = compare(rate)
    length = float(jnp.linalg.norm(made, axis=1).max())
    for part, change in zip((0.5, 1.0), true, strict=True):
        predicted = 3 / 4 * actual.predicted_change(part)
        np.testing.assert_allclose(predicted, change, atol=3 * (part * length) ** 3)
        assert abs(change).min() > 0.01 * part * length
