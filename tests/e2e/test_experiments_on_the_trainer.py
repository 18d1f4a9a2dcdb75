"""The experiments that train, in their smoke form: their files and what these hold."""

import pytest

from tests.e2e.experiments import check_config, check_plot, rows_of, run_script

pytestmark = pytest.mark.slow


def check_files_and_resumption(name, directory):
    """A second call trains nothing, and draws the plot again."""
    results = run_script(name, directory)
    rows = rows_of(results)
    check_config(results)
    check_plot(results)
    (results / "plot.png").unlink()
    assert rows_of(run_script(name, directory)) == rows
    check_plot(results)
    return results, rows


def test_importance_ratio_ablation(tmp_path):
    results, rows = check_files_and_resumption("importance_ratio_ablation", tmp_path)
    pairs = [(row["variant"], row["updates"]) for row in rows]
    names = ["token, two-sided", "trajectory, up-only"]
    assert pairs == [(name, updates) for updates in (1, 4) for name in names]
    first, second, token, whole = rows
    for row in (first, second):  # one update: the ratio is 1 and the variants coincide
        assert row["clipped"] == row["deviation"] == 0
        assert row["final"] == pytest.approx(first["final"], rel=1e-3)
        assert row["gradient_norms"] == pytest.approx(first["gradient_norms"], rel=1e-3)
    assert 0 < token["deviation"] < whole["deviation"]
    assert "gradient norms of all agree" in (results / "table.md").read_text()


def test_normalization_bias(tmp_path):
    results, rows = check_files_and_resumption("normalization_bias", tmp_path)
    assert [row["variant"] for row in rows] == ["grpo without std", "dr_grpo"]
    for row in rows:
        steps = row["settings"]["steps"]
        assert 0 <= row["heldout"] <= 1
        counts = [sum(kind[0] for kind in step) for step in row["completions"]]
        assert counts == [256] * steps
        assert [sum(step) for step in row["groups"]] == [16] * steps
        (rates, stds), *_ = row["probed"]
        assert len(rates) == len(stds) == 64
    table = (results / "table.md").read_text()
    assert "advantage mass" in table and "w_G(p)" in table
