import dataclasses

import jax
import numpy as np
import pytest

from grpo_jax import OBJECTIVES, Objective, TrainConfig
from grpo_jax.errors import ConfigError
from grpo_jax.planning.resolve import (
    resolve_objective,
    resolve_weights,
    weights_text,
)
from grpo_jax.preconditioner import apply_weights
from grpo_jax.prompt_weights import WEIGHTS
from grpo_jax.runs.config import ObjectiveConfig, WeightsConfig


def config(name="grpo", weights=None, updates=1, steps=11, **overrides):
    return TrainConfig(
        objective=ObjectiveConfig(name=name, **overrides),
        weights=WeightsConfig(**weights or {}),
        updates_per_rollout=updates,
        steps=steps,
    )


def refused(message, *args, **kwargs):
    with pytest.raises(ConfigError, match=message):
        asked = config(*args, **kwargs)
        resolve_weights(asked, resolve_objective(asked), 7)


def values(asked, calls=1):
    """Weights of [1, 0, 0, 0] and of a tied group at each of some calls."""
    rule = resolve_weights(asked, resolve_objective(asked), 7)
    state, ids = rule.init(), np.array([3, 5])
    rewards = np.float32([[1, 0, 0, 0], [1] * 4])
    call, rows = jax.jit(lambda *x: apply_weights(rule, *x)), []
    for _ in range(calls):
        weights, state = call(rewards, state, ids)
        rows.append(np.asarray(weights))
    return np.array(rows)


def test_every_field_of_an_objective_can_be_overridden():
    overrides = {f.name: f for f in dataclasses.fields(ObjectiveConfig)}
    fields = {f.name for f in dataclasses.fields(Objective)} - {"source"}
    assert set(overrides) - {"name"} == fields
    assert all(overrides[name].default is None for name in fields)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_needs_no_overrides(name):
    assert resolve_objective(config(name)) == OBJECTIVES[name]


def test_an_override_replaces_one_choice():
    objective = resolve_objective(config("dr_grpo", clip=(None, 0.5), drafts=2))
    expected = dataclasses.replace(OBJECTIVES["dr_grpo"], clip=(None, 0.5), drafts=2)
    assert objective == expected


def test_weights_that_are_named_take_the_scales_place():
    objective = resolve_objective(config(weights=dict(name="beta")))
    assert objective == dataclasses.replace(OBJECTIVES["grpo"], scale="none")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("reinforce", dict(clip=(0.1, 0.1))),
        ("reinforce", dict(std_eps=0.1)),
        ("reinforce", dict(std_ddof=1)),
        ("max_rl", dict(std_ddof=1)),
        ("bnpo", dict(std_eps=0.1)),
        ("reinforce", dict(dual_clip=3.0)),
        ("cispo", dict(ratio_cap=2.0)),
        ("grpo", dict(mixture=0.3)),
        ("grpo", dict(mask="kl")),
        ("grpo", dict(mask_limit=0.1)),
        ("grpo", dict(hinge="log")),
        ("grpo", dict(tau=0.1)),
        ("grpo", dict(first_token_weight=0.5)),
        ("dr_grpo", dict(divergence="k2")),
        ("dr_grpo", dict(kl_in="reward")),
        ("grpo", dict(overlong_share=0.5)),
        ("espo", dict(clip=(0.1, 0.1))),
    ],
)
def test_an_override_that_changes_nothing_is_refused(name, overrides):
    (field,) = overrides
    refused(f"objective.{field} changes nothing in {name} as", name, **overrides)


