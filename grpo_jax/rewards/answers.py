"""The answer a completion commits to, and when two answers are the same.

Everything here is linear in the text, imports nothing, and fails closed: an answer that
is cut off, empty or absurdly long is no answer.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MAX_ANSWER = 4000  # characters; the longest gold of MATH has 420
MAX_DIGITS = 100  # of a number that is compared by value

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]}}])(?P<sign>-))?(?:[$€£](?P<sign2>-)?)?"
    rf"(?P<value>{_NUMBER})(?:/(?P<below>[0-9]+)(?![.,]?[0-9]))?"
)
_HASHES = re.compile(r"####([^\n]*)")
_LINE_NUMBER = re.compile(
    rf"(?P<sign>-)?[$€£]?(?P<sign2>-)?(?P<value>{_NUMBER})(?:/(?P<below>[0-9]+))?"
    r"%?[^0-9]*"
)
_FRAC = re.compile(r"(-?)\\[dtc]?frac\{(-?[0-9]+)\}\{([0-9]+)\}")


def boxes(text: str) -> Iterator[str | None]:
    """What each \\boxed holds, in order; None for one that is never closed."""
    for match in _BOX.finditer(text):
        yield _box_at(text, match.end())


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, or None where it is missing or not closed.

    An unterminated box is the completion's last word: no earlier box stands in for it.
    """
    ends = [text.rfind("\\boxed"), text.rfind("\\fbox")]
    match = _BOX.match(text, max(ends)) if max(ends) >= 0 else None
    if match is None:
        return None
    return _box_at(text, match.end())


def _box_at(text: str, start: int) -> str | None:
    window = text[start : start + MAX_ANSWER]
    body = window.lstrip()
    if not body.startswith("{"):  # TeX boxes the next token: \boxed 2
        one = re.match(r"[0-9A-Za-z](?![0-9A-Za-z.,])", body)
        return one.group() if one else None
    depth = 0
    for brace in _BRACE.finditer(body):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # \{ opens no group
        if depth == 0:
            return body[1 : brace.start()].strip()
    return None


