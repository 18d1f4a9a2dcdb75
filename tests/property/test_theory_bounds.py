"""The theory's bounds and rates on many random instances, in float64.

Each test names the statements it holds (A: identities and curvature, B: rates). Bounds
are asserted where sigma^2 > 1e-6: nearer to 0 and 1 rounding dominates.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import loglinear
from grpo_jax.diagnostics.geometry import prompt_geometry
from grpo_jax.loglinear import LogLinear
from tests.property.test_loglinear import instances, spectral

CLOSE = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
ABOVE = 1 + 1e-8  # rounding


@pytest.fixture(autouse=True)
def in_float64(x64):
    yield


@jax.jit
def everything(policy):
    zero = jnp.zeros(policy.features.shape[-1])
    result = loglinear.exact(policy, zero)
    rest = (loglinear.hessians, loglinear.deltas)
    return result, *(f(policy, zero) for f in rest), loglinear.diameters(policy)


def facts_of(policy):
    """Exact figures of independent prompts at theta 0, where sigma^2 > 1e-6."""
    result, hessians, deltas, diameter = everything(policy)
    keep = np.asarray(result.sigma) ** 2 > 1e-6
    kept = jax.tree.map(lambda x: np.asarray(x)[keep], policy)
    mass, p, sigma, gradients, hessians, deltas, diameter = (
        np.asarray(x)[keep] for x in (*result, hessians, deltas, diameter)
    )
    scores = kept.features - np.einsum("pk,pkd->pd", mass, kept.features)[:, None]
    return SimpleNamespace(
        policy=kept, mass=mass, p=p, sigma=sigma, gradients=gradients,
        hessians=hessians, deltas=deltas, diameter=diameter, scores=scores,
        norm=spectral(hessians), slope=np.linalg.norm(gradients, axis=1),
        fisher=np.einsum("pk,pkd,pke->pde", mass, scores, scores),
        largest=np.linalg.norm(kept.features, ord=2, axis=(1, 2)),  # X, spectral
    )  # fmt: skip


def shifted(policy, move):
    """Each prompt's own parameters moved by its row of [P, D]."""
    change = np.einsum("pkd,pd->pk", policy.features, move)
    return policy._replace(offsets=policy.offsets + change)


def at_zero(policy, theta):
    return shifted(policy, np.broadcast_to(theta, (len(policy.features), len(theta))))


def sample(count, **changes):
    return at_zero(*instances(count, **changes))


def pair(p):
    """Two responses at 1 and -1, right with probability p: D = 2, X = sqrt 2, B = 1."""
    p = np.asarray(p)
    offsets = np.stack([np.log(p), np.log1p(-p)], 1)
    features = np.tile([[1.0], [-1.0]], (len(p), 1, 1))
    return LogLinear(features, np.tile([1.0, 0.0], (len(p), 1)), offsets)


# ---- A: curvature and gradients


# A2: all rows of the table of bounds on |H|; B <= X <= sqrt(K) B, D <= 2 B, sqrt 2 X.
@pytest.mark.parametrize(("responses", "scale"), [(6, 2.5), (2, 2.5)])
def test_the_table_of_hessian_bounds(responses, scale):
    facts = facts_of(sample(3000, responses=responses, scale=scale))
    variance, diameter = facts.sigma**2, facts.diameter
    far = np.linalg.norm(facts.scores, axis=2).max(1)
    row = np.linalg.norm(facts.policy.features, axis=2).max(1)
    for scaled in (diameter, far, 2 * row, 2**0.5 * facts.largest):
        assert (facts.norm <= variance * scaled**2 * ABOVE).all()
    assert (facts.norm <= facts.sigma * diameter**2 / 4 * ABOVE).all()
    assert (facts.norm <= diameter**2 / (6 * 3**0.5) * ABOVE).all()
    assert (row <= facts.largest * ABOVE).all() and (diameter <= 2 * row * ABOVE).all()
    assert (facts.largest <= responses**0.5 * row * ABOVE).all()
    assert (diameter <= 2**0.5 * facts.largest * ABOVE).all()


