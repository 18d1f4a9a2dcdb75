"""Training runs of a pretrained model under rules of normalisation, each made once.

What real_normalisation.py and real_phases.py share.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import once_by_settings, temporary_run
from real_probes import RESULTS, draw_key, model_directory, sample_scored

import grpo_jax as gj
from grpo_jax.models.policy import Policy
from grpo_jax.models.pretrained import load_pretrained
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.runs.config import TaskConfig
from grpo_jax.runs.config_files import from_dict
from grpo_jax.runs.lines import read_lines, without_nan
from grpo_jax.runs.paths import cache_directory
from grpo_jax.runs.policies import task_of
from grpo_jax.runs.snapshots import load_policy
from grpo_jax.tasks.tokenizers import train_tokenizer
from grpo_jax.tasks.types import Task

RULES = {"none": 0.0, "std": 1.0, "1/sigma^2": 2.0}  # weight std^-power
# Draws of samples at the start, and the one after training.
THIRDS, START, END = 0, 1, 2
PARTS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class RunsConfig:
    model: str | None = None  # a model directory; None: the one real_model.py makes
    runs: Path | None = None  # the runs' directories; None: in the cache directory
    rows: Path = RESULTS / "real_normalisation" / "metrics.jsonl"  # of finished runs
    skills: tuple[str, ...] = (
        "word", "first", "copy", "smaller", "even", "last", "digits", "second",
        "capitals", "remainder",
    )  # fmt: skip
    train_prompts: int = 40
    heldout_prompts: int = 40
    tokens: int = 8  # of an answer, at most
    samples: int = 16  # of each prompt in an evaluation
    completions: int = 64  # of a step: as many prompts as groups fill them
    steps: int = 10
    rank: int = 16  # of LoRA, of twice that alpha
    rates: tuple[float, ...] = (1e-4, 3e-4, 6e-4)  # of which each rule has its best
    tuning_seeds: tuple[int, ...] = (10,)
    seeds: tuple[int, ...] = (0, 1, 2)
    smoke: bool = False  # a tiny model, few prompts, four steps
    long: bool = False  # for a GPU: all skills, more of everything
    plot_only: bool = False  # table and plot again, from the rows that are there


SMOKE: dict[str, Any] = dict(
    skills=("first", "even"), train_prompts=8, heldout_prompts=8, tokens=4, samples=4,
    completions=16, steps=4, rank=2, rates=(0.1, 0.3), seeds=(0, 1),
)  # fmt: skip
LONG: dict[str, Any] = dict(
    skills=(), train_prompts=512, heldout_prompts=256, tokens=24, completions=256,
    steps=100, tuning_seeds=(10, 11), seeds=(0, 1, 2, 3, 4),
)  # fmt: skip


def sized(c: RunsConfig, **more: Any) -> Any:
    """The config with the sizes that `smoke` or `long` ask for, and `more` of smoke."""
    if c.smoke:
        c = dataclasses.replace(c, **SMOKE | more)
    return dataclasses.replace(c, **LONG) if c.long else c


def smoke_model(directory: Path) -> str:
    """A directory with a tiny new model and a tokenizer with a chat template."""
    tokenizer = train_tokenizer([" ".join(RULES)], 300)
    sizes = dict(width=16, mlp_width=24, head_dim=8, num_layers=1)
    config = gj.ModelConfig(vocab_size=len(tokenizer), **sizes)
    policy = gj.init_policy(config, jax.random.key(0))
    gj.save_pretrained(policy, directory, tokenizer=tokenizer)
    return str(directory)


def begins_early(example: Example, completion: str) -> float:
    """A reward that any model has in part: to begin before "m"."""
    return float("" < completion[:1] < "m")


def settings_of(
    c: RunsConfig, rule: str, rate: float, group_size: int, seed: int
) -> dict[str, Any]:
    """Settings of a TrainConfig, but for model, instrument and what is kept."""
    task: dict[str, Any] = {
        "name": "ladder",
        "skills": c.skills,
        "train_prompts": c.train_prompts,
        # Evaluations are ours: the trainer's own, at both ends, are kept short.
        "heldout_prompts": 8,
    }
    if c.smoke:
        task["rewards"] = (f"{__name__}:begins_early",)
    return {
        "task": task,
        "model": {"lora_rank": c.rank, "lora_alpha": 2.0 * c.rank, "remat": "none"},
        # No KL and no clip: they would act on the rules' different norms.
        "objective": {"name": "grpo", "kl_coef": 0.0},
        "weights": {"name": "std", "power": RULES[rule]},
        "sampling": {
            "prompts": c.completions // group_size,
            "group_size": group_size,
            "max_new_tokens": c.tokens,
        },
        "optimizer": {"learning_rate": rate, "clip_norm": 0.0},
        "evaluation": {"every": 0, "prompts": 8},
        "log": {"lines_every": 1, "samples_every": 0},
        "steps": c.steps,
        "seed": seed,
    }


class Setting(NamedTuple):
    """What is trained, and where the files go."""

    config: RunsConfig
    model: str  # its directory
    evaluated: dict[str, list[Example]]  # trained and held-out prompts
    task: Task
    longest: int  # tokens of the longest evaluated prompt
    kept: Path  # directory of runs


def setting_of(c: RunsConfig) -> Setting:
    """Held-out prompts are those of another task.seed that no run trains on."""
    kept = cache_directory() / "real_runs" if c.runs is None else c.runs
    small = c.smoke and c.model is None
    model = smoke_model(kept / "tiny") if small else model_directory(c.model)
    given = from_dict(TaskConfig, settings_of(c, "none", c.rates[0], 2, 0)["task"])
    task = task_of(given, model)
    more = c.train_prompts + c.heldout_prompts  # enough, were all trained ones drawn
    other = dataclasses.replace(given, seed=1, train_prompts=more)
    known = {example.prompt for example in task.train}
    heldout = [x for x in task_of(other, model).train if x.prompt not in known]
    evaluated = {"train": list(task.train), "heldout": heldout[: c.heldout_prompts]}
    everything = [x for part in evaluated.values() for x in part]
    longest = max(map(len, encode_prompts(task, everything)))
    return Setting(c, model, evaluated, task, longest, kept)


def identity_of(s: Setting) -> dict[str, Any]:
    """What all rows of a setting have in common."""
    c = s.config
    names = (
        "skills", "train_prompts", "heldout_prompts", "tokens", "samples",
        "completions", "steps", "rank",
    )  # fmt: skip
    return {"model": Path(s.model).name} | {name: getattr(c, name) for name in names}


# ---- runs


def run_name(rule: str, rate: float, group_size: int, seed: int) -> str:
    rule = rule.replace("1/", "per-").replace("^", "")
    return f"{rule}-g{group_size}-lr{rate:g}-seed{seed}"


def tuning_row(
    s: Setting, rule: str, rate: float, group_size: int, seed: int
) -> dict[str, Any]:
    """A run of which only its steps' rewards are kept."""

    def run() -> dict[str, Any]:
        print(f"tuning: {run_name(rule, rate, group_size, seed)}", flush=True)
        began = time.monotonic()
        settings = settings_of(s.config, rule, rate, group_size, seed)
        settings |= {"pretrained": s.model, "instrument": {"every": 0}}
        settings |= {"checkpoint": {"every": 10**6}}
        with temporary_run(settings) as directory:
            rewards = step_rewards(directory)
        return {"rewards": rewards, "seconds": round(time.monotonic() - began)}

    labels = {"kind": "tuning", "rule": rule, "group_size": group_size}
    labels |= {"rate": rate, "seed": seed}
    return once_by_settings(s.config.rows, labels, identity_of(s), run)


