"""Tasks whose completions are free text: GSM8K, MATH, countdown, your own rows."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import load_task, next_token_logits
from grpo_jax.errors import ConfigError
from grpo_jax.rewards.scoring import score
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import VERIFIERS, countdown_numbers
from grpo_jax.rollouts.encoding import (
    answer_rollouts,
    decode_groups,
    encode_imitated,
    encode_prompts,
    pad_left,
)
from grpo_jax.tasks.registry import TASKS
from grpo_jax.tasks.tokenizers import character_tokenizer, spellings, train_tokenizer
from grpo_jax.tasks.types import Task
from tests.helpers import tiny_policy
from tests.unit.test_templates import build

DATA = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(
    not (DATA / "math").is_dir(),
    reason="needs the GSM8K and MATH files in ../shared/data",
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def worked(a, b):
    """A row of GSM8K's form."""
    text = f"It is {a}+{b} = <<{a}+{b}={a + b}>>{a + b} in all.\n#### {a + b:,}"
    return {"question": f"How much are {a} and {b}?", "answer": text}


@pytest.fixture
def gsm8k(tmp_path):
    write(tmp_path / "train.jsonl", [worked(a, 900 + a) for a in range(60)])
    write(tmp_path / "test.jsonl", [worked(a, 999) for a in range(20)])
    return tmp_path


def test_gsm8k_rows(gsm8k):
    task = load_task("gsm8k", path=str(gsm8k))
    assert (len(task.train), len(task.heldout)) == (60, 20)
    assert task.train[59] == Example(
        "How much are 59 and 959?", "1018", "It is 59+959 = 1018 in all.\n#### 1018"
    )
    assert task.reward == (Reward(name="gsm8k"),)
    assert task.template == "chat" and not task.single_answer
    (ids,) = encode_prompts(task, task.train[:1])
    assert task.tokenizer.decode(ids) == (
        "<|im_start|>user\nHow much are 0 and 900?<|im_end|>\n<|im_start|>assistant\n"
    )
    shown = task.warm_start.demonstrations(np.random.default_rng(0), 500, False)
    assert set(shown) <= set(task.train)


def test_a_prompt_in_both_parts_is_evaluated_only(gsm8k):
    rows = [worked(7, 999), worked(1, 2), worked(8, 999)]
    rows[0]["question"] = "How much are 7 and 999?\n"
    write(gsm8k / "train.jsonl", rows)
    task = load_task("gsm8k", path=str(gsm8k))
    assert [e.answer for e in task.train] == ["3"] and len(task.heldout) == 20
    assert "2 training rows are held-out prompts and were left out" in task.note
    assert "2 training rows are held-out prompts and were left out." in task.warnings


def own(tmp_path, train, test, **options):
    """Task jsonl on prompts, all with the answer 1."""
    for name, prompts in (("train", train), ("test", test)):
        write(tmp_path / f"{name}.jsonl", [dict(prompt=p, answer=1) for p in prompts])
    return load_task("jsonl", path=str(tmp_path), heldout_prompts=0, **options)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("1 2\n3 4?", "1 2 3 4?"),  # a grid's rows
        ("1  2?", "1 2?"),
        ("if a:\n  b", "if a:\n    b"),  # a program's blocks
        ("a\n\nb?", "a\nb?"),
        ("  x\nx?", "x\nx?"),
        ("X X  X", "X  X X"),
        ("a\tb?", "a b?"),
        ("Same  question?", "Same question?"),
        ("Same question?", "same question?"),
        ("the  same", "the same"),
        (" a?", "a?"),
        ("a \nb?", "a\nb?"),
    ],
)
def test_prompts_that_differ_in_lines_or_spaces_are_different(tmp_path, train, test):
    task = own(tmp_path, [train, "other?"], [test])
    assert (len(task.train), len(task.heldout), task.note) == (2, 1, "")


@pytest.mark.parametrize(
    "train",
    [
        *("How many\nare it?\r\n", "How many\r\nare it? ", "How many\nare it?\r"),
        *("\n\r\nHow many\nare it?", "How many\nare it?\t \n\xa0"),
    ],
)
def test_ends_of_lines_and_of_prompts_tell_nothing_apart(tmp_path, train):
    task = own(tmp_path, [train, "other?"], ["How many\nare it?"])
    assert len(task.train) == 1 and "1 training rows are held-out" in task.note