# A2, A3, A4: two responses reach them: |H| = sigma^2 |1 - 2p| D^2. As p -> 0 the bounds
# sigma^2 times D^2, F^2, 4 B^2, 2 X^2; at their maxima sigma D^2 / 4, D^2 / (6 sqrt 3).
def test_two_responses_reach_the_bounds():
    p = np.array([2e-6, (1 - 0.5**0.5) / 2, (1 - 3**-0.5) / 2])
    facts = facts_of(pair(p))
    CLOSE(facts.norm, facts.sigma**2 * np.abs(1 - 2 * p) * 4)
    far = np.abs(facts.scores).max((1, 2))
    for squared in (facts.diameter**2, far**2, 4 * np.ones(3), 2 * facts.largest**2):
        CLOSE(facts.norm[0], facts.sigma[0] ** 2 * squared[0], rtol=1e-5)
    CLOSE(facts.norm[1], facts.sigma[1] * 4 / 4)
    CLOSE(facts.norm[2], 4 / (6 * 3**0.5))
    grid = facts_of(pair(np.linspace(0.01, 0.99, 981)))
    assert grid.norm.max() <= facts.norm[2] * ABOVE  # no pair exceeds the global bound
    assert (grid.norm / grid.sigma).max() <= ABOVE


# A2, A6: |grad| <= sigma^2 D <= 2 B sigma^2 (binary); for any rewards <= sigma
# sqrt(lmax F) <= sigma D / 2 <= sigma X / sqrt 2: at most X / (2 sqrt 2), not X / 2.
def test_gradient_bounds():
    policy = sample(3000, scale=2.5)
    facts = facts_of(policy)
    row = np.linalg.norm(facts.policy.features, axis=2).max(1)
    assert (facts.slope <= facts.sigma**2 * facts.diameter * ABOVE).all()
    assert (facts.slope <= 2 * row * facts.sigma**2 * ABOVE).all()
    rewards = np.random.default_rng(1).normal(size=policy.rewards.shape)
    for any_rewards in (facts, facts_of(policy._replace(rewards=rewards))):
        root = np.sqrt(np.linalg.eigvalsh(any_rewards.fisher)[:, -1])
        assert (any_rewards.slope <= any_rewards.sigma * root * ABOVE).all()
        assert (root <= any_rewards.diameter / 2 * ABOVE).all()
    two = facts_of(pair([0.5]))
    CLOSE(two.slope, two.largest / 8**0.5)
    CLOSE(two.slope, two.sigma * two.diameter / 2)


# A2 (3.1): |u' H u| <= max(p, 1 - p) u' F u for every u, so F bounds the curvature.
def test_the_fisher_information_bounds_the_curvature():
    facts = facts_of(sample(3000, scale=2.5))
    bound = np.maximum(facts.p, 1 - facts.p)[:, None, None] * facts.fisher
    lowest = [np.linalg.eigvalsh(bound + s * facts.hessians)[:, 0] for s in (1, -1)]
    assert (np.array(lowest) >= -1e-12 * facts.diameter**2).all()
    tighter = np.linalg.eigvalsh(0.8 * bound - facts.hessians)[:, 0]
    assert (tighter < -1e-6).any()


# A5: |H| <= sigma sup_u sd((u . s)^2) <= .2784 sigma D^2 for any rewards, and there is
# no bound by sigma^2: with rewards scaled by c, |H| / sigma^2 grows as 1 / c.
def test_the_hessian_bound_of_general_rewards():
    policy = sample(3000)
    rewards = np.random.default_rng(1).normal(size=policy.rewards.shape)
    facts = facts_of(policy._replace(rewards=rewards))
    values, vectors = np.linalg.eigh(facts.hessians)
    top = np.abs(values).argmax(1)[:, None, None]
    u = np.take_along_axis(vectors, top, 2)[..., 0]
    w = np.einsum("pkd,pd->pk", facts.scores, u) ** 2
    spread = np.sqrt((facts.mass * w**2).sum(1) - (facts.mass * w).sum(1) ** 2)
    assert (facts.norm <= facts.sigma * spread * ABOVE).all()
    assert (spread <= 0.2784 * facts.diameter**2).all()
    result, hessians, _, _ = everything(policy._replace(rewards=rewards / 100))
    ratio = spectral(hessians) / np.asarray(result.sigma) ** 2
    CLOSE(ratio, 100 * facts.norm / facts.sigma**2, rtol=1e-7)


