"""The theory's statements on the exactly solvable policy, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import loglinear
from grpo_jax.advantages import expected_group_std
from grpo_jax.loglinear import LogLinear

CLOSE = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def in_float64(x64):
    yield


def instances(count, responses=6, width=4, *, scale=1.5, seed=0, right=None):
    """`count` prompts side by side, each with features of its own: (policy, theta)."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, responses, width))
    rewards = rng.random((count, responses)) < rng.uniform(0.1, 0.9, (count, 1))
    rewards[:, 0], rewards[:, 1] = True, False  # some of either
    if right is not None:
        rewards = np.arange(responses)[None] < right
        rewards = np.broadcast_to(rewards, (count, responses))
    offsets = rng.normal(scale=scale, size=(count, responses))
    policy = LogLinear(features, rewards.astype(float), offsets)
    return policy, rng.normal(scale=0.5, size=width)


def pass_rates(policy, theta):
    return loglinear.exact(policy, theta).pass_rates


def spectral(hessians):
    return np.abs(np.linalg.eigvalsh(hessians)).max(-1)


# A1: gradients and Hessians are those of the pass rate itself.
def test_gradients_and_hessians_are_exact():
    policy, theta = instances(20)
    now = jax.jit(loglinear.exact)(policy, theta)
    rate = jax.jit(partial(pass_rates, policy))
    CLOSE(now.gradients, jax.jacrev(rate)(theta))
    CLOSE(jax.jit(loglinear.hessians)(policy, theta), jax.hessian(rate)(theta))


# A1: grad p = sigma^2 Delta, grad 2 asin sqrt p = sigma Delta, grad logit p = Delta.
@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_family_ascends_three_functions_of_the_pass_rate(power):
    policy, theta = instances(20)
    now = loglinear.exact(policy, theta)
    delta = loglinear.deltas(policy, theta)
    CLOSE(now.gradients, now.sigma[:, None] ** 2 * delta)
    gradients = jax.jacrev(lambda t: loglinear.ascended(power, pass_rates(policy, t)))(
        theta
    )
    CLOSE(gradients, now.sigma[:, None] ** (2 - power) * delta, rtol=1e-8)
    CLOSE(gradients, now.sigma[:, None] ** -power * now.gradients, rtol=1e-8)


# A1, B8: the Hessians in terms of the covariances given right and wrong.
def test_the_hessian_is_a_difference_of_covariances():
    policy, theta = instances(50)
    p = np.asarray(loglinear.exact(policy, theta).probabilities)
    r, x = policy.rewards, policy.features

    def covariance(weights):
        w = weights / weights.sum(1, keepdims=True)
        mean = np.einsum("pk,pkd->pd", w, x)
        centred = x - mean[:, None]
        return np.einsum("pk,pkd,pke->pde", w, centred, centred)

    rate = (p * r).sum(1)[:, None, None]
    delta = np.asarray(loglinear.deltas(policy, theta))
    outer = delta[:, :, None] * delta[:, None]
    spread = covariance(p * r) - covariance(p * (1 - r))
    sigma2 = rate * (1 - rate)
    CLOSE(
        loglinear.hessians(policy, theta),
        sigma2 * (spread + (1 - 2 * rate) * outer),
    )
    for power, expected in (
        (1, np.sqrt(sigma2) * (spread + (1 - 2 * rate) / 2 * outer)),
        (2, spread),
    ):
        actual = jax.hessian(
            lambda t: loglinear.ascended(power, pass_rates(policy, t))  # noqa: B023
        )(theta)
        CLOSE(actual, expected, rtol=1e-7, atol=1e-9)


