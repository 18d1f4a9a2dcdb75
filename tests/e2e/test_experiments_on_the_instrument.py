"""The experiments that measure runs, in their smoke form."""

import math

import numpy as np
import pytest

from experiments import (
    estimator_coverage,
    exact_truth,
    interval_widths,
    three_phases,
)
from grpo_jax.instrument import widths
from tests.e2e.experiments import check_config, check_plot, rows_of, run_smoke

pytestmark = pytest.mark.slow


def test_three_phases(tmp_path, capsys):
    directory = run_smoke(three_phases, tmp_path / "results") / "chains"
    check_config(directory)
    check_plot(directory)
    rows = rows_of(directory)
    assert [(r["method"], r["seed"]) for r in rows] == [
        ("std", 0), ("std", 1), ("none", 0), ("none", 1)
    ]  # fmt: skip
    for row in rows:
        assert row["step"] == [0, 2, 4] and len(row["exact"]) == 3
        assert len(row["hard"]) == len(row["easy"]) == len(row["label"]) == 3
    # One start for both methods: only the weights differ.
    assert rows[0]["exact"][0] == rows[2]["exact"][0]
    assert "std less none" in capsys.readouterr().out
    # Nothing is trained again, and runs of other settings are refused.
    before = (directory / "run-std-lr0.0003-seed0" / "metrics.jsonl").stat().st_mtime
    run_smoke(three_phases, tmp_path / "results")
    after = (directory / "run-std-lr0.0003-seed0" / "metrics.jsonl").stat().st_mtime
    assert before == after
    with pytest.raises(SystemExit, match="sampling.group_size: 16 -> 8"):
        run_smoke(three_phases, tmp_path / "results", "--group-size", "8")


def test_exact_truth(tmp_path):
    path = run_smoke(exact_truth, tmp_path / "results")
    check_config(path)
    check_plot(path)
    rows = rows_of(path)
    assert {(r["group_size"], r["width"]) for r in rows} == {
        (8, None), (16, None), (16, 256)
    }  # fmt: skip
    for row in rows:
        estimated, exact = row["slope along the update"]
        assert len(estimated) == len(exact) == 8 and all(map(math.isfinite, exact))
    table = (path / "table.md").read_text()
    assert "| 0 | 16 | curvature |" in table and "| 0 | 16 | 256 | std |" in table


def test_estimator_coverage(tmp_path):
    path = run_smoke(estimator_coverage, tmp_path / "results")
    check_config(path)
    rows = rows_of(path)
    assert len(rows) == 2 * 2 * 2  # cosines, settings, group sizes
    assert all(row["repeats"] == 20 for row in rows)
    table = (path / "table.md").read_text()
    assert "| equal .4 | 32 | now |" in table and "| all | all | before |" in table


# A short form of the grid. In the first cell the mean was .28 and the std .29, labels
# were III, all sure and all wrong, and no interval covered.
@pytest.mark.parametrize(
    ("cosines", "setting", "group_size", "sure"),
    [
        ("equal .4", 2, 32, 0.6),
        ("equal .2", 3, 16, 0.4),
        ("signs .3", 1, 16, 0.6),
        ("orthogonal", 5, 8, 0.0),
        ("clusters 12", 4, 16, 0.0),
    ],
)
def test_intervals_of_cosines_cover_and_sure_labels_are_right(
    cosines, setting, group_size, sure
):
    c = estimator_coverage.Config(repeats=60)
    cell = {"cosines": cosines, "setting": setting, "prompts": 32}
    row = estimator_coverage.measure_cell(c, cell | {"group_size": group_size}, 0)
    now = row["now"]
    assert now["told"] >= 54
    assert now["wrong"] <= 3 and now["sure"] >= sure * 60
    for name, bias in (("mean", 0.02), ("std", 0.05)):
        assert abs(now[name]["error"]) <= bias * now["told"]
    for name in ("mean", "std", "small"):  # 5 % missed, 3 of 60, and chance
        assert now[name]["covered"] >= 0.87 * now["told"]


def test_interval_widths(tmp_path):
    path = run_smoke(interval_widths, tmp_path / "results")
    check_config(path)
    rows = rows_of(path)
    assert len(rows) == 2 * 2 * 2  # kinds, group sizes, prompts
    assert "| one skill | 32 | " in (path / "table.md").read_text()


# What `grpo-jax plan` says of the instrument, against other draws of known gradients.
@pytest.mark.parametrize(
    ("kind", "prompts", "group_size"),
    [
        ("a mix of skills", 8, 8),
        ("a mix of skills", 20, 12),
        ("a mix of skills", 64, 32),
        ("one skill", 8, 16),
        ("one skill", 48, 32),
    ],
)
def test_the_plan_foretells_simulated_widths(kind, prompts, group_size):
    assert widths.ASSUMED[kind] == interval_widths.KINDS[kind].half_at
    told, half = widths.expected_width(prompts, group_size, kind)
    row = interval_widths.measure_cell(kind, prompts, group_size, repeats=100, seed=1)
    assert abs(row["told"] - told) <= 0.15  # 3 stds of a share of 100
    assert row["half"] == pytest.approx(half, rel=0.25)


# Cosines of prompts drawn from the assumed distributions have the stds it states.
@pytest.mark.parametrize("kind", interval_widths.KINDS)
def test_the_stds_of_the_assumed_cosines(kind):
    unit = interval_widths.unit_gradients(np.random.default_rng(0), kind, 20, 200)
    cosines = np.einsum("rpk,rqk->rpq", unit, unit)
    np.testing.assert_allclose(np.diagonal(cosines, axis1=1, axis2=2), 1, rtol=1e-5)
    above = cosines[:, *np.triu_indices(200, 1)]
    assert interval_widths.true_std(kind) == pytest.approx(above.std(), rel=0.1)
