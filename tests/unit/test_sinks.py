"""Rows go to sinks exactly and once, and no sink ends or holds up a run."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.parallel.processes import Processes
from grpo_jax.runs import sinks
from grpo_jax.runs.config import LogConfig, TrainConfig
from grpo_jax.runs.sinks import SINKS, SinkRun, Sinks, find_sinks
from grpo_jax.training.console import Console
from grpo_jax.training.context import RunContext
from grpo_jax.training.journal import Journal
from grpo_jax.training.run import _make_sinks
from tests.services import (
    tensorboard_config,
    tensorboard_rows,
    trackio_runs,
    wandb_files,
)

CONFIG = {"steps": 3, "optimizer": {"learning_rate": 0.25}}
NAN, INF = float("nan"), float("inf")
# Exact in float32, which TensorBoard keeps.
ROWS = [
    {"step": 0, "eval/heldout_pass_rate": 0.125, "phase/label": "II", "bad": NAN},
    {"step": 1, "reward/mean": 0.5, "reward/of my name": -2.0, "compiles": 3},
    {"step": 2, "reward/mean": 0.75, "gradient/norm": INF, "compiles": 3},
]
KEPT = [
    (0, {"eval/heldout_pass_rate": 0.125}),
    (1, {"reward/mean": 0.5, "reward/of my name": -2.0, "compiles": 3}),
    (2, {"reward/mean": 0.75, "compiles": 3}),
]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of trackio's for this test alone."""
    name = f"test-{os.getpid()}-{time.time_ns()}"
    monkeypatch.setenv("TRACKIO_PROJECT", name)
    return name


def sent(directory, names, rows, step=0, config=CONFIG):
    """What was warned of while the rows went to the sinks."""
    said = []
    run = SinkRun(directory.name, directory, config, step)
    found = names if isinstance(names, dict) else find_sinks(names)
    hub = Sinks(found, run, said.append)
    for row in rows:
        hub.log(row)
    hub.close()
    return said


def in_tensorboard(rows):
    return {step: {k.replace(" ", "_"): x for k, x in r.items()} for step, r in rows}


def test_every_service_keeps_every_number_at_its_step(tmp_path, project):
    for package in PACKAGES.values():
        pytest.importorskip(package)
    assert sent(tmp_path, SINKS, ROWS) == []
    assert tensorboard_rows(tmp_path) == in_tensorboard(KEPT)
    assert tensorboard_config(tmp_path) == CONFIG
    [file] = wandb_files(tmp_path)
    assert (file.rows, file.name, file.project) == (KEPT, tmp_path.name, "grpo-jax")
    assert file.config.items() >= CONFIG.items()
    assert trackio_runs(project) == [(tmp_path.name, CONFIG, KEPT)]


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path, project):
    """It had come to step 2; resumed at step 1, it makes that row again, after what a
    stop had left out of the first one. Its config may have changed."""
    for package in PACKAGES.values():
        pytest.importorskip(package)
    sent(tmp_path, SINKS, ROWS)
    late, again = {"step": 1, "eval/late": 0.25}, ROWS[2] | {"reward/mean": 1.0}
    more, config = {"step": 3, "reward/mean": 2.0}, CONFIG | {"steps": 9}
    assert sent(tmp_path, SINKS, [late, again, more], 1, config) == []
    assert tensorboard_rows(tmp_path) == in_tensorboard(
        [KEPT[0], (1, KEPT[1][1] | {"eval/late": 0.25}), (2, KEPT[2][1]), (3, {})]
    ) | {2: KEPT[2][1] | {"reward/mean": 1.0}, 3: {"reward/mean": 2.0}}
    assert tensorboard_config(tmp_path) == config
    # These take no row back: the one made again is not sent.
    rest = [(1, {"eval/late": 0.25}), (3, {"reward/mean": 2.0})]
    first, second = wandb_files(tmp_path)
    assert (second.id, second.rows) == (first.id, rest)
    assert second.config.items() >= config.items()
    assert trackio_runs(project) == [(tmp_path.name, config, KEPT + rest)]


def test_a_run_that_starts_again_is_not_doubled(tmp_path, project):
    """Stopped before its first checkpoint, it makes all rows again."""
    for package in PACKAGES.values():
        pytest.importorskip(package)
    sent(tmp_path, SINKS, ROWS[:2])
    time.sleep(1)  # TensorBoard orders files by the second
    assert sent(tmp_path, SINKS, ROWS) == []
    assert tensorboard_rows(tmp_path) == in_tensorboard(KEPT)
    assert [row for file in wandb_files(tmp_path) for row in file.rows] == KEPT
    assert trackio_runs(project) == [(tmp_path.name, CONFIG, KEPT)]


