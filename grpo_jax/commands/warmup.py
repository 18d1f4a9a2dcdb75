"""`grpo-jax warmup`: teach a new model, or a pretrained one, a task's worked solutions,
and save it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from grpo_jax.commands._arguments import parse, spelled_out
from grpo_jax.errors import ConfigError
from grpo_jax.models.policy import Policy, init_policy, merge_lora
from grpo_jax.models.pretrained import read_config, save_pretrained
from grpo_jax.parallel.processes import Processes
from grpo_jax.planning.resolve import warm_start_settings
from grpo_jax.records import as_type
from grpo_jax.rollouts.embedded import check_embedded
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.rollouts.lengths import bucket, completion_tokens, drop_long_prompts
from grpo_jax.runs.command_configs import WarmupConfig
from grpo_jax.runs.paths import cache_directory, use_compile_cache
from grpo_jax.runs.policies import (
    check_language,
    pretrained_policy,
    task_of,
    with_factors,
    with_settings,
)
from grpo_jax.tasks.types import Task, WarmStart
from grpo_jax.training.warm_start import warm_start


def warm_up(
    config: WarmupConfig,
    *,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Teaches a model a task's solutions and saves it as a model directory.

    Args:
        config: The model, the task and the directory.
        say: Gets lines of progress and warnings.
        stop: Asked between steps whether to stop.

    Returns:
        The directory; None if stopped, with nothing written.

    Raises:
        ConfigError: the task has no solutions, or `output` is not empty.
    """
    config = as_type(WarmupConfig, config, "config")
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output must be a new or empty directory, got {output}.")
    use_compile_cache(lambda text: say(f"warning: {text}"))
    task, settings = _task(config, say)
    policy = _policy(config, task)
    check_embedded(task, policy.config.vocab_size)
    examples = task.train + ([settings.longest] if settings.longest else [])
    prompts = encode_prompts(task, examples)
    result = warm_start(
        policy,
        task,
        settings,
        seed=config.seed,
        prompt_length=bucket(max(map(len, prompts))),
        length=config.max_new_tokens or completion_tokens(task, examples),
        temperature=1.0,
        cache=cache_directory() / "warm_starts",
        report=lambda stage, step, figure: say(f"{stage}: step {step}, {figure}"),
        warn=lambda text: say(f"warning: {text}"),
        processes=Processes(stop),
    )
    if result is None:
        return None
    say(f"{result.steps} supervised steps, {result}")
    save_pretrained(
        result.policy,
        output,
        tokenizer=task.tokenizer,
        eos_ids=task.ends,
    )
    default = "chat" if task.tokenizer.chat_template else "none"
    template = "" if task.template == default else f" --task.template {task.template}"
    say(f"written to {output}; train it with --pretrained {output}{template}")
    return output


def _task(config: WarmupConfig, say: Callable[[str], None]) -> tuple[Task, WarmStart]:
    """The task and its settings of supervised learning."""
    task = task_of(config.task, config.pretrained)
    for warning in task.warnings:
        say(f"warning: {warning}")
    if task.warm_start is None:
        raise ConfigError(f"task {task.name} has no solutions to imitate.")
    settings = warm_start_settings(config.warm_start, task)
    if config.model.lora_rank:
        raise ConfigError("model.lora_rank is for train; warmup trains whole models.")
    check_language(task)
    if config.max_prompt_tokens is not None:
        task, (left_out, _) = drop_long_prompts(task, config.max_prompt_tokens)
        say(f"left out for their length: {left_out} prompts")
    return task, settings


def _policy(config: WarmupConfig, task: Task) -> Policy:
    """The policy to teach: a pretrained one, or a new one."""
    if config.pretrained:
        model = with_settings(read_config(config.pretrained), config.model)
        policy = pretrained_policy(config.pretrained, model)
        if model.lora_rank:  # an adapter: learning goes on in the merged model
            key = jax.random.key(config.seed)
            policy = merge_lora(with_factors(policy, model, key, config.pretrained))
        return policy
    size = config.model.vocab_size or len(task.tokenizer)
    model = dataclasses.replace(config.model, vocab_size=size)
    return init_policy(model, jax.random.key(config.seed))


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    warm_up(parse(WarmupConfig, spelled_out(argv), __doc__))
    return 0
