"""Verdicts worked out by hand, and above all those that must be 0."""

from fractions import Fraction

import pytest

from grpo_jax import Example
from grpo_jax.errors import ConfigError
from grpo_jax.rewards.answers import final_number, last_boxed
from grpo_jax.rewards.spec import parse_reward, reward_text
from grpo_jax.rewards.symbolic import refused
from grpo_jax.rewards.types import Reward
from grpo_jax.rewards.verifiers import (
    VERIFIERS,
    check_gold,
    countdown_gold,
    countdown_numbers,
    shortened,
)


def verdict(name, gold, completion, **options):
    return VERIFIERS[name](Example("", gold), completion, **options)


def boxed(answer):
    return f"so it is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed 2$.", "2"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed{5} or \boxed{6", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed", None),
        (r"\boxed 12", None),
        (r"\boxedanswer{5}", None),
        ("5", None),
        (r"\boxed{" + "9" * 5000 + "}", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("#### 5\n#### 1,080", 1080),
        ("#### $24.00", 24),
        ("#### -5", -5),
        ("#### $-5", -5),
        ("#### -$5", -5),
        ("#### 007.", 7),
        ("#### 50%", 50),
        ("#### 18 dollars", 18),
        ("#### 1/2", Fraction(1, 2)),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{\$1{,}234}", 1234),
        (r"\boxed{12\text{ apples}}", 12),
        ("#### 5, no: \\boxed{6}", 6),
        ("\\boxed{6}\n#### 5", 5),
        ("3 + 4 = 7, so 7.", 7),
        ("it costs $1,234.50.", Fraction(2469, 2)),
        ("10-3", 3),
        ("10 - 3", 3),
        ("it is -3", -3),
        ("= \N{MINUS SIGN}3", -3),
        ("**12**", 12),
        ("half: .5", Fraction(1, 2)),
        ("", None),
        ("none", None),
        ("5\n####", None),
        ("5 #### about", None),
        ("#### 18 or 20", None),
        ("#### 3*6", None),
        ("#### --5", None),
        ("#### 1/0", None),
        (r"5 \boxed{", None),
        (r"\boxed{5} and \boxed{6", None),
        (r"\boxed{5, 6}", None),
        ("9" * 100_000, None),
        ("#### ٣", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("#### 24", 1),
        ("#### 24.0", 1),
        ("#### 24.001", 0),
        ("#### 024", 1),
        ("the answer is 24", 1),
        ("24, or maybe 25", 0),
        ("#### 25\nbut 24", 0),
        ("", 0),
    ],
)
def test_gsm8k(completion, reward):
    assert verdict("gsm8k", "24", completion) == reward
    assert verdict("gsm8k", "work <<1+1=2>>\n#### 24", completion) == reward
    assert verdict("gsm8k", "no gold", completion) == 0


SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{3}{4}", r"\frac{6}{8}"),
    (r"6\frac{1}{6}", r"\frac{37}{6}"),
    ("10,000", "10000"),
    (r"64,\!328", "64328"),
    ("5", "x = 5"),
    ("5", "5."),
    ("(1,2)", r"\left( 1, 2 \right)"),
    (r"\left(\frac{1}{2},3\right)", "(0.5, 3)"),
    ("1,2", "2, 1"),
    (r"-2 \text{ or } -12", "-12, -2"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"50\%", "50"),
    (r"90^\circ", r"90^{\circ}"),
    (r"4 \text{ feet}", "4"),
    (r"4 \text{ feet}", "4 feet"),
    (r"8:34 \text{ p.m.}", "8:34 p.m."),
    (r"\text{(C)}", "C"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{A, B}", "B, A"),
    ("2516_8", "2516_{8}"),
    ("101_2, 11_2", "11_{2}, 101_{2}"),
    ("24_{10}", "24"),
    ("24", "24_{10}"),
    ("y = 2x+3", "2x+3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"x \in [1,2]", "[1,2]"),
]
DIFFERENT = [
    ("5", ""),
    ("5", "6"),
    ("5", "5, 6"),
    ("5", "5 or 6"),
    ("6", r"5\text{ or }6"),
    ("12", "1 2"),
    ("-3", "3"),
    ("1", "0.9999999999"),
    ("0", "0.0000001"),
    (r"\frac{1}{3}", "0.333333"),
    ("(1,2)", "(2,1)"),
    ("(1,2),(3,4)", "(1,2)"),
    ("101_2", "101_3"),
    ("2516_8", "2516"),
    ("101_2", "5"),
    ("101_2", "101_{10}"),
    ("-37_8", "-37"),
    ("0.0011_2", "0.0011"),
    ("861_{12}", "861"),
    ("101_2, 11_2", "101, 11"),
    ("24_{10}", "25"),
    ("101", "101_2"),
    (r"80\text{ cents}", r"80\text{ dollars}"),
    (r"8:34 \text{ p.m.}", r"8:34 \text{ a.m.}"),
    (r"\text{CBAD}", "ABCD"),
    (r"\text{even}", "odd"),
    (r"\text{(A)}", "(B)"),
    (r"\text{May}", r"\text{May or June}"),
    ("5", "2+2=5"),
    ("5", "3=4=5"),
    ("5", r"\frac{x=5}"),
    ("5}", r"5}"),
    ("5", r"\text{5 or 6}"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_math_by_spelling(gold, answer):
    assert verdict("math", gold, boxed(answer)) == 1


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_math_that_differs(gold, answer):
    assert verdict("math", gold, boxed(answer)) == 0


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        (r"2\sqrt{3}", r"\sqrt{12}", 1),
        ("x^2+2x+1", "(x+1)^2", 1),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", 1),
        (r"\frac{\pi}{2}", r"0.5\pi", 1),
        ("3+4i", "4i+3", 1),
        ("2x+3=y", "y=2x+3", 1),
        ("11\\sqrt2", r"\sqrt{242}", 1),
        ("25", "5^2", 1),
        ("2^{2005}", r"2 \cdot 2^{2004}", 1),
        ("2^{2005}", "2^{2006}", 0),
        ("x^2-y", "-y+x^2", 1),
        ("x^2-y", "x^2+y", 0),
        ("x=5", "y=5", 0),
        (r"\sqrt{2}", "1.414214", 0),
        ("3", "3t", 0),
        ("2", "2m+1", 0),
        ("2x", "2y", 0),
        ("3", r"\frac{0}{0}", 0),
        (r"\infty", r"-\infty", 0),
        ("(1,2)", "[1,2]", 0),
        ("[1,2)", "(1,2]", 0),
        ("1", r"\{1,2\}", 0),
        ("5", "x", 0),
    ],
)
def test_math_by_sympy(gold, answer, reward):
    pytest.importorskip("math_verify")
    assert verdict("math", gold, boxed(answer)) == reward


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        ("0.15", r"1.5\times 10^{-1}", 1),
        ("0.04", "0.2^2", 1),
        (r"3\cdot 0.2", "0.6", 1),
        ("0.3", "0.1+0.2", 1),
        (r"0.1^{20}", "10^{-20}", 1),
        ("0.15", r"1.6\times 10^{-1}", 0),
        ("0.333", r"\frac{1}{3}", 0),
        (r"0.1\overline{6}", r"\frac{1}{6}", 1),
        ("0.1", "0.10000000000000001", 0),
        ("10^{-20}", "10^{-21}", 0),
        (r"10^{-20}\pi", r"2\cdot 10^{-20}\pi", 0),
        (r"10^{-20}\pi", r"\pi\cdot 10^{-20}", 1),
        (r"\sqrt{2}", r"\sqrt{2}+10^{-20}", 0),
        (r"\sqrt{2}", r"\frac{1414213562373095}{10^{15}}", 0),
        (r"0.3\pi", r"0.1\pi+0.2\pi", 1),
        ("0.1x+0.2x", "0.3x", 1),
        ("0.3x", "0.30000000000001x", 0),
        (r"(10^{-20}\pi, 2)", r"(10^{-21}\pi, 2)", 0),
        (r"10^{-20}\pi, 2", r"10^{-21}\pi, 2", 0),
        ("0", r"\sin(\pi)", 1),
        (r"\pi\cdot 10^{-13}", "0", 0),
        (r"(0,0.5\pi)", r"(0,\frac{\pi}{2})", 1),
    ],
)
def test_math_compares_decimals_exactly_and_values_relatively(gold, answer, reward):
    pytest.importorskip("math_verify")
    assert verdict("math", gold, boxed(answer)) == reward


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        (r"\boxed{204}", "204", 1),
        (r"so $\boxed{\frac{1}{2}}$.", "0.5", 1),
        ("so 5\n#### 5", "5", 1),
        (r"\boxed{204}", "205", 0),
        ("23", "2 3", 0),
        ("6", "2 3", 0),
        ("5.5", "1 1/2", 0),
        ("1,234", "234, 1", 0),
        ("1234", "1, 234", 0),
        ("1, 234", "1,234", 1),
        ("1, 234", "1234", 0),
        (r"60^\circ, 120^\circ", r"60^\circ,120^\circ", 1),
        (r"111, \! 111", r"111,\!111", 1),
        (r"-15\frac{3}{5}", r"- 15\frac{3}{5}", 1),
        ("1, 234", "234, 1", 1),
        ("12:30", "2:5", 0),
        ("12:30", "0.4", 0),
        ("12:30", "12:30", 1),
        ("1.000.000", "0", 0),
        ("1.000.000", "1.000.000", 1),
        ("0x10", "0", 0),
        ("1__000", "1", 0),
        ("2024-01-05", "2018", 0),
        ("1/2/2024", "1/4048", 0),
        (r"\(5\)", "5", 1),
        ("= 5", "5", 1),
        ("101_2", "101", 0),
        ("101_{2}", "101", 0),
        ("861_{12}", "861_{12}", 1),
        ("861_{12}", "861_{13}", 0),
        ("3_{10}", "3", 1),
        ("3:2", "6:4", 1),
        (r"5\text{ million}", "5", 0),
        ("5", r"5\text{ million}", 0),
    ],
)
def test_what_a_gold_of_math_says(gold, answer, reward):
    pytest.importorskip("math_verify")
    assert verdict("math", gold, boxed(answer)) == reward


