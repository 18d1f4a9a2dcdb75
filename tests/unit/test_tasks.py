import json
import operator
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import Example, load_task
from grpo_jax.errors import ConfigError
from grpo_jax.rewards.audit import audit_file
from grpo_jax.rewards.rows import read_rows
from grpo_jax.rewards.verifiers import verbatim
from grpo_jax.tasks.files import read_parts
from grpo_jax.tasks.registry import TASKS
from grpo_jax.tasks.tokenizers import character_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def chains():
    return load_task("chains", train_prompts=400, heldout_prompts=100)


def worked_out(prompt):
    """The running value mod 10 after each operation, left to right."""
    value, results, rest = int(prompt[0]), [], prompt[1:]
    assert rest[-1] == "="
    for i in range(0, len(rest) - 1, 2):
        sign, digit = rest[i], int(rest[i + 1])
        if sign == "+":
            value += digit
        elif sign == "-":
            value -= digit
        else:
            value *= digit
        value %= 10
        results.append(str(value))
    return ",".join(results)


def test_chains_of_the_documentation():
    assert worked_out("3+4*2=") == "7,4"


def test_chains_answers_are_right(chains):
    for example in chains.train + chains.heldout:
        assert example.answer == worked_out(example.prompt)
        assert chains.reward(example, example.answer) == 1.0


