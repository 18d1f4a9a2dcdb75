"""`grpo-jax eval`: a policy's answers to a task's prompts, on disk as they come."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.models.pretrained import load_pretrained
from grpo_jax.rollouts.encoding import answer_rollouts, bucket, encode_prompts, pad_left
from grpo_jax.rollouts.sampling import sample
from grpo_jax.training.checkpoint import params_digest
from grpo_jax.training.config import (
    EvalConfig,
    TrainConfig,
    differences,
    from_dict,
    to_dict,
)
from grpo_jax.training.evaluation import (
    Answered,
    ask,
    summarise,
    table,
    verifier_pool,
)
from grpo_jax.training.metrics import (
    JsonLines,
    mean_interval,
    read_lines,
    rewrite,
    write_json,
)
from grpo_jax.training.paths import use_compile_cache
from grpo_jax.training.plan import completion_tokens, within
from grpo_jax.training.policies import (
    check_language,
    data_fingerprint,
    task_for_run,
    task_of,
)
from grpo_jax.training.run_directory import read_config_dict, read_facts
from grpo_jax.training.snapshots import load_policy, pick_step
from grpo_jax.training.warm_start import pass_rates

# What does not change an answer, and may differ when an evaluation is gone on with.
_FREE = ("output", "rows", "scoring.")


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
        run_dir = Path(config.run_dir)
        read_facts(run_dir)  # its error first
        config = dataclasses.replace(config, step=pick_step(run_dir, config.step))
        source = f"step {config.step} of {config.run_dir}"
        task = task_for_run(config.task, run_dir)
    else:
        source = config.pretrained
        task = task_of(config.task, config.pretrained)
    check_language(task)
    if config.max_prompt_tokens is not None:
        task, left_out = within(task, config.max_prompt_tokens)
        say(f"left out for their length: {left_out[config.part == 'heldout']} prompts")
    if config.run_dir:
        policy = load_policy(config.run_dir, config.step)
    else:
        policy = load_pretrained(config.pretrained, dtype=config.compute_dtype)
    check_language(task, policy.config)
    policy = policy.reconfigured(compute_dtype=config.compute_dtype)
    examples = getattr(task, config.part)
    if not examples:
        raise ConfigError(f"task {task.name} has no {config.part} prompts to ask.")
    asked = np.arange(len(examples))
    if config.prompts is not None and config.prompts < len(examples):
        rng = np.random.default_rng([config.seed, 7])
        asked = np.sort(rng.permutation(len(examples))[: config.prompts])
    length = config.max_new_tokens or completion_tokens(task)
    encoded = encode_prompts(task, examples)
    width = bucket(max(map(len, encoded)))
    prompts = pad_left(encoded, width, task.tokenizer.pad_token_id)
    draw = partial(
        sample,
        max_new_tokens=length,
        eos_id=tuple(sorted(task.stop_ids)),
        pad_id=task.tokenizer.pad_token_id,
    )
    sampled = dict(
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    ways = {"greedy": (1, dict(top_k=1))} if config.greedy else {}
    if config.samples:
        ways["samples"] = (config.samples, sampled)
    say(
        f"{source} on {len(asked)} {config.part} prompts of {task.name}, at most "
        f"{length} tokens an answer"
    )
    trained = _trained_on(config) if config.part == "heldout" else set()
    seen = sum(examples[i].prompt in trained for i in asked)
    if seen:
        say(f"warning: the run was trained on {seen} of these prompts.")
    results: dict[str, Any] = {}
    directory = _directory(config, task)
    with verifier_pool(task, config.scoring) as pool:
        _claim(directory, config, task, policy, say)
        for i, (way, (samples, settings)) in enumerate(ways.items()):
            file = directory / f"{way}.jsonl"
            done = {row["index"]: Answered(**row) for row in read_lines(file)}
            rewrite(file, [row._asdict() for row in done.values()])
            left = [j for j in asked if j not in done]
            parts = ask(
                partial(draw, **settings),
                policy,
                task,
                examples,
                prompts,
                samples=samples,
                rows=config.rows,
                key=jax.random.fold_in(jax.random.key(config.seed), i),
                pool=pool,
                warn=lambda text: say(f"warning: {text}"),
                indices=left,
            )
            lines = JsonLines(file)
            try:
                for part in parts:
                    for row in part:
                        lines.write(row._asdict())
                        done[row.index] = row
                    say(f"{way}: {len(done)} of {len(asked)} prompts")
            finally:
                lines.close()
            rows = [done[j] for j in asked]
            results[way] = summarise(rows, examples, _ks(config))
    if task.single_answer:
        results["exact"] = _exact(policy, task, examples, asked, width, config)
    found = {
        "policy": source,
        "task": task.name,
        "part": config.part,
        "prompts": len(asked),
        "max_new_tokens": length,
        "config": to_dict(config),
        "figures": results,
    }
    write_json(directory / "eval.json", found)
    text = "\n\n".join(f"{way}\n{table(figures)}" for way, figures in results.items())
    (directory / "eval.txt").write_text(text + "\n")
    say(f"\n{text}\n\nwritten to {directory}")
    return directory, found


def _ks(config):
    if config.pass_at:
        return sorted(set(config.pass_at))
    powers = {2**i for i in range(config.samples.bit_length())}
    return sorted({k for k in powers if k < config.samples} | {config.samples})


def _exact(policy, task, examples, asked, width, config):
    """The exact pass rate, where one completion is right."""
    chosen = [examples[i] for i in asked]
    answers = answer_rollouts(task, chosen, width, completion_tokens(task))
    value, low, high = mean_interval(pass_rates(policy, answers, config.temperature))
    entry = {"value": value, "low": low, "high": high, "prompts": len(asked)}
    return {"pass rate": {"all": entry}}


def _directory(config, task):
    if config.output:
        return Path(config.output)
    if config.run_dir:
        return Path(config.run_dir) / f"eval-{task.name}-step{config.step}"
    name = Path(config.pretrained.rstrip("/")).name
    return Path("runs") / f"eval-{task.name}-{name}"


def _trained_on(config) -> set[str]:
    """The prompts that a run was trained on."""
    if not config.run_dir:
        return set()
    run_dir = Path(config.run_dir)
    asked = from_dict(TrainConfig, read_config_dict(run_dir)).task
    return {example.prompt for example in task_for_run(asked, run_dir).train}


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
