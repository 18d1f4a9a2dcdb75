"""From a model directory and rows of text to an export, by way of a resumed run."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.cli import main
from grpo_jax.commands.replay import replay
from grpo_jax.errors import ConfigError
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.runs.config import (
    CheckpointConfig,
    EvaluationConfig,
    InstrumentConfig,
    OptimizerConfig,
    SamplingConfig,
    TaskConfig,
    WarmStartConfig,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.policies import data_fingerprint, fingerprint, task_of
from grpo_jax.runs.snapshots import load_policy, saved_steps
from grpo_jax.tasks.tokenizers import train_tokenizer
from tests.e2e.test_survival import numbers

MODEL = dict(width=16, mlp_width=24, num_heads=2, num_kv_heads=1, head_dim=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sums in GSM8K's format."""
    directory = tmp_path_factory.mktemp("data")
    rows = [
        {
            "question": f"Ann has {a} figs and buys {b}. How many figs has she?",
            "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}",
        }
        for a in range(10)
        for b in range(10)
    ]
    for part, some in (("train", rows[::2]), ("test", rows[1::4])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (directory / f"{part}.jsonl").write_text(text)
    return directory


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, data):
    """A Qwen2-shaped model with two tokens that end a turn, and its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    rows = read_lines(data / "train.jsonl")
    tokenizer = train_tokenizer([row["question"] for row in rows], 320)
    config = gj.ModelConfig(vocab_size=len(tokenizer) + 5, qk_bias=True, **MODEL)
    policy = gj.init_policy(config, jax.random.key(0))
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    gj.save_pretrained(policy, directory, tokenizer=tokenizer, eos_ids=ends)
    return directory


def settings(data, pretrained, **changes):
    config = gj.TrainConfig(
        task=TaskConfig(
            name="gsm8k",
            path=str(data),
            # Every number earns something, so that some groups are informative.
            rewards=("gsm8k", "tests.e2e.test_pretrained:figures=0.5"),
        ),
        pretrained=str(pretrained),
        sampling=SamplingConfig(prompts=2, group_size=4, max_new_tokens=6),
        evaluation=EvaluationConfig(every=2, prompts=4, samples=2),
        instrument=InstrumentConfig(every=0),
        checkpoint=CheckpointConfig(every=2),
        optimizer=OptimizerConfig(learning_rate=3e-4),  # the model is a tiny one
        steps=4,
    )
    return dataclasses.replace(config, **changes)


def figures(example, completion):
    """Share of digits in a completion."""
    return sum(c.isdigit() for c in completion) / max(1, len(completion))


@pytest.fixture(scope="module")
def run(data, pretrained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return gj.train(settings(data, pretrained, run_dir=str(directory)))


def test_a_run_starts_from_the_pretrained_weights(run, pretrained):
    ours, theirs = load_policy(run.run_dir, 0), gj.load_pretrained(pretrained)
    chex.assert_trees_all_equal(ours.params, theirs.params)
    assert not (run.run_dir / "initial.safetensors").exists()


def test_prompts_are_asked_in_the_models_own_chat_template(run, pretrained, data):
    plan_task = gj.load_task(
        "gsm8k", path=str(data), tokenizer=gj.load_tokenizer(pretrained)
    )
    assert plan_task.template == "chat"
    rows = read_lines(run.run_dir / "metrics.jsonl")
    assert rows[-1]["step"] == 4 and rows[-1]["update/skipped"] == 0
    assert max(row.get("group/informative", 0) for row in rows) > 0
    parts = [row["reward/of tests.e2e.test_pretrained:figures"] for row in rows[1:]]
    assert max(parts) > 0 and all(row["reward/failed"] == 0 for row in rows[1:])


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_numbers(run, data, pretrained, tmp_path):
    start = settings(data, pretrained, run_dir=str(tmp_path / "run"), steps=2)
    gj.train(start)
    gj.train(dataclasses.replace(start, steps=4, resume=True))
    again, whole = numbers(tmp_path / "run"), numbers(run.run_dir)
    assert again[-1] == whole[-1]


@pytest.mark.slow
def test_another_base_is_not_resumed(run, data, pretrained, tmp_path):
    other = tmp_path / "other"
    config = gj.ModelConfig(vocab_size=400, qk_bias=True, **MODEL)
    policy = gj.init_policy(config, jax.random.key(1))
    tokenizer, ends = gj.load_tokenizer(pretrained), gj.eos_ids(pretrained)
    gj.save_pretrained(policy, other, tokenizer=tokenizer, eos_ids=ends)
    moved = settings(data, other, run_dir=str(run.run_dir), resume=True)
    with pytest.raises(ConfigError, match="cannot resume.*pretrained"):
        gj.train(moved)


def test_the_export_is_the_policy(run, pretrained, tmp_path):
    assert gj.export(run.run_dir, tmp_path / "out") == 4
    exported, policy = gj.load_pretrained(tmp_path / "out"), load_policy(run.run_dir)
    chex.assert_trees_all_equal(exported.params, policy.params)
    assert gj.eos_ids(tmp_path / "out") == gj.eos_ids(pretrained)
    tokenizer = gj.load_tokenizer(tmp_path / "out")
    assert tokenizer.chat_template == gj.load_tokenizer(pretrained).chat_template


def test_a_shape_beside_a_pretrained_model_is_refused(data, pretrained):
    model = gj.ModelConfig(num_layers=3)
    with pytest.raises(ConfigError, match="model.num_layers is the pretrained"):
        gj.train(settings(data, pretrained, model=model))


@pytest.mark.slow
def test_lora_trains_factors_alone(data, pretrained, tmp_path):
    model = gj.ModelConfig(lora_rank=2, lora_alpha=4.0, lora_targets=("q", "down"))
    config = settings(data, pretrained, run_dir=str(tmp_path / "run"), model=model)
    gj.train(dataclasses.replace(config, steps=2))
    result = gj.train(dataclasses.replace(config, resume=True))
    assert result.metrics["update/applied"] > 0 and result.metrics["kl/mean"] >= 0
    assert saved_steps(result.run_dir) == [0, 2, 4]

    policy, base = load_policy(result.run_dir), gj.load_pretrained(pretrained)
    names = {p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(policy.params)}
    assert names == {"lora_a", "lora_b"}
    chex.assert_trees_all_equal(policy.frozen, base.params)

    gj.export(result.run_dir, tmp_path / "whole")
    ids = np.arange(2, 12, dtype=np.int32)[None]
    merged = gj.next_token_logits(gj.load_pretrained(tmp_path / "whole"), ids)
    np.testing.assert_allclose(merged, gj.next_token_logits(policy, ids), atol=1e-5)

    gj.export(result.run_dir, tmp_path / "adapter", adapter=True)
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert facts["target_modules"] == ["q_proj", "down_proj"]
    assert facts["base_model_name_or_path"] == str(pretrained)


@pytest.mark.slow
def test_a_run_starts_from_an_adapter(data, pretrained, tmp_path, capsys):
    """Trained, evaluated, planned, exported and taught on like a model's directory."""
    base = gj.load_pretrained(pretrained)
    targets = dict(rank=2, alpha=4.0, targets=("q", "down"))
    policy = gj.add_lora(base, key=jax.random.key(0), **targets)
    policy = policy.replace(jax.tree.map(lambda x: x + 0.02, policy.params))
    adapter = tmp_path / "adapter"
    gj.save_adapter(policy.params, policy.config, adapter, base=str(pretrained))

    config = settings(data, adapter, run_dir=str(tmp_path / "run"))
    config = dataclasses.replace(config, objective={"kl_coef": 0.1}, steps=2)
    result = gj.train(config)
    chex.assert_trees_all_equal(load_policy(result.run_dir, 0), policy)
    rows = read_lines(result.run_dir / "metrics.jsonl")
    assert rows[1]["kl/mean"] == 0 and result.metrics["kl/mean"] > 0

    gj.export(result.run_dir, tmp_path / "again", adapter=True)
    again, trained = gj.load_pretrained(tmp_path / "again"), load_policy(result.run_dir)
    chex.assert_trees_all_equal(again, trained)
    gj.export(result.run_dir, tmp_path / "whole")
    chex.assert_trees_all_equal(
        gj.load_pretrained(tmp_path / "whole").params, gj.merge_lora(trained).params
    )

    task = dataclasses.replace(config.task, heldout_prompts=0)
    asked = gj.EvalConfig(pretrained=str(tmp_path / "again"), task=task)
    of_model = gj.evaluate(dataclasses.replace(asked, output=str(tmp_path / "a")))[1]
    of_run = gj.evaluate(gj.EvalConfig(run_dir=str(result.run_dir), max_new_tokens=6))[
        1
    ]
    assert of_run["task"] == "gsm8k" and of_run["prompts"] == of_model["prompts"]

    output = tmp_path / "taught"
    taught = gj.WarmupConfig(
        output=output, pretrained=adapter, task=task, warm_start={"max_steps": 1}
    )
    assert gj.warm_up(taught) == output
    assert gj.load_pretrained(output).config.lora_rank == 0
    arguments = [
        "--pretrained",
        str(adapter),
        "--task",
        "gsm8k",
        "--sampling.prompts=2",
    ]
    arguments += ["--task.path", str(data), "--sampling.max-new-tokens", "6"]
    capsys.readouterr()
    assert main(["plan", *arguments, "--run-dir", str(tmp_path / "new")]) == 0
    assert "of LoRA trained" in capsys.readouterr().out


