"""Lengths of prompts and completions, and the shapes of a step that follow."""

import math
from typing import NamedTuple

from grpo_jax.errors import ConfigError
from grpo_jax.objectives.objective import Objective
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.rollouts.lengths import bucket, completion_buckets, completion_tokens
from grpo_jax.rollouts.refine import Piece, refined_length, template_pieces
from grpo_jax.runs.config import TrainConfig
from grpo_jax.tasks.types import Task


class Lengths(NamedTuple):
    """Encoded prompts, and how many tokens prompts and completions may have."""

    prompts: list[list[int]]  # token ids of the trained prompts
    prompt_length: int  # padded
    answer_tokens: int  # longest answer and EOS; max_new_tokens if not measured
    max_new_tokens: int  # T
    warnings: list[str]


class Shapes(NamedTuple):
    """Shapes of the update."""

    refine: list[Piece]  # parts of a prompt with a draft in it; [] without drafts
    train_prompt_length: int  # padded; with drafts longer than in sampling
    buckets: list[int]  # completion lengths


def lengths_stage(
    config: TrainConfig, objective: Objective, task: Task, *, warm_starts: bool
) -> Lengths:
    """Prompts as tokens, and the lengths that sampling needs.

    Raises:
        ConfigError: sampling.max_new_tokens is below the longest right answer.
    """
    examples = task.train + task.heldout
    if warm_starts and task.warm_start is not None and task.warm_start.longest:
        examples = [*examples, task.warm_start.longest]
    prompts = encode_prompts(task, examples)
    max_new_tokens, needed = config.sampling.max_new_tokens, 1
    if task.single_answer or max_new_tokens is None:
        needed = completion_tokens(task, examples)
    if max_new_tokens is None:
        max_new_tokens = _with_margin(needed, objective)
    if max_new_tokens < needed:
        raise ConfigError(
            f"sampling.max_new_tokens must be at least {needed} for task {task.name}, "
            f"its longest answer and EOS, got {max_new_tokens}."
        )
    return Lengths(
        prompts=prompts[: len(task.train)],
        prompt_length=bucket(max(map(len, prompts))),
        answer_tokens=needed if needed > 1 else max_new_tokens,
        max_new_tokens=max_new_tokens,
        warnings=_punished(objective, needed, max_new_tokens),
    )


def _with_margin(tokens: int, objective: Objective) -> int:
    """The longest answer plus, where length is punished, room for the punished part
    beyond it."""
    share = objective.overlong_share if objective.overlong == "punish" else 0.0
    margin = 1.0 if share == 1 else share / (1 - share)
    return tokens + math.ceil(tokens * margin)


def _punished(objective: Objective, needed: int, max_new_tokens: int) -> list[str]:
    """A warning where the length punishment reaches the longest right answer."""
    free = math.ceil(max_new_tokens * (1 - objective.overlong_share))
    if objective.overlong != "punish" or needed <= max(1, free):
        return []
    return [
        f"the longest right answer has {needed} of {max_new_tokens} tokens and "
        "will be punished for its length; raise sampling.max_new_tokens to "
        f"{_with_margin(needed, objective)} or leave it out."
    ]


def shapes_stage(
    config: TrainConfig, objective: Objective, task: Task, lengths: Lengths
) -> Shapes:
    """The update's prompt length and completion buckets.

    Raises:
        ConfigError: a refine template that is wrong, or that nothing uses.
    """
    refine, length = _refined(config, objective, task, lengths)
    longest = lengths.max_new_tokens
    # A history holds rollouts of many steps: one length for all.
    buckets = [longest] if objective.history > 1 else completion_buckets(longest)
    return Shapes(refine, length, buckets)


def _refined(
    config: TrainConfig, objective: Objective, task: Task, lengths: Lengths
) -> tuple[list[Piece], int]:
    """(parts of a refined prompt, its padded length); plain prompts without drafts."""
    template = config.sampling.refine_template
    if not objective.drafts:
        if template is not None:
            raise ConfigError(
                "sampling.refine_template changes nothing: "
                f"{config.objective.name} has no drafts; set objective.drafts or "
                "leave it out."
            )
        return [], lengths.prompt_length
    pieces = template_pieces(task.tokenizer, template or task.refine_template)
    longest = max(map(len, lengths.prompts))
    return pieces, bucket(refined_length(pieces, longest, lengths.max_new_tokens))
