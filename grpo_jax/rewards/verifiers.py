"""Verifiers and format rewards by name: (example, completion, **options) -> float.

A verifier reads the answer that the completion commits to last and compares it with
the gold answer. All of them fail closed: an answer that is cut off, ambiguous or cannot
be read scores 0, and so does one that makes a verifier raise. They are pure and light,
but `math` calls sympy, which may never return: it runs in the worker processes of
`pool.VerifierPool`.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

from grpo_jax.rewards.answers import (
    boxes,
    final_number,
    last_boxed,
    marked_answer,
    part_of,
    several_answers,
)
from grpo_jax.rewards.latex import read_answer, same_answer
from grpo_jax.rewards.numbers import PLAIN, one_number, too_many_digits
from grpo_jax.rewards.symbolic import same_math
from grpo_jax.rewards.types import Example
from grpo_jax.rewards.wellformed import incomplete

TAIL = 20_000  # last characters of a completion that are searched for an answer
MAX_EXPRESSION = 300  # characters of a countdown answer


def verbatim(example: Example, completion: str, *, thinking: float = 0.0) -> float:
    """1 for the gold answer, to the character, and nothing else."""
    return float(answering(completion, thinking) == example.answer)


def exact(example: Example, completion: str, *, thinking: float = 0.0) -> float:
    """1 for the gold answer, white space around it aside, and nothing else."""
    text = answering(completion, thinking).strip()
    return float(bool(text) and text == example.answer.strip())


def gsm8k(example: Example, completion: str, *, thinking: float = 0.0) -> float:
    """1 where the final number (`final_number`) equals the gold's, as rationals."""
    gold = _gold_number(example.answer)
    number = final_number(answering(completion, thinking)[-TAIL:])
    return float(gold is not None and gold == number)


def number_or_exact(
    example: Example, completion: str, *, thinking: float = 0.0
) -> float:
    """`gsm8k` where the gold answer is nothing but a number, else `exact`."""
    verifier = gsm8k if _is_number(example.answer) else exact
    return verifier(example, completion, thinking=thinking)


def _is_number(gold: str) -> bool:
    return PLAIN.fullmatch(gold.strip()) is not None


def math(
    example: Example, completion: str, *, exact: float = 1.0, thinking: float = 0.0
) -> float:
    """1 where the last \\boxed{...} is the gold answer, by spelling or by math_verify.

    `exact` 0 skips the comparison of spellings: for audits.
    """
    answer = last_boxed(answering(completion, thinking)[-TAIL:])
    if not answer or check_gold("math", example.answer):
        return 0.0
    gold = _math_gold(example.answer)
    return float(same_math(gold, answer, spelling=bool(exact)))


def answering(completion: str, thinking: float) -> str:
    """The part of a completion that may hold its answer: where `thinking`, what follows
    the last </think>, and nothing where that was never reached."""
    if not thinking:
        return completion
    _, closed, answer = completion.rpartition("</think>")
    return answer if closed else ""


def countdown(example: Example, completion: str, *, thinking: float = 0.0) -> float:
    """1 where the answer reaches the target with each number used exactly once.

    The answer is in the last <answer>...</answer>, else the last \\boxed{...}, else the
    last line. `example.answer` is as `countdown_gold` writes it. Only numbers, + - * /
    (also × ÷ \\times \\cdot \\div) and parentheses are read; "= target" may follow.
    """
    target, numbers = countdown_numbers(example.answer)
    answer = _countdown_answer(answering(completion, thinking)[-TAIL:])
    if not answer or len(answer) > MAX_EXPRESSION:
        return 0.0
    for old, new in _OPERATORS.items():
        answer = answer.replace(old, new)
    expression, equals, claimed = answer.partition("=")
    try:
        if equals and one_number(claimed) != target:
            return 0.0
        value, used = _Arithmetic(expression).read()
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(value == target and sorted(used) == sorted(numbers))


def _countdown_answer(text: str) -> str | None:
    """The expression a completion ends on; None where its tag is not closed."""
    if "<answer>" in text:
        inside, closed, _ = text[text.rindex("<answer>") + 8 :].partition("</answer>")
        return inside if closed else None
    if "\\boxed" in text:
        return last_boxed(text)
    return next(reversed(text.strip().splitlines()), None)


