"""Specifications of rewards: `length(start=512,end=1024)=0.5`, read and checked."""

import inspect
import re

from grpo_jax.errors import ConfigError, unknown_name
from grpo_jax.rewards.types import Reward
from grpo_jax.rewards.verifiers import ANSWERS, VERIFIERS
from grpo_jax.user_code import NAME

_REWARD = re.compile(
    r"(?P<name>[^=()]+)(?:\((?P<options>[^()]*)\))?(?:=(?P<weight>.+))?"
)


def parse_reward(text: str) -> Reward:
    """Reads "math", "length(start=512,end=1024)=0.5" or "pkg:func=-0.2".

    Raises:
        ConfigError: an unknown verifier or option, or a weight that is not a number.
    """
    match = _REWARD.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(
            "a reward must be NAME, NAME=WEIGHT or NAME(OPTION=NUMBER,...)=WEIGHT, "
            f"got {text!r}; for example math=1.0 or length(start=512,end=1024)=0.5."
        )
    reward = Reward(
        name=match["name"],
        weight=_number(match["weight"] or "1", f"the weight of reward {text!r}"),
        options=tuple(
            _option(option, text) for option in (match["options"] or "").split(",")
        )
        if match["options"]
        else (),
    )
    check_reward(reward)
    return reward


def _option(option: str, text: str) -> tuple[str, float]:
    name, _, value = option.partition("=")
    return name, _number(value, f"option {name!r} of reward {text!r}")


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ConfigError(f"{what} must be a finite number, got {text!r}.")
    return value


def check_reward(reward: Reward) -> None:
    """Raises ConfigError, with the choices, unless the name and the options exist."""
    if ":" in reward.name:
        if not NAME.fullmatch(reward.name):
            raise ConfigError(
                f"your own reward must be module:function, got {reward.name!r}; for "
                "example mypackage.rewards:brevity."
            )
        if reward.options:
            raise ConfigError(
                f"reward {reward.name!r} is your own and takes no options, got "
                f"{dict(reward.options)}; give it a second function instead."
            )
        return
    if reward.name not in VERIFIERS:
        raise unknown_name("reward", reward.name, [*VERIFIERS, "module:function"])
    allowed, given = _options_of(reward.name), dict(reward.options)
    for name in given:
        if name not in allowed and not (name == "thinking" and reward.name in ANSWERS):
            raise ConfigError(
                f"reward {reward.name!r} has no option {name!r}; "
                f"its options: {', '.join(allowed) or 'none'}."
            )
    missing = [n for n, required in allowed.items() if required and n not in given]
    if missing:
        raise ConfigError(
            f"reward {reward.name!r} needs {' and '.join(missing)}; for example "
            "length(start=512,end=1024)=0.5."
        )
    if reward.name == "length" and not 0 <= given["start"] < given["end"]:
        raise ConfigError(
            f"reward 'length' must have 0 <= start < end, got start={given['start']:g} "
            f"and end={given['end']:g}."
        )


def _options_of(name: str) -> dict[str, bool]:
    """Options of a verifier -> whether they are required: its keyword arguments but
    `tokens`, which the pool fills in, and `thinking`, which `task.thinking` sets."""
    parameters = inspect.signature(VERIFIERS[name]).parameters.values()
    return {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in ("tokens", "thinking")
    }


def reward_text(reward: Reward) -> str:
    """A reward as `parse_reward` reads it, without the weight."""
    options = ",".join(f"{name}={value:g}" for name, value in reward.options)
    return f"{reward.name}({options})" if options else reward.name
