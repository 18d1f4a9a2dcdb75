"""Tokenizers with a token past the embedding, as of models with and without images."""

import dataclasses

import jax
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.planning.plan import make_plan
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.embedded import check_embedded
from grpo_jax.runs.config import SamplingConfig, TaskConfig, TrainConfig
from grpo_jax.runs.policies import task_of
from tests.chat_forms import GEMMA, chat_tokenizer, sums, write_rows

IMAGE = "<image_soft_token>"
NAMES = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
SHAPE = dict(width=16, mlp_width=24, num_heads=2, num_kv_heads=1, head_dim=8)


def gemma():
    """As Gemma 3: the token of an image comes after all rows of the embedding."""
    tokenizer = chat_tokenizer(GEMMA, NAMES, eos="<eos>", bos="<bos>", pad="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    assert tokenizer.convert_tokens_to_ids(IMAGE) == len(tokenizer) - 1
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(directory, rows of the embedding): one less than the tokenizer has tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("gemma"), gemma()
    config = gj.ModelConfig(vocab_size=len(tokenizer) - 1, **SHAPE)
    policy = gj.init_policy(config, jax.random.key(0))
    gj.save_pretrained(policy, folder, tokenizer=tokenizer)
    return folder, config.vocab_size


def config(model, rows, tmp_path, **changes):
    task = TaskConfig(name="jsonl", path=write_rows(tmp_path / "rows.jsonl", rows))
    config = TrainConfig(
        task=dataclasses.replace(task, prompt_field="prompt", answer_field="answer"),
        pretrained=str(model[0]),
        sampling=SamplingConfig(prompts=2, group_size=4, max_new_tokens=4),
        steps=1,
    )
    return dataclasses.replace(config, **changes)


def test_a_token_that_nothing_uses_may_lie_past_the_embedding(model, tmp_path):
    # A prompt with its name does not use it: names are spelt out.
    rows = [*sums(), {"prompt": f"what is {IMAGE}?", "answer": IMAGE}]
    plan = make_plan(config(model, rows, tmp_path))
    assert plan.model.vocab_size == model[1] == len(plan.task.tokenizer) - 1
    assert max(map(max, plan.prompts)) < model[1]


def test_such_a_model_is_trained_exported_and_loaded_again(model, tmp_path):
    run_dir = tmp_path / "run"
    result = gj.train(config(model, sums(), tmp_path, run_dir=str(run_dir)))
    assert result.finished
    gj.export(run_dir, tmp_path / "out")
    assert gj.load_pretrained(tmp_path / "out").config.vocab_size == model[1]
    assert len(gj.load_tokenizer(tmp_path / "out")) == model[1] + 1


def test_a_prompt_with_the_token_is_refused(model, tmp_path):
    asked = config(model, [*sums(), {"prompt": IMAGE, "answer": "1"}], tmp_path)
    kept = dataclasses.replace(asked.task, control_tokens="keep", template="none")
    with pytest.raises(ConfigError, match=f"a prompt of task jsonl uses .* {IMAGE}"):
        make_plan(dataclasses.replace(asked, task=kept))


def test_an_end_with_the_token_is_refused(model, tmp_path):
    asked = config(model, sums(), tmp_path)
    stops = dataclasses.replace(asked.sampling, stop_tokens=(IMAGE,))
    with pytest.raises(ConfigError, match=f"an end of task jsonl uses .* {IMAGE}"):
        make_plan(dataclasses.replace(asked, sampling=stops))


def test_padding_a_draft_and_an_answer_with_the_token_are_refused(model, tmp_path):
    asked = config(model, sums(), tmp_path)
    task, image = task_of(asked.task, asked.pretrained), model[1]
    check_embedded(task, image, refine=["prompt", (image - 1,), "draft"])
    with pytest.raises(ConfigError, match="the refine template of task"):
        check_embedded(task, image, refine=["prompt", (image,), "draft"])
    rows = [Example(prompt="1", answer="9")]
    nine = dataclasses.replace(task, train=rows, heldout=rows, template="none")
    with pytest.raises(ConfigError, match="an answer of task jsonl uses the token 9"):
        check_embedded(nine, task.tokenizer.convert_tokens_to_ids("9"))
    task.tokenizer.pad_token = IMAGE
    with pytest.raises(ConfigError, match="the padding of task jsonl uses"):
        check_embedded(task, image)


def test_a_new_model_is_as_large_as_its_tokens(tmp_path):
    small = TrainConfig(model=gj.ModelConfig(vocab_size=4))
    with pytest.raises(ConfigError, match="model.vocab_size must be above .* got 4"):
        make_plan(small)