def test_what_repeats_in_the_heldout_part_is_counted(tmp_path):
    task = own(tmp_path, ["a?"], ["b?", "b?\n", "c?"])
    assert len(task.heldout) == 2
    assert task.note == "1 held-out rows repeat a prompt and were left out."
    assert task.warnings == (task.note,)


def test_of_heldout_rows_that_repeat_a_prompt_the_first_is_kept(tmp_path):
    task = own(tmp_path, ["a?"], ["b?\r\n", "b?", "c?", "b? "])
    assert [e.prompt for e in task.heldout] == ["b?\r\n", "c?"]


def test_thinking_reads_answers_after_it_only(gsm8k):
    task = load_task("gsm8k", path=str(gsm8k), thinking=True)
    assert task.reward == (Reward(name="gsm8k", options=(("thinking", 1.0),)),)
    task = load_task(
        "gsm8k", path=str(gsm8k), thinking=True, rewards=("math", "boxed_format=0.1")
    )
    assert task.reward == (
        Reward(name="math", options=(("thinking", 1.0),)),
        Reward(name="boxed_format", weight=0.1),
    )
    example, completions = Example("", "5"), ["<think>\\boxed{5}"]
    completions += [
        f"{c}</think> so \\boxed{{{n}}}" for c in completions for n in (5, 6)
    ]
    completions += ["\\boxed{5}</think> so 5"]
    assert score(task.reward[:1], [example], [completions]).rewards.tolist() == [
        [0, 1, 0, 0]
    ]
    plain = (Reward(name="math"),)
    assert score(plain, [example], [completions]).rewards.tolist() == [[1, 1, 0, 1]]
    with pytest.raises(ConfigError, match="task.thinking is for rewards that read an"):
        load_task("gsm8k", path=str(gsm8k), thinking=True, rewards=("boxed_format",))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_files_as_windows_writes_them(tmp_path, encoding, suffix):
    rows = [{"prompt": f"caf\u00e9 {i}?", "answer": i} for i in range(12)]
    text = json.dumps(rows, ensure_ascii=False)
    if suffix == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path / f"rows.{suffix}"
    path.write_text(text, encoding=encoding, newline="\r\n")
    task = load_task("jsonl", path=str(path), heldout_prompts=2)
    assert {e.prompt for e in task.train + task.heldout} == {r["prompt"] for r in rows}


def test_files_joined_end_to_end_keep_their_marks_to_themselves(tmp_path):
    row = json.dumps({"prompt": "1?", "answer": 1})
    one = ("\ufeff" + row + "\n").encode()
    (tmp_path / "rows.jsonl").write_bytes(one + one.replace(b"1?", b"2?"))
    assert len(load_task("jsonl", path=str(tmp_path / "rows.jsonl")).train) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [("1,5", r"train\[1\] of the task: reward gsm8k .*got '1,5'")],
)
def test_golds_of_a_task_made_in_code_are_checked(answer, message):
    tokenizer = character_tokenizer("ab")
    train = [Example("a", "1"), Example("b", answer)]
    for reward in ((Reward(name="boxed_format"),), lambda e, c: 0.0):
        Task(name="x", train=train, heldout=[], tokenizer=tokenizer, reward=reward)
    with pytest.raises(ConfigError, match=message):
        Task(
            name="x",
            train=train,
            heldout=[],
            tokenizer=tokenizer,
            reward=(Reward(name="gsm8k"),),
        )


def test_sizes_are_chosen_by_seed(gsm8k):
    def load(seed=0, **sizes):
        return load_task("gsm8k", path=str(gsm8k), seed=seed, **sizes)

    first, again, other = (
        load(s, train_prompts=10, heldout_prompts=5) for s in (1, 1, 2)
    )
    assert first.train == again.train and first.heldout == again.heldout
    assert set(first.train) != set(other.train)
    assert len(first.train) == 10 and len(first.heldout) == 5
    shown = first.warm_start.demonstrations(np.random.default_rng(0), 500, False)
    assert set(shown) == set(first.train)  # of the trained prompts only
    with pytest.raises(ConfigError, match="train_prompts must be at most 60, .* got 6"):
        load(train_prompts=61)
    with pytest.raises(ConfigError, match="heldout_prompts must be at most 20,"):
        load(heldout_prompts=21)


