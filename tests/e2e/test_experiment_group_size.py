"""The group-size experiment in its smoke form: its files and what they must show."""

import json

import pytest
import tyro

from experiments import group_size

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "group_size"
    argv = ["--smoke", "--results", str(path)]
    group_size.main(tyro.cli(group_size.Config, args=argv))
    return path


def rows(results, kind):
    lines = (results / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_files(results):
    config = json.loads((results / "config.json").read_text())
    assert config["smoke"] and config["git"]
    assert (results / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_exact_mse_is_the_enumerated_one(results):
    enumerated = rows(results, "enumerated")
    assert {row["group_size"] for row in enumerated} == {2, 3, 4}
    for row in enumerated:
        assert row["measured"] == pytest.approx(row["exact"], rel=1e-10)
        assert (row["not_a_rescale"] < 1e-12) == (row["group_size"] < 4)


def test_sampled_mse_follows_the_law(results):
    (pool,) = rows(results, "pool")
    for row in [pool, *rows(results, "one prompt")]:
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