_OPERATORS = {"×": "*", "÷": "/", "\N{MINUS SIGN}": "-", "$": ""}
_OPERATORS |= {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}


class _Arithmetic:
    """expression = term (+|- term)*; term = atom (*|/ atom)*; atom = integer | (...)"""

    def __init__(self, text: str):
        self.tokens: list[str] = re.findall(r"[0-9]+|\S", text)
        self.used: list[int] = []

    def read(self) -> tuple[Fraction, list[int]]:
        """(value, numbers used); ValueError where the text is not an expression."""
        value = self._sum()
        if self.tokens:
            raise ValueError(f"unexpected {self.tokens[0]!r}")
        return value, self.used

    def _sum(self) -> Fraction:
        value = self._product()
        while (operator := self._take("+", "-")) is not None:
            other = self._product()
            value = value + other if operator == "+" else value - other
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while (operator := self._take("*", "/")) is not None:
            other = self._atom()
            value = value * other if operator == "*" else value / other
        return value

    def _atom(self) -> Fraction:
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise ValueError("a parenthesis is not closed")
            return value
        token = self.tokens.pop(0) if self.tokens else ""
        if not (token.isascii() and token.isdigit() and len(token) < 20):
            raise ValueError(f"a number was expected, got {token!r}")
        self.used.append(int(token))
        return Fraction(token)

    def _take(self, *choices: str) -> str | None:
        if self.tokens and self.tokens[0] in choices:
            return self.tokens.pop(0)
        return None


def countdown_gold(target: int, numbers: list[int]) -> str:
    """The gold answer of a countdown example, such as "24 from 3 8 8 3"."""
    return f"{target} from {' '.join(map(str, numbers))}"


def countdown_numbers(gold: str) -> tuple[int, list[int]]:
    """(target, numbers) of a gold answer that `countdown_gold` wrote.

    Raises:
        ValueError: the text does not have that form.
    """
    if not re.fullmatch(r"-?[0-9]{1,18} from [0-9]{1,18}( [0-9]{1,18})*", gold):
        raise ValueError(
            f"a countdown gold must be like '24 from 3 8 8 3', got {gold!r}; write it "
            "with countdown_gold(target, numbers)."
        )
    target, _, numbers = gold.partition(" from ")
    return int(target), [int(number) for number in numbers.split()]


def boxed_format(example: Example, completion: str) -> float:
    """1 for exactly one \\boxed{...}, closed and not empty."""
    del example
    first_two = list(itertools.islice(boxes(completion), 2))
    return float(len(first_two) == 1 and bool(first_two[0]))


_R1 = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def r1_format(example: Example, completion: str) -> float:
    """1 for <think>...</think><answer>...</answer> and nothing around them.

    The template may have printed the opening <think>: a completion without it counts
    where it has </think> once.
    """
    del example
    text = completion if "<think>" in completion else "<think>" + completion
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return 0.0
    match = _R1.fullmatch(text)
    return float(match is not None and bool(match.group(2).strip()))


def hash_format(example: Example, completion: str) -> float:
    """1 where the one `#### number` is the last line."""
    del example
    if completion.count("####") != 1:
        return 0.0
    last = completion.rstrip()[completion.rstrip().rfind("\n") + 1 :]
    number = last.removeprefix("####")
    return float(number != last and one_number(number) is not None)


def length_reward(
    example: Example, completion: str, *, start: float, end: float, tokens: int
) -> float:
    """0 up to `start` tokens, falling in a straight line to -1 at `end` tokens."""
    del example, completion
    return -min(max((tokens - start) / (end - start), 0.0), 1.0)


VERIFIERS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        "exact": exact,
        "verbatim": verbatim,
        "gsm8k": gsm8k,
        "number_or_exact": number_or_exact,
        "math": math,
        "countdown": countdown,
        "boxed_format": boxed_format,
        "r1_format": r1_format,
        "hash_format": hash_format,
        "length": length_reward,
    }
)

# Those that are 1 or 0.
ZERO_OR_ONE = {name: f for name, f in VERIFIERS.items() if name != "length"}


# Those that compare with the gold.
ANSWERS = ("exact", "verbatim", "gsm8k", "number_or_exact", "math", "countdown")
_EXPECTED = {
    "gsm8k": "one number, such as 72, -5, 2.5, 1,080, 3/4 or 1 1/2, alone, after "
    "'####' or in a \\boxed{}",
    "math": "LaTeX of an answer, such as \\frac{1}{2}, alone or in a \\boxed{}",
}