def test_one_file_is_split_by_seed(tmp_path):
    path = write(tmp_path / "all.jsonl", [worked(a % 90, 5) for a in range(100)])
    task = load_task("gsm8k", path=path, seed=3)
    assert len(task.heldout) == 9  # a tenth of 90 different prompts
    assert {e.prompt for e in task.heldout}.isdisjoint(e.prompt for e in task.train)
    assert "9 of 90 prompts were held out, chosen by task.seed 3." in task.note
    assert load_task("gsm8k", path=path, seed=4).heldout != task.heldout
    with pytest.raises(ConfigError, match="heldout_prompts must be below 90, the pro"):
        load_task("gsm8k", path=path, heldout_prompts=90)


def test_a_heldout_file_takes_the_place_of_the_test_part(gsm8k):
    file = write(gsm8k / "mine.jsonl", [worked(1, 1)])
    for path in (gsm8k, gsm8k / "train.jsonl"):
        task = load_task("gsm8k", path=str(path), heldout_path=file)
        assert [e.answer for e in task.heldout] == ["2"] and len(task.train) == 60
    with pytest.raises(ConfigError, match="task.heldout_path must be a file, got .*x"):
        load_task("gsm8k", path=str(gsm8k), heldout_path="x")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("It is 4.", "line 2: field 'answer' has no '#### number' at its end; corr"),
        ("#### four", "line 2: no completion could satisfy reward gsm8k: it ends on"),
        ("4 ####", "line 2: no completion could satisfy reward gsm8k: it ends on"),
    ],
)
def test_a_gold_without_a_number_is_named(gsm8k, answer, message):
    rows = [worked(1, 2), {"question": "2+2?", "answer": answer}]
    write(gsm8k / "train.jsonl", rows)
    with pytest.raises(ConfigError, match=f"train.jsonl, {message}"):
        load_task("gsm8k", path=str(gsm8k))


def problem(i, level=1, subject="Algebra", **more):
    values = {"problem": f"Problem {i}?", "solution": f"So $\\boxed{{{i}}}$."}
    return values | {"level": f"Level {level}", "type": subject} | more


def test_math_by_level_and_subject(tmp_path):
    train = [
        problem(i, level, subject)
        for i, (level, subject) in enumerate(
            [(1, "Algebra"), (2, "Algebra"), (3, "Geometry"), ("?", "Geometry")] * 3
        )
    ]
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "test.jsonl", [problem(100), problem(101, 3, "Geometry")])
    path = str(tmp_path)
    task = load_task("math", path=path)
    assert len(task.train) == 12 and len(task.heldout) == 2
    assert task.train[1] == Example(
        "Problem 1?", "1", "So $\\boxed{1}$.", (("level", "2"), ("subject", "Algebra"))
    )
    assert task.reward == (Reward(name="math"),)
    some = load_task("math", path=path, levels=(3, "1"))
    assert {dict(e.tags)["level"] for e in some.train} == {"1", "3"}
    some = load_task("math", path=path, levels=(1,), subjects=("Algebra",))
    assert len(some.train) == 3 and [e.answer for e in some.heldout] == ["100"]
    with pytest.raises(ConfigError, match="task.levels must be among 1, 2, 3, .*got 6"):
        load_task("math", path=path, levels=(6,))
    with pytest.raises(ConfigError, match="task.subjects must be among Alg.*, got Art"):
        load_task("math", path=path, subjects=("Art",))
    # AIME, AMC: the answer a number.
    numbers = [problem(7, answer=204, solution="see below"), problem(8, answer=142.0)]
    file = write(tmp_path / "amc.jsonl", numbers)
    found = load_task("math", path=path, heldout_path=file).heldout
    assert [VERIFIERS["math"](e, r"\boxed{142}") for e in found] == [0, 1]
    # MATH-500: the answer in a field, the level a number; kept whatever is trained on.
    row = {"problem": "x?", "solution": "y", "answer": r"\frac{1}{2}", "level": 5}
    row |= {"subject": "Precalculus", "unique_id": "test/1"}
    file = write(tmp_path / "math500.jsonl", [row])
    (found,) = load_task("math", path=path, heldout_path=file, levels=(1,)).heldout
    assert found.answer == r"\frac{1}{2}"
    assert found.tags == (("level", "5"), ("subject", "Precalculus"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (problem(1, solution="I do not know."), "there is no answer, neither a field"),
        (problem(1, solution=r"so \boxed{1"), "there is no answer, neither a field"),
        (problem(1, answer=""), "no completion could satisfy reward math: it is empty"),
        (problem(1, answer="{1"), "no completion could satisfy reward math: its brac"),
        (problem(1, solution=None), "field 'solution' is None; expected a JSON obj"),
    ],
)
def test_a_problem_without_an_answer_is_named(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [problem(0), row])
    with pytest.raises(ConfigError, match=f"rows.jsonl, line 2: {message}"):
        load_task("math", path=path)