def test_runs_of_one_name_are_two_for_trackio(tmp_path, project):
    pytest.importorskip("trackio")
    directories = [tmp_path / rate / "seed0" for rate in ("1e-4", "3e-4")]
    for directory in directories:
        directory.mkdir(parents=True)
        sent(directory, ["trackio"], ROWS[:1])
    sent(directories[0], ["trackio"], ROWS[1:], 0)
    (other, _, one), (name, _, all_of_it) = sorted(
        trackio_runs(project), key=lambda run: len(run[2])
    )
    assert name == "seed0" and other.startswith("seed0-")
    assert (one, all_of_it) == (KEPT[:1], KEPT)


@pytest.mark.parametrize("name", SINKS)
def test_a_missing_package_is_said_with_how_to_install_it(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    assert sent(tmp_path, [name], ROWS) == [
        f"log.to {name} needs {PACKAGES[name]}, which is not installed; "
        f"`pip install {PACKAGES[name]}`. The run goes on without it."
    ]


def test_wandb_without_a_login_is_left_out_and_asks_nothing(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import sys, pathlib; from grpo_jax.runs.sinks import *\n"
        "run = SinkRun('mine', pathlib.Path(sys.argv[1]), {}, 0)\n"
        "hub = Sinks(find_sinks(['wandb']), run, print); hub.log({'step': 0})\n"
        "hub.close()"
    )
    env = os.environ | {"WANDB_MODE": "online", "HOME": str(tmp_path)}
    env.pop("WANDB_API_KEY", None)
    command = [sys.executable, "-c", code, tmp_path]
    output = subprocess.check_output(command, env=env, text=True)
    assert output == (
        "log.to wandb failed at its start (RuntimeError: not logged in; call `wandb "
        "login`, or set WANDB_MODE=offline). The run goes on without it.\n"
    )


class Kept:
    """Keeps what it gets; at step `fails_at` it raises, at `hangs_at` it waits."""

    def __init__(self, fails_at=None, hangs_at=None):
        self.fails_at, self.hangs_at = fails_at, hangs_at
        self.rows, self.closed, self.go_on = [], 0, threading.Event()

    def __call__(self, run):
        self.run = run
        return self.Log(self)

    class Log:
        def __init__(self, sink):
            self.sink = sink

        def __call__(self, row):
            if row["step"] == self.sink.hangs_at:
                self.sink.go_on.wait()
            if row["step"] == self.sink.fails_at:
                raise OSError("the line is cut")
            self.sink.rows.append(row)

        def close(self):
            self.sink.closed += 1
            if self.sink.fails_at is not None:
                raise OSError("it still is")


def test_a_sink_of_ones_own_gets_the_rows_as_they_are(tmp_path):
    mine = Kept()
    assert sent(tmp_path, {"my:sink": mine}, ROWS, 7) == []
    assert mine.run == SinkRun(tmp_path.name, tmp_path, CONFIG, 7)
    np.testing.assert_equal(mine.rows, ROWS)
    assert mine.rows[0] is not ROWS[0] and mine.closed == 1


def test_a_function_alone_is_enough(tmp_path):
    steps = []
    sink = lambda run: lambda row: steps.append((run.step, row["step"]))  # noqa: E731
    assert sent(tmp_path, {"my:sink": sink}, ROWS) == []
    assert steps == [(0, 0), (0, 1), (0, 2)]


def test_a_sink_that_raises_is_left_out_and_the_others_go_on(tmp_path):
    bad, good = Kept(fails_at=1), Kept()
    said = sent(tmp_path, {"my:bad": bad, "my:good": good}, ROWS)
    assert said == [
        "log.to my:bad failed at step 1 (OSError: the line is cut). The run goes on "
        "without it."
    ]
    assert [r["step"] for r in bad.rows] == [0] and bad.closed == 1
    assert [r["step"] for r in good.rows] == [0, 1, 2]


@pytest.mark.parametrize(
    ("sink", "why"),
    [
        (lambda run: None, "at its start (TypeError: it gave None in place of a func"),
        (lambda run: 1 / 0, "at its start (ZeroDivisionError: division by zero)"),
        (lambda row: row["step"], "at its start (TypeError: tuple indices must be"),
        (lambda run: sys.exit(3), "at its start (SystemExit: 3)"),
    ],
)
def test_a_sink_that_cannot_start_is_left_out(tmp_path, sink, why):
    [said] = sent(tmp_path, {"my:sink": sink}, ROWS)
    assert said.startswith(f"log.to my:sink failed {why}")
    assert "called once, with the run, and gives a function of a row. The run" in said


def test_a_sink_that_hangs_is_left_behind(tmp_path, monkeypatch):
    """The run waits for it at its end, and no longer than CLOSE_S for all."""
    monkeypatch.setattr(sinks, "CLOSE_S", 0.5)
    monkeypatch.setattr(sinks, "MOST_WAITING", 2)
    stuck, other, good = Kept(hangs_at=1), Kept(hangs_at=0), Kept()
    rows = [{"step": step} for step in range(9)]
    began = time.monotonic()
    named = {"my:stuck": stuck, "my:other": other, "my:good": good}
    said, run = [], SinkRun("run", tmp_path, CONFIG, 0)
    hub = Sinks(named, run, said.append)
    for n, row in enumerate(rows):
        hub.log(row)
        while len(good.rows) <= n:  # a step takes longer than this sink
            time.sleep(0.001)
    assert time.monotonic() - began < 5
    hub.close()
    assert time.monotonic() - began < 6
    assert good.rows == rows
    end = "did not end within 0.5 s and is left; the last rows may be missing there."
    assert [text.partition(" metrics.jsonl")[0] for text in said[-2:]] == [
        f"log.to my:stuck {end}", f"log.to my:other {end}",
    ]  # fmt: skip
    slow = [text for text in said if "more slowly" in text]
    assert len(slow) == 2 and len(said) == 4
    stuck.fails_at = 1
    stuck.go_on.set()
    other.go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("log.to my:"):
            thread.join(10)
    assert len(said) == 4  # what it says when the run is over is nobody's matter
    # Those that waited; a row may have been taken off the queue before it was full.
    assert [row["step"] for row in other.rows] in ([0, 1], [0, 1, 2])


def test_a_journal_hands_on_its_rows_and_what_it_adds_to_one(tmp_path):
    mine, run = Kept(), SinkRun("run", tmp_path, CONFIG, 0)
    hub = Sinks({"my:sink": mine}, run, print)

    def row(step, metrics, host):
        return {"step": step} | metrics | host

    files = Journal(
        tmp_path, Processes(), Console(9), row, step=0, unwritten={}, sinks=hub
    )
    files.keep(1, {"reward/mean": 0.5}, {"time/step_s": 2.0})
    files.flush()
    files.complete(1, {"reward/mean": 9.0, "eval/late": 0.25})
    files.complete(1, {"eval/late": 0.25})  # it has that by now
    files.close()
    assert mine.rows == [
        {"step": 1, "reward/mean": 0.5, "time/step_s": 2.0},
        {"step": 1, "eval/late": 0.25},
    ]
    assert mine.closed == 1


@pytest.mark.parametrize("writer", [True, False])
def test_only_the_process_that_writes_has_sinks(tmp_path, writer):
    processes = SimpleNamespace(is_writer=writer)
    context = RunContext(
        TrainConfig(), None, tmp_path, processes, None, None, Console(9)
    )
    assert isinstance(_make_sinks(context, 3), Sinks) == writer


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (("tensorbord",), "unknown log.to 'tensorbord'; did you mean 'tensorboard'?"),
        (("mlflow",), "choices: module:function, tensorboard, trackio, wandb"),
        (("wandb", "wandb"), "log.to names a sink twice: wandb, wandb"),
        ("wandb", "log.to must be a list of values, got 'wandb'|to must be a list of"),
    ],
)
def test_a_name_that_no_sink_has_is_an_error_of_the_config(to, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(log=LogConfig(to=to))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "os:getcwd",
            "must be a function of the run that gives .* for example\n    def",
        ),
        ("os:sep", "must be a function of the run .*, got '/'"),
        ("os:nothing", "log.to os:nothing cannot be loaded: AttributeError"),
        ("not-a-name:sink", "log.to of your own must be module:name"),
    ],
)
def test_what_cannot_be_called_with_a_run_is_refused_before_it(name, message):
    config = TrainConfig(log=LogConfig(to=(name,)))
    with pytest.raises(ConfigError, match=message):
        find_sinks(config.log.to)


def test_the_example_of_the_error_works(tmp_path, capsys):
    space = {}
    with pytest.raises(ConfigError) as caught:
        find_sinks(["os:sep"])
    code = str(caught.value).partition("for example")[2]
    exec("if True:" + code, space)
    assert sent(tmp_path, {"my:sink": space["sink"]}, ROWS[1:2]) == []
    assert capsys.readouterr().out == f"{tmp_path.name} 1 0.5\n"


def test_the_sink_of_the_guide_works(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    space = {}
    exec(re.search(r"<!-- sink -->\n```python\n(.*?)```", guide, re.S)[1], space)
    assert sent(tmp_path, {"my:sink": space["to_csv"]}, ROWS) == []
    assert (tmp_path / "rewards.csv").read_text() == "0,None\n1,0.5\n2,0.75\n"
    assert f"{sinks.MOST_WAITING} rows wait" in guide
    assert f"{sinks.CLOSE_S} seconds" in guide
