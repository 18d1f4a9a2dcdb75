"""The policies that a run left on disk, for looking at them afterwards, and prompts to
look at them with: of tasks where one completion is right, so that truth is exact."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Policy, init_policy
from grpo_jax.rollouts.encoding import (
    answer_rollouts,
    encode_imitated,
    encode_prompts,
)
from grpo_jax.rollouts.sampling import sample
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks import Task
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


def pick_answers(task: Task, count: int, *, seed: int, length: int) -> Rollouts:
    """[P, 1, length] right answers of up to `count` trained prompts, drawn by `seed`.

    Prompts are padded to what any trained prompt and its answer take, so that other
    seeds have the same shapes.
    """
    pick = np.random.default_rng([seed, 9]).permutation(len(task.train))
    rows = zip(
        encode_prompts(task, task.train), encode_imitated(task, task.train), strict=True
    )
    longest = max(len(prompt) + len(answer) - 1 for prompt, answer in rows)
    examples = [task.train[i] for i in pick[:count]]
    answers = answer_rollouts(task, examples, longest, length)
    return jax.tree.map(jnp.asarray, answers)


def sample_groups(
    policy: Policy, answers: Rollouts, tokenizer, key: jax.Array, group_size: int
) -> Rollouts:
    """Groups [P, group_size, T] for `pick_answers`, with rewards: 1 where
    the completion is the answer, token by token."""
    found = sample(
        policy,
        answers.prompts,
        answers.prompt_mask,
        group_size=group_size,
        max_new_tokens=answers.completions.shape[-1],
        key=key,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    right = (found.completions == answers.completions) | (found.completion_mask == 0)
    right &= found.completion_mask == answers.completion_mask
    return found._replace(rewards=right.all(-1).astype(jnp.float32))
