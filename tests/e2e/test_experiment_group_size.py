"""The group-size experiment in its smoke form: its files and what they must show."""

import pytest

from experiments import group_size
from tests.e2e.experiments import check_config, check_plot, rows_of, run_smoke

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "group_size"
    return run_smoke(group_size, path)


def test_files(results):
    check_config(results)
    check_plot(results)


def test_exact_mse_is_the_enumerated_one(results):
    enumerated = rows_of(results, "enumerated")
    assert {row["group_size"] for row in enumerated} == {2, 3, 4}
    for row in enumerated:
        assert row["measured"] == pytest.approx(row["exact"], rel=1e-10)
        assert (row["not_a_rescale"] < 1e-12) == (row["group_size"] < 4)


def test_sampled_mse_follows_the_law(results):
    (pool,) = rows_of(results, "pool")
    for row in [pool, *rows_of(results, "one prompt")]:
        for measured, se, exact in zip(
            *(sum(row[k], []) for k in ("measured", "se", "exact")), strict=True
        ):
            assert abs(measured - exact) < 5 * se < 0.2 * exact
    # 4 standard errors, and half the way to sqrt(c3 / c1) without the 1.
    assert pool["fitted"] == pytest.approx(pool["law"], abs=0.5)
    assert pool["interval"][1] - pool["interval"][0] < 0.5
    assert pool["angle"][0] < 1e-5 < pool["angle"][-1]


def test_plot_is_redrawn_from_the_metrics_alone(results):
    (results / "plot.png").unlink()
    before = (results / "metrics.jsonl").stat()
    group_size.main(group_size.Config(results=results, plot_only=True))
    assert (results / "plot.png").exists()
    assert (results / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns
