"""Rows of users: message lists, nested fields, control tokens, and errors by row."""

import dataclasses
import json

import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.runs.policies import data_fingerprint
from grpo_jax.tasks.registry import load_task
from tests.chat_forms import (
    GEMMA,
    THINKING,
    chat_tokenizer,
    chatml,
    llama,
    sums,
    write_rows,
)


def task_of(tmp_path, rows, tokenizer=None, **options):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return load_task("jsonl", path=path, tokenizer=tokenizer, **options)


def message(role, content):
    return {"role": role, "content": content}


def applied(tokenizer, turns, **arguments):
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, **arguments
    )["input_ids"]


def asked(task):
    """Token ids by prompt."""
    examples = task.train + task.heldout
    return dict(zip(examples, encode_prompts(task, examples), strict=True))


def prompt_ids(task, text):
    return next(ids for e, ids in asked(task).items() if e.prompt == text)


# ---- message lists and nested fields


@pytest.mark.parametrize("make", [chatml, llama])
def test_prompts_are_lists_of_messages(tmp_path, make):
    """In the form of verl's parquet files."""
    turns = [
        message("system", "Be brief."),
        message("user", "Hello."),
        message("assistant", "Yes?"),
        message("user", "2+2=?"),
    ]
    rows = [
        {
            "prompt": turns,
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"split": "a", "index": 3},
        },
        {
            "prompt": [message("user", [{"type": "text", "text": "3+3=?"}])],
            "reward_model": {"ground_truth": 6},
            "extra_info": {"split": "b", "index": 4},
        },
    ]
    tokenizer = make()
    task = task_of(
        tmp_path, rows, tokenizer, answer_field="reward_model.ground_truth",
        tag_fields=("extra_info.split",), system="Be kind.",
    )  # fmt: skip
    examples = {e.prompt: e for e in task.train + task.heldout}
    context = tuple((t["role"], t["content"]) for t in turns[:-1])
    assert examples["2+2=?"] == Example(
        "2+2=?", "4", "", (("extra_info.split", "a"),), context
    )
    assert examples["3+3=?"].answer == "6" and examples["3+3=?"].context == ()
    assert prompt_ids(task, "2+2=?") == applied(tokenizer, turns)
    assert prompt_ids(task, "3+3=?") == applied(
        tokenizer, [message("system", "Be kind."), message("user", "3+3=?")]
    )
    (warning,) = task.warnings
    assert warning.startswith("1 of 2 prompts have a system turn of their own")


def test_a_field_of_the_very_name_comes_first(tmp_path):
    rows = [{"prompt": f"{i}", "a.b": str(i), "a": {"b": "no"}} for i in range(4)]
    task = task_of(tmp_path, rows, answer_field="a.b")
    assert all(e.prompt == e.answer for e in task.train)


def test_rows_have_a_system_turn_in_a_field(tmp_path):
    rows = sums(6)
    for i, row in enumerate(rows):
        row["role"] = [None, "", f"You are {i}.", [message("system", "Hm.")]][i % 4]
    task = task_of(tmp_path, rows, chatml(), system_field="role")
    contexts = {e.prompt: e.context for e in task.train + task.heldout}
    assert contexts["0+1=?"] == contexts["1+1=?"] == ()
    assert contexts["2+1=?"] == (("system", "You are 2."),)
    assert contexts["3+1=?"] == (("system", "Hm."),)


def test_the_same_words_after_other_turns_are_another_prompt(tmp_path):
    rows = [
        {"prompt": [message("system", f"Add {i}."), message("user", "1")], "answer": i}
        for i in range(8)
    ]
    task = task_of(tmp_path, rows, chatml(), heldout_prompts=3)
    assert (len(task.train), len(task.heldout)) == (5, 3)
    assert len({tuple(ids) for ids in asked(task).values()}) == 8


