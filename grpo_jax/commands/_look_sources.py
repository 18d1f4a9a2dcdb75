"""What `grpo-jax look` measures: rollouts by step, and the policies that sampled."""

import dataclasses
import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.errors import ConfigError
from grpo_jax.models.adapters import load_factors, with_adapter
from grpo_jax.models.hub import load_tokenizer, local_directory
from grpo_jax.models.policy import Policy, add_lora, merge_lora
from grpo_jax.models.pretrained import load_pretrained, read_config
from grpo_jax.rollouts.forms import ROW_FORMS, RowForm, find_form
from grpo_jax.rollouts.reading import StepRollouts, chosen_step, each_step
from grpo_jax.rollouts.sources import files_of, read_file
from grpo_jax.runs.command_configs import LookConfig
from grpo_jax.runs.policies import default_dtype
from grpo_jax.runs.recorded import run_config
from grpo_jax.runs.snapshots import load_policy, saved_steps

_STEP = "{step}"  # what a step's number stands for in names of policies


def measured_steps(config: LookConfig) -> Iterator[StepRollouts]:
    """What is to be measured."""
    form = _form(config)
    path = Path(config.rollouts)
    if not path.exists():
        raise ConfigError(
            f"there is no {path}; give a .jsonl or .parquet file of rollouts, or a "
            "directory of such files."
        )
    tokenizer = _tokenizer(config)
    if config.every_step:
        for found in each_step(path, tokenizer, form, None, None):
            if found.step is None:
                raise ConfigError(
                    "every_step is of rows with a step, and some have none; leave it "
                    "out."
                )
            yield found
        return
    rows = [
        row for file in files_of(path, ".jsonl", ".parquet") for row in read_file(file)
    ]
    yield chosen_step(rows, tokenizer, form, config.step)


def _form(config: LookConfig) -> RowForm:
    """The form that the config names, with rewards and length as it says."""
    form = find_form(config.form)
    if form == ROW_FORMS["samples"]:
        raise ConfigError(
            "look does not read samples.jsonl: its prompts lack their template, and it "
            "has some of a step's alone; keep a run's rollouts with rollouts.to_rows()."
        )
    if config.rewards:
        weighted = list(map(_weighted, config.rewards))
        weights = dict(weighted)
        if len(weights) < len(weighted):
            raise ConfigError(
                f"rewards names a field twice: {', '.join(config.rewards)}."
            )
        form = dataclasses.replace(form, rewards=weights)
    if config.max_new_tokens is not None:
        form = dataclasses.replace(form, max_new_tokens=config.max_new_tokens)
    return form


def _weighted(named: str) -> tuple[str, float]:
    """("format", 0.2) of "format=0.2"; ("format", 1.0) of "format"."""
    name, equals, given = named.rpartition("=")
    if not equals:
        return named, 1.0
    try:
        weight = float(given)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise ConfigError(
            f"rewards must be names or NAME=WEIGHT, such as format=0.2, got {named!r}."
        )
    return name, weight


def _tokenizer(config: LookConfig) -> Any:
    if config.run_dir:
        return load_tokenizer(Path(config.run_dir) / "tokenizer")
    assert config.pretrained is not None  # LookConfig has one of the two
    if config.adapter:
        folder = local_directory(_any_step(config.adapter, config.step))
        if (folder / "tokenizer_config.json").exists():
            return load_tokenizer(folder)
    return load_tokenizer(local_directory(_any_step(config.pretrained, config.step)))


def _any_step(name: str, step: int | None) -> str:
    """The name with a step in it, or with the first that there is: before rollouts are
    read their steps are not known."""
    if _STEP not in name or step is not None:
        return _at_step(name, step)
    found = sorted(glob.glob(name.replace(_STEP, "*")))
    if not found:
        raise ConfigError(f"there is no {name}, whatever the step.")
    return found[0]


def _at_step(name: str, step: int | None) -> str:
    if _STEP in name and step is None:
        raise ConfigError(
            f"{name} names a step, and the rollouts have none; leave {_STEP} out, or "
            "give their rows a step."
        )
    return name.replace(_STEP, str(step))


def _run_step(config: LookConfig, step: int | None) -> int:
    """The step of the run's checkpoint nearest to a step; None: the last."""
    assert config.run_dir is not None
    saved = saved_steps(config.run_dir)
    if not saved:
        raise ConfigError(f"{config.run_dir} holds no policy yet.")
    wanted = saved[-1] if step is None else step
    return min(saved, key=lambda x: abs(x - wanted))


def source_of(config: LookConfig, step: int | None) -> str:
    """What the policy of a step's rollouts is, in words."""
    if config.run_dir:
        return f"step {_run_step(config, step)} of {config.run_dir}"
    assert config.pretrained is not None  # LookConfig has one of the two
    name = _at_step(config.pretrained, step)
    if config.adapter is None:
        return name
    return f"{name} with {_at_step(config.adapter, step)}"


def load_source(config: LookConfig, step: int | None) -> Policy:
    """The policy that sampled a step's rollouts."""
    if config.run_dir:
        policy = load_policy(config.run_dir, _run_step(config, step))
        dtype = config.compute_dtype
    else:
        assert config.pretrained is not None  # LookConfig has one of the two
        name = _at_step(config.pretrained, step)
        policy = load_pretrained(name, dtype="float32")
        dtype = config.compute_dtype or default_dtype(read_config(name).dtype)
    if dtype is not None:
        policy = policy.reconfigured(compute_dtype=dtype)
    if config.adapter is not None:
        policy = _adapted(config, policy, _at_step(config.adapter, step))
    default = type(config).__dataclass_fields__["lora_rank"].default
    if policy.frozen is not None and config.lora_rank != default:
        raise ConfigError(
            f"lora_rank is of new factors, and {source_of(config, step)} has its own; "
            "leave it out."
        )
    return policy


def _adapted(config: LookConfig, policy: Policy, adapter: str) -> Policy:
    """The policy with an adapter: its factors alone are trained, or all together."""
    folder = local_directory(adapter)
    adapted = with_adapter(policy.config, folder)
    policy = add_lora(
        policy,
        rank=adapted.lora_rank,
        alpha=adapted.lora_alpha,
        targets=adapted.lora_targets,
        key=jax.random.key(0),
    )
    factors = jax.tree.map(jnp.asarray, load_factors(folder, adapted))
    policy = policy.replace(factors)
    return policy if config.parameters == "lora" else merge_lora(policy)


def sampling_temperature(config: LookConfig) -> float:
    """As given, or the run's."""
    if config.temperature is not None:
        return config.temperature
    return run_config(config.run_dir).sampling.temperature if config.run_dir else 1.0
