"""The instrument in a run: its rows, that it changes no number, that it resumes."""

import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.instrument.plan import plan_probe
from grpo_jax.instrument.rows import ROW_FIELDS, rank_correlation
from grpo_jax.models.config import ModelConfig
from grpo_jax.planning.plan import make_plan
from grpo_jax.runs.config import (
    CheckpointConfig,
    EvaluationConfig,
    InstrumentConfig,
    SamplingConfig,
    TrainConfig,
    WarmStartConfig,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.recorded import run_config
from grpo_jax.runs.snapshots import load_policy, saved_steps
from grpo_jax.tasks.registry import load_task

MEASUREMENTS = InstrumentConfig(every=2, prompts=5, group_size=8)


def config_of(directory, instrument=MEASUREMENTS, **more):
    config = TrainConfig(
        model=ModelConfig(width=32, mlp_width=48, head_dim=8),
        sampling=SamplingConfig(prompts=16, group_size=16),
        warm_start=WarmStartConfig(max_steps=300, noisy_steps=0),
        evaluation=EvaluationConfig(every=0, prompts=16),
        checkpoint=CheckpointConfig(every=1, keep=10),
        instrument=instrument,
        steps=4,
        run_dir=str(directory),
    )
    return dataclasses.replace(config, **more)


def rows_of(directory, name="instrument"):
    return read_lines(directory / f"{name}.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("instrument") / "run"
    gj.train(config_of(directory))
    return directory


@pytest.mark.slow
def test_a_row_per_measurement(finished):
    rows = rows_of(finished)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert [row["update"] is None for row in rows] == [False, False, True]
    assert all(len(row["prompts"]) == 5 for row in rows)
    assert rows[0]["prompts"] == rows[-1]["prompts"]
    for row in rows:
        assert set(row) == set(ROW_FIELDS)
        p = np.array(row["pass_rate"])
        assert ((p >= 0) & (p <= 1)).all() and row["phase"]["label"]
        assert np.array(row["geometry"]["cosines"], float).shape == (5, 5)
        assert set(row["weightings"]) == {"reinforce", "std", "shrunk", "1/std^2"}


# Slope and half the curvature, from the answer alone, are the change that happened, up
# to third order.
@pytest.mark.slow
def test_the_exact_prediction_is_what_happened(finished):
    for row in rows_of(finished)[:2]:
        update = {k: np.array(v, float) for k, v in row["update"].items()}
        predicted = update["exact_slope"] + update["exact_curvature"] / 2
        assert np.abs(update["realised"]).max() > 1e-4
        np.testing.assert_allclose(
            update["realised"], predicted, atol=0.1 * np.abs(predicted).max()
        )


@pytest.mark.slow
def test_metrics_of_a_measurement_are_in_its_steps_line(finished):
    metrics = {row["step"]: row for row in rows_of(finished, "metrics")}
    measured = {row["step"]: row for row in rows_of(finished)}
    for step, row in metrics.items():
        assert ("phase/label" in row) == (step in measured)
    assert metrics[2]["phase/label"] == measured[2]["phase"]["label"]
    assert "time/instrument_s" in metrics[3]  # the comparison after the update


# The same parameters with and without measurements.
@pytest.mark.slow
def test_measuring_does_not_change_the_run(finished, tmp_path):
    gj.train(config_of(tmp_path / "off", InstrumentConfig(every=0)))
    one, two = (rows_of(d, "metrics") for d in (finished, tmp_path / "off"))
    assert [r["reward/mean"] for r in one[1:]] == [r["reward/mean"] for r in two[1:]]
    measured, other = (load_policy(d, 4) for d in (finished, tmp_path / "off"))
    chex.assert_trees_all_equal(measured.params, other.params)
    assert not (tmp_path / "off" / "instrument.jsonl").read_text()


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_rows(finished, tmp_path):
    directory = tmp_path / "run"
    config = config_of(directory)
    gj.train(dataclasses.replace(config, steps=2))
    assert [r["step"] for r in rows_of(directory)] == [0, 2]
    gj.train(dataclasses.replace(config, resume=True))
    assert rows_of(directory) == rows_of(finished)


@pytest.mark.slow
def test_policies_of_a_run_can_be_loaded(finished):
    assert saved_steps(finished) == [0, 1, 2, 3, 4]
    start, end = load_policy(finished, 0), load_policy(finished, 4)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(
            jax.tree.leaves(start.params), jax.tree.leaves(end.params), strict=True
        )
    )
    with pytest.raises(ConfigError, match=r"step must be one of \[0, 1, 2, 3, 4\]"):
        load_policy(finished, 7)


# Without a single answer: sampled before and after with the same random numbers.
@pytest.mark.slow
def test_a_task_with_many_right_answers(tmp_path):
    task = load_task("chains", train_prompts=32, heldout_prompts=8)

    def share(example, text):
        pairs = zip(example.answer.split(","), text.split(","), strict=False)
        return sum(a == b for a, b in pairs) / len(example.answer.split(","))

    task = dataclasses.replace(task, reward=share, single_answer=False, warm_start=None)
    sampling = SamplingConfig(prompts=6, group_size=8, max_new_tokens=8)
    cold = WarmStartConfig(enabled=False)
    config = config_of(tmp_path / "run", warm_start=cold, sampling=sampling)
    gj.train(config, task=task)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row["exact"] is None and row["pass_rate"] is None for row in rows)
    update = rows[0]["update"]
    assert set(update["exact_slope"]) == {None}
    assert len(update["realised"]) == 5 and None not in update["predicted"]