@pytest.mark.parametrize(
    ("prompt", "more", "words"),
    [
        ([], {}, r"field 'prompt' is \[\]; expected text, or a list of messages"),
        (5, {}, "field 'prompt' is 5; expected text, or a list of messages"),
        (None, {}, "field 'prompt' is None; expected text, or a list of messages"),
        ([message("user", "a"), message("assistant", "b")], {}, "role 'assistant'; "),
        ([{"from": "human", "value": "a"}], {}, "must have role and content"),
        (["a"], {}, "a message must have role and content, got 'a'"),
        ([message("user", None)], {}, "must have role and content as text"),
        (
            [message("user", [{"type": "image", "text": "x"}])], {},
            "must have role and content as text",
        ),
        ([message("user", " \n")], {}, r"a prompt must not be empty, got ' \\n'"),
        (" ", {}, "a prompt must not be empty, got ' '"),
        ("", {}, "a prompt must not be empty, got ''"),
        ("a", {"role": 5}, "field 'role' is 5; expected text"),
        ("a", {"role": [message("user", "x")]}, "must be a system turn, got a message"),
        (
            [message("system", "x"), message("user", "a")], {"role": "y"},
            "fields 'prompt' and 'role' both have a system turn",
        ),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_asked_names_its_row(tmp_path, prompt, more, words):
    rows = [{"role": None, **row} for row in sums(9)]
    rows[4] |= {"prompt": prompt, **more}
    with pytest.raises(ConfigError, match=f"rows.jsonl, line 5: ?.*{words}"):
        task_of(tmp_path, rows, chatml(), system_field="role")


def test_what_a_template_refuses_names_the_row(tmp_path):
    names = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    gemma = chat_tokenizer(GEMMA, names, eos="<eos>", bos="<bos>")
    rows = sums(9)
    rows[3]["prompt"] = [message("system", "Be brief."), message("user", "4?")]
    task = task_of(tmp_path, rows, gemma)
    with pytest.raises(
        ConfigError, match="line 4: the chat template refuses system an"
    ):
        encode_prompts(task, task.train + task.heldout)
    task = task_of(tmp_path, rows, gemma, template="qa")
    with pytest.raises(ConfigError, match="line 4: turns before the prompt need templ"):
        encode_prompts(task, task.train + task.heldout)
    task = task_of(tmp_path, sums(9), gemma, system="Be brief.")
    with pytest.raises(ConfigError, match="^the chat template refuses system and user"):
        encode_prompts(task, task.train)


# ---- what is no text


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": f"ab{HALF}"}, r"the prompt holds half of .*\\ud83d', character 3"),
        ({"answer": HALF}, "the answer holds half of a surrogate pair"),
        ({"how": f"x{HALF}"}, "the solution holds half of a surrogate pair"),
        ({"kind": HALF}, "a tag holds half of a surrogate pair"),
        ({"role": HALF}, "a turn holds half of a surrogate pair"),
        ({"prompt": [message("user", HALF)]}, "the prompt holds half of a surrogate"),
    ],
)
def test_half_a_character_names_its_row(tmp_path, change, words):
    rows = [{**row, "how": "so", "kind": "k", "role": "r"} for row in sums(9)]
    rows[6] |= change
    fields = dict(solution_field="how", tag_fields=("kind",), system_field="role")
    with pytest.raises(ConfigError, match=f"line 7: {words}"):
        task_of(tmp_path, rows, chatml(), **fields)
    rows[6] = {**rows[5], "prompt": "whole: \U0001f600"}  # both halves are a character
    assert task_of(tmp_path, rows, chatml(), **fields).train


def test_a_task_made_in_code_refuses_half_a_character_too(tmp_path):
    task = task_of(tmp_path, sums(9), chatml())
    with pytest.raises(ConfigError, match="a prompt holds half of a surrogate pair"):
        encode_prompts(task, [Example(f"a{HALF}", "1")])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        (
            '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}",
            "nested too deep|expected text",
        ),
        (
            '{"prompt": "x", "answer": "1", "answer": "2"}',
            "'answer' stands there twice",
        ),
    ],
    ids=["open", "nested", "twice"],
)
def test_what_json_cannot_read_names_its_line(tmp_path, line, words):
    lines = [json.dumps(row) for row in sums(6)]
    lines[2] = line
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"line 3: .*({words})"):
        load_task("jsonl", path=str(path))


