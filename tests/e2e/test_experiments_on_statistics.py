"""The simulations of intervals and of the report's sentences, in their smoke form."""

import pytest

from experiments import interval_coverage, verdict_nulls
from tests.e2e.experiments import check_config, rows_of, run_smoke

pytestmark = pytest.mark.slow


def test_interval_coverage(tmp_path, capsys):
    path = run_smoke(interval_coverage, tmp_path / "results")
    check_config(path)
    rows = rows_of(path, "grid")
    assert {row["n"] for row in rows} == {16, 64} and len(rows) > 60
    # 95 % of 100 repeats: less than 87 has a probability of .001.
    assert min(row["ours"]["covers"] for row in rows) >= 0.87
    for p, most in ((0.005, 0.5), (0.05, 0.8), (0.95, 0.8)):
        assert min(r["bootstrap"]["covers"] for r in rows if r["p"] == p) < most
    width = {
        r["n"]: r["ours"]["width"] for r in rows if r["samples"] == 1 and r["p"] == 0.5
    }
    several = [row for row in rows if row["samples"] != 1 and row["p"] == 0.5]
    assert all(row["ours"]["width"] < 1.1 * width[row["n"]] for row in several)
    assert "Width: the mean of ours" in capsys.readouterr().out


def test_verdict_nulls(tmp_path):
    path = run_smoke(verdict_nulls, tmp_path / "results")
    check_config(path)
    rows = {row["truth"]: row for row in rows_of(path, "interference")}
    null, common = rows["orthogonal"], rows["all .1"]
    # 5 % of 40 runs: more than 7 have a probability of .001.
    assert null["helps"] + null["hurts"] <= 7 / 40
    assert 0.3 < null["helps before"] < 0.8  # as often as a coin
    assert common["wrong"] <= 5 / 40 and common["helps"] >= common["hurts"]
    for row in rows_of(path, "C"):
        assert row["wrongly below"] + row["wrongly not below"] <= 5 / 40
    assert max(row["wrong before"] for row in rows_of(path, "C")) > 0.5
    assert all(row["ours"] <= 3 / 40 for row in rows_of(path, "change"))
    for row in rows_of(path, "kinds"):
        assert row["wrong"] <= 0.3 and row["below 0"] <= 0.3  # of 10 runs
