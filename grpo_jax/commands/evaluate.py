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
from grpo_jax.evaluation.figures import missing_and_failed, summarise, table
from grpo_jax.evaluation.sampled import (
    PromptAnswers,
    answer_prompts,
    batches,
    prompts_at_a_time,
)
from grpo_jax.intervals import rate_interval
from grpo_jax.models.policy import Policy
from grpo_jax.models.pretrained import load_pretrained
from grpo_jax.parallel.processes import Processes
from grpo_jax.records import as_type, from_dict
from grpo_jax.rewards.pool import VerifierPool, verifier_pool
from grpo_jax.rewards.trial import try_rewards
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.asked import asked_facts
from grpo_jax.rollouts.embedded import check_embedded
from grpo_jax.rollouts.encoding import answer_rollouts, encode_prompts, pad_left
from grpo_jax.rollouts.lengths import bucket, completion_tokens, drop_long_prompts
from grpo_jax.rollouts.sampling import sample
from grpo_jax.runs.command_configs import EvalConfig
from grpo_jax.runs.config import TaskConfig
from grpo_jax.runs.config_files import differences, to_dict
from grpo_jax.runs.directory import check_task_is_found, differing_prompts, read_facts
from grpo_jax.runs.lines import JsonLines, read_lines, rewrite, write_json
from grpo_jax.runs.params import params_digest
from grpo_jax.runs.paths import use_compile_cache
from grpo_jax.runs.policies import (
    check_language,
    data_fingerprint,
    task_for_run,
    task_of,
    with_stop_tokens,
)
from grpo_jax.runs.recorded import eval_settings, run_config
from grpo_jax.runs.snapshots import load_policy, pick_step
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.ends import named_tokens
from grpo_jax.tasks.types import Task

# Settings that change no answer and may differ when an evaluation is continued.
# Nor do paths: fingerprints tell whether the policy and the data are the same.
_FREE = (
    "output", "scoring.", "pretrained", "run_dir", "task.path",
    "task.heldout_path",
)  # fmt: skip


class _Evaluation(NamedTuple):
    """A policy and the prompts that it is to answer."""

    config: EvalConfig
    source: str  # of the policy, in words
    policy: Policy
    task: Task
    examples: list[Example]  # N, of the task's part
    prompts: tuple[np.ndarray, np.ndarray]  # their token ids and mask, [N, L]
    indices: np.ndarray  # of the examples to answer
    max_new_tokens: int


class _Decoding(NamedTuple):
    """One way to answer: a file of answers and a table of figures."""

    name: str
    samples: int  # answers to each prompt
    settings: dict[str, Any]  # of `sample`


def evaluate(
    config: EvalConfig, *, say: Callable[[str], None] = print
) -> tuple[Path, dict[str, Any]]:
    """Answers a task's prompts, scores the answers and summarises the scores.

    An evaluation that was interrupted is continued.

    Args:
        config: The policy, the prompts and how they are answered. With `run_dir`, what
            it leaves open is the run's: its task, template, temperature, lengths.
        say: Gets lines of progress and warnings.

    Returns:
        The output directory, and the content of its eval.json: `figures` of each way
        to answer (`greedy`, `samples`), made by `summarise`, and of each the `checks`
        that hung or died (`failed`; they score 0) and the `missing_rewards`.

    Raises:
        ConfigError: the policy or the task cannot be loaded, or `output` has another
            evaluation.
    """
    use_compile_cache(partial(_warn, say))
    config = eval_settings(as_type(EvalConfig, config, "config"))
    if config.run_dir:
        step = pick_step(Path(config.run_dir), config.step)
        config = dataclasses.replace(config, step=step)
    evaluation = _prepare(config, say)
    task, count = evaluation.task, len(evaluation.indices)
    say(
        f"{evaluation.source} on {count} {config.part} prompts of {task.name}, at most "
        f"{evaluation.max_new_tokens} tokens an answer, which ends at "
        f"{named_tokens(task.tokenizer, task.ends)}"
    )
    for warning in task.warnings:
        say(f"warning: {warning}")
    _warn_of_trained_prompts(evaluation, say)
    directory = _directory(config, task)
    figures: dict[str, Any] = {}
    unscored: dict[str, dict[str, int]] = {}
    with verifier_pool(task.reward, config.scoring) as pool:
        first = evaluation.examples[int(evaluation.indices[0])]
        warn = partial(_warn, say)
        try_rewards(task.reward, first, task.imitated(first), pool, warn)
        _claim(directory, evaluation, say)
        for number, decoding in enumerate(_decodings(config)):
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            answers = _answers(evaluation, decoding, key, directory, pool, say)
            figures[decoding.name] = summarise(
                answers, evaluation.examples, _pass_at(config)
            )
            missing, failed = missing_and_failed(answers)
            unscored[decoding.name] = {"missing_rewards": missing, "failed": failed}
    if task.single_answer:
        figures["exact"] = _exact_figures(evaluation)
    result = {
        "policy": evaluation.source,
        "task": task.name,
        "part": config.part,
        "prompts": count,
        "max_new_tokens": evaluation.max_new_tokens,
        "config": to_dict(config),
        "checks": unscored,
        "figures": figures,
    }
    write_json(directory / "eval.json", result)
    parts = [f"{name}\n{table(f)}" for name, f in figures.items()]
    text = "\n\n".join([*parts, *_unscored_text(unscored, config.scoring.timeout_s)])
    (directory / "eval.txt").write_text(text + "\n")
    say(f"\n{text}\n\nwritten to {directory}")
    return directory, result


