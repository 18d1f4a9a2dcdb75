"""How many groups of a step will be informative, from pass rates measured before it.

A group whose G completions are all right or all wrong has no gradient. With pass rate
p that happens with probability p^G + (1 - p)^G.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from grpo_jax.errors import ConfigError

GROUP_SIZES = (4, 8, 16, 32, 64)  # shown beside the run's
PASS_RATES = (0.01, 0.05, 0.1, 0.3, 0.5)  # shown if none were measured


def informative_share(pass_rate: float, group_size: int) -> float:
    """1 - p^G - (1 - p)^G: the probability that a group's rewards differ."""
    return 1 - pass_rate**group_size - (1 - pass_rate) ** group_size


class Counted(NamedTuple):
    """A prompt's pass rate: `solved` of `asked` answers, or (`asked` 0) a number
    from elsewhere."""

    rate: float
    solved: int = 0
    asked: int = 0

    def informative(self, group_size: int) -> float:
        """The expected share of informative groups of this prompt.

        With at least G answers it is unbiased: the share of their G-subsets that hold
        both outcomes. With fewer, the measured rate is put in for p, which is too low
        on average (the share is concave in p).
        """
        if self.asked < group_size:
            return informative_share(self.rate, group_size)
        wrong = self.asked - self.solved
        subsets = math.comb(self.asked, group_size)
        tied = math.comb(self.solved, group_size) + math.comb(wrong, group_size)
        return 1 - tied / subsets


def expected_informative(counted: Sequence[Counted], group_size: int) -> float:
    """Mean over prompts of the share of informative groups."""
    return sum(c.informative(group_size) for c in counted) / len(counted)


def read_pass_rates(path: str | Path) -> list[Counted]:
    """Pass rates of prompts, measured or from a list.

    Args:
        path: A directory of `grpo-jax eval --samples K`, its samples.jsonl, or a JSON
            list of numbers in [0, 1].

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "samples.jsonl"
        if not file.exists():
            raise ConfigError(
                f"--pass-rates {path} holds no samples.jsonl; write one with "
                "`grpo-jax eval --samples K`."
            )
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --pass-rates {path}: {error}.") from error
    counted = _rates(text, file) if text.lstrip()[:1] == "[" else _rows(text, file)
    if not counted:
        raise ConfigError(
            f"--pass-rates {file} holds no prompt with a known outcome; it must be the "
            "output of `grpo-jax eval --samples K`, or a JSON list of rates."
        )
    return counted


def _rates(text: str, file: Path) -> list[Counted]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:
            raise ConfigError(
                f"--pass-rates {file} must be a list of numbers in [0, 1], got "
                f"{value!r}; a share, not a percentage."
            )
    return [Counted(float(value)) for value in values]


def _rows(text: str, file: Path) -> list[Counted]:
    """One prompt per line of samples.jsonl; prompts without an outcome are left out."""
    counted = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            outcomes = _outcomes(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--pass-rates {file}, line {number}, must have a list `solved`, as "
                "`grpo-jax eval --samples K` writes it; give that command's directory "
                "or samples.jsonl, or a JSON list of rates."
            ) from error
        if outcomes:
            solved, asked = sum(outcomes), len(outcomes)
            counted.append(Counted(solved / asked, solved, asked))
    return counted


def _outcomes(line: str) -> list[bool]:
    """Right or wrong, of the answers that could be judged."""
    outcomes = json.loads(line)["solved"]
    if not isinstance(outcomes, list) or {*map(type, outcomes)} - {bool, type(None)}:
        raise TypeError("not a list of outcomes")
    return [outcome for outcome in outcomes if outcome is not None]
