"""Runs in this process that are stopped, or run out of disk, and go on the same."""

import dataclasses
import itertools
import os
import shutil
import signal
import time
from contextlib import contextmanager

import chex
import pytest

import grpo_jax as gj
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import (
    CheckpointConfig,
    EvaluationConfig,
    InstrumentConfig,
    WarmStartConfig,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.params import restore_params
from grpo_jax.training import journal, run, warm_start
from grpo_jax.training.watchdog import Watchdog
from tests.e2e.test_survival import numbers
from tests.e2e.test_train import digits_task, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS = 8


def short_task(reward=None):
    """20 trained prompts: 5 steps an epoch."""
    task = digits_task(reward)
    return dataclasses.replace(task, train=task.train[:20])


def config_of(directory, **changes):
    settings = dict(
        steps=STEPS,
        updates_per_rollout=2,
        evaluation=EvaluationConfig(every=4, prompts=16),
        instrument=InstrumentConfig(every=4, prompts=2, max_overhead=1.0),
        checkpoint=CheckpointConfig(every=3),
    )
    return small_config(directory, **(settings | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run that nothing happens to."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert gj.train(config_of(directory), task=short_task()).finished
    return directory


def check_same(directory, whole):
    """Parameters to the last bit, and every line of every file."""
    a, b = (restore_params(d / "checkpoints" / str(STEPS)) for d in (directory, whole))
    chex.assert_trees_all_equal(a, b)
    assert numbers(directory) == numbers(whole)
    for name in ("instrument.jsonl", "samples.jsonl"):
        assert read_lines(directory / name) == read_lines(whole / name)


def resumed(directory):
    result = gj.train(config_of(directory, resume=True), task=short_task())
    assert result.finished
    return directory


@pytest.mark.parametrize("step", [2, 7])
def test_resume_within_an_epoch_and_several_updates(tmp_path, whole, step):
    """Step 7 is in the second epoch; neither is a checkpoint that was due."""
    stop_at = iter(range(10**6))
    before = Watchdog.phase

    @contextmanager
    def phase(self, name):
        if name == "sampling" and next(stop_at) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        with before(self, name):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watchdog, "phase", phase)
        gj.train(config_of(tmp_path / "run"), task=short_task())
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step
    check_same(resumed(tmp_path / "run"), whole)


# How often the phase has begun when the signal comes, and what may still begin then.
ENDING = ["saving", "report"]
PHASES = {
    "compilation": (1, ["report"]),
    "evaluation": (1, ["report"]),
    "measurement": (1, ["report"]),
    "sampling": (3, ENDING),
    "scoring": (3, ENDING),
    "update": (3, ENDING),
    "update before an evaluation": (4, ENDING),
    "update after a measurement": (5, ["measurement", *ENDING]),
    "update of the last step": (8, ENDING),
    "evaluation of step 4": (2, ENDING),
    "evaluation at the end": (3, ENDING),
    "measurement of step 4": (3, ENDING),
    "saving": (1, ENDING),
    "report": (1, []),
}


@pytest.mark.parametrize("where", PHASES)
def test_sigterm_ends_a_run_within_its_phase(tmp_path, whole, where, monkeypatch):
    count, allowed = PHASES[where]
    name, before, begun = where.split()[0], Watchdog.phase, []

    @contextmanager
    def phase(self, now):
        with before(self, now):
            begun.append(now)
            if now == name and begun.count(name) == count:
                os.kill(os.getpid(), signal.SIGTERM)
                begun.append("SIGTERM")
            yield

    with monkeypatch.context() as patch:
        patch.setattr(Watchdog, "phase", phase)
        result = gj.train(config_of(tmp_path / "run"), task=short_task())
    assert result.finished == (name == "report")
    after = begun[begun.index("SIGTERM") + 1 :]
    assert set(after) <= set(allowed), after
    check_same(resumed(tmp_path / "run"), whole)


def test_sigterm_in_the_warm_start_keeps_nothing_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path / "cache"))
    settings = dict(
        run_dir=str(tmp_path / "run"),
        steps=2,
        warm_start=WarmStartConfig(max_steps=30, noisy_steps=0),
    )
    before, calls = warm_start._supervised_step, itertools.count()

    def step(*arguments):
        next(calls)
        os.kill(os.getpid(), signal.SIGTERM)
        return before(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(warm_start, "_supervised_step", step)
        result = gj.train(small_config(**settings))
    assert not result.finished and next(calls) == 1  # traced once
    assert not (tmp_path / "run" / "initial.safetensors").exists()
    assert gj.train(small_config(**settings, resume=True)).finished


@pytest.mark.parametrize("name", ["metrics", "samples", "instrument"])
@pytest.mark.parametrize("room", [True, False], ids=["room", "no_room"])
def test_line_that_cannot_be_written_loses_nothing(
    tmp_path, whole, monkeypatch, capsys, name, room
):
    """/dev/full takes the place of the file; checkpoints can be saved, or cannot."""

    class Full(journal.JsonLines):
        rows = 0

        def write(self, row):
            self.rows += 1
            if self._path.stem == name and row["step"] >= 4:
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, self._file.fileno())
                os.close(full)
            super().write(row)

    def no_room(self, step, *arguments):
        if step < 4:
            save(self, step, *arguments)
        else:
            self.saved = None

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(journal, "JsonLines", Full)
        if not room:
            patch.setattr(Checkpoints, "save", no_room)
        with pytest.raises(OSError, match=f"cannot write .*{name}.jsonl: No sp") as end:
            gj.train(config_of(tmp_path / "run"), task=short_task())
    # A step whose line is missing is saved with it; else it is made again.
    saved = room and name == "metrics"
    said = "step 4 is saved" if saved else "step 3 is saved"
    assert said in str(end.value) and "\n" not in str(end.value)
    kept = shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "kept")
    check_same(resumed(tmp_path / "run"), whole)
    text = capsys.readouterr().out
    assert ("resumed at step 3" in text) == (not saved)
    # And once more from there: what was written late is written once.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.move(kept, tmp_path / "run" / "checkpoints")
    check_same(resumed(tmp_path / "run"), whole)


