"""Pass rates, avg@k and pass@k of scored completions, with intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.evaluation.sampled import PromptAnswers
from grpo_jax.intervals import mean_interval, rate_interval
from grpo_jax.rewards.types import Example


def pass_rate_interval(answered: Sequence[PromptAnswers]) -> tuple[float, float, float]:
    """(share solved, low, high), a 95 % interval over prompts (`rate_interval`).

    Each prompt counts once; missing rewards are left out.
    """
    return rate_interval(_rates(answered))


def mean_reward_interval(
    answered: Sequence[PromptAnswers],
) -> tuple[float, float, float]:
    """(mean reward, low, high): a 95 % Student interval over prompts of the mean
    rewards of their samples.

    Missing rewards are left out. The mean of none is NaN, and so are the ends where no
    two prompts differ: nothing shows how much they could.
    """
    present = ([r for r in row.rewards if r is not None] for row in answered)
    means = [sum(r) / len(r) for r in present if r]
    mean, low, high = mean_interval(means)
    return (mean, low, high) if len({*means}) > 1 else (mean, math.nan, math.nan)


def missing_and_failed(answered: Sequence[PromptAnswers]) -> tuple[int, int]:
    """(samples without a reward, checks that hung or died)."""
    missing = sum(row.rewards.count(None) for row in answered)
    return missing, sum(row.failed for row in answered)


def _verdicts(row: PromptAnswers) -> list[bool]:
    """Whether each sample solved the prompt; missing rewards are left out."""
    return [solved for solved in row.solved if solved is not None]


def _rates(answered: Sequence[PromptAnswers]) -> list[float]:
    """Share solved of each prompt that has rewards."""
    return [sum(s) / len(s) for s in map(_verdicts, answered) if s]


def cut_off_share(answered: Sequence[PromptAnswers]) -> float:
    """Share of all answers that were cut off at the limit of tokens."""
    return float(np.mean([cut for row in answered for cut in row.cut_off]))


def pass_at_k(solved: int, samples: int, k: int) -> float:
    """The unbiased estimate of pass@k (Chen et al. 2021, arXiv:2107.03374): the chance
    that k of the `samples`, drawn without replacement, include a solved one."""
    if samples - solved < k:
        return 1.0
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def summarise(
    answered: Sequence[PromptAnswers],
    examples: Sequence[Example],
    pass_at: Sequence[int],
) -> dict[str, Any]:
    """Figures over all prompts and over those of each tag.

    Args:
        answered: Prompts and their answers.
        examples: All examples of the task; `answered` has their indices.
        pass_at: The k's of pass@k.

    Returns:
        name -> {"all": entry, "level=3": entry, ...}; an entry has `value`, `low`,
        `high` and `prompts`. One sample of each prompt: `pass rate`; k of them:
        `avg@k` and `pass@j` for j in `pass_at`. `reward` is the mean reward, `tokens`
        the mean length, `cut off` the share of answers that reached the limit without
        an end of their own.
    """
    groups: dict[str, list[PromptAnswers]] = {"all": list(answered)}
    for row in answered:
        for name, value in examples[row.index].tags:
            groups.setdefault(f"{name}={value}", []).append(row)
    names = ["all", *sorted(name for name in groups if name != "all")]
    samples = max((len(row.solved) for row in answered), default=1)
    figures: dict[str, Any] = {}

    def add(
        figure: str, name: str, interval: tuple[float, float, float], prompts: int
    ) -> None:
        value, low, high = interval
        entry = {"value": value, "low": low, "high": high, "prompts": prompts}
        figures.setdefault(figure, {})[name] = entry

    for name in names:
        rows = groups[name]
        if samples == 1:
            add("pass rate", name, pass_rate_interval(rows), len(_rates(rows)))
        else:
            add(f"avg@{samples}", name, rate_interval(_rates(rows)), len(_rates(rows)))
            for k in pass_at:
                verdicts = map(_verdicts, rows)
                values = [pass_at_k(sum(s), len(s), k) for s in verdicts if len(s) >= k]
                add(f"pass@{k}", name, rate_interval(values), len(values))
        rewarded = sum(any(r is not None for r in row.rewards) for row in rows)
        add("reward", name, mean_reward_interval(rows), rewarded)
        lengths = [float(np.mean(row.tokens)) for row in rows]
        add("tokens", name, mean_interval(lengths), len(rows))
        if all(row.cut_off for row in answered):
            shares = [float(np.mean(row.cut_off)) for row in rows]
            add("cut off", name, rate_interval(shares), len(rows))
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures as aligned text, a row per group of prompts."""
    names = list(next(iter(figures.values())))
    header = ["", "prompts", *figures]
    lines = [header]
    for name in names:
        cells = [name, str(next(iter(figures.values()))[name]["prompts"])]
        for figure, entries in figures.items():
            digits = 1 if figure == "tokens" else 3
            value, low, high = (entries[name][k] for k in ("value", "low", "high"))
            ends = f" [{low:.{digits}f}, {high:.{digits}f}]"
            cell = f"{value:.{digits}f}{ends if math.isfinite(low) else ''}"
            cells.append("none" if math.isnan(value) else cell)
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
