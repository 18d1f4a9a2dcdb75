"""LaTeX answers: one spelling for what is written in many ways, and their comparison.

Linear in the text, without sympy: what the spelling cannot decide is left to
`symbolic.py`.
"""

import re
from typing import NamedTuple

from grpo_jax.rewards.arithmetic import exact_value
from grpo_jax.rewards.numbers import ENDLESS, SCALE

_SPACES = re.compile(r"(\\\\)|\\!\s*|\\(?:[,;: ]|q?quad(?![A-Za-z]))|~")
_SIZES = re.compile(
    r"\\(?:left|right)\s*\.(?![0-9])|"
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])"
)
_TEXT = re.compile(
    r"\\(?:mbox|textnormal|textrm|textbf|textit|mathrm|mathbf|mathit|operatorname)"
    r"(?=\s*\{)"
)
_WORDS = re.compile(r"\\text\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degree|°")
_SYMBOLS = {
    "\N{MINUS SIGN}": "-",
    "π": r"\pi ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "≤": r"\leq ",
    "≥": r"\geq ",
    "×": r"\cdot ",
    "·": r"\cdot ",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    "{,}": ",",
}
_COMMANDS = {"le": "leq", "ge": "geq", "ne": "neq", "times": "cdot"}
_COMMANDS |= {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac"}
_TOKEN = r"(?:\s*(?=[0-9\\])|\s+|(?<=\}))([0-9A-Za-z]|\\pi(?![A-Za-z]))"
_PREFIX = re.compile(r"([A-Za-z\\][A-Za-z\\_{}'() ^0-9]*?|\([a-z, ]+\))\s*(?:=|\\in )")
# Answers with two different units of this table differ; other words are ignored.
_UNITS = {
    word: names[0]
    for names in (
        ["inch", "inches", "in"],
        ["foot", "feet", "ft"],
        ["yard", "yards", "yd"],
        ["mile", "miles", "mi"],
        ["millimeter", "millimeters", "mm"],
        ["centimeter", "centimeters", "centimetres", "cm"],
        ["meter", "meters", "metres", "m"],
        ["kilometer", "kilometers", "kilometres", "km"],
        ["second", "seconds", "sec", "s"],
        ["minute", "minutes", "min"],
        ["hour", "hours", "hr", "hrs", "h"],
        ["day", "days"],
        ["week", "weeks"],
        ["month", "months"],
        ["year", "years"],
        ["cent", "cents"],
        ["dollar", "dollars", "usd"],
        ["euro", "euros"],
        ["ounce", "ounces", "oz"],
        ["pound", "pounds", "lb", "lbs"],
        ["gram", "grams", "g"],
        ["kilogram", "kilograms", "kg"],
        ["degree", "degrees"],
        ["radian", "radians"],
        ["percent", "percents"],
        ["mph"],
        ["a.m.", "a.m", "am"],
        ["p.m.", "p.m", "pm"],
        ["unit", "units"],
    )
    for word in names
}
_POWER = r"(?:\^\s*\{?([0-9])\}?)?"
_TEXT_UNIT = re.compile(rf"(?s)(.*\S)\s*\\text\s*\{{([^{{}}]*)\}}{_POWER}")
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3"}
_SYMBOL_UNITS = [  # of the whole answer: $5, 5%, 5 degrees
    (re.compile(r"-?\s*\\\$[^$]*"), "dollar"),
    (re.compile(r"(?s).*\\?%"), "percent"),
    (re.compile(rf"(?s).*(?:{_DEGREES.pattern})"), "degree"),
]
_BARE_UNIT = re.compile(
    rf"(.*[0-9}}])\s*({'|'.join(re.escape(u) for u in _UNITS if len(u) > 2)})" + _POWER
)
_OPEN, _CLOSE = "([{", ")]}"


class Answer(NamedTuple):
    """A LaTeX answer reduced to what carries its meaning.

    Attributes:
        prefix: The left side: "x" in x = 5; "" where there is none.
        body: The answer itself, LaTeX that can still be parsed.
        unit: Canonical unit where it is one of the table, else "".
    """

    prefix: str
    body: str
    unit: str

    def equation(self) -> str:
        """The body with its prefix, for a comparison with an equation."""
        return f"{self.prefix}={self.body}" if self.prefix else self.body


def read_answer(text: str) -> Answer:
    """Reads an answer, with one spelling for what LaTeX has several for."""
    text = re.sub(r"^\s*\\[(\[](.*)\\[)\]]\s*$", r"\1", text)  # \(5\)
    text = re.sub(r"^\s*=", "", text)
    for old, new in _SYMBOLS.items():
        text = text.replace(old, new)
    text = re.sub(r"(?<=[0-9]),\s*\\!\s*(?=[0-9]{3})", "", text)  # 20,\!000
    text = _SPACES.sub(_space, text)
    symbol = _symbol_unit(text.strip().rstrip(".,;: "))
    text = re.sub(r"\\\$|\$|\\[()\[\]](?![0-9])", "", text)
    text = _SIZES.sub("", text)
    text = _TEXT.sub(r"\\text", text)
    text = re.sub(r"\\([A-Za-z]+)", _command, text)
    text = re.sub(r"\s*,?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}\s*", ", ", text)
    text = re.sub(r"(?<=[\s0-9}]),?\s+(?:and|or)\s+", ", ", text)
    text = ENDLESS.sub(r"\1\\ldots ", _DEGREES.sub("", text))
    text = text.strip().rstrip(".,;: ")
    if (words := _WORDS.fullmatch(text)) and re.search("[0-9]", text):
        text = words.group(1).rstrip(".,;: ")
    text, unit = _without_unit(text)
    unit = unit or symbol
    text = re.sub(r"\\?%", "", text).strip()
    text = re.sub(r"^\\approx(?![A-Za-z])\s*", "", text)
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    text = re.sub(rf"\\(frac|sqrt){_TOKEN}", r"\\\1{\2}", text)
    text = re.sub(rf"(\\frac\{{[^{{}}]*\}}){_TOKEN}", r"\1{\2}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    prefix = _PREFIX.match(text)
    if prefix and text.count("=") <= 1 and prefix.end() < len(text):
        name = re.sub(r"\s", "", prefix.group(1))
        if not balanced(name):  # the = of \sum_{n=1} says nothing about the answer
            return Answer("", text, unit)
        return Answer(name, text[prefix.end() :].strip(), unit)
    return Answer("", text, unit)


def _space(match: re.Match) -> str:
    row_break, negative = match.group(1), match.group().startswith(r"\!")
    return row_break or ("" if negative else " ")


def _command(match: re.Match) -> str:
    name = match.group(1)
    return f"\\{_COMMANDS.get(name, name)}"


def _symbol_unit(text: str) -> str:
    return next((unit for mark, unit in _SYMBOL_UNITS if mark.fullmatch(text)), "")


def _without_unit(text: str) -> tuple[str, str]:
    """(text without its unit, canonical unit or "")."""
    match = _TEXT_UNIT.fullmatch(text) or _BARE_UNIT.fullmatch(text)
    if match is None or match.group(1)[-1] in "_^{([,=+-":
        return text, ""
    words = match.group(2).lower().split()
    if not words or not all(re.fullmatch(r"[a-z.]+", word) for word in words):
        return text, ""
    if SCALE.search(match.group(2)):  # 5 million is no 5
        return text, ""
    units = {_UNITS[word] for word in words if word in _UNITS}
    if not units and len(match.group(2).strip()) < 2:  # 3\text{A} is no three amperes
        return text, ""
    # "square feet" has the unit "2 foot"; "miles per hour" the unit "hour mile".
    powers = {_POWERS[word] for word in words if word in _POWERS}
    power = match.group(3) or "".join(sorted(powers))
    units |= {power} if units and power not in ("", "1") else set()
    return match.group(1).rstrip(".,;: "), " ".join(sorted(units))


def same_answer(gold: Answer, answer: Answer) -> bool | None:
    """Whether two answers are the same; None where their spelling cannot decide it.

    Numbers are compared exactly, tuples and intervals part by part, lists and sets in
    any order. Words are compared without case.
    """
    if gold.prefix and answer.prefix and gold.prefix != answer.prefix:
        # f(x) = 5 may be answered by y = 5.
        named = len(gold.prefix) > 1 and len(answer.prefix) == 1
        return None if named else False
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    return _same_body(gold.body, answer.body)


def _same_body(gold: str, answer: str) -> bool | None:
    a, b = _canonical(gold), _canonical(answer)
    if not a or not b:
        return False
    x, y = exact_value(gold), exact_value(answer)
    if x is not None and y is not None:
        return x == y
    if a == b:  # 1, 234 is a list, which is no answer to the number 1,234
        return x is None
    if re.search(r"[0-9]_", a + b):  # 101_2 is a number in base 2, and no other text
        a, b = (re.sub(r"^\((-?[0-9.]+)\)_", r"\1_", x) for x in (a, b))
        return a == b or _same_in_base_ten(a, b) or bool(_same_parts(gold, answer))
    if re.fullmatch(r"\(?[A-Z]\)?", a) and re.fullmatch(r"\(?[A-Z]\)?", b):
        return a.strip("()") == b.strip("()")
    if re.fullmatch(r"\(?[A-Da-d]\)?", a) and re.fullmatch(r"\(?[A-Da-d]\)?", b):
        return a.strip("()").upper() == b.strip("()").upper()  # a choice
    if words := _WORDS.fullmatch(gold):  # to sympy CBAD is a product, equal to ABCD
        return a.casefold() == b.casefold() or bool(_same_parts(words.group(1), answer))
    if a.isalpha() and a.casefold() == b.casefold() and len(a) > 1:
        return True
    kinds = {_kind(gold), _kind(answer)}
    if "tuple" in kinds and (x is not None or y is not None):
        return False
    if x is not None or y is not None:  # 1,234 is a number, not the list 1, 234
        return None
    if (verdict := _same_named(gold, answer)) is not None:
        return verdict
    return False if kinds == {"tuple", "list"} else _same_parts(gold, answer)


def _kind(body: str) -> str:
    """What an answer is by its brackets and commas: "tuple" (point or interval: the
    order of its parts counts), "list" (or set: it does not), or "one"."""
    left, parts, _ = _parts(body)
    if left == r"\{":
        return "list"
    if len(parts) == 1 or exact_value(body) is not None:
        return "one"
    return "tuple" if left else "list"


def _same_named(gold: str, answer: str) -> bool | None:
    """Whether x = 5, y = 3 is the same as 5, 3 or (5, 3), in that order; None for
    answers of any other form."""
    (left, golds, _), (left2, answers, _) = _parts(gold), _parts(answer)
    pair = [[read_answer(part) for part in x] for x in (golds, answers)]
    named, named2 = (len({part.prefix for part in parts} - {""}) > 1 for parts in pair)
    if named == named2 or len(golds) != len(answers):
        return None
    unnamed, bracket = (answers, left2) if named else (golds, left)
    if any("=" in part for part in unnamed):
        return None
    if bracket == r"\{" or (named2 and not bracket):  # a list is in any order
        return False if named else None
    verdicts = [same_answer(g, a) for g, a in zip(*pair, strict=True)]
    return True if all(verdicts) else False if False in verdicts else None


def _same_in_base_ten(a: str, b: str) -> bool:
    """Whether two numbers are the same where base 10 is written out, or is not."""
    values = [exact_value(re.sub(r"_(?:10|\{10\})$", "", x)) for x in (a, b)]
    return values[0] is not None and values[0] == values[1]


def _same_parts(gold: str, answer: str) -> bool | None:
    """`same_answer` of tuples, intervals, lists and sets, part by part."""
    (left, golds, right), (left2, answers, right2) = _parts(gold), _parts(answer)
    if len(golds) == len(answers) == 1 or (left, right) != (left2, right2):
        return None
    if len(golds) != len(answers):
        return None
    golds, answers = ([read_answer(part) for part in x] for x in (golds, answers))
    if left in ("(", "["):
        verdicts = [same_answer(g, a) for g, a in zip(golds, answers, strict=True)]
        return True if all(verdicts) else False if False in verdicts else None
    rest = list(answers)
    for part in golds:
        match = next((i for i, x in enumerate(rest) if same_answer(part, x)), None)
        if match is None:
            return None
        del rest[match]
    return True


def _parts(text: str) -> tuple[str, list[str], str]:
    """(opening bracket, top-level parts, closing bracket) of a tuple, set or list."""
    text = text.strip()
    for left, right in ((r"\{", r"\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and balanced(inner):
            return left, split_parts(inner), right
    parts = []
    for part in split_parts(text):
        both = re.split(r"\\pm(?![A-Za-z])", part)
        parts += [part] if len(both) != 2 else [s.join(both) for s in "+-"]
    return "", parts, ""


def balanced(text: str) -> bool:
    """Whether every bracket is closed, by one of any kind: (1,2] is an interval."""
    depth = 0
    for character in text:
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def split_parts(text: str) -> list[str]:
    """The text cut at commas and semicolons outside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and character in ",;":
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]]]


def _canonical(body: str) -> str:
    """The body without spaces and \\text."""
    return _without_spaces(_WORDS.sub(r"\1", body))


def _without_spaces(text: str) -> str:
    # A space between digits stays: 1 2 is not 12.
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text).removeprefix("+")