def test_math_reads_no_data_set_of_its_own():
    with pytest.raises(ConfigError, match="task.path must be a directory with MATH's"):
        load_task("math")


@pytest.fixture(scope="module")
def countdown():
    return load_task("countdown", train_prompts=300, heldout_prompts=50)


def test_countdown_solutions_solve_their_puzzles(countdown):
    seen = set()
    for example in countdown.train + countdown.heldout:
        assert VERIFIERS["countdown"](example, example.solution) == 1
        target, numbers = countdown_numbers(example.answer)
        assert 1 <= target <= 100 and all(1 <= n <= 30 for n in numbers)
        assert dict(example.tags) == {"numbers": str(len(numbers))}
        assert str(target) in example.prompt
        seen.add((target, *sorted(numbers)))
    assert len(seen) == 350  # no puzzle twice, under any order of its numbers
    counts = Counter(dict(e.tags)["numbers"] for e in countdown.train)
    assert min(counts["3"], counts["4"]) > 75 and sum(counts.values()) == 300
    signs = "".join(e.solution for e in countdown.train)
    assert all(signs.count(sign) > 30 for sign in "+-*/(")


def test_countdown_is_a_function_of_the_seed(countdown):
    sizes = dict(train_prompts=300, heldout_prompts=50)
    again, other = (load_task("countdown", seed=s, **sizes) for s in (0, 1))
    assert countdown.train == again.train and countdown.heldout == again.heldout
    assert set(countdown.train) != set(other.train)
    with pytest.raises(ConfigError, match="must be at most 100000 together, got 99999"):
        load_task("countdown", train_prompts=99_999, heldout_prompts=2)


def test_your_own_rows(tmp_path):
    rows = [
        {"q": f"{i}?", "a": i, "how": f"It is {i}.", "kind": i % 2, "more": [1]}
        for i in range(30)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    fields = dict(prompt_field="q", answer_field="a", solution_field="how")
    task = load_task(
        "jsonl", path=path, **fields, tag_fields=("kind",), heldout_prompts=4,
        rewards=("gsm8k", "tests.helpers:some_reward=0.5"),
    )  # fmt: skip
    assert len(task.train) == 26 and len(task.heldout) == 4
    assert task.train[0] in [
        Example(f"{i}?", str(i), f"It is {i}.", (("kind", str(i % 2)),))
        for i in range(30)
    ]
    assert task.reward == (
        Reward(name="gsm8k"),
        Reward(name="tests.helpers:some_reward", weight=0.5),
    )
    with pytest.raises(ConfigError, match="unknown reward 'gsm8'; did you mean 'gsm8k"):
        load_task("jsonl", path=path, **fields, rewards=("gsm8",))
    with pytest.raises(ConfigError, match="line 1: field 'prompt' is missing; expec"):
        load_task("jsonl", path=path)
    with pytest.raises(ConfigError, match="line 1: field 'more' is .1.; expected text"):
        load_task("jsonl", path=path, **fields, tag_fields=("more",))


def test_without_a_solution_the_answer_is_imitated(tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    task = load_task("jsonl", path=write(tmp_path / "x.jsonl", rows), template="none")
    (ids,) = encode_imitated(task, [Example("1+1=", "2")])
    assert ids == [*task.tokenizer("2")["input_ids"], 1]
    assert task.reward == (Reward(name="exact"),)


def test_arrays_and_parquet_are_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", rows)
    tasks = [
        load_task("jsonl", path=str(tmp_path / f"rows.{suffix}"))
        for suffix in ("jsonl", "json", "parquet")
    ]
    assert len(tasks[0].train) == 18
    for task in tasks:
        assert task.train == tasks[0].train and task.heldout == tasks[0].heldout
    for name, content, message in (
        (
            "a.json",
            '{"prompt": "x"}',
            "a.json must be a JSON array of objects, got dict",
        ),
        ("b.json", "[1,]", "b.json, line 1: not JSON .*; expected an array"),
        ("c.json", "[1]", "c.json, row 1: expected a JSON object"),
        ("d.parquet", "x", "cannot read the data file .*d.parquet"),
        ("e.json", "[]", "e.json is empty; expected a JSON object"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_task("jsonl", path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "task.path must name the data: a file, a directory or a data set"),
        ("absent.jsonl", "task.path must be a file or a directory .*, which is not th"),
        ("owner/absent", "cannot load owner/absent through `datasets`"),
        ("owner/absent:main", "cannot load owner/absent/main through `datasets`"),
    ],
)
def test_data_that_is_not_there(path, message):
    with pytest.raises(ConfigError, match=message):
        load_task("jsonl", path=path)


@pytest.mark.parametrize(
    ("task", "option", "value"),
    [
        ("chains", "rewards", ("exact",)),
        ("chains", "vocab_size", 512),
        ("chains", "heldout_path", "x"),
        ("chains", "thinking", True),
        ("gsm8k", "levels", (3,)),
        ("gsm8k", "prompt_field", "q"),
        ("math", "solution_field", "q"),
        ("countdown", "subjects", ("Algebra",)),
        ("math", "skills", ("add",)),
        ("gsm8k-expressions", "rewards", ("exact",)),
        ("jsonl", "levels", (1,)),
    ],
)
def test_an_option_that_a_task_does_not_honour_is_refused(task, option, value):
    with pytest.raises(
        ConfigError, match=f"task.{option} changes nothing for task {task},"
    ):
        load_task(task, **{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eos_ids=(3,)), r"task.eos_ids go with a tokenizer, got \(3,\) and none"),
        (dict(template="r2"), "task.template must be one of none, qa, r1, qwen-math"),
        (
            dict(system="x", template="none"),
            "task.system needs template chat, got template 'none'",
        ),
        (dict(vocab_size=200), "vocab_size must be at least 259, the bytes and the"),
    ],
)
def test_how_a_task_speaks_is_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        load_task("countdown", train_prompts=20, heldout_prompts=5, **options)


