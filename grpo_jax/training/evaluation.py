"""Evaluation by sampling: one code path inside training and for `grpo-jax eval`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.models.decoder import Policy
from grpo_jax.rollouts.scoring import VerifierPool
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks import Example, Task
from grpo_jax.training.config import ScoringConfig
from grpo_jax.training.judging import fetched, judge
from grpo_jax.training.metrics import wilson_interval
from grpo_jax.training.processes import Peers

_RESAMPLES = 2000  # of the prompts, for a bootstrap interval


@contextlib.contextmanager
def verifier_pool(task: Task, config: ScoringConfig) -> Iterator[VerifierPool | None]:
    """The workers that compute a task's rewards; None where a function does, here."""
    if callable(task.reward):
        yield None
        return
    with VerifierPool(
        task.reward,
        workers=config.workers,
        timeout=config.timeout_s,
        memory_gib=config.memory_gib,
    ) as pool:
        yield pool


class Answered(NamedTuple):
    """What a policy answered to one prompt, k times."""

    index: int  # of the prompt among those asked
    solved: list[bool | None]  # None where the first reward is missing
    rewards: list[float | None]
    tokens: list[int]
    texts: list[str]


def ask(
    sample: Callable[..., Rollouts],
    policy: Policy,
    task: Task,
    examples: Sequence[Example],
    prompts: tuple[np.ndarray, np.ndarray],
    *,
    samples: int,
    rows: int,
    key: jax.Array,
    pool: VerifierPool | None,
    peers: Peers,
    warn: Callable[[str], None],
    indices: Sequence[int] | None = None,
) -> Iterator[list[Answered]]:
    """Samples and scores answers, part by part; what a prompt is answered depends on
    the key and its index alone, not on the parts.

    Args:
        sample: `sample` with everything but the arguments given here.
        examples: The prompts' examples.
        prompts: Their token ids and mask [N, L].
        samples: k, of each prompt.
        rows: Completions sampled at a time, about.
        indices: Which prompts to ask, default all.
    """
    ids, mask = prompts
    indices = np.arange(len(examples)) if indices is None else np.asarray(indices)
    size = max(1, rows // samples)
    for start in range(0, len(indices), size):
        asked = indices[start : start + size]
        # The last part is filled up with its own rows: one shape, one program.
        part = np.resize(asked, size)
        sampled = sample(
            policy,
            ids[part],
            mask[part],
            group_size=samples,
            key=key,
            prompt_indices=part.astype(np.int32),
        )
        here = jax.tree.map(partial(_first, len(asked)), fetched(sampled))
        judged = judge(task, here, [examples[i] for i in asked], pool, peers)
        scores, texts, tokens = judged.scores, judged.texts, judged.lengths
        # What decides is the first reward, whatever became of the others.
        first = next(iter(scores.parts.values()), scores.rewards)
        if scores.errors:
            warn(
                f"evaluation: {len(scores.errors)} rewards missing, left out: "
                f"{scores.errors[0][:200]}"
            )
        yield [
            Answered(
                int(i),
                [None if k else bool(s) for s, k in zip(solved, unknown, strict=True)],
                [float(r) if np.isfinite(r) else None for r in rewards],
                n.tolist(),
                text,
            )
            for i, solved, unknown, rewards, n, text in zip(
                asked,
                scores.solved,
                np.isnan(first),
                scores.rewards,
                tokens,
                texts,
                strict=True,
            )
        ]


def _first(n, x):
    return x[:n]


def pass_rate(answered: Sequence[Answered]) -> tuple[float, float, float]:
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


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, 2.5 % and 97.5 % points of the means of resampled prompts)."""
    values = np.asarray(values, float)
    if not len(values):
        return (float("nan"),) * 3
    rng = np.random.default_rng(0)
    means = [
        values[rng.integers(len(values), size=len(values))].mean()
        for _ in range(_RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def rate_interval(rates: Sequence[float]) -> tuple[float, float, float]:
    """(mean, and its 95 % interval over prompts) of the prompts' pass rates: by
    bootstrap; where all are 0 or all are 1, which shows no spread, Wilson's."""
    if len(rates) and set(rates) in ({0.0}, {1.0}):
        return wilson_interval(round(sum(rates)), len(rates))
    return bootstrap_interval(rates)


def summarise(
    answered: Sequence[Answered], examples: Sequence[Example], pass_at: Sequence[int]
) -> dict[str, Any]:
    """Figures over all prompts and over those of each tag.

    Returns:
        name -> {"all": entry, "level=3": entry, ...}; an entry has `value`, `low`,
        `high` and `prompts`. One sample of each prompt: `pass rate` (Wilson); k of
        them: `avg@k` and `pass@j` for j in `pass_at` (bootstrap over prompts).
        `tokens` is the mean length.
    """
    groups: dict[str, list[Answered]] = {"all": list(answered)}
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
            add("pass rate", name, pass_rate(rows), len(_rates(rows)))
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