def _warn(say: Callable[[str], None], text: str) -> None:
    say(f"warning: {text}")


def _unscored_text(counts: dict[str, dict[str, int]], timeout_s: float) -> list[str]:
    """Sentences on the answers of each decoding that could not be judged."""
    lines = []
    for name, count in counts.items():
        if count["failed"]:
            lines.append(
                f"{name}: {count['failed']} checks hung or died and scored 0 (the time "
                f"limit is {timeout_s:g} s, scoring.timeout_s)"
            )
        if count["missing_rewards"]:
            lines.append(
                f"{name}: {count['missing_rewards']} rewards are missing, left out"
            )
    return lines


def _prepare(config: EvalConfig, say: Callable[[str], None]) -> _Evaluation:
    """Loads the policy and encodes the prompts; writes nothing."""
    source, task = _task(config)
    check_language(task)
    task = _on_its_date(config, with_stop_tokens(task, config.stop_tokens))
    if config.max_prompt_tokens is not None:
        task, left_out = drop_long_prompts(task, config.max_prompt_tokens)
        say(f"left out for their length: {left_out[config.part == 'heldout']} prompts")
    examples = getattr(task, config.part)
    if not examples:
        raise ConfigError(f"task {task.name} has no {config.part} prompts to ask.")
    policy = _policy(config)
    check_embedded(task, policy.config.vocab_size)
    policy = policy.reconfigured(compute_dtype=config.compute_dtype)
    indices = np.arange(len(examples))
    if config.prompts is not None and config.prompts < len(examples):
        rng = host_rng(config.seed, Stream.EVAL_COMMAND_PROMPTS)
        indices = np.sort(rng.permutation(len(examples))[: config.prompts])
    encoded = encode_prompts(task, examples)
    width = bucket(max(map(len, encoded)))
    return _Evaluation(
        config=config,
        source=source,
        policy=policy,
        task=task,
        examples=examples,
        prompts=pad_left(encoded, width, task.tokenizer.pad_token_id),
        indices=indices,
        max_new_tokens=config.max_new_tokens or completion_tokens(task),
    )


def _task(config: EvalConfig) -> tuple[str, Task]:
    """(name of the policy's source, task in the policy's language)."""
    if config.run_dir:
        source = f"step {config.step} of {config.run_dir}"
        return source, task_for_run(config.task, Path(config.run_dir))
    pretrained = _pretrained(config)
    return pretrained, task_of(config.task, pretrained)