# A5, A6: sd((z - m)^2) <= 1/4 of any three values of range 1, reached by two of them.
# The proof's m sqrt((1 - m)(2 m - 1)) is at most .2784.
def test_the_constant_of_general_rewards():
    first, last, middle = np.meshgrid(*[np.linspace(0, 1, 61)] * 3)
    fits = first + last <= 1
    mass = np.stack([first, 1 - first - last, last])[:, fits]
    z = np.stack([np.zeros_like(middle), middle, np.ones_like(middle)])[:, fits]
    w = (z - (mass * z).sum(0)) ** 2
    sd = np.sqrt(np.maximum((mass * w**2).sum(0) - (mass * w).sum(0) ** 2, 0))
    assert 0.2499 < sd.max() <= 0.25 * ABOVE
    m = np.linspace(2 / 3, 1, 10001)  # below 2/3 it is m^2 / 2 <= 2/9
    CLOSE((m * np.sqrt((1 - m) * (2 * m - 1))).max(), 0.2784, atol=1e-4)


# A7, A7b: |H(theta')| <= (5/2) X^2 sigma(theta) for |theta' - theta| <= sigma / X, and
# with D / 2 for X; with several right responses as with one.
@pytest.mark.parametrize("right", [1, None])
def test_non_uniform_local_smoothness(right):
    facts = facts_of(sample(2000, scale=2.5, right=right))
    for radius in (facts.largest, facts.diameter / 2):
        largest = 0
        wander = np.random.default_rng(0).normal(size=facts.gradients.shape)
        for direction in (facts.deltas, -facts.deltas, wander):
            length = np.linalg.norm(direction, axis=1, keepdims=True)
            move = direction / length * (facts.sigma / radius)[:, None]
            moved = everything(shifted(facts.policy, move))[1]
            ratio = spectral(moved) / (2.5 * radius**2 * facts.sigma)
            assert (ratio <= ABOVE).all()
            largest = max(largest, ratio.max())
    assert largest > 0.25  # the last radius is the smaller one


def curved_log_probs(theta, inner, outer):
    return jax.nn.log_softmax(outer @ jnp.tanh(inner @ theta))


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, 0, 0))
def curved(theta, inner, outer, rewards):
    """Of policies that are not log-linear: (p, s, log pi'', J', J'', (2 asin)')."""
    log_probs = partial(curved_log_probs, inner=inner, outer=outer)

    def mean(theta):
        return jnp.exp(log_probs(theta)) @ rewards

    def angle(theta):
        return loglinear.ascended(1, mean(theta))

    return (
        jnp.exp(log_probs(theta)), jax.jacfwd(log_probs)(theta),
        jax.jacfwd(jax.jacrev(log_probs))(theta), jax.grad(mean)(theta),
        jax.hessian(mean)(theta), jax.grad(angle)(theta),
    )  # fmt: skip


