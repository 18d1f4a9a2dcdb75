"""Prompt weights that no rule should give: not finite, or negative."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.runs.config import TrainConfig


def rule_name(config: TrainConfig) -> str:
    """What weighs the prompts of a run, in words."""
    if config.weights.name == "objective":
        return f"the scale of objective {config.objective.name}"
    return f"the prompt weights {config.weights.name}"


def odd_weights(rule: str, weights: np.ndarray, prompts: Sequence[str]) -> str | None:
    """A sentence on weights [P] that are not finite, or else on those below 0; None
    where there are none.

    Args:
        rule: What gave them, in words.
        weights: [P] float32.
        prompts: P texts.
    """
    for wrong, kind, effect in (
        (~np.isfinite(weights), "not finite", "such an update changes nothing"),
        (weights < 0, "negative", "such a prompt is trained towards low rewards"),
    ):
        if wrong.any():
            first = int(np.argmax(wrong))
            return (
                f"{rule} gave {weights[first]:g} to prompt {prompts[first][:80]!r} "
                f"({wrong.sum()} of {len(weights)} weights are {kind}): {effect}"
            )
    return None
