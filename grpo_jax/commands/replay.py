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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.commands._arguments import parse
from grpo_jax.errors import ConfigError
from grpo_jax.parallel.sharding import make_mesh, on_mesh
from grpo_jax.planning.plan import make_plan
from grpo_jax.rewards.pool import verifier_pool
from grpo_jax.rollouts.judging import HostRollouts
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import MeshConfig, TrainConfig
from grpo_jax.runs.config_files import from_dict
from grpo_jax.runs.directory import read_config_dict, read_facts
from grpo_jax.runs.lines import read_lines, without_nan
from grpo_jax.runs.params import named_arrays
from grpo_jax.runs.paths import use_compile_cache
from grpo_jax.tasks.types import Task
from grpo_jax.training.loop import Run, facts_of
from grpo_jax.training.state import part_of, with_history
from grpo_jax.training.step import make_gradients


class Replayed(NamedTuple):
    """A step computed again.

    Attributes:
        step: Which, as metrics.jsonl counts.
        start: Of the checkpoint it was recomputed from; 0: the start of the run.
        row: Its line of metrics.jsonl, as recomputed.
        recorded: As the run wrote it; None where it has no such line.
        differing: Fields that are not the same in both, time and compiles left out.
        first_differing: The first step since `start` that differs, or None.
        unstable: Samples whose reward is another when the same completions are scored
            twice.
        arrays: Rollouts, rewards, weights and gradient norms, as an .npz has them.
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
        recorded = self.recorded or {}
        names = [name for name in {**self.row, **recorded} if not _left_out(name)]
        width = max(map(len, names))
        lines = [f"{'':{width}}  {'replayed':>22}  {'recorded':>22}"]
        for name in names:
            pair = [str(row.get(name, "-")) for row in (self.row, recorded)]
            mark = "  differs" if name in self.differing else ""
            lines.append(f"{name:{width}}  {pair[0]:>22}  {pair[1]:>22}{mark}")
        return "\n".join([*lines, *self._verdict()])

    def _verdict(self):
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

    On the mesh that the run had, where this process has as many devices; else on one.

    Args:
        step: 1 or later: the line of metrics.jsonl to make again.
        task: The run's, where it was given one of its own.

    Raises:
        ConfigError: no such step, or not the data or the model that the run had.
    """
    run_dir = Path(run_dir)
    config = from_dict(TrainConfig, read_config_dict(run_dir))
    moved = math.prod(dataclasses.astuple(config.mesh)) > len(jax.devices())
    if moved:
        config = dataclasses.replace(config, mesh=MeshConfig())
    if not 1 <= step <= config.steps:
        raise ConfigError(f"step must be from 1 to {config.steps}, got {step}.")
    if not config.pretrained and not (run_dir / "initial.safetensors").exists():
        raise ConfigError(f"{run_dir} holds no policy yet; it was stopped too early.")
    plan = make_plan(config, task)
    facts, now = read_facts(run_dir), facts_of(config, plan)
    for name, what in (("data", "the task's data"), ("base", "the pretrained model")):
        if facts.get(name, now[name]) != now[name]:
            raise ConfigError(f"cannot replay {run_dir}: {what} changed since it ran.")
    use_compile_cache()
    mesh = make_mesh(config.mesh)
    with verifier_pool(plan.task.reward, config.scoring) as pool, on_mesh(mesh):
        run = Run(config, plan, run_dir, pool=pool, mesh=mesh)
        if moved:
            run.console.say(
                "the run was on more devices than there are here and is replayed on "
                "one: numbers differ by rounding, which may change a sample."
            )
        return _replayed(run, step)


def _replayed(run: Run, step: int) -> Replayed:
    policy = run.starting_policy()
    run.build(policy)
    state, start = run.first_state(policy), 0
    if (run.directory / "checkpoints").is_dir():
        with Checkpoints(
            run.directory / "checkpoints", warn=run.console.warn, read_only=True
        ) as checkpoints:
            restored = checkpoints.restore(state, before=step)
        if restored is not None:
            state, start = restored[0], restored[1]["step"]
    run.console.say(f"replaying from step {start}")
    del policy
    run.compile_updates(state)
    lines = {line["step"]: line for line in read_lines(run.directory / "metrics.jsonl")}
    first = None
    for now in range(start, step):
        indices, sampled = run.sampled(state.params, now)
        scored = run.scored(state, now, indices, run.fetch(sampled))
        unstable, arrays = 0, {}
        if now + 1 == step:
            unstable = _unstable(run, scored)
            arrays = _arrays(run, state, scored)
        state, metrics = run.update(scored.state, scored.batch)
        row = run.row(now + 1, scored.metrics | metrics, scored.host)
        recorded = lines.get(now + 1)
        if recorded is not None:
            if now + 1 == step:
                row |= _looked(run, state.params, step, recorded)
            else:  # evaluations on the way are not made again
                recorded = {name: recorded[name] for name in row if name in recorded}
        row = without_nan(row)
        differing = _differing(row, recorded)
        if differing and first is None:
            first = now + 1
    return Replayed(step, start, row, recorded, differing, first, unstable, arrays)


def _looked(run, params, step, recorded):
    """Evaluation and look, where the recorded step had them."""
    row = {}
    if "eval/heldout_pass_rate" in recorded:
        row |= run.evaluate(params, step)
    if "phase/label" in recorded:
        looks = read_lines(run.directory / "instrument.jsonl")
        instrument = run.make_instrument([r for r in looks if r["step"] < step])
        row |= instrument.measure(params, step)
    return row


def _left_out(name):
    return name.startswith("time/") or name == "compiles"


def _differing(row, recorded):
    """Names of the fields that the replayed line has otherwise; NaN is equal to NaN."""
    if recorded is None:
        return []
    return [
        name
        for name in {**row, **recorded}
        if not _left_out(name)
        and (name not in row or name not in recorded or row[name] != recorded[name])
    ]


def _unstable(run, scored):
    before = scored.judged.rollouts
    again = run.judge(HostRollouts(before, scored.mine), scored.indices).rollouts
    same = np.equal(again.rewards, before.rewards)
    same |= np.isnan(again.rewards) & np.isnan(before.rewards)
    return int((~same).sum())


def _arrays(run, state, scored):
    """What went into the step's first update, and the gradient it had, by parameter."""
    config, batch = run.config, scored.batch
    if run.objective.history > 1:
        _, batch = with_history(state.history, batch)
    batch = part_of(batch, 0, run.parts)
    p, g, t = batch.rollouts.completions.shape
    length = batch.rollouts.prompts.shape[1]
    gradients = make_gradients(
        run.objective,
        micro=micro_batch(p, g, length, t, config.micro_batch_tokens),
        temperature=run.temperature,
        max_length=run.plan.max_new_tokens,
    )
    grads, _ = jax.jit(gradients)(run.policy.replace(state.params), batch)
    named = named_arrays(grads)
    return {
        **{name: np.asarray(x) for name, x in scored.judged.rollouts._asdict().items()},
        "prompt_indices": np.asarray(scored.indices),
        "trained_rewards": np.asarray(scored.batch.rollouts.rewards),
        "weights": np.asarray(scored.batch.weights),
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
