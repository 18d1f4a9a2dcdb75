"""The report of runs whose figures are missing: words in their place."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from grpo_jax.report.curves import comparison, run_figures, run_times
from grpo_jax.report.page import _pass_rates, _reward_trend, _verdict, write_report
from grpo_jax.report.run_files import number, read_run
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.config_files import to_dict
from grpo_jax.runs.directory import versions

RATE = {f"eval/{p}_{x}": 0.5 for p in ("train", "heldout") for x in ("low", "high")}
RATE |= {f"eval/{p}_pass_rate": 0.5 for p in ("train", "heldout")}
NONE = dict.fromkeys(RATE)
REWARD = {
    "eval/heldout_reward": 1.5,
    "eval/heldout_reward_low": 1.25,
    "eval/heldout_reward_high": 1.75,
}


def made_run(directory, *rows, samples=(), counterfactuals=()):
    """A run directory with these rows of metrics.jsonl, from step 0."""
    directory.mkdir()
    facts = {"config": to_dict(TrainConfig()), "versions": versions(), "note": ""}
    (directory / "config.json").write_text(json.dumps(facts))
    files = {
        "metrics": [{"step": i} | row for i, row in enumerate(rows)],
        "samples": samples,
        "counterfactual": counterfactuals,
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    return directory


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_no_number_is_a_dash(value):
    assert number(value) == "-" and number(0.25, ".1%") == "25.0%"


@pytest.mark.parametrize("rows", [(RATE, NONE), (NONE, RATE), (NONE, NONE)])
def test_an_evaluation_without_rewards_is_said_to_be_none(tmp_path, rows):
    run = read_run(made_run(tmp_path / "run", *rows))
    shown = {label: ends for label, *ends in _pass_rates(run)}
    expected = ["none" if r is NONE else "0.500 [0.500, 0.500]" for r in rows]
    assert shown["pass rate, held-out prompts"] == expected
    assert all("cannot be compared" in sentence for sentence in _verdict(run))


def test_an_instrument_that_has_measured_nothing_is_said_to_have_not(tmp_path):
    directory = made_run(tmp_path / "run", RATE, RATE)
    file = directory / "config.json"
    facts = json.loads(file.read_text())
    for every, said in ((20, True), (0, False)):
        facts["config"]["instrument"] |= {"every": every, "prompts": 8}
        file.write_text(json.dumps(facts))
        sentences = " ".join(_verdict(read_run(directory)))
        assert ("has measured nothing yet" in sentences) == said


def test_a_mean_reward_is_shown_where_it_is_another_figure(tmp_path):
    run = read_run(made_run(tmp_path / "run", RATE | REWARD, RATE | REWARD))
    rows = {label: last for label, _, last in _pass_rates(run)}
    assert rows["mean reward, held-out prompts"] == "1.500 [1.250, 1.750]"
    assert "Reward of held-out prompts" in [f["title"] for f in run_figures([run])]
    same = RATE | REWARD | {"eval/heldout_reward": 0.5}
    run = read_run(made_run(tmp_path / "same", same, same))
    assert len(_pass_rates(run)) == 2
    sampled = RATE | REWARD | {"eval/heldout_sampled": 1.5}  # exact rates beside it
    assert not read_run(made_run(tmp_path / "c", sampled)).has_other_rewards


def test_the_time_of_a_run_is_told_apart_into_parts(tmp_path):
    start = {"time/start_s": 30, "time/evaluation_s": 8, "time/instrument_s": 2}
    step = {
        "time/sample_s": 5, "time/score_s": 1, "time/reference_s": 2,
        "time/update_s": 4, "time/step_s": 13,
    }  # fmt: skip
    last = step | {"time/evaluation_s": 6, "time/step_s": 19}
    run = read_run(made_run(tmp_path / "run", start, step, last))
    assert run_times(run) == {
        "start": 30, "sample": 10, "score": 2, "reference": 4, "update": 8,
        "evaluation": 14, "instrument": 2, "other": 2,
    }  # fmt: skip
    # An older version had the reference in the score, and evaluations nowhere.
    old = {"time/sample_s": 5, "time/score_s": 3, "time/update_s": 4}
    old |= {"time/step_s": 18}
    earlier = read_run(made_run(tmp_path / "old", {}, old, old))
    times = run_times(earlier)
    assert times["start"] == times["reference"] == times["evaluation"] == 0
    assert times["score"] == 6 and times["other"] == 12
    for runs in ([run], [earlier], [run, earlier]):
        titles = [figure["title"] for figure in run_figures(runs)]
        assert "Where the time went" in titles
    page = write_report([run.directory, earlier.directory], tmp_path / "page.html")
    assert "reference 2.000, update 4.000" in " ".join(page.read_text().split())


def test_a_page_of_missing_figures_is_written(tmp_path):
    step = {"reward/mean": None, "group/std_mean": None, "reward/missing": 16}
    step |= {"completion/cut_off": 0.25}
    checks = {"eval/missing": 3, "eval/failed": 2}
    sample = {
        "step": 1, "prompt": "1+1=", "answer": "2",
        "completions": ["a", "b"], "rewards": [None, 1.0],
    }  # fmt: skip
    rows = [RATE, step | NONE | checks]
    directory = made_run(tmp_path / "run", *rows, samples=[sample])
    page = write_report([directory], tmp_path / "report.html").read_text()
    assert "x1 (no reward)" in page and page.count("(no reward)") == 1
    assert "cut off at the limit of tokens: 25.0% at the first step, 25.0%" in page
    assert "rewards missing: 16; in evaluations, rewards missing: 3" in page
    assert "hung or died: 2" in page and "None" not in page.split("<svg")[0]


def test_prompt_weights_of_which_nothing_is_known_are_dashes(tmp_path):
    row = {
        "step": 1, "weightings": ["reinforce"], "norm_ratio": [1.0],
        "cosines": [[None]], "update_cosines": [[None]],
        "group_mean": [0.1, None], "predicted_change": [[None, 0.5]],
    }  # fmt: skip
    directory = made_run(tmp_path / "run", {}, counterfactuals=[row])
    [line] = comparison(read_run(directory))
    assert line["norm"] == "1.00" and line["update"] == "-" and line["cosines"] == ["-"]
    assert line["change"] == ["-", "-", "-"] and line["total"] == "+0.5000"


def test_figures_are_drawn_in_silence_where_home_cannot_be_written(tmp_path):
    code = (
        "from grpo_jax.report.svg import svg_figure\n"
        "print(svg_figure('a', 'b', lambda axes: axes.plot([1, 2]))['svg'][:4])"
    )
    home = tmp_path / "file" / "home"  # not even root can make it
    home.parent.write_text("")
    dropped = ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("<svg\n", "")


# 64 samples a step of prompts with pass rates from 0 to 1: unchanged, or rising by .4.
def test_a_trend_of_the_reward_is_seldom_named_where_there_is_none():
    rng = np.random.default_rng(0)

    def named(steps, rise):
        rates = (
            rng.uniform(size=(steps, 8)) * 0.6
            + rise * np.linspace(0, 1, steps)[:, None]
        )
        rewards = rng.binomial(8, np.clip(rates, 0, 1)).mean(1) / 8
        (sentence,) = _reward_trend(np.arange(1, steps + 1), rewards)
        return "rose" in sentence, "fell" in sentence

    for steps in (9, 14, 30, 120):
        nulls = np.array([named(steps, 0.0) for _ in range(400)])
        # 5 % of 400, and three standard errors
        assert nulls.any(1).mean() <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
        assert nulls.any(0).all()  # either way
    rises = np.array([named(30, 0.4) for _ in range(100)])
    assert rises[:, 0].mean() > 0.9 and not rises[:, 1].any()
    assert _reward_trend(np.arange(1, 9), np.zeros(8)) == []
    (constant,) = _reward_trend(np.arange(1, 10), np.ones(9))
    assert "did not change measurably: 1.000 over steps 1 to 3" in constant
    (known,) = _reward_trend(np.arange(1, 10), np.repeat([0.0, 0.5, 1.0], 3))
    assert "rose: 0.000 over steps 1 to 3, 0.750 over steps 4 to 9" in known


@pytest.mark.parametrize(("name", "shown"), [("code:objective", True), ("grpo", False)])
def test_an_objective_of_ones_own_has_its_formula_in_the_report(tmp_path, name, shown):
    directory = made_run(tmp_path / "run", {"reward/mean": 0.5}, {"reward/mean": 0.5})
    facts = json.loads((directory / "config.json").read_text())
    facts["config"]["objective"]["name"] = name
    facts["formula"] = "mean_i A log pi"
    (directory / "config.json").write_text(json.dumps(facts))
    page = write_report([directory], tmp_path / "report.html").read_text()
    assert (f"{name} (mean_i A log pi) on" in page) == shown
