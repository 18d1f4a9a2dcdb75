r"""Whether LaTeX is complete: every command and operator has what belongs to it.

\frac{1}, 2 + and \left( 1 have a spelling that can be compared, but no meaning.
"""

import re

_TWO = ("frac", "dfrac", "tfrac", "cfrac", "binom", "dbinom")
_ONE = ("sqrt", "text", "mathbb", "mathrm", "overline", "vec", "hat", "bar")
_ARGUMENTS = {name: 2 for name in _TWO} | {name: 1 for name in _ONE}
_COMMAND = re.compile(r"\\([A-Za-z]+)|\\.|([\^_])", re.DOTALL)
_OPTIONAL = re.compile(r"\s*\[[^\[\]]*\]")
_TOKEN = re.compile(r"\s*(?:\\[A-Za-z]+|[^\s{}^_&\\])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_OPERATORS = r"(?:cdot|times|div|pm|mp|leq?|geq?|neq?|cup|cap|in|setminus)"
# A charge, Na^+, and a grade, A-, end on a sign.
_END = re.compile(rf"(?:(?<![\^{{A-Za-z+-])[+-]|(?<!\^)[*/=<>]|\\{_OPERATORS})\s*$")
_START = re.compile(r"[*/)}]|\\(?:cdot|times|div|cup|cap)(?![A-Za-z])")


def incomplete(text: str) -> str | None:
    """What is missing in a LaTeX answer, in words; None where nothing is."""
    text = re.sub(r"\$|\\[()]", " ", text).strip()
    for match in _COMMAND.finditer(text):
        end = match.end()
        if match[1] == "sqrt" and (root := _OPTIONAL.match(text, end)):
            end = root.end()
        for _ in range(1 if match[2] else _ARGUMENTS.get(match[1] or "", 0)):
            following = _argument(text, end)
            if following is None:
                return f"an argument of its {match[0]} is missing"
            end = following
    if end := _END.search(text):
        return f"nothing follows its {end[0].strip()}"
    if start := _START.match(text):
        return f"nothing stands before its {start[0]}"
    for left, right in (("left", "right"), ("begin", "end")):
        counts = (
            len(re.findall(rf"\\{side}(?![A-Za-z])", text)) for side in (left, right)
        )
        if len(set(counts)) > 1:
            return rf"its \{left} and \{right} do not match"
    return None if _closed(text) else "its brackets do not match"


def _argument(text: str, start: int) -> int | None:
    """Where the argument at `start` ends; None where there is none, or an empty one."""
    if token := _TOKEN.match(text, start):
        return token.end()
    start += len(text[start:]) - len(text[start:].lstrip())
    if text[start : start + 1] != "{":
        return None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.end() if text[start + 1 : brace.start()].strip() else None
    return None


def _closed(text: str) -> bool:
    """Whether each bracket is closed by one of any kind, but for words and choices, as
    in B), and open intervals such as ]0, 1[."""
    if re.search(r"\\text|[A-Za-z]\)$", text):
        return True
    text = re.sub(r"[\[\]]([^()\[\]]*,[^()\[\]]*)[\[\]]", r"(\1)", text)
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0