def best_rate(s: Setting, rule: str, group_size: int) -> float:
    """The rate whose rewards, over the second half of the steps, are the highest."""
    for seed in s.config.tuning_seeds:
        for rate in s.config.rates:
            tuning_row(s, rule, rate, group_size, seed)
    by_rate = tuned(s)[group_size, rule]
    return max(by_rate, key=by_rate.__getitem__)


def tuned(s: Setting) -> dict[tuple[int, str], dict[float, float]]:
    """(group size, rule) -> rate -> reward of its tuning runs' second half of steps."""
    found: dict[tuple[int, str], dict[float, list[float]]] = {}
    for row in rows_of(s, kind="tuning"):
        reward = float(np.mean(row["rewards"][s.config.steps // 2 :]))
        by_rate = found.setdefault((row["group_size"], row["rule"]), {})
        by_rate.setdefault(row["rate"], []).append(reward)
    return {
        key: {rate: float(np.mean(x)) for rate, x in sorted(by_rate.items())}
        for key, by_rate in found.items()
    }


def trained_run(
    s: Setting, rule: str, rate: float, group_size: int, seed: int
) -> dict[str, Any]:
    """A run's row: rewards of its steps, and each prompt's pass rate after them.

    Its directory keeps the policies of the middle and the end.
    """

    def run() -> dict[str, Any]:
        began = time.monotonic()
        settings = settings_of(s.config, rule, rate, group_size, seed)
        every = max(1, s.config.steps // 2)
        settings |= {"instrument": {"every": 0}}
        settings |= {"checkpoint": {"every": every, "keep": 3}}
        directory = train_anew(s, run_name(rule, rate, group_size, seed), settings)
        rewards = step_rewards(directory)
        rates = pass_rates(s, load_policy(directory, s.config.steps), END)
        seconds = round(time.monotonic() - began)
        return {"rewards": rewards, "seconds": seconds} | rates

    labels = {"kind": "run", "rule": rule, "group_size": group_size}
    labels |= {"rate": rate, "seed": seed}
    return once_by_settings(s.config.rows, labels, identity_of(s), run)


def train_anew(s: Setting, name: str, settings: dict[str, Any]) -> Path:
    """The directory of a run; what a run that was cut short left of it is removed."""
    directory = s.kept / name
    shutil.rmtree(directory, ignore_errors=True)
    print(f"training: {directory}", flush=True)
    settings = settings | {"pretrained": s.model, "run_dir": str(directory)}
    if not gj.train(from_dict(gj.TrainConfig, settings)).finished:
        raise SystemExit("stopped; start again to go on after the last finished run")
    return directory


def step_rewards(directory: Path) -> list[float]:
    """Mean reward of each step's samples."""
    rows = read_lines(directory / "metrics.jsonl")
    return [round(row["reward/mean"], 5) for row in rows if "reward/mean" in row]


def start_row(s: Setting, draw: int) -> dict[str, Any]:
    """Each prompt's pass rate before training, in one of two draws of samples."""

    def run() -> dict[str, Any]:
        print(f"evaluating the start, draw {draw}", flush=True)
        return pass_rates(s, load_pretrained(s.model, dtype="float32"), draw)

    labels = {"kind": "start", "draw": draw}
    return once_by_settings(s.config.rows, labels, identity_of(s), run)


def pass_rates(s: Setting, policy: Policy, draw: int) -> dict[str, Any]:
    """Shares of right completions of each evaluated prompt, by part.

    The random numbers of a draw are those of every policy.
    """
    c, found = s.config, {}
    for number, (part, examples) in enumerate(s.evaluated.items()):
        key = jax.random.fold_in(draw_key(0, draw), number)
        groups = sample_scored(
            policy, s.task, examples, c.samples, c.tokens, key, s.longest
        )
        found[part] = [round(float(x), 5) for x in groups.scored_rewards.mean(1)]
    return without_nan(found)


# ---- reading


def rows_of(s: Setting, **labels: Any) -> list[dict[str, Any]]:
    """Rows of the setting with these labels, of those that are there."""
    return rows_with(s.config.rows, identity_of(s), **labels)


def rows_with(
    path: Path, settings: dict[str, Any], **labels: Any
) -> list[dict[str, Any]]:
    """Rows of a file with these settings, as `once_by_settings` wrote them."""
    settings = json.loads(json.dumps(settings))  # tuples are lists in the file
    return [
        row
        for row in read_lines(path)
        if row["settings"] == settings
        and all(row.get(name) == value for name, value in labels.items())
    ]


def chosen_runs(s: Setting) -> list[dict[str, Any]]:
    """Rows of runs at the rate that is the best of those tried."""
    best = {key: max(x, key=x.__getitem__) for key, x in tuned(s).items()}
    return [
        row
        for row in rows_of(s, kind="run")
        if row["rate"] == best.get((row["group_size"], row["rule"]))
    ]


def thirds(first: np.ndarray) -> dict[str, np.ndarray]:
    """Masks [P] of all prompts, the hard third and the easy one.

    first: [P] pass rates of a draw that is used for nothing else; equal ones in the
        order of the prompts.
    """
    order = np.argsort(first, kind="stable")
    count = max(1, len(first) // 3)
    masks = {"all": np.ones(len(first), bool)}
    for name, chosen in (("hard", order[:count]), ("easy", order[-count:])):
        masks[name] = np.isin(np.arange(len(first)), chosen)
    return masks
