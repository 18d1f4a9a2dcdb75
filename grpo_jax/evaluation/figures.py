"""Pass rates, avg@k and pass@k of scored completions, with intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.evaluation.sampled import PromptAnswers
from grpo_jax.intervals import bootstrap_interval, rate_interval, wilson_interval
from grpo_jax.rewards.types import Example


def pass_rate_interval(answered: Sequence[PromptAnswers]) -> tuple[float, float, float]:
    """(share solved, and its 95 % interval): Wilson's for one sample of each prompt,
    else `rate_interval`; missing rewards are left out."""
    if all(len(row.solved) == 1 for row in answered):
        found = [row.solved[0] for row in answered if row.solved[0] is not None]
        return wilson_interval(sum(found), len(found)) if found else (math.nan,) * 3
    return rate_interval(_rates(answered))


def _rates(answered):
    present = [[s for s in row.solved if s is not None] for row in answered]
    return [sum(s) / len(s) for s in present if s]


def pass_at_k(solved: int, samples: int, k: int) -> float:
    """Chance that one of k samples, drawn from `samples` of which `solved` are right,
    is right: the unbiased estimate of pass@k (Chen et al. 2021, arXiv:2107.03374)."""
    if samples - solved < k:
        return 1.0
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def summarise(
    answered: Sequence[PromptAnswers],
    examples: Sequence[Example],
    pass_at: Sequence[int],
) -> dict[str, Any]:
    """Figures over all prompts and over those of each tag.

    Returns:
        name -> {"all": entry, "level=3": entry, ...}; an entry has `value`, `low`,
        `high` and `prompts`. One sample of each prompt: `pass rate` (Wilson); k of
        them: `avg@k` and `pass@j` for j in `pass_at` (bootstrap over prompts).
        `tokens` is the mean length.
    """
    groups: dict[str, list[PromptAnswers]] = {"all": list(answered)}
    for row in answered:
        for name, value in examples[row.index].tags:
            groups.setdefault(f"{name}={value}", []).append(row)
    names = ["all", *sorted(name for name in groups if name != "all")]
    samples = max((len(row.solved) for row in answered), default=1)
    figures: dict[str, Any] = {}

    def add(figure, name, interval, prompts):
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
                present = [[s for s in row.solved if s is not None] for row in rows]
                values = [pass_at_k(sum(s), len(s), k) for s in present if len(s) >= k]
                add(f"pass@{k}", name, rate_interval(values), len(values))
        lengths = [float(np.mean(row.tokens)) for row in rows]
        add("tokens", name, bootstrap_interval(lengths), len(rows))
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
            value, low, high = (
                f"{entries[name][k]:.{digits}f}" for k in ("value", "low", "high")
            )
            cells.append(f"{value} [{low}, {high}]")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
