"""The adaptive-weighting experiment in its smoke form: its files, and its rules."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adaptive_rules, adaptive_weighting
from experiments.adaptive_rules import RULES, Seen
from experiments.adaptive_weighting import Config
from tests.e2e.experiments import check_config, check_plot, rows_of, run_smoke

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "adaptive_weighting"
    return run_smoke(adaptive_weighting, path)


def test_files_and_what_is_redrawn_from_them(results):
    assert check_config(results)["task_path"] is None
    before = (results / "metrics.jsonl").stat()
    (results / "plot.png").unlink()
    adaptive_weighting.main(Config(smoke=True, plot_only=True, results=results))
    check_plot(results)
    assert (results / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    assert "hard posterior" in (results / "table.md").read_text()


def test_rates_are_chosen_on_other_seeds(results):
    trained = rows_of(results, "loglinear")
    assert [row["rule"] for row in trained] == list(RULES)
    for row in trained:
        assert 4.0 <= row["log2_rate"] <= 6.0
        assert len(row["mean"]) == 3 and 0 < np.mean(row["mean"]) < 1
    runs = rows_of(results, "task")
    assert {row["seed"] for row in runs} == {0, 1, 2}
    assert {row["rule"] for row in runs} == {"unit", "std 1", "hard posterior"}


def test_every_rule_is_1_at_one_half_and_known():
    many = jnp.full(2, 1e4)
    seen = Seen(jnp.full(2, 0.5), many, many, jnp.float32(0.3), jnp.float32(0.1))
    for name, rule in RULES.items():
        np.testing.assert_allclose(rule(seen), 1, atol=0.02, err_msg=name)


def test_rules_of_the_trainer_are_those_of_the_policies():
    rewards = jnp.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    weights, _ = adaptive_rules.hard_weights().weights(rewards, ())
    mean = rewards.mean(1)
    expected = adaptive_rules.skewed(mean, 1.0, 0.5)
    np.testing.assert_allclose(weights, jnp.where(mean == 1, 0, expected), rtol=1e-6)
    rule = adaptive_rules.hard_posterior_weights(5)
    ids = jnp.array([4, 0, 2])
    first, state = rule.weights(rewards, rule.init(), ids)
    p = (jnp.array([1, 4, 3]) + 0.5) / 5
    expected = adaptive_rules.skewed(p, 1.0, 0.5).at[1].set(0)
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    second, _ = rule.weights(rewards, state, ids)
    assert second[0] > first[0]  # more certainly hard
