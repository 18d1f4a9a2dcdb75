"""One step's rollouts: which prompts, their completions, scored and refilled."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.advantages import group_statistics
from grpo_jax.objectives.objective import Objective
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollouts.judging import (
    HostRollouts,
    ScoredRollouts,
    fetch_to_host,
)
from grpo_jax.rollouts.refine import Piece, refined_prompts
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.fields import PART
from grpo_jax.streams import RunKeys, Stream, host_rng
from grpo_jax.training.prompts import TrainedPrompts


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step's sampling cost: every completion drawn, kept or not."""

    tokens: int = 0
    failures: int = 0  # checks that hung or died
    errors: tuple[str, ...] = ()  # why rewards are missing

    @classmethod
    def of(cls, scored: ScoredRollouts) -> "Cost":
        """Cost of scored completions."""
        scores = scored.scores
        return cls(int(scored.lengths.sum()), scores.failures, tuple(scores.errors))

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.tokens + other.tokens,
            self.failures + other.failures,
            self.errors + other.errors,
        )


class Sampling(NamedTuple):
    """Completions of a step, on the device."""

    indices: np.ndarray  # [P] of the trained prompts
    rollouts: Rollouts  # [P, G, T]
    cost: Cost  # of drafts sampled before them


class Collected(NamedTuple):
    """A step's scored rollouts, on the host."""

    indices: np.ndarray  # [P] of the trained prompts
    scored: ScoredRollouts  # rollouts cut to the shortest bucket that holds them
    owned: np.ndarray  # [P, G] bool, samples that this process scored
    metrics: dict[str, float]
    cost: Cost
    without_rewards: str | None  # why no sample as first drawn has one, if so

    @property
    def rollouts(self) -> Rollouts:
        """[P, G, T] with rewards, T a bucket."""
        return self.scored.rollouts


# For rewards on the host: one small program, compiled in a run's first step.
_group_statistics = jax.jit(group_statistics)


def tied_groups(rewards: Any) -> np.ndarray:
    """[P] bool: all rewards of the group [P, G] are equal."""
    return np.asarray(_group_statistics(rewards).tied)