# A2: kappa sigma^2 D^2 / 4, and its looser relatives, on 3,000 instances.
def test_the_hessian_bound_holds():
    policy, theta = instances(3000, scale=2.5)
    now = loglinear.exact(policy, theta)
    p, sigma = np.asarray(now.pass_rates), np.asarray(now.sigma)
    keep = sigma**2 > 1e-6
    norm = spectral(loglinear.hessians(policy, theta))[keep]
    diameter = np.asarray(loglinear.diameters(policy))[keep]
    p, sigma = p[keep], sigma[keep]
    bound = np.asarray(loglinear.hessian_bound(p, diameter))
    assert (norm <= bound * (1 + 1e-8)).all() and (norm / bound).max() > 0.5
    for looser in (
        sigma**2 * diameter**2,
        sigma * diameter**2 / 4,
        diameter**2 / (6 * 3**0.5) + 0 * p,
    ):
        assert (bound <= looser * (1 + 1e-8)).all()
    gradient = np.linalg.norm(np.asarray(now.gradients)[keep], axis=1)
    assert (gradient <= sigma**2 * diameter * (1 + 1e-9)).all()


# A3: two responses at distance D apart from a wrong (or right) crowd reach kappa. With
# features 0 and 1 on a line and p(right) = p, u' H u = sigma^2 (m1 - 2 p m1^2), largest
# at m1 = min(1, 1 / (4 p)), where m1 is the share of right mass at 1.
@pytest.mark.parametrize("p", [0.01, 0.1, 0.25, 0.4, 0.5])
def test_the_hessian_bound_is_sharp(p):
    share = min(1.0, 1 / (4 * p))
    mass = np.array([p * share, p * (1 - share), 1 - p])
    features = np.array([1.0, 0.0, 0.0])[None, :, None]
    rewards = np.array([[1.0, 1.0, 0.0]])
    policy = LogLinear(features, rewards, np.log(np.maximum(mass, 1e-300))[None])
    norm = spectral(loglinear.hessians(policy, np.zeros(1)))
    CLOSE(norm, loglinear.hessian_bound(jnp.array([p]), jnp.ones(1)), rtol=1e-7)


# General rewards: ||H|| <= sigma D^2 / 4 (0.2784 proved) and |grad| <= sigma D / 2.
def test_bounds_for_general_rewards():
    policy, theta = instances(3000)
    rewards = np.random.default_rng(1).normal(size=policy.rewards.shape)
    policy = policy._replace(rewards=rewards)
    now = loglinear.exact(policy, theta)
    diameter, sigma = loglinear.diameters(policy), now.sigma
    norm = spectral(loglinear.hessians(policy, theta))
    assert (norm <= sigma * diameter**2 / 4 * (1 + 1e-9)).all()
    gradient = np.linalg.norm(now.gradients, axis=1)
    assert (gradient <= sigma * diameter / 2 * (1 + 1e-9)).all()


# B8: the constants bound the Hessians of what each power ascends.
@pytest.mark.parametrize("power", [0, 1, 2])
def test_smoothness(power):
    policy, theta = instances(1000, scale=2.5)
    p = np.asarray(pass_rates(policy, theta))
    keep = (p > 1e-3) & (p < 1 - 1e-3)
    policy = jax.tree.map(lambda x: x[keep], policy)
    hessian = jax.jit(
        jax.hessian(lambda t: loglinear.ascended(power, pass_rates(policy, t)))
    )(theta)
    bound = loglinear.smoothness(power, loglinear.diameters(policy))
    ratio = spectral(hessian) / bound
    assert (ratio <= 1 + 1e-8).all() and ratio.max() > 0.3


# B1: one safe step raises the log-odds by at least the stated gain.
@pytest.mark.parametrize("power", [0, 1, 2])
def test_a_safe_step_gains_log_odds(power):
    policy, theta = instances(1500, scale=3.0)
    now = loglinear.exact(policy, theta)
    p = np.asarray(now.pass_rates)
    keep = (p > 1e-5) & (p < 1 - 1e-5)
    policy = jax.tree.map(lambda x: x[keep], policy)
    p, sigma = p[keep], now.sigma[keep]
    delta = loglinear.deltas(policy, theta)
    diameter = loglinear.diameters(policy)
    step = loglinear.safe_step(power, diameter) * sigma ** (2 - power)
    moved = policy.offsets + jnp.einsum(
        "pkd,pd->pk", policy.features, step[:, None] * delta
    )
    after = pass_rates(policy._replace(offsets=moved), theta)
    gain = loglinear.ascended(2, after) - loglinear.ascended(2, p)
    promised = loglinear.log_odds_gain(
        p, power, jnp.linalg.norm(delta, axis=1), diameter
    )
    assert (gain >= promised - 1e-9).all()
    higher = [
        loglinear.log_odds_gain(p, k, jnp.linalg.norm(delta, axis=1), diameter)
        for k in (0, 1, 2)
    ]
    assert (higher[0] <= higher[1]).all() and (higher[1] <= higher[2]).all()


