"""The config that a run recorded, as it is read later and from elsewhere.

config.json has paths as they were given, and the directory in which the run began; a
path is looked for there first, then where it is read. Runs that recorded no such
directory are taken to have begun above their own, if that is what their `run_dir` says.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from grpo_jax.models.pretrained import read_config
from grpo_jax.records import from_dict, overlaid
from grpo_jax.runs.command_configs import EvalConfig
from grpo_jax.runs.config import TaskConfig, TrainConfig
from grpo_jax.runs.config_files import with_paths
from grpo_jax.runs.directory import began_in, check_task_is_found, read_facts
from grpo_jax.runs.policies import default_dtype


def run_config(run_dir: Path | str) -> TrainConfig:
    """The config of a run, with paths that lead to its data from here too.

    What it names as "module:name" can be imported afterwards as it was where it began.

    Raises:
        ConfigError: the directory holds no run.
    """
    return recorded_config(Path(run_dir), read_facts(Path(run_dir)))


def recorded_config(run_dir: Path, facts: dict[str, Any]) -> TrainConfig:
    """`run_config` of the content of a config.json."""
    config = from_dict(TrainConfig, facts["config"])
    origin = began_in(run_dir, facts)
    if origin is None:
        return config
    names = [
        *config.task.rewards, config.task.name, config.objective.name,
        config.weights.name, config.optimizer.name, config.sampling.sampler or "",
        config.log.on_step or "", config.policy or "", *config.log.to,
    ]  # fmt: skip
    own = any(":" in name for name in names)
    if own and str(origin) not in sys.path:
        sys.path.append(str(origin))
    return with_paths(config, lambda path: _found(origin, path))


def _found(directory: Path, path: str) -> str:
    """The path from the directory, if something is there; else as it is (it may be a
    name on the Hub)."""
    there = directory / path
    return os.path.normpath(there) if there.exists() else path


def continued(config: TrainConfig) -> TrainConfig:
    """The config of a run to resume: the one it began with, and on top of it the
    settings that `config` was made with."""
    if not config.resume or not config.run_dir:
        return config
    if not (Path(config.run_dir) / "config.json").exists():
        return config  # refused where the directory is claimed
    begun = run_config(config.run_dir)
    config = overlaid(begun, config)
    # What a rule chose when the run began is not chosen anew where it is left open.
    for part, name in (
        ("sampling", "prompts"), ("sampling", "group_size"), ("model", "compute_dtype"),
        ("instrument", "every"), ("instrument", "at_start"), ("instrument", "prompts"),
        ("instrument", "group_size"), ("optimizer", "learning_rate"),
    ):  # fmt: skip
        settings = getattr(config, part)
        if getattr(settings, name) is None:
            chosen = {name: getattr(getattr(begun, part), name)}
            settings = dataclasses.replace(settings, **chosen)
            config = dataclasses.replace(config, **{part: settings})
    if config.micro_batch_tokens is None:
        tokens = begun.micro_batch_tokens
        config = dataclasses.replace(config, micro_batch_tokens=tokens)
    return config


def eval_settings(config: EvalConfig) -> EvalConfig:
    """The config with what it leaves open taken from its run, or from the defaults.

    The task is the run's, with the fields that `config.task` was made with on top, with
    all held-out prompts of its data where training evaluated some; so are the limits
    and environment variables of its rewards. Another task, by its name, has that task's
    defaults.

    Raises:
        ConfigError: the directory holds no run.
    """
    given = None if config.task is EvalConfig.task else config.task
    if not config.run_dir:
        return dataclasses.replace(
            config,
            task=_all_heldout(config.task),
            temperature=1.0 if config.temperature is None else config.temperature,
            compute_dtype=config.compute_dtype or _dtype_of(config.pretrained),
        )
    run_dir = Path(config.run_dir)
    facts = read_facts(run_dir)
    run = recorded_config(run_dir, facts)
    settings: dict[str, Any] = {
        "compute_dtype": run.model.compute_dtype,
        "temperature": run.sampling.temperature,
    }
    named = given is not None and "name" in given.given
    if given is not None and named and given.name != run.task.name:
        task = _all_heldout(given)
    else:
        if not named:
            again = "say where it is: --task module:name"
            check_task_is_found(facts, run.task.name, again)
        heldout = run.task.heldout_prompts or 0
        task = dataclasses.replace(run.task, heldout_prompts=heldout)
        task = task if given is None else overlaid(task, given)
        settings["max_new_tokens"] = facts.get("max_new_tokens")
        settings["max_prompt_tokens"] = run.sampling.max_prompt_tokens
        config = dataclasses.replace(
            config, scoring=overlaid(run.scoring, config.scoring)
        )
    open_ones = {k: v for k, v in settings.items() if getattr(config, k) is None}
    return dataclasses.replace(config, task=task, **open_ones)


def _dtype_of(pretrained: str | None) -> str:
    """What a model's directory (or Hub name) computes in by default."""
    if pretrained is None or default_dtype("bfloat16") == "float32":
        return "float32"  # whatever is stored there
    return default_dtype(read_config(pretrained).dtype)


def _all_heldout(task: TaskConfig) -> TaskConfig:
    """The task with all held-out prompts of its data, unless their number was given."""
    if "heldout_prompts" in task.given:
        return task
    return dataclasses.replace(task, heldout_prompts=0)
