"""A gold answer is what it says: its own text scores 1, no other number does, or it is
refused. Over generated spellings, whose values the generator knows."""

import json
import random
import struct
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from grpo_jax import Example, load_task
from grpo_jax.errors import ConfigError
from grpo_jax.rewards.spelling import spelled
from grpo_jax.rewards.verifiers import VERIFIERS, check_gold

SEEDS = range(12)


def plain(value):
    """A rational as a decimal where it is one, else as a fraction."""
    below = value.denominator
    while below % 2 == 0 or below % 5 == 0:
        below //= 2 if below % 2 == 0 else 5
    if below != 1:
        return f"{value.numerator}/{value.denominator}"
    return format(Decimal(value.numerator) / Decimal(value.denominator), "f")


def spellings(rng):
    """(text, value) pairs: what is readable, and must be read as that value."""
    n, k = rng.randrange(1, 10**7), rng.randrange(1000, 10**7)
    a, b = rng.randrange(1, 99), rng.randrange(2, 99)
    places, exponent = rng.randrange(1, 6), rng.randrange(-9, 9)
    digits = f"{rng.randrange(10**places):0{places}}"
    decimal, whole = Fraction(f"{n}.{digits}"), rng.randrange(1, 99)
    yield str(n), Fraction(n)
    yield f"00{n}", Fraction(n)
    yield f"{n}.{digits}", decimal
    yield f"{n}.{digits}00", decimal
    yield f"-{n}.{digits}", -decimal
    yield f"\N{MINUS SIGN}{n}", Fraction(-n)
    yield f"+{n}", Fraction(n)
    yield f".{digits}1", Fraction(f"0.{digits}1")
    yield f"{n}e{exponent}", n * Fraction(10) ** exponent
    yield f"{n}.{digits}E{exponent:+}", decimal * Fraction(10) ** exponent
    for separator in (",", " ", "\u2009", "\u202f", "\xa0", "'", "\u2019", "_"):
        yield f"{k:,}".replace(",", separator), Fraction(k)
    yield f"{k:,}.{digits}", Fraction(f"{k}.{digits}")
    yield f"{a}/{b}", Fraction(a, b)
    yield f"-{a}/{b}", -Fraction(a, b)
    yield rf"\frac{{{a}}}{{{b}}}", Fraction(a, b)
    if a < b:
        yield f"{whole} {a}/{b}", whole + Fraction(a, b)
        yield f"-{whole} {a}/{b}", -(whole + Fraction(a, b))
        yield rf"{whole}\frac{{{a}}}{{{b}}}", whole + Fraction(a, b)
    yield f"{whole}\u00bd", whole + Fraction(1, 2)
    yield "".join(chr(ord(c) + 0xFEE0) for c in str(n)), Fraction(n)
    yield f"{n}%", Fraction(n)
    yield rf"{n}\%", Fraction(n)
    yield f"${n}", Fraction(n)
    yield rf"\$ {n}".replace(" ", ""), Fraction(n)
    yield rf"\boxed{{{n}}}", Fraction(n)
    yield rf"so \boxed{{{n}.{digits}}}.", decimal
    yield f"so\n#### {n}", Fraction(n)


def unreadable(rng):
    """Texts with more than one reading as a number, or none."""
    a, b = rng.randrange(1, 99), rng.randrange(1, 99)
    yield from (f"{a},{b:02}", f"{a}:{b:02}", f"{a} {b}", f"{a}.{b:03}.{b:03}")
    yield from (f"{a} or {b}", f"{a}, {b}", f"{a} and {b}", f"{a}-{b}", f"{a} x {b}")
    yield from (f"0,{b:03}", f"{a},{b:02},{b:03}", f"{a} {b + 1}/{b}", f"{a}/0")
    yield from (f"- {a}", f"--{a}", f"\u00b1{a}", f"{a}!", f"{a}\u00b2", f"{a}^{b}")
    yield from (f"{a} million", f"{a} and a half", f"{a}k", f"{a}x", f"{a}\\pi")
    yield from (f"\\sqrt{{{a}}}", f"{a}\ufffd{b}", f"{a}\u200b{b}", f"about {a}")
    yield from ("nan", "NaN", "inf", "-Infinity", "", "  ", "none", "9" * 5000)
    yield from (f"{a}e9999", f"1'{a:02}", f"{a}e", f"\u0663{a}", f"{a} feet {b} inches")


def others(text, value):
    """Other numbers that a careless reader could take the text for."""
    runs = "".join(c if c.isdecimal() and c.isascii() else " " for c in text).split()
    found = {Fraction(run) for run in runs if len(run) < 100}
    found |= {Fraction("".join(runs) or 0) if len(text) < 100 else Fraction(7)}
    found |= {value + 1, value - 1, value * 10, value / 10, -value, value / 3}
    found |= {value * (1 + Fraction(1, 10**15)), value * Fraction(1, 100)}
    return found - {value}


