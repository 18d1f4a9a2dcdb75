import json
from pathlib import Path

import pytest

from grpo_jax.commands.audit import main
from grpo_jax.errors import ConfigError
from grpo_jax.rewards.audit import ITSELF, SPOILED, SYMBOLIC, audit_file, rewritings

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="../shared/data with gsm8k and math is not there"
)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize(
    ("gold", "form", "text"),
    [
        (r"\frac{1}{2}", "a/b", "1/2"),
        (r"-\frac{1}{2}", "a/b", "-1/2"),
        (r"\frac{1}{2}", "decimal", "0.5"),
        (r"\frac{1}{2}", r"\frac12", r"\frac12"),
        ("12345", "commas", "12,345"),
        (r"12,\!345", "no commas", "12345"),
        (r"4\text{ feet}", "unit left out", "4"),
        (r"50\%", "no %", "50"),
        (r"90^\circ", "no degrees", "90"),
        ("x=5", "without x =", "5"),
        ("5", "x =", "x = 5"),
        ("1, 2", "list reversed", "2, 1"),
        ("8+4i", "terms swapped", "4i + 8"),
        ("(1,2]", r"\left \right", r"\left(1,2\right]"),
        ("24", SPOILED, "34"),
    ],
)
def test_rewritings(gold, form, text):
    assert dict(rewritings("math", gold))[form] == text


@pytest.mark.parametrize(
    ("gold", "forms"),
    [
        (r"8:34\text{ p.m.}", {"unit left out"}),
        (r"\frac{1}{3}", {"decimal"}),
        ("(1,2)", {"list reversed", "n.0", "spaces"}),
        (r"112,\!875", {"spaces", "list reversed"}),
        ("x_1", {SPOILED}),
    ],
)
def test_what_would_change_the_meaning_is_not_rewritten(gold, forms):
    assert not forms & set(dict(rewritings("math", gold)))


def test_an_audit_lists_every_refusal_by_row_and_cause(tmp_path):
    rows = [
        {"solution": r"so $\boxed{\frac{1}{2}}$"},
        {"solution": r"so $\boxed{}$"},
        {"solution": "no box"},
        {"answer": r"\sum_{n=1}^{9} n", "solution": "ignored"},
    ]
    report = audit_file(write(tmp_path / "rows.jsonl", rows), "math")
    assert report.rows == 4 and report.failures == 0
    assert report.counts[ITSELF] == (4, 2) and report.counts[SYMBOLIC] == (2, 1)
    assert report.counts[SPOILED] == (1, 0) and report.counts["a/b"] == (1, 1)
    assert [(case.row, case.form, case.cause) for case in report.cases[:3]] == [
        (2, ITSELF, "it is empty"),
        (3, ITSELF, "there is no \\boxed"),
        (4, SYMBOLIC, "sympy is not given \\sum"),
    ]
    assert "line 4" in report.text() and "50.00%" in report.text()
    assert json.loads(json.dumps(report.as_dict()))["cases"][0]["row"] == 2


def test_an_audit_of_gsm8k(tmp_path):
    rows = [{"answer": "1+1=<<1+1=2>>2\n#### 1,080"}, {"answer": "#### many"}]
    report = audit_file(write(tmp_path / "rows.jsonl", rows), "gsm8k", workers=1)
    assert [(case.row, case.cause) for case in report.cases] == [
        (2, "it ends on no number: 'many'")
    ]
    assert all(
        a == b
        for form, (a, b) in report.counts.items()
        if form not in (ITSELF, SPOILED)
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1"),
        ('{"a": 1}', "field 'answer' is missing and field 'solution' is missing"),
        ('{"answer": null}', "field 'answer' is null and field 'solution' is missing"),
        ('{"solution": 5}', "field 'answer' is missing and field 'solution' is 5"),
    ],
)
def test_what_is_no_row(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=message):
        audit_file(tmp_path / "rows.jsonl", "math")


