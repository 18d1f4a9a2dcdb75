"""What is saved, and said, where a run cannot go on."""

import dataclasses
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax.parallel.processes import Processes
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rewards.types import Reward
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import CheckpointConfig, TrainConfig
from grpo_jax.training import run
from grpo_jax.training.collector import Collector
from grpo_jax.training.console import Console
from grpo_jax.training.saving import NonFiniteGradientsError, Saver
from grpo_jax.training.watchdog import Watchdog

NAN = float("nan")
RATE, REWARD = "eval/heldout_pass_rate", "eval/heldout_reward"


class Saved:
    """In place of `Checkpoints`: what was saved, as (step, score)."""

    def __init__(self):
        self.calls = []

    def save(self, step, state, data, score):
        self.calls.append((step, score))

    def wait(self):
        pass

    def newest(self):
        return max((step for step, _ in self.calls), default=None)


@pytest.fixture
def saver(tmp_path):
    """Makes (saver, checkpoints) around a journal with these unwritten rows."""

    def make(best="pass_rate", unwritten=(), last_row=None, processes=None, **more):
        config = TrainConfig(
            run_dir=str(tmp_path), checkpoint=CheckpointConfig(best=best, **more)
        )
        context = SimpleNamespace(
            config=config,
            directory=tmp_path,
            processes=processes or Processes(),
            console=Console(1),
            mesh=None,
        )
        rows = SimpleNamespace(
            unwritten=lambda: {"metrics": list(unwritten)}, last_row=last_row or {}
        )
        checkpoints = Saved()
        watchdog = Watchdog(print)
        made.append(watchdog)
        return Saver(context, checkpoints, rows, watchdog), checkpoints

    made = []
    yield make
    for watchdog in made:
        watchdog.stop()


@pytest.mark.parametrize(("best", "score"), [("pass_rate", 0.25), ("reward", 1.5)])
def test_the_best_checkpoint_is_chosen_by_the_figure_that_is_named(saver, best, score):
    one, checkpoints = saver(best)
    one.save(None, 3, {RATE: 0.25, REWARD: 1.5})
    one.save(None, 4, {})
    assert checkpoints.calls == [(3, score), (4, None)]


def test_a_save_is_overdue_some_minutes_after_the_last_one(saver, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (one, _), (never, _) = saver(minutes=10), saver(minutes=0)
    overdue = []
    for now[0] in (0.0, 599.0, 600.0, 601.0):
        overdue.append(one.overdue())
    assert overdue == [False, False, True, True]
    one.save(None, 3, {})
    assert not one.overdue()
    now[0] += 600
    assert one.overdue() and not never.overdue()


@pytest.mark.parametrize("writers", [True, False])
def test_the_writers_clock_decides_for_all(saver, monkeypatch, writers):
    asked = []

    def first(value):
        asked.append(value)
        return writers

    processes = SimpleNamespace(first=first)
    one, _ = saver(minutes=1e-9, processes=processes)
    assert one.overdue() == writers and asked == [True]


def test_an_unwritten_row_is_saved_with_its_score(saver):
    row = {"step": 4, RATE: 0.5}
    one, checkpoints = saver(unwritten=[{"step": 3, RATE: 0.1}, row])
    error = one.save_unwritten(None, 4, OSError("cannot write x"))
    assert checkpoints.calls == [(4, 0.5)]
    assert "cannot write x; stopped at step 4, step 4 is saved." in str(error)


def test_a_full_disk_does_not_hide_why_a_run_ends(saver, monkeypatch, tmp_path):
    one, _ = saver()

    def full(file, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    error = one.save_rollouts(Rollouts(*[np.zeros(1)] * 5), 7)
    assert isinstance(error, NonFiniteGradientsError)
    assert "non-finite gradient" in str(error) and "could not be written" in str(error)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("step", [0, 2])
def test_steps_before_one_without_rewards_are_saved(saver, step):
    one, checkpoints = saver(last_row={REWARD: 0.5, RATE: 0.25})
    error = one.save_before(None, step, "step 3: all 4 rewards are missing: E: no")
    assert checkpoints.calls == ([(2, 0.25)] if step else [])
    saved = "step 2 is saved" if step else "no step is saved"
    assert f"E: no; stopped at step {step}, {saved}. Mend the reward" in str(error)


def test_an_evaluation_without_rewards_is_no_best_checkpoint(tmp_path):
    from tests.unit.test_checkpoint import state_of

    with Checkpoints(tmp_path / "checkpoints", keep=1, warn=print) as checkpoints:
        for step, score in ((1, 0.5), (2, NAN), (3, None)):
            checkpoints.save(step, state_of(step), {"step": step}, score)
        checkpoints.wait()
        assert checkpoints._steps_on_disk() == [1, 3]  # the best and the latest


def collected_reason(reward, rewards, failed, errors=()):
    """Why a step has no reward, by `Collector`."""
    prompts = SimpleNamespace(task=SimpleNamespace(reward=reward))
    collector = object.__new__(Collector)
    collector._prompts = prompts
    rewards = np.float32(rewards)
    scores = Scores(rewards, list(errors), rewards >= 1, {}, np.array(failed))
    return collector._why_none(scores)


OWN, MATH = (Reward(name="own:f"),), (Reward(name="math"),)


@pytest.mark.parametrize(
    ("reward", "rewards", "failed", "words"),
    [
        (OWN, [[NAN, NAN]], [[0, 0]], "all 2 rewards are missing: E: no"),
        (print, [[NAN, NAN]], [[0, 0]], "all 2 rewards are missing: E: no"),
        (OWN, [[NAN, 0]], [[0, 0]], None),
        (OWN, [[0, 0]], [[1, 1]], "all 2 samples hung or died, with the rewards own:f"),
        (OWN, [[NAN, 0]], [[0, 1]], "all 2 samples hung or died.*first error: E: no"),
        (OWN, [[0, 0]], [[1, 0]], None),
        (MATH, [[0, 0]], [[1, 1]], None),  # the completions' fault
    ],
)
def test_a_step_of_which_every_sample_failed(reward, rewards, failed, words):
    reason = collected_reason(reward, rewards, failed, ["E: no"])
    if words is None:
        assert reason is None
    else:
        assert re.search(words, reason)


def test_no_thread_is_left_where_a_run_cannot_be_restored(tmp_path, monkeypatch):
    def fails(context, facts, handle, watchdog):
        with watchdog.phase("restoring"):
            raise RuntimeError("cannot be read")

    monkeypatch.setattr(run, "_run_watched", fails)
    processes, console = Processes(), Console(1)
    context = SimpleNamespace(processes=processes, console=console, directory=tmp_path)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="cannot be read"):
        run._run(context, {}, run.RunHandle(tmp_path))
    assert threading.active_count() == before


def test_the_figure_of_the_best_checkpoint_is_one_of_two():
    with pytest.raises(ValueError, match="best must be one of pass_rate, reward"):
        dataclasses.replace(TrainConfig(), checkpoint=CheckpointConfig(best="loss"))


def test_a_run_without_a_step_has_no_report_and_no_warning(saver, tmp_path, capsys):
    made, _ = saver()
    made.report()
    assert not (tmp_path / "report.html").exists()
    assert "report" not in "".join(capsys.readouterr())
