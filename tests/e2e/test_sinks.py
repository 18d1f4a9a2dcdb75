"""Runs whose rows go to TensorBoard, wandb, trackio and a sink of the user's own."""

import json
import os
import signal
import sys
import time

import pytest

import grpo_jax as gj
from grpo_jax.commands.replay import replay
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.sinks import SINKS
from tests.e2e.conftest import TINY_FLAGS
from tests.e2e.test_survival import wait_for_step
from tests.e2e.test_train import digits_task, small_config
from tests.services import (
    tensorboard_config,
    tensorboard_rows,
    trackio_runs,
    wandb_files,
)

MODULE = """
SEEN = []


def watch(run):
    SEEN.append((run.name, run.step, run.config["steps"]))

    def log(row):
        if row["step"] == 2:
            raise RuntimeError("mine is broken")
        SEEN.append(row["step"])

    return log
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_sink.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import own_sink

    yield own_sink
    monkeypatch.delitem(sys.modules, "own_sink")


@pytest.fixture
def project(monkeypatch):
    name = f"test-{os.getpid()}-{time.time_ns()}"
    monkeypatch.setenv("TRACKIO_PROJECT", name)
    return name


def figures(directory):
    """[(step, {name: number})] of metrics.jsonl."""
    return [
        (row.pop("step"), {k: x for k, x in row.items() if isinstance(x, int | float)})
        for row in read_lines(directory / "metrics.jsonl")
    ]


def close(rows):
    """The same in float32, under TensorBoard's names, which have no spaces."""
    return {
        step: {k.replace(" ", "_"): pytest.approx(x, rel=1e-6) for k, x in row.items()}
        for step, row in rows
    }


@pytest.mark.slow
def test_every_line_goes_everywhere_and_a_resumed_run_goes_on(
    tmp_path, module, project, capsys
):
    for package in ("tensorboardX", "tensorboard", "wandb", "trackio"):
        pytest.importorskip(package)
    directory = tmp_path / "mine"
    log = gj.LogConfig(samples_every=2, to=(*SINKS, "own_sink:watch"))
    config = small_config(
        directory,
        steps=4,
        log=log,
        instrument=gj.InstrumentConfig(every=2, prompts=2, max_overhead=1.0),
    )
    assert gj.train(config, task=digits_task()).finished
    assert capsys.readouterr().out.count("warning: log.to") == 1  # this one
    assert module.SEEN == [("mine", 0, 4), 0, 1]
    rows = figures(directory)
    names = {name for _, row in rows for name in row}
    assert [step for step, _ in rows] == [0, 1, 2, 3, 4]
    assert {"reward/mean", "eval/heldout_pass_rate", "time/instrument_s"} <= names
    assert tensorboard_rows(directory) == close(rows)
    assert trackio_runs(project)[0][2] == rows
    assert wandb_files(directory)[0].rows == rows
    recorded = json.loads((directory / "config.json").read_text())["config"]
    assert recorded["log"]["to"] == [*SINKS, "own_sink:watch"]
    assert tensorboard_config(directory) == recorded
    assert trackio_runs(project)[0][:2] == ("mine", recorded)
    assert wandb_files(directory)[0].config.items() >= recorded.items()
    # It can be used like any other, wherever its packages are missing.
    assert not replay(directory, 2, task=digits_task()).differing
    seen = len(module.SEEN)
    asked = gj.EvalConfig(run_dir=str(directory), task=gj.TaskConfig(name="chains"))
    assert gj.evaluate(asked) is not None
    assert len(module.SEEN) == seen and len(wandb_files(directory)) == 1

    # Where rows go may change; what goes on is the same.
    log = gj.LogConfig(to=("wandb", "tensorboard"))
    again = gj.TrainConfig(run_dir=str(directory), resume=True, steps=6, log=log)
    assert gj.train(again, task=digits_task()).finished
    rows = figures(directory)
    assert [step for step, _ in rows] == [*range(7)]
    assert tensorboard_rows(directory) == close(rows)
    first, second = wandb_files(directory)
    assert first.id == second.id
    assert second.rows == rows[5:] and trackio_runs(project)[0][2] == first.rows


# SIGINT as in the foreground: a background job has it ignored.
FOREGROUND = """
import signal, sys
from tests.e2e.undrawn import main

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_flushes_and_a_killed_run_is_not_doubled(
    grpo_jax, tmp_path, project, monkeypatch
):
    """A run that is stopped, resumed and killed, and resumed to its end."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of this process
    for package in ("tensorboardX", "tensorboard", "wandb", "trackio"):
        pytest.importorskip(package)
    directory = tmp_path / "run"
    flags = ("train", "--run-dir", directory, *TINY_FLAGS, "--evaluation.every", 0)

    def start(*more):
        return grpo_jax(*flags, "--steps", 100_000, *more, code=FOREGROUND)

    never = ("--checkpoint.every", 100_000)
    process = start(*never, "--log.to", *SINKS)
    wait_for_step(process, directory, 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    rows = figures(directory)
    assert tensorboard_rows(directory) == close(rows)
    assert [file.rows for file in wandb_files(directory)] == [rows]
    assert trackio_runs(project)[0][2] == rows

    stopped = rows[-1][0]
    process = start(*never, "--resume")
    wait_for_step(process, directory, stopped + 4)
    process.kill()
    process.communicate(timeout=60)
    killed = figures(directory)[-1][0]
    process = grpo_jax(*flags, "--resume", "--steps", killed + 2, code=FOREGROUND)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    rows = figures(directory)
    assert [step for step, _ in rows] == [*range(killed + 3)]
    assert tensorboard_rows(directory) == close(rows)
    [(_, _, kept)] = trackio_runs(project)
    for steps in (
        [step for step, _ in kept],
        [step for file in wandb_files(directory) for step, _ in file.rows],
    ):
        assert len(steps) == len({*steps}) and steps[-1] == killed + 2
        # What was on its way when the process was killed may be missing.
        missing = {*range(killed + 3)} - {*steps}
        assert all(stopped < step <= killed for step in missing)