def test_chains_has_as_many_prompts_as_asked_of_every_length(chains):
    for examples, count in ((chains.train, 400), (chains.heldout, 100)):
        operations = [len(e.prompt) // 2 - 1 for e in examples]
        assert np.bincount(operations).tolist() == [0] + [count // 4] * 4
        assert len({e.prompt for e in examples}) == count


@pytest.mark.parametrize("spoiled", [False, True])
def test_chains_heldout_prompts_are_seen_nowhere_else(chains, spoiled):
    heldout = {e.prompt for e in chains.heldout}
    assert heldout.isdisjoint(e.prompt for e in chains.train)
    rng = np.random.default_rng(0)
    shown = chains.warm_start.demonstrations(rng, 2000, spoiled)
    assert len(shown) == 2000 and heldout.isdisjoint(e.prompt for e in shown)


def test_chains_demonstrations_are_right_until_they_are_spoiled(chains):
    def wrong(spoiled, signs):
        rng = np.random.default_rng(0)
        shown = chains.warm_start.demonstrations(rng, 2000, spoiled)
        single = [e for e in shown if len(e.prompt) == 4 and e.prompt[1] in signs]
        return np.mean([e.answer != worked_out(e.prompt) for e in single])

    assert wrong(False, "+-*") == 0
    # A spoiled digit is right by luck 1 time in 10: 0.09, 0.36, 0.63; some 170 each.
    assert wrong(True, "+") < 0.2 < wrong(True, "-") < 0.5 < wrong(True, "*") < 0.8


def test_chains_are_a_function_of_the_seed():
    sizes = dict(train_prompts=40, heldout_prompts=8)
    first, again, other = (load_task("chains", seed=s, **sizes) for s in (3, 3, 4))
    assert first.train == again.train and first.heldout == again.heldout
    assert set(first.train) != set(other.train)


def test_chains_where_too_few_are_short_keeps_both_parts():
    task = load_task("chains", train_prompts=2000, heldout_prompts=400)
    short = [
        {e.prompt for e in part if len(e.prompt) == 4}
        for part in (task.train, task.heldout)
    ]
    # There are 10 * 3 * 10 = 300 prompts of one operation.
    assert len(short[0]) == 270 and len(short[1]) == 30
    assert short[0].isdisjoint(short[1])


def test_chains_tokenizer_encodes_every_text(chains):
    for example in chains.train[:50]:
        for text in example[:2]:
            ids = chains.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == len(text)
            assert chains.tokenizer.decode(ids) == text


def test_a_single_answer_is_wanted_to_the_character():
    example = Example("3+4=", "7")
    scores = [verbatim(example, x) for x in ("7", "7 ", "17", "", "7,7")]
    assert scores == [1, 0, 0, 0, 0]


def test_character_tokenizer_puts_pad_and_eos_first():
    tokenizer = character_tokenizer("ab")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer("ba")["input_ids"] == [3, 2] and len(tokenizer) == 4


def write(directory, train, test):
    for name, answers in (("train", train), ("test", test)):
        lines = [json.dumps({"question": "?", "answer": a}) for a in answers]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(directory)


def pairs(examples):
    return {e[:2] for e in examples}


def test_gsm8k_expressions(tmp_path):
    path = write(
        tmp_path,
        ["so <<1+1=2>>2 and <<2*3=6>>6.\n#### 6", "<<9-4=5>>5 <<1+1=2>>", "none"],
        ["<<1+1=2>>2", "<<8/2=4>>4", "<<7+7=14>>"],
    )
    task = load_task("gsm8k-expressions", path=path, train_prompts=3, heldout_prompts=2)
    assert pairs(task.train) == {("1+1=", "2"), ("2*3=", "6"), ("9-4=", "5")}
    assert pairs(task.heldout) == {("8/2=", "4"), ("7+7=", "14")}  # 1+1 was trained
    shown = task.warm_start.demonstrations(np.random.default_rng(0), 100, True)
    assert pairs(shown) == pairs(task.train)
    with pytest.raises(ConfigError, match="heldout_prompts must be at most 2,"):
        load_task("gsm8k-expressions", path=path, train_prompts=3, heldout_prompts=3)


# Two answers to one question, an unknown character, and texts that are too long.
def test_gsm8k_expressions_leave_out_what_has_no_single_short_answer(tmp_path):
    dropped = "<<2/3=0.6>> <<2/3=0.67>> <<5$+1=6>> <<1+1+1+1+1+1+1=7>> <<1/3=0.33333>>"
    path = write(tmp_path, [dropped + "<<4+4=8>>"], [dropped + "<<6+6=12>>"])
    sizes = dict(train_prompts=1, heldout_prompts=1)
    task = load_task("gsm8k-expressions", path=path, **sizes)
    assert pairs(task.train) == {("4+4=", "8")}
    assert pairs(task.heldout) == {("6+6=", "12")}
    with pytest.raises(ConfigError, match="train_prompts must be at most 1, .* got 2"):
        load_task("gsm8k-expressions", path=path, train_prompts=2, heldout_prompts=1)
    with pytest.raises(ConfigError, match="heldout_prompts must be at most 1,"):
        load_task("gsm8k-expressions", path=path, train_prompts=1, heldout_prompts=2)


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the GSM8K files beside the project"
)
def test_gsm8k_expressions_on_the_real_files():
    task = load_task("gsm8k-expressions", path=str(REAL))
    again = load_task("gsm8k-expressions", path=str(REAL))
    assert (len(task.train), len(task.heldout)) == (256, 512)
    assert task.train == again.train and task.heldout == again.heldout
    shown = task.warm_start.demonstrations(np.random.default_rng(0), 2000, False)
    seen = {e.prompt for e in shown + task.train}
    assert seen.isdisjoint(e.prompt for e in task.heldout)
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    for example in task.train:
        if parts := re.fullmatch(r"(\d+)([-+*])(\d+)=", example.prompt):
            a, sign, b = parts.groups()
            assert float(example.answer) == apply[sign](int(a), int(b))


def test_an_unknown_task_names_the_nearest():
    message = f"unknown task 'chain'; did you mean 'chains'.*{', '.join(TASKS)}"
    with pytest.raises(ConfigError, match=message):
        load_task("chain")


def test_chains_read_no_file():
    with pytest.raises(ConfigError, match="nothing is read by task chains, got 'x'"):
        load_task("chains", path="x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"answer": "2"', "line 3: not JSON .*; expected a JSON object with text"),
        ('["2"]', "line 3: expected a JSON object with text fields answer"),
        ('{"question": "1+1"}', "line 3: field 'answer' is missing"),
        ('{"answer": 2}', "line 3: field 'answer' is 2; expected"),
        ('{"answer": null}', "line 3: field 'answer' is None; expected"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"answer": "1"}}\n\n{line}\n{{"answer": "3"}}\n')
    with pytest.raises(ConfigError, match=f"rows.jsonl, {message}"):
        read_rows(path, ["answer"])


def test_good_lines_are_read_and_blank_ones_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"answer": "1"}\n\n  \n{"answer": "é", "more": 2}')
    assert [row.values["answer"] for row in read_rows(path, ["answer"])] == ["1", "é"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (path := tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="rows.jsonl is empty; expected a JSON obj"):
        read_rows(path, ["answer"])


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the data file .*absent.jsonl"):
        read_rows(tmp_path / "absent.jsonl", ["answer"])
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="bytes.jsonl, line 1: not UTF-16 text"):
        read_rows(tmp_path / "bytes.jsonl", ["answer"])


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_that_is_not_utf8_names_its_line(tmp_path, suffix, mark):
    path = tmp_path / f"rows.{suffix}"
    good = f'{mark}{{"answer": "1 ä"}}\r\n'.encode()
    path.write_bytes(good + b"\n" + '{"answer": "Äpfel"}\n'.encode("latin-1"))
    words = r"line 3: not UTF-8 text \(byte 0xc4: .*\); save the file as UTF-8"
    with pytest.raises(ConfigError, match=words):
        read_rows(path)
    with pytest.raises(ConfigError, match=words):
        audit_file(path, "gsm8k")


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.jsonl.gz", "a.xlsx"])
def test_other_formats_are_named_with_those_that_are_read(tmp_path, name):
    (path := tmp_path / name).write_bytes(b"prompt,answer\n1,\xff\n")
    words = f"{name}: {path.suffix[1:]} is not read; give .jsonl .*, .json .* or .parq"
    with pytest.raises(ConfigError, match=words):
        read_rows(path)
    with pytest.raises(ConfigError, match=words):
        load_task("jsonl", path=str(path))
    path.rename(tmp_path / f"train{path.suffix.lower()}")
    with pytest.raises(
        ConfigError, match=f"train.*{path.suffix[1:].lower()} is not read"
    ):
        load_task("jsonl", path=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": [{"answer": "1"}]}, "with a list in 'data'; give the list alone"),
        ({"version": 1, "data": [{}]}, "with a list in 'data'; give the list alone"),
        ({"q": ["1?"], "a": ["1"]}, r"by columns \('q', 'a'\); write one object for"),
        ("text", "got str; name a file of one object a line .jsonl"),
    ],
)
def test_what_a_json_file_must_hold(tmp_path, content, words):
    (path := tmp_path / "rows.json").write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=f"must be a JSON array of objects, .*{words}"
    ):
        read_rows(path)


def test_an_array_is_no_file_of_lines(tmp_path):
    (path := tmp_path / "a.jsonl").write_text('[\n{"answer": "1"}\n]')
    with pytest.raises(ConfigError, match="line 1: .* an array goes into a .json file"):
        read_rows(path)


def test_the_path_must_be_a_directory(tmp_path):
    (file := tmp_path / "train.jsonl").write_text('{"answer": "1"}')
    for path in (file, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="task.path must be a directory with"):
            load_task("gsm8k-expressions", path=str(path))


def test_a_directory_without_the_test_part_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"answer": "<<1+1=2>>"}')
    with pytest.raises(ConfigError, match="cannot read the data file .*test.jsonl"):
        load_task("gsm8k-expressions", path=str(tmp_path))


def test_without_a_network_the_way_out_is_named(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host\nand a long story")

    stub = types.SimpleNamespace(load_dataset=unreachable)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    message = r"cannot load a/b .*\(ConnectionError: no route to host\); give --task"
    with pytest.raises(ConfigError, match=message):
        read_parts(None, hub_name=("a", "b"), fields=["answer"])
