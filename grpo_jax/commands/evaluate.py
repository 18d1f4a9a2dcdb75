"""`grpo-jax eval`: ask a model (--pretrained DIR) or a run (--run-dir DIR) a task's
prompts: greedy, avg@k, pass@k. An interrupted evaluation is continued."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.commands._arguments import named_run, parse, spelled_out
from grpo_jax.errors import ConfigError
from grpo_jax.evaluation.exact import exact_pass_rates
from grpo_jax.evaluation.figures import summarise, table
from grpo_jax.evaluation.sampled import PromptAnswers, answer_prompts
from grpo_jax.intervals import mean_interval
from grpo_jax.models.policy import Policy
from grpo_jax.models.pretrained import load_pretrained
from grpo_jax.parallel.processes import Processes
from grpo_jax.rewards.pool import verifier_pool
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import answer_rollouts, encode_prompts, pad_left
from grpo_jax.rollouts.lengths import bucket, completion_tokens, drop_long_prompts
from grpo_jax.rollouts.sampling import sample
from grpo_jax.runs.config import EvalConfig, TrainConfig
from grpo_jax.runs.config_files import differences, from_dict, to_dict
from grpo_jax.runs.directory import read_config_dict, read_facts
from grpo_jax.runs.lines import JsonLines, read_lines, rewrite, write_json
from grpo_jax.runs.params import params_digest
from grpo_jax.runs.paths import use_compile_cache
from grpo_jax.runs.policies import (
    check_language,
    data_fingerprint,
    task_for_run,
    task_of,
)
from grpo_jax.runs.snapshots import load_policy, pick_step
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.types import Task

# What does not change an answer, and may differ when an evaluation is gone on with.
_FREE = ("output", "rows", "scoring.")


class _Asked(NamedTuple):
    """Who is asked what."""

    source: str
    policy: Policy
    task: Task
    examples: list[Example]
    indices: np.ndarray  # of the examples that are asked
    prompts: tuple[np.ndarray, np.ndarray]  # token ids and mask, of all examples
    length: int  # tokens of an answer, at most


def evaluate(
    config: EvalConfig, *, say: Callable[[str], None] = print
) -> tuple[Path, dict[str, Any]]:
    """Asks, scores and counts; goes on where an earlier call was interrupted.

    Returns:
        The output directory, and what its eval.json holds: `figures` per way of asking
        (`greedy`, `samples`), each by `summarise`.

    Raises:
        ConfigError: the policy or the task cannot be had, or `output` holds another
            evaluation.
    """
    use_compile_cache()
    if config.run_dir:
        step = pick_step(Path(config.run_dir), config.step)
        config = dataclasses.replace(config, step=step)
    asked = _opened(config, say)
    task, count = asked.task, len(asked.indices)
    say(
        f"{asked.source} on {count} {config.part} prompts of {task.name}, at most "
        f"{asked.length} tokens an answer"
    )
    _warn_of_training(config, asked, say)
    directory = _directory(config, task)
    results: dict[str, Any] = {}
    with verifier_pool(task.reward, config.scoring) as pool:
        _claim(directory, config, task, asked.policy, say)
        for number, (way, samples, settings) in enumerate(_ways(config)):
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            file = directory / f"{way}.jsonl"
            rows = _answers(config, asked, samples, settings, key, file, pool, say)
            results[way] = summarise(rows, asked.examples, _ks(config))
    if task.single_answer:
        results["exact"] = _exact(asked, config.temperature)
    found = {
        "policy": asked.source,
        "task": task.name,
        "part": config.part,
        "prompts": count,
        "max_new_tokens": asked.length,
        "config": to_dict(config),
        "figures": results,
    }
    write_json(directory / "eval.json", found)
    text = "\n\n".join(f"{way}\n{table(figures)}" for way, figures in results.items())
    (directory / "eval.txt").write_text(text + "\n")
    say(f"\n{text}\n\nwritten to {directory}")
    return directory, found


def _opened(config, say) -> _Asked:
    """The policy, the prompts and what fits them; nothing is written."""
    if config.run_dir:
        source = f"step {config.step} of {config.run_dir}"
        task = task_for_run(config.task, Path(config.run_dir))
    else:
        source = config.pretrained
        task = task_of(config.task, config.pretrained)
    check_language(task)
    if config.max_prompt_tokens is not None:
        task, left_out = drop_long_prompts(task, config.max_prompt_tokens)
        say(f"left out for their length: {left_out[config.part == 'heldout']} prompts")
    examples = getattr(task, config.part)
    if not examples:
        raise ConfigError(f"task {task.name} has no {config.part} prompts to ask.")
    if config.run_dir:
        policy = load_policy(config.run_dir, config.step)
    else:
        policy = load_pretrained(config.pretrained, dtype=config.compute_dtype)
    check_language(task, policy.config)
    policy = policy.reconfigured(compute_dtype=config.compute_dtype)
    indices = np.arange(len(examples))
    if config.prompts is not None and config.prompts < len(examples):
        rng = host_rng(config.seed, Stream.EVAL_COMMAND_PROMPTS)
        indices = np.sort(rng.permutation(len(examples))[: config.prompts])
    encoded = encode_prompts(task, examples)
    width = bucket(max(map(len, encoded)))
    prompts = pad_left(encoded, width, task.tokenizer.pad_token_id)
    length = config.max_new_tokens or completion_tokens(task)
    return _Asked(source, policy, task, examples, indices, prompts, length)


def _ways(config) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, answers of each prompt, how they are drawn)."""
    ways = [("greedy", 1, dict(top_k=1))] if config.greedy else []
    if config.samples:
        settings = dict(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        ways.append(("samples", config.samples, settings))
    return ways


def _answers(
    config, asked, samples, settings, key, file, pool, say
) -> list[PromptAnswers]:
    """Every prompt's answers: those in the file; others are written as they come."""
    done = {row["index"]: PromptAnswers(**row) for row in read_lines(file)}
    rewrite(file, [row._asdict() for row in done.values()])
    draw = partial(
        sample,
        max_new_tokens=asked.length,
        eos_id=asked.task.ends,
        pad_id=asked.task.tokenizer.pad_token_id,
        **settings,
    )
    parts = answer_prompts(
        draw,
        asked.policy,
        asked.task,
        asked.examples,
        asked.prompts,
        samples=samples,
        rows=config.rows,
        key=key,
        pool=pool,
        processes=Processes(),
        warn=lambda text: say(f"warning: {text}"),
        indices=[i for i in asked.indices if i not in done],
    )
    lines = JsonLines(file)
    try:
        for part in parts:
            for row in part:
                lines.write(row._asdict())
                done[row.index] = row
            say(f"{file.stem}: {len(done)} of {len(asked.indices)} prompts")
    finally:
        lines.close()
    return [done[i] for i in asked.indices]


def _ks(config):
    if config.pass_at:
        return sorted(set(config.pass_at))
    powers = {2**i for i in range(config.samples.bit_length())}
    return sorted({k for k in powers if k < config.samples} | {config.samples})


def _exact(asked, temperature):
    """The exact pass rate, where one completion is right."""
    chosen = [asked.examples[i] for i in asked.indices]
    width, length = asked.prompts[0].shape[1], completion_tokens(asked.task)
    answers = answer_rollouts(asked.task, chosen, width, length)
    value, low, high = mean_interval(
        exact_pass_rates(asked.policy, answers, temperature)
    )
    entry = {"value": value, "low": low, "high": high, "prompts": len(chosen)}
    return {"pass rate": {"all": entry}}


def _directory(config, task):
    if config.output:
        return Path(config.output)
    if config.run_dir:
        return Path(config.run_dir) / f"eval-{task.name}-step{config.step}"
    name = Path(config.pretrained.rstrip("/")).name
    return Path("runs") / f"eval-{task.name}-{name}"


def _warn_of_training(config, asked, say):
    """Says how many held-out prompts a run was trained on: with other data or another
    split than its own there may be some."""
    if not config.run_dir or config.part != "heldout":
        return
    run_dir = Path(config.run_dir)
    own = from_dict(TrainConfig, read_config_dict(run_dir)).task
    try:
        trained = {example.prompt for example in task_for_run(own, run_dir).train}
    except ConfigError as error:
        say(f"warning: which prompts the run was trained on is not known ({error})")
        return
    seen = sum(asked.examples[i].prompt in trained for i in asked.indices)
    if seen:
        say(f"warning: the run was trained on {seen} of these prompts.")


def _claim(directory, config, task, policy, say):
    """The directory is new, or holds this very evaluation, begun."""
    file = directory / "config.json"
    facts = {
        "config": to_dict(config),
        "data": data_fingerprint(task),
        "policy": params_digest(policy.params),
    }
    if file.exists():
        try:
            old = json.loads(file.read_text())
            rows = differences(old["config"], facts["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is damaged ({error}); give --output.") from error
        changed = [row for row in rows if not row.startswith(_FREE)]
        for name, what in (("data", "the task's data"), ("policy", "the policy")):
            if old.get(name) != facts[name]:
                changed.append(what)
        if changed:
            raise ConfigError(
                f"{directory} holds another evaluation ({'; '.join(changed)}); give "
                "another --output."
            )
        say(f"going on in {directory}")
    elif directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"{directory} is not empty and holds no evaluation; give another --output."
        )
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2))


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    argv = spelled_out(argv)
    named = named_run(argv)
    default = None
    if named.run_dir is not None:
        default = config_like_run(named.run_dir, named.task.name)
    evaluate(parse(EvalConfig, argv, __doc__, default=default))
    return 0


def config_like_run(run_dir: str, task_name: str | None = None) -> EvalConfig:
    """The settings that evaluate a run the way it evaluated itself.

    Args:
        task_name: None, or the run's own: its task with all held-out prompts. Another
            one is asked with that task's own settings.
    """
    facts = read_facts(Path(run_dir))
    run = from_dict(TrainConfig, facts["config"])
    settings: dict[str, Any] = {}
    if task_name in (None, run.task.name):
        # All held-out prompts, where training evaluated some of a file's.
        heldout = run.task.heldout_prompts or 0
        settings = dict(
            task=dataclasses.replace(run.task, heldout_prompts=heldout),
            max_new_tokens=facts.get("max_new_tokens"),
            max_prompt_tokens=run.sampling.max_prompt_tokens,
        )
    return EvalConfig(
        run_dir=run_dir,
        compute_dtype=run.model.compute_dtype,
        temperature=run.sampling.temperature,
        **settings,
    )
