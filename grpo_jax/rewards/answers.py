"""The answer a completion commits to: its last box, or the number it ends on.

Linear in the text, and fails closed: an answer that is cut off, empty or absurdly long
is no answer.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

from grpo_jax.rewards.numbers import ending_number, one_number

MAX_ANSWER = 4000  # characters; the longest gold of MATH has 420

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BASE = re.compile(r" *_(?:[0-9]|\{ *[0-9]+ *\})")  # \\boxed{101}_2 is 101_2
# What makes a box a part of something longer, such as -\\boxed{5} or \\boxed{5}/6.
_PART_BEFORE = re.compile(
    r"(?:[-+\u2212/^_]|(?<!\*)\*|\\(?:times|cdot|div|pm))[ $]*\Z|[0-9][:.]?\Z|"
    r"(?:[\^_]|\\(?:[dtc]?frac|binom)(?:\{[^{}]*\})?|\\sqrt)\{\Z"
)
_PART_AFTER = re.compile(
    r"[ $~]*(?:\^(?!\s*\{?\s*\\circ)|[_!/]|\*(?!\*)|[-+] *[0-9\\]|"
    r"\\(?:pi|sqrt|[dtc]?frac|times|cdot|div|pm)(?![A-Za-z])|"
    r"(?:dozen|hundred|thousand|million|billion|trillion)s?\b)|[0-9{]"
)
_OR_BEFORE = re.compile(r"[0-9}][\s$}]*\bor[\s$]*$")
_OR_AFTER = re.compile(r"[\s$}]*or[\s$]+[-+]?[0-9\\]\S*")
_HASHES = re.compile(r"####([^\n]*)")


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
            inside = body[1 : brace.start()].strip()
            base = _BASE.match(body, brace.end())
            number = re.fullmatch(r"-?[0-9.]+", inside)
            return f"{inside}{base[0].strip()}" if base and number else inside
    return None


def final_number(text: str) -> Fraction | None:
    """The number a completion ends on: its last `#### n` or \\boxed{n}, else its last.

    What is a number, and what may stand around it, is said in `numbers`: $, % and a
    unit are dropped; 24.0 is 24, 1/2 is a half. A last marker without exactly one
    number, or an unterminated box, gives None, whatever numbers come before it.
    """
    if (marked := marked_answer(text)) is not None:
        return one_number(marked)
    return ending_number(text[-2 * MAX_ANSWER :])


def several_answers(text: str) -> list[str]:
    """The answers that a text marks by `####` or \\boxed, where they are not the same
    or an "or" joins another one to the last; else []."""
    marked = [part.partition("\n")[0] for part in text.split("####")[1:]]
    marked = [m for m in marked if not _BOX.search(m)]  # "#### \\boxed{5}"
    marked = list(dict.fromkeys(m.strip() for m in [*marked, *boxes(text)] if m))
    if len(marked) > 1:
        return marked
    before, after = _around_box(text)
    joined = _OR_BEFORE.search(before) or _OR_AFTER.match(after)
    return [*marked, joined[0].strip()] if joined else []


def part_of(text: str) -> str | None:
    """What the last \\boxed of a text is a part of: a gold of -\\boxed{5} is no 5."""
    before, after = _around_box(text)
    if _PART_BEFORE.search(before) or _PART_AFTER.match(after):
        return text.strip()[-60:]
    return None


def _around_box(text: str) -> tuple[str, str]:
    """(up to 80 characters before the last \\boxed{...}, what follows it)."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    inside = last_boxed(text)
    if start < 0 or not inside:
        return "", ""
    depth = 0
    for brace in _BRACE.finditer(text, start + 5):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            end = brace.end()
            base = _BASE.match(text, end)
            belongs = base is not None and inside.endswith(base[0].strip())
            return text[:start][-80:], text[base.end() if base and belongs else end :]
    return text[:start][-80:], ""  # \\boxed 5


def marked_answer(text: str) -> str | None:
    """What follows the last `####` on its line, or is in the last \\boxed, whichever
    comes later; "" for a box that is not closed, None where there is neither."""
    hashes, box = text.rfind("####"), max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if max(hashes, box) < 0:
        return None
    if box > hashes:
        return last_boxed(text) or ""
    match = _HASHES.match(text, hashes)
    return match.group(1) if match else ""
