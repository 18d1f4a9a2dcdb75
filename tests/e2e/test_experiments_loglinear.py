"""The experiments on the solvable policy in smoke form: files and what they show."""

import math

import pytest

from experiments import convergence_rates, finite_group
from tests.e2e.experiments import check_config, check_plot, rows_of, run_smoke

pytestmark = pytest.mark.slow


def run(experiment, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / experiment.__name__
    return run_smoke(experiment, path)


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    return run(convergence_rates, tmp_path_factory)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return run(finite_group, tmp_path_factory)


def check_files(experiment, results):
    check_config(results)
    before = (results / "metrics.jsonl").stat()
    for _ in range(2):  # as written by the run, then from the metrics alone
        check_plot(results)
        (results / "plot.png").unlink()
        experiment.main(experiment.Config(results=results, plot_only=True))
    assert (results / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns


def test_files(rates, groups):
    check_files(convergence_rates, rates)
    check_files(finite_group, groups)


def test_normalising_takes_fewer_safe_steps_on_orthogonal_prompts(rates):
    orthogonal = [r for r in rows_of(rates, "steps") if r["features"] == "orthogonal"]
    for row in [r for r in orthogonal if r["step"] == "safe"]:
        assert row["chi"] == pytest.approx([1, 1])
        for plain, std, log_odds in zip(*row["mean"].values(), strict=True):
            assert plain > std > log_odds > 0
    # The best step is one of a grid that has the safe step.
    for safe, best in zip(orthogonal[::2], orthogonal[1::2], strict=True):
        for method, steps in best["mean"].items():
            pairs = zip(steps, safe["mean"][method], strict=True)
            assert all(few <= many for few, many in pairs)


def test_bounds_hold_but_for_the_sum_in_theorem_3_2(rates):
    bounds = rows_of(rates, "bound")
    assert len(bounds) == 20
    for row in bounds:
        assert row["violated"] == 0 or row["name"].startswith("3.2 sum")
        assert row["median"] <= row["worst"] < 1 + 1e-9 or row["violated"]
    assert any(row["violated"] for row in bounds)
    (example,) = rows_of(rates, "counterexample")
    assert example["first"] == 36 and example["always_after"]
    assert example["min_violated"] == 0


def test_effective_weight_is_the_expected_std(groups):
    enumerated = rows_of(groups, "enumerated")
    assert {row["group_size"] for row in enumerated} == {2, 3, 4}
    for row in enumerated:
        assert row["error"] < 1e-12
        assert (row["not_a_rescale"] < 1e-12) == (row["group_size"] < 4)
    for row in rows_of(groups, "weight"):
        g = row["group_size"]
        columns = (row[k] for k in ("measured", "se", "expected"))
        for measured, se, expected in zip(*columns, strict=True):
            assert abs(measured - expected) < 5 * se < 0.25 * expected
        assert row["counted_error"] < 1e-12
        assert row["ddof_1_over_0"] == pytest.approx([math.sqrt(1 - 1 / g)] * 2)
        assert row["saturation"] == pytest.approx(math.sqrt(g - 1), rel=1e-6)


def test_training_at_g_2_and_3_is_rescaled_reinforce(groups):
    for row in rows_of(groups, "training"):
        assert (row["rescaled_difference"] < 1e-9) == (row["group_size"] < 4)


def test_unknown_choices_are_refused(tmp_path):
    c = convergence_rates.Config(features=("diagonal",), results=tmp_path)
    with pytest.raises(ValueError, match="features must be"):
        convergence_rates.main(c)
    c = finite_group.Config(train_group_sizes=(5,), results=tmp_path)
    with pytest.raises(ValueError, match="train_group_sizes must split"):
        finite_group.main(c)
