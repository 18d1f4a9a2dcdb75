"""Which learning rate a run takes by default, and which one is too high to go unsaid.

What is trained decides. The table is of AdamW with its first update at the full rate;
BUILD_NOTES.md has the measurements.
"""

from types import MappingProxyType
from typing import NamedTuple

from grpo_jax.errors import ConfigError
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.optimizers import OPTIMIZERS


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


# What a learning rate is, of the optimizers without a default.
_STEPS = MappingProxyType(
    {
        "adafactor": "it is the root mean square of an array's step, as about in adamw",
        "lion": "it is the step of every parameter, for which arXiv:2302.06675 takes a "
        "third to a tenth of adamw's",
    }
)


class LearningRate(NamedTuple):
    """A run's learning rate, at its peak."""

    value: float
    default: float | None  # of what is trained; None: the optimizer has none
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

    Raises:
        ConfigError: none is given, and the optimizer has no default.
    """
    given, name = config.optimizer.learning_rate, config.optimizer.name
    source = "as the run began" if config.resume else "as given"
    if name in OPTIMIZERS and name != "adamw":
        if given is None:
            raise ConfigError(
                f"optimizer.learning_rate must be given with optimizer.name {name}, "
                "got none: the default rates were measured with adamw alone; "
                f"{_STEPS[name]}."
            )
        return LearningRate(given, None, source, None)
    trained_before = config.pretrained is not None or config.policy is not None
    rule = rate_rule(pretrained=trained_before, lora=lora)
    if given is None:
        source = f"the default for {rule.trained}"
        return LearningRate(rule.default, rule.default, source, None)
    warning = None
    if given > rule.high:
        warning = (
            f"optimizer.learning_rate {given:g} is high for {rule.trained}: above "
            f"{rule.high:g} the first updates may destroy it, unless it is a tiny one. "
            f"The default is {rule.default:g}."
        )
    return LearningRate(given, rule.default, source, warning)
