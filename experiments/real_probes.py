"""Probe prompts of a pretrained model: its skills, the choice of prompts, samples.

What real_orthogonality.py and real_curvature.py share.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import once_by_settings
from real_gradients import Probed, as_kind, kept_in, probe, save
from real_model import real_model

from grpo_jax.evaluation.sampled import batches
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.policy import Policy, init_policy
from grpo_jax.models.pretrained import load_pretrained
from grpo_jax.rewards.scoring import score
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.encoding import decode_groups, encode_prompts, pad_left
from grpo_jax.rollouts.sampling import sample
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.config import TaskConfig
from grpo_jax.runs.paths import cache_directory
from grpo_jax.runs.policies import fingerprint, task_of
from grpo_jax.runs.recorded import run_config
from grpo_jax.runs.snapshots import load_policy, saved_steps
from grpo_jax.tasks.tokenizers import character_tokenizer
from grpo_jax.tasks.types import Task

RESULTS = Path(__file__).parent / "results"
OTHER, CHOOSING = 1, 2  # draws of samples beside 0; CHOOSING and those above it


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    model: str | None = None  # a model directory; None: the one real_model.py makes
    checkpoints: tuple[Path, ...] = ()  # directories of runs that began with it
    output: Path = RESULTS  # rows, table and plot
    runs: Path | None = None  # files of single prompts; None: in the cache directory
    task: str = "ladder"
    task_path: str | None = None  # its data, where it reads any
    tag: str = "skill"  # of the task's prompts, which tells skills apart
    skill: str = "boxes"  # the one skill
    others: tuple[str, ...] = ("even", "last", "copy", "largest")  # mixed with it
    prompts: int = 20  # of the one skill
    each: int = 5  # prompts of every skill in the mix
    seeds: tuple[int, ...] = (0, 1, 2)
    group_size: int = 32
    tokens: int = 14  # of an answer, at most
    samples: int = 16  # of each prompt that may be chosen
    width: int = 2**14  # sums that a gradient is hashed to
    rank: int = 16  # of new LoRA factors
    smoke: bool = False  # a tiny new model, two skills, one seed
    plot_only: bool = False  # table and plot again, from metrics.jsonl

    @property
    def wanted(self) -> dict[str, int]:
        """Prompts of each skill."""
        return {self.skill: self.prompts} | dict.fromkeys(self.others, self.each)


# Settings of a smoke run of both scripts.
SMOKE: dict[str, Any] = dict(
    tag="skill", skill="a", others=("b",), prompts=6, each=4, seeds=(0,), tokens=3,
    width=2**14, rank=2,
)  # fmt: skip


class Checkpoint(NamedTuple):
    """A policy to be measured, and where it comes from."""

    run: str  # name of the run's directory; "pretrained": the start of all runs
    step: int
    when: str  # "start", "middle" or "end"
    seed: int  # of the probe prompts and the samples
    load: Callable[[], Policy]


class Setting(NamedTuple):
    """What is measured: the start's policy, the task, and the files."""

    config: ProbeConfig
    task: Task
    start: Callable[[], Policy]
    identity: dict[str, Any]  # of every row
    rows: Path
    kept: Path  # directory of single prompts' files


def setting_of(c: ProbeConfig) -> Setting:
    kept = cache_directory() / "real_probes" if c.runs is None else c.runs
    names = ("tokens", "samples", "width", "rank", "wanted")
    identity = {name: getattr(c, name) for name in names}
    rows = c.output / "metrics.jsonl"
    if c.smoke:
        task = smoke_task()
        start = partial(smoke_policy, task)
        return Setting(c, task, start, identity | {"model": "tiny"}, rows, kept)
    model = model_directory(c.model)
    task = real_task(model, c.task, c.task_path, c.tag)
    identity |= {"model": Path(model).name, "task": c.task}
    return Setting(c, task, partial(real_policy, model), identity, rows, kept)


def model_directory(given: str | None) -> str:
    return str(real_model()) if given is None else given


