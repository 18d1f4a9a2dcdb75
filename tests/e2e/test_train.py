"""Runs from start to end in this process: files, learning, failures, refusals."""

import dataclasses
import json
import math

import chex
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.instrument.rows import ROW_FIELDS
from grpo_jax.planning.plan import make_plan
from grpo_jax.runs.config import (
    CheckpointConfig,
    EvaluationConfig,
    InstrumentConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    WarmStartConfig,
)
from grpo_jax.runs.fields import FIELDS
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.snapshots import saved_steps
from grpo_jax.training import programs
from grpo_jax.training.saving import NonFiniteGradientsError
from grpo_jax.training.step import make_train_step

DRAWN = True  # the reports, here alone
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def small_config(run_dir, **changes):
    defaults = dict(
        run_dir=str(run_dir),
        steps=6,
        model=gj.ModelConfig(width=16, mlp_width=24, head_dim=4),
        sampling=SamplingConfig(prompts=4, group_size=4),
        warm_start=WarmStartConfig(enabled=False),
        evaluation=EvaluationConfig(every=3, prompts=16),
        instrument=InstrumentConfig(every=0),
        checkpoint=CheckpointConfig(every=3),
        log=LogConfig(samples_every=2),
    )
    return gj.TrainConfig(**(defaults | changes))


def digits_task(reward=None):
    """Answer any digit: reachable without a warm start, so that rewards vary."""

    def share_of_digits(example, completion):
        return sum(c.isdigit() for c in completion) / 8

    task = gj.load_task("chains", heldout_prompts=16)
    return dataclasses.replace(
        task, reward=reward or share_of_digits, single_answer=False, warm_start=None
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with everything on: three updates a rollout, instrument, KL. Its update,
    for completions of one padded length, may be traced once."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    config = small_config(
        directory,
        updates_per_rollout=3,
        instrument=InstrumentConfig(every=3, prompts=4),
        micro_batch_tokens=100,
        warm_start=WarmStartConfig(max_steps=20, noisy_steps=0),
    )

    def traced_once(*arguments, **options):
        return chex.assert_max_traces(make_train_step(*arguments, **options), n=1)

    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "make_train_step", traced_once)
        return gj.train(config)


def test_files_of_a_run_directory(finished):
    names = {path.name for path in finished.run_dir.iterdir()}
    assert names >= {
        "config.json", "metrics.jsonl", "samples.jsonl", "instrument.jsonl",
        "checkpoints", "report.html", "tokenizer", "initial.safetensors",
    }  # fmt: skip
    steps = [row["step"] for row in read_lines(finished.run_dir / "metrics.jsonl")]
    assert steps == list(range(7)) and finished.finished
    samples = read_lines(finished.run_dir / "samples.jsonl")  # every second, and one
    assert {row["step"] for row in samples} == {1, 2, 4, 6}


def test_every_field_is_documented_and_the_promised_ones_are_present(finished):
    rows = read_lines(finished.run_dir / "metrics.jsonl")
    assert {field for row in rows for field in row} <= set(FIELDS)
    promised = {
        "step", "reward/mean", "group/informative", "group/std_mean",
        "mismatch/max_abs", "time/sample_s", "time/score_s", "time/update_s",
        "tokens/completion",
    }  # fmt: skip
    assert all(promised <= set(row) for row in rows[1:])
    evaluated = [row for row in rows if "eval/train_pass_rate" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 6]
    assert all("eval/heldout_pass_rate" in row for row in evaluated)
    assert max(row["mismatch/max_abs"] for row in rows[1:]) < 1e-5
    assert all(0 <= row["completion/cut_off"] <= 1 for row in rows[1:])
    assert all("eval/heldout_cut_off" in row for row in evaluated)


def test_the_parts_of_the_time_are_told_apart(finished):
    rows = read_lines(finished.run_dir / "metrics.jsonl")
    parts = ("sample", "score", "reference", "update", "evaluation", "instrument")
    for row in rows[1:]:
        assert row["time/reference_s"] > 0 and row["time/score_s"] > 0
        known = sum(row.get(f"time/{part}_s", 0) for part in parts)
        assert known <= row["time/step_s"]
    assert [row["step"] for row in rows if "time/start_s" in row] == [0]
    timed = [row["step"] for row in rows if "time/evaluation_s" in row]
    assert timed == [0, 3, 6] and rows[0]["time/start_s"] > 0
    assert "Where the time went" in (finished.run_dir / "report.html").read_text()