def test_a_bfloat16_model_keeps_its_update_or_is_not_written(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="bfloat16 files would lose"):
        gj.export(run.run_dir, tmp_path / "half", dtype="bfloat16")
    arguments = ["export", str(run.run_dir), str(tmp_path / "half"), "--dtype=bfloat16"]
    assert main([*arguments, "--max-loss", "5"]) == 0
    assert "rounding to bfloat16 loses" in capsys.readouterr().out
    half = gj.load_pretrained(tmp_path / "half")
    assert half.config.compute_dtype == "bfloat16"


def test_a_model_stored_in_bfloat16_is_written_in_it(
    data, pretrained, tmp_path, capsys
):
    """Trained in float32; what rounding loses is said, and may be kept by choice."""
    half = tmp_path / "model"
    policy, tokenizer = gj.load_pretrained(pretrained), gj.load_tokenizer(pretrained)
    ends = gj.eos_ids(pretrained)
    gj.save_pretrained(
        policy, half, tokenizer=tokenizer, eos_ids=ends, dtype="bfloat16"
    )
    config = settings(data, half, run_dir=str(tmp_path / "run"), steps=2)
    result = gj.train(config)
    output = " ".join(capsys.readouterr().out.split())
    assert "float32, the default on CPUs for a model stored in bfloat16" in output
    facts = json.loads((result.run_dir / "config.json").read_text())
    assert facts["config"]["model"]["compute_dtype"] == "float32"

    trained = load_policy(result.run_dir)
    gj.export(result.run_dir, tmp_path / "same")
    output = " ".join(capsys.readouterr().out.split())
    lost = re.search(
        r"written in bfloat16, as the model that .* loses ([\d.]+) %", output
    )
    assert lost and float(lost[1]) > 1  # more than --dtype bfloat16 may lose
    with pytest.raises(ConfigError, match="bfloat16 files would lose"):
        gj.export(result.run_dir, tmp_path / "refused", dtype="bfloat16")
    with pytest.raises(ConfigError, match="more than max_loss 0.02"):
        gj.export(result.run_dir, tmp_path / "refused", max_loss=0.02)
    assert not (tmp_path / "refused").exists()
    written = gj.load_pretrained(tmp_path / "same")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), trained.params)
    chex.assert_trees_all_equal(written.params, rounded)
    gj.export(result.run_dir, tmp_path / "all", dtype="float32")
    chex.assert_trees_all_equal(
        gj.load_pretrained(tmp_path / "all").params, trained.params
    )


