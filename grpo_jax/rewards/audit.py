"""How often a verifier is wrong on a data file's own gold answers.

Every gold answer should be accepted unchanged and in every common rewriting that keeps
its meaning (a refusal is a reward that training loses), and refused once one of its
digits is changed (an acceptance is a reward that training can steal). The audit runs
the verifier in the worker processes that training uses, and lists each wrong verdict.
"""

import collections
import dataclasses
import re
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError, unknown_name
from grpo_jax.rewards.answers import last_boxed, marked_answer, several_answers
from grpo_jax.rewards.arithmetic import exact_value
from grpo_jax.rewards.latex import read_answer
from grpo_jax.rewards.pool import Check, Outcome, VerifierPool
from grpo_jax.rewards.rows import Row, lookup, read_rows, text_of
from grpo_jax.rewards.symbolic import refused
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import check_gold

ITSELF, SYMBOLIC, SPOILED = "as it stands", "by math_verify alone", "one digit changed"


class Case(NamedTuple):
    """A wrong verdict."""

    row: int  # line or row of the file, from 1
    form: str  # the rewriting
    gold: str
    answer: str  # the rewritten gold that was judged
    cause: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Counts of verdicts by form, and the wrong ones.

    Attributes:
        counts: form -> (checked, accepted).
        cases: Refused golds and rewritings, and accepted wrong answers.
        distinct: Checks that differ from each other; each is run once.
        failures: Checks that hung or whose worker died.
        seconds: Wall time of the distinct checks.
    """

    verifier: str
    rows: int
    counts: dict[str, tuple[int, int]]
    cases: list[Case]
    distinct: int
    failures: int
    seconds: float

    @property
    def checks_per_second(self) -> float:
        """Distinct checks a second."""
        return self.distinct / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """All fields and the rate, as JSON types."""
        return {
            **dataclasses.asdict(self),
            "cases": [case._asdict() for case in self.cases],
            "checks_per_second": self.checks_per_second,
        }

    def text(self, *, most: int = 20) -> str:
        """The counts as a table, and at most `most` cases of each form."""
        width = max(map(len, self.counts))
        lines = [
            f"{self.verifier}: {self.rows} gold answers, {self.distinct} distinct "
            f"checks in {self.seconds:.1f} s ({self.checks_per_second:.0f}/s), "
            f"{self.failures} hung or died",
            "",
            f"{'form':{width}}  {'asked':>6}  {'accepted':>8}  {'share':>8}",
        ]
        for form, (asked, accepted) in self.counts.items():
            share = f"{accepted / asked:8.2%}" if asked else "       -"
            wanted = "  (0 is right)" if form == SPOILED else ""
            lines.append(f"{form:{width}}  {asked:6}  {accepted:8}  {share}{wanted}")
        for form in self.counts:
            cases = [case for case in self.cases if case.form == form]
            if cases:
                lines += ["", f"{form}: {len(cases)} wrong verdicts"]
            for case in cases[:most]:
                what = f"{case.answer!r} for {case.gold!r}"
                lines.append(f"  line {case.row}: {what}: {case.cause}")
            if len(cases) > most:
                lines.append(f"  and {len(cases) - most} more")
        return "\n".join(lines)


def audit_file(
    path: str | Path,
    name: str,
    *,
    answer_field: str | None = None,
    solution_field: str | None = None,
    workers: int = 2,
) -> Audit:
    """The audit of a data file, read as for training: .jsonl, .json or .parquet.

    A row's gold is its `answer_field` (what its #### or \\boxed marks, where it has
    one), or the content of the last \\boxed in its `solution_field`.

    Args:
        answer_field, solution_field: "a.b" is field b of the object in field a. Where
            neither is given, "answer" where a row has one, else "solution"; the one
            that is given is used alone.

    Raises:
        ConfigError: an unknown file or verifier, or a row without these fields.
    """
    if name not in REWRITINGS:
        raise unknown_name("verifier to audit", name, REWRITINGS)
    if answer_field is None and solution_field is None:
        answer_field, solution_field = "answer", "solution"
    golds = [
        (int(row.where.rpartition(" ")[2]), _gold(row, answer_field, solution_field))
        for row in read_rows(Path(path))
    ]
    return audit(name, golds, workers=workers)


def _gold(row: Row, answer: str | None, solution: str | None) -> str | None:
    """The gold in a row's field `answer`, else in `solution`; None without a box."""
    given = [] if answer is None else [answer]
    if answer is not None and (solution is None or _value(row, answer) is not None):
        text = text_of(row, answer)
        marked = None if several_answers(text) else marked_answer(text)
        return text.strip() if marked is None else marked.strip()
    if solution is not None:
        given.append(solution)
        if isinstance(worked := _value(row, solution), str):
            return last_boxed(worked)
    found = " and ".join(f"field {name!r} {_state(row, name)}" for name in given)
    raise ConfigError(
        f"{row.where}: {found}; expected a gold answer, or a solution with a "
        "\\boxed; name their fields with --answer-field or --solution-field."
    )