def test_a_given_tokenizer_is_used_by_every_task(gsm8k):
    tokenizer = train_tokenizer(["some text"], 300)
    sizes = dict(train_prompts=20, heldout_prompts=5, tokenizer=tokenizer)
    for name in TASKS:
        if name in ("chains", "countdown", "ladder"):
            task = load_task(name, **sizes)
        elif name == "gsm8k":
            task = load_task(name, path=str(gsm8k), **sizes, system="Be brief.")
        else:
            continue
        assert task.tokenizer is tokenizer and task.template == "chat"
        (ids,) = encode_prompts(task, task.train[:1])
        asked = (*task.train[0].context, ("user", task.train[0].prompt))
        turns = [{"role": role, "content": content} for role, content in asked]
        if task.system:
            turns.insert(0, {"role": "system", "content": task.system})
        assert (
            ids
            == tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
    with pytest.raises(ConfigError, match="task.vocab_size is of a tokenizer trained"):
        load_task("countdown", tokenizer=tokenizer, vocab_size=300)


# "12" is one token or two where digits may join: two completions would be right.
def test_exact_pass_rates_need_answers_of_one_spelling(tmp_path):
    assert spellings(character_tokenizer("0123456789,"), "7,4") == 1
    tokenizer = train_tokenizer(["some text 12 12"], 300)
    assert spellings(tokenizer, "12") == 1
    joined = build(None, texts=["12 12 123"])
    assert spellings(joined, "12", limit=9) == 2
    for part, answer in (("train", "<<6+6=12>>"), ("test", "<<6*2=12>>")):
        rows = [{"question": "?", "answer": answer}]
        write(tmp_path / f"{part}.jsonl", rows)
    load = dict(path=str(tmp_path), train_prompts=1, heldout_prompts=1)
    task = load_task("gsm8k-expressions", **load, tokenizer=tokenizer)
    assert task.single_answer and task.template == "chat"
    with pytest.raises(
        ConfigError, match="one sequence of tokens is right, but .*'12'"
    ):
        load_task("gsm8k-expressions", **load, tokenizer=joined)


def test_single_answer_tasks_end_on_one_token():
    tokenizer = train_tokenizer(["some text"], 300)
    task = load_task("chains", tokenizer=tokenizer, eos_ids=(0, 1), train_prompts=40)
    assert task.stop_ids == {tokenizer.eos_token_id}


def test_a_trained_tokenizer_is_a_function_of_its_texts(tmp_path):
    texts = [
        f"{a} and {b} make {a + b}, don't they?\n" for a in range(30) for b in (1, 7)
    ]
    tokenizer = train_tokenizer(texts, 400)
    code = (
        "import sys, json; from grpo_jax.tasks.tokenizers import train_tokenizer;"
        "t = train_tokenizer(json.load(sys.stdin), 400);"
        "print(t.backend_tokenizer.to_str())"
    )
    other = subprocess.check_output(
        [sys.executable, "-c", code], input=json.dumps(texts), text=True
    )
    assert other.strip() == tokenizer.backend_tokenizer.to_str()
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert (again.pad_token_id, again.eos_token_id) == (0, 1)
    for text in [*texts, "é 日本 1234 <|im_end|>"]:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids and again.decode(ids) == text
    digits = tokenizer("2026 in 365")["input_ids"]
    assert [tokenizer.decode([i]) for i in digits if tokenizer.decode([i]).strip(" in")
            ] == list("2026365")  # fmt: skip


# Sampling and training have tests of their own for where the padding stands.
def test_padding_of_templated_prompts_changes_no_logits(countdown):
    policy = tiny_policy(vocab_size=len(countdown.tokenizer))
    examples = sorted(countdown.train, key=lambda e: len(e.prompt))
    rows = encode_prompts(countdown, [examples[0], examples[-1]])
    assert len(rows[0]) != len(rows[1])
    (ids, mask), right = (pad_left(rows, 70, 0) for _ in range(2))
    for i, row in enumerate(rows):
        for array in right:
            array[i] = np.roll(array[i], len(row) - 70)
    found = next_token_logits(policy, ids, mask)
    other = next_token_logits(policy, *right)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(
            found[i, 70 - len(row) :], other[i, : len(row)], atol=2e-5
        )


def test_what_is_imitated_is_what_is_read_back(countdown):
    rollouts = answer_rollouts(countdown, countdown.train, 70, 20)
    texts = decode_groups(countdown, rollouts.completions, rollouts.completion_mask)
    assert texts == [[e.solution] for e in countdown.train]


@real
def test_gsm8k_of_the_real_files():
    task = load_task("gsm8k", path=str(DATA / "gsm8k"), heldout_prompts=1319)
    assert (len(task.train), len(task.heldout)) == (7473, 1319)
    assert task.note == "" and len(task.tokenizer) == 2048
    check = VERIFIERS["gsm8k"]
    for example in task.train + task.heldout:
        assert check(example, example.solution) == 1
        assert "<<" not in example.solution and example.answer.isascii()
        assert example.solution.endswith(f"\n#### {example.answer}")
    assert task.train[0].answer == "72"
    texts = [e.solution for e in task.train[::50]]
    for text, ids in zip(texts, encode_imitated(task, task.train[::50]), strict=True):
        assert task.tokenizer.decode(ids[:-1]) == text and ids[-1] == 1


@real
def test_math_of_the_real_files():
    tokenizer = train_tokenizer(["some text"], 300)
    load = dict(path=str(DATA / "math"), tokenizer=tokenizer)
    task = load_task("math", **load, heldout_prompts=5000)
    # Of 7,500 two have no answer; one is a test problem too, but for white space.
    assert (len(task.train), len(task.heldout)) == (7497, 5000)
    assert task.note.startswith("2 rows have an empty \\boxed{} and were left out. 1 ")
    levels = Counter(dict(e.tags)["level"] for e in task.train)
    assert levels.keys() == set("12345?") and levels["?"] == 2
    assert levels["1"] == 564 and levels["2"] == 1348
    subjects = Counter(dict(e.tags)["subject"] for e in task.train + task.heldout)
    assert len(subjects) == 7 and subjects["Precalculus"] == 746 + 546
    hard = load_task("math", **load, levels=(3, 4, 5))
    assert set(dict(e.tags)["level"] for e in hard.train) == set("345")
    assert len(hard.heldout) == 512
    geometry = load_task("math", **load, subjects=("Geometry",), levels=(1, "?"))
    assert {e.tags[1][1] for e in geometry.train + geometry.heldout} == {"Geometry"}
    with pytest.raises(ConfigError, match="no held-out problem has the levels and sub"):
        load_task("math", **load, levels=("?",))


@real
@pytest.mark.slow
def test_gold_answers_of_math_are_what_its_solutions_say():
    task = load_task("math", path=str(DATA / "math"), heldout_prompts=5000)
    check = VERIFIERS["math"]
    assert all(check(e, e.solution) == 1 for e in task.train + task.heldout)
