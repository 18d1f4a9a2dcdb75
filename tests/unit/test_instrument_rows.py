"""Rows of instrument.jsonl made of a real measurement: fields, shapes, reading."""

import json
from functools import partial

import chex
import jax
import numpy as np
import pytest

from grpo_jax.diagnostics.phases import Phase, phase
from grpo_jax.instrument.measurement import UpdateEffect, measure
from grpo_jax.instrument.record import make_row, metrics_of, update_fields
from grpo_jax.instrument.rows import (
    ROW_FIELDS,
    ExactFields,
    Row,
    UpdateFields,
    finite_mean,
    usable,
)
from grpo_jax.instrument.weightings import RULES
from grpo_jax.runs.fields import FIELDS
from grpo_jax.runs.lines import without_nan
from tests.helpers import random_rollouts, tiny_policy
from tests.unit.test_instrument_figures import made_row

P, G, WIDTH = 3, 8, 64


@pytest.fixture(scope="module")
def measured():
    """(measurement, rewards) of a tiny policy, one completion the right answer."""
    policy = tiny_policy(num_layers=1)
    rollouts = random_rollouts(policy, num_prompts=P, group_size=G, tokens=3)
    answers = rollouts._replace(
        completions=rollouts.completions[:, :1],
        completion_mask=rollouts.completion_mask[:, :1],
        behaviour_logprobs=rollouts.behaviour_logprobs[:, :1],
        rewards=None,
    )
    compiled = jax.jit(partial(measure, width=WIDTH, exact=False))
    measurement = compiled(policy, rollouts, answers, 1.0, jax.random.key(0))
    return jax.device_get(measurement), np.asarray(rollouts.rewards)


@pytest.fixture(params=[True, False], ids=["one answer", "several answers"])
def row(request, measured):
    measurement, rewards = measured
    row = make_row(
        measurement,
        phase(measurement.geometry, rewards, num_directions=WIDTH),
        rewards,
        np.full(P, 0.25) if request.param else None,
        step=3,
        prompts=[4, 5, 6],
        num_directions=WIDTH,
    )
    row["update"] = update_fields(UpdateEffect(*np.ones((4, P))), np.zeros(P))
    return row


def test_a_row_has_exactly_the_fields_of_the_schema(row):
    assert set(row) == set(ROW_FIELDS) == set(made_row(0))
    assert set(row["phase"]) == set(Phase._fields) == set(made_row(0)["phase"])
    assert set(row["update"]) == UpdateFields.__required_keys__
    assert set(row["weightings"]) == set(RULES)
    if row["exact"] is not None:
        assert set(row["exact"]) == ExactFields.__required_keys__
        assert set(row["exact"]) == set(made_row(0)["exact"])
    assert set(made_row(0)["update"]) <= UpdateFields.__required_keys__
    assert set(made_row(0)["geometry"]) <= set(row["geometry"])


def test_every_field_is_explained():
    assert all(len(meaning) > 8 for meaning in ROW_FIELDS.values())
    assert Row.__optional_keys__ == {"prompts", "directions"}


def test_a_row_comes_back_from_its_file_and_is_usable(row):
    line = json.loads(json.dumps(without_nan(row), allow_nan=False))
    assert [read["step"] for read in usable([line])] == [3]
    optional = {
        name: line[name] for name in ROW_FIELDS if name in Row.__required_keys__
    }
    assert len(usable([optional])) == 1
    for name in Row.__required_keys__:
        assert not usable([{k: x for k, x in line.items() if k != name}])


def test_shapes_of_a_measurement(measured, row):
    measurement, _ = measured
    matrices = (
        measurement.null_cosines,
        measurement.feature_cosines,
        measurement.centred_feature_cosines,
        measurement.exact_cosines,
        measurement.geometry.cosines,
        row["geometry"]["cosines"],
    )
    for matrix in matrices:
        chex.assert_shape(np.asarray(matrix, float), (P, P))
    for name in ("curvature", "halves", "spread", "slope", "sigma", "group_mean"):
        chex.assert_axis_dimension(np.asarray(row[name], float), 0, P)
    chex.assert_shape(measurement.exact_norms, (P,))


def test_metrics_of_a_measurement_are_fields_of_metrics(row):
    metrics = metrics_of(row)
    assert metrics.keys() <= FIELDS.keys()
    assert ("geometry/exact_std_cosine" in metrics) == (row["exact"] is not None)


def test_the_mean_of_finite_entries():
    x = np.array([[1.0, np.nan, 3.0], [np.nan, np.inf, np.nan]])
    np.testing.assert_array_equal(finite_mean(x, 1), [2.0, np.nan])


def test_rollouts_without_rewards_cannot_be_measured():
    policy = tiny_policy(num_layers=1)
    rollouts = random_rollouts(policy, num_prompts=P, group_size=G, tokens=3)
    with pytest.raises(ValueError, match="rollouts must have rewards, got None"):
        measure(
            policy, rollouts._replace(rewards=None), None, 1.0, jax.random.key(0),
            width=4, exact=False,
        )  # fmt: skip
