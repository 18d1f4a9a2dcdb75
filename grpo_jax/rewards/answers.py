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
            return body[1 : brace.start()].strip()
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
    marked = [match.group(1) for match in _HASHES.finditer(text)]
    marked = [m for m in marked if not _BOX.search(m)]  # "#### \\boxed{5}"
    marked = list(dict.fromkeys(m.strip() for m in [*marked, *boxes(text)] if m))
    if len(marked) > 1:
        return marked
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0 or not marked:
        return []
    end = text.find(marked[0], start) + len(marked[0])
    joined = _OR_BEFORE.search(text[:start][-80:]) or _OR_AFTER.match(text[end:])
    return [*marked, joined[0].strip()] if joined else []


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