def test_the_last_box_counts_and_must_be_closed():
    assert verdict("math", "5", r"\boxed{6}, no, \boxed{5}") == 1
    assert verdict("math", "5", r"\boxed{5}, no, \boxed{6}") == 0
    assert verdict("math", "5", r"\boxed{5} so \boxed{5") == 0
    assert verdict("math", "5", r"\boxed{5") == 0
    assert verdict("math", "5", "5") == 0


@pytest.mark.parametrize(
    "body",
    [
        "9" * 500,
        "5}",
        "9" * 60,
        "(" * 11 + ")" * 11,
        r"\sum_{n=1}^{9} n",
        r"\int x",
        r"\variable{x}",
        "a__b",
        'a"b',
        "a\0b",
        "5\u202e",
        "\ud800",
        "x@y",
        r"\begin{array}1\end{array}",
    ],
)
def test_what_sympy_is_not_given(body):
    assert refused(body)


NUMBERS = [3, 8, 8, 3]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<answer>8/(3-8/3)</answer>", 1),
        ("<answer> 8 / (3 - 8/3) = 24 </answer>", 1),
        (r"\boxed{8 \div (3 - 8 \div 3)}", 1),
        ("I try\n8÷(3−8÷3)", 1),
        ("<answer>3*8</answer>", 0),
        ("<answer>3*8*(8-8+3)/3</answer>", 0),
        ("<answer>24</answer>", 0),
        ("<answer>8/(3-8/3) = 25</answer>", 0),
        ("<answer>8/(3-8/3)=24=24</answer>", 0),
        ("<answer>8/(3-8/3)", 0),
        ("<answer>8/(3-8/3)</answer> <answer>", 0),
        ("<answer>8/(3-8/3)</answer> <answer>3</answer>", 0),
        ("<answer>8/(3-3)*8</answer>", 0),
        ("<answer>38-8+3</answer>", 0),
        ("<answer>8//(3-8/3)</answer>", 0),
        ("<answer>8**3-8-3</answer>", 0),
        ("<answer>(8/(3-8/3)</answer>", 0),
        ("<answer>8/(3-8/3))</answer>", 0),
        ("<answer>-(3-8)*8-(8*3)</answer>", 0),
        ("<answer>__import__('os')</answer>", 0),
        ("<answer>" + "(" * 10_000 + "</answer>", 0),
        ("", 0),
    ],
)
def test_countdown(completion, reward):
    # 8 / (3 - 8/3) = 8 / (1/3) = 24
    assert verdict("countdown", countdown_gold(24, NUMBERS), completion) == reward


def test_a_countdown_gold_is_read_back():
    assert countdown_numbers(countdown_gold(24, NUMBERS)) == (24, NUMBERS)
    with pytest.raises(ValueError, match="24 from 3 8 8 3"):
        countdown_numbers("24: 3 8 8 3")