def _on_its_date(config: EvalConfig, task: Task) -> Task:
    """The task on the date of the evaluation that is continued, if one is."""
    try:
        facts = json.loads((_directory(config, task) / "config.json").read_text())
        return dataclasses.replace(task, date=facts["date"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or `_claim` names it
        return task


def _policy(config: EvalConfig) -> Policy:
    if config.run_dir:
        return load_policy(config.run_dir, config.step)
    return load_pretrained(_pretrained(config), dtype=config.compute_dtype)


def _pretrained(config: EvalConfig) -> str:
    """The model's directory or name, of a config without a run."""
    assert config.pretrained is not None  # EvalConfig has one of the two
    return config.pretrained


def _decodings(config: EvalConfig) -> list[_Decoding]:
    decodings = [_Decoding("greedy", 1, dict(top_k=1))] if config.greedy else []
    if config.samples:
        settings = dict(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        decodings.append(_Decoding("samples", config.samples, settings))
    return decodings


def _answers(
    evaluation: _Evaluation,
    decoding: _Decoding,
    key: jax.Array,
    directory: Path,
    pool: VerifierPool | None,
    say: Callable[[str], None],
) -> list[PromptAnswers]:
    """Answers to every prompt: those in the file are read, new ones are appended."""
    file, task = directory / f"{decoding.name}.jsonl", evaluation.task
    answers = {row["index"]: PromptAnswers(**row) for row in read_lines(file)}
    size = prompts_at_a_time(
        evaluation.config.rows, decoding.samples, len(evaluation.indices)
    )
    if not _is_free_of_batches(evaluation.config):
        answers = _of_whole_batches(answers, evaluation.indices, size)
    rewrite(file, [row._asdict() for row in answers.values()])
    answered = answer_prompts(
        partial(
            sample,
            max_new_tokens=evaluation.max_new_tokens,
            eos_id=task.ends,
            pad_id=task.tokenizer.pad_token_id,
            **decoding.settings,
        ),
        evaluation.policy,
        task,
        evaluation.examples,
        evaluation.prompts,
        samples=decoding.samples,
        size=size,
        key=key,
        pool=pool,
        processes=Processes(),
        warn=partial(_warn, say),
        indices=[i for i in evaluation.indices if i not in answers],
    )
    lines = JsonLines(file)
    try:
        for batch in answered:
            for row in batch:
                lines.write(row._asdict())
                answers[row.index] = row
            say(f"{file.stem}: {len(answers)} of {len(evaluation.indices)} prompts")
    finally:
        lines.close()
    return [answers[i] for i in evaluation.indices]


def _is_free_of_batches(config: EvalConfig) -> bool:
    """Whether an answer is the same in batches of any size: not in bfloat16, where
    logits of other shapes round otherwise by more than draws forgive."""
    return config.compute_dtype == "float32"


def _of_whole_batches(
    answers: dict[int, PromptAnswers], indices: np.ndarray, size: int
) -> dict[int, PromptAnswers]:
    """The answers by index of those batches of `indices` [N] that were answered whole:
    what is left is then asked in the batches in which it would have been."""
    whole = [b for b in batches(indices, size) if all(i in answers for i in b)]
    return {int(i): answers[i] for batch in whole for i in batch}


def _pass_at(config: EvalConfig) -> list[int]:
    """The k's of pass@k."""
    if config.pass_at:
        return sorted(set(config.pass_at))
    powers = {2**i for i in range(config.samples.bit_length())}
    return sorted({k for k in powers if k < config.samples} | {config.samples})


def _exact_figures(evaluation: _Evaluation) -> dict[str, Any]:
    """The exact pass rate, for a task of which one completion is right."""
    examples = [evaluation.examples[i] for i in evaluation.indices]
    width, length = evaluation.prompts[0].shape[1], completion_tokens(evaluation.task)
    answers = answer_rollouts(evaluation.task, examples, width, length)
    temperature = evaluation.config.temperature
    assert temperature is not None  # `eval_settings` has filled it in
    rates = exact_pass_rates(evaluation.policy, answers, temperature)
    value, low, high = rate_interval(rates)
    entry = {"value": value, "low": low, "high": high, "prompts": len(examples)}
    return {"pass rate": {"all": entry}}


def _directory(config: EvalConfig, task: Task) -> Path:
    if config.output:
        return Path(config.output)
    if config.run_dir:
        return Path(config.run_dir) / f"eval-{task.name}-step{config.step}"
    name = Path(_pretrained(config).rstrip("/")).name
    return Path("runs") / f"eval-{task.name}-{name}"


def _warn_of_trained_prompts(
    evaluation: _Evaluation, say: Callable[[str], None]
) -> None:
    """Warns of held-out prompts that the run was trained on: other data or another
    split than the run's may have some."""
    config = evaluation.config
    if not config.run_dir or config.part != "heldout":
        return
    run_dir = Path(config.run_dir)
    trained_on = run_config(run_dir).task
    try:
        again = "compare its prompts with these yourself"
        check_task_is_found(read_facts(run_dir), trained_on.name, again)
        task = task_for_run(trained_on, run_dir)
        trained = {(e.context, e.prompt) for e in task.train}
    except ConfigError as error:
        say(f"warning: which prompts the run was trained on is not known ({error})")
        return
    asked = [evaluation.examples[i] for i in evaluation.indices]
    seen = sum((e.context, e.prompt) in trained for e in asked)
    if seen:
        say(f"warning: the run was trained on {seen} of these prompts.")


def _claim(
    directory: Path, evaluation: _Evaluation, say: Callable[[str], None]
) -> None:
    """Makes the directory, or checks that it has an interrupted run of this very
    evaluation."""
    file = directory / "config.json"
    facts = {
        "config": to_dict(evaluation.config),
        "data": data_fingerprint(evaluation.task),
        "prompts": asked_facts(evaluation.task),
        "date": evaluation.task.date,
        "policy": params_digest(evaluation.policy.params),
    }
    if file.exists():
        if changed := _changes(file, facts, evaluation.config):
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


def _changes(file: Path, facts: dict[str, Any], evaluated: EvalConfig) -> list[str]:
    """How this evaluation differs from the one in `file`, as far as answers depend on
    it: in bfloat16 also on the completions sampled at a time."""
    try:
        old = json.loads(file.read_text())
        config = to_dict(
            from_dict(EvalConfig, old["config"], EvalConfig(pretrained="."))
        )
        rows = differences(config, facts["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}); give --output.") from error
    free = (*_FREE, "rows") if _is_free_of_batches(evaluated) else _FREE
    changed = [row for row in rows if not row.startswith(free)]
    prompts = differing_prompts(old.get("prompts"), facts["prompts"])
    if prompts is not None:
        changed.append(f"the prompts ({prompts})")
    for name, what in (("data", "the task's data"), ("policy", "the policy")):
        if old.get(name) != facts[name]:
            changed.append(what)
    return changed


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
        run_dir: The run.
        task_name: The run's task by default, with all held-out prompts of its data.
            Any other task is evaluated with that task's default settings.
    """
    if task_name is None:
        return eval_settings(EvalConfig(run_dir=run_dir))
    return eval_settings(EvalConfig(run_dir=run_dir, task=TaskConfig(name=task_name)))
