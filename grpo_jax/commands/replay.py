"""`grpo-jax replay RUN_DIR STEP [--output FILE.npz]`: compute a step of a run again,
compare it with what metrics.jsonl has, and keep its rollouts and gradient norms.

Sampling is a function of the run's key, the step, the prompt and the sample, and an
update is one of the state and the rollouts. So the checkpoint before a step, or the
start, leads to that step again, bit by bit on the same kind of device with the same
versions; what differs then is not a function of these, such as a reward that asks a
service.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.commands._arguments import parse
from grpo_jax.errors import ConfigError
from grpo_jax.parallel.meshes import make_mesh
from grpo_jax.parallel.processes import Processes
from grpo_jax.parallel.sharding import on_mesh
from grpo_jax.planning.plan import make_plan
from grpo_jax.rewards.pool import verifier_pool
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import MeshConfig
from grpo_jax.runs.directory import changed_facts, check_task_is_found, read_facts
from grpo_jax.runs.lines import read_lines, without_nan
from grpo_jax.runs.objects import given_objects
from grpo_jax.runs.params import named_arrays
from grpo_jax.runs.paths import count_compiles, use_compile_cache
from grpo_jax.runs.policies import task_to_continue
from grpo_jax.runs.recorded import run_config
from grpo_jax.tasks.types import Task
from grpo_jax.training.collector import Collected
from grpo_jax.training.console import Console
from grpo_jax.training.context import RunContext
from grpo_jax.training.journal import RowMaker
from grpo_jax.training.learner import WeighedBatch
from grpo_jax.training.parts import Parts, make_instrument, make_parts
from grpo_jax.training.start import facts_of, starting_policy
from grpo_jax.training.state import Batch, TrainState, part_of, push_history
from grpo_jax.training.step import make_gradients


class Replayed(NamedTuple):
    """A recomputed step.

    Attributes:
        step: As metrics.jsonl counts steps.
        start: Step of the checkpoint it was recomputed from; 0: the start of the run.
        row: Recomputed row of metrics.jsonl.
        recorded: The row that the run wrote; None where there is none.
        differing: Fields that differ between the two, but for times and compiles.
        first_differing: The first step since `start` that differs, or None.
        unstable: Samples whose reward changes when the same completions are scored
            twice.
        arrays: By name, for an .npz file: rollouts [P, G, T], rewards [P, G], weights
            [P], gradient norms by parameter.
    """

    step: int
    start: int
    row: dict[str, Any]
    recorded: dict[str, Any] | None
    differing: list[str]
    first_differing: int | None
    unstable: int
    arrays: dict[str, np.ndarray]

    def text(self) -> str:
        """A table of both rows, and what they say."""
        recorded = self.recorded or {}
        names = [name for name in {**self.row, **recorded} if not _left_out(name)]
        width = max(map(len, names))
        lines = [f"{'':{width}}  {'replayed':>22}  {'recorded':>22}"]
        for name in names:
            pair = [str(row.get(name, "-")) for row in (self.row, recorded)]
            mark = "  differs" if name in self.differing else ""
            lines.append(f"{name:{width}}  {pair[0]:>22}  {pair[1]:>22}{mark}")
        return "\n".join([*lines, *self._verdict()])

    def _verdict(self) -> Iterator[str]:
        if self.recorded is None:
            yield f"step {self.step}: replayed; metrics.jsonl has no line of it."
        elif not self.differing:
            yield f"step {self.step}: identical."
        else:
            yield f"step {self.step}: differs in {', '.join(self.differing)}."
        if self.first_differing not in (None, self.step):
            yield f"the first step to differ is {self.first_differing}."
        if self.unstable:
            yield (
                f"rewards are not deterministic: {self.unstable} of "
                f"{self.arrays['rewards'].size} differ when the same completions are "
                "scored again."
            )


def replay(run_dir: Path | str, step: int, *, task: Task | None = None) -> Replayed:
    """Recomputes a step of a run from the checkpoint before it; writes nothing.

    On the run's mesh, where this process has as many devices; else on one.

    Args:
        run_dir: The run's directory.
        step: 1 or later: the row of metrics.jsonl to make again.
        task: The run's, where it was given one made in code.

    Raises:
        ConfigError: no such step, or other data or another model than the run had.
    """
    run_dir = Path(run_dir)
    config = run_config(run_dir)
    moved = math.prod(dataclasses.astuple(config.mesh)) > len(jax.devices())
    if moved:
        config = dataclasses.replace(config, mesh=MeshConfig())
    if not 1 <= step <= config.steps:
        raise ConfigError(f"step must be from 1 to {config.steps}, got {step}.")
    if not config.pretrained and not (run_dir / "initial.safetensors").exists():
        raise ConfigError(f"{run_dir} holds no policy yet; it was stopped too early.")
    facts = read_facts(run_dir)
    if task is None:
        check_task_is_found(
            facts,
            config.task.name,
            "give it again: grpo_jax.commands.replay.replay(run_dir, step, task=...)",
        )
        task = task_to_continue(config.task, run_dir)
    else:
        task = dataclasses.replace(task, date=facts.get("date", task.date))
    own = given_objects(config, starting=False)[1]
    plan = make_plan(config, task, given=own)
    if what := changed_facts(facts, facts_of(config, plan)):
        raise ConfigError(f"cannot replay {run_dir}: {what} changed since it ran.")
    mesh, console = make_mesh(config.mesh), Console(config.log.lines_every)
    use_compile_cache(console.warn)
    with verifier_pool(plan.task.reward, config.scoring) as pool, on_mesh(mesh):
        if moved:
            console.say(
                "the run used more devices than this process has and is replayed on "
                "one: numbers differ by rounding, which may change a sample."
            )
        context = RunContext(config, plan, run_dir, Processes(), pool, mesh, console)
        return _replay(context, step)


def _replay(context: RunContext, step: int) -> Replayed:
    """Every step from the checkpoint before `step` to `step`."""
    policy = starting_policy(context)
    assert policy is not None  # nothing asks a replay to stop
    parts = make_parts(context, policy)
    state = parts.learner.init(policy, rollouts=parts.shapes[-1], donate=True)
    state, start = _checkpoint_before(context, state, step)
    del policy  # its parameters are the state's now, to be donated
    context.console.say(f"replaying from step {start}")
    parts.learner.compile(state, parts.shapes)
    make_row = RowMaker(parts.schedule, count_compiles())
    rows = {row["step"]: row for row in read_lines(context.directory / "metrics.jsonl")}
    first_differing = None
    for now in range(start, step - 1):
        collected, weighed = _collect(parts, state, now)
        state, row = _update(parts, make_row, collected, weighed, now + 1)
        recorded = rows.get(now + 1)
        if recorded is not None:  # evaluations on the way are not made again
            recorded = {name: recorded[name] for name in row if name in recorded}
        if _differing(row, recorded) and first_differing is None:
            first_differing = now + 1
    collected, weighed = _collect(parts, state, step - 1)
    unstable = _count_unstable(parts, collected)
    arrays = _arrays(parts, state, collected, weighed.batch)
    state, row = _update(parts, make_row, collected, weighed, step)
    recorded = rows.get(step)
    if recorded is not None:
        row |= without_nan(_observed(context, parts, state.params, step, recorded))
    differing = _differing(row, recorded)
    if differing and first_differing is None:
        first_differing = step
    return Replayed(
        step, start, row, recorded, differing, first_differing, unstable, arrays
    )


def _checkpoint_before(
    context: RunContext, state: TrainState, step: int
) -> tuple[TrainState, int]:
    """(state, its step) of the newest checkpoint before `step`, or of the start."""
    directory = context.directory / "checkpoints"
    if not directory.is_dir():
        return state, 0
    with Checkpoints(
        directory, warn=context.console.warn, read_only=True
    ) as checkpoints:
        restored = checkpoints.restore(state, before=step)
    return (state, 0) if restored is None else (restored[0], restored[1]["step"])


def _collect(
    parts: Parts, state: TrainState, step: int
) -> tuple[Collected, WeighedBatch]:
    """The rollouts after `step` steps, scored and weighed."""
    collector = parts.collector
    sampling = collector.sample(state.params, step)
    sampled = collector.fetch(sampling)
    collected = collector.score(state.params, step, sampling, sampled)
    indices = collected.indices
    return collected, parts.learner.weigh(state, collected.rollouts, indices)


def _update(
    parts: Parts,
    make_row: RowMaker,
    collected: Collected,
    weighed: WeighedBatch,
    step: int,
) -> tuple[TrainState, dict[str, Any]]:
    """(state, row) of the step; the state before it is donated."""
    state, metrics = parts.learner.update(weighed.state, weighed.batch)
    row = make_row(step, weighed.metrics | metrics, collected.metrics)
    return state, without_nan(row)


def _observed(
    context: RunContext,
    parts: Parts,
    params: Any,
    step: int,
    recorded: dict[str, Any],
) -> dict[str, Any]:
    """Evaluation and probe measurement, where the recorded step had them."""
    row: dict[str, Any] = {}
    if "eval/heldout_pass_rate" in recorded:
        row |= parts.pass_rates.measure(params, step)
    if "phase/label" in recorded:
        rows = read_lines(context.directory / "instrument.jsonl")
        earlier = [row for row in rows if row["step"] < step]
        instrument = make_instrument(context, parts, earlier)
        if instrument is not None:
            row |= instrument.measure(params, step)
    return row


def _left_out(name: str) -> bool:
    return name.startswith("time/") or name == "compiles"


def _differing(row: dict[str, Any], recorded: dict[str, Any] | None) -> list[str]:
    """Recorded fields that differ; NaN, written as null, equals NaN. A row of an older
    version lacks fields."""
    return [
        name
        for name, value in (recorded or {}).items()
        if not _left_out(name) and (name not in row or row[name] != value)
    ]


def _count_unstable(parts: Parts, collected: Collected) -> int:
    """Samples whose reward is another when the same completions are scored again."""
    before = np.asarray(collected.rollouts.scored_rewards)
    again = parts.collector.rescore(collected)
    same = np.equal(again, before) | (np.isnan(again) & np.isnan(before))
    return int((~same).sum())


def _arrays(
    parts: Parts,
    state: TrainState,
    collected: Collected,
    batch: Batch,
) -> dict[str, np.ndarray]:
    """What went into the step's first update, and its gradient's norm by parameter.

    Args:
        parts: The parts of the run.
        state: Before the update.
        collected: The step's rollouts.
        batch: The same, weighed.
    """
    settings, first = parts.learner.settings, batch
    if settings.objective.history > 1:
        _, first = push_history(settings.objective, state.history, batch)
    first = part_of(first, 0, settings.parts)
    prompts = first.rollouts.prompts.shape[0]
    gradients = make_gradients(
        settings.objective,
        micro=settings.micro(prompts, first.rollouts),
        temperature=settings.temperature,
        max_length=settings.max_new_tokens,
    )
    grads, _ = jax.jit(gradients)(settings.policy.replace(state.params), first)
    named = named_arrays(grads)
    rollouts = collected.rollouts._asdict()
    return {
        **{name: np.asarray(x) for name, x in rollouts.items()},
        "prompt_indices": np.asarray(collected.indices),
        "trained_rewards": np.asarray(batch.rollouts.scored_rewards),
        "weights": np.asarray(batch.weights),
        "parameters": np.array(list(named)),
        "gradient_norms": np.array([float(jnp.linalg.norm(x)) for x in named.values()]),
        "gradient_not_finite": np.array(
            [int((~jnp.isfinite(x)).sum()) for x in named.values()]
        ),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Which step is computed again."""

    run_dir: str  # the run
    step: int  # from 1, as metrics.jsonl counts
    output: str | None = None  # also write rollouts, weights and norms to this .npz


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    options = parse(ReplayOptions, argv, __doc__, positional=True)
    # orbax warns about directories that are opened read-only.
    logging.getLogger("absl").setLevel(logging.ERROR)
    replayed = replay(options.run_dir, options.step)
    print(replayed.text())
    if options.output is not None:
        arrays: dict[str, Any] = dict(replayed.arrays)
        with Path(options.output).open("wb") as file:
            np.savez(file, **arrays)
        print(f"rollouts, weights and gradient norms: {options.output}")
    return 0