def test_a_last_step_that_is_not_saved_is_an_error(tmp_path, whole, monkeypatch):
    """Stopped or finished: nobody hears "saved", and the run goes on from before."""

    def fails(self, step, *arguments):
        if step < STEPS:
            save(self, step, *arguments)
        else:
            self._failed(step, OSError("No space left on device"))

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fails)
        message = r"step 8 could not be saved \(OSError: No space.*newest saved is 6\. "
        with pytest.raises(OSError, match=message):
            gj.train(config_of(tmp_path / "run"), task=short_task())
    assert (tmp_path / "run" / "report.html").exists()
    check_same(resumed(tmp_path / "run"), whole)


def test_full_disk_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    from grpo_jax import cli

    def train(config):
        raise OSError("cannot write x: No space left on device; stopped at step 3")

    monkeypatch.setattr(run, "train", train)
    assert cli.main(["train", "--run-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error == (
        "error: cannot write x: No space left on device; stopped at step 3\n"
    )


def test_reward_that_sleeps_is_named(tmp_path, capsys):
    calls = itertools.count()

    def reward(example, completion):
        if next(calls) == 1 + 16 * 5:  # the first call tries the reward
            time.sleep(2.5)
        return float(len(completion) % 2)

    config = config_of(tmp_path / "run", instrument=InstrumentConfig(every=0))
    config = dataclasses.replace(
        config, evaluation=EvaluationConfig(every=0, prompts=16)
    )
    assert gj.train(config, task=short_task(reward)).finished
    text = capsys.readouterr().out
    assert text.count("still waiting for") == 1
    assert "still waiting for scoring, for 0:02 now (its median is" in text
