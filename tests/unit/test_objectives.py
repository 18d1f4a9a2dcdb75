import dataclasses

import chex
import jax
import numpy as np
import pytest

from grpo_jax import OBJECTIVES, per_prompt_losses, policy_loss
from grpo_jax.objectives.aggregation import AGGREGATIONS, token_coefficients
from grpo_jax.objectives.divergences import divergence
from grpo_jax.objectives.objective import AXES, choices

GRPO = OBJECTIVES["grpo"]


def batch(seed=0, shape=(2, 3, 4)):
    """Arrays of an off-policy batch with ragged completions."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, shape[2] + 1, shape[:2])
    lengths[0, 0] = shape[2] - 1  # at least one token of padding
    logprobs, noise = rng.normal(-2, 0.5, shape), rng.normal(0, 0.2, (2, *shape))
    arrays = dict(
        logprobs=logprobs,
        behaviour_logprobs=logprobs + noise[0],
        reference_logprobs=logprobs + noise[1],
        rewards=rng.uniform(0, 1, shape[:2]),
    )
    arrays |= dict(
        entropy=rng.uniform(0.2, 0.6, shape), token_weights=rng.uniform(0.5, 2, shape)
    )
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    mask = np.arange(shape[2]) < lengths[..., None]
    return arrays | dict(
        completion_mask=mask.astype(np.int32), token_ids=rng.integers(0, 9, shape)
    )


def loss_and_grads(objective, arrays, argument="logprobs"):
    def loss(x):
        return policy_loss(objective, **arrays | {argument: x})[0]

    return jax.jit(jax.value_and_grad(loss))(arrays[argument])


@pytest.mark.parametrize("axis", choices())
def test_an_unknown_choice_lists_the_choices(axis):
    names = ", ".join(choices()[axis])
    message = f"^{axis} must be one of {names}, got 'nonsense'"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GRPO, **{axis: "nonsense"})


def test_axes_are_the_choices_that_have_a_registry():
    assert {"baseline", "scale", "ratio", "surrogate", "aggregation"} <= set(AXES)
    assert {name: tuple(AXES[name]) for name in AXES}.items() <= choices().items()
    assert not {"kl_in", "overlong"} & set(AXES)


@pytest.mark.parametrize("axis", AXES)
def test_an_entry_reads_fields_that_exist(axis):
    numbers = {field.name for field in dataclasses.fields(GRPO)} - set(AXES)
    numbers |= {"mask", "hinge"}
    for entry in AXES[axis].values():
        assert set(getattr(entry, "uses", ())) <= numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(clip=(0.0, 0.2)), r"clip must be .* got \(0.0, 0.2\)"),
        (dict(clip=(1.0, 0.2)), r"clip must be .* got \(1.0, 0.2\)"),
        (dict(clip=(0.2, 0.0)), r"clip must be .* got \(0.2, 0.0\)"),
        (dict(kl_coef=-0.1), "kl_coef must not be negative, got -0.1"),
        (dict(kl_coef=float("nan")), "kl_coef must not be negative, got nan"),
        (dict(std_eps=-1.0), "std_eps must not be negative, got -1.0"),
        (dict(std_ddof=2), "std_ddof must be 0 or 1, got 2"),
        (dict(divergence="k1"), "k1 in the loss constrains nothing.*kl_in='reward'"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GRPO, **changes)


@pytest.mark.parametrize("changes", [dict(kl_in="reward"), dict(kl_coef=0.0)])
def test_k1_is_fine_in_the_reward_and_where_it_is_not_used(changes):
    objective = dataclasses.replace(GRPO, divergence="k1", **changes)
    chex.assert_tree_all_finite(loss_and_grads(objective, batch()))


def test_clip_may_be_wide_above():
    assert dataclasses.replace(GRPO, clip=(0.2, 10.0)).clip == (0.2, 10.0)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("reinforce", "mean_i sum_t -A log pi;  A = R - mean"),
        (
            "rloo",
            "mean_i sum_t -A log pi;  A = R - mean of others, "
            "R less 0.03 sum_t k1(pi_old, ref)",
        ),
        (
            "grpo",
            "mean_i mean_t [-min(r A, clip(r, 0.8, 1.2) A), r = pi / pi_old] + "
            "0.04 k3(pi, ref);  A = (R - mean) / (std + 1e-06)",
        ),
        (
            "dr_grpo",
            "mean_i sum_t/T -min(r A, clip(r, 0.8, 1.2) A), r = pi / pi_old;  "
            "A = R - mean",
        ),
    ],
)
def test_formula(name, formula):
    assert OBJECTIVES[name].formula() == formula


def test_formula_shows_every_number_that_is_changed():
    changed = dataclasses.replace(
        GRPO, clip=(0.3, 0.4), std_eps=0.01, std_ddof=1, kl_coef=0.5, baseline="none"
    )
    formula = changed.formula()
    assert "clip(r, 0.7, 1.4)" in formula and "0.5 k3" in formula
    assert formula.endswith("A = (R) / (std + 0.01, ddof 1)")


def test_formula_does_not_divide_kl_in_the_reward():
    changed = dataclasses.replace(GRPO, kl_in="reward", divergence="k1")
    assert changed.formula().endswith(
        "A = (R - mean) / (std + 1e-06) - 0.04 (K - mean), K = sum_t k1(pi_old, ref)"
    )


def test_the_table_is_read_only():
    with pytest.raises(TypeError):
        OBJECTIVES["mine"] = GRPO
    with pytest.raises(dataclasses.FrozenInstanceError):
        GRPO.clip = (0.1, 0.1)


def test_a_missing_reference_is_refused():
    arrays = batch() | dict(reference_logprobs=None)
    message = "reference_logprobs must be given, kl_coef is 0.04; .*kl_coef=0"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda a: policy_loss(GRPO, **a))(arrays)


def test_a_name_in_place_of_an_objective_is_refused():
    with pytest.raises(ValueError, match="must be an Objective, got 'grpo'; look"):
        policy_loss("grpo", **batch())


@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        ("logprobs", (6, 4), r"logprobs must be \[P, G, T\], got \(6, 4\); reshape"),
        ("behaviour_logprobs", (2, 3, 5), r"behaviour_logprobs must be \(2, 3, 4\)"),
        ("completion_mask", (2, 3), r"completion_mask must be \(2, 3, 4\)"),
        ("rewards", (3, 2), r"rewards must be \(2, 3\) .* got \(3, 2\)"),
        ("rewards", (6,), r"rewards must be \(2, 3\) .* got \(6,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(argument, shape, message):
    arrays = batch() | {argument: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda a: per_prompt_losses(GRPO, **a))(arrays)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("constant", ["behaviour_logprobs", "rewards"])
def test_only_the_policys_logprobs_have_a_gradient(name, constant):
    _, grads = loss_and_grads(OBJECTIVES[name], batch(), constant)
    assert (np.asarray(grads) == 0).all()
    _, grads = loss_and_grads(OBJECTIVES[name], batch())
    assert np.abs(grads).max() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("garbage", [1e4, -1e4])
def test_the_content_of_padding_changes_nothing(name, garbage):
    arrays = batch()
    padding = arrays["completion_mask"] == 0
    spoiled = dict(arrays)
    for argument in ("logprobs", "behaviour_logprobs", "reference_logprobs"):
        spoiled[argument] = np.where(padding, np.float32(garbage), arrays[argument])
    loss, grads = loss_and_grads(OBJECTIVES[name], arrays)
    actual, actual_grads = loss_and_grads(OBJECTIVES[name], spoiled)
    np.testing.assert_array_equal(actual, loss)
    np.testing.assert_array_equal(actual_grads, grads)
    assert (np.asarray(grads)[padding] == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_may_even_hold_nan(name):
    arrays = batch()
    padding = arrays["completion_mask"] == 0
    loss, grads = loss_and_grads(OBJECTIVES[name], arrays)
    for argument in ("logprobs", "behaviour_logprobs", "reference_logprobs"):
        arrays[argument] = np.where(padding, np.float32("nan"), arrays[argument])
    actual, actual_grads = loss_and_grads(OBJECTIVES[name], arrays)
    np.testing.assert_array_equal(actual, loss)
    np.testing.assert_array_equal(actual_grads, grads)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_far_off_policy_stays_finite(name, shift):
    arrays = batch()
    arrays["logprobs"] = arrays["behaviour_logprobs"] + np.float32(shift)
    chex.assert_tree_all_finite(loss_and_grads(OBJECTIVES[name], arrays))


def test_on_policy_ratio_is_one_and_nothing_is_clipped():
    arrays = batch()
    arrays["behaviour_logprobs"] = arrays["logprobs"]
    _, metrics = jax.jit(lambda a: policy_loss(GRPO, **a))(arrays)
    np.testing.assert_allclose(metrics["ratio/mean"], 1, rtol=1e-6)
    assert metrics["ratio/clipped"] == 0


def test_a_token_counts_as_clipped_where_it_has_no_gradient():
    arrays = batch(seed=3, shape=(4, 8, 16))
    objective = dataclasses.replace(GRPO, kl_coef=0.0, clip=(0.1, 0.3))
    _, grads = loss_and_grads(objective, arrays)
    _, metrics = jax.jit(lambda a: policy_loss(objective, **a))(arrays)
    share = np.mean(np.asarray(grads)[arrays["completion_mask"] > 0] == 0)
    np.testing.assert_allclose(metrics["ratio/clipped"], share, rtol=1e-5)
    assert 0.1 < share < 0.4


def test_no_kl_is_reported_without_a_reference():
    arrays = batch() | dict(reference_logprobs=None, entropy=None)
    _, metrics = jax.jit(lambda a: policy_loss(OBJECTIVES["dr_grpo"], **a))(arrays)
    assert set(metrics) == {"ratio/mean", "ratio/deviation", "ratio/clipped"}


def test_means_over_no_token_are_no_numbers():
    arrays = batch()
    arrays["rewards"] = np.full_like(arrays["rewards"], np.nan)
    loss, metrics = jax.jit(lambda a: policy_loss(OBJECTIVES["grpo"], **a))(arrays)
    assert loss == 0 and {"kl/mean", "ratio/mean"} <= set(metrics)
    assert all(np.isnan(value) for value in metrics.values())


# With x64 the whole loss is in float64, against the same sums in numpy.
def test_the_loss_is_exact_in_float64():
    arrays = {name: x.astype(float) for name, x in batch().items()}
    arrays |= dict(token_weights=None, token_ids=None)
    r, mask = arrays["rewards"], arrays["completion_mask"]
    ratio = np.exp(arrays["logprobs"] - arrays["behaviour_logprobs"])
    advantages = (r - r.mean(1, keepdims=True))[..., None]
    tokens = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    with jax.enable_x64(True):
        actual, _ = jax.jit(lambda a: policy_loss(OBJECTIVES["dr_grpo"], **a))(arrays)
        np.testing.assert_allclose(actual, -(tokens * mask).sum() / 24, rtol=1e-12)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_coefficients_leave_empty_completions_out(kind):
    mask = np.array([[[1, 1, 0], [0, 0, 0], [1, 0, 0]]], np.int32)
    coefficients = jax.jit(token_coefficients, static_argnums=(0, 2))
    actual = np.asarray(coefficients(kind, mask, None))
    others = np.asarray(coefficients(kind, mask[:, [0, 2]], None))
    np.testing.assert_allclose(actual[:, [0, 2]], others)
    assert (actual[mask == 0] == 0).all()


# rho = 2 and 1/2: k1 = -ln rho, k3 = rho - 1 - ln rho.
def test_divergences():
    reference = np.log(np.float32([2, 0.5, 1]))
    logprobs, ln2 = np.zeros(3, np.float32), np.log(2)
    k1, k3 = (
        jax.jit(divergence, static_argnums=0)(kind, logprobs, reference)
        for kind in ("k1", "k3")
    )
    np.testing.assert_allclose(k1, [-ln2, ln2, 0], rtol=1e-6)
    np.testing.assert_allclose(k3, [1 - ln2, ln2 - 0.5, 0], rtol=1e-6)


# The mean of either estimator under the policy is KL(policy || reference).
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_divergences_are_unbiased(kind):
    policy = np.float32([0.5, 0.3, 0.2])
    reference = np.float32([0.2, 0.2, 0.6])
    tokens = jax.jit(divergence, static_argnums=0)(
        kind, np.log(policy), np.log(reference)
    )
    expected = (policy * np.log(policy / reference)).sum()
    np.testing.assert_allclose((policy * tokens).sum(), expected, rtol=1e-5)


def test_a_part_by_itself_lists_its_choices_too():
    x = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="divergence must be one of k1, k2, k3, got"):
        divergence("nonsense", x, x)
    with pytest.raises(ValueError, match="aggregation must be one of sequence_mean_t"):
        token_coefficients("nonsense", x)
