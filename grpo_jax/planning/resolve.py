"""Which objective and which prompt weights a config asks for, checked."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from grpo_jax.errors import ConfigError, unknown_name
from grpo_jax.objectives.loss import scale_weights
from grpo_jax.objectives.presets import OBJECTIVES, Objective
from grpo_jax.preconditioner import PromptWeights, std_weights, unit_weights
from grpo_jax.prompt_weights import (
    batch_std_weights,
    beta_weights,
    finite_group_weights,
    group_mean_weights,
    posterior_weights,
)
from grpo_jax.runs.config import TrainConfig, WarmStartConfig, WeightsConfig
from grpo_jax.tasks.types import Task, WarmStart

# Rules and scales whose formula is about pass rates.
_NEED_PASS_RATES = ("group_mean", "beta", "finite_group", "shrunk", "posterior")


@dataclasses.dataclass(frozen=True)
class Rule:
    uses: tuple[str, ...]  # settings of `WeightsConfig`
    build: Callable[[dict[str, Any], int], PromptWeights]  # (settings, prompts)
    text: str


WEIGHTS = {
    "unit": Rule((), lambda s, n: unit_weights(), "1"),
    "std": Rule(
        ("power", "power_end", "eps", "ddof"),
        lambda s, n: std_weights(**s),
        "(std + eps)^-power",
    ),
    "batch_std": Rule(
        ("eps", "ddof"), lambda s, n: batch_std_weights(**s), "1 / batch's std"
    ),
    "group_mean": Rule(
        ("eps",), lambda s, n: group_mean_weights(**s), "1 / group's mean"
    ),
    "beta": Rule((), lambda s, n: beta_weights(), "1 / Beta density at group's mean"),
    "finite_group": Rule(
        ("group_size",),
        lambda s, n: finite_group_weights(**s),
        "w_G(mean) / ((1 - 1/n) mean (1 - mean)), n rewards",
    ),
    "shrunk": Rule(
        ("power", "power_end", "prior"),
        lambda s, n: posterior_weights(None, **s),
        "(posterior std of this group)^-power",
    ),
    "posterior": Rule(
        ("power", "power_end", "prior", "discount"),
        lambda s, n: posterior_weights(n, **s),
        "(posterior std over visits)^-power",
    ),
}


def resolve_objective(config: TrainConfig) -> Objective:
    """The preset with the config's overrides; weights that are named replace its scale.

    Raises:
        ConfigError: an override changes nothing, or choices do not go together.
    """
    choice = config.objective
    if choice.name not in OBJECTIVES:
        raise unknown_name("objective", choice.name, OBJECTIVES)
    preset = OBJECTIVES[choice.name]
    given = {k: v for k, v in dataclasses.asdict(choice).items() if v is not None}
    del given["name"]
    if config.weights.name != "objective":
        if "scale" in given:
            raise ConfigError(
                "objective.scale changes nothing where weights.name is "
                f"{config.weights.name}: the weights are the scale; leave one out."
            )
        preset = dataclasses.replace(preset, scale="none")
    try:
        objective = dataclasses.replace(preset, **given)
    except ValueError as error:
        raise ConfigError(f"objective {choice.name}: {error}") from error
    used = objective.uses()
    for field in given:
        if field not in used:
            raise ConfigError(
                f"objective.{field} changes nothing in {choice.name} as configured "
                f"({objective.formula()}); leave it out."
            )
    _check_combination(config, objective)
    return objective


def _check_combination(config, objective):
    name, updates = config.objective.name, config.updates_per_rollout
    if updates > 1 and not (objective.has_ratio() or objective.disjoint):
        raise ConfigError(
            f"updates_per_rollout must be 1 for {name}, which has no importance "
            f"ratio, got {updates}; the second update would be off policy."
        )
    if objective.disjoint and config.sampling.prompts % updates:
        raise ConfigError(
            f"updates_per_rollout must divide sampling.prompts for {name}, each of "
            f"whose updates has its own prompts, got {updates} and "
            f"{config.sampling.prompts}."
        )
    for field in ("stop_deviation", "disjoint"):  # a row itself may well say so
        if updates == 1 and getattr(config.objective, field):
            raise ConfigError(
                f"objective.{field} changes nothing with one update per rollout; "
                "raise updates_per_rollout or leave it out."
            )
    if objective.history > 1:
        for field, wrong in (
            ("kl_coef", objective.kl_coef),
            ("token_weight", objective.token_weight != "none"),
            ("overlong", objective.overlong == "mask"),
            ("ratio", not objective.has_ratio()),
            ("disjoint", objective.disjoint),
            ("tis_cap", objective.tis_cap is not None),
        ):
            if wrong:
                raise ConfigError(
                    f"objective.{field} {getattr(objective, field)} does not go with "
                    f"history {objective.history}: past iterates' rollouts are kept "
                    "with their sampler's log-probs alone, and used together."
                )
    scale = config.weights.name
    scale = objective.scale if scale == "objective" else scale
    if scale in _NEED_PASS_RATES:
        for field, wrong in (
            ("overlong punish", objective.overlong == "punish"),
            ("kl_in reward", objective.kl_coef and objective.kl_in == "reward"),
        ):
            if wrong:
                raise ConfigError(
                    f"{scale} weights need rewards that are pass rates, in [0, 1]; "
                    f"objective.{field} changes them; leave one out."
                )


def resolve_weights(
    config: TrainConfig, objective: Objective, num_prompts: int
) -> PromptWeights:
    """The rule that a config names, by default the one of the objective's scale.

    Raises:
        ConfigError: an unknown rule, or a setting that it does not have.
    """
    choice = config.weights
    given = {k: v for k, v in dataclasses.asdict(choice).items() if v is not None}
    name = given.pop("name")
    rule = WEIGHTS.get(name)
    if rule is None and name != "objective":
        raise unknown_name("weights", name, ["objective", *WEIGHTS])
    for field in given:
        if rule is None or field not in rule.uses:
            settings = ", ".join(rule.uses) if rule and rule.uses else "none"
            raise ConfigError(
                f"weights.{field} changes nothing in weights {name} (its settings: "
                f"{settings}); leave it out."
            )
    if choice.ddof is not None and choice.ddof not in (0, 1):
        raise ConfigError(f"weights.ddof must be 0 or 1, got {choice.ddof}.")
    if rule is None:
        return scale_weights(objective)
    if "power_end" in given:
        start, end = given.pop("power", 1.0), given.pop("power_end")
        given["power"] = optax.linear_schedule(start, end, max(1, config.steps - 1))
    try:
        return rule.build(given, num_prompts)
    except ValueError as error:
        raise ConfigError(f"weights.{error}") from error


def weights_text(choice: WeightsConfig) -> str:
    """' | w = ...' for the headline; nothing where the objective's formula says it."""
    if choice.name == "objective":
        return ""
    given = {k: v for k, v in dataclasses.asdict(choice).items() if v is not None}
    del given["name"]
    settings = ", ".join(f"{k} {v:g}" for k, v in given.items())
    return f" | w = {WEIGHTS[choice.name].text}" + (
        f" ({settings})" if settings else ""
    )


def warm_start_settings(config: WarmStartConfig, task: Task) -> WarmStart:
    """The task's own settings with the config's overrides.

    Raises:
        ConfigError: a target pass rate where it cannot be measured exactly.
    """
    overrides = dataclasses.asdict(config)
    del overrides["enabled"]
    given = {name: value for name, value in overrides.items() if value is not None}
    own = task.warm_start
    assert own is not None
    if "target_pass_rate" in given and own.target_pass_rate is None:
        raise ConfigError(
            f"warm_start.target_pass_rate needs a task with one right completion, and "
            f"{task.name} has many; set warm_start.max_steps instead."
        )
    if given.get("noisy_steps") and not own.noisy_steps:
        raise ConfigError(
            f"warm_start.noisy_steps changes nothing: task {task.name} has no spoiled "
            "answers; leave it out."
        )
    return dataclasses.replace(own, **given)