# ---- control tokens


def templated(i, tokenizer):
    return tokenizer.apply_chat_template(
        [message("user", f"{i}+1=?")], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("make", [chatml, llama])
@pytest.mark.parametrize("template", ["none", "chat"])
def test_names_of_control_tokens_are_spelt_out_and_counted(tmp_path, make, template):
    tokenizer, rows = make(), sums(9)
    for i in (2, 5, 6):
        rows[i]["prompt"] = templated(i, tokenizer)
    task = task_of(tmp_path, rows, tokenizer, template=template)
    (warning,) = task.warnings
    assert warning.startswith("3 of 9 prompts hold the names of control tokens")
    assert "rows.jsonl, line 3: <|" in warning
    assert "--task.control-tokens keep --task.template none" in warning
    special = set(range(6 if make is llama else 3))
    found = {tuple(i for i in ids if i in special) for ids in asked(task).values()}
    (control,) = found  # as many in a prompt with names as in one without
    assert len(control) == len([i for i in prompt_ids(task, "0+1=?") if i in special])
    shown = [tokenizer.decode(ids) for ids in asked(task).values()]
    assert sum(templated(5, tokenizer).strip() in text for text in shown) == 1


@pytest.mark.parametrize("make", [chatml, llama])
def test_control_tokens_are_kept_where_that_is_asked_for(tmp_path, make):
    """The ids are those of the chat template, with one BOS, and the turn's end ends."""
    tokenizer, rows = make(), sums(9)
    for i, row in enumerate(rows):
        row["prompt"] = templated(i, tokenizer)
    task = task_of(tmp_path, rows, tokenizer, control_tokens="keep")
    assert task.template == "none" and task.warnings == ()
    for example, ids in asked(task).items():
        text = example.prompt
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        question = text[text.index("+1=?") - 1 : text.index("+1=?") + 4]
        assert ids == applied(tokenizer, [message("user", question)])
    turn = "<|im_end|>" if make is chatml else "<|eot_id|>"
    assert tokenizer.convert_tokens_to_ids(turn) in task.stop_ids


def test_a_kept_prompt_without_a_bos_gets_the_tokenizers(tmp_path):
    tokenizer = llama()
    rows = [{"prompt": f"<|eot_id|>{i}", "answer": "1"} for i in range(9)]
    task = task_of(tmp_path, rows, tokenizer, control_tokens="keep", template="qa")
    for example, ids in asked(task).items():
        assert ids == tokenizer(f"Question: {example.prompt}\nAnswer:")["input_ids"]
        assert ids.count(0) == 1 and ids.count(5) == 1
    with pytest.raises(
        ConfigError, match="task.control_tokens must be one of spell, k"
    ):
        task_of(tmp_path, rows, tokenizer, control_tokens="Keep")


@pytest.mark.parametrize("make", [chatml, llama])
@pytest.mark.parametrize("where", ["system", "row", "assistant"])
def test_no_turn_before_the_prompt_holds_a_control_token(tmp_path, make, where):
    tokenizer, rows = make(), sums(9)
    name = "<|im_end|>" if make is chatml else "<|eot_id|>"
    bad = f" x{name}\ny "
    if where == "row":
        rows[3]["prompt"] = [message("system", bad), message("user", "z")]
    elif where == "assistant":
        rows[3]["prompt"] = [
            message("user", bad), message("assistant", bad), message("user", "z")
        ]  # fmt: skip
    else:
        rows[3]["prompt"] = "z"
    task = task_of(tmp_path, rows, tokenizer, system=bad if where == "system" else None)
    example = next(e for e in asked(task) if e.prompt == "z")
    turns = [*example.context, ("user", "z")]
    if where == "system":
        turns.insert(0, ("system", bad))
    (ids,) = encode_prompts(task, [example])
    harmless = [message(role, text.replace(name, "##")) for role, text in turns]
    special = set(tokenizer.all_special_ids) | set(range(6 if make is llama else 3))
    kept = [i for i in ids if i in special]
    assert kept == [i for i in applied(tokenizer, harmless) if i in special]
    shown = tokenizer.decode(ids)
    assert shown == tokenizer.decode(applied(tokenizer, harmless)).replace("##", name)
    assert any(name in warning for warning in task.warnings)
    keeping = dataclasses.replace(task, control_tokens="keep")
    (kept,) = encode_prompts(keeping, [example])
    assert kept == applied(tokenizer, [message(*turn) for turn in turns])


def test_a_padding_token_may_be_text(tmp_path):
    """As "!", id 0 of Llama 3's and Qwen's vocabularies."""
    for make in (chatml, llama):
        tokenizer = make(pad="!")
        rows = [{"prompt": f"{i}! Quick!!", "answer": "!"} for i in range(9)]
        task = task_of(tmp_path, rows, tokenizer)
        assert task.warnings == ()
        for example, ids in asked(task).items():
            assert ids == applied(tokenizer, [message("user", example.prompt)])
            assert example.prompt in tokenizer.decode(ids)
            assert ids.count(tokenizer.pad_token_id) == 3
        plain = dataclasses.replace(task, template="none")
        (ids,) = encode_prompts(plain, [Example("a!", "1")])
        assert tokenizer.decode(ids).endswith("a!")


# ---- template arguments


def test_arguments_reach_the_chat_template(tmp_path):
    tokenizer = chatml(THINKING)
    for given, value in (
        (("enable_thinking=false",), False), (("enable_thinking=False",), False),
        ({"enable_thinking": False}, False), (("enable_thinking=true",), True),
        ((), True),
    ):  # fmt: skip
        task = task_of(tmp_path, sums(9), tokenizer, template_arguments=given)
        ids = prompt_ids(task, "3+1=?")
        turns = [message("user", "3+1=?")]
        assert ids == applied(tokenizer, turns, enable_thinking=value)
        assert tokenizer.decode(ids).endswith("</think>\n\n") != value


@pytest.mark.parametrize(
    ("given", "template", "words"),
    [
        (
            ("enable_thinkin=false",),
            None,
            "reads no 'enable_thinkin'; it reads enable_t",
        ),
        (("messages=[]",), None, "reads no 'messages'"),
        (("enable_thinking",), None, "must be NAME=VALUE, got 'enable_thinking'"),
        (("enable_thinking=false",), "qa", "go with template chat, got template 'qa'"),
    ],
)
def test_arguments_that_nothing_reads_are_refused(tmp_path, given, template, words):
    with pytest.raises(ConfigError, match=words):
        task_of(
            tmp_path, sums(9), chatml(THINKING), template_arguments=given,
            template=template,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="reads no 'x'; it reads none"):
        task_of(tmp_path, sums(9), chatml(), template_arguments=("x=1",))


def test_the_fingerprint_of_rows_without_turns_is_that_of_older_versions(tmp_path):
    import hashlib

    task = task_of(tmp_path, sums(9), chatml())
    rows = [[[e.prompt, e.answer, e.solution, []] for e in p]
            for p in (task.train, task.heldout)]  # fmt: skip
    vocabulary = sorted(task.tokenizer.get_vocab().items())
    text = json.dumps([*rows, "chat", None, [2], vocabulary])
    expected = hashlib.sha256(text.encode()).hexdigest()[:20]
    assert data_fingerprint(task) == expected


@pytest.mark.parametrize("base", ["_2", "_{12}"])
def test_a_base_after_the_box_leaves_the_fingerprint_as_it_was(tmp_path, base):
    task = task_of(tmp_path, sums(6))
    first, *rest = task.train

    def fingerprint(answer, solution):
        example = first._replace(answer=answer, solution=solution)
        return data_fingerprint(dataclasses.replace(task, train=[example, *rest]))

    after, inside = rf"\boxed{{110}}{base}", rf"\boxed{{110{base}}}"
    assert fingerprint(f"110{base}", after) == fingerprint("110", after)
    assert fingerprint(f"110{base}", inside) != fingerprint("110", inside)
