"""Every entry of every registry against its loops in `axes`, in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.objectives.objective import AXES
from grpo_jax.preconditioner import apply_weights
from grpo_jax.prompt_weights import WEIGHTS
from tests.golden import axes
from tests.golden.test_every_objective import assert_close, looped, random_batch

# Every choice at its plainest: the axis that is tested is what differs from it.
BASE = gj.Objective(
    baseline="mean",
    scale="none",
    ratio="token",
    surrogate="is",
    aggregation="sequence_mean_token_sum",
    source="a convention",
)
ENTRIES = [(axis, name) for axis, registry in AXES.items() for name in registry]
WITH_REFERENCE = [(axis, name) for axis, name in ENTRIES if name in axes.AXES[axis]]

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("axis", AXES)
def test_there_is_a_reference_for_every_entry(axis):
    missing = ", ".join(sorted(set(AXES[axis]) - set(axes.AXES[axis])))
    assert not missing, f"add to AXES[{axis!r}] in tests/golden/axes.py: {missing}"
    gone = ", ".join(sorted(set(axes.AXES[axis]) - set(AXES[axis])))
    assert not gone, f"in AXES[{axis!r}] of tests/golden/axes.py, but no entry: {gone}"


def library(objective, batch):
    """(losses [P], gradient of their mean)."""
    others = jax.tree.map(jnp.asarray, batch)
    if objective.token_weight != "nthr":
        others.pop("token_weights")
    logprobs = others.pop("logprobs")

    def loss(logprobs):
        losses, _ = gj.per_prompt_losses(objective, logprobs=logprobs, **others)
        return losses.mean(), losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logprobs)
    return np.asarray(losses), np.asarray(gradient)


@pytest.mark.parametrize(("axis", "name"), WITH_REFERENCE)
def test_losses_and_gradients(axis, name):
    case = axes.AXES[axis][name]
    objective = dataclasses.replace(BASE, **case.changes, **{axis: name})
    for seed in (0, 1):
        batch = random_batch(seed)
        losses, gradient = looped(case.row, batch)
        assert_close(library(objective, batch), (losses, gradient))
        assert np.abs(gradient).max() > 1e-6


def test_there_is_a_reference_for_every_rule():
    missing = ", ".join(sorted(set(WEIGHTS) - set(axes.RULES)))
    assert not missing, f"add to RULES in tests/golden/axes.py: {missing}"
    assert set(axes.RULES) <= set(WEIGHTS)


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n in axes.RULES])
def test_prompt_weights(name):
    case = axes.RULES[name]
    rule = WEIGHTS[name].build(case.settings, 6)
    rewards = np.random.default_rng(0).choice([0.0, 0.25, 1.0], (6, 5))
    rewards[1], rewards[2, 3] = 1.0, math.nan
    ids = np.array([3, 0, 5, 1, 4, 2])
    call = jax.jit(lambda rewards: apply_weights(rule, rewards, rule.init(), ids)[0])
    present = [[r for r in row if not math.isnan(r)] for row in rewards.tolist()]
    expected = case.weights(present)
    np.testing.assert_allclose(call(rewards), expected, rtol=1e-10)
    assert sum(w > 0 for w in expected) >= 5