def _value(row: Row, field: str) -> Any:
    """A field's value; None where it has none."""
    try:
        return lookup(row.values, field)
    except KeyError:
        return None


def _state(row: Row, field: str) -> str:
    """What is wrong with a field that gives no gold, in words."""
    try:
        value = lookup(row.values, field)
    except KeyError:
        return "is missing"
    return "is null" if value is None else f"is {value!r:.60}"


def audit(
    name: str, golds: Iterable[tuple[int, str | None]], *, workers: int = 2
) -> Audit:
    """The audit of gold answers, given as (line, gold) pairs; a missing gold is None,
    and a wrong verdict of its row."""
    if name not in REWRITINGS:
        raise unknown_name("verifier to audit", name, REWRITINGS)
    golds, cases = list(golds), []
    questions: list[_Question] = []
    for row, gold in golds:
        fault = "there is no \\boxed" if gold is None else check_gold(name, gold)
        if gold is None or fault:
            cases.append(Case(row, ITSELF, gold or "", gold or "", fault or ""))
            continue
        for form, answer in rewritings(name, gold):
            questions.append(_Question(row, form, gold, answer))
    checks = [_check(name, question) for question in questions]
    counted: collections.Counter[str] = collections.Counter({ITSELF: len(cases)})
    accepted: collections.Counter[str] = collections.Counter()
    with VerifierPool([Reward(name=name)], workers=workers) as pool:
        start = time.perf_counter()
        outcomes = pool.run(checks)
        seconds = time.perf_counter() - start
    for question, outcome in zip(questions, outcomes, strict=True):
        counted[question.form] += 1
        accepted[question.form] += outcome.value == 1
        if (outcome.value == 1) == (question.form == SPOILED):
            cases.append(Case(*question, _cause(name, question, outcome)))
    distinct = {(c.example.answer, c.reward.options, c.completion) for c in checks}
    return Audit(
        verifier=name,
        rows=len(golds),
        counts={form: (count, accepted[form]) for form, count in counted.items()},
        cases=cases,
        distinct=len(distinct),
        failures=sum(outcome.failed for outcome in outcomes),
        seconds=seconds,
    )


class _Question(NamedTuple):
    """A rewritten gold answer to be judged."""

    row: int
    form: str
    gold: str
    answer: str


def _check(name: str, question: _Question) -> Check:
    options = (("exact", 0.0),) if question.form == SYMBOLIC else ()
    answer = question.answer
    if name == "math":
        answer = f"so the answer is $\\boxed{{{answer}}}$."
    return Check(Reward(name=name, options=options), Example("", question.gold), answer)


def _cause(name: str, question: _Question, outcome: Outcome) -> str:
    """Why a verdict is wrong, as far as it can be said."""
    if outcome.failed:
        return "the check hung or its worker died"
    if question.form == SPOILED:
        return "accepted"
    if name == "math":
        for text in (question.gold, question.answer):
            if why := refused(read_answer(text).body):
                return f"sympy is not given {why}"
    return "compared as different"


def rewritings(name: str, gold: str) -> Iterable[tuple[str, str]]:
    """(form, text) of the gold answer itself and of every rewriting that changes it."""
    yield ITSELF, gold if name != "gsm8k" else f"#### {gold}"
    if name == "math":
        yield SYMBOLIC, gold
    for form, rewrite in REWRITINGS[name].items():
        answer = rewrite(gold)
        if answer is not None and answer != gold:
            yield form, answer