def forms(name, text):
    """The text as a final answer."""
    if "\\boxed" in text or (name == "gsm8k" and "####" in text):
        yield text
    elif "####" not in text:
        yield rf"so it is $\boxed{{{text}}}$."
    if name == "gsm8k" and "####" not in text and "\\boxed" not in text:
        yield f"1 + 1 = 2\n#### {text}"
        yield f"So the answer is {text}."
        yield f"It is **{text}**"


def score(name, gold, completion):
    return VERIFIERS[name](Example("", gold), completion)


@pytest.mark.parametrize("name", ["gsm8k", "math"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_golds_own_text_scores_and_no_other_number_does(name, seed):
    for text, value in spellings(random.Random(seed)):
        assert check_gold(name, text) is None, text
        answers = [*forms(name, text), rf"\boxed{{{plain(value)}}}"]
        assert [a for a in answers if score(name, text, a) != 1] == [], text
        wrong = [rf"\boxed{{{plain(x)}}}" for x in others(text, value)]
        assert [a for a in wrong if score(name, text, a) != 0] == [], text
        # And the other way round: the text is no answer to another gold.
        for other in others(text, value):
            for answer in forms(name, text):
                assert score(name, plain(other), answer) == 0, (other, answer)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_can_be_read_in_two_ways_is_no_gold_and_pays_for_no_part(seed):
    for text in unreadable(random.Random(seed)):
        assert check_gold("gsm8k", text) is not None, text
        for part in others(text, Fraction(0)) | {Fraction(0)}:
            for answer in (rf"\boxed{{{text}}}", f"#### {text}"):
                assert score("gsm8k", plain(part), answer) == 0, (part, answer)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["gsm8k", "math", "exact"])
def test_numbers_of_json_are_what_they_say(tmp_path, seed, name):
    rng = random.Random(seed)
    numbers = [str(rng.randrange(-(10**18), 10**18)) for _ in range(8)]
    numbers += [
        repr(struct.unpack("d", struct.pack("Q", rng.getrandbits(64)))[0])
        for _ in range(8)
    ]
    numbers += [f"{rng.randrange(10**6)}e{rng.randrange(-20, 20)}" for _ in range(8)]
    numbers += [f"0.{rng.randrange(10**25):025}", "9" * 60, "-0.0", "1E-7", "1e22"]
    numbers = [n for n in numbers if "n" not in n]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(f'{{"prompt": "{i}?", "answer": {n}}}' for i, n in enumerate(numbers))
    )
    task = load_task("jsonl", path=str(path), rewards=(name,), heldout_prompts=1)
    for example in task.train + task.heldout:
        number = Decimal(numbers[int(example.prompt[:-1])])
        assert "e" not in example.answer.lower()
        assert Fraction(example.answer) == Fraction(number)
        own = example.answer if name == "exact" else rf"\boxed{{{example.answer}}}"
        assert score(name, example.answer, own) == 1


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        *(("1E3", "1000"), ("1e3", "1000"), ("1.5e1", "15"), ("1.50E+1", "15.0")),
        *(("25e-1", "2.5"), ("1e-7", "0.0000001"), ("1e22", "1" + "0" * 22)),
        *((x, x) for x in ("1.50", "0.10", "72.0", "5", "-0", "-0.0", "1000000000.50")),
        (
            "0.1000000000000000055511151231257827",
            "0.1000000000000000055511151231257827",
        ),
    ],
)
@pytest.mark.parametrize("name", ["exact", "verbatim"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_number_compared_as_text_keeps_its_digits(
    tmp_path, written, gold, name, suffix
):
    """And where it loses its exponent, the note says so."""
    path = tmp_path / f"rows.{suffix}"
    rows = [f'{{"prompt": "{i}?", "answer": {x}}}' for i, x in enumerate((1, written))]
    path.write_text("\n".join(rows) if suffix == "jsonl" else f"[{','.join(rows)}]")
    task = load_task("jsonl", path=str(path), rewards=(name,), heldout_prompts=1)
    (example,) = (e for e in task.train + task.heldout if e.prompt == "1?")
    assert example.answer == gold and score(name, example.answer, gold) == 1
    place = f"{'line' if suffix == 'jsonl' else 'row'} 2: {written} as {gold})."
    assert (place in task.note) == (written != gold)
    assert ("1 answers are numbers with exponents" in task.note) == (written != gold)


@pytest.mark.parametrize("name", ["gsm8k", "math"])
@pytest.mark.parametrize(
    "gold",
    [
        r"\boxed{5} or \boxed{6}",
        r"$\boxed{5}$, $\fbox{6}$",
        r"5 or \boxed{6}",
        r"$\boxed{5}$ or $6$",
        r"\boxed{5} or \frac{1}{2}",
        "#### 5\n#### 6",
        "#### 5 #### 6",
        "#### 5\nso \\boxed{6}",
    ],
)
def test_a_gold_that_marks_several_answers_is_refused(name, gold):
    assert "it marks several answers" in str(check_gold(name, gold))


@pytest.mark.parametrize("name", ["gsm8k", "math"])
@pytest.mark.parametrize(
    "gold",
    [
        *(
            r"-\boxed{5}",
            r"= -$\boxed{5}$",
            r"\frac{\boxed{5}}{6}",
            r"\frac{1}{\boxed{5}}",
        ),
        *(
            r"\boxed{5}!",
            r"\boxed{5}^2",
            r"$\boxed{5}$/6",
            r"\boxed{5}\pi",
            r"\boxed{5}6",
        ),
        *(r"2\boxed{5}", r"2 \cdot \boxed{5}", r"2:\boxed{5}", r"x^{\boxed{5}}"),
        *(
            r"\boxed{5} million",
            r"\boxed{5} + 3",
            r"\boxed{5}\frac{1}{2}",
            r"3.\boxed{5}",
            r"\boxed{x}_1",
            r"\boxed{5}{6}",
        ),
    ],
)
def test_a_gold_whose_box_is_a_part_of_it_is_refused(name, gold):
    assert "part of something longer" in str(check_gold(name, gold))


@pytest.mark.parametrize("dots", ["...", " ...", "\u2026", r"\ldots", r"\dots"])
def test_a_decimal_that_goes_on_is_another_number(dots):
    endless = f"0.333{dots}"
    assert check_gold("gsm8k", endless) and check_gold("math", endless) is None
    assert score("math", endless, rf"\boxed{{{endless}}}") == 1
    for name in ("gsm8k", "math"):
        assert score(name, "0.333", rf"\boxed{{{endless}}}") == 0
        assert score(name, endless, r"\boxed{0.333}") == 0
        assert score(name, "5", rf"so \boxed{{5}}{dots}") == 1


@pytest.mark.parametrize("sign", ["\x00", "\u200b", "\ufeff", "\x7f"])
def test_what_is_not_seen_is_no_part_of_a_gold(sign):
    for gold in (f"5{sign}", f"{sign}5", f"1{sign}5"):
        assert check_gold("gsm8k", gold) and check_gold("math", gold)
    assert score("gsm8k", "5", f"\\boxed{{5{sign}}}") == 0


def test_a_line_above_digits_is_a_repeating_decimal():
    for mark in "\u0304\u0305\u0307":
        assert check_gold("gsm8k", f"0.3{mark}")
        assert score("gsm8k", "0.3", f"#### 0.3{mark}") == 0


def test_a_base_after_the_box_belongs_to_the_number():
    """As in six solutions of MATH."""
    for gold in (r"so \boxed{110}_2.", r"\boxed{110}_{2}", r"\boxed{110_2}", "(110)_2"):
        assert check_gold("math", gold) is None and check_gold("gsm8k", gold)
        for right in (r"\boxed{110}_2", r"\boxed{110}_{2}.", r"\boxed{110_{2}}"):
            assert score("math", gold, right) == 1, (gold, right)
        for wrong in (r"\boxed{110}", r"\boxed{6}", r"\boxed{110}_3"):
            assert score("math", gold, wrong) == 0, (gold, wrong)
    assert score("gsm8k", "110", r"\boxed{110}_2") == 0


@pytest.mark.parametrize("name", ["gsm8k", "math"])
@pytest.mark.parametrize(
    "gold",
    [
        r"\boxed{5}",
        *("2 + 3 = 5\n\\boxed{5}\n- 1", r"it is $5$. $\boxed{5}$", r"(2) \boxed{5}"),
        *(r"**\boxed{5}**", r"3 + 2 = \boxed{5}^\circ", r"\boxed{5}$ (that is, $5$)."),
        *(
            r"x = \boxed{5}.\]",
            r"{\boxed{5}}",
            r"\text{Answer: }\boxed{5}",
            r"\boxed 5",
        ),
        r"so \boxed{5}. Hence \boxed{ 5 }",
        r"#### \boxed{5}",
        "\\boxed{5}\n#### 5",
        r"3 + 2 gives us $\boxed{5}$ oranges",
        r"more or less \boxed{5}",
    ],
)
def test_one_answer_may_be_marked_twice(name, gold):
    assert check_gold(name, gold) is None and score(name, gold, r"\boxed{5}") == 1


def test_the_last_box_of_a_solution_is_the_gold(tmp_path):
    """As the files of MATH have it; a field `answer` has one answer only."""
    row = {"problem": "?", "solution": r"\boxed{5}, no, \boxed{6}", "level": "Level 1"}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"problem": name}))
    task = load_task("math", path=str(tmp_path))
    assert [e.answer for e in task.train + task.heldout] == ["6", "6"]
    answer = {"answer": r"\boxed{5} or \boxed{6}"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row | answer))
    with pytest.raises(ConfigError, match="test.jsonl, line 1: .* marks several answe"):
        load_task("math", path=str(tmp_path))


