"""Completions scored by the processes that sampled them, and the rewards exchanged."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.parallel.processes import (
    Processes,
    gather_to_host,
    local_shards_to_host,
    owned_samples,
)
from grpo_jax.rewards.pool import VerifierPool
from grpo_jax.rewards.scoring import Scores, score
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import decode_groups
from grpo_jax.rollouts.types import Rollouts, completion_lengths
from grpo_jax.tasks.types import Task

_ERROR_LENGTH = 200  # characters of an error text that other processes get


class HostRollouts(NamedTuple):
    """Rollouts on the host, before they are scored.

    Attributes:
        rollouts: [P, G, T] completions; zeros for samples of other processes, unless
            they were gathered.
        owned: [P, G] bool, the samples that this process scores.
    """

    rollouts: Rollouts
    owned: np.ndarray


class ScoredRollouts(NamedTuple):
    """Rollouts on the host with their rewards.

    Attributes:
        rollouts: [P, G, T] completions as in `HostRollouts`; rewards [P, G] of every
            process.
        scores: [P, G] of every process. Of another process only the first error text
            is exchanged, repeated to keep the count.
        texts: [P][G]; "" for samples of other processes, unless they were gathered.
        lengths: [P, G] tokens of every completion up to its last sampled one.
        ended: [P, G] bool, completions that ended by themselves: the others were cut
            off at the limit.
    """

    rollouts: Rollouts
    scores: Scores
    texts: list[list[str]]
    lengths: np.ndarray
    ended: np.ndarray


def fetch_to_host(rollouts: Rollouts, *, all_processes: bool = False) -> HostRollouts:
    """Copies rollouts from the devices to the host.

    Args:
        rollouts: [P, G, T] completions, on devices.
        all_processes: Gather the samples of other processes too.
    """
    read = gather_to_host if all_processes else local_shards_to_host
    return HostRollouts(read(rollouts), owned_samples(rollouts.completions))


def score_rollouts(
    task: Task,
    sampled: HostRollouts,
    examples: Sequence[Example],
    pool: VerifierPool | None,
    processes: Processes,
) -> ScoredRollouts:
    """Scores the samples this process owns and exchanges rewards with the others.

    Args:
        task: Its reward judges the decoded completions.
        sampled: [P, G, T] completions.
        examples: [P], the prompts' examples.
        pool: Worker processes for rewards that need isolation.
        processes: Every process of the run must call this together.
    """
    rollouts, owned = sampled
    completions, mask = map(
        np.asarray, (rollouts.completions, rollouts.completion_mask)
    )
    lengths = completion_lengths(mask)  # [P, G]
    ended = completions_ended(completions, lengths, task.ends)
    texts = decode_groups(task, completions, mask)
    scores = _score_owned(task, examples, texts, lengths, owned, pool)
    if processes.count > 1:
        share = _Share.of(owned, lengths, ended, scores)
        scores, lengths, ended = _merged(processes.exchange(share))
    paid = 1.0 if callable(task.reward) else task.reward[0].weight
    solving = np.where(scores.solved, np.float32(paid), np.float32(0))
    rollouts = rollouts._replace(rewards=scores.rewards, solving=solving)
    return ScoredRollouts(rollouts, scores, texts, lengths, ended)


def completions_ended(
    completions: np.ndarray, lengths: np.ndarray, ends: Sequence[int]
) -> np.ndarray:
    """[P, G] bool: the last token of a completion is one of `ends`.

    Args:
        completions: [P, G, T].
        lengths: [P, G] tokens of each.
    """
    last = np.maximum(lengths - 1, 0)[..., None]
    tokens = np.take_along_axis(completions, last, -1)[..., 0]
    return np.isin(tokens, list(ends)) & (lengths > 0)


def _score_owned(
    task: Task,
    examples: Sequence[Example],
    texts: list[list[str]],
    lengths: np.ndarray,
    owned: np.ndarray,
    pool: VerifierPool | None,
) -> Scores:
    """`Scores` of the owned samples; NaN and False elsewhere."""
    if owned.all():
        return score(task.reward, examples, texts, tokens=lengths, pool=pool)
    indices = np.argwhere(owned)
    if not len(indices):
        missing = np.full(owned.shape, np.nan, np.float32)
        return Scores(missing, [], owned, {}, np.zeros(owned.shape, int))
    scores = score(
        task.reward,
        [examples[p] for p, _ in indices],
        [[texts[p][g]] for p, g in indices],
        tokens=lengths[owned][:, None],
        pool=pool,
    )

    def scatter(values: np.ndarray, fill: float) -> np.ndarray:  # [N, 1] -> [P, G]
        full = np.full(owned.shape, fill, values.dtype)
        full[owned] = values[:, 0]
        return full

    return scores._replace(
        rewards=scatter(scores.rewards, np.nan),
        solved=scatter(scores.solved, False),
        failed=scatter(scores.failed, 0),
        parts={name: scatter(x, np.nan) for name, x in scores.parts.items()},
    )


class _Share(NamedTuple):
    """What one process sends to the others about the samples it owns; arrays [P, G]."""

    owned: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    rewards: np.ndarray
    solved: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray
    error_count: int
    first_error: list[str]  # none or one

    @classmethod
    def of(
        cls,
        owned: np.ndarray,
        lengths: np.ndarray,
        ended: np.ndarray,
        scores: Scores,
    ) -> "_Share":
        return cls(
            owned,
            lengths.astype(np.int32),
            ended,
            scores.rewards,
            scores.solved,
            scores.parts,
            scores.failed,
            len(scores.errors),
            [error[:_ERROR_LENGTH] for error in scores.errors[:1]],
        )


def _merged(shares: Sequence[_Share]) -> tuple[Scores, np.ndarray, np.ndarray]:
    """`Scores`, lengths [P, G] and ends [P, G] of every process's share."""

    def merge(arrays: Sequence[np.ndarray]) -> np.ndarray:
        full = np.array(arrays[0])
        for array, share in zip(arrays, shares, strict=True):
            full[share.owned] = array[share.owned]
        return full

    # A process without samples has no parts.
    names = next((share.parts for share in shares if share.parts), {})
    missing = np.full(shares[0].owned.shape, np.nan, np.float32)
    scores = Scores(
        rewards=merge([share.rewards for share in shares]),
        errors=[e for s in shares for e in s.first_error * s.error_count],
        solved=merge([share.solved for share in shares]),
        parts={
            name: merge([share.parts.get(name, missing) for share in shares])
            for name in names
        },
        failed=merge([share.failed for share in shares]),
    )
    lengths = merge([share.lengths for share in shares])
    return scores, lengths, merge([share.ended for share in shares])


def group_means(rewards: Any) -> np.ndarray:
    """[P] mean reward of each group of rewards [P, G], on the host; NaN for a group
    whose rewards are all missing.

    Without a program of its own, which a run would compile where it first needs one.
    """
    x = np.asarray(rewards, float)
    count = (~np.isnan(x)).sum(1)
    return np.where(count, np.nansum(x, 1) / np.maximum(count, 1), np.nan)
