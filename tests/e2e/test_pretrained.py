"""From a model directory and rows of text to an export, by way of a resumed run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.tasks.tokenizers import train_tokenizer
from grpo_jax.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    InstrumentConfig,
    SamplingConfig,
    TaskConfig,
)
from grpo_jax.training.metrics import read_lines
from grpo_jax.training.snapshots import load_policy, saved_steps
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
    same = jax.tree.map(np.array_equal, ours.params, theirs.params)
    assert all(jax.tree.leaves(same))
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
    gj.save_pretrained(policy, other, tokenizer=gj.load_tokenizer(pretrained))
    moved = settings(data, other, run_dir=str(run.run_dir), resume=True)
    with pytest.raises(ConfigError, match="cannot resume.*pretrained"):
        gj.train(moved)


def test_the_export_is_the_policy(run, pretrained, tmp_path):
    assert gj.export(run.run_dir, tmp_path / "out") == 4
    exported, policy = gj.load_pretrained(tmp_path / "out"), load_policy(run.run_dir)
    same = jax.tree.map(np.array_equal, exported.params, policy.params)
    assert all(jax.tree.leaves(same))
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
    same = jax.tree.map(np.array_equal, policy.frozen, base.params)
    assert all(jax.tree.leaves(same))

    gj.export(result.run_dir, tmp_path / "whole")
    ids = np.arange(2, 12, dtype=np.int32)[None]
    merged = gj.next_token_logits(gj.load_pretrained(tmp_path / "whole"), ids)
    np.testing.assert_allclose(merged, gj.next_token_logits(policy, ids), atol=1e-5)

    gj.export(result.run_dir, tmp_path / "adapter", adapter=True)
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert facts["target_modules"] == ["q_proj", "down_proj"]
    assert facts["base_model_name_or_path"] == str(pretrained)


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
        "avg@4", "pass@1", "pass@2", "pass@4", "tokens",
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


@pytest.mark.slow
def test_warm_up_makes_a_model_to_train(data, tmp_path):
    config = gj.WarmupConfig(
        output=str(tmp_path / "model"),
        task=TaskConfig(name="gsm8k", path=str(data), vocab_size=320),
        model=gj.ModelConfig(**MODEL),
        warm_start=gj.TrainConfig().warm_start.__class__(max_steps=3, batch_size=4),
    )
    said = []
    assert gj.warm_up(config, say=said.append) == tmp_path / "model"
    assert "nats a token" in said[-2]
    policy = gj.load_pretrained(tmp_path / "model")
    assert policy.config.width == 16
    with pytest.raises(ConfigError, match="new or empty directory"):
        gj.warm_up(config)
