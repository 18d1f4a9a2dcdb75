"""What the experiments share: result files, kept runs, tuned comparisons, groups."""

import contextlib
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import grpo_jax as gj
from grpo_jax.intervals import t_interval
from grpo_jax.models.policy import Policy
from grpo_jax.rollouts.encoding import answer_rollouts, encode_imitated, encode_prompts
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.rollouts.sampling import sample
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.config_files import from_dict
from grpo_jax.runs.lines import read_lines
from grpo_jax.tasks.types import Task

# ---- files of results


def write_config(directory: Path, config, **changes) -> None:
    """Creates `directory` with config.json: the settings and the git commit.

    config: the script's frozen Config; `changes` replace fields of it in the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    fields = dataclasses.asdict(config) | {"git": commit or "unknown"} | changes
    (directory / "config.json").write_text(json.dumps(fields, default=str))


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes the rows as JSON lines, each as soon as it is computed."""
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()


def append_row(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write_table(directory: Path, text: str) -> None:
    """Writes table.md and prints it."""
    (directory / "table.md").write_text(text)
    print(text)


# ---- training runs, each made once


def finished_run(
    directory: Path,
    *,
    task: str,
    task_path: str | None,
    seed: int,
    steps: int,
    every: int,
    tiny: bool = False,
) -> Path:
    """`directory` with a finished run of the default job, trained where it is missing.

    every: steps between the policies that it keeps.
    tiny: a model and a warm start for smoke tests.
    """
    if not (directory / "report.html").exists():
        settings = {
            "task": {"name": task, "path": task_path},
            "instrument": {"every": 0},
            "checkpoint": {"every": every, "keep": 1000},
            "seed": seed,
            "steps": steps,
            "run_dir": str(directory),
        }
        if tiny:
            settings["model"] = {"width": 32, "mlp_width": 48, "head_dim": 8}
            settings["warm_start"] = {"max_steps": 300}
            settings["task"] |= {"heldout_prompts": 32}
        gj.train(from_dict(gj.TrainConfig, settings))
    return directory


@contextlib.contextmanager
def temporary_run(settings: dict, task: Task | None = None) -> Iterator[Path]:
    """The directory of a run trained with `settings`, deleted afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        config = from_dict(gj.TrainConfig, settings | {"run_dir": f"{directory}/run"})
        result = gj.train(config, task=task)
        if not result.finished:  # stopped by a signal
            raise SystemExit(
                "stopped; start again to go on after the last finished run"
            )
        yield result.run_dir


def once_by_settings(
    path: Path, labels: dict, settings: dict, run: Callable[[], dict] | None
) -> dict:
    """The row of `path` with these labels and settings, appended where it is missing.

    run: makes the row's results; None where a missing row is an error.

    Raises:
        ValueError: `path` lacks the row and `run` is None.
    """
    identity = labels | {"settings": settings}
    identity = json.loads(json.dumps(identity))  # tuples are lists in the file
    for row in read_lines(path):
        if all(row.get(name) == value for name, value in identity.items()):
            return row
    if run is None:
        raise ValueError(f"{path} has no run {labels} of these settings; run it first.")
    row = labels | run() | {"settings": settings}
    append_row(path, row)
    return row


# ---- comparisons


def tune_then_test(scores: np.ndarray, tuning_seeds: int) -> tuple[int, np.ndarray]:
    """(index of the setting that is best on the tuning seeds, its test scores).

    scores: [settings, seeds], larger is better; the first seeds are for tuning. What
        is returned of the others played no part in the choice.
    """
    best = int(scores[:, :tuning_seeds].mean(1).argmax())
    return best, scores[best, tuning_seeds:]


def paired_gain(scores: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """(mean, half width of 95 %) of the difference by seed; both [seeds]."""
    return t_interval(np.asarray(scores) - base)


def interval_text(values: np.ndarray | list, digits: int = 2, sign: str = "") -> str:
    """Mean ± half width of 95 %, t over values; `sign` "+" shows it always."""
    mean, half = t_interval(np.asarray(values))
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


# ---- answers, groups of samples and their log-probs, for probes


def pick_answers(task: Task, count: int, *, seed: int, length: int) -> Rollouts:
    """Right answers [P, 1, length] of up to `count` trained prompts, drawn by `seed`.

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
    policy: Policy, task: Task, answers: Rollouts, key: jax.Array, group_size: int
) -> Rollouts:
    """Groups [P, group_size, T] for the prompts of `pick_answers`, with rewards.

    The reward is 1 where the completion is the answer, token by token, else 0.
    """
    rollouts = sample(
        policy,
        answers.prompts,
        answers.prompt_mask,
        group_size=group_size,
        max_new_tokens=answers.completions.shape[-1],
        key=key,
        eos_id=task.tokenizer.eos_token_id,
        pad_id=task.tokenizer.pad_token_id,
    )
    completions, mask = rollouts.completions, rollouts.completion_mask
    right = (completions == answers.completions) | (mask == 0)
    right &= mask == answers.completion_mask
    return rollouts._replace(rewards=right.all(-1).astype(jnp.float32))


def sequence_logprobs(
    policy: Policy,
    unravel: Callable[[jax.Array], Any],
    prompt: Rollouts,
    flat: jax.Array,
    samples: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Log-probs [G] of completions of one prompt under flat parameters [N].

    unravel: flat parameters -> the policy's.
    prompt: a Rollouts without its prompt axis, of which prompts and prompt_mask count.
    samples: completions and their mask, [G, T] each.
    """
    completions, mask = samples
    one = (prompt.prompts, prompt.prompt_mask, completions, mask, mask)
    rollouts = Rollouts(*(x[None] for x in one))
    now = policy.replace(unravel(flat))
    return batch_logprobs(now, rollouts, 1.0, MicroBatch(1, len(mask)))[0].sum(-1)
