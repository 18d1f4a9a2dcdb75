"""Which tokens end a completion, by the conventions of model families."""

import json

import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.models.hub import load_tokenizer
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.runs.config import TaskConfig
from grpo_jax.runs.policies import task_of, with_stop_tokens
from grpo_jax.tasks.ends import (
    completion_ends,
    named_tokens,
    stop_token_ids,
    turn_end,
    turn_end_warnings,
)
from grpo_jax.tasks.registry import load_task
from grpo_jax.tasks.templates import CHATML
from tests.chat_forms import (
    GEMMA,
    GLM,
    LLAMA_NAMES,
    MISTRAL,
    PHI,
    THINKING,
    chat_tokenizer,
    chatml,
    llama,
    sums,
    write_rows,
)

GEMMA_NAMES = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
PHI_NAMES = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
# Tokenizer -> (token that ends a turn, ends by default).
FAMILIES = {
    "chatml": (chatml, "<|im_end|>", ["<|im_end|>"]),
    "chatml, base's EOS": (
        lambda: chatml(eos="<|endoftext|>"), "<|im_end|>",
        ["<|endoftext|>", "<|im_end|>"],
    ),
    "thinking": (lambda: chatml(THINKING), "<|im_end|>", ["<|im_end|>"]),
    "llama": (llama, "<|eot_id|>", ["<|end_of_text|>", "<|eot_id|>"]),
    "gemma": (
        lambda: chat_tokenizer(GEMMA, GEMMA_NAMES, eos="<eos>", bos="<bos>"),
        "<end_of_turn>", ["<eos>", "<end_of_turn>"],
    ),
    "gemma, its names not special": (
        lambda: chat_tokenizer(
            GEMMA, GEMMA_NAMES, eos="<eos>", bos="<bos>", special=False
        ),
        "<end_of_turn>", ["<eos>", "<end_of_turn>"],
    ),
    "mistral": (
        lambda: chat_tokenizer(MISTRAL, ["<s>", "</s>"], eos="</s>", bos="<s>"),
        "</s>", ["</s>"],
    ),
    "phi": (
        lambda: chat_tokenizer(PHI, PHI_NAMES, eos="<|endoftext|>"),
        "<|end|>", ["<|endoftext|>", "<|end|>"],
    ),
    "glm": (
        lambda: chat_tokenizer(GLM, PHI_NAMES, eos="<|endoftext|>"),
        None, ["<|endoftext|>"],
    ),
    "base": (
        lambda: chat_tokenizer(None, ["<|endoftext|>"], eos="<|endoftext|>"),
        None, ["<|endoftext|>"],
    ),
    "prompts only": (
        lambda: chatml(
            CHATML.replace(
                "{% for",
                "{% if messages[-1]['role'] == 'assistant' %}"
                "{{ raise_exception('no') }}{% endif %}{% for",
                1,
            ),
            eos="<|endoftext|>",
        ),
        None, ["<|endoftext|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_and_the_tokenizers_eos_end_a_completion(family, tmp_path):
    make, turn, ends = FAMILIES[family]
    tokenizer = make()
    ids = tokenizer.convert_tokens_to_ids
    assert turn_end(tokenizer) == (None if turn is None else ids(turn))
    assert completion_ends(tokenizer) == tuple(ids(ends))
    path = write_rows(tmp_path / "rows.jsonl", sums())
    task = load_task("jsonl", path=path, tokenizer=tokenizer)
    assert task.ends == tuple(ids(ends))
    assert load_task("jsonl", path=path, tokenizer=tokenizer, eos_ids=[3]).ends == (3,)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_that_ends_with_text_alone_is_a_warning(family, tmp_path):
    make, turn, ends = FAMILIES[family]
    path = write_rows(tmp_path / "rows.jsonl", sums())
    task = load_task("jsonl", path=path, tokenizer=make())
    said = [w for w in task.warnings if "no token of its own" in w]
    assert len(said) == (task.template == "chat" and turn is None)
    for warning in said:
        assert f"only at {ends[0]} (" in warning and "stop_tokens" in warning
    named = load_task("jsonl", path=path, tokenizer=make(), eos_ids=[3])
    assert not turn_end_warnings(named.tokenizer, named.ends, named.template)


def test_a_template_that_is_no_jinja_is_named(tmp_path):
    tokenizer = chatml("{% for m in messages %}{{ m.content }", eos="<|endoftext|>")
    path = write_rows(tmp_path / "rows.jsonl", sums())
    task = load_task("jsonl", path=path, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="the chat template has a syntax error in it"):
        encode_prompts(task, task.train)
    tokenizer.save_pretrained(tmp_path / "model")
    for arguments in ((), ("a=1",)):
        with pytest.raises(ConfigError, match="model/chat_template.jinja has a syntax"):
            read = load_tokenizer(tmp_path / "model")
            task = load_task(
                "jsonl", path=path, tokenizer=read, template_arguments=arguments
            )
            encode_prompts(task, task.train)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (0, 2, (0, 1, 5)),
        ([1, 4, 5], 0, (1, 4, 5)),  # as Llama 3's: eom_id is nobody else's
        (None, 4, (4, 1, 5)),
        (None, None, (1, 5)),
    ],
)
@pytest.mark.parametrize("template", [None, "qa", "none"])
def test_ends_of_a_model_directory_are_a_union(
    tmp_path, generation, config, ends, template
):
    tokenizer = llama()
    assert tokenizer.convert_ids_to_tokens(list(range(6))) == LLAMA_NAMES
    tokenizer.save_pretrained(tmp_path)
    for name, value in (("generation_config", generation), ("config", config)):
        if value is not None or name == "config":
            text = json.dumps({"eos_token_id": value})
            (tmp_path / f"{name}.json").write_text(text)
    path = write_rows(tmp_path / "rows.jsonl", sums())
    task = task_of(TaskConfig(name="jsonl", path=path, template=template), tmp_path)
    assert task.ends == ends


def test_stop_tokens_are_added_by_name(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", sums())
    task = load_task("jsonl", path=path, tokenizer=llama())
    assert with_stop_tokens(task, ()) is task
    more = with_stop_tokens(task, ("<|eom_id|>", "\n", "<|eot_id|>"))
    newline = task.tokenizer.convert_tokens_to_ids("Ċ")
    assert more.ends == (1, 5, 4, newline)
    assert named_tokens(more.tokenizer, more.ends) == (
        f"<|end_of_text|> (1), <|eot_id|> (5), <|eom_id|> (4), '\\n' ({newline})"
    )
    assert named_tokens(more.tokenizer, [9999]) == (
        "a token outside the vocabulary (9999)"
    )
    for name, count in (("</s>", 4), ("<|eot|>", 7), ("128009", 6), ("", 0)):
        with pytest.raises(ConfigError, match=f"tokens of the vocabulary.*{count} tok"):
            stop_token_ids(task.tokenizer, [name])


def test_one_right_completion_has_one_end():
    task = load_task("chains", heldout_prompts=4)
    assert task.ends == (task.tokenizer.eos_token_id,)
    with pytest.raises(ConfigError, match="stop_tokens do not go with task chains"):
        with_stop_tokens(task, ("<pad>",))
