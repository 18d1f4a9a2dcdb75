"""SmolLM2-135M-Instruct: trained in full and by LoRA, resumed, exported, evaluated."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.models.policy import Policy
from grpo_jax.planning.forecast import forecast
from grpo_jax.rollouts.encoding import encode_prompts, pad_left
from grpo_jax.runs.config import (
    CheckpointConfig,
    EvaluationConfig,
    InstrumentConfig,
    SamplingConfig,
    TaskConfig,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.policies import task_for_run
from grpo_jax.runs.snapshots import load_policy
from tests.e2e.test_survival import numbers
from tests.unit.test_memory_analysis import peak, sampling_program

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]
README = (Path(__file__).parents[2] / "README.md").read_text()
# Settings of the model, and the learning rate that is the default for it.
KINDS = {"full": ({}, 1e-5), "lora": ({"lora_rank": 16, "lora_alpha": 32.0}, 3e-4)}
STEPS = 3
# Skills that the model solves about half of the time.
TASK = TaskConfig(
    name="ladder",
    skills=("copy", "last", "even", "second"),
    train_prompts=64,
    heldout_prompts=8,
)


class Trained(NamedTuple):
    kind: str
    config: gj.TrainConfig
    directory: Path
    policy: Policy  # at the end
    rows: list[dict]  # of metrics.jsonl


@pytest.fixture(scope="module")
def trained(request, optimized, real_model_directory, tmp_path_factory):
    """A run of three steps."""
    directory = tmp_path_factory.mktemp("runs") / request.param
    config = gj.TrainConfig(
        pretrained=str(real_model_directory),
        task=TASK,
        model=gj.ModelConfig(**KINDS[request.param][0]),
        sampling=SamplingConfig(prompts=2, group_size=4, max_new_tokens=16),
        evaluation=EvaluationConfig(every=0, prompts=8),
        instrument=InstrumentConfig(every=0),
        checkpoint=CheckpointConfig(every=STEPS - 1),
        run_dir=str(directory),
        steps=STEPS,
    )
    gj.train(config)
    rows = read_lines(directory / "metrics.jsonl")
    yield Trained(request.param, config, directory, load_policy(directory), rows)
    shutil.rmtree(directory)  # its checkpoints are up to 1.6 GB each


full = pytest.mark.parametrize("trained", ["full"], indirect=True)
lora = pytest.mark.parametrize("trained", ["lora"], indirect=True)


@pytest.mark.parametrize("trained", KINDS, indirect=True)
def test_three_steps_move_it_a_little(trained):
    steps = trained.rows[1:]
    facts = json.loads((trained.directory / "config.json").read_text())
    rate = facts["config"]["optimizer"]["learning_rate"]
    assert rate == KINDS[trained.kind][1]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert steps[-1]["update/applied"] == 3 and steps[-1]["update/skipped"] == 0
    # Before the first update it is the reference.
    assert steps[0]["kl/mean"] == 0 and 0 < steps[-1]["kl/mean"] < 0.2
    for row in steps:
        assert row["mismatch/max_abs"] < 2e-4
        assert 0 < row["update/log_prob_change"] < 1  # above which a run warns
        assert row["compiles"] == steps[0]["compiles"]
    assert sum(row["group/informative"] > 0 for row in steps) >= 2


@full
def test_a_resumed_run_gives_the_same_numbers(trained):
    """The run as it was before its last step goes on."""
    shutil.rmtree(trained.directory / "checkpoints" / str(STEPS))
    whole = numbers(trained.directory)
    gj.train(dataclasses.replace(trained.config, resume=True))
    assert numbers(trained.directory) == whole
    chex.assert_trees_all_equal(load_policy(trained.directory), trained.policy)


@full
def test_an_export_is_the_model_that_was_trained(trained, tmp_path):
    gj.export(trained.directory, tmp_path, dtype="float32")
    exported = gj.load_pretrained(tmp_path)
    chex.assert_trees_all_equal(exported.params, trained.policy.params)


@lora
def test_factors_in_an_export_say_the_same(trained, tmp_path):
    """They are added to the base before, not after they meet the input."""
    gj.export(trained.directory, tmp_path / "out", dtype="float32")
    exported = gj.load_pretrained(tmp_path / "out")
    task = task_for_run(trained.config.task, trained.directory)
    rows = encode_prompts(task, task.heldout)
    ids, mask = pad_left(rows, max(map(len, rows)), task.tokenizer.pad_token_id)
    logits = jax.jit(gj.next_token_logits)
    actual, expected = (
        np.asarray(logits(policy, ids, mask))[mask.astype(bool)]
        for policy in (exported, trained.policy)
    )
    scale = np.abs(expected).max()
    print(f"export: relative {np.abs(actual - expected).max() / scale:.1e}")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)
    of_run = greedy_texts(tmp_path / "run", run_dir=str(trained.directory))
    assert of_run == greedy_texts(tmp_path / "model", pretrained=str(tmp_path / "out"))
    assert len(of_run) == 8 and any(of_run)


def greedy_texts(output, **policy):
    """Answers to the held-out prompts, by `grpo-jax eval`'s function."""
    config = gj.EvalConfig(task=TASK, max_new_tokens=16, output=str(output), **policy)
    began = time.perf_counter()
    directory, _ = gj.evaluate(config, say=lambda text: None)
    seconds, rows = time.perf_counter() - began, read_lines(directory / "greedy.jsonl")
    print(f"eval: {len(rows)} prompts in {seconds:.1f} s, compilation included")
    return [row["texts"] for row in rows]


def test_eval_takes_the_memory_that_plan_says(real_model_directory):
    config = gj.TrainConfig(
        pretrained=str(real_model_directory),
        task=dataclasses.replace(TASK, heldout_prompts=32),
        sampling=SamplingConfig(prompts=4, group_size=8, max_new_tokens=16),
        evaluation=EvaluationConfig(prompts=32),
    )
    plan = forecast(config)
    length, sizes = plan["step"]["prompt_bucket"], plan["memory"]["bytes"]
    model = gj.load_pretrained(real_model_directory, dtype="float32").config
    found = peak(sampling_program(model, 32, 1, length, 16))
    expected = sizes["parameters"] + sizes["evaluation"]
    print(f"eval: {expected / 1e6:.0f} MB planned, XLA {found / 1e6:.0f} MB")
    assert expected == pytest.approx(found, rel=0.15)


def test_the_readmes_command_runs(real_model_directory, tmp_path):
    """As it is written there, but for one step in place of 120."""
    written = r"^grpo-jax (train --pretrained DIR --task ladder [^#\n]*)"
    arguments = re.search(written, README, re.M)[1].split()
    arguments[arguments.index("DIR")] = str(real_model_directory)
    run = tmp_path / "run"
    output = subprocess.check_output(
        [sys.executable, "-m", "grpo_jax", *arguments, "--steps=1", "--run-dir", run],
        text=True, timeout=1200, stderr=subprocess.STDOUT,
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": ""},
    )  # fmt: skip
    assert "learning rate 0.0003, the default for LoRA on a pretrained model" in output
    start, step = read_lines(run / "metrics.jsonl")
    assert step["update/applied"] == 1 and step["group/informative"] > 0.3
    assert 0.1 < start["eval/heldout_pass_rate"] < 0.7
    assert (run / "report.html").exists()