def test_floats_of_parquet_are_spelt_in_their_own_precision(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    texts = [f"{x:.3f}" for x in rng.normal(0, 9, 50)]
    for kind in (pyarrow.float32(), pyarrow.float64(), pyarrow.decimal128(9, 3)):
        values = [Decimal(t) if "decimal" in str(kind) else float(t) for t in texts]
        table = pyarrow.table(
            {"prompt": [f"{i}?" for i in range(50)], "a": pyarrow.array(values, kind)}
        )
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        load = dict(path=str(tmp_path / "rows.parquet"), answer_field="a")
        task = load_task("jsonl", **load, heldout_prompts=1, rewards=("gsm8k",))
        for example in task.train + task.heldout:
            wanted = texts[int(example.prompt[:-1])]
            assert score("gsm8k", example.answer, f"#### {wanted}") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (72.0, "72"),
        (np.float32(72), "72"),
        (-0.0, "-0"),
        (1e15, "1" + "0" * 15),
        (Decimal("1.50"), "1.50"),
        (1e-7, "0.0000001"),
        (1e22, "1" + "0" * 22),
        (2.5, "2.5"),
        (np.float32(0.1), "0.1"),
        (np.float16(0.1), "0.1"),
        (np.float64(1e-5), "0.00001"),
        (np.int64(7), "7"),
        (Decimal("1E+3"), "1000"),
        ("1e5", "1e5"),
        *((x, None) for x in (True, np.bool_(True), None, [1], {}, b"1")),
        *((x, None) for x in (float("nan"), float("inf"), Decimal("NaN"))),
        (Decimal("1e999999999"), None),
        pytest.param(10**5000, None, id="5001_digits"),
    ],
)
def test_spelled(value, text):
    assert spelled(value) == text