def all_checkpoints(s: Setting) -> Iterator[Checkpoint]:
    """The start once for every seed, then middle and end of every run.

    Raises:
        SystemExit: a run did not start from the model.
    """
    c = s.config
    for seed in c.seeds:
        yield Checkpoint("pretrained", 0, "start", seed, s.start)
    for run in c.checkpoints:
        config, steps = run_config(run), saved_steps(run)
        model = model_directory(c.model)
        began = config.pretrained
        if began is None or fingerprint(Path(began)) != fingerprint(Path(model)):
            raise SystemExit(f"{run} did not start from {model}; leave it out.")
        middle = min(steps, key=lambda step: abs(step - steps[-1] / 2))
        for when, step in (("middle", middle), ("end", steps[-1])):
            if step > 0:
                load = partial(load_policy, run, step)
                yield Checkpoint(run.name, step, when, config.seed, load)


# ---- tasks and models


def real_task(model: str, name: str, path: str | None, tag: str) -> Task:
    """The task in the model's tokens and chat template."""
    extra = {"tag_fields": (tag,)} if name == "jsonl" else {}
    return task_of(TaskConfig(name=name, path=path, **extra), model)


def real_policy(model: str) -> Policy:
    """The pretrained policy, all of it in float32."""
    return load_pretrained(model, dtype="float32")


def smoke_task() -> Task:
    """Two skills that any model has in part: to begin with one of some letters."""
    letters = "abcdefghijklmnop"
    examples = [
        Example(f"{skill}{x}{y}", skills, tags=(("skill", skill),))
        for skill, skills in (("a", letters[:5]), ("b", letters[5:10]))
        for x in letters
        for y in letters
    ]
    return Task(
        name="letters",
        train=examples,
        heldout=[],
        tokenizer=character_tokenizer(letters),
        reward=lambda example, text: float(text[:1] in [*example.answer]),
    )


def smoke_policy(task: Task) -> Policy:
    config = ModelConfig(width=16, mlp_width=24, head_dim=8, num_layers=1)
    vocab_size = len(task.tokenizer)
    config = dataclasses.replace(config, vocab_size=vocab_size)
    return init_policy(config, jax.random.key(0))


# ---- prompts


def by_skill(task: Task, tag: str) -> dict[str, list[Example]]:
    """Trained prompts by their value of the tag."""
    found: dict[str, list[Example]] = {}
    for example in task.train:
        found.setdefault(dict(example.tags).get(tag, ""), []).append(example)
    return found


def longest_prompt(task: Task, skills: Iterable[str], tag: str) -> int:
    """Tokens of the longest prompt of these skills."""
    found = by_skill(task, tag)
    missing = [skill for skill in skills if skill not in found]
    if missing:
        raise SystemExit(f"no {tag} {missing} in task {task.name}: it has {[*found]}.")
    examples = [example for skill in skills for example in found[skill]]
    return max(map(len, encode_prompts(task, examples)))


def choose_probes(
    policy: Policy, task: Task, c: ProbeConfig, seed: int, *, times: int = 4
) -> list[dict[str, Any]]:
    """Prompts of each skill that the policy solves now and then, and how often it did.

    Prompts are drawn by seed, `times` as many as wanted, and kept where an eighth or
    more of the completions are right and an eighth or more are not. None of these
    completions is measured.
    """
    skills, chosen = by_skill(task, c.tag), []
    longest = longest_prompt(task, c.wanted, c.tag)
    for number, (skill, count) in enumerate(c.wanted.items()):
        rng = np.random.default_rng([seed, number])
        pool = [skills[skill][i] for i in rng.permutation(len(skills[skill]))]
        pool, kept, asked = pool[: times * count], [], 0
        while asked < len(pool) and len(kept) < count:
            some = pool[asked : asked + 8]
            key = draw_key(seed, CHOOSING + 100 * number + asked)
            groups = sample_scored(
                policy, task, some, c.samples, c.tokens, key, longest
            )
            rates = groups.scored_rewards.mean(1)
            kept += [
                {"skill": skill, "prompt": example.prompt, "rate": float(rate)}
                | {"index": task.train.index(example)}
                for example, rate in zip(some, rates, strict=True)
                if 1 / 8 <= rate <= 7 / 8
            ]
            asked += len(some)
        chosen += kept[:count]
        print(f"  {skill}: {len(kept)} of {asked} prompts asked", flush=True)
    return chosen


