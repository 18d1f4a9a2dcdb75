"""Whether two LaTeX answers are equal: by spelling, then by math_verify on sympy.

What reaches sympy is checked first. latex2sympy turns a grammar, not Python, into
expressions, but it makes symbols of any text inside \\text{...}, and parts of sympy
(`sympify`, `lambdify` in sums) compile strings; so only listed characters and commands
pass, and sums, integrals and limits do not: an answer is worked out.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from grpo_jax.rewards.arithmetic import (
    NOT_ARITHMETIC,
    comma_in_brackets,
    exact_value,
)
from grpo_jax.rewards.latex import balanced, read_answer, same_answer, split_parts
from grpo_jax.rewards.wellformed import incomplete

MAX_SYMBOLIC = 400  # characters that sympy may be given
MAX_DEPTH = 10  # brackets within brackets
MAX_DIGITS = 60  # in a row

_CHARACTERS = re.compile(r"[A-Za-z0-9\s+\-*/^_=<>!|.,;:'()\[\]{}\\&]*")
_COMMAND_NAMES = (
    "frac sqrt pi infty cup cap cdot div pm mp leq geq neq lt gt in text overline vec "
    "sin cos tan sec csc cot arcsin arccos arctan sinh cosh tanh log ln exp binom "
    "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi psi omega "
    "begin end angle triangle emptyset varnothing setminus circ approx lfloor rfloor "
    "lceil rceil mathbb bar hat"
)
_COMMANDS = frozenset(_COMMAND_NAMES.split())
_ENVIRONMENTS = frozenset({"matrix", "pmatrix", "bmatrix", "vmatrix"})


@functools.lru_cache(maxsize=10_000)
def same_math(gold: str, answer: str, *, spelling: bool = True) -> bool:
    """Whether two LaTeX answers are equal; False where that cannot be decided.

    Args:
        spelling: Compare by spelling first; False asks math_verify alone.
    """
    left, right = read_answer(gold), read_answer(answer)
    if spelling:
        verdict = same_answer(left, right)
        if verdict is not None:
            return verdict
    equations = "=" in left.body or "=" in right.body
    bodies = [a.equation() if equations else a.body for a in (left, right)]
    if any(map(NOT_ARITHMETIC.search, bodies)):  # 12:30 is no 2:5
        return "".join(bodies[0].split()) == "".join(bodies[1].split())
    if not _comparable(*bodies):
        return False
    return _same_by_math_verify(*_without_capitals(*map(_spaced, bodies)))


def _spaced(body: str) -> str:
    """The body with a space after each comma in brackets: math_verify takes (3,456)
    for 3456."""
    return re.sub(r",(?=[0-9])", ", ", body) if comma_in_brackets(body) else body


def _without_capitals(*bodies: str) -> list[str]:
    """The bodies with an unused small letter for each capital: to math_verify R is r,
    and E the number e."""
    outside = re.compile(
        r"(\\(?:text|mathbb|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+)|([A-Za-z])"
    )
    used = {m[2] for body in bodies for m in outside.finditer(body) if m[2]}
    free = [x for x in "abcfghjklmnopqrstuvwxyz" if not used & {x, x.upper()}]
    new = {x: x.lower() for x in used}
    for capital in sorted(x for x in used if x.isupper()):
        if capital.lower() in used or capital in "EID":
            new[capital] = free.pop() if free else capital
    return [outside.sub(lambda m: m[1] or new[m[2]], body) for body in bodies]


def refused(body: str) -> str | None:
    """The reason why this text must not reach sympy, or None."""
    if len(body) > MAX_SYMBOLIC:
        return "too long"
    if not _CHARACTERS.fullmatch(body):
        return "a character that is not listed"
    if not balanced(body):
        return "brackets that do not match"
    if incomplete(body):
        return "a command or an operator without its argument"
    if "__" in body:
        return "two underscores"
    if re.search(rf"[0-9]{{{MAX_DIGITS}}}", body):
        return "too many digits"
    if re.search(r"[0-9]\s+[0-9]", body) and exact_value(body) is None:
        return "numbers side by side"
    for command in re.findall(r"\\([A-Za-z]+)", body):
        if command not in _COMMANDS:
            return f"\\{command}"
    for name in re.findall(r"\\(?:begin|end)\s*\{([^{}]*)\}", body):
        if name not in _ENVIRONMENTS:
            return f"environment {name}"
    depth = deepest = 0
    for character in body:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return "nested too deeply" if deepest > MAX_DEPTH else None


def _comparable(gold: str, answer: str) -> bool:
    """Whether math_verify may compare the two."""
    if refused(gold) or refused(answer):
        return False
    if (":" in gold) != (":" in answer):  # 2:5 is no 0.4
        return False
    # math_verify takes the right-hand side of any equation: 2+2=5 would be a 5.
    if "=" in gold and "=" not in answer:  # x = 1, x = 2 is 1, 2; x + y = 5 is no 5
        names = {read_answer(part).prefix for part in split_parts(gold)}
        return len(names) == 1 and "" not in names
    return "=" in gold or "=" not in answer


def _same_by_math_verify(gold: str, answer: str) -> bool:
    parse, verify = load_math_verify()
    left = parse(gold)
    if not left:
        return False
    right = parse(answer)
    if not right or _differ_in_value(left[0], right[0]):
        return False
    return verify(left, right)


def _differ_in_value(left: Any, right: Any) -> bool:
    """Whether two expressions surely have different values at one point.

    The comparison is relative: 1e-20 and 2e-20 differ. Most wrong answers do, and this
    is much quicker than simplifying their difference. False leaves it open. Tuples,
    intervals, sets and matrices differ where their parts do.
    """
    from sympy import Expr, FiniteSet, Interval, MatrixBase, Symbol, Tuple

    if isinstance(left, Interval) and isinstance(right, Interval):
        left, right = (Tuple(x.start, x.end) for x in (left, right))
    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        left, right = Tuple(*left.flat()), Tuple(*right.flat())
    if isinstance(left, FiniteSet) and isinstance(right, FiniteSet):
        return any(all(_differ_in_value(x, y) for y in right) for x in left)
    if isinstance(left, Tuple) and isinstance(right, Tuple):
        return len(left) == len(right) and any(map(_differ_in_value, left, right))
    pair = (left, right)
    if not all(isinstance(e, Expr) and not isinstance(e, Symbol) for e in pair):
        return False
    return _differ_at_a_point(left, right)


def _differ_at_a_point(left: Any, right: Any) -> bool:
    from sympy import Rational

    names = sorted(left.free_symbols | right.free_symbols, key=str)
    point = {name: Rational(137 + 61 * i, 100) for i, name in enumerate(names)}
    try:
        x, y = (e.subs(point) for e in (left, right))
        a, b = complex(x.evalf(15)), complex(y.evalf(15))
        # A comparison with inf or nan is False.
        if abs(a - b) > 1e-6 * (abs(a) + abs(b)) > 1e-90:
            return True
        if not abs(a - b) <= 1e-6 * (abs(a) + abs(b)):
            return False
        # evalf takes as many digits as the difference needs, up to 100.
        apart, size = abs((x - y).evalf(15)), abs(x.evalf(15))
        return bool(apart > size * Rational(1, 10**60))
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False  # not a number, or too large: simplification decides


def _exact(expression: Any) -> Any:
    """The expression with rationals for its decimals: these are what they spell."""
    from sympy import Float, Rational

    try:
        floats = expression.atoms(Float)
        return expression.xreplace({x: Rational(str(x)) for x in floats})
    except (AttributeError, TypeError, ValueError):
        return expression


@functools.cache
def load_math_verify() -> tuple[
    Callable[[str], list[Any]], Callable[[list[Any], list[Any]], bool]
]:
    """(parse, verify) of math_verify, without its timers: the worker pool limits the
    time of a check."""
    import logging

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Rational

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        # Its list of units has single letters: 3t would be a 3.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True
        ),
    )

    @functools.lru_cache(maxsize=4096)  # a group has one gold and few answers
    def parse_box(body: str) -> list[Any]:
        number = exact_value(body)
        if number is not None:  # the grammar takes milliseconds
            return [Rational(number.numerator, number.denominator)]
        parsed = parse(
            f"\\boxed{{{body}}}",
            extraction_config=[config],
            fallback_mode="no_fallback",
            parsing_timeout=None,  # type: ignore[arg-type]
        )
        return [_exact(expression) for expression in parsed]

    def equal(gold: list[Any], answer: list[Any]) -> bool:
        return verify(gold, answer, timeout_seconds=None)

    return parse_box, equal
