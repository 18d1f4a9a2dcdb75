"""What groups and sketches estimate, exactly: every group enumerated, in float64.

Each test names the statements of the theory that it holds (D: estimators, F: the
U-statistic and its mean squared error).
"""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.jet import jet

from grpo_jax import loglinear
from grpo_jax.advantages import (
    centred_advantages,
    expected_group_std,
    leave_one_out_advantages,
    whitened_advantages,
)
from grpo_jax.diagnostics.curvature import directional_derivatives, prompt_curvature
from grpo_jax.diagnostics.geometry import prompt_geometry
from grpo_jax.diagnostics.sketch import gradient_sketch, sketch_gram
from grpo_jax.loglinear import LogLinear

CLOSE = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)


@pytest.fixture(autouse=True)
def in_float64(x64):
    yield


def bandit(group_size, rewards=(1.0, 0.0, 1.0), seed=0):
    """A prompt with three responses, and every group of them with its probability."""
    rng = np.random.default_rng(seed)
    features, offsets = rng.normal(size=(3, 4)), rng.normal(size=3)
    rewards, zero = np.asarray(rewards), np.zeros(4)
    policy = LogLinear(features[None], rewards[None], offsets[None])
    result = jax.jit(loglinear.exact)(policy, zero)
    p = np.asarray(result.probabilities)[0]
    groups = np.array(list(itertools.product(range(3), repeat=group_size)))
    scores = features - p @ features
    return SimpleNamespace(
        policy=policy, p=p, scores=scores, all_rewards=rewards, groups=groups,
        rewards=rewards[groups], group_scores=scores[groups],
        chance=p[groups].prod(1), mean=float(result.pass_rates[0]),
        variance=float(result.sigma[0]) ** 2, gradient=np.asarray(result.gradients)[0],
    )  # fmt: skip


def estimates(advantages, b):
    """[groups, D] each group's gradient, mean of A s."""
    weights = np.asarray(jax.jit(advantages)(b.rewards))
    return np.einsum("ng,ngd->nd", weights, b.group_scores) / weights.shape[1]


# ---- D: curvature and finite groups


# D1: E of prompt_curvature is u' H u = E[(r - p) (l'^2 + l'')]; of the group-mean
# version (G - 1) / G of it. Advantages over the std estimate something else (except at
# G = 2: see D4). l'' is the same for all responses of a log-linear policy, else not.
@pytest.mark.parametrize("log_linear", [True, False])
@pytest.mark.parametrize("group_size", [2, 4])
def test_curvature_from_groups(group_size, log_linear):
    b, u = bandit(group_size), np.array([0.5, -1, 2, 0.3])
    first = b.scores @ u
    second = -np.full(3, b.p @ first**2) if log_linear else np.array([0.4, -2, 1.1])
    truth = (b.p * (b.all_rewards - b.mean)) @ (first**2 + second)
    if log_linear:
        hessian = jax.jit(loglinear.hessians)(b.policy, np.zeros(4))[0]
        CLOSE(truth, u @ np.asarray(hessian) @ u)
    curvature = jax.jit(prompt_curvature)(b.rewards, first[b.groups], second[b.groups])
    CLOSE(b.chance @ np.asarray(curvature), truth)

    def expected(advantages):
        weights = np.asarray(jax.jit(advantages)(b.rewards))
        return b.chance @ (weights * (first**2 + second)[b.groups]).mean(1)

    CLOSE(expected(centred_advantages), (1 - 1 / group_size) * truth)
    bias = abs(expected(partial(whitened_advantages, eps=0.0)) / truth - 1)
    assert bias > 0.1 if group_size > 2 else bias < 1e-9


# D2: E of the std-normalised gradient is w_G(p) Delta, with ddof 1 sqrt((G - 1) / G) of
# it; of the centred one (G - 1) / G grad J, of the leave-one-out one grad J.
@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_what_each_advantage_estimates(group_size):
    b, share = bandit(group_size), 1 - 1 / group_size
    weight = float(expected_group_std(b.mean, group_size))
    delta = b.gradient / b.variance
    for advantages, expected in (
        (partial(whitened_advantages, eps=0.0), weight * delta),
        (partial(whitened_advantages, eps=0.0, ddof=1), share**0.5 * weight * delta),
        (centred_advantages, share * b.gradient),
        (leave_one_out_advantages, b.gradient),
    ):
        CLOSE(b.chance @ estimates(advantages, b), expected)


