"""Which learning rate a run takes by default, and which one is too high to go unsaid.

What is trained decides. The table is of AdamW with its first update at the full rate;
BUILD_NOTES.md has the measurements.
"""

from types import MappingProxyType
from typing import NamedTuple

from grpo_jax.runs.config import TrainConfig


class RateRule(NamedTuple):
    """Learning rates of one kind of run."""

    default: float
    high: float  # a warning above it
    trained: str  # what is trained, in words


RATES = MappingProxyType(
    {
        "new": RateRule(3e-4, 3e-3, "a new model"),
        "pretrained": RateRule(1e-5, 3e-5, "a pretrained model trained in full"),
        "lora": RateRule(3e-4, 5e-4, "LoRA on a pretrained model"),
    }
)


class LearningRate(NamedTuple):
    """A run's learning rate, at its peak."""

    value: float
    default: float  # of what is trained
    source: str  # in words: a default and of what, or given
    warning: str | None  # where it is high for what is trained

    def text(self) -> str:
        return f"learning rate {self.value:g}, {self.source}"


def rate_rule(*, pretrained: bool, lora: bool) -> RateRule:
    """The rates of a run: LoRA on a new model takes those of the new model."""
    return RATES["new" if not pretrained else "lora" if lora else "pretrained"]


def learning_rate(config: TrainConfig, *, lora: bool) -> LearningRate:
    """The config's learning rate, or the default of what it trains.

    Args:
        config: A resumed run's has the rate that it began with.
        lora: LoRA factors are trained (those of an adapter's directory too).
    """
    trained_before = config.pretrained is not None or config.policy is not None
    rule = rate_rule(pretrained=trained_before, lora=lora)
    given = config.optimizer.learning_rate
    if given is None:
        source = f"the default for {rule.trained}"
        return LearningRate(rule.default, rule.default, source, None)
    source = "as the run began" if config.resume else "as given"
    warning = None
    if given > rule.high:
        warning = (
            f"optimizer.learning_rate {given:g} is high for {rule.trained}: above "
            f"{rule.high:g} the first updates may destroy it, unless it is a tiny one. "
            f"The default is {rule.default:g}."
        )
    return LearningRate(given, rule.default, source, warning)