# A8, A1: for any policy and constant b, H = E[(r - b)(s s' + log pi'')], |grad| <=
# sigma sqrt(lmax F) <= sigma G, |H| <= sigma (G^2 + 2 S) / 2; for binary rewards also
# |H| <= sigma^2 (G^2 + 2 S) <= 2 sigma^2 (G^2 + S). grad 2 asin sqrt p = grad p / sd.
@pytest.mark.parametrize("binary", [True, False])
def test_bounds_for_any_differentiable_policy(binary, count=1200):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(count, 4))
    if binary:
        rewards = (rewards > 0).astype(float)
        rewards[:, :2] = [1, 0]
    else:
        rewards = 1 / (1 + np.exp(-rewards))
    theta, inner = rng.normal(size=(count, 2)), rng.normal(size=(count, 3, 2))
    outer = 2 * rng.normal(size=(count, 4, 3))
    p, s, second, gradient, hessian, angle = (
        np.asarray(x) for x in curved(theta, inner, outer, rewards)
    )
    mean = (p * rewards).sum(1)
    sigma = np.sqrt((p * (rewards - mean[:, None]) ** 2).sum(1))
    inside = s[..., :, None] * s[..., None, :] + second
    weight = p * (rewards - rng.normal(size=(count, 1)))
    CLOSE(hessian, np.einsum("pk,pkde->pde", weight, inside), rtol=1e-7)
    g = np.linalg.norm(s, axis=2).max(1)
    bend = np.abs(np.linalg.eigvalsh(second)).max((1, 2))
    fisher = np.einsum("pk,pkd,pke->pde", p, s, s)
    root = np.sqrt(np.linalg.eigvalsh(fisher)[:, -1])
    slope = np.linalg.norm(gradient, axis=1)
    assert (slope <= sigma * root * ABOVE).all() and (root <= g * ABOVE).all()
    norm = spectral(hessian)
    assert (norm <= sigma * (g**2 + 2 * bend) / 2 * ABOVE).all()
    if binary:
        keep = sigma**2 > 1e-6
        ratio = norm[keep] / (sigma**2 * (g**2 + 2 * bend))[keep]
        assert ratio.max() <= ABOVE and ratio.max() > 0.3
        CLOSE(angle[keep], gradient[keep] / sigma[keep, None], rtol=1e-6)


# A9: F = p C1 + (1 - p) C0 where H = sigma^2 (C1 - C0): as a prompt is nearly never
# solved H vanishes and F does not; over random prompts |H| follows sigma^2, F does not.
def test_the_fisher_information_is_not_the_curvature():
    facts = facts_of(sample(4000, right=1))
    rewards, trace = facts.policy.rewards, np.trace(facts.fisher, axis1=1, axis2=2)
    second = []
    for r in (rewards, 1 - rewards):
        mass = facts.mass * r / (facts.mass * r).sum(1, keepdims=True)
        second.append(np.einsum("pk,pkd,pke->pde", mass, facts.scores, facts.scores))
    p, variance = facts.p[:, None, None], facts.sigma**2
    CLOSE(facts.fisher, p * second[0] + (1 - p) * second[1])
    CLOSE(facts.hessians, variance[:, None, None] * (second[0] - second[1]), rtol=1e-7)
    spread = np.corrcoef([facts.norm, trace, variance])
    assert spread[0, 2] > 0.5 and spread[1, 2] < 0.35 and spread[0, 1] < 0.45
    policy = sample(100, right=1)
    rare = policy._replace(offsets=policy.offsets - 30 * policy.rewards)
    _, hessians, _, diameter = everything(rare)
    assert (spectral(hessians) < 1e-8 * np.asarray(diameter) ** 2).all()
    mass = np.asarray(everything(rare)[0].probabilities)
    scores = rare.features - np.einsum("pk,pkd->pd", mass, rare.features)[:, None]
    assert (np.einsum("pk,pkd->p", mass, scores**2) > 1e-3).all()


# ---- B: steps, rates, interference


# Of prompts with parameters of their own: each row of the result [steps, P].
@partial(jax.jit, static_argnames="steps")
def runs(policy, power, step, steps):
    """(pass rates, sigma, |grad J|^2) along theta += step sigma^-power grad J."""
    zero = jnp.zeros(policy.features.shape[-1])

    def one(offsets, _):
        result = loglinear.exact(policy._replace(offsets=offsets), zero)
        update = (step * result.sigma**-power)[:, None] * result.gradients
        moved = offsets + jnp.einsum("pkd,pd->pk", policy.features, update)
        squared = (result.gradients**2).sum(1)
        return moved, (result.pass_rates, result.sigma, squared)

    return jax.lax.scan(one, policy.offsets, length=steps)[1]


