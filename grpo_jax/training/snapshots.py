"""The policies that a run left on disk, for looking at them afterwards."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Policy, init_policy
from grpo_jax.training.checkpoint import load_params
from grpo_jax.training.config import from_dict
from grpo_jax.training.run_directory import read_config_dict


def saved_steps(run_dir: Path | str) -> list[int]:
    """Steps of a run whose policy is on disk: 0 and those of its checkpoints."""
    run_dir = Path(run_dir)
    names = [path.name for path in (run_dir / "checkpoints").glob("*")]
    start = [0] if (run_dir / "initial.safetensors").exists() else []
    return sorted({*start, *(int(name) for name in names if name.isdigit())})


def load_policy(run_dir: Path | str, step: int) -> Policy:
    """The policy of a run after `step` steps, one of `saved_steps`.

    Raises:
        ConfigError: there is none of that step, or it cannot be read.
    """
    run_dir = Path(run_dir)
    if step not in saved_steps(run_dir):
        raise ConfigError(
            f"step must be one of {saved_steps(run_dir)}, those that {run_dir} kept, "
            f"got {step}; checkpoint.every and checkpoint.keep say which are."
        )
    from safetensors import safe_open

    start = run_dir / "initial.safetensors"
    with safe_open(start, framework="numpy") as file:
        vocab_size = file.get_slice("embedding.embedding").get_shape()[0]
    config = from_dict(ModelConfig, read_config_dict(run_dir)["model"])
    config = dataclasses.replace(config, vocab_size=vocab_size)
    policy = init_policy(config, jax.random.key(0))
    if step == 0:
        params, _ = load_params(start, policy.params)
        return policy.replace(jax.tree.map(jnp.asarray, params))
    import orbax.checkpoint as ocp

    path = run_dir.absolute() / "checkpoints" / str(step) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path)["params"]
    # Through the host: like a new policy's, so that no program is compiled again.
    return policy.replace(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params))
