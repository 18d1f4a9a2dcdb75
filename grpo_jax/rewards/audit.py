"""How often a verifier is wrong on a data file's own gold answers.

Every gold answer should be accepted as it stands and in every common rewriting that
keeps its meaning (a refusal is a reward that training loses), and refused once one of
its digits is changed (an acceptance is a reward that training can steal). The audit
asks the verifier in the worker processes that training uses, and lists each case.
"""

import collections
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from grpo_jax.errors import ConfigError, unknown_name
from grpo_jax.rewards.answers import last_boxed, rational, read_answer
from grpo_jax.rewards.math_answers import refused
from grpo_jax.rewards.pool import Check, VerifierPool
from grpo_jax.rewards.types import Example, Reward
from grpo_jax.rewards.verifiers import check_gold

ITSELF, SYMBOLIC, SPOILED = "as it stands", "by math_verify alone", "one digit changed"


class Case(NamedTuple):
    """A verdict that should have been the other one."""

    row: int  # line of the file, from 1
    form: str  # the rewriting
    gold: str
    answer: str  # what stood in its place
    cause: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Counts by form, and every case.

    Attributes:
        counts: form -> (asked, accepted).
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
        """Of the distinct checks."""
        return self.distinct / max(self.seconds, 1e-9)

    def as_dict(self) -> dict:
        """Everything, for JSON."""
        return {
            **dataclasses.asdict(self),
            "cases": [case._asdict() for case in self.cases],
            "checks_per_second": self.checks_per_second,
        }

    def text(self, *, most: int = 20) -> str:
        """A table, and at most `most` cases of each form."""
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


