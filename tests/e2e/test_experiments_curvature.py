"""The experiments on curvature and on the relaxed assumptions, in their smoke form."""

import numpy as np
import pytest

from experiments import local_curvature, relaxed_assumptions
from tests.e2e.experiments import check_config, check_plot, rows_of, run_smoke

# Of few prompts a mean may be of none, which as a script they only warn of.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where both find the same run."""
    return str(tmp_path_factory.mktemp("runs"))


def smoke(experiment, directory, runs):
    """(results, rows of metrics.jsonl); a second call only draws the plot again."""
    for flags in ([], ["--plot-only"]):
        flags += ["--runs", runs]
        results = run_smoke(experiment, directory / "results", *flags) / "chains"
        check_plot(results)
        (results / "plot.png").unlink()
    check_config(results)
    return results, rows_of(results)


def test_local_curvature(tmp_path, runs):
    results, rows = smoke(local_curvature, tmp_path, runs)
    assert [(row["seed"], row["step"]) for row in rows] == [(0, 0), (0, 2)]
    for row in rows:
        x = {k: np.array(v, float) for k, v in row.items() if k not in ("seed", "step")}
        assert all(v.shape == (6,) for v in x.values())
        np.testing.assert_allclose(x["sigma2"], x["p"] * (1 - x["p"]), rtol=1e-3)
        largest = 1.01 * np.maximum(-x["low"], x["high"])
        for name in ("own", "update", "sampled_exact"):  # inside the spectrum
            assert not (np.abs(x[name]) > largest).any()
        assert (x["fisher"] > 0).all()
    assert "Correlations of |curvature|" in (results / "table.md").read_text()


def test_relaxed_assumptions(tmp_path, runs):
    results, rows = smoke(relaxed_assumptions, tmp_path, runs)
    kinds = [(row["step"], row["group_size"]) for row in rows if "step" in row]
    assert kinds == [(step, g) for step in (0, 2) for g in (None, 8, 16)]
    for row in rows:
        if row["group_size" if "step" in row else "dimension"] is None:
            assert row["prompts"] == 6  # exact gradients are never tied
            assert row["agree"] == 1 and row["false"] == row["missed"] == 0
        if row["violating"] is not None:
            assert 0 <= row["violating"] <= 1
            median, p99, largest = row["m_full"]
            assert 0 < median <= p99 <= largest
            for reinforce, grpo in row["costs"]:
                assert reinforce >= 1 and grpo >= 1
    random = [row for row in rows if "dimension" in row]
    assert [row["dimension"] for row in random] == [4, 32, 256]
    assert "random features" in (results / "table.md").read_text()
