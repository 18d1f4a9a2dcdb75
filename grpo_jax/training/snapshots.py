"""The policies that a run left on disk, for looking at them afterwards, and prompts to
look at them with: of tasks where one completion is right, so that truth is exact."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.models.decoder import Policy, abstract_policy
from grpo_jax.models.hub import load_tokenizer
from grpo_jax.models.lora import save_adapter, without_lora
from grpo_jax.models.pretrained import save_pretrained
from grpo_jax.rollouts.encoding import (
    answer_rollouts,
    encode_imitated,
    encode_prompts,
)
from grpo_jax.rollouts.sampling import sample
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks import Task
from grpo_jax.training.checkpoint import restore_params
from grpo_jax.training.config import TrainConfig, from_dict
from grpo_jax.training.policies import load_base, model_of_run, with_factors
from grpo_jax.training.run_directory import read_config_dict, read_facts


def saved_steps(run_dir: Path | str) -> list[int]:
    """Steps of a run whose policy can be had: 0 and those of its checkpoints."""
    run_dir = Path(run_dir)
    names = [path.name for path in (run_dir / "checkpoints").glob("*")]
    begun = (run_dir / "initial.safetensors").exists() or names
    start = [0] if begun else []
    return sorted({*start, *(int(name) for name in names if name.isdigit())})


def pick_step(run_dir: Path, step: int | None) -> int:
    """The step itself, one of `saved_steps`; None: the newest of them.

    Raises:
        ConfigError: there is none of that step, or the directory holds no run.
    """
    read_facts(run_dir)  # its error first
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
        ConfigError: there is none of that step, or it cannot be read.
    """
    run_dir = Path(run_dir)
    config = from_dict(TrainConfig, read_config_dict(run_dir))
    step = pick_step(run_dir, step)
    model = model_of_run(run_dir, config)
    policy = abstract_policy(without_lora(model))
    if step == 0 or model.lora_rank:  # else every parameter is in the checkpoint
        policy = load_base(run_dir, model, config.pretrained)
    if model.lora_rank:
        policy = with_factors(policy, model, jax.random.key(config.seed))
    if step == 0:
        return policy
    params = restore_params(run_dir / "checkpoints" / str(step))
    return policy.replace(params)


def pick_answers(task: Task, count: int, *, seed: int, length: int) -> Rollouts:
    """[P, 1, length] right answers of up to `count` trained prompts, drawn by `seed`.

    Prompts are padded to what any trained prompt and its answer take, so that other
    seeds have the same shapes.
    """
    pick = np.random.default_rng([seed, 9]).permutation(len(task.train))
    prompts, answers = (f(task, task.train) for f in (encode_prompts, encode_imitated))
    rows = zip(prompts, answers, strict=True)
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


def export(
    run_dir: Path | str,
    directory: Path | str,
    *,
    step: int | None = None,
    adapter: bool = False,
) -> int:
    """Writes a run's policy and tokenizer as a model directory; returns its step.

    Args:
        step: One of `saved_steps`; None: the newest.
        adapter: Write the LoRA factors alone, as PEFT reads them.

    Raises:
        ConfigError: no such step, or no factors to write.
    """
    run_dir, directory = Path(run_dir), Path(directory)
    facts = read_facts(run_dir)
    step = pick_step(run_dir, step)
    if (directory / "checkpoints").exists() or directory.is_file():
        raise ConfigError(
            f"{directory} is a run or a file; export to a directory of its own."
        )
    policy = load_policy(run_dir, step)
    if adapter:
        base = facts["config"].get("pretrained")  # else `export --step 0` writes it
        save_adapter(policy.params, policy.config, directory, base=base)
        return step
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    ends = facts.get("eos_ids")
    save_pretrained(policy, directory, tokenizer=tokenizer, eos_ids=ends)
    return step