def audit_file(path: str | Path, name: str, *, workers: int = 2) -> Audit:
    """The audit of a JSON-lines file.

    A row's gold is its field `answer` (after the last ####, where it has one), or what
    the last \\boxed of its field `solution` holds.

    Raises:
        ConfigError: no such file or verifier, or a row that is no JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path} must be a readable file: {error.strerror}."
        ) from None
    golds = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            golds.append((number, _gold(line, f"{path}, line {number},")))
    return audit(name, golds, workers=workers)


def _gold(line, where):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} must be JSON: {error}.") from None
    if not isinstance(row, dict) or not {"answer", "solution"} & set(row):
        raise ConfigError(f"{where} must be an object with 'answer' or 'solution'.")
    if "answer" in row:
        return str(row["answer"]).rpartition("####")[2].strip()
    return last_boxed(str(row["solution"]))


def audit(
    name: str, golds: Iterable[tuple[int, str | None]], *, workers: int = 2
) -> Audit:
    """The audit of gold answers, given as (line, gold) pairs; None: there is none."""
    if name not in REWRITINGS:
        raise unknown_name("verifier to audit", name, REWRITINGS)
    golds, cases = list(golds), []
    asked: list[tuple[int, str, str, str, Check]] = []
    for row, gold in golds:
        fault = "there is no \\boxed" if gold is None else check_gold(name, gold)
        if gold is None or fault:
            cases.append(Case(row, ITSELF, gold or "", gold or "", fault or ""))
            continue
        for form, answer in rewritings(name, gold):
            asked.append((row, form, gold, answer, _check(name, form, gold, answer)))
    tried: collections.Counter[str] = collections.Counter()
    accepted: collections.Counter[str] = collections.Counter()
    tried[ITSELF] += len(cases)
    with VerifierPool([Reward(name=name)], workers=workers) as pool:
        start = time.perf_counter()
        outcomes = pool.run([check for *_, check in asked])
        seconds = time.perf_counter() - start
    for (row, form, gold, answer, _), outcome in zip(asked, outcomes, strict=True):
        tried[form] += 1
        accepted[form] += outcome.value == 1
        if (outcome.value == 1) == (form == SPOILED):
            cause = _cause(name, form, gold, answer, outcome)
            cases.append(Case(row, form, gold, answer, cause))
    return Audit(
        verifier=name,
        rows=len(golds),
        counts={form: (count, accepted[form]) for form, count in tried.items()},
        cases=cases,
        distinct=len(
            {
                (check.example.answer, check.reward.options, check.completion)
                for *_, check in asked
            }
        ),
        failures=sum(outcome.failed for outcome in outcomes),
        seconds=seconds,
    )


def _check(name, form, gold, answer):
    options = (("exact", 0.0),) if form == SYMBOLIC else ()
    if name == "math":
        answer = f"so the answer is $\\boxed{{{answer}}}$."
    return Check(Reward(name=name, options=options), Example("", gold), answer)


def _cause(name, form, gold, answer, outcome):
    if outcome.failed:
        return "the check hung or its worker died"
    if form == SPOILED:
        return "accepted"
    if name == "math":
        for text in (gold, answer):
            if why := refused(read_answer(text).body):
                return f"sympy is not given {why}"
    return "compared as different"


def rewritings(name: str, gold: str) -> Iterable[tuple[str, str]]:
    """(form, text) of the gold itself and of every rewriting that changes it."""
    yield ITSELF, gold if name != "gsm8k" else f"#### {gold}"
    if name == "math":
        yield SYMBOLIC, gold
    for form, rewrite in REWRITINGS[name].items():
        answer = rewrite(gold)
        if answer is not None and answer != gold:
            yield form, answer


def _where(pattern: str, change: Callable[[re.Match], str | None]):
    """A rewriting of answers that match as a whole; None elsewhere."""
    compiled = re.compile(pattern, re.DOTALL)

    def rewrite(gold):
        match = compiled.fullmatch(gold)
        return None if match is None else change(match)

    return rewrite


def _unless(pattern: str, rewrite: Callable[[str], str]):
    compiled = re.compile(pattern)
    return lambda gold: None if compiled.search(gold) else rewrite(gold)


def _sized(gold):
    if any(gold.count(a) != gold.count(b) for a, b in ("()", "[]", "([")):
        if gold.count("(") + gold.count("[") != gold.count(")") + gold.count("]"):
            return gold
    return re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", gold))


def _decimal(match):
    value, places = Fraction(int(match[1]), int(match[2]) or 1), 0
    while (value * 10**places).denominator != 1:
        places += 1
        if places > 6:
            return None
    return f"{float(value):.{places}f}" if places else None


def _thousands(match):
    return f"{int(match[0]):,}"


def _spoiled(gold):
    digits = list(re.finditer(r"[0-9]", gold))
    if not digits or rational(read_answer(gold).body) is None:
        return None  # elsewhere a digit may be an index, or multiply 0
    i = digits[0].start()  # the leading digit: trailing zeros may be dropped
    return gold[:i] + str(int(gold[i]) % 9 + 1) + gold[i + 1 :]


_FRACTION = r"(-?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}"
_UNIT = (
    r"([0-9.,!\\]*[0-9])\s*(?:\\ )?"
    r"\\(?:text|mbox|textnormal)\{(?!\s*[ap]\.m|\s*or|\s*and)[^}]*\}"
)
_NAMED = r"[^=,<>\\a-zA-Z]+|\\frac\{[0-9]+\}\{[0-9]+\}"

# Each keeps the meaning. fmt: off
REWRITINGS: dict[str, dict[str, Callable[[str], str | None]]] = {
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
                if rational(read_answer(m[0]).body) is None
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
        r"\boxed{\$n}": lambda gold: rf"so it is $\boxed{{\${gold}}}$.",
        r"\boxed{n\text{ unit}}": lambda gold: rf"so \boxed{{{gold}\text{{ apples}}}}",
        "sentence": lambda gold: f"3 + 4 = 7, so the answer is {gold}.",
        "bold": lambda gold: f"The answer is **{gold}**",
        "no commas": lambda gold: "#### " + gold.replace(",", ""),
        "commas": lambda gold: f"#### {int(gold.replace(',', '')):,}",
        "$": lambda gold: f"#### ${gold}",
        "%": lambda gold: f"#### {gold}%",
        "n.00": lambda gold: f"#### {gold}.00",
        "unit": lambda gold: f"#### {gold} apples",
        "work first": lambda gold: f"2 * 3 = <<2*3=6>>6\n#### {gold}\n",
        SPOILED: lambda gold: f"#### {_spoiled(gold)}",
    },
    "exact": {SPOILED: lambda gold: gold + "0"},
}
# fmt: on