# B4: dp/dt = sigma^(4 - power) at |Delta| = 1, integrated by small Euler steps.
@pytest.mark.parametrize("power", [0, 1, 2])
def test_flow_time(power):
    grid = np.linspace(0.05, 0.9, 200001)
    middle = (grid[1:] + grid[:-1]) / 2
    rate = (middle * (1 - middle)) ** ((4 - power) / 2)
    numeric = (np.diff(grid) / rate).sum()
    CLOSE(loglinear.flow_time(power, 0.05, 0.9), numeric, rtol=1e-6)


# B3: with one prompt, one-hot features of two responses and p0 = 1/2, the sum form of
# the paper's Theorem 3.2 fails from T = 36 on; the min form holds.
def test_theorem_3_2_holds_for_the_minimum_and_not_for_the_sum():
    policy = LogLinear(np.eye(2)[None], np.array([[1.0, 0.0]]))
    norm2 = 1.0  # spectral norm of the features, squared
    steps = 1000
    _, rates = loglinear.ascend(policy, np.zeros(2), 1.0, 1 / (2 * norm2), steps)
    p = np.asarray(rates)[:-1, 0]
    squared = 2 * (p * (1 - p)) ** 2  # |grad J|^2, Delta = (1, -1)
    t = np.arange(1, steps + 1)
    constant = 8 / 3 * np.cumsum(np.sqrt(p * (1 - p))) / t
    right = 2 * (1 - p[0]) * norm2 * constant
    assert (np.minimum.accumulate(squared) <= right / t + 1e-12).all()
    violated = np.cumsum(squared) > right
    assert t[violated][0] == 36 and violated[-1]
    CLOSE([np.cumsum(squared)[-1], right[-1]], [0.440, 0.033], rtol=0.02)


# B7: chi is 1 for prompts with features of their own, P where all share one direction.
def test_interference():
    rng = np.random.default_rng(0)
    apart = np.zeros((3, 4, 6))
    for p in range(3):
        apart[p, :, 2 * p : 2 * p + 2] = rng.normal(size=(4, 2))
    rewards = np.tile([1.0, 0, 0, 0], (3, 1))
    CLOSE(loglinear.interference(LogLinear(apart, rewards)), 1, rtol=1e-9)
    shared = np.zeros((3, 4, 6))
    shared[:, 0, 0] = 1
    CLOSE(loglinear.interference(LogLinear(shared, rewards)), 3, rtol=1e-9)
    policy, theta = instances(8, width=12)
    total = spectral(np.asarray(loglinear.hessians(policy, theta)).sum(0)[None])[0]
    largest = spectral(loglinear.hessians(policy, theta)).max()
    assert total <= float(loglinear.interference(policy)) * largest * (1 + 1e-9)


# D2: averaged over all groups, std-normalised gradients are w_G(p) Delta.
@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_what_a_finite_group_estimates(group_size):
    policy, theta = instances(1, responses=3, right=1)
    now = loglinear.exact(policy, theta)
    p = np.asarray(now.probabilities)[0]
    scores = policy.features[0] - p @ policy.features[0]
    total = 0
    for group in np.ndindex(*[3] * group_size):
        r = policy.rewards[0][list(group)]
        if r.std() > 0:
            a = (r - r.mean()) / r.std()
            total = total + p[list(group)].prod() * (a @ scores[list(group)])
    weight = expected_group_std(now.pass_rates, group_size)[0] * group_size
    CLOSE(total, weight * np.asarray(loglinear.deltas(policy, theta))[0])