class Collector:
    """Samples and scores a step's prompts; a function of the parameters and the step.

    Args:
        prompts: The trained prompts.
        objective: Only its drafts and refills are read.
        num_prompts: P, prompts of a step.
        group_size: G.
        draft_template: Pieces that join a prompt and its draft; [] without drafts.
        train_prompt_tokens: Padded length of prompts in the update, with their drafts.
        buckets: Padded completion lengths of the update, shortest first.
        seed: The run's seed.
        keys: The run's PRNG keys.
        counts_failures: Whether checks can hang or die, and are counted.
    """

    def __init__(
        self,
        prompts: TrainedPrompts,
        objective: Objective,
        *,
        num_prompts: int,
        group_size: int,
        draft_template: Sequence[Piece],
        train_prompt_tokens: int,
        buckets: Sequence[int],
        seed: int,
        keys: RunKeys,
        counts_failures: bool,
    ):
        self._prompts, self._objective = prompts, objective
        self._num_prompts, self._group_size = num_prompts, group_size
        self._draft_template = draft_template
        self._train_prompt_tokens, self._buckets = train_prompt_tokens, buckets
        self._seed, self._keys, self._counts_failures = seed, keys, counts_failures
        self._order = -1, np.empty(0, int)  # (epoch, its permutation of the prompts)

    def sample(self, params: Any, step: int) -> Sampling:
        """Starts sampling a step's completions; drafts are sampled and scored first."""
        indices = self.prompts_of(step)
        key = jax.random.fold_in(self._keys.samples, step)
        rollouts, cost = self._sample(params, indices, key)
        return Sampling(indices, rollouts, cost)

    def fetch(self, sampling: Sampling) -> HostRollouts:
        """The completions on the host; with refills those of all processes."""
        return fetch_to_host(
            sampling.rollouts, all_processes=bool(self._objective.refills)
        )

    def score(
        self, params: Any, step: int, sampling: Sampling, sampled: HostRollouts
    ) -> Collected:
        """Scores a step's completions, and samples tied groups again where the
        objective refills them."""
        indices = sampling.indices
        scored = self._prompts.score(sampled, indices)
        cost = sampling.cost + Cost.of(scored)
        metrics, reason = _reward_parts(scored.scores), self._why_none(scored.scores)
        if self._objective.refills:
            indices, scored, more, refills = self._refill(params, step, indices, scored)
            cost, metrics = cost + more, metrics | refills
        metrics["completion/cut_off"] = float(1 - scored.ended.mean())
        metrics["tokens/sampled"] = cost.tokens
        if self._counts_failures:
            metrics["reward/failed"] = cost.failures
        scored = scored._replace(rollouts=self._trim(scored))
        return Collected(indices, scored, sampled.owned, metrics, cost, reason)

    def rescore(self, collected: Collected) -> np.ndarray:
        """[P, G] rewards of the same completions, computed once more."""
        sampled = HostRollouts(collected.rollouts, collected.owned)
        scored = self._prompts.score(sampled, collected.indices)
        return np.asarray(scored.rollouts.scored_rewards)

    def prompts_of(self, step: int) -> np.ndarray:
        """[P] indices of a step's trained prompts, all different.

        An epoch is a fresh permutation, cut into complete steps: the data position is a
        function of the step, and what remains (fewer than P) sits this epoch out.
        """
        p = self._num_prompts
        epoch, position = divmod(step, len(self._prompts) // p)
        if self._order[0] != epoch:
            rng = host_rng(self._seed, Stream.PROMPT_ORDER, epoch)
            self._order = epoch, rng.permutation(len(self._prompts))
        return self._order[1][position * p : (position + 1) * p]

    def _sample(
        self, params: Any, indices: np.ndarray, key: jax.Array
    ) -> tuple[Rollouts, Cost]:
        """(completions, cost of drafts); with drafts, prompts are extended by them."""
        objective, prompts = self._objective, self._prompts
        if not objective.drafts:
            rollouts = prompts.sample(params, indices, key, self._group_size)
            return rollouts, Cost()
        draft_key = jax.random.fold_in(self._keys.drafts, jax.random.bits(key))
        drafts = prompts.sample(params, indices, draft_key, objective.drafts)
        scored = prompts.score(fetch_to_host(drafts, all_processes=True), indices)
        rows = refined_prompts(
            self._draft_template,
            [prompts.token_ids[i] for i in indices],
            np.asarray(scored.rollouts.completions),
            np.asarray(scored.rollouts.completion_mask),
            np.asarray(scored.rollouts.scored_rewards),
            prompts.task.stop_ids,
        )
        rollouts = prompts.sample_rows(
            params, rows, indices, key, self._group_size, self._train_prompt_tokens
        )
        return rollouts, Cost.of(scored)

    def _refill(
        self, params: Any, step: int, indices: np.ndarray, scored: ScoredRollouts
    ) -> tuple[np.ndarray, ScoredRollouts, Cost, dict[str, float]]:
        """(indices, scored rollouts, further cost, metrics) with tied groups replaced
        by informative ones of other prompts, within the allowed number of rounds."""
        indices, texts = np.array(indices), list(scored.texts)
        # Copies that can be written to.
        rollouts, lengths, ended = jax.tree.map(
            np.array, (scored.rollouts, scored.lengths, scored.ended)
        )
        cost, rounds, replaced = Cost(), 0, 0
        while rounds < self._objective.refills:
            tied = np.flatnonzero(tied_groups(rollouts.scored_rewards))
            if not len(tied):
                break
            rounds += 1
            others, new, spent = self._other_groups(params, step, rounds, indices)
            cost += spent
            informative = np.flatnonzero(~tied_groups(new.rollouts.scored_rewards))
            for old, source in zip(tied, informative, strict=False):
                indices[old], texts[old] = others[source], new.texts[source]
                lengths[old], ended[old] = new.lengths[source], new.ended[source]
                for array, values in zip(
                    jax.tree.leaves(rollouts),
                    jax.tree.leaves(new.rollouts),
                    strict=True,
                ):
                    array[old] = values[source]
                replaced += 1
        scored = scored._replace(
            rollouts=rollouts, texts=texts, lengths=lengths, ended=ended
        )
        metrics: dict[str, float] = {
            "group/refills": rounds,
            "group/refilled": replaced,
        }
        return indices, scored, cost, metrics

    def _other_groups(
        self, params: Any, step: int, rounds: int, indices: np.ndarray
    ) -> tuple[np.ndarray, ScoredRollouts, Cost]:
        """(indices, scored rollouts, cost) of as many prompts outside the batch."""
        rng = host_rng(self._seed, Stream.REFILLS, step, rounds)
        rest = np.setdiff1d(np.arange(len(self._prompts)), indices)
        others = rng.permutation(rest)[: len(indices)]
        key = jax.random.fold_in(jax.random.fold_in(self._keys.refills, step), rounds)
        sampled, cost = self._sample(params, others, key)
        scored = self._prompts.score(fetch_to_host(sampled, all_processes=True), others)
        return others, scored, cost + Cost.of(scored)

    def _why_none(self, scores: Scores) -> str | None:
        """Why no sample has a reward; None where one has.

        A check that hangs is the completion's fault under a verifier of this package,
        the function's where all checks of a user's do."""
        missing, failed = np.isnan(scores.rewards), scores.failed > 0
        reward = self._prompts.task.reward
        users = [] if callable(reward) else [r.name for r in reward if ":" in r.name]
        if not (missing | (failed & bool(users))).all():
            return None
        if missing.all():
            return f"all {missing.size} rewards are missing: {scores.errors[0][:300]}"
        first = f"; the first error: {scores.errors[0][:300]}" if scores.errors else ""
        return (
            f"the checks of all {missing.size} samples hung or died, with the rewards "
            f"{', '.join(users)}{first}; scoring.timeout_s is the limit of a check"
        )

    def _trim(self, scored: ScoredRollouts) -> Rollouts:
        """Completions cut to the shortest bucket that holds them all."""
        rollouts, longest = scored.rollouts, int(scored.lengths.max())
        t = next(t for t in self._buckets if t >= longest)
        return rollouts._replace(
            completions=rollouts.completions[..., :t],
            completion_mask=rollouts.completion_mask[..., :t],
            behaviour_logprobs=rollouts.behaviour_logprobs[..., :t],
        )


def _reward_parts(scores: Scores) -> dict[str, float]:
    """Mean of each reward, where there are several; before any refills. NaN where
    all its values are missing."""
    return {
        f"{PART}{name}": float(np.nanmean(values))
        if np.isfinite(values).any()
        else float("nan")
        for name, values in scores.parts.items()
    }