_Rewriting = Callable[[str], str | None]


def _where(pattern: str, change: Callable[[re.Match[str]], str | None]) -> _Rewriting:
    """A rewriting of the answers that match the pattern entirely; None for others."""
    compiled = re.compile(pattern, re.DOTALL)

    def rewrite(gold: str) -> str | None:
        match = compiled.fullmatch(gold)
        return None if match is None else change(match)

    return rewrite


def _unless(pattern: str, rewrite: _Rewriting) -> _Rewriting:
    """A rewriting of the answers in which the pattern does not occur."""
    compiled = re.compile(pattern)
    return lambda gold: None if compiled.search(gold) else rewrite(gold)


def _sized(gold: str) -> str:
    """Its brackets with \\left and \\right, where they match."""
    if gold.count("(") + gold.count("[") != gold.count(")") + gold.count("]"):
        return gold
    return re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", gold))


def _decimal(match: re.Match[str]) -> str | None:
    """The fraction as a decimal, where it has at most 6 places."""
    value, places = Fraction(int(match[1]), int(match[2]) or 1), 0
    while (value * 10**places).denominator != 1:
        places += 1
        if places > 6:
            return None
    return f"{float(value):.{places}f}" if places else None


def _thousands(match: re.Match[str]) -> str:
    return f"{int(match[0]):,}"


def _spoiled(gold: str) -> str | None:
    """The number with its first digit changed; None where it is not a number."""
    digits = list(re.finditer(r"[1-9]", gold)) or list(re.finditer("0", gold))
    if not digits or exact_value(read_answer(gold).body) is None:
        return None  # in other answers a digit may be an index, or multiply 0
    i = digits[0].start()  # not a zero: those at the ends may be dropped
    return gold[:i] + str(int(gold[i]) % 9 + 1) + gold[i + 1 :]


_FRACTION = r"(-?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}"
_UNIT = (
    r"([0-9.,!\\]*[0-9])\s*(?:\\ )?"
    r"\\(?:text|mbox|textnormal)\{(?!\s*[ap]\.m|\s*or|\s*and)[^}]*\}"
)
_NAMED = r"[^=,<>\\a-zA-Z]+|\\frac\{[0-9]+\}\{[0-9]+\}"

_WHOLE = r"-?(?:[0-9]{1,18}|[1-9][0-9]{0,2}(?:,[0-9]{3})+)"
_PLAIN = _WHOLE + r"(?:\.[0-9]+)?"

