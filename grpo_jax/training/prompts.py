"""The trained prompts of a run, sampled and scored by their indices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import Processes
from grpo_jax.rewards.pool import VerifierPool
from grpo_jax.rollouts.encoding import pad_left
from grpo_jax.rollouts.judging import HostRollouts, ScoredRollouts, score_rollouts
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Task

# `gj.sample` with the run's lengths, temperature and end tokens.
SampleFn = Callable[..., Rollouts]


class TrainedPrompts:
    """Samples and scores completions of trained prompts.

    Args:
        task: Whose trained prompts.
        token_ids: Token ids of every trained prompt.
        prompt_tokens: Padded length of a prompt.
        sample: `gj.sample` with everything but prompts, group size and key.
        policy: Without trained parameters.
        pool: Worker processes for rewards; None where a Python function scores.
        processes: The processes of the run, which must call `score` together.
    """

    def __init__(
        self,
        task: Task,
        token_ids: Sequence[Sequence[int]],
        prompt_tokens: int,
        sample: SampleFn,
        policy: Policy,
        pool: VerifierPool | None,
        processes: Processes,
    ):
        self.task, self.token_ids = task, token_ids
        self._prompt_tokens, self._sample, self._policy = prompt_tokens, sample, policy
        self._pool, self._processes = pool, processes

    def __len__(self) -> int:
        return len(self.token_ids)

    def sample(
        self, params: Any, indices: np.ndarray, key: jax.Array, group_size: int
    ) -> Rollouts:
        """[P, group_size, T] completions of the prompts [P], on the device."""
        rows = [self.token_ids[i] for i in indices]
        return self.sample_rows(
            params, rows, indices, key, group_size, self._prompt_tokens
        )

    def sample_rows(
        self,
        params: Any,
        rows: Sequence[Sequence[int]],
        indices: np.ndarray,
        key: jax.Array,
        group_size: int,
        prompt_tokens: int,
    ) -> Rollouts:
        """[P, group_size, T] completions of other token ids, under the keys of the
        prompts `indices` [P]."""
        ids, mask = pad_left(rows, prompt_tokens, self.task.tokenizer.pad_token_id)
        return self._sample(
            self._policy.replace(params),
            ids,
            mask,
            group_size=group_size,
            key=key,
            prompt_indices=np.asarray(indices, np.int32),
        )

    def score(self, sampled: HostRollouts, indices: np.ndarray) -> ScoredRollouts:
        """The completions [P, G, T] with rewards [P, G]."""
        examples = [self.task.train[i] for i in indices]
        return score_rollouts(self.task, sampled, examples, self._pool, self._processes)
