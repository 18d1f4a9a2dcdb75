"""Killed, interrupted, out of disk: what a run leaves behind, and that it goes on."""

import json
import random
import shutil
import signal
import time

import chex
import numpy as np
import pytest

from grpo_jax.runs.lines import read_lines
from tests.e2e.conftest import TINY_FLAGS
from tests.e2e.experiments import ENVIRONMENT, run_script

STEPS = 14
FLAGS = ("--steps", STEPS, "--checkpoint.every", 3, "--evaluation.every", 4)


def final_params(directory):
    """Arrays of the last checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((directory / "checkpoints").absolute()) as manager:
        assert manager.latest_step() == STEPS
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        leaves = jax.tree.leaves(manager.restore(STEPS, args=args)["state"])
    return [np.asarray(x) for x in leaves]


def numbers(directory):
    """Rows of metrics.jsonl without times and compile counts."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "compiles"}
        for row in read_lines(directory / "metrics.jsonl")
    ]


def wait_for_step(process, directory, step, seconds=120):
    """Waits until metrics.jsonl has that step; the process must still be running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        file = directory / "metrics.jsonl"
        if file.exists() and f'"step": {step},' in file.read_text():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come within {seconds} s")


@pytest.mark.slow
def test_five_kills_leave_the_same_parameters(grpo_jax, run, tmp_path):
    straight = tmp_path / "straight"
    code, output = run("train", "--run-dir", straight, *FLAGS)
    assert code == 0, output
    rows = numbers(straight)
    assert max(row.get("group/informative", 0) for row in rows) > 0
    killed, rng = tmp_path / "killed", random.Random(0)
    for i, step in enumerate((1, 3, 6, 9, 12)):
        resume = ["--resume"] if i else []
        process = grpo_jax("train", "--run-dir", killed, *resume, *FLAGS)
        wait_for_step(process, killed, step)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
    code, output = run("train", "--run-dir", killed, "--resume", *FLAGS)
    assert code == 0, output
    chex.assert_trees_all_equal(final_params(killed), final_params(straight))
    assert numbers(killed) == numbers(straight)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(grpo_jax, run, tmp_path):
    directory = tmp_path / "run"
    flags = ("--steps", 100_000, "--checkpoint.every", 100_000)
    process = grpo_jax("train", "--run-dir", directory, *flags)
    wait_for_step(process, directory, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "saved; continue with --resume" in output
    saved = [int(p.name) for p in (directory / "checkpoints").iterdir()]
    assert saved == [read_lines(directory / "metrics.jsonl")[-1]["step"]]
    # Only the changed setting: the others are read from the run.
    code, output = run(
        "train", "--run-dir", directory, "--resume", "--steps", saved[0] + 2, bare=True
    )
    assert code == 0 and f"resumed at step {saved[0]}" in output, output


SLOW_REWARD = """
import sys, time, dataclasses
from grpo_jax import load_task, TrainConfig, train, ModelConfig
from grpo_jax.runs.config import SamplingConfig, WarmStartConfig
def reward(example, completion):
    print("scoring", flush=True)
    time.sleep(2)
    return 1.0
task = dataclasses.replace(load_task("chains", heldout_prompts=8), reward=reward,
                           single_answer=False)
train(TrainConfig(run_dir=sys.argv[1], warm_start=WarmStartConfig(enabled=False),
    model=ModelConfig(width=16, mlp_width=24, head_dim=4),
    sampling=SamplingConfig(prompts=2, group_size=2)), task=task)
"""


@pytest.mark.slow
def test_a_second_sigterm_stops_at_once(grpo_jax, tmp_path):
    process = grpo_jax(tmp_path / "run", code=SLOW_REWARD)
    while "scoring" not in (line := process.stdout.readline()):
        assert line, "ended before its first reward"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # the first one lets the step end
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM and time.monotonic() - began < 2


@pytest.mark.slow
def test_unreadable_newest_checkpoint_is_passed_over(run, tmp_path):
    directory = tmp_path / "run"
    flags = ("--steps", 6, "--checkpoint.every", 3)
    assert run("train", "--run-dir", directory, *flags)[0] == 0
    before = numbers(directory)
    for file in (directory / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, output = run("train", "--run-dir", directory, "--resume", *flags)
    assert code == 0, output
    assert "checkpoint of step 6 cannot be read" in output
    assert "resumed at step 3" in output
    assert numbers(directory) == before
    assert (directory / "checkpoints" / "6").is_dir()  # written again
    for checkpoint in ("3", "6"):
        shutil.rmtree(directory / "checkpoints" / checkpoint / "state")
    code, output = run("train", "--run-dir", directory, "--resume", *flags)
    assert code == 2 and "nothing was changed" in output, output
    assert numbers(directory) == before


@pytest.mark.slow
def test_stray_directory_is_no_checkpoint(run, tmp_path):
    directory = tmp_path / "run"
    flags = ("--steps", 3, "--checkpoint.every", 3)
    assert run("train", "--run-dir", directory, *flags)[0] == 0
    (directory / "checkpoints" / "99").mkdir()
    code, output = run(
        "train", "--run-dir", directory, "--resume", *flags[:1], 4, *flags[2:]
    )
    assert code == 0 and "resumed at step 3" in output, output


LIMITED = """
import resource, sys
from tests.e2e.undrawn import main
from grpo_jax.runs.checkpoints import Checkpoints