def test_what_cannot_be_audited(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the data file"):
        audit_file(tmp_path / "none.jsonl", "math")
    with pytest.raises(ConfigError, match="unknown verifier to audit 'maths'"):
        audit_file(write(tmp_path / "rows.jsonl", []), "maths")


def test_golds_that_are_no_whole_numbers_are_audited(tmp_path):
    golds = [2.5, "3/4", "-7", "1 1/2", "50%", 1e-7]
    (tmp_path / "rows.json").write_text(
        json.dumps([{"answer": gold} for gold in golds]), encoding="utf-8-sig"
    )
    report = audit_file(tmp_path / "rows.json", "gsm8k", workers=1)
    assert report.cases == [] and report.counts[ITSELF] == (6, 6)
    assert report.counts["n.00"] == (1, 1) and report.counts["n.n0"] == (2, 2)
    assert report.counts[SPOILED] == (6, 0)


def test_fields_are_named_as_in_training(tmp_path):
    rows = [
        {"reward_model": {"ground_truth": gold}, "answer": "#### 9", "work": work}
        for gold, work in (("7", r"\boxed{8}"), (None, r"\boxed{6}, no, \boxed{5}"))
    ]
    path, nested = write(tmp_path / "rows.jsonl", rows), "reward_model.ground_truth"

    def golds(**fields):
        report = audit_file(path, "exact", **fields, workers=1)
        return [case.gold for case in report.cases], report.counts[ITSELF]

    with pytest.raises(ConfigError, match=f"line 2: field {nested!r} is None"):
        golds(answer_field=nested)
    with pytest.raises(ConfigError, match="field 'anwser' is missing; expected text"):
        golds(answer_field="anwser")
    with pytest.raises(ConfigError, match="field 'wrok' is missing; expected a gold"):
        golds(solution_field="wrok")
    for fields in (dict(), dict(solution_field="work")):
        assert golds(**fields) == ([], (2, 2))
    assert golds(answer_field=nested, solution_field="work") == ([], (2, 2))


def test_which_field_is_the_gold(tmp_path):
    rows = [{"a": {"b": "so 7"}, "answer": "3", "w": r"\boxed{many}"}]
    path = write(tmp_path / "rows.jsonl", rows)
    for fields, gold in (
        ({"answer_field": "a.b"}, "so 7"),
        ({"solution_field": "w"}, "many"),
    ):
        (case,) = audit_file(path, "gsm8k", **fields, workers=1).cases
        assert case.gold == gold
    assert audit_file(path, "gsm8k", workers=1).cases == []


def test_the_command_names_the_field(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"m": {"gold": "many"}}])
    main([str(path), "--verifier", "gsm8k", "--answer-field", "m.gold"])
    assert "ends on no number: 'many'" in capsys.readouterr().out


def test_a_gold_that_marks_several_answers_is_a_case(tmp_path):
    rows = [{"answer": r"\boxed{5} or \boxed{6}"}, {"answer": "#### 5\n#### 6"}]
    report = audit_file(write(tmp_path / "rows.jsonl", rows), "gsm8k", workers=1)
    assert [case.cause for case in report.cases] == [
        "it marks several answers (5, 6)"
    ] * 2


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_of_gsm8k_is_accepted_however_it_is_written(split):
    report = audit_file(DATA / "gsm8k" / f"{split}.jsonl", "gsm8k")
    assert report.rows == {"train": 7473, "test": 1319}[split]
    assert report.cases == [] and report.failures == 0


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_golds_of_math_are_accepted_but_for_one_that_is_empty(tmp_path, split):
    """Of every fourth row, from the second on."""
    lines = (DATA / "math" / f"{split}.jsonl").read_text().splitlines()
    assert len(lines) == {"train": 7500, "test": 5000}[split]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[1::4]))
    report = audit_file(tmp_path / "rows.jsonl", "math")
    assert report.failures == 0 and report.counts[SPOILED][1] == 0
    refused = [case for case in report.cases if case.form not in (ITSELF, SYMBOLIC)]
    assert refused == []
    empty = [case.row for case in report.cases if case.form == ITSELF]
    assert [2 + 4 * (row - 1) for row in empty] == {"train": [5530], "test": []}[split]
    asked, accepted = report.counts[SYMBOLIC]
    assert accepted / asked > 0.999
    assert report.checks_per_second > 200  # 2 cores: about 2,000