def test_what_other_overrides_bring_into_use_is_taken():
    for name, overrides in (
        ("reinforce", dict(scale="std", std_eps=0.1, std_ddof=1)),
        ("dr_grpo", dict(kl_coef=0.1, divergence="k2", kl_in="reward")),
        ("grpo", dict(surrogate="hinge", hinge="log", clip=(0.1, 0.3))),
        ("grpo", dict(overlong="punish", overlong_share=0.5)),
        ("gmpo", dict(clip=(0.3, 0.5))),
        ("grpo", dict(aggregation="first_rest", first_token_weight=0.5)),
    ):
        objective = resolve_objective(config(name, **overrides))
        assert all(getattr(objective, k) == v for k, v in overrides.items())


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ("reinforce", dict(ratio="token")),
        ),
        pytest.param(
            ("grpo", dict(disjoint=True)),
        ),
        pytest.param(
            ("grpo", dict(ratio="none", clip=(0.1, 0.1))),
        ),
    ],
)
def test_an_override_that_no_number_depends_on_is_refused(overrides):
    name, changes = overrides
    refused("changes nothing", name, **changes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(clip=(1.5, 0.2)), r"objective grpo: clip must be a pair .*\(1.5, 0.2\)"),
        (dict(dual_clip=1.0), "objective grpo: dual_clip must be above 1 .* got 1.0"),
        (dict(ratio_cap=0.5), "ratio_cap must be at least 1 or None, got 0.5"),
        (dict(tis_cap=0.5), "tis_cap must be at least 1 or None, got 0.5"),
        (dict(mixture=1.0), r"mixture must be in \(0, 1\), got 1.0"),
        (dict(mask_limit=0.0), "mask_limit must be positive, got 0.0"),
        (dict(tau=0.0), "tau must be positive, got 0.0"),
        (dict(entropy_coef=-1.0), "entropy_coef must not be negative, got -1.0"),
        (dict(entropy_limit=0.0), "entropy_limit must be positive or None, got 0.0"),
        (dict(first_token_weight=0.0), "first_token_weight must be positive, got 0.0"),
        (dict(overlong_share=0.0), r"overlong_share must be in \(0, 1\], got 0.0"),
        (dict(overlong_share=1.5), r"overlong_share must be in \(0, 1\], got 1.5"),
        (dict(stop_deviation=0.0), "stop_deviation must be positive or None, got 0.0"),
        (dict(drafts=-1), "drafts must not be negative, got -1"),
        (dict(refills=-1), "refills must not be negative, got -1"),
        (dict(history=0), "history must be at least 1, got 0"),
        (dict(std_ddof=2), "std_ddof must be 0 or 1, got 2"),
        (dict(std_eps=-1.0), "objective.std_eps must be at least 0, got -1.0"),
        (dict(kl_coef=-1.0), "objective.kl_coef must be at least 0, got -1.0"),
        (dict(tau=float("nan")), "objective.tau must be a finite number, got nan"),
        (dict(clip=(0.2, float("inf"))), "objective.clip must be a finite number"),
        (dict(ratio="nonsense"), "ratio must be one of none, token, "),
        (dict(scale="nonsense"), "scale must be one of none, std, "),
        (dict(surrogate="rpe", mixture=0.9), r"mixture \(1 \+ clip's high\) must be"),
        (dict(entropy_coef=0.1), "entropy_coef needs a surrogate and a ratio"),
        (dict(divergence="k1"), "divergence k1 in the loss constrains nothing"),
    ],
)
def test_numbers_out_of_range_name_their_field(overrides, message):
    refused(message, **overrides)


def test_an_unknown_objective_names_the_nearest():
    refused("unknown objective 'grp'; did you mean 'grpo'", "grp")


@pytest.mark.parametrize(
    ("message", "kwargs"),
    [
        ("objective.scale changes nothing .* is beta: the weights",
         dict(weights=dict(name="beta"), scale="std")),
        ("objective.std_eps changes nothing in grpo",
         dict(weights=dict(name="std"), std_eps=0.1)),
        ("updates_per_rollout must be 1 for reinforce, .* got 2",
         dict(name="reinforce", updates=2)),
        ("updates_per_rollout must be 1 for max_rl", dict(name="max_rl", updates=2)),
        ("updates_per_rollout must divide sampling.prompts for tic_grpo.* 3 and 16",
         dict(name="tic_grpo", updates=3)),
        ("objective.stop_deviation changes nothing with one update",
         dict(stop_deviation=0.1)),
        ("objective.kl_coef 0.04 does not go with history 2", dict(history=2)),
        ("objective.token_weight nthr does not go with history 4",
         dict(name="rt_pg", token_weight="nthr")),
        ("objective.overlong mask does not go with history 4",
         dict(name="rt_pg", overlong="mask")),
        ("objective.ratio none does not go with history 2",
         dict(name="reinforce", history=2)),
    ],
)  # fmt: skip
def test_choices_that_do_not_go_together_are_refused(message, kwargs):
    refused(message, **kwargs)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "max_rl"])
def test_a_surrogate_without_a_ratio_takes_one_update(name):
    refused("updates_per_rollout must be 1", name, updates=4)
    refused("objective.ratio changes nothing", name, ratio="token")


def test_disjoint_prompts_do_not_go_with_a_history():
    refused("disjoint", "rt_pg", disjoint=True, updates=4)


@pytest.mark.parametrize(
    ("name", "updates"), [("tic_grpo", 4), ("grpo_no_is", 16), ("espo", 1), ("grpo", 3)]
)
def test_choices_that_go_together_are_taken(name, updates):
    resolve_objective(config(name, updates=updates))