@pytest.mark.slow
def test_checkpoints_are_also_saved_by_time(tmp_path):
    often = CheckpointConfig(every=1000, minutes=1e-9, keep=9)
    config = small_config(tmp_path / "run", checkpoint=often, steps=3)
    gj.train(config)
    assert saved_steps(tmp_path / "run") == [0, 1, 2, 3]
    rarely = CheckpointConfig(every=1000, minutes=0, keep=9)
    changes = dict(checkpoint=rarely, steps=5, resume=True)
    gj.train(dataclasses.replace(config, **changes))
    assert saved_steps(tmp_path / "run") == [0, 1, 2, 3, 5]


@pytest.mark.slow
def test_a_run_goes_on_with_its_reference_on_the_host(tmp_path):
    """To the same numbers, bit for bit."""
    method = dict(updates_per_rollout=2, objective=ObjectiveConfig(kl_coef=1.0))
    whole = small_config(tmp_path / "whole", steps=4, **method)
    expected = gj.train(whole, task=digits_task()).history
    gj.train(small_config(tmp_path / "run", steps=2, **method), task=digits_task())
    host = dict(resume=True, reference_memory="host")
    moved = small_config(tmp_path / "run", steps=4, **method, **host)
    actual = gj.train(moved, task=digits_task()).history
    for name in ("kl/mean", "gradient/norm", "reward/mean"):
        np.testing.assert_array_equal(actual[name], expected[name])
    assert expected["kl/mean"][-1] > 0


def test_measurements_of_the_instrument_are_in_their_file(finished):
    rows = read_lines(finished.run_dir / "instrument.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert all(set(row) == set(ROW_FIELDS) for row in rows)
    assert [row["update"] is None for row in rows] == [False, False, True]


def test_nothing_is_compiled_after_the_first_steps(finished):
    rows = read_lines(finished.run_dir / "metrics.jsonl")
    compiled = [row["compiles"] for row in rows]
    assert compiled[1] > 0 and len(set(compiled[2:])) == 1


def test_tokenizer_beside_the_checkpoints_reads_the_task(finished):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished.run_dir / "tokenizer")
    ids = tokenizer("3+4*2=")["input_ids"]
    assert tokenizer.decode(ids) == "3+4*2=" and tokenizer.eos_token_id == 1


def test_report_is_one_file_that_fetches_nothing(finished):
    page = (finished.run_dir / "report.html").read_text()
    assert page.count("<svg") >= 8
    assert "src=" not in page and "<link" not in page and "<script" not in page
    for section in ("Pass rate", "Within-prompt std", "Cut off", "Samples"):
        assert section in page
    main, curves = page.index("Why and when normalisation"), page.index("<h2>Curves")
    assert main < page.index("Every measurement") < curves


@pytest.mark.slow
def test_reports_of_two_runs_are_overlaid(finished, tmp_path):
    from grpo_jax.cli import main

    other = gj.train(
        small_config(tmp_path / "other", objective=ObjectiveConfig(name="reinforce"))
    )
    output = tmp_path / "both.html"
    runs = [str(finished.run_dir), str(other.run_dir)]
    assert main(["report", *runs, "--output", str(output)]) == 0
    page = output.read_text()
    assert "objective.name: &#39;grpo&#39; -&gt; &#39;reinforce&#39;" in page
    assert page.count("finished") > 2 and page.count("other") > 2


def test_reward_rises(tmp_path):
    config = small_config(
        tmp_path / "run", steps=25, optimizer=OptimizerConfig(learning_rate=1e-2)
    )
    result = gj.train(config, task=digits_task())
    rows = read_lines(result.run_dir / "metrics.jsonl")
    rewards = [row["reward/mean"] for row in rows[1:]]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


def test_same_seed_same_numbers_and_a_warning_of_a_destructive_rate(tmp_path, capsys):
    high = OptimizerConfig(learning_rate=3.0)

    def rewards(name):
        config = small_config(tmp_path / name, optimizer=high)
        result = gj.train(config, task=digits_task())
        rows = read_lines(result.run_dir / "metrics.jsonl")
        return [(row.get("reward/mean"), row.get("gradient/norm")) for row in rows]

    assert rewards("a") == rewards("b")
    printed = capsys.readouterr().out
    assert printed.count("warning: optimizer.learning_rate 3 is high for a new") == 2
    assert printed.count("try --optimizer.learning-rate 0.0003") == 2  # once a run


