"""Files in the forms of other trainers, made up: `tests/data/rollouts/`."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.tasks.stripped import restore_prompts
from tests.chat_forms import GEMMA, LLAMA_NAMES, chat_tokenizer, chatml, llama
from tests.chat_forms import write_rows as written

DATA = Path(__file__).parents[1] / "data" / "rollouts"
PROMPTS = ["What is 2+2?", "What is 3+5?"]
ANSWERS = [
    ["2+2 is \\boxed{4}", "4", "\\boxed{5}", "It is five."],
    ["\\boxed{8}", "eight", "8", "\\boxed{9}"],
]
RIGHT = np.array([[1, 1, 0, 0], [1, 0, 1, 0]])
FORMAT = np.array([[1, 0, 1, 0], [1, 0, 0, 1]])


def chat(question, system=None):
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns += [{"role": "user", "content": question}]
    return chatml().apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )


def texts(rollouts):
    """([P] prompts, [P][G] completions) as text with control tokens."""
    decode, (p, g, _) = chatml().decode, rollouts.completions.shape
    ids, mask = np.asarray(rollouts.prompts), np.asarray(rollouts.prompt_mask) > 0
    prompts = [decode(ids[i][mask[i]]) for i in range(p)]
    ids = np.asarray(rollouts.completions)
    mask = np.asarray(rollouts.completion_mask) > 0
    return prompts, [
        [decode(ids[i, j][mask[i, j]]) for j in range(g)] for i in range(p)
    ]


def ended():
    return [[text + "<|im_end|>" for text in group] for group in ANSWERS]


def test_trl():
    with pytest.warns(UserWarning, match="no linear function"):  # its weights: 1, .2
        steps = dict(gj.Rollouts.by_step(DATA / "trl", chatml(), form="trl"))
    assert list(steps) == [1, 2]
    prompts, completions = texts(steps[1])
    assert prompts == [chat(question) for question in PROMPTS]
    assert completions == ended()
    np.testing.assert_allclose(steps[1].rewards, RIGHT + FORMAT)
    without = FORMAT * [[1], [0]]  # NaN in step 2: the function gave none
    np.testing.assert_allclose(steps[2].rewards, RIGHT + without)
    assert np.isnan(steps[1].behaviour_logprobs[0, 0, 0])


def test_trl_with_the_trainer_s_weights():
    weights = {"accuracy_reward": 1.0, "format_reward": 0.2}
    form = dataclasses.replace(gj.ROW_FORMS["trl"], rewards=weights)
    path = DATA / "trl" / "completions_00001.parquet"
    rollouts = gj.Rollouts.from_parquet(path, chatml(), form=form)
    np.testing.assert_allclose(rollouts.rewards, RIGHT + 0.2 * FORMAT, rtol=1e-6)
    form = dataclasses.replace(form, rewards=weights | {"format_reward": -2.0})
    with pytest.warns(UserWarning, match="row 1: within its group the file's advant"):
        gj.Rollouts.from_parquet(path, chatml(), form=form)


def test_verl():
    path = DATA / "verl"
    steps = [step for step, _ in gj.Rollouts.by_step(path, chatml(), form="verl")]
    assert steps == [1, 2, 10]
    rollouts = gj.Rollouts.from_jsonl(path, chatml(), form="verl", step=10)
    prompts, completions = texts(rollouts)
    assert prompts == [chat(question, "Answer in a box.") for question in PROMPTS]
    assert completions == ended()
    np.testing.assert_array_equal(rollouts.rewards, 1 - RIGHT)


def test_prime_rl_in_messages():
    path = DATA / "prime-rl" / "step_1" / "train_rollouts.jsonl"
    ((step, rollouts),) = gj.Rollouts.by_step(path, chatml(), form="prime-rl")
    prompts, completions = texts(rollouts)
    expected = ended()
    for group in expected:
        group[3] = group[3].removesuffix("<|im_end|>")  # is_truncated
    assert step == 1 and prompts == [chat(question) for question in PROMPTS]
    assert completions == expected
    np.testing.assert_array_equal(rollouts.rewards, RIGHT)


# Lines of a trace each, and of an episode with a judge's trace beside; what the tool
# wrote is read, and is in no loss.
def test_prime_rl_in_traces():
    path = DATA / "prime-rl"
    steps = dict(gj.Rollouts.by_step(path, chatml(), form="prime-rl", pad_to=1))
    rollouts = steps[2]
    prompts, completions = texts(rollouts)
    assert prompts == [chat(question) for question in PROMPTS]
    assert completions == [
        ["sum<|im_end|>4<|im_end|>", "sum<|im_end|>no<|im_end|>"] for _ in range(2)
    ]
    np.testing.assert_allclose(rollouts.rewards, [[1.1, 0.1]] * 2, rtol=1e-6)
    whole = chatml().decode(np.asarray(rollouts.completions)[1, 0])
    assert "<|im_start|>tool\n8<|im_end|>\n<|im_start|>assistant\n4" in whole
    sampled = np.asarray(rollouts.completion_mask)[1, 0]
    logprobs = np.asarray(rollouts.behaviour_logprobs)[1, 0]
    np.testing.assert_array_equal(logprobs[sampled > 0], [-0.5] * 4 + [-0.25] * 2)
    assert not logprobs[sampled == 0].any()


def trace(**changes):
    path = DATA / "prime-rl" / "step_2" / "train" / "effective" / "traces.jsonl"
    made = json.loads(path.read_text().splitlines()[0])
    return made | changes


def test_a_trace_without_tokens_is_its_messages():
    with_tokens, without = trace(), trace()
    for node in without["nodes"]:
        node |= {"token_ids": [], "mask": [], "logprobs": []}
    given = [[x, x | {"rewards": {"r": 0.0}}] for x in (with_tokens, without)]
    a, b = (gj.Rollouts.from_rows(x, chatml(), form="prime-rl") for x in given)
    np.testing.assert_array_equal(a.prompts, b.prompts)
    np.testing.assert_array_equal(a.completions, b.completions)
    np.testing.assert_array_equal(a.completion_mask, b.completion_mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["nodes"].append(t["nodes"][3]), "the trace has 2 branches"),
        (lambda t: t["nodes"][1]["logprobs"].pop(), "5 logprobs for 6 sampled tokens"),
        (
            lambda t: t["nodes"][1]["mask"].pop(),
            "entries of mask; they must be as many",
        ),
        (lambda t: t.update(nodes=3), "expected a trace with a list of nodes"),
        (lambda t: t.update(rewards=3), "field 'rewards' must be an object"),
    ],
)
def test_a_wrong_trace_is_named(change, message):
    bad = trace()
    change(bad)
    with pytest.raises(ConfigError, match=f"row 1: .*{message}"):
        gj.Rollouts.from_rows([trace(), bad], chatml(), form="prime-rl")


# Of a run: prompts as they were asked, completions without their EOS.
def test_samples_of_a_run_are_read_in_the_template_of_its_task(tmp_path):
    row = {"step": 4, "prompt": "1+1=", "answer": "2", "completions": ["2", "3"]}
    path = written(tmp_path / "samples.jsonl", [row | {"rewards": [1.0, None]}] * 2)
    form = dataclasses.replace(gj.ROW_FORMS["samples"], template="chat")
    rollouts = gj.Rollouts.from_jsonl(path, chatml(), form=form)
    prompts, completions = texts(rollouts)
    assert prompts == [chat("1+1=")]
    assert completions == [["2<|im_end|>", "3<|im_end|>"] * 2]
    np.testing.assert_array_equal(rollouts.rewards, [[1, np.nan, 1, np.nan]])


# ---- prompts without their control tokens


@pytest.mark.parametrize(
    "tokenizer",
    [
        chatml(),
        llama(),
        chat_tokenizer(
            GEMMA,
            ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
            eos="<eos>",
            bos="<bos>",
        ),
    ],
    ids=["chatml", "llama", "gemma"],
)
def test_a_prompt_gets_its_control_tokens_back(tokenizer):
    asked = ["What?", "a\nuser\nb", "x = {1, 2} \\frac{3}{4} (.*)?"]
    conversations = [[{"role": "user", "content": text}] for text in asked]
    if "raise_exception" not in tokenizer.chat_template:
        system = {"role": "system", "content": "Be brief."}
        conversations += [[system, *turns] for turns in conversations]
    rendered = tokenizer.apply_chat_template(
        conversations, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    bare = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert all(x != y for x, y in zip(rendered, bare, strict=True))
    assert restore_prompts(tokenizer, bare) == ids


def test_other_texts_have_none_to_get_back():
    assert restore_prompts(chatml(), ["What?", "user\nWhat?"]) == [None, None]
    plain = chat_tokenizer(None, LLAMA_NAMES, eos="<|eot_id|>")
    assert restore_prompts(plain, ["user\nWhat?\nassistant\n"]) == [None]


def test_prompts_that_are_no_chat_are_taken_as_they_are():
    given = [dict(input="1+1=", output=str(g), score=g) for g in (1, 2)]
    prompts, completions = texts(gj.Rollouts.from_rows(given, chatml(), form="verl"))
    assert prompts == ["1+1="] and completions == [["1<|im_end|>", "2<|im_end|>"]]
    whole = [x | {"input": chat("1+1=")} for x in given]
    assert texts(gj.Rollouts.from_rows(whole, chatml(), form="verl"))[0] == [
        chat("1+1=")
    ]
    mixed = [x | {"input": "user\n1+1=\nassistant\n"} for x in given] + given
    with pytest.raises(ConfigError, match="row 2: the prompt '1\\+1=' has no control"):
        gj.Rollouts.from_rows(mixed, chatml(), form="verl")


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="parquet needs pyarrow.*pip install"):
        gj.Rollouts.from_parquet(DATA / "trl", chatml(), form="trl")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="must be named .parquet"):
        gj.Rollouts.from_parquet(DATA / "verl" / "1.jsonl", chatml())


def test_leaves_are_on_the_device():
    rollouts = gj.Rollouts.from_jsonl(DATA / "verl" / "1.jsonl", chatml(), form="verl")
    assert all(isinstance(x, jax.Array) for x in rollouts if x is not None)
