"""Policies that a run saved, loaded again by step."""

from pathlib import Path

import jax

from grpo_jax.errors import ConfigError
from grpo_jax.models.lora import without_lora
from grpo_jax.models.policy import Policy, abstract_policy
from grpo_jax.runs.directory import read_facts
from grpo_jax.runs.params import restore_params
from grpo_jax.runs.policies import load_base, model_of_run, with_factors
from grpo_jax.runs.recorded import run_config


def saved_steps(run_dir: Path | str) -> list[int]:
    """Steps of a run whose policy is on disk: 0 and those of its checkpoints."""
    run_dir = Path(run_dir)
    names = [path.name for path in (run_dir / "checkpoints").glob("*")]
    started = (run_dir / "initial.safetensors").exists() or names
    start = [0] if started else []
    return sorted({*start, *(int(name) for name in names if name.isdigit())})


def pick_step(run_dir: Path, step: int | None) -> int:
    """`step` if it is one of `saved_steps`; None: the newest of them.

    Raises:
        ConfigError: that step was not saved, or the directory is no run's.
    """
    read_facts(run_dir)  # raises if the directory is no run's
    steps = saved_steps(run_dir)
    if not steps:
        raise ConfigError(f"{run_dir} holds no policy yet; it was stopped too early.")
    if step is not None and step not in steps:
        raise ConfigError(
            f"step must be one of {steps}, those that {run_dir} kept, "
            f"got {step}; checkpoint.every and checkpoint.keep say which are."
        )
    return steps[-1] if step is None else step


def load_policy(run_dir: Path | str, step: int | None = None) -> Policy:
    """The policy of a run after `step` steps, one of `saved_steps`; None: the newest.

    Raises:
        ConfigError: that step was not saved, or cannot be read.
    """
    run_dir = Path(run_dir)
    config = run_config(run_dir)
    step = pick_step(run_dir, step)
    model = model_of_run(run_dir, config)
    policy = abstract_policy(without_lora(model))
    if step == 0 or model.lora_rank:  # else every parameter is in the checkpoint
        policy = load_base(run_dir, model, config.pretrained)
    if model.lora_rank:
        key = jax.random.key(config.seed)
        policy = with_factors(policy, model, key, config.pretrained)
    if step == 0:
        return policy
    params = restore_params(run_dir / "checkpoints" / str(step))
    return policy.replace(params)
