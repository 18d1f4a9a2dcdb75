"""The answer a completion commits to: its last box, or the number it ends on.

Linear in the text, and fails closed: an answer that is cut off, empty or absurdly long
is no answer.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_ANSWER = 4000  # characters; the longest gold of MATH has 420
MAX_DIGITS = 100  # of a number that is compared by value

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]}}])(?P<sign>-))?(?:[$€£](?P<sign2>-)?)?"
    rf"(?P<value>{NUMBER})(?:/(?P<below>[0-9]+)(?![.,]?[0-9]))?"
)
_HASHES = re.compile(r"####([^\n]*)")
_LINE_NUMBER = re.compile(
    rf"(?P<sign>-)?[$€£]?(?P<sign2>-)?(?P<value>{NUMBER})(?:/(?P<below>[0-9]+))?"
    r"%?[^0-9]*"
)
_FRAC = re.compile(r"(-?)\\[dtc]?frac\{(-?[0-9]+)\}\{([0-9]+)\}")


def boxes(text: str) -> Iterator[str | None]:
    """The content of each \\boxed, in order; None for one that is never closed."""
    for match in _BOX.finditer(text):
        yield _box_at(text, match.end())


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, or None where it is missing or not closed.

    An unterminated last box gives None, whatever boxes come before it.
    """
    ends = [text.rfind("\\boxed"), text.rfind("\\fbox")]
    match = _BOX.match(text, max(ends)) if max(ends) >= 0 else None
    if match is None:
        return None
    return _box_at(text, match.end())


def _box_at(text: str, start: int) -> str | None:
    """The content of the box whose \\boxed ends at `start`."""
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
    box, gives None, whatever numbers come before it.
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
    """The value of a text that is one number, with or without currency, %, a final
    period or a unit; None for any other text."""
    text = re.sub(r"\\[$!,;: ]|\$|\\(?=%)|\s", "", text.replace("\N{MINUS SIGN}", "-"))
    text = text.replace("{,}", ",").replace("**", "")
    if fraction := _FRAC.fullmatch(text):
        sign, above, below = fraction.groups()
        return rational_of(sign + above if not above.startswith("-") else above, below)
    return _value(_LINE_NUMBER.fullmatch(text))


def _value(match: re.Match | None) -> Fraction | None:
    if match is None:
        return None
    groups = match.groupdict()
    minus = (groups["sign"] or "") + (groups["sign2"] or "")
    if minus == "--":
        return None
    return rational_of(minus + groups["value"].replace(",", ""), groups["below"] or "1")


def rational_of(above: str, below: str) -> Fraction | None:
    """above / below; None for a zero denominator or more than MAX_DIGITS digits."""
    if len(above) > MAX_DIGITS or len(below) > MAX_DIGITS or not below.strip("0"):
        return None
    return Fraction(above) / int(below)
