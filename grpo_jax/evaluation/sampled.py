"""Answers to a set of prompts, sampled and scored in batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import Processes
from grpo_jax.rewards.pool import VerifierPool
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.judging import (
    HostRollouts,
    ScoredRollouts,
    fetch_to_host,
    score_rollouts,
)
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Task

MULTIPLE = 8  # of the prompts of a batch


class PromptAnswers(NamedTuple):
    """A policy's k sampled answers to one prompt; every list has k entries."""

    index: int  # of the prompt
    solved: list[bool | None]  # None where the first reward is missing
    rewards: list[float | None]
    tokens: list[int]
    texts: list[str]
    failed: int = 0  # checks of all samples that hung or died; each scores 0
    cut_off: Sequence[bool] = ()  # at the limit of tokens; () in files of old versions


def prompts_at_a_time(rows: int, samples: int, prompts: int) -> int:
    """Prompts of a batch, as every batch of an evaluation has them.

    As few batches as `rows` allows, of as few prompts as they need; a multiple of 8 of
    them, so that evaluations of about the same size share one program.

    Args:
        rows: Completions of a batch, at most (of one prompt, if it has more).
        samples: Of each prompt.
        prompts: To be answered, of all batches.
    """
    most = max(1, rows // samples)
    batches = -(-max(1, prompts) // most)
    needed = -(-prompts // batches)
    return max(1, min(most, -(-needed // MULTIPLE) * MULTIPLE))


def batches(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive parts [size] of prompts `indices` [N]; the last may be shorter."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def answer_prompts(
    sample: Callable[..., Rollouts],
    policy: Policy,
    task: Task,
    examples: Sequence[Example],
    prompts: tuple[np.ndarray, np.ndarray],
    *,
    samples: int,
    size: int,
    key: jax.Array,
    pool: VerifierPool | None,
    processes: Processes,
    warn: Callable[[str], None],
    indices: Sequence[int] | None = None,
    names: np.ndarray | None = None,
) -> Iterator[list[PromptAnswers]]:
    """Samples and scores answers to prompts, and yields them batch by batch.

    The randomness of a prompt's answers depends on the key and its index, not on the
    batches. In float32 this holds for the answers too, up to rounding; in bfloat16
    some answers are others in batches of another size (`grpo_jax.rollouts.sampling`).

    Args:
        sample: `sample` with its other arguments bound.
        task: Its reward judges the answers.
        examples: The N examples of the prompts.
        prompts: Their token ids and mask, [N, L] each.
        samples: Answers to each prompt.
        size: Prompts of a batch; a smaller one is filled up.
        key: PRNG key of all answers.
        pool: Workers of the task's rewards; None where its reward is a function.
        processes: All processes of the run must iterate together.
        warn: Gets a text for a batch in which rewards are missing, or checks hung.
        indices: Prompts to answer; default: all N.
        names: [N] int32 that name the prompts for the randomness; default: 0 to N-1.
    """
    ids, mask = prompts
    everything = np.arange(len(examples))
    selected = everything if indices is None else np.asarray(indices)
    names = everything if names is None else names
    for batch in batches(selected, size):
        # The last batch is padded with its own rows: one shape, one program.
        padded = np.resize(batch, size)
        sampled = sample(
            policy,
            ids[padded],
            mask[padded],
            group_size=samples,
            key=key,
            prompt_indices=names[padded].astype(np.int32),
        )
        on_host = _first_rows(fetch_to_host(sampled), len(batch))
        scored = score_rollouts(
            task, on_host, [examples[i] for i in batch], pool, processes
        )
        if errors := scored.scores.errors:
            warn(
                f"evaluation: {len(errors)} rewards missing, left out: "
                f"{errors[0][:200]}"
            )
        if failures := scored.scores.failures:
            warn(f"evaluation: {failures} checks hung or died; they score 0.")
        yield _as_answers(batch, scored)


def _first_rows(sampled: HostRollouts, n: int) -> HostRollouts:
    return jax.tree.map(lambda x: x[:n], sampled)


def _as_answers(indices: np.ndarray, scored: ScoredRollouts) -> list[PromptAnswers]:
    """The answers of prompts `indices` [P]."""
    scores = scored.scores
    # The first reward decides what is solved, even where others are missing.
    missing = np.isnan(next(iter(scores.parts.values()), scores.rewards))  # [P, G]
    return [
        PromptAnswers(
            index=int(index),
            solved=[
                None if lacks else bool(x)
                for x, lacks in zip(scores.solved[p], missing[p], strict=True)
            ],
            rewards=[float(x) if np.isfinite(x) else None for x in scores.rewards[p]],
            tokens=scored.lengths[p].tolist(),
            texts=scored.texts[p],
            failed=int(scores.failed[p].sum()),
            cut_off=(~scored.ended[p]).tolist(),
        )
        for p, index in enumerate(indices)
    ]
