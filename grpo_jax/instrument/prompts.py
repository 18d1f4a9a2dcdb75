"""The probe prompts of a run, sampled and scored."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.rollouts.judging import HostRollouts, ScoredRollouts, fetch_to_host
from grpo_jax.rollouts.types import Rollouts


class IndexedPrompts(Protocol):
    """Prompts that are sampled and scored by their indices."""

    def sample(
        self, params: Any, indices: np.ndarray, key: jax.Array, group_size: int
    ) -> Rollouts:
        """[P, group_size, T] completions of the prompts `indices` [P]."""
        ...

    def score(self, sampled: HostRollouts, indices: np.ndarray) -> ScoredRollouts:
        """The completions [P, G, T] of the prompts `indices` [P], with rewards."""
        ...


class ProbePrompts:
    """A fixed set of prompts, as many sampled at a time as a training step samples.

    Args:
        prompts: What samples and scores by index.
        indices: [P] of the probe prompts.
        group_size: Samples of each.
        step_samples: Completions of a training step, P * G.
        warn: Called with a sentence about missing rewards, or checks that hung.
    """

    def __init__(
        self,
        prompts: IndexedPrompts,
        indices: np.ndarray,
        *,
        group_size: int,
        step_samples: int,
        warn: Callable[[str], None],
    ):
        self.indices = indices
        self._prompts, self._group_size, self._warn = prompts, group_size, warn
        self._size = min(len(indices), max(1, step_samples // group_size))

    def __call__(self, params: Any, key: jax.Array) -> Rollouts:
        """[P, group_size, T] completions of the probe prompts, with rewards."""
        parts = []
        for start in range(0, len(self.indices), self._size):
            # The last part is filled up: one shape, one program.
            part = np.resize(self.indices[start : start + self._size], self._size)
            sampled = self._prompts.sample(params, part, key, self._group_size)
            parts.append(fetch_to_host(sampled, all_processes=True))
        count = len(self.indices)
        joined = jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)
        scored = self._prompts.score(joined, self.indices)
        errors, failures = scored.scores.errors, scored.scores.failures
        if errors:
            self._warn(f"instrument: {len(errors)} rewards missing: {errors[0][:200]}")
        if failures:
            self._warn(f"instrument: {failures} checks hung or died; they score 0.")
        return jax.tree.map(jnp.asarray, scored.rollouts)
