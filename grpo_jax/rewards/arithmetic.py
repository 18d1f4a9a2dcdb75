r"""Exact values of LaTeX arithmetic: 1.5\times 10^{-1}, 0.2^2, \frac{0.1+0.2}{3}.

Numbers, + - * /, whole powers, fractions and brackets only, as rationals: a decimal is
the number that it spells. All else, and what would be huge, has no value here.
"""

import functools
import re
from fractions import Fraction

from grpo_jax.rewards.numbers import plain_fractions, plain_number

MAX_BITS = 20_000  # of a value's numerator and denominator
MAX_LENGTH = 400  # characters

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# Times, dates and versions, which only look like arithmetic.
NOT_ARITHMETIC = re.compile(
    r"(?<![0-9])[0-9]{1,2}:[0-5][0-9](?![0-9])|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?![0-9])|"
    r"[0-9]\s*/\s*[0-9]+\s*/\s*[0-9]|[0-9]\.[0-9]*\.|(?<![0-9])0x[0-9a-fA-F]"
)
_REPEATING = re.compile(r"([0-9]+\.[0-9]*)\\overline\{([0-9]+)\}")
_TOKEN = re.compile(rf"\s*(?:({_NUMBER})|(\\[A-Za-z]+|[-+*/^(){{}}]))")
_OPERATORS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "×": "*", "·": "*"}


class _NoValueError(ValueError):
    """The text is not arithmetic."""


@functools.lru_cache(maxsize=10_000)
def exact_value(body: str) -> Fraction | None:
    """The value of a number, or of arithmetic on numbers; None for any other text."""
    value = plain_number(plain_fractions(body))
    if value is not None or len(body) > MAX_LENGTH or NOT_ARITHMETIC.search(body):
        return value
    if repeating := _REPEATING.fullmatch(body.strip()):  # 0.1\overline{6} is 1/6
        start, again = repeating.groups()
        places = len(start.partition(".")[2])
        return Fraction(start) + Fraction(
            int(again), 10**places * (10 ** len(again) - 1)
        )
    try:
        return _Reader(body).read()
    except (_NoValueError, ZeroDivisionError, RecursionError):
        return None


class _Reader:
    """sum = [-] product ([+-] product)*; product = power ([*/] power)*, where two
    powers side by side are a product if one of them is in brackets."""

    def __init__(self, text: str):
        self.tokens: list[str] = []
        if comma_in_brackets(text):  # (3,456) is a pair
            raise _NoValueError
        for old, new in _OPERATORS.items():
            text = re.sub(re.escape(old) + r"(?![A-Za-z])", new, text)
        text, end = text.strip(), 0
        while end < len(text):
            match = _TOKEN.match(text, end)
            if match is None:
                raise _NoValueError
            self.tokens.append(match[1] or match[2])
            end = match.end()
        self.tokens.reverse()  # the next one is the last

    def read(self) -> Fraction:
        """The value; _NoValueError where the text is not all read."""
        value = self._sum()
        if self.tokens:
            raise _NoValueError
        return value

    def _next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def _take(self, *choices: str) -> str:
        if self._next() not in choices:
            raise _NoValueError
        return self.tokens.pop()

    def _sum(self) -> Fraction:
        sign = -1 if self._next() == "-" else 1
        if self._next() in ("+", "-"):
            self.tokens.pop()
        value = sign * self._product()
        while self._next() in ("+", "-"):
            sign = 1 if self.tokens.pop() == "+" else -1
            value += sign * self._product()
        return value

    def _product(self) -> Fraction:
        value, divided = self._power(), False
        while True:
            bracket = self._next() == "("
            if self._next() in ("*", "/"):
                divided = divided or self._next() == "/"
                times = self.tokens.pop() == "*"
                sign = 1
                if self._next() == "-":  # 2 \cdot -3
                    self.tokens.pop()
                    sign = -1
                other = sign * self._power()
            elif bracket and not divided:  # 1/2(3) can be read in two ways
                times, other = True, self._power()
            else:
                return value
            value = _bounded(value * other if times else value / other)

    def _power(self) -> Fraction:
        base = self._atom()
        if self._next() != "^":
            return base
        self.tokens.pop()
        exponent = self._exponent()
        if exponent.denominator != 1 or self._next() == "^":
            raise _NoValueError
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * size > MAX_BITS:
            raise _NoValueError
        if not base and exponent <= 0:
            raise _NoValueError
        return base ** int(exponent)

    def _exponent(self) -> Fraction:
        if self._next() == "{":
            return self._group("{", "}")
        digits = self.tokens.pop() if self.tokens else ""
        if not re.fullmatch(r"[0-9]", digits):  # 10^12 is 10^1 beside a 2
            raise _NoValueError
        return Fraction(digits)

    def _group(self, left: str, right: str) -> Fraction:
        self._take(left)
        value = self._sum()
        self._take(right)
        return value

    def _atom(self) -> Fraction:
        token = self._next()
        if token in ("(", "{"):
            return self._group(token, ")" if token == "(" else "}")
        if token == "\\frac":
            self.tokens.pop()
            above = self._group("{", "}")
            return _bounded(above / self._group("{", "}"))
        if not token[:1].isdecimal() and not token.startswith("."):
            raise _NoValueError
        value = plain_number(self.tokens.pop())
        if value is None or self._next()[:1].isdecimal() or self._next() == "\\frac":
            raise _NoValueError  # 2 3, 2\frac{3}{2}
        return value


def comma_in_brackets(text: str) -> bool:
    """Whether a comma stands between ( and ), or [ and ]."""
    depth = 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth > 0:
            return True
    return False


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NoValueError
    return value
