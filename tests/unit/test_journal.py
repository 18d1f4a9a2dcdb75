"""Rows of a run: what is printed of them, and none is lost or written twice."""

import json
import os
import time

import pytest

from grpo_jax.parallel.processes import Processes, UnwrittenError
from grpo_jax.runs.lines import read_lines
from grpo_jax.training import journal
from grpo_jax.training.console import LINE_S, Console, show, step_facts
from grpo_jax.training.journal import Journal

NAN = float("nan")


def opened(directory, step=0, unwritten=None):
    return Journal(
        directory,
        Processes(),
        Console(1),
        lambda step, metrics, host: {"step": step} | metrics | host,
        step=step,
        unwritten=unwritten or {},
    )


def evaluated(**changes):
    row = {f"eval/{p}_pass_rate": 0.25 for p in ("train", "heldout")}
    return row | {f"eval/{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (evaluated(), "0.250 on trained prompts, 0.250 on held-out ones"),
        (evaluated(heldout_pass_rate=NAN), "0.250 on trained prompts, none on held"),
        (evaluated(heldout_reward=0.75), "held-out ones, whose mean reward is 0.750"),
        (evaluated(heldout_reward=0.25), "0.250 on held-out ones"),
        (evaluated(heldout_reward=0.5, heldout_sampled=0.5), "0.250 on held-out ones"),
    ],
)
def test_an_evaluation_is_said_with_its_mean_reward(tmp_path, capsys, row, said):
    files = opened(tmp_path)
    files.keep(0, {}, row)
    files.flush()
    files.close()
    printed = capsys.readouterr().out
    assert said in printed and ("mean reward" in said) == ("mean reward" in printed)
    assert NAN not in read_lines(tmp_path / "metrics.jsonl")[0].values()


def test_figures_that_are_missing_are_said_so():
    assert (show(None), show(NAN), show(0.5)) == ("none", "none", "0.500")
    facts = step_facts({"reward/mean": None, "group/std_mean": NAN, "kl/mean": None})
    assert "reward none" in facts and "std none" in facts and "kl none" in facts


def test_a_step_shown_before_something_slow_is_shown_once(tmp_path, capsys):
    files = opened(tmp_path)
    files.keep(1, {"reward/mean": 0.5}, {})
    files.show()
    assert "step 1/" in capsys.readouterr().out
    files.keep(1, {"reward/mean": 0.5}, {"time/evaluation_s": 9.0})
    files.flush()
    assert "step 1/" not in capsys.readouterr().out
    files.keep(2, {"reward/mean": 0.5}, {})
    files.flush()
    assert "step 2/" in capsys.readouterr().out
    files.close()
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row.get("time/evaluation_s") for row in rows] == [9.0, None]


def test_slow_steps_have_more_lines(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(10)
    console.start(0, 99)
    for step, seconds in enumerate([1, 1, LINE_S - 1, 1, 1, 1, 1, 1, 1, 1], 1):
        now[0] += seconds
        console.step(step, {"reward/mean": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 4", "step 10"]


def test_a_measurement_of_the_last_step_is_written_once(tmp_path):
    """It is measured again by the run that resumes at its step."""
    row = {"step": 3, "phase": {}}
    kept = {"instrument": [row | {"step": 2}, row], "metrics": [{"step": 3}]}
    files = opened(tmp_path, step=3, unwritten=kept)
    files.measurement(row)
    files.close()
    assert [r["step"] for r in read_lines(tmp_path / "instrument.jsonl")] == [2, 3]
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 3}]


def test_a_row_that_cannot_be_completed_is_an_unwritten_file(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2}) + "\n")
    files = opened(tmp_path, step=2)

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "JsonLines", full)
        with pytest.raises(UnwrittenError, match="No space left"):
            files.complete(2, {"late": 1})
    files.close()
    assert read_lines(tmp_path / "metrics.jsonl")[0]["step"] == 2


def test_a_line_that_cannot_be_written_is_an_unwritten_file(tmp_path):
    files = opened(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, files._files["metrics"]._file.fileno())
    os.close(full)
    files.keep(0, {}, {})
    with pytest.raises(UnwrittenError, match=r"cannot write .*metrics.jsonl"):
        files.flush()
    assert files.unwritten()["metrics"] == [{"step": 0}]
    files.close()