def visited(values, num_prompts):
    """E of values[k], k the steps a prompt had had before each time t, if every step
    draws one of `num_prompts`: [T, P] from [T, P]."""
    mass, rows = np.eye(1, len(values))[0], []
    for _ in values:
        rows.append(mass @ values)
        mass = mass * (1 - 1 / num_prompts) + np.roll(mass, 1) / num_prompts
    return np.array(rows)


STEPS = 150


# B2: theorem 3.1, sum_t E|grad J_i|^2 <= 2 n (1 - p_i(0)) X^2 with steps 1 / X^2, holds
# with X the spectral norm, with D / 2, and with one prompt drawn at a time.
@pytest.mark.parametrize("constant", ["X", "D/2"])
def test_the_rate_of_reinforce(constant):
    facts = facts_of(sample(1500))
    x2 = facts.largest**2 if constant == "X" else facts.diameter**2 / 4
    rate, _, squared = map(np.asarray, runs(facts.policy, 0.0, 1 / x2, STEPS))
    for n in (1, 3):
        total = visited(squared, n).sum(0)
        ratio = total / (2 * n * (1 - rate[0]) * x2)
        assert (ratio <= ABOVE).all() and ratio.max() > 0.1
    # One step: J rises by |grad J|^2 / (2 X^2) at least (L3.1's smoothness).
    assert (np.diff(rate, axis=0) >= squared[:-1] / (2 * x2) - 1e-12).all()


# B2, B3: theorem 3.2 in its min form, and its one-step gain 3 |grad J|^2 / (16 X^2 C)
# with C = sigma, for steps 1 / (2 X^2), with X the spectral norm and with D / 2.
@pytest.mark.parametrize("constant", ["X", "D/2"])
def test_the_rate_of_grpo(constant):
    facts = facts_of(sample(1500))
    x2 = facts.largest**2 if constant == "X" else facts.diameter**2 / 4
    out = runs(facts.policy, 1.0, 1 / (2 * x2), STEPS)
    rate, sigma, squared = map(np.asarray, out)
    t = np.arange(1, STEPS + 1)[:, None]
    level = 8 / (3 * t) * np.cumsum(sigma, 0)
    bound = 2 * (1 - rate[0]) * x2 / t * level
    assert (np.minimum.accumulate(squared) <= bound * ABOVE).all()
    worst = 3 * 2 * (1 - rate[0]) * x2 / t * 8 / (3 * t)  # n = 3, C >= sigma so far
    worst *= np.cumsum(np.maximum.accumulate(sigma), 0)
    assert (np.minimum.accumulate(visited(squared, 3)) <= worst * ABOVE).all()
    gain = 3 * squared / (16 * x2 * sigma)
    assert (np.diff(rate, axis=0) >= gain[:-1] - 1e-12).all()
    assert (np.diff(rate, axis=0) < 4 * gain[:-1]).any()


# 2.4, 2.7: C(T) < 1 iff the mean sigma is below 3/8: p outside [.17, .83]; C is 4/3 at
# p = 1/2, .8 at p = .1, and pi/3 over uniform p. A sharp X^2 moves 3/8 to .144.
def test_when_theorem_3_2_promises_a_gain():
    sigma = np.sqrt(np.prod([[0.1, 0.5, 0.17, 0.1646], [0.9, 0.5, 0.83, 0.8354]], 0))
    CLOSE(8 / 3 * sigma[:2], [0.8, 4 / 3])
    assert 8 / 3 * sigma[2] > 1 > 8 / 3 * sigma[3]
    p = (np.arange(100000) + 0.5) / 100000
    CLOSE(np.sqrt(p * (1 - p)).mean(), np.pi / 8, rtol=1e-6)
    smooth = float(loglinear.smoothness(0, 2.0))  # X = D / 2 = 1
    CLOSE([smooth, 3 / 8 * smooth], [0.385, 0.1443], atol=1e-3)
    steps = [1 / float(loglinear.smoothness(power, 1.0)) for power in (0, 1, 2)]
    CLOSE(steps, [10.39, 6.93, 4], atol=0.005)