# D3: the debiased |grad J|^2 is the mean over distinct (i, j, k, l) of
# (r_i - r_j) (r_k - r_l) <s_i, s_k>; over all groups its mean is exact, and the raw one
# is above by the variance of F2.
def test_the_debiased_norm_is_a_mean_over_quadruples():
    rng = np.random.default_rng(0)
    r, gram = rng.normal(size=(1, 6)), rng.normal(size=(6, 6))
    gram = gram + gram.T
    result = jax.jit(prompt_geometry)(r, gram[None, :, None])
    terms = [
        (r[0, i] - r[0, j]) * (r[0, k] - r[0, m]) * gram[i, k]
        for i, j, k, m in itertools.permutations(range(6), 4)
    ]
    CLOSE(result.squared_norms, np.mean(terms))


@jax.jit
@jax.vmap
def norms_of(rewards, scores):
    gram = jnp.einsum("gd,hd->gh", scores, scores)[None, :, None]
    result = prompt_geometry(rewards[None], gram)
    return result.squared_norms[0], result.raw_squared_norms[0]


# D3, D8: over all groups the debiased square is that of the gradient, the raw one is
# above it by tr Cov, which falls as 1 / G: that is what shrinks cosines. A tied group
# (NaN) counts as 0.
def test_the_inflation_of_norms():
    excess = []
    for group_size in (4, 6):
        b = bandit(group_size, rewards=(1.0, 0.0, 0.5))
        debiased, raw = map(np.nan_to_num, norms_of(b.rewards, b.group_scores))
        truth = b.gradient @ b.gradient
        CLOSE(b.chance @ debiased, truth)
        CLOSE(b.chance @ raw - truth, mean_squared_error(b, group_size))
        excess.append(b.chance @ raw / truth - 1)
    assert 6 / 4 < excess[0] / excess[1] < 30 / 12 and excess[1] > 0.2


# D4: at G = 2 and 3 std normalisation is a rescale of REINFORCE, sample by sample: the
# std of a group that is not tied has one value; at G = 4 it has two.
@pytest.mark.parametrize(
    ("group_size", "factors"), [(2, [2]), (3, [4.5**0.5]), (4, [2, (16 / 3) ** 0.5])]
)
def test_small_groups_only_rescale(group_size, factors):
    rewards = np.array(list(itertools.product((0.0, 1.0), repeat=group_size)))[1:-1]
    white = jax.jit(partial(whitened_advantages, eps=0.0))(rewards)
    ratio = np.asarray(white) / np.asarray(jax.jit(centred_advantages)(rewards))
    CLOSE(np.unique(ratio.round(9)), factors, rtol=1e-8)
    if group_size < 4:
        p = np.linspace(0.001, 0.999, 99)
        weight = jax.jit(expected_group_std, static_argnums=1)(p[:, None], group_size)
        CLOSE(weight[:, 0], p * (1 - p) * {2: 1, 3: 2**0.5}[group_size])


# D5: w_G / sigma^2 -> sqrt(G - 1) as p -> 0, not 1 / sigma. D5b: E[std] / sigma.
def test_the_weight_of_a_finite_group():
    def relative(p, group_size, power):
        weight = expected_group_std(np.array([p]), group_size)[0]
        return float(weight) / (p * (1 - p)) ** (power / 2)

    amplified = [relative(1e-4, g, 2) for g in (16, 64)]
    CLOSE(amplified, [3.87, 7.92], atol=0.005)
    CLOSE([relative(1e-9, g, 2) for g in (4, 16, 64)], np.sqrt([3, 15, 63]), rtol=1e-6)
    table = {4: (0.808, 0.507, 0.241), 16: (0.967, 0.854, 0.504)}
    table[64] = (0.992, 0.976, 0.821)
    for group_size, row in table.items():
        result = [relative(p, group_size, 1) for p in (0.5, 0.1, 0.02)]
        CLOSE(result, row, atol=6e-4)


# ---- D: sketches


def over_all_signs(width, directions):
    signs = list(itertools.product((-1.0, 1.0), repeat=width * directions))
    return np.array(signs).reshape(-1, width, directions)


