"""Phase labels and their uncertainty."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.diagnostics.cosine_intervals import _bounds
from grpo_jax.diagnostics.cosines import debiased_statistics, pair_terms
from grpo_jax.diagnostics.geometry import first_order_changes, parts_geometry
from grpo_jax.diagnostics.phases import (
    PHASES,
    Thresholds,
    mean_sigma,
    phase,
)

jitted = jax.jit(parts_geometry)


def geometry_of(gradients, noise=0.0, parts=4, seed=0):
    """(geometry, rewards) of prompts with these gradients [P, D] and noisy parts."""
    rng = np.random.default_rng(seed)
    shape = (len(gradients), parts, gradients.shape[1])
    vectors = gradients[:, None] + noise * rng.normal(size=shape)
    rewards = np.tile([1.0, 0.0], (len(gradients), 8))
    return jitted(jnp.asarray(rewards), jnp.asarray(vectors)), rewards


def spread(p, share, d=400):
    """Gradients whose cosines are share * (+-1), half of either sign."""
    common = np.zeros(d)
    common[0] = 1
    own = np.zeros((p, d))
    own[np.arange(p), 1 + np.arange(p)] = 1
    signs = np.where(np.arange(p) % 2 == 0, 1.0, -1.0)[:, None]
    return signs * share**0.5 * common + (1 - share) ** 0.5 * own


@pytest.mark.parametrize(
    ("cosine", "label"), [(0.05, "I"), (0.12, "III"), (0.4, "III")]
)
def test_the_label_of_cosines_of_known_size(x64, cosine, label):
    geometry, rewards = geometry_of(spread(24, cosine))
    result = phase(geometry, rewards)
    np.testing.assert_allclose(result.std_cosine, cosine, rtol=0.02)
    assert result.label == label and result.shares[PHASES.index(label)] > 0.9
    assert result.small_fraction == (1 if cosine < 0.1 else 0)
    assert result.prompts == 24


# Cosines all +.2: none is small, none differs from another.
def test_aligned_prompts_are_neither_orthogonal_nor_spread(x64):
    gradients = np.abs(spread(24, 0.2))
    result = phase(*geometry_of(gradients))
    assert result.label == "II" and result.shares[1] > 0.95
    np.testing.assert_allclose(result.mean_cosine, 0.2, rtol=1e-6)
    looser = phase(*geometry_of(gradients), Thresholds(0.0, 0.1))
    assert looser.label == "I"


# Noise alone widens raw cosines; the debiased ones keep the label, and its bounds.
def test_noise_does_not_move_the_label(x64):
    gradients = spread(24, 0.15)
    geometry, rewards = geometry_of(gradients, noise=0.06)
    result = phase(geometry, rewards)
    assert geometry.attenuation < 0.8
    low, high = result.std_cosine_interval
    assert low <= 0.15 <= high and high - low < 0.1
    raw = geometry.raw_statistics.std
    assert abs(result.std_cosine - 0.15) < abs(raw - 0.15)
    assert result.label == "III"


def test_the_phase_is_unknown_without_signal(x64):
    geometry, rewards = geometry_of(spread(24, 0.15), noise=5.0)
    result = phase(geometry, rewards)
    assert result.label == "unknown" and math.isnan(result.std_cosine)
    tied = jitted(jnp.ones((3, 8)), jnp.zeros((3, 2, 5)))
    result = phase(tied, np.ones((3, 8)))
    assert result.label == "unknown" and result.prompts == 0 and result.mean_sigma == 0


# A prompt is left out if a part of its group has fewer than two rewards.
def test_missing_rewards_leave_a_prompt_out(x64):
    rng = np.random.default_rng(3)
    vectors, rewards = rng.normal(size=(6, 2, 30)), np.tile([1.0, 0.0], (6, 4))
    rewards[2, 4:7] = np.nan
    result = jitted(rewards, vectors)
    keep = [0, 1, 3, 4, 5]
    other = jitted(rewards[keep], vectors[keep])
    assert np.isnan(result.squared_norms[2]) and np.isnan(result.cosines[2]).all()
    names = ("mean_cosine", "std_cosine", "attenuation", "chi", "m_median")
    kept, alone = ({n: getattr(x, n) for n in names} for x in (result, other))
    chex.assert_trees_all_close(kept, alone, rtol=1e-7)


def random_gradients(prompts=12, d=20, seed=0):
    """(gradients [P, d] of lognormal norms, their cosines of pairs)."""
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=(prompts, d)) + 0.5
    unit /= np.linalg.norm(unit, axis=1)[:, None]
    pairs = (unit @ unit.T)[np.triu_indices(prompts, 1)]
    return unit * rng.lognormal(size=(prompts, 1)), pairs


# Without noise the figures are those of the pairs counted equally, whatever the norms.
@pytest.mark.parametrize("parts", [2, 4])
def test_without_noise_the_cosines_are_exact_and_pairs_count_equally(x64, parts):
    gradients, true = random_gradients()
    geometry, rewards = geometry_of(gradients, parts=parts)
    result = phase(geometry, rewards)
    expected = (true.mean(), true.std(), (np.abs(true) < 0.1).mean())
    actual = (result.mean_cosine, result.std_cosine, result.small_fraction)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    assert geometry.attenuation == pytest.approx(1) and geometry.noise_cosine < 1e-6
    assert result.effective_prompts == pytest.approx(12)


# As groups grow the noise of a part falls, and the error of the figures with it.
def test_the_figures_tend_to_the_exact_ones_as_groups_grow(x64):
    gradients, true = random_gradients()
    errors = []
    for noise in (0.02, 0.002):
        geometry, _ = geometry_of(gradients, noise=noise)
        errors.append(max(
            abs(float(geometry.mean_cosine) - true.mean()),
            abs(float(geometry.std_cosine) - true.std()),
        ))  # fmt: skip
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.005


# A part's gradient is the variance of its rewards times the regression of scores on
# rewards: parts of unequal variance are no noise, which would make norms too short.
def test_parts_of_unequal_variance_do_not_make_cosines_larger(x64):
    rewards = np.array([[1.0, 0, 0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1, 1, 1]] * 3)
    rewards[5, 4:] = rewards[4, 4:]
    variances = rewards.reshape(6, 2, 4).var(2, ddof=1)
    own = np.sqrt(0.6) * np.eye(6, 7) + np.sqrt(0.4) * np.eye(7)[6]
    geometry = jitted(rewards, variances[:, :, None] * own[:, None])
    used = np.isfinite(geometry.expected_squared_norms)
    # A tied part: no second estimate, no norm.
    np.testing.assert_array_equal(used, (variances > 0).all(1))
    length = variances.mean(1) ** 2
    np.testing.assert_allclose(geometry.expected_squared_norms[used], length[used])
    np.testing.assert_allclose(geometry.mean_cosine, 0.4)
    np.testing.assert_allclose(geometry.std_cosine, 0, atol=1e-7)
    full = jax.jit(gj.prompt_geometry)(rewards, gram_of(rewards, own))
    np.testing.assert_allclose(full.mean_cosine, 0.4)


def gram_of(rewards, gradients):
    """Gram matrix of scores that are reward times the gradient [P, d], exactly."""
    scores = rewards[..., None] * gradients[:, None]
    return np.einsum("pgd,qhd->pgqh", scores, scores)


# Two of five prompts above their noise are no basis, nor are attenuations about 0.
@pytest.mark.parametrize(
    ("attenuations", "told"),
    [
        ([0.5] * 5, True),
        ([0.5, 0.5, 0.0, 0.0, 0.0], False),
        ([0.5, -0.5, 0.4, -0.3, 0.6], False),
        ([0.05] * 5, False),
        ([0.9, 0.8, 0.7, 0.9, float("nan")], True),
    ],
)
def test_what_noise_hides_is_not_told(attenuations, told):
    raw = jnp.ones(5)
    expected = jnp.array(attenuations)
    cosines = jnp.where(jnp.eye(5, dtype=bool), 1.0, 0.1)
    terms = pair_terms(cosines, expected, raw, cosines**2)
    result = debiased_statistics(cosines, expected, raw, terms)
    for x in (result.mean_cosine, result.std_cosine, result.attenuation):
        assert bool(np.isfinite(x)) == told


# A sketch adds (1 + cos^2) / K to the square of a cosine.
def test_a_sketch_of_orthogonal_gradients_has_no_spread():
    raw, cosines = jnp.ones(5), jnp.eye(5)
    terms = pair_terms(cosines, raw, raw, jnp.full((5, 5), 1 / 64), 64)
    result = debiased_statistics(cosines, raw, raw, terms)
    np.testing.assert_allclose(result.std_cosine, 0, atol=1e-6)


# Mean .2, variance .01: at most half of the cosines are below .1 (Cantelli). Mean 0,
# variance .001: at most a tenth are not (Markov). Of 46 % called large a tenth of the
# others may be wrongly so: 40 % are.
@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((0.2, 0.01, 0.0, 0.0), (0, 0.5)),
        ((0.0, 0.001, 0.0, 0.0), (0.9, 1)),
        ((0.0, 0.1, 0.46, 0.0), (0, 0.6)),
        ((0.0, 0.1, 0.0, 0.82), (0.8, 1)),
        ((0.3, -0.001, 0.0, 0.0), (0, 0)),
    ],
)
def test_bounds_on_the_small_fraction(figures, expected):
    mean, spread, large, small = (np.array([x]) for x in figures)
    bounds = np.concatenate(_bounds(mean, np.maximum(spread, 0), large, small))
    np.testing.assert_allclose(bounds, expected, atol=1e-12)


# Prompts in four clusters, cosines .6 within and 0 between, without noise: the mean
# varies with the prompts that are drawn, and the interval says by how much.
@pytest.mark.slow
def test_intervals_count_the_choice_of_prompts(x64):
    rng = np.random.default_rng(0)
    means, covered = [], 0
    for seed in range(60):
        cluster = rng.integers(4, size=16)
        gradients = 0.6**0.5 * np.eye(30)[cluster] + 0.4**0.5 * np.eye(30)[4:20]
        result = phase(*geometry_of(gradients, seed=seed), resamples=400)
        low, high = result.mean_cosine_interval
        means.append(result.mean_cosine)
        covered += low <= 0.15 <= high
    # Pairs are uncorrelated: the variance of one, .36 q (1 - q), over their number.
    np.testing.assert_allclose(
        np.std(means), (2 * 0.1875 * 0.36 / 240) ** 0.5, rtol=0.3
    )
    assert covered >= 55


def test_three_prompts_are_too_few_for_a_phase(x64):
    result = phase(*geometry_of(spread(3, 0.3)))
    assert result.label == "unknown" and np.isnan(result.shares).all()
    assert np.isfinite(result.std_cosine) and np.isnan(result.std_cosine_interval).all()


# sigma of (1, 0, 1, 0) with ddof 1: sqrt(1/3); C = 8/3 of the mean over measurements.
def test_the_rate_factor(x64):
    geometry, _ = geometry_of(spread(24, 0.05))
    rewards = np.tile([1.0, 0, 1, 0], (24, 1))
    np.testing.assert_allclose(mean_sigma(rewards), 3**-0.5)
    result = phase(geometry, rewards)
    np.testing.assert_allclose(result.rate_factor, 8 / 3 * 3**-0.5)
    later = phase(geometry, rewards, sigma_history=(0.1, 0.1))
    np.testing.assert_allclose(later.rate_factor, 8 / 9 * (3**-0.5 + 0.2))
    given = phase(geometry, rewards, sigma=0.3, sigma_history=(float("nan"), 0.1))
    np.testing.assert_allclose([given.mean_sigma, given.rate_factor], [0.3, 1.6 / 3])
    missing = np.array([[1.0, 0, np.nan, np.nan], [np.nan] * 4])
    np.testing.assert_allclose(mean_sigma(missing), 0.5**0.5)


def test_the_same_seed_gives_the_same_shares():
    geometry, rewards = geometry_of(spread(24, 0.1), noise=0.02)
    one, two = (phase(geometry, rewards, seed=3) for _ in range(2))
    assert one == two


def test_bad_arguments_raise():
    geometry, rewards = geometry_of(spread(24, 0.1))
    with pytest.raises(ValueError, match="2 prompts or more, got 1"):
        phase(geometry, rewards[:1])
    with pytest.raises(ValueError, match="thresholds must be a share"):
        gj.phase(geometry, rewards, Thresholds(1.5, 0.1))


# Gradients of parts against the Gram matrix of all scores.
def test_parts_and_gram_agree(x64):
    rng = np.random.default_rng(5)
    rewards = np.tile([1.0, 0, 1, 0], (5, 4))
    signal = rewards[..., None] * spread(5, 0.3, d=40)[:, None]
    scores = 0.2 * rng.normal(size=(5, 16, 40)) + signal
    weights = gj.leave_one_out_advantages(rewards.reshape(20, 4)).reshape(5, 4, 4) / 4
    vectors = np.einsum("phg,phgd->phd", weights, scores.reshape(5, 4, 4, 40))
    parts = jax.jit(parts_geometry)(rewards, vectors)
    gram = np.einsum("pgd,qhd->pgqh", scores, scores)
    full = jax.jit(gj.prompt_geometry)(rewards, gram)
    pairs = ~np.eye(5, dtype=bool)
    for name in ("inner", "cosines"):
        a, b = (np.asarray(getattr(x, name))[pairs] for x in (parts, full))
        assert np.corrcoef(a, b)[0, 1] > 0.9


# Unbiased norms and squared inner products, by enumeration over the parts' noise.
def test_parts_debias_norms_and_squares(x64):
    true = np.array([[1.0, 0.5], [0.2, 0.4]])
    noise = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1).T  # [16, 4]
    rewards = jnp.tile(jnp.array([1.0, 0.0]), (2, 4))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    @partial(jax.vmap, in_axes=(None, 0))
    def estimates(a, b):
        # Two parts a prompt; part h has noise (a_2h, a_2h+1), of mean 0.
        noisy = jnp.stack([a.reshape(2, 2), b.reshape(2, 2)])
        result = parts_geometry(rewards, true[:, None] + noisy)
        return result.squared_norms, result.squared_inner[0, 1], result.inner[0, 1]

    squared, square, inner = estimates(noise, noise)
    np.testing.assert_allclose(squared.mean((0, 1)), (true**2).sum(1))
    np.testing.assert_allclose(square.mean(), (true[0] @ true[1]) ** 2)
    np.testing.assert_allclose(inner.mean(), true[0] @ true[1])


# A step of sum_y w_y g_y, as long as if the gradients were orthogonal.
def test_first_order_changes(x64):
    g = np.array([[1.0, 0.0], [0.6, 0.8], [5.0, 5.0]])
    inner, squares = g @ g.T, np.array([1.0, 1.0, np.nan])
    own, others = first_order_changes(inner, squares, jnp.array([1.0, 2.0, 7.0]))
    step = (g[0] + 2 * g[1]) / 5**0.5
    np.testing.assert_allclose((own + others)[:2], g[:2] @ step)
    np.testing.assert_allclose(own[0], 1 / 5**0.5)
    assert np.isnan([own[2], others[2]]).all()


# Its sign is that of the inner products, whatever they make of |g_0 + g_1|^2.
def test_no_estimates_sign_decides_what_first_order_changes_keep(x64):
    for product in (-0.9, 0.9):
        inner = np.array([[2.0, product], [product, 1.0]])  # raw norms
        changes = first_order_changes(inner, jnp.array([0.5, -0.1]), jnp.ones(2))
        expected = np.array([[0.5, -0.1], [product, product]]) / 3**0.5
        np.testing.assert_allclose(changes, expected)


def test_rewards_of_a_phase_are_of_the_geometrys_prompts():
    geometry, rewards = geometry_of(spread(4, 0.0))
    assert phase(geometry, rewards.tolist()) == phase(geometry, rewards)
    for wrong in (rewards.T, rewards[0], rewards[:3]):
        with pytest.raises(ValueError, match=r"rewards must be \[P, G\] of .* 4 prom"):
            phase(geometry, wrong)
    with pytest.raises(ValueError, match="geometry must be a PromptGeometry, got"):
        phase(rewards, rewards)