def test_weights_by_default_are_the_objectives_scale():
    np.testing.assert_allclose(values(config())[0], [4 / 3**0.5, 0], rtol=1e-5)
    np.testing.assert_allclose(values(config("dr_grpo"))[0], [1, 1])
    np.testing.assert_allclose(values(config("max_rl"))[0], [4, 0], rtol=1e-5)


# [1, 0, 0, 0]: std sqrt 3 / 4; the batch: mean 5/8, std sqrt 15 / 8; the posterior mean
# is 3/10. Group means 1/4 and 1: v = 9/32 > m (1 - m), so a' = b' = 1. The finite one:
# w_2 / (1 - 1/4) = 4/3.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unit", [1, 1]),
        ("std", [4 / 3**0.5, 0]),
        ("batch_std", [8 / 15**0.5] * 2),
        ("group_mean", [4, 0]),
        ("beta", [1, 0]),
        ("finite_group", [4 / 3, 0]),
        ("shrunk", [0.21**-0.5, 0]),
        ("posterior", [0.21**-0.5, 0]),
    ],
)
def test_rules_by_hand(name, expected):
    settings = dict(group_size=2) if name == "finite_group" else {}
    actual = values(config(weights=dict(name=name, **settings)))
    np.testing.assert_allclose(actual[0], expected, rtol=1e-5)


# The second visit: (1 + 1/2, 3 + 3/2) and the prior 1: m = 2.5/8.
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(name="std", eps=1.0, power=2.0), (3**0.5 / 4 + 1) ** -2),
        (dict(name="std", ddof=1, eps=0.0), 2),
        (dict(name="batch_std", ddof=1, eps=1.0), 1 / (1 + (15 / 56) ** 0.5)),
        (dict(name="group_mean", eps=0.25), 2),
        (dict(name="shrunk", prior=1.0, power=2.0), 9 / 2),
        (dict(name="posterior", prior=1.0, discount=0.5, power=2.0), 64 / 13.75),
    ],
)
def test_settings_reach_their_rule(settings, expected):
    actual = values(config(weights=settings), calls=2)
    np.testing.assert_allclose(actual[1, 0], expected, rtol=1e-5)


# Std sqrt 3 / 4 over steps 0 to 10: powers 0, .2, .., 2.
def test_a_power_ends_at_the_last_step():
    weights = dict(name="std", eps=0.0, power=0.0, power_end=2.0)
    actual = values(config(weights=weights), calls=12)[:, 0]
    powers = np.minimum(np.arange(12) / 5, 2)
    np.testing.assert_allclose(actual, (3**0.5 / 4) ** -powers, rtol=1e-5)
    weights = dict(name="shrunk", power_end=0.0)  # from the default power 1
    actual = values(config(weights=weights), calls=11)[:, 0]
    np.testing.assert_allclose(actual[[0, 5, 10]], [0.21**-0.5, 0.21**-0.25, 1], 1e-5)


SETTINGS = dict(
    power=2.0, power_end=2.0, eps=0.1, ddof=1, group_size=3, prior=1.0, discount=0.5
)


@pytest.mark.parametrize("name", ["objective", *WEIGHTS])
def test_a_setting_that_a_rule_does_not_have_is_refused(name):
    fields = {f.name for f in dataclasses.fields(WeightsConfig)} - {"name"}
    assert set(SETTINGS) == fields
    uses = () if name == "objective" else WEIGHTS[name].uses
    assert set(uses) <= fields
    for field in fields - set(uses):
        message = f"weights.{field} changes nothing in weights {name} "
        refused(message, weights={"name": name, field: SETTINGS[field]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="stdd"), "unknown weights 'stdd'; did you mean 'std'"),
        (dict(name="posterior", prior=0.0), "weights.prior must be positive, got 0.0"),
        (dict(name="posterior", discount=2.0), "weights.discount must be in .* got 2"),
        (dict(name="std", eps=-1.0), "weights.eps must be at least 0, got -1.0"),
        (dict(name="std", ddof=-1), "weights.ddof must be 0 or 1, got -1"),
        (dict(name="finite_group", group_size=1), "weights.group_size must be"),
        (dict(name="std", power=float("nan")), "weights.power must be a finite number"),
        pytest.param(
            dict(name="std", ddof=16), "weights.ddof",
        ),
    ],
)  # fmt: skip
def test_settings_out_of_range_name_their_field(settings, message):
    refused(message, weights=settings)


def test_weights_text():
    assert weights_text(WeightsConfig()) == ""
    assert weights_text(WeightsConfig(name="unit")) == " | w = 1"
    text = weights_text(WeightsConfig(name="std", power=2.0, eps=1e-4, ddof=1))
    assert text == " | w = (std + eps)^-power (power 2, eps 0.0001, ddof 1)"