# D6: over all draws E of the sketched Gram matrix is K; its variance with Rademacher is
# (|a|^2 |b|^2 + <a, b>^2 - 2 sum a^2 b^2) / k, with normal directions without the last
# term (three-point quadrature is exact); and the square of <a, b> without its bias.
def test_moments_of_a_sketch():
    a, b = np.random.default_rng(0).normal(size=(2, 4))
    inner, norms = a @ b, (a @ a) * (b @ b)
    draws = over_all_signs(4, 2)  # [256, D, k]
    sketch = np.einsum("xd,ndk->nxk", [a, b], draws)[:, :, None]
    gram = np.asarray(jax.jit(jax.vmap(sketch_gram))(sketch))[:, 0, 0, 1, 0]
    CLOSE(gram.mean(), inner)
    variance = (norms + inner**2 - 2 * (a**2 * b**2).sum()) / 2
    CLOSE(gram.var(), variance)
    nodes = np.array(list(itertools.product(np.sqrt([0, 3, 3]) * [1, 1, -1], repeat=4)))
    chance = np.where(nodes == 0, 2 / 3, 1 / 6).prod(1)
    product = (nodes @ a) * (nodes @ b)
    CLOSE(chance @ product, inner)
    CLOSE((chance @ product**2 - inner**2) / 2, (norms + inner**2) / 2)
    assert variance < (norms + inner**2) / 2
    terms = sketch[:, 0, 0] * sketch[:, 1, 0]
    CLOSE(((terms.sum(1) ** 2 - (terms**2).sum(1)) / 2).mean(), inner**2)


# D6: E sqrt(chi^2_k / k) = c_k: .9845 at 16, .9961 at 64; the relative sd of |g|^2 is
# sqrt(2 / k). Both of sketches, whose directions are signs, in a wide space.
def test_norms_from_a_sketch():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 400))
    for k, expected in ((16, 0.9845), (64, 0.9961)):
        c = math.sqrt(2 / k) * math.exp(math.lgamma((k + 1) / 2) - math.lgamma(k / 2))
        CLOSE(c, expected, atol=5e-5)
        v = rng.choice([-1.0, 1.0], size=(400, 400, k))  # a draw for each
        s = np.einsum("xd,xdk->xk", vectors[:400], v)
        square = (s**2).mean(1) / (vectors[:400] ** 2).sum(1)
        assert abs(np.sqrt(square).mean() - c) < 4 * (0.5 / k / 400) ** 0.5
        CLOSE(square.std(), (2 / k) ** 0.5, rtol=0.15)


# D7: of orthogonal vectors a sketch of K directions shows a mean |cos| of
# sqrt(2 / (pi K)) and a mean cos^2 of 1 / K; at cosine rho the sd is
# (1 - rho^2) / sqrt K.
def test_the_noise_floor_of_cosines():
    rng, width = np.random.default_rng(0), 600
    q = np.linalg.qr(rng.normal(size=(width, width)))[0][:150]
    partner = 0.6 * q[:75] + 0.8 * q[75:]

    @jax.jit
    def draw(scores, key):
        zero = jnp.zeros(width)
        return gradient_sketch(lambda x: (scores @ x)[:, None], zero, key, 256)

    scores = np.concatenate([q, partner])
    sketch = np.asarray(draw(scores, jax.random.key(0)))[:, 0]
    for k, floor in ((16, 0.20), (64, 0.10), (256, 0.050)):
        unit = sketch[:, :k] / np.linalg.norm(sketch[:, :k], axis=1, keepdims=True)
        rows, columns = np.triu_indices(150, 1)
        cosines = (unit @ unit.T)[rows, columns]
        CLOSE(np.abs(cosines).mean(), (2 / (np.pi * k)) ** 0.5, rtol=0.04)
        CLOSE((cosines**2).mean(), 1 / k, rtol=0.06)
        CLOSE((2 / (np.pi * k)) ** 0.5, floor, atol=0.0015)
        for partners, rho in ((unit[:75], 0.6), (unit[75:150], 0.8)):
            sd = ((partners * unit[150:]).sum(1)).std()
            CLOSE(sd, (1 - rho**2) / k**0.5, rtol=0.3)


# ---- D9: the second derivative


# D9: nested jvp and second-order Taylor mode agree. D9b: by counted operations nested
# jvp is the cheaper, at about 4.3 forward passes where a gradient or a jvp takes 2.75.
def test_nested_jvp_is_taylor_mode_and_cheaper():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(32, 32)) / 6 for _ in range(4)]
    direction = [rng.normal(size=(32, 32)) for _ in range(4)]
    x = rng.normal(size=(64, 32))

    def log_probs(weights):
        hidden = x
        for w in weights:
            hidden = hidden + jnp.tanh(hidden @ w)
        return jax.nn.log_softmax(hidden)[:, :1]

    def nested(weights):
        return directional_derivatives(log_probs, weights, direction)[1:]

    def taylor(weights):
        series = [[d, jnp.zeros_like(d)] for d in direction]
        return jet(lambda *w: log_probs(w), weights, series)[1]

    CLOSE(jax.jit(nested)(weights), jax.jit(taylor)(weights), rtol=1e-8, atol=1e-9)

    def cost(function):
        return jax.jit(function).lower(weights).compile().cost_analysis()["flops"]

    forward = cost(log_probs)
    assert 4 < cost(nested) / forward < 4.6 and cost(taylor) > 1.1 * cost(nested)
    grad = cost(jax.grad(lambda weights: log_probs(weights).sum()))
    jvp = cost(lambda weights: jax.jvp(log_probs, (weights,), (direction,)))
    CLOSE([grad / forward, jvp / forward], 2.75, rtol=0.1)