@pytest.mark.parametrize(
    ("name", "completion", "reward"),
    [
        ("exact", "5", 1),
        ("exact", " 5\n", 1),
        ("exact", "5 5", 0),
        ("number_or_exact", "5 + 0 = 5", 1),
        ("number_or_exact", "5 or 6", 0),
        ("verbatim", "5", 1),
        ("verbatim", "5 ", 0),
        ("boxed_format", r"so \boxed{5}", 1),
        ("boxed_format", r"\boxed{5} \boxed{5}", 0),
        ("boxed_format", r"\boxed{5} \boxed{", 0),
        ("boxed_format", r"\boxed{}", 0),
        ("boxed_format", "5", 0),
        ("r1_format", "<think>a</think>\n<answer>5</answer>\n", 1),
        ("r1_format", "a</think><answer>5</answer>", 1),
        ("r1_format", "<think>a</think><answer>5</answer> and", 0),
        ("r1_format", "x<think>a</think><answer>5</answer>", 0),
        ("r1_format", "<think>a</think> so <answer>5</answer>", 0),
        ("r1_format", "<think>a</think><answer>5</answer><answer>6</answer>", 0),
        ("r1_format", "<answer>5</answer><think>a</think>", 0),
        ("r1_format", "<think>a</think><answer>5", 0),
        ("r1_format", "<think>a</think><answer> </answer>", 0),
        ("hash_format", "work\n#### 5", 1),
        ("hash_format", "#### 1,000\n", 1),
        ("hash_format", "#### 5\nand more", 0),
        ("hash_format", "#### 4\n#### 5", 0),
        ("hash_format", "so #### 5", 0),
        ("hash_format", "#### five", 0),
        ("hash_format", "5", 0),
    ],
)
def test_formats(name, completion, reward):
    assert verdict(name, "5", completion) == reward


@pytest.mark.parametrize(
    ("tokens", "reward"), [(0, 0), (512, 0), (768, -0.5), (1024, -1), (9999, -1)]
)
def test_length(tokens, reward):
    options = {"start": 512, "end": 1024, "tokens": tokens}
    assert verdict("length", "", "", **options) == reward


def test_what_travels_to_a_worker_is_short_and_has_the_same_verdict():
    long = "a" * 10**6
    assert shortened("math", long + boxed("5") + "b") == r"\boxed{5}"
    assert shortened("math", boxed("5") + r"\boxed{6") == ""
    assert len(shortened("gsm8k", long)) == len(shortened("countdown", long)) == 20_000
    assert shortened("exact", long) == shortened("my:own", long) == long
    assert shortened("length", long) == ""


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("math", Reward(name="math")),
        ("math=1.0", Reward(name="math")),
        (
            "mypkg.rewards:brevity=-0.2",
            Reward(name="mypkg.rewards:brevity", weight=-0.2),
        ),
        (
            "length(start=512, end=1024)=0.5",
            Reward(name="length", weight=0.5, options=(("start", 512), ("end", 1024))),
        ),
    ],
)
def test_parse_reward(text, reward):
    assert parse_reward(text) == reward
    again = parse_reward(f"{reward_text(reward)}={reward.weight}")
    assert again == reward


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maths", "did you mean 'math'.*boxed_format.*module:function"),
        ("math=much", "weight of reward 'math=much' must be a finite number"),
        ("math=nan", "must be a finite number"),
        ("math(tolerance=1)", "no option 'tolerance'; its options: exact"),
        ("gsm8k(a=1)", "its options: none"),
        ("length", "needs start and end"),
        ("length(start=5,end=5)", "0 <= start < end"),
        ("length(start=a,end=5)", "option 'start'"),
        ("a b:c-d", "must be module:function"),
        ("my:own(a=1)", "takes no options"),
        ("", "a reward must be NAME"),
        ("(a=1)", "a reward must be NAME"),
    ],
)
def test_what_is_wrong_with_a_reward(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_reward(text)


@pytest.mark.parametrize(
    ("name", "gold", "reason"),
    [
        ("gsm8k", "72", None),
        ("gsm8k", "many", "ends on no number"),
        ("math", r"\frac{1}{2}", None),
        ("math", " ", "empty"),
        ("math", r"\frac{1}{2", "braces"),
        ("math", "1}{2", "braces"),
        ("countdown", "24 from 3 8 8 3", None),
        ("countdown", "24", "24 from"),
        ("math", r"\boxed{5}", None),
        ("math", r"\boxed{5", "empty"),
        ("math", r"\boxed{}", "empty"),
        ("math", "$", "nothing of it"),
        ("math", "NaN", "no number"),
        ("math", "5-6", "in two ways"),
        ("math", "The answer is 5.", "a sentence"),
        ("math", "9" * 900, "more than 400 digits"),
        ("gsm8k", "- 5", "in two ways"),
        ("exact", "", "empty"),
        ("number_or_exact", " ", "empty"),
        ("number_or_exact", "5 km", None),
        ("number_or_exact", "9" * 900, "more than 400 digits"),
        ("verbatim", " ", "empty"),
        ("boxed_format", "", None),
        ("my:own", "", None),
    ],
)
def test_check_gold(name, gold, reason):
    found = check_gold(name, gold)
    assert found is None if reason is None else reason in found