# Each keeps the meaning. fmt: off
REWRITINGS: dict[str, dict[str, _Rewriting]] = {
    "math": {
        r"\dfrac": lambda gold: re.sub(r"\\frac", r"\\dfrac", gold),
        r"\tfrac": lambda gold: re.sub(r"\\d?frac", r"\\tfrac", gold),
        r"\frac for \dfrac": lambda gold: gold.replace(r"\dfrac", r"\frac"),
        r"\frac12": lambda gold: re.sub(r"frac\{(\d)\}\{(\d)\}", r"frac\1\2", gold),
        "a/b": _where(_FRACTION, lambda m: f"{m[1]}{m[2]}/{m[3]}"),
        "decimal": _where(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", _decimal),
        "n.0": _where(r"-?[0-9]+", lambda m: f"{m[0]}.0"),
        ".5 for 0.5": _where(r"0\.[0-9]+", lambda m: m[0][1:]),
        "spaces": _unless(
            r"\\text|\\mbox|\\[!,]|[0-9],[0-9]",
            lambda gold: re.sub(r"([-+=,])", r" \1 ", gold),
        ),
        "no spaces": _unless(
            r"\\text|\\mbox|\\ |[a-zA-Z] +[a-zA-Z]|[0-9] +[0-9]",
            lambda gold: gold.replace(" ", ""),
        ),
        r"\left \right": _unless(r"\\left|sqrt\[|\\text|begin", _sized),
        r"no \left \right": _unless(
            r"\\(left|right)\.",
            lambda gold: re.sub(r"\\(left|right)(?![a-z])", "", gold),
        ),
        "$ around": _unless(r"\$", lambda gold: f"${gold}$"),
        r"\displaystyle": lambda gold: rf"\displaystyle {gold}",
        "period": _unless(r"[.]$", lambda gold: gold + "."),
        "unit left out": _where(_UNIT + r"(?:\^\{?[23]\}?)?\.?", lambda m: m[1]),
        "no commas": _where(
            r"[0-9]{1,3}(?:,\\!\s*[0-9]{3})+", lambda m: re.sub(r"[,\\!\s]", "", m[0])
        ),
        "plain commas": _where(
            r"[0-9]{1,3}(?:,\\!\s*[0-9]{3})+", lambda m: re.sub(r"[\\!\s]", "", m[0])
        ),
        "commas": _where(r"[1-9][0-9]{3,}", _thousands),
        "{,}": _where(r"[1-9][0-9]{3,}", lambda m: _thousands(m).replace(",", "{,}")),
        r"no \$": lambda gold: gold.replace(r"\$", ""),
        "%": lambda gold: gold.replace(r"\%", "%"),
        "no %": _where(r"([0-9.]+)\s*\\%", lambda m: m[1]),
        r"^{\circ}": lambda gold: gold.replace(r"^\circ", r"^{\circ}"),
        "degrees": _where(
            r"([0-9.]+)\^\{?\\circ\}?", lambda m: m[1] + r"\text{ degrees}"
        ),
        "no degrees": _where(r"([0-9.]+)\^\{?\\circ\}?", lambda m: m[1]),
        "x =": _where(_NAMED, lambda m: f"x = {m[0]}"),
        "without x =": _where(r"[a-z]\s*=\s*([^=,]+)", lambda m: m[1]),
        "list reversed": _where(
            r"[^,()\[\]{}=]+(?:,\s*[^,()\[\]{}=!]+){1,5}",
            lambda m: (
                ", ".join(re.split(r",\s*", m[0])[::-1])
                if exact_value(read_answer(m[0]).body) is None
                else None
            ),
        ),
        "terms swapped": _where(
            r"([0-9]+)\s*\+\s*([0-9]*(?:\\sqrt\{[0-9]+\}|i|x|\\pi))",
            lambda m: f"{m[2]} + {m[1]}",
        ),
        r"\text for \mbox": lambda gold: gold.replace(r"\mbox", r"\text"),
        r"no \text": _where(r"\\text\{([^{}]*)\}", lambda m: m[1]),
        SPOILED: _spoiled,
    },
    "gsm8k": {
        r"\boxed": lambda gold: rf"so it is \boxed{{{gold}}}.",
        r"\boxed{\$n}": _where(_PLAIN, lambda m: rf"so it is $\boxed{{\${m[0]}}}$."),
        r"\boxed{n\text{ unit}}": _where(
            _PLAIN, lambda m: rf"so \boxed{{{m[0]}\text{{ apples}}}}"
        ),
        "sentence": lambda gold: f"3 + 4 = 7, so the answer is {gold}.",
        "bold": lambda gold: f"The answer is **{gold}**",
        "no commas": lambda gold: "#### " + gold.replace(",", ""),
        "commas": _where(_WHOLE, lambda m: f"#### {int(m[0].replace(',', '')):,}"),
        "$": _where(_PLAIN, lambda m: f"#### ${m[0]}"),
        "%": _where(_PLAIN, lambda m: f"#### {m[0]}%"),
        "n.00": _where(_WHOLE, lambda m: f"#### {m[0]}.00"),
        "n.n0": _where(_WHOLE + r"\.[0-9]+", lambda m: f"#### {m[0]}0"),
        "unit": _where(_PLAIN, lambda m: f"#### {m[0]} apples"),
        "work first": lambda gold: f"2 * 3 = <<2*3=6>>6\n#### {gold}\n",
        SPOILED: lambda gold: (
            f"#### {spoiled}" if (spoiled := _spoiled(gold)) else None
        ),
    },
    "exact": {SPOILED: lambda gold: gold + "0"},
}
# fmt: on