# B5: steps to p = .9 in units of D^2 / |Delta|^2, as flow time over the safe step; with
# a hundredth of that step a run takes a hundred times as many.
def test_steps_to_a_pass_rate():
    table = {0.1: (1.66, 1.33, 1.10), 0.01: (7.59, 3.13, 1.70)}
    table[0.001] = (64.1, 8.56, 2.28)
    p = np.array(list(table))
    for power in (0, 1, 2):
        unit = float(loglinear.safe_step(power, 1.0))
        counts = [loglinear.flow_time(power, x, 0.9) / unit for x in p]
        CLOSE(counts, [row[power] for row in table.values()], rtol=0.005)
        step = np.full(3, unit / 4 / 100)  # D = |Delta| = 2
        rate = np.asarray(runs(pair(p), float(power), step, 7000)[0])
        CLOSE((rate < 0.9).sum(0) / 100, counts, rtol=0.02)


def pairs(count):
    """Random pairs of prompts with their inner products, M by definition, R1 and R2."""
    one, other = facts_of(sample(count)), facts_of(sample(count, seed=1))
    assert len(one.p) == len(other.p) == count
    inner = (one.gradients * other.gradients).sum(1)
    m = []
    for a, b in ((one, other), (other, one)):
        pulled = np.einsum("pkd,pd->pk", a.policy.features, b.gradients)
        m.append((pulled**2).sum(1) / (a.largest**2 * inner))
    r1 = np.exp(np.abs(np.log(one.slope / other.slope)))
    r2 = np.exp(np.abs(np.log(one.sigma / other.sigma)))
    return one, other, inner, np.maximum(*m), r1, r2


# B6: theorems 3.3 and 3.4: with steps divided by the measured M, R1, R2 a step on a
# prompt lowers no other; without that it does. B6b: half of random pairs have no M, and
# the others a median of 3 and a 99th percentile of hundreds.
def test_a_step_lowers_no_aligned_prompt():
    one, other, inner, m, r1, r2 = pairs(6000)
    aligned = inner > 0
    assert abs(aligned.mean() - 0.5) < 0.03
    assert 2 < np.median(m[aligned]) < 5 and np.percentile(m[aligned], 99) > 100
    x2 = np.maximum(one.largest, other.largest) ** 2
    factors = {0: np.maximum(1, m / 2), 1: 2 * np.maximum(r1, 5 * m / 8) * r2}
    for a, b in ((one, other), (other, one)):
        for power in (0, 1):
            for factor, safe in ((factors[power], True), (1 + power, False)):
                step = 1 / (factor * x2) / a.sigma**power
                policy = shifted(b.policy, step[:, None] * a.gradients)
                rise = (np.asarray(everything(policy)[0].pass_rates) - b.p)[aligned]
                assert (rise >= -1e-15).all() == safe


# B6b: prompts with random features: half of the pairs violate Assumption 4, and of the
# others the largest M means nothing. One group of all responses: p uniform.
def test_m_of_random_features():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 6, 4))
    scores = features - features.mean(1, keepdims=True)
    rewards = np.tile([1.0, 1, 0, 0, 0, 0], (80, 1))
    gram = np.einsum("pgd,qhd->pgqh", scores, scores)
    result = jax.jit(prompt_geometry)(rewards, gram)
    g = np.einsum("pg,pgd->pd", rewards - 1 / 3, scores)
    pulled = (np.einsum("pgd,qd->pqg", scores, g) ** 2).sum(2)
    m = pulled / np.linalg.norm(scores, ord=2, axis=(1, 2))[:, None] ** 2 / (g @ g.T)
    off = m[~np.eye(80, dtype=bool)]
    CLOSE(result.m_median, np.median(off[off > 0]))
    CLOSE(result.m_p99, np.percentile(off[off > 0], 99))
    CLOSE(result.violating_fraction, (off < 0).mean())
    assert 0.45 < result.violating_fraction < 0.55
    assert 0.5 < result.m_median < 5 and result.m_p99 > 40 and off.max() > 300


