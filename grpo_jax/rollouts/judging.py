"""Completions scored where they were sampled, and their rewards known everywhere."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.advantages import group_statistics
from grpo_jax.parallel.processes import (
    Processes,
    gather_to_host,
    local_shards_to_host,
    owned_samples,
)
from grpo_jax.rewards.pool import VerifierPool
from grpo_jax.rewards.scoring import Scores, score
from grpo_jax.rollouts.encoding import decode_groups
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks import Example, Task


class Sampled(NamedTuple):
    """Completions on the host, before they are scored.

    Attributes:
        rollouts: [P, G, T]; only this process's samples are filled in, or all.
        mine: [P, G] bool, the samples that this process scores.
    """

    rollouts: Rollouts
    mine: np.ndarray


class Judged(NamedTuple):
    """Scored completions of P prompts.

    Attributes:
        rollouts: On the host, with the rewards of all.
        scores: Of all; of several processes, each one's first error stands for its own.
        texts: [P][G]; "" for what only another process holds.
        lengths: [P, G] tokens of every completion.
    """

    rollouts: Rollouts
    scores: Scores
    texts: list[list[str]]
    lengths: np.ndarray


def fetched(rollouts: Rollouts, *, everything: bool = False) -> Sampled:
    """Completions from the devices; `everything`: those of other processes too."""
    read = gather_to_host if everything else local_shards_to_host
    return Sampled(read(rollouts), owned_samples(rollouts.completions))


def judge(
    task: Task,
    sampled: Sampled,
    examples: Sequence[Example],
    pool: VerifierPool | None,
    processes: Processes,
) -> Judged:
    """Scores this process's share of the completions, and learns the others' rewards.

    Args:
        examples: P of them.
    """
    rollouts, mine = sampled
    lengths = rollouts.completion_mask.sum(-1)
    texts = decode_groups(task, rollouts.completions, rollouts.completion_mask)
    scores = _scored(task, examples, texts, lengths, mine, pool)
    if processes.count > 1:
        scores, lengths = _joined(processes, scores, lengths, mine)
    return Judged(rollouts._replace(rewards=scores.rewards), scores, texts, lengths)


def _scored(task, examples, texts, lengths, mine, pool):
    """`Scores` of the samples that are mine, NaN and False elsewhere."""
    if mine.all():
        return score(task.reward, examples, texts, tokens=lengths, pool=pool)
    places = np.argwhere(mine)
    nothing = np.full(mine.shape, np.nan, np.float32)
    if not len(places):
        return Scores(nothing, [], mine, {}, 0)
    found = score(
        task.reward,
        [examples[p] for p, _ in places],
        [[texts[p][g]] for p, g in places],
        tokens=lengths[mine][:, None],
        pool=pool,
    )

    def spread(values, empty):
        full = np.full(mine.shape, empty, values.dtype)
        full[mine] = values[:, 0]
        return full

    return found._replace(
        rewards=spread(found.rewards, np.nan),
        solved=spread(found.solved, False),
        parts={name: spread(x, np.nan) for name, x in found.parts.items()},
    )


def _joined(processes, scores, lengths, mine):
    """(`Scores`, lengths) of all processes' shares."""
    first = [error[:200] for error in scores.errors[:1]]
    mine_only = (
        mine,
        scores.rewards,
        scores.solved,
        lengths.astype(np.int32),
        scores.parts,
        scores.failures,
        (len(scores.errors), first),
    )
    told = processes.exchange(mine_only)

    def joined(arrays):
        full = np.array(arrays[0])
        for array, (theirs, *_) in zip(arrays, told, strict=True):
            full[theirs] = array[theirs]
        return full

    names = next((parts for *_, parts, _, _ in told if parts), {})
    nothing = np.full(mine.shape, np.nan, np.float32)
    errors = []
    for *_, (count, texts) in told:
        errors += texts * count
    return Scores(
        rewards=joined([row[1] for row in told]),
        errors=errors,
        solved=joined([row[2] for row in told]),
        parts={
            name: joined([row[4].get(name, nothing) for row in told]) for name in names
        },
        failures=sum(row[5] for row in told),
    ), joined([row[3] for row in told])


# Of rewards on the host: one small program, compiled in a run's first step.
compiled_statistics = jax.jit(group_statistics)


def group_means(rewards: Any) -> np.ndarray:
    """[P] mean reward of each group [P, G], on the host; NaN for one without any."""
    statistics = jax.device_get(compiled_statistics(rewards))
    return np.where(statistics.count > 0, statistics.mean, np.nan)