# ---- F: the U-statistic


def mean_squared_error(b, group_size):
    """F2: tr Cov(s (z - V)) / G + (sigma^2 E|s|^2 + |g|^2) / (G (G - 1))."""
    first, pair = error_parts(b)
    return first / group_size + pair / (group_size * (group_size - 1))


def error_parts(b):
    oracle = b.scores * (b.all_rewards - b.mean)[:, None]
    squared = b.gradient @ b.gradient
    noise = b.p @ (oracle**2).sum(1) - squared
    return noise, b.variance * (b.p @ (b.scores**2).sum(1)) + squared


# F1: the leave-one-out gradient is the mean over pairs of (s_i - s_j) (r_i - r_j) / 2.
def test_leave_one_out_is_a_u_statistic():
    rng = np.random.default_rng(0)
    rewards, scores = rng.normal(size=(1000, 5)), rng.normal(size=(1000, 5, 3))
    loo = np.asarray(jax.jit(leave_one_out_advantages)(rewards))
    kernel = [
        (rewards[:, i] - rewards[:, j])[:, None] * (scores[:, i] - scores[:, j]) / 2
        for i, j in itertools.combinations(range(5), 2)
    ]
    gradient = np.einsum("pg,pgd->pd", loo, scores) / 5
    CLOSE(gradient, np.mean(kernel, axis=0), rtol=1e-8)


# F2: the exact mean squared error of the leave-one-out gradient, any rewards.
@pytest.mark.parametrize("rewards", [(1, 0, 1), (0.3, -2, 5)])
@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_the_error_of_leave_one_out(group_size, rewards):
    b = bandit(group_size, rewards=np.array(rewards, float))
    error = estimates(leave_one_out_advantages, b) - b.gradient
    CLOSE(b.chance @ (error**2).sum(1), mean_squared_error(b, group_size))


# F3: 2 h_1(y) = E_y' [(s - s') (z - z')] = s (z - V) + g, not s (z - V) alone.
def test_the_projection_of_the_kernel():
    b = bandit(2, rewards=(0.3, -2.0, 5.0))
    gaps = b.scores[:, None] - b.scores[None]
    differences = b.all_rewards[:, None] - b.all_rewards[None]
    projected = np.einsum("j,ij,ijd->id", b.p, differences, gaps)
    centred = b.scores * (b.all_rewards - b.mean)[:, None]
    CLOSE(projected, centred + b.gradient)
    assert np.abs(b.gradient).max() > 0.1


# F4: at a fixed number N = B G of samples c1 / B + c2 / (B G) + c3 / (B G (G - 1)), the
# error of enumerated groups, is least at G* = 1 + sqrt(c3 / c1), whatever N.
def test_the_best_group_size():
    prompts = [[bandit(g, seed=seed) for seed in range(8)] for g in (2, 4)]
    gradients = np.array([b.gradient for b in prompts[0]])
    c1 = ((gradients - gradients.mean(0)) ** 2).sum(1).mean()
    c2, c3 = np.mean([error_parts(b) for b in prompts[0]], axis=0)

    def error(g, total):
        return (c1 + c2 / g + c3 / (g * (g - 1))) / (total / g)

    for g, drawn in zip((2, 4), prompts, strict=True):
        squares = [
            b.chance @ ((estimates(leave_one_out_advantages, b) - mean) ** 2).sum(1)
            for b in drawn
            for mean in [gradients.mean(0)]
        ]
        CLOSE(np.mean(squares) / 10, error(g, 10 * g))  # B = 10 prompts drawn
    grid = np.linspace(1.01, 20, 100001)
    for total in (64, 4096):
        best = grid[error(grid, total).argmin()]
        CLOSE(best, 1 + (c3 / c1) ** 0.5, rtol=1e-3)
