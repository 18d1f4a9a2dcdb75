"""A step of a finished or failed run is computed again, to the last bit."""

import itertools
import json
import shutil

import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.commands.replay import replay
from grpo_jax.errors import ConfigError
from grpo_jax.runs.config import (
    CheckpointConfig,
    InstrumentConfig,
    ObjectiveConfig,
    TaskConfig,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.training.saving import NonFiniteGradientsError
from tests.e2e.test_train import digits_task, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two updates a rollout, KL, looks; checkpoints of steps 3, 6 and 7."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    config = small_config(
        directory,
        steps=7,
        updates_per_rollout=2,
        instrument=InstrumentConfig(every=3, prompts=4),
    )
    gj.train(config, task=digits_task())
    return directory


@pytest.mark.parametrize(("step", "start"), [(2, 0), (6, 0), (7, 6)])
def test_any_step_is_identical(finished, step, start):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    found = replay(finished, step, task=digits_task())
    assert found.start == start and found.differing == [] and found.unstable == 0
    assert f"step {step}: identical." in found.text()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    # The norm of the last of two updates is what metrics.jsonl has.
    norm = np.linalg.norm(found.arrays["gradient_norms"])
    assert norm == pytest.approx(found.row["gradient/norm"], rel=0.5)
    assert found.arrays["completions"].shape[:2] == (4, 4)
    assert len(found.arrays["parameters"]) == len(found.arrays["gradient_norms"]) > 5


def test_a_run_on_a_mesh_is_replayed_on_one_device(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    facts = json.loads((run / "config.json").read_text())
    facts["config"]["mesh"]["fsdp"] = 8
    (run / "config.json").write_text(json.dumps(facts))
    assert replay(run, 7, task=digits_task()).start == 6
    assert "is replayed on one:" in capsys.readouterr().out


def test_what_was_recorded_otherwise_is_named(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    rows = read_lines(copy / "metrics.jsonl")
    text = (copy / "metrics.jsonl").read_text()
    norm = f'"gradient/norm": {rows[7]["gradient/norm"]}'
    assert norm in text
    (copy / "metrics.jsonl").write_text(text.replace(norm, '"gradient/norm": 0.5'))
    found = replay(copy, 7, task=digits_task())
    assert found.differing == ["gradient/norm"]
    assert "step 7: differs in gradient/norm." in found.text()


def test_rewards_that_are_not_deterministic_are_said(tmp_path):
    calls = itertools.count()

    def reward(example, completion):
        return float(next(calls) % 3)

    gj.train(small_config(tmp_path / "run", steps=2), task=digits_task(reward))
    found = replay(tmp_path / "run", 2, task=digits_task(reward))
    assert found.unstable > 0 and "rewards are not deterministic" in found.text()


def test_step_that_ended_a_run_is_computed_again(tmp_path):
    def reward(example, completion):
        return 3e38 if len(completion) % 2 else -3e38

    config = small_config(
        tmp_path / "run",
        steps=50,
        objective=ObjectiveConfig(name="reinforce"),
        checkpoint=CheckpointConfig(every=3),
    )
    with pytest.raises(NonFiniteGradientsError, match="grpo-jax replay") as stopped:
        gj.train(config, task=digits_task(reward))
    assert str(tmp_path / "run") in str(stopped.value)
    step = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    found = replay(tmp_path / "run", step, task=digits_task(reward))
    assert found.differing == [] and found.row["update/skipped_in_a_row"] == 5
    assert found.arrays["gradient_not_finite"].sum() > 0
    (saved,) = (tmp_path / "run").glob("nonfinite-step-*.npz")
    for name, array in np.load(saved).items():
        if name != "step":
            np.testing.assert_array_equal(array, found.arrays[name])


def test_what_cannot_be_replayed_is_refused(finished, tmp_path):
    for step in (0, 8):
        with pytest.raises(ConfigError, match="step must be from 1 to 7"):
            replay(finished, step, task=digits_task())
    with pytest.raises(ConfigError, match="holds no run"):
        replay(tmp_path, 1)
    other = gj.load_task("chains", heldout_prompts=16, seed=1)
    with pytest.raises(ConfigError, match="asked .*the rows' prompts.* changed"):
        replay(finished, 1, task=other)


def test_command_prints_and_writes(tmp_path, capsys):
    from grpo_jax.cli import main

    task = TaskConfig(heldout_prompts=16)
    gj.train(small_config(tmp_path / "run", steps=2, task=task))
    output = tmp_path / "step.npz"
    argv = ["replay", str(tmp_path / "run"), "2", "--output", str(output)]
    assert main(argv) == 0
    assert "step 2: identical." in capsys.readouterr().out
    assert {"completions", "weights", "gradient_norms"} <= set(np.load(output))
    assert main(["replay", str(tmp_path / "run")]) == 2
