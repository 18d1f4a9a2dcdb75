"""The settings of an optimizer, and which of them each optimizer reads.

Without jax, as config.py.
"""

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from grpo_jax.errors import ConfigError, unknown_name
from grpo_jax.records import Dtype, Record
from grpo_jax.runs.values import Decay, Natural, NotNegative, Positive, own

OPTIMIZER = own("an optimizer", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Record):
    """An optimizer behind a global-norm clip, or one of your own."""

    # adamw | adafactor | lion, or module:name: an optax optimizer, or a function of the
    # learning rate's schedule that makes one. Your own reads nothing of what follows
    # but the learning rate (if it is a function) and skip_empty
    name: Annotated[str, OPTIMIZER] = "adamw"
    # Peak; default: by what is trained with adamw, none with adafactor and lion
    learning_rate: Positive | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after warm-up
    warmup_steps: Natural = 0  # optimizer updates of linear warm-up
    # Decoupled, times the learning rate, on matrices only
    weight_decay: NotNegative = 0.0
    b1: Decay = 0.9  # adamw: decay of the mean; lion: the mean's part in a step
    # adamw: decay of the mean of squares, default 0.999; lion: of the mean, 0.99
    b2: Decay | None = None
    eps: NotNegative = 1e-8  # adamw's
    # In which adamw and lion keep the mean of gradients; adamw's mean of squares stays
    # float32, since bfloat16 would round its changes away
    mean_dtype: Annotated[Literal["float32", "bfloat16"], Dtype()] = "float32"
    clip_norm: NotNegative = 1.0  # global gradient norm kept below this; 0: no clipping
    # An update whose gradient is 0 everywhere, as where all groups tie, is left out;
    # False: a mean of past gradients and weight decay move the parameters on
    skip_empty: bool = True


_READ_BY_ALL = (
    "name", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip_norm",
    "skip_empty",
)  # fmt: skip
# Optimizer -> the settings that it reads beside those.
OPTIMIZERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adamw": ("b1", "b2", "eps", "mean_dtype"),
        "adafactor": (),
        "lion": ("b1", "b2", "mean_dtype"),
    }
)


def check_optimizer_config(config: OptimizerConfig) -> None:
    """ConfigError for an unknown name, or a setting that the optimizer does not read;
    one of the user's own is looked at where it is found."""
    if ":" in config.name:
        return
    if config.name not in OPTIMIZERS:
        raise unknown_name("optimizer", config.name, [*OPTIMIZERS, "module:name"])
    read = (*_READ_BY_ALL, *OPTIMIZERS[config.name])
    check_read(config, read, config.name, "leave it out")


def check_read(
    config: OptimizerConfig, read: Collection[str], optimizer: str, fix: str
) -> None:
    """ConfigError for a setting away from its default that is not among those `read`.

    Args:
        optimizer: What it is called in the error.
        fix: What to do about it.
    """
    plain = OptimizerConfig()
    for field in dataclasses.fields(config):
        if field.name in read:
            continue
        if getattr(config, field.name) != getattr(plain, field.name):
            raise ConfigError(
                f"optimizer.{field.name} changes nothing in {optimizer}; {fix}."
            )