save = Checkpoints.save

def save_on_a_full_disk(*args, **more):
    # Below the size of one compressed kernel, however files are put together.
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, resource.RLIM_INFINITY))
    return save(*args, **more)

Checkpoints.save = save_on_a_full_disk
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_full_disk_loses_checkpoints_and_not_the_run(run, tmp_path):
    """A file-size limit simulates the full disk: large writes fail, lines pass."""
    directory = tmp_path / "run"
    flags = ("--steps", 6, "--checkpoint.every", 3)
    assert run("train", "--run-dir", directory, *flags)[0] == 0  # fills the caches
    shutil.rmtree(directory)

    code, output = run(
        "train", "--run-dir", directory, "--steps", 4, "--checkpoint.every", 2,
        *TINY_FLAGS, code=LIMITED,
    )  # fmt: skip
    assert "checkpoint of step 2 failed" in output, output
    assert read_lines(directory / "metrics.jsonl")[-1]["step"] == 4
    assert json.loads((directory / "config.json").read_text())["config"]["steps"] == 4
    code, output = run(
        "train", "--run-dir", directory, "--resume", "--steps", 4,
        "--checkpoint.every", 2,
    )  # fmt: skip
    # A checkpoint that was small enough to be written is used, with a message.
    assert code == 0, output
    assert "no readable checkpoint" in output or "resumed at step 4" in output


@pytest.mark.slow
def test_soak_in_short(tmp_path):
    """Seven faults of seven kinds; its own checks decide."""
    results = run_script("benchmarks/soak", tmp_path, **ENVIRONMENT)
    summary = json.loads((results / "summary.json").read_text())
    assert summary["faults"] == summary["as_expected"] == 7
    assert summary["exact"]["arrays_bit_identical"]
    assert summary["exact"]["metrics_identical"]


JUDGE = """
import os, pathlib

def right(example, completion):
    rows = pathlib.Path(os.environ["JUDGED_RUN"]) / "metrics.jsonl"
    mended = pathlib.Path(os.environ["JUDGED_RUN"]).with_name("mended").exists()
    if not mended and rows.exists() and '"step": 2,' in rows.read_text():
        raise RuntimeError("the judge is gone")
    return float(len(completion) % 2)
"""


@pytest.mark.slow
def test_a_reward_that_fails_on_every_sample_ends_the_run_and_can_be_mended(
    run, tmp_path, monkeypatch
):
    directory = tmp_path / "run"
    (tmp_path / "judges.py").write_text(JUDGE)
    rows = [{"prompt": f"{a}+1=?", "answer": str(a + 1)} for a in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = (
        "--task", "jsonl", "--task.path", "rows.jsonl", "--steps", 4,
        "--task.rewards", "judges:right", "--scoring.environment", "JUDGED_RUN",
    )  # fmt: skip
    small = (
        "--model.width", 32, "--model.mlp-width", 48, "--model.head-dim", 8,
        "--model.num-layers", 1, "--warm-start.max-steps", 2,
        "--sampling.prompts", 4, "--sampling.group-size", 4,
        "--sampling.max-new-tokens", 8, "--task.heldout-prompts", 4,
        "--evaluation.prompts", 4, "--instrument.every", 0,
    )  # fmt: skip
    monkeypatch.setenv("JUDGED_RUN", str(directory))
    code, output = run("train", "--run-dir", directory, *flags, *small, bare=True)
    assert code == 1 and "Traceback" not in output, output
    assert "step 3: all 16 rewards are missing: RuntimeError: the judge is" in output
    assert "stopped at step 2, step 2 is saved" in output
    assert [row["step"] for row in numbers(directory)] == [0, 1, 2]
    assert read_lines(directory / "samples.jsonl")[-1]["rewards"] == [None] * 4
    assert (directory / "report.html").exists()
    (tmp_path / "mended").write_text("")
    code, output = run("train", "--run-dir", directory, "--resume", bare=True)
    assert code == 0 and "resumed at step 2" in output, output
    assert [row["step"] for row in numbers(directory)] == [0, 1, 2, 3, 4]
