"""Which objective and which prompt weights a config asks for, checked."""

import dataclasses
from typing import Any

import optax

from grpo_jax.errors import ConfigError, unknown_name
from grpo_jax.objectives.loss import scale_weights
from grpo_jax.objectives.objective import Objective
from grpo_jax.objectives.presets import OBJECTIVES
from grpo_jax.parallel.memories import MEMORIES
from grpo_jax.preconditioner import PromptWeights
from grpo_jax.prompt_weights import WEIGHTS
from grpo_jax.runs.config import (
    ObjectiveConfig,
    TrainConfig,
    WarmStartConfig,
    WeightsConfig,
)
from grpo_jax.runs.objects import check_weights, made
from grpo_jax.tasks.types import Task, WarmStart


def resolve_objective(config: TrainConfig, own: Objective | None = None) -> Objective:
    """The preset with the config's overrides; named weights replace its scale.

    Args:
        config: A run's.
        own: The user's objective, in place of a preset.

    Raises:
        ConfigError: an override changes nothing, or choices do not go together.
    """
    choice = config.objective
    if own is None and choice.name not in OBJECTIVES:
        raise unknown_name("objective", choice.name, [*OBJECTIVES, "module:name"])
    preset = OBJECTIVES[choice.name] if own is None else own
    overrides = _given(choice)
    if config.weights.name != "objective":
        if "scale" in overrides:
            raise ConfigError(
                "objective.scale changes nothing where weights.name is "
                f"{config.weights.name}: the weights are the scale; leave one out."
            )
        preset = dataclasses.replace(preset, scale="none")
    try:
        objective = dataclasses.replace(preset, **overrides)
    except ValueError as error:
        raise ConfigError(f"objective {choice.name}: {error}") from error
    used = objective.uses()
    for field in overrides:
        if field not in used:
            raise ConfigError(
                f"objective.{field} changes nothing in {choice.name} as configured "
                f"({objective.formula()}); leave it out."
            )
    _check_combination(config, objective)
    return objective


def _check_combination(config: TrainConfig, objective: Objective) -> None:
    updates = config.updates_per_rollout
    check_updates(objective, updates, config.batch.prompts, config.objective.name)
    for field in ("stop_deviation", "disjoint"):  # in a preset they may stay unused
        if updates == 1 and getattr(config.objective, field):
            raise ConfigError(
                f"objective.{field} changes nothing with one update per rollout; "
                "raise updates_per_rollout or leave it out."
            )


def check_updates(
    objective: Objective, updates: int, prompts: int | None, name: str
) -> None:
    """ConfigError where an objective cannot make its updates.

    Args:
        objective: Whose loss.
        updates: Updates of one rollout.
        prompts: P of a rollout; None: not known yet.
        name: What the objective is called.
    """
    if updates > 1 and not (objective.has_ratio() or objective.disjoint):
        raise ConfigError(
            f"updates_per_rollout must be 1 for {name}, which has no importance "
            f"ratio, got {updates}; the second update would be off policy."
        )
    if objective.disjoint and prompts is not None and prompts % updates:
        raise ConfigError(
            f"updates_per_rollout must divide sampling.prompts for {name}, each of "
            f"whose updates has its own prompts, got {updates} and {prompts}."
        )
    if objective.history > 1:
        _check_history(objective)


def _check_history(objective: Objective) -> None:
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


def check_reference_memory(memory: str, objective: Objective, *, lora: bool) -> None:
    """ConfigError where a reference policy on the host is asked for that is not there.

    Args:
        memory: One of `MEMORIES`.
        objective: Whose KL term has a reference policy, if any.
        lora: Factors of a frozen base are trained.
    """
    if memory not in MEMORIES:
        raise unknown_name("reference_memory", memory, MEMORIES)
    if memory == "device":
        return
    if not objective.kl_coef:
        raise ConfigError(
            "reference_memory host changes nothing with kl_coef 0, which has no "
            "reference policy; leave it out."
        )
    if lora:
        raise ConfigError(
            "reference_memory host changes nothing with LoRA: the reference policy is "
            "the frozen base, which the policy needs on the devices; leave it out."
        )


def resolve_weights(
    config: TrainConfig,
    objective: Objective,
    num_prompts: int,
    own: Any = None,
) -> PromptWeights:
    """The rule that a config names; by default the objective's scale.

    Args:
        config: A run's.
        objective: What it asks for.
        num_prompts: Trained prompts.
        own: The user's rule, or a function that makes it.

    Raises:
        ConfigError: an unknown rule, or a setting that it does not have.
    """
    choice = config.weights
    settings, name = _given(choice), choice.name
    rule = WEIGHTS.get(name)
    if own is None and rule is None and name != "objective":
        choices = ["objective", *WEIGHTS, "module:name"]
        raise unknown_name("weights", name, choices)
    for field in settings:
        if rule is None or field not in rule.uses:
            uses = ", ".join(rule.uses) if rule and rule.uses else "none"
            raise ConfigError(
                f"weights.{field} changes nothing in weights {name} (its settings: "
                f"{uses}); leave it out."
            )
    if own is not None:
        return made(own, PromptWeights, check_weights, num_prompts=num_prompts)
    if rule is None:
        return scale_weights(objective)
    if "power_end" in settings:
        start, end = settings.pop("power", 1.0), settings.pop("power_end")
        settings["power"] = optax.linear_schedule(start, end, max(1, config.steps - 1))
    try:
        return rule.build(settings, num_prompts)
    except ValueError as error:
        raise ConfigError(f"weights.{error}") from error


def weights_text(choice: WeightsConfig) -> str:
    """' | w = ...' for the headline; '' where the formula has the weights."""
    if choice.name == "objective":
        return ""
    settings = ", ".join(f"{k} {v:g}" for k, v in _given(choice).items())
    if choice.name not in WEIGHTS:
        return f" | w = {choice.name}"
    return f" | w = {WEIGHTS[choice.name].text}" + (
        f" ({settings})" if settings else ""
    )


def warm_start_settings(config: WarmStartConfig, task: Task) -> WarmStart:
    """The warm start of a task, with the config's overrides.

    Raises:
        ConfigError: a target pass rate where it cannot be measured exactly.
    """
    overrides = _given(config)
    defaults = task.warm_start
    if defaults is None:
        raise ConfigError(f"task {task.name} has no warm start.")
    if "target_pass_rate" in overrides and defaults.target_pass_rate is None:
        raise ConfigError(
            f"warm_start.target_pass_rate needs a task with one right completion, and "
            f"{task.name} has many; set warm_start.max_steps instead."
        )
    if overrides.get("noisy_steps") and not defaults.noisy_steps:
        raise ConfigError(
            f"warm_start.noisy_steps changes nothing: task {task.name} has no spoiled "
            "answers; leave it out."
        )
    return dataclasses.replace(defaults, **overrides)


def _given(
    config: ObjectiveConfig | WeightsConfig | WarmStartConfig,
) -> dict[str, Any]:
    """The fields that are not None, without the record's name or switch."""
    values = dataclasses.asdict(config)
    return {
        name: value
        for name, value in values.items()
        if value is not None and name not in ("name", "enabled")
    }