# B7: |sum_x H_x| <= lmax(sum_x L_x P_x) <= chi max_x L_x, chi in [1, P]; 1,000 batches.
def test_how_curvatures_add_up(batches=1000, size=3):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(batches, size, 3, 5))
    features[: batches // 2] += 3 * rng.normal(size=(batches // 2, 1, 3, 5))
    rewards = np.broadcast_to([1.0, 0, 0], (batches, size, 3))
    offsets = rng.normal(size=(batches, size, 3))
    policy = LogLinear(features, rewards, offsets)
    hessians = everything(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), policy))
    hessians = np.asarray(hessians[1]).reshape(batches, size, 5, 5)
    chi = np.asarray(jax.jit(jax.vmap(loglinear.interference))(policy))
    gaps = np.swapaxes(features[:, :, 1:] - features[:, :, :1], -1, -2)
    projector = gaps @ np.linalg.pinv(gaps)
    CLOSE(projector @ hessians @ projector, hessians, atol=1e-9)
    smooth = spectral(hessians.reshape(-1, 5, 5)).reshape(batches, size)
    middle = np.linalg.eigvalsh((smooth[..., None, None] * projector).sum(1))[:, -1]
    assert (spectral(hessians.sum(1)) <= middle * ABOVE).all()
    assert (middle <= chi * smooth.max(1) * ABOVE).all()
    assert (chi >= 1 - 1e-9).all() and (chi <= size * ABOVE).all()
    assert chi.max() > 1.1 * chi.min()


# 2.3: with orthogonal features a step on one prompt moves no other at all, and the
# curvature of the sum is the largest curvature.
def test_orthogonal_prompts_do_not_meet():
    block, theta = instances(3, width=2)
    features = np.zeros((3, 6, 6))
    for i in range(3):
        features[i, :, 2 * i : 2 * i + 2] = block.features[i]
    policy = block._replace(features=features)
    result, hessians, _, _ = everything(policy)
    moved = everything(at_zero(policy, 5 * np.asarray(result.gradients)[1]))[0]
    change = np.asarray(moved.pass_rates - result.pass_rates)
    assert change[1] > 0.01 and (change[[0, 2]] == 0).all()
    total = spectral(np.asarray(hessians).sum(0)[None])
    CLOSE(total, spectral(hessians).max())


# B8: Hess 2 asin sqrt p = sigma [S1 - S0 + (1 - 2p)/2 Delta Delta'] is at most
# sigma D^2 / (2 (1 + 2q)), so sqrt 3 / 12 D^2; three responses on a line reach it.
def test_the_curvature_of_the_angle():
    def ratio(facts):
        outer = facts.deltas[:, :, None] * facts.deltas[:, None]
        tilt = (1 - 2 * facts.p) / 2 * facts.sigma
        norm = spectral(
            facts.hessians / facts.sigma[:, None, None] - tilt[:, None, None] * outer
        )
        q = np.minimum(facts.p, 1 - facts.p)
        local = facts.sigma * facts.diameter**2 / (2 * (1 + 2 * q))
        assert (local <= loglinear.smoothness(1, facts.diameter) * ABOVE).all()
        return norm / local

    assert (ratio(facts_of(sample(3000, scale=2.5))) <= ABOVE).all()
    p = np.array([0.01, 0.1, 0.25, 0.4])
    share = 1 / (1 + 2 * p)
    mass = np.stack([p * share, p * (1 - share), 1 - p], 1)
    features = np.tile([[1.0], [0.0], [0.0]], (4, 1, 1))
    line = LogLinear(features, np.tile([1.0, 1.0, 0.0], (4, 1)), np.log(mass))
    CLOSE(ratio(facts_of(line)), 1)