@pytest.mark.slow
def test_a_run_is_found_its_data_from_anywhere(data, pretrained, tmp_path, monkeypatch):
    """Begun with relative paths and a reward of its own, read from elsewhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    shutil.copytree(data, home / "data")
    shutil.copytree(pretrained, home / "model")
    (home / "rewards_at_home.py").write_text(
        "def digits(example, completion):\n"
        "    return sum(c.isdigit() for c in completion) / max(1, len(completion))\n"
    )
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    config = settings("data", "model", run_dir="runs/mine")
    rewards = ("gsm8k", "rewards_at_home:digits=0.5")
    config = dataclasses.replace(
        config, steps=2, task=dataclasses.replace(config.task, rewards=rewards)
    )
    gj.train(config)
    monkeypatch.chdir(elsewhere)
    run_dir = str(home / "runs" / "mine")
    assert main(["train", "--resume", "--run-dir", run_dir, "--steps", "4"]) == 0
    assert replay(run_dir, 3).differing == []
    gj.evaluate(gj.EvalConfig(run_dir=run_dir, output="figures"))
    assert gj.export(run_dir, "model") == 4
    monkeypatch.chdir(tmp_path)
    gj.evaluate(gj.EvalConfig(run_dir="home/runs/mine", output="elsewhere/figures"))

    again = ["train", "--config", f"{run_dir}/config.json", "--run-dir", "again"]
    assert main(again) == 0
    first, second = (read_lines(Path(d) / "metrics.jsonl") for d in (run_dir, "again"))
    assert [r["reward/mean"] for r in first[1:]] == [
        r["reward/mean"] for r in second[1:]
    ]


def test_an_adapter_of_a_whole_run_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="no LoRA factors"):
        gj.export(run.run_dir, tmp_path / "adapter", adapter=True)


def test_evaluation_goes_on_where_it_was(data, pretrained, tmp_path):
    config = gj.EvalConfig(
        pretrained=str(pretrained),
        task=TaskConfig(name="gsm8k", path=str(data)),
        samples=4,
        prompts=10,
        max_new_tokens=5,
        rows=8,
        output=str(tmp_path / "eval"),
    )
    said = []
    directory, whole = gj.evaluate(config, say=said.append)
    lines = (directory / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 10 and set(whole["figures"]) == {"greedy", "samples"}
    assert set(whole["figures"]["samples"]) == {
        "avg@4", "pass@1", "pass@2", "pass@4", "tokens", "cut off", "reward",
    }  # fmt: skip
    # Killed in the middle of a line.
    cut = "\n".join([*lines[:3], lines[3][:20]])
    (directory / "samples.jsonl").write_text(cut)
    (directory / "eval.json").unlink()
    _, again = gj.evaluate(config, say=said.append)
    assert again["figures"] == whole["figures"]
    assert (directory / "samples.jsonl").read_text().splitlines() == lines
    with pytest.raises(ConfigError, match="another evaluation.*temperature"):
        gj.evaluate(dataclasses.replace(config, temperature=0.5), say=said.append)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_batches_go_on_where_they_change_no_answer(
    data, pretrained, tmp_path, dtype
):
    """In bfloat16 another number of rows is another evaluation, and a batch that was
    half written is asked again as a whole."""
    config = gj.EvalConfig(
        pretrained=str(pretrained),
        task=TaskConfig(name="gsm8k", path=str(data)),
        greedy=False,
        samples=2,
        prompts=6,
        max_new_tokens=4,
        rows=8,
        compute_dtype=dtype,
        output=str(tmp_path / "eval"),
    )
    directory, _ = gj.evaluate(config, say=lambda text: None)
    file = directory / "samples.jsonl"
    lines = file.read_text().splitlines()
    # Batches of 4 and 2 prompts; the first is cut after 3, the second is kept whole.
    file.write_text("\n".join([*lines[:3], *lines[4:]]) + "\n")
    said = []
    gj.evaluate(config, say=said.append)
    again = file.read_text().splitlines()
    assert sorted(again) == sorted(lines)
    kept = again.index(lines[4])
    assert kept == (0 if dtype == "bfloat16" else 3)
    other = dataclasses.replace(config, rows=4)
    if dtype == "float32":
        gj.evaluate(other, say=said.append)
    else:
        with pytest.raises(ConfigError, match="another evaluation.*rows: 8 -> 4"):
            gj.evaluate(other, say=said.append)


def test_a_run_is_evaluated_as_it_was_trained(run, capsys):
    """Its tokenizer, its lengths, and all held-out prompts of the file."""
    assert main(["eval", "--run-dir", str(run.run_dir), "--prompts", "3"]) == 0
    found = json.loads((run.run_dir / "eval-gsm8k-step4" / "eval.json").read_text())
    assert found["max_new_tokens"] == 6 and found["prompts"] == 3
    assert found["config"]["task"]["heldout_prompts"] == 0
    capsys.readouterr()
    wrong = ["eval", "--run-dir", str(run.run_dir), "--task.vocab-size", "400"]
    assert main(wrong) == 2
    assert "task.vocab_size is of a new tokenizer" in capsys.readouterr().err


def test_an_export_replaces_no_run(run):
    with pytest.raises(ConfigError, match="is a run or a file"):
        gj.export(run.run_dir, run.run_dir)
    assert load_policy(run.run_dir).config.width == 16


def test_evaluation_of_a_model_that_changed_is_another(data, pretrained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pretrained, model)
    config = gj.EvalConfig(
        pretrained=str(model),
        task=TaskConfig(name="gsm8k", path=str(data)),
        prompts=2,
        max_new_tokens=2,
        output=str(tmp_path / "eval"),
    )
    before = fingerprint(model)
    gj.evaluate(config, say=lambda text: None)
    policy = gj.load_pretrained(model)
    policy = policy.replace(jax.tree.map(lambda x: x + 0.01, policy.params))
    gj.save_pretrained(policy, model)
    assert fingerprint(model) != before
    with pytest.raises(ConfigError, match="another evaluation.*the policy"):
        gj.evaluate(config, say=lambda text: None)


def test_a_hub_name_is_fetched_whole_and_asks_as_the_directory_does(
    data, pretrained, tmp_path, monkeypatch
):
    """By a stand-in for the hub that copies the files asked for."""

    def snapshot_download(name, allow_patterns):
        assert name == "some/model"
        for pattern in allow_patterns:
            for file in pretrained.glob(pattern):
                shutil.copy(file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = settings(data, pretrained).task
    ours, theirs = (task_of(config, x) for x in ("some/model", str(pretrained)))
    assert ours.template == theirs.template == "chat"
    assert data_fingerprint(ours) == data_fingerprint(theirs)
    assert fingerprint(tmp_path) == fingerprint(pretrained)
    assert gj.load_pretrained("some/model").config.width == 16


def test_a_directory_without_weights_leaves_no_run(data, pretrained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pretrained, model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="model.safetensors"):
        gj.train(settings(data, model, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(data, pretrained, tmp_path):
    config = gj.ModelConfig(vocab_size=262, qk_bias=True, **MODEL)
    policy = gj.init_policy(config, jax.random.key(0))
    gj.save_pretrained(policy, tmp_path, tokenizer=gj.load_tokenizer(pretrained))
    task = TaskConfig(name="gsm8k", path=str(data))
    asked = gj.EvalConfig(pretrained=str(tmp_path), task=task, max_new_tokens=2)
    taught = gj.WarmupConfig(
        pretrained=str(tmp_path), task=task, output=str(tmp_path / "out")
    )
    for call in (
        lambda: gj.evaluate(asked),
        lambda: gj.warm_up(taught),
        lambda: gj.train(settings(data, tmp_path)),
    ):
        with pytest.raises(ConfigError, match="vocab_size must be above"):
            call()


@pytest.mark.slow
def test_warm_up_starts_from_what_it_is_given(data, pretrained, tmp_path):
    """Two models of one shape do not share a cached result."""
    other = tmp_path / "other"
    policy = gj.load_pretrained(pretrained)
    policy = policy.replace(jax.tree.map(lambda x: x * 1.5, policy.params))
    gj.save_pretrained(policy, other, tokenizer=gj.load_tokenizer(pretrained))
    made = []
    for i, base in enumerate((pretrained, other)):
        config = gj.WarmupConfig(
            output=str(tmp_path / f"out{i}"),
            pretrained=str(base),
            task=TaskConfig(name="gsm8k", path=str(data)),
            warm_start=WarmStartConfig(max_steps=1, batch_size=2),
        )
        gj.warm_up(config, say=lambda text: None)
        made.append((tmp_path / f"out{i}" / "model.safetensors").read_bytes())
    assert made[0] != made[1]


@pytest.mark.slow
def test_a_warm_up_that_diverges_saves_nothing(data, pretrained, tmp_path):
    config = gj.WarmupConfig(
        output=str(tmp_path / "out"),
        pretrained=str(pretrained),
        task=TaskConfig(name="gsm8k", path=str(data)),
        warm_start=WarmStartConfig(max_steps=2, batch_size=2, learning_rate=1e20),
    )
    with pytest.raises(ConfigError, match="diverged.*learning_rate"):
        gj.warm_up(config, say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_model_is_asked_later_as_it_was_taught(data, tmp_path):
    config = TaskConfig(name="gsm8k", path=str(data), vocab_size=320)
    taught = task_of(config, None)
    policy = gj.init_policy(
        gj.ModelConfig(vocab_size=len(taught.tokenizer), **MODEL), jax.random.key(0)
    )
    gj.save_pretrained(policy, tmp_path, tokenizer=taught.tokenizer)
    asked = task_of(dataclasses.replace(config, vocab_size=None), str(tmp_path))
    one = taught.train[:1]
    assert encode_prompts(taught, one) == encode_prompts(asked, one)


@pytest.mark.slow
def test_warm_up_makes_a_model_to_train(data, tmp_path):
    config = gj.WarmupConfig(
        output=str(tmp_path / "model"),
        task=TaskConfig(name="gsm8k", path=str(data), vocab_size=320),
        model=gj.ModelConfig(**MODEL),
        warm_start=WarmStartConfig(max_steps=3, batch_size=4),
    )
    said = []
    assert gj.warm_up(config, say=said.append) == tmp_path / "model"
    assert "nats a token" in said[-2]
    policy = gj.load_pretrained(tmp_path / "model")
    assert policy.config.width == 16
    with pytest.raises(ConfigError, match="new or empty directory"):
        gj.warm_up(config)