# A finished run goes on: its last step is measured again, with the update after it.
@pytest.mark.slow
def test_a_run_continued_past_its_end_measures_there_again(tmp_path):
    directory = tmp_path / "run"
    config = config_of(directory, dataclasses.replace(MEASUREMENTS, every=4))
    gj.train(dataclasses.replace(config, steps=2))
    assert rows_of(directory)[-1]["update"] is None
    gj.train(dataclasses.replace(config, resume=True))
    rows = rows_of(directory)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert [row["update"] is None for row in rows] == [False, False, True]


# Nothing is measured, nor compiled for it, before the end; a resumed run knows.
@pytest.mark.slow
def test_a_measurement_at_the_end_alone(tmp_path):
    wanted = InstrumentConfig(every=4, at_start=False, prompts=4, group_size=8)
    directory = tmp_path / "run"
    gj.train(config_of(directory, wanted, steps=2))
    assert [row["step"] for row in rows_of(directory)] == [2]
    gj.train(TrainConfig(run_dir=str(directory), resume=True, steps=4))
    rows = rows_of(directory)
    assert rows[-1]["step"] == 4 and rows[-1]["update"] is None
    metrics = {row["step"]: row for row in rows_of(directory, "metrics")}
    assert "time/instrument_s" not in metrics[0]
    assert metrics[4]["time/instrument_s"] > 0


# What the plan chose is recorded.
@pytest.mark.slow
def test_a_run_records_what_it_measures(tmp_path):
    directory = tmp_path / "run"
    gj.train(config_of(directory, InstrumentConfig(max_overhead=6.0), steps=2))
    chosen = run_config(directory).instrument
    (first, last) = rows_of(directory)
    assert len(first["prompts"]) == chosen.prompts >= 8
    assert (first["step"], last["step"], chosen.at_start) == (0, 2, True)


# All rewards missing at a measurement: no phase, and the run goes on and resumes.
@pytest.mark.slow
def test_a_measurement_without_rewards(tmp_path):
    task = load_task("chains", train_prompts=32, heldout_prompts=8)
    calls = itertools.count(1)

    def reward(*_):  # now and then one: a step without any ends the run
        return 1.0 if next(calls) % 100 == 0 else float("nan")

    task = dataclasses.replace(task, reward=reward, warm_start=None)
    cold = WarmStartConfig(enabled=False)
    config = config_of(tmp_path / "run", warm_start=cold)
    gj.train(dataclasses.replace(config, steps=2), task=task)
    gj.train(dataclasses.replace(config, resume=True), task=task)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert {row["phase"]["label"] for row in rows} == {"unknown"}


SIZES = dict(train_prompts=500, prompt_tokens=10, max_new_tokens=8)


def plan(parameters=10**5, **settings):
    config = TrainConfig(instrument=InstrumentConfig(**settings), steps=400)
    return plan_probe(config, parameters=parameters, **SIZES)


# All looks count, the one before the first step too: 11 of 400 steps with every 40.
def test_the_budget_chooses_the_probe_set():
    few, many = plan(max_overhead=0.1, every=50), plan(max_overhead=0.4, every=50)
    assert 8 <= few.prompts < many.prompts <= 32
    for result, most in ((few, 0.1), (many, 0.4)):
        assert result.every == 50 and result.at_start
        assert 0.6 * most < result.share <= most
    assert plan(every=80).prompts > plan(every=50).prompts
    assert few.exact and few.num_directions is None
    large = plan(parameters=10**9)
    assert not large.exact and large.num_directions == large.width
    assert large.width * 4 * large.prompts * 7 <= 2**27
    assert plan(every=0) is None
    assert plan(prompts=40).prompts == 40  # as asked for; the plan warns
    once, nine = (plan(prompts=4, every=e, at_start=False) for e in (400, 40))
    np.testing.assert_allclose(nine.share, 10 * once.share)
    assert "% of the time of all steps" in few.text(400)