# B9: theorem C. With step 1 / L_A, sum_t E[|grad J|^2 / sigma^2] <= 2 n L_A (pi -
# 2 asin sqrt p(0)); n = 1: min_t |grad J|^2 <= that / T times the harmonic mean of
# sigma^2, below theorem 3.2's bound on its own run.
def test_the_rate_of_the_angle():
    facts = facts_of(sample(1500))
    smooth = np.asarray(loglinear.smoothness(1, facts.diameter))
    out = runs(facts.policy, 1.0, 1 / smooth, STEPS)
    rate, sigma, squared = map(np.asarray, out)
    room = 2 * smooth * (np.pi - 2 * np.arcsin(np.sqrt(rate[0])))
    for n in (1, 3):
        ratio = visited(squared / sigma**2, n).sum(0) / (n * room)
        assert (ratio <= ABOVE).all() and ratio.max() > 0.2
    bound = room / (1 / sigma**2).sum(0)
    assert (squared.min(0) <= bound * ABOVE).all()
    x2 = facts.largest**2
    theirs = np.asarray(runs(facts.policy, 1.0, 1 / (2 * x2), STEPS)[1])
    other = 2 * (1 - rate[0]) * x2 / STEPS * 8 / 3 * theirs.mean(0)
    assert (bound < 0.5 * other).all() and np.median(bound / other) < 0.05


# ---- exact gradients of 24 prompts that share parameters (6.3)


def crowd(kind, width=384, prompts=24, responses=6):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(prompts, responses, 4 if kind == "own" else width))
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    if kind == "own":
        apart = np.zeros((prompts, responses, 4 * prompts))
        for i in range(prompts):
            apart[i, :, 4 * i : 4 * i + 4] = features[i]
        features = apart
    if kind == "aligned":
        common = np.where(np.arange(responses) == 0, 1.0, -1.0) / 2**0.5
        common = np.broadcast_to(common[:, None], (prompts, responses, 1))
        features = np.concatenate([features / 2**0.5, common], 2)
    rewards = np.tile(np.eye(responses)[0], (prompts, 1))
    return LogLinear(features, rewards)


ascend = jax.jit(loglinear.ascend, static_argnums=4)


def steps_to_mean(policy, start, target=0.9, limit=1000):
    """Steps of REINFORCE, GRPO and log-odds until the mean pass rate is `target`."""
    prompts, responses, width = policy.features.shape
    first = np.log(start / (1 - start) * (responses - 1))
    policy = policy._replace(offsets=first[:, None] * policy.rewards)
    chi = float(loglinear.interference(policy))
    diameter = float(loglinear.diameters(policy).max())
    counts = []
    for power in (0.0, 1.0, 2.0):
        step = float(loglinear.safe_step(int(power), diameter)) / chi
        rates = ascend(policy, np.zeros(width), power, step, limit)[1]
        counts.append(int((np.asarray(rates).mean(1) < target).sum()))
    return counts


# 6.3: what normalisation gains over REINFORCE comes of prompts that differ: little with
# p = 1/2 for all, more with p from .001 to .5, less of it where features are aligned,
# and most under interference of both signs.
def test_where_normalisation_gains():
    same, spread = np.full(24, 0.5), np.geomspace(1e-3, 0.5, 24)
    gain = {}
    for kind in ("own", "aligned", "mixed"):
        for name, start in (("same", same), ("spread", spread)):
            counts = steps_to_mean(crowd(kind), start)
            gain[kind, name] = counts[0] / counts[1]
    assert gain["own", "spread"] > 2 > 1.5 > gain["own", "same"]
    assert gain["aligned", "spread"] < 0.6 * gain["own", "spread"]
    assert gain["mixed", "spread"] > 4 * gain["own", "spread"]
