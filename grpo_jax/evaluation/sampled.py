"""Completions for a set of prompts, sampled and scored part by part."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import Processes
from grpo_jax.rewards.pool import VerifierPool
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.judging import fetch_to_host, score_rollouts
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Task


class PromptAnswers(NamedTuple):
    """What a policy answered to one prompt, k times."""

    index: int  # of the prompt among those asked
    solved: list[bool | None]  # None where the first reward is missing
    rewards: list[float | None]
    tokens: list[int]
    texts: list[str]


def answer_prompts(
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
    processes: Processes,
    warn: Callable[[str], None],
    indices: Sequence[int] | None = None,
) -> Iterator[list[PromptAnswers]]:
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
        here = jax.tree.map(partial(_first, len(asked)), fetch_to_host(sampled))
        judged = score_rollouts(
            task, here, [examples[i] for i in asked], pool, processes
        )
        scores, texts, tokens = judged.scores, judged.texts, judged.lengths
        # What decides is the first reward, whatever became of the others.
        first = next(iter(scores.parts.values()), scores.rewards)
        if scores.errors:
            warn(
                f"evaluation: {len(scores.errors)} rewards missing, left out: "
                f"{scores.errors[0][:200]}"
            )
        yield [
            PromptAnswers(
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