def draw_key(seed: int, draw: int) -> jax.Array:
    """The key of a draw of samples; the same at all checkpoints."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 77), draw)


def sample_scored(
    policy: Policy,
    task: Task,
    examples: Sequence[Example],
    group_size: int,
    tokens: int,
    key: jax.Array,
    longest: int,
    *,
    at_once: int = 8,
) -> Rollouts:
    """[P, G, T] completions and their rewards, on the host, eight prompts at a time."""
    ids = encode_prompts(task, examples)
    pad_id = task.tokenizer.pad_token_id
    prompts, mask = pad_left(ids, longest, pad_id)
    parts = []
    for some in batches(np.arange(len(ids)), at_once):
        filled = np.resize(some, at_once)  # one shape, one program
        drawn = sample(
            policy,
            prompts[filled],
            mask[filled],
            group_size=group_size,
            max_new_tokens=tokens,
            key=key,
            eos_id=task.ends,
            pad_id=pad_id,
            prompt_indices=filled,
        )
        parts.append(jax.tree.map(np.asarray, drawn))
    rollouts = jax.tree.map(lambda *x: np.concatenate(x)[: len(ids)], *parts)
    texts = decode_groups(task, rollouts.completions, rollouts.completion_mask)
    scores = score(
        task.reward, examples, texts, tokens=rollouts.completion_mask.sum(-1)
    )
    return rollouts._replace(rewards=scores.rewards)


def probes_of(s: Setting, seed: int) -> list[dict[str, Any]]:
    """The probe prompts of a seed, chosen at the start; of the rows where they are."""

    def choose() -> dict[str, Any]:
        print(f"choosing probe prompts, seed {seed}", flush=True)
        c = s.config
        return {"probes": choose_probes(s.start(), s.task, c, seed)}

    labels = {"kind": "probes", "seed": seed}
    return once_by_settings(s.rows, labels, s.identity, choose)["probes"]


def probe_groups(s: Setting, at: Checkpoint, draw: int = 0) -> Rollouts:
    """[P, G, T] completions of a checkpoint's probe prompts with rewards, on the host.

    From a file where they are.
    """
    c, probes = s.config, probes_of(s, at.seed)
    examples = [s.task.train[x["index"]] for x in probes]
    if [x["prompt"] for x in probes] != [example.prompt for example in examples]:
        raise SystemExit(
            f"{s.rows} has probe prompts that task {s.task.name} has not; take another "
            "--output, or the task they were chosen in."
        )
    path = kept_in(s.kept, identity_of(s, at) | {"draw": draw}) / "samples.npz"
    if not path.exists():
        print(f"sampling: {at.run} step {at.step}, seed {at.seed}", flush=True)
        longest, key = longest_prompt(s.task, c.wanted, c.tag), draw_key(at.seed, draw)
        found = sample_scored(
            at.load(), s.task, examples, c.group_size, c.tokens, key, longest
        )
        save(path, {k: x for k, x in found._asdict().items() if x is not None})
    return Rollouts(**np.load(path))


def identity_of(s: Setting, at: Checkpoint) -> dict[str, Any]:
    """What samples and measurements of a checkpoint depend on."""
    c = s.config
    found = {"run": at.run, "step": at.step, "seed": at.seed, "tokens": c.tokens}
    found |= {"probes": [x["prompt"] for x in probes_of(s, at.seed)]}
    return found | {"model": s.identity["model"], "group_size": c.group_size}


def measured(
    s: Setting, at: Checkpoint, params: str, draw: int = 0, *, curvature: bool = False
) -> Probed:
    """The checkpoint's gradients of its probe prompts; from files where they are.

    params: "full" or "lora", see `as_kind`.
    """
    rollouts = probe_groups(s, at, draw)
    about = identity_of(s, at) | {"params": params, "draw": draw, "rank": s.config.rank}
    return probe(
        lambda: as_kind(at.load(), params, rank=s.config.rank),
        rollouts,
        width=s.config.width,
        curvature=curvature,
        directory=kept_in(s.kept, about | {"width": s.config.width}),
    )