def final_number(text: str) -> Fraction | None:
    """The number a completion ends on: its last `#### n` or \\boxed{n}, else its last.

    Commas between thousands, $ and % and words after the number are dropped; 24.0 is
    24, 1/2 is a half. A last marker without exactly one number, or an unterminated
    box, gives None: no other number stands in for it.
    """
    hashes, box = text.rfind("####"), max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if max(hashes, box) >= 0:
        if box > hashes:
            return one_number(last_boxed(text) or "")
        match = _HASHES.match(text, hashes)
        return one_number(match.group(1)) if match else None
    text = text[-2 * MAX_ANSWER :].replace("\N{MINUS SIGN}", "-")
    numbers = list(_LAST_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def one_number(text: str) -> Fraction | None:
    """The number that `text` is, but for currency, %, a final period or a unit."""
    text = re.sub(r"\\[$!,;: ]|\$|\\(?=%)|\s", "", text.replace("\N{MINUS SIGN}", "-"))
    text = text.replace("{,}", ",").replace("**", "")
    if fraction := _FRAC.fullmatch(text):
        sign, above, below = fraction.groups()
        return _rational(sign + above if not above.startswith("-") else above, below)
    return _value(_LINE_NUMBER.fullmatch(text))


def _value(match: re.Match | None) -> Fraction | None:
    if match is None:
        return None
    groups = match.groupdict()
    minus = (groups["sign"] or "") + (groups["sign2"] or "")
    if minus == "--":
        return None
    return _rational(minus + groups["value"].replace(",", ""), groups["below"] or "1")


def _rational(above: str, below: str) -> Fraction | None:
    if len(above) > MAX_DIGITS or len(below) > MAX_DIGITS or not below.strip("0"):
        return None
    return Fraction(above) / int(below)


# ---- answers of MATH: LaTeX that is written in many ways ----
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
# Of two units that are both known and differ, one is wrong; any other words are passed.
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
_TEXT_UNIT = re.compile(r"(?s)(.*\S)\s*\\text\s*\{([^{}]*)\}(?:\^\s*\{?[0-9]\}?)?")
_BARE_UNIT = re.compile(
    rf"(.*[0-9}}])\s*({'|'.join(re.escape(u) for u in _UNITS if len(u) > 2)})"
    r"(?:\^\s*\{?[0-9]\}?)?"
)
_OPEN, _CLOSE = "([{", ")]}"


class Answer(NamedTuple):
    """A LaTeX answer without what does not change its meaning.

    Attributes:
        prefix: What it is said to be the value of: "x" in x = 5; "" otherwise.
        body: The answer itself, LaTeX that can still be parsed.
        unit: Canonical unit, where it is a known one.
    """

    prefix: str
    body: str
    unit: str

    def equation(self) -> str:
        """With the prefix again, for a comparison with an equation."""
        return f"{self.prefix}={self.body}" if self.prefix else self.body


def read_answer(text: str) -> Answer:
    """`text` with one spelling for what LaTeX has several for."""
    for old, new in _SYMBOLS.items():
        text = text.replace(old, new)
    text = re.sub(r"(?<=[0-9]),\\!\s*(?=[0-9]{3})", "", text)  # 20,\!000
    text = _SPACES.sub(_space, text)
    text = re.sub(r"\\\$|\$|\\[()\[\]](?![0-9])", "", text)
    text = _SIZES.sub("", text)
    text = _TEXT.sub(r"\\text", text)
    text = re.sub(r"\\([A-Za-z]+)", _command, text)
    text = re.sub(r"\s*,?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}\s*", ", ", text)
    text = re.sub(r"(?<=[\s0-9}]),?\s+(?:and|or)\s+", ", ", text)
    text = _DEGREES.sub("", text)
    text = text.strip().rstrip(".,;: ")
    if (words := _WORDS.fullmatch(text)) and re.search("[0-9]", text):
        text = words.group(1).rstrip(".,;: ")
    text, unit = _without_unit(text)
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


def _without_unit(text):
    match = _TEXT_UNIT.fullmatch(text) or _BARE_UNIT.fullmatch(text)
    if match is None or match.group(1)[-1] in "_^{([,=+-":
        return text, ""
    words = match.group(2).lower().split()
    if not words or not all(re.fullmatch(r"[a-z.]+", word) for word in words):
        return text, ""
    known = {_UNITS[word] for word in words if word in _UNITS}
    if not known and len(match.group(2).strip()) < 2:  # 3\text{A} is no three amperes
        return text, ""
    # A known unit stays one through "square" and "per"; two of them are a new one.
    return match.group(1).rstrip(".,;: "), " ".join(sorted(known))


def rational(body: str) -> Fraction | None:
    """The rational number spelled out: 1,234 or 2.50 or 3/4 or 1\\frac{1}{2}."""
    text = _without_spaces(body)
    if re.fullmatch(rf"-?(?:{_NUMBER})", text):
        return _rational(text.replace(",", ""), "1")
    if match := re.fullmatch(r"(-?[0-9]+)/([0-9]+)", text):
        return _rational(*match.groups())
    match = re.fullmatch(r"(-?)([0-9]*)\\frac\{(-?[0-9]+)\}\{([0-9]+)\}", text)
    if match is None:
        return None
    sign, whole, above, below = match.groups()
    part = _rational(above, below)
    if part is None or (whole and not 0 <= part < 1) or len(whole) > MAX_DIGITS:
        return None
    return (-1 if sign else 1) * (int(whole or 0) + part)


def same_answer(gold: Answer, answer: Answer) -> bool | None:
    """Whether the two are one answer as far as their spelling tells; None: it does not.

    Numbers are compared exactly, tuples and intervals part by part, lists and sets in
    any order. Words are compared without case.
    """
    if gold.prefix and answer.prefix and gold.prefix != answer.prefix:
        return None if _is_name(gold.prefix) < _is_name(answer.prefix) else False
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    return _same(gold.body, answer.body)


def _is_name(prefix):
    return len(prefix) == 1


def _same(gold: str, answer: str) -> bool | None:
    a, b = _key(gold), _key(answer)
    if not a or not b:
        return False
    if a == b:
        return True
    numbers = rational(gold), rational(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if re.search(r"[0-9]_", a + b):  # a base may be left out, never changed
        return re.sub(r"_.*", "", a) == b and rational(b) is not None
    if re.fullmatch(r"\(?[A-Z]\)?", a) and re.fullmatch(r"\(?[A-Z]\)?", b):
        return a.strip("()") == b.strip("()")
    if words := _WORDS.fullmatch(gold):  # to sympy CBAD is a product, equal to ABCD
        return a.casefold() == b.casefold() or bool(_same_parts(words.group(1), answer))
    if a.isalpha() and a.casefold() == b.casefold() and len(a) > 1:
        return True
    return _same_parts(gold, answer)


def _same_parts(gold, answer):
    (left, gold_parts, right), (left2, parts, right2) = _parts(gold), _parts(answer)
    if len(gold_parts) == len(parts) == 1 or (left, right) != (left2, right2):
        return None
    if len(gold_parts) != len(parts):
        return None
    if left in ("(", "["):
        verdicts = [
            same_answer(read_answer(g), read_answer(a))
            for g, a in zip(gold_parts, parts, strict=True)
        ]
        return True if all(verdicts) else False if False in verdicts else None
    rest = list(parts)
    for part in gold_parts:
        for other in rest:
            if same_answer(read_answer(part), read_answer(other)):
                rest.remove(other)
                break
        else:
            return None
    return True


def _parts(text):
    """(opening bracket, top-level parts, closing bracket) of a tuple, set or list."""
    text = text.strip()
    for left, right in ((r"\{", r"\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and balanced(inner):
            return left, _split(inner), right
    parts = []
    for part in _split(text):
        both = re.split(r"\\pm(?![A-Za-z])", part)
        parts += [part] if len(both) != 2 else [s.join(both) for s in "+-"]
    return "", parts, ""


def balanced(text: str) -> bool:
    """Whether every bracket is closed, whatever its kind: (1,2] is an interval."""
    depth = 0
    for character in text:
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def _split(text):
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and character in ",;":
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]]]


def _key(body):
    text = _WORDS.sub(r"\1", body)
    return _without_spaces(text)


def _without_spaces(text):
    # 1 2 is no 12.
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text).removeprefix("+")