# As the budget falls: every so many steps, at both ends, at the end alone, not at all.
def test_too_few_probe_prompts_are_measured_rarely_instead():
    unit = plan(prompts=8, every=400, at_start=False).share  # of 8 prompts once
    ways = [
        (plan(max_overhead=1.01 * looks * unit), text)
        for looks, text in (
            (11, "at the start, every 40 steps and at the end"),
            (2, "at the start and at the end"),
            (1, "gradients, at the end"),
        )
    ]
    for probe, text in ways:
        assert probe.prompts >= 8
        assert text in probe.text(400)
    assert [(w.every, w.at_start) for w, _ in ways] == [
        (40, True),
        (400, True),
        (400, False),
    ]
    with pytest.raises(ConfigError, match="measured once"):
        plan(max_overhead=0.9 * unit)
    with pytest.raises(ConfigError, match="measured 11 times"):  # given: as given
        plan(every=40, max_overhead=5 * unit, at_start=True)
    assert plan(prompts=2, max_overhead=5 * unit).every == 40


# Where a measurement takes minutes, the first step does not wait for it.
def test_a_slow_measurement_does_not_come_first():
    def times(**settings):
        config = TrainConfig(instrument=InstrumentConfig(**settings), steps=400)
        probe = plan_probe(config, parameters=10**5, slow_start=True, **SIZES)
        return probe.at_start, probe.text(400)

    start, text = times(max_overhead=1.0)
    assert not start and "gradients, every 40 steps and at the end" in text
    assert times(at_start=True)[0] and not times(at_start=False)[0]
    assert plan().at_start


# Of few samples, many prompts tell less than fewer prompts of 16 (BUILD_NOTES).
def test_probe_prompts_have_more_samples_than_a_small_step_where_these_fit():
    def sizes(**settings):
        config = TrainConfig(
            sampling=SamplingConfig(prompts=8, group_size=8),
            instrument=InstrumentConfig(**settings),
            steps=400,
        )
        probe = plan_probe(config, parameters=10**5, **SIZES)
        return probe.prompts, probe.group_size

    unit = plan_probe(
        TrainConfig(
            sampling=SamplingConfig(prompts=8, group_size=8),
            instrument=InstrumentConfig(prompts=8, group_size=16, every=400),
            steps=400,
        ),
        parameters=10**5,
        **SIZES,
    ).share
    assert sizes(every=400, max_overhead=1.01 * unit) == (8, 16)
    prompts, samples = sizes(every=400, max_overhead=0.99 * unit)
    assert prompts >= 8 and samples == 8
    assert sizes(prompts=30)[1] == 8 and sizes(group_size=12, max_overhead=9.0)[1] == 12


def test_bad_budgets_raise():
    with pytest.raises(ConfigError, match="too low for 8 probe prompts, below"):
        plan(max_overhead=0.001)
    with pytest.raises(ConfigError, match="must be from 2 to 500.* got 501"):
        plan(prompts=501)
    with pytest.raises(ConfigError, match="max_overhead must be positive, got 0"):
        TrainConfig(instrument=InstrumentConfig(max_overhead=0))
    with pytest.raises(ConfigError, match="group_size must be a multiple of 4, got 6"):
        TrainConfig(instrument=InstrumentConfig(group_size=6))


def test_the_default_instrument_is_left_out_where_it_does_not_fit():
    small = SamplingConfig(prompts=2, group_size=2)
    result = make_plan(TrainConfig(sampling=small))
    assert result.probe is None and "the instrument is off" in result.warnings[0]
    with pytest.raises(ConfigError, match="too low for 8 probe prompts"):
        make_plan(TrainConfig(sampling=small, instrument=InstrumentConfig(every=41)))


def test_the_plan_describes_the_measurements():
    result = make_plan(TrainConfig())
    assert "instrument: " in result.headline and not result.warnings
    config = TrainConfig(instrument=InstrumentConfig(prompts=64))
    assert any("instrument will take" in x for x in make_plan(config).warnings)


# Ranks (1, 2.5, 2.5, 4, 5) against (5, 2, 3, 1, 4): -3.5 / sqrt(9.5 * 10).
def test_rank_correlation_shares_ties():
    x, y = [0.0, 5, 5, 9, 12, np.nan], [8.0, 2, 3, 1, 4, 9]
    expected = -3.5 / np.sqrt(9.5 * 10)
    np.testing.assert_allclose(rank_correlation(x, y), expected)
    assert np.isnan(rank_correlation(x[:4], y[:4]))
    assert np.isnan(rank_correlation([1.0] * 5, y[:5]))