_MANY = "has a number of more than 400 digits, "


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("NaN", "field 'answer' is nan"),
        ("1e999", "'answer' has a number of more than 400 digits, 1e999; correct"),
        ("-2.5E-999", "has a number of more than 400 digits, 2.5E-999; correct"),
        pytest.param(
            "1e9" + "9" * 30, "the exponent of 1e9.* is too large", id="1e99..."
        ),
        ('"1e999"', "it has a number of more than 400 digits, 1e999; expected one num"),
        ('"#### 1e99999"', "it has a number of more than 400 digits, 1e99999; exp"),
        (r'"\\boxed{5} or \\boxed{6}"', r"it marks several answers \(5, 6\); expected"),
        ("true", "field 'answer' is True"),
        ("null", "field 'answer' is None"),
        ("[5]", "field 'answer' is .5."),
        ('""', "ends on no number: ''; expected one number"),
        ('"1,5"', "ends on no number: '1,5'; expected one number.*got '1,5'"),
        *(
            pytest.param(
                x, f"{_MANY}{x[:40]}[.]{{3}}{x[-10:]}[^0-9]", id=f"{len(x)}_digits"
            )
            for x in ("9" * 5000, str(10**400), "7" * 4000)
        ),
        pytest.param(f'"{10**400:,}"', _MANY + "10,000,", id="commas"),
        ('"- 5"', "can be read in two ways; expected one number.*got '- 5'"),
        pytest.param("[" * 100_000, "nested too deeply", id="nested"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_row_that_cannot_be_right_is_named(tmp_path, answer, message, suffix):
    path = tmp_path / f"rows.{suffix}"
    rows = [json.dumps({"prompt": f"{i}?", "answer": i}) for i in range(9)]
    rows[4] = f'{{"prompt": "?", "answer": {answer}}}'
    path.write_text(
        "\n".join(rows) if suffix == "jsonl" else "[\n" + ",\n".join(rows) + "]"
    )
    place = r"rows.jsonl, line 5: " if suffix == "jsonl" else r"rows.json, row 5: "
    with pytest.raises(ConfigError, match=f"{place}.*{message}"):
        load_task("jsonl", path=str(path), rewards=("gsm8k",))