def _gold_number(answer: str) -> Fraction | None:
    """The number of a gold: all of it, or what follows its marker."""
    marked = marked_answer(answer)
    return one_number(answer if marked is None else marked)


def _math_gold(answer: str) -> str:
    """The LaTeX of a gold, which may still be in its box, or after the ####."""
    marked = marked_answer(answer)
    return (answer if marked is None else marked).strip()


@functools.lru_cache(maxsize=100_000)
def check_gold(name: str, answer: str) -> str | None:
    """The reason why a verifier refuses this gold answer, or None.

    The gold's own text, written as the final answer, must score 1 whatever the form of
    that answer, and no other number may.
    """
    if name not in ANSWERS:
        return None
    if name in ("gsm8k", "math") and (several := several_answers(answer)):
        return f"it marks several answers ({', '.join(x[:40] for x in several[:3])})"
    if name in ("gsm8k", "math") and (longer := part_of(answer)):
        return f"its \\boxed is part of something longer: {longer!r}"
    if name == "gsm8k" or (name == "number_or_exact" and _is_number(answer)):
        return _check_number(answer)
    if not answer.strip():
        return "it is empty"
    if name == "math":
        return _check_latex(_math_gold(answer))
    if name == "countdown":
        try:
            countdown_numbers(answer)
        except ValueError as error:
            return str(error)
    return None


def refusal(name: str, answer: str) -> str | None:
    """`check_gold` with the answer and what was expected, for an error."""
    reason = check_gold(name, answer)
    if reason is None:
        return None
    shown = answer if len(answer) <= 60 else f"{answer[:40]}...{answer[-10:]}"
    expected = _EXPECTED.get(name, "the text of an answer")
    return f"{reason}; expected {expected}, got {shown!r}"


def _check_number(answer: str) -> str | None:
    gold = _gold_number(answer)
    if gold is None:
        if reason := too_many_digits(marked_answer(answer) or answer):
            return f"it {reason}"
        return f"it ends on no number: {answer[-40:]!r}"
    if PLAIN.fullmatch(answer):
        return None
    forms = [f"#### {answer}", f"\\boxed{{{answer}}}", f"The answer is {answer}."]
    if marked_answer(answer) is None and {final_number(x) for x in forms} != {gold}:
        return "it can be read in two ways"
    return None


def _check_latex(gold: str) -> str | None:
    if not gold:
        return "it is empty"
    if re.fullmatch(r"[+-]?(nan|inf|infinity)", gold, re.IGNORECASE):
        return "it is no number"
    if reason := too_many_digits(gold):
        return f"it {reason}"
    if last_boxed(f"\\boxed{{{gold}}}") != gold:
        return f"its braces do not match, or it is too long: {gold[:40]!r}"
    if hidden := re.search(r"[\x00-\x08\x0e-\x1f\x7f\u200b-\u200f\u2060\ufeff]", gold):
        return f"it holds a character that is not seen, {hidden[0]!r}"
    if re.search(r"\banswer\s*(?:is\b|[:=])", gold, re.IGNORECASE):
        return "it is a sentence"
    if re.fullmatch(r"[0-9]+\s*[-\u2010-\u2013]\s*[0-9]+", gold):  # a range or a score
        return "it can be read in two ways"
    if missing := incomplete(gold):
        return f"its LaTeX is not complete: {missing}"
    answer = read_answer(gold)
    if same_answer(answer, answer) is not True:
        return "nothing of it can be compared"
    return None


def shortened(name: str, completion: str, thinking: float = 0.0) -> str:
    """A shorter text with the same verdict, to be sent to a worker.

    For `math` the answer alone, for the others that search for an answer the tail; for
    the exact match, the formats and a user's function the full completion.
    """
    if thinking and name in ANSWERS:
        answer = answering(completion, thinking)
        return "</think>" + shortened(name, answer) if answer else ""
    if name == "math":
        answer = last_boxed(completion[-TAIL:])
        return f"\\boxed{{{answer}}}" if answer else ""
    if name in ("gsm8k", "countdown"):
        return completion[-TAIL:]
    return "" if name == "length" else completion