def test_rewards_that_fail_are_masked_counted_and_shown(tmp_path, capsys):
    calls = iter(range(10**6))

    def reward(example, completion):
        i = next(calls)
        if i % 5 == 3:  # not the first call, which decides whether the run starts
            raise RuntimeError("the verifier is down")
        return math.nan if i % 5 == 1 else float(i % 2)

    result = gj.train(small_config(tmp_path / "run"), task=digits_task(reward))
    rows = read_lines(result.run_dir / "metrics.jsonl")[1:]
    assert result.finished and len(rows) == 6
    assert all(row["reward/missing"] >= 4 for row in rows)  # 2 of every 5 of 16
    assert all(math.isfinite(row["reward/mean"]) for row in rows)
    assert "RuntimeError: the verifier is down" in capsys.readouterr().out


def test_five_non_finite_gradients_end_the_run_with_the_batch_saved(tmp_path):
    def reward(example, completion):
        return 3e38 if len(completion) % 2 else -3e38

    config = small_config(
        tmp_path / "run", steps=50, objective=ObjectiveConfig(name="reinforce")
    )
    with pytest.raises(NonFiniteGradientsError, match="non-finite gradient") as stopped:
        gj.train(config, task=digits_task(reward))
    (saved,) = (tmp_path / "run").glob("nonfinite-step-*.npz")
    assert saved.name in str(stopped.value)
    arrays = np.load(saved)
    assert arrays["completions"].shape == (4, 4, 8)
    assert set(arrays) >= {"prompts", "completion_mask", "rewards", "step"}
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["update/skipped_in_a_row"] == 5


# ---- runs that are refused, and leave nothing behind


def refused(config, task=None):
    with pytest.raises(ConfigError) as error:
        gj.train(config, task=task)
    return str(error.value)


def test_another_runs_directory_is_refused(finished, tmp_path):
    config = small_config(finished.run_dir, seed=3)
    message = refused(config)
    assert "seed: 0 -> 3" in message and "another --run-dir" in message
    saved = json.loads((finished.run_dir / "config.json").read_text())["config"]
    assert saved["seed"] == 0


def test_the_same_run_without_resume_is_refused(tmp_path):
    config = small_config(tmp_path / "run", steps=2)
    gj.train(config, task=digits_task())
    assert "continue it with --resume" in refused(config, digits_task())


def test_resume_with_another_config_is_refused(finished):
    config = small_config(finished.run_dir, seed=3, resume=True)
    assert "seed: 0 -> 3" in refused(config)


def test_resume_of_nothing_is_refused(tmp_path):
    message = refused(small_config(tmp_path / "none", resume=True))
    assert "nothing to resume" in message and not (tmp_path / "none").exists()


def test_tokenizer_without_eos_is_refused(tmp_path):
    task = digits_task()
    task.tokenizer.eos_token = None
    message = refused(small_config(tmp_path / "run"), task)
    assert "no EOS token" in message and not (tmp_path / "run").exists()


def test_long_prompts_are_left_out(tmp_path):
    """A chain of n operations has 2 n + 2 tokens."""
    sampling = SamplingConfig(prompts=4, group_size=4, max_prompt_tokens=6)
    plan = make_plan(small_config(tmp_path / "run", sampling=sampling))
    assert {len(row) for row in plan.prompts} == {4, 6}
    assert {len(e.prompt) for e in plan.task.heldout} == {4, 6}
    assert "trained and" in plan.warnings[0] and "left out" in plan.warnings[0]
    sampling = SamplingConfig(prompts=4, group_size=4, max_prompt_tokens=3)
    message = refused(small_config(tmp_path / "run", sampling=sampling))
    assert "max_prompt_tokens is 3, and every trained prompt" in message


def test_too_few_new_tokens_are_refused(tmp_path):
    sampling = SamplingConfig(prompts=4, group_size=4, max_new_tokens=5)
    message = refused(small_config(tmp_path / "run", sampling=sampling))
    assert "max_new_tokens must be at least 8" in message
