"""What every part of a run refers to."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from grpo_jax.parallel.processes import Processes
from grpo_jax.planning.plan import Plan
from grpo_jax.rewards.pool import VerifierPool
from grpo_jax.runs.config import TrainConfig
from grpo_jax.streams import RunKeys, run_keys
from grpo_jax.training.console import Console


@dataclasses.dataclass(frozen=True)
class RunContext:
    """A run before its first step: what was asked for, and where it runs.

    Attributes:
        config: As given.
        plan: What was resolved of it, every shape included.
        directory: Where the run writes.
        processes: The processes of the run.
        pool: Worker processes for rewards; None where a Python function scores.
        mesh: None for a single device.
        console: What prints.
        began: When the run was asked for, by time.monotonic.
    """

    config: TrainConfig
    plan: Plan
    directory: Path
    processes: Processes
    pool: VerifierPool | None
    mesh: Mesh | None
    console: Console
    began: float = dataclasses.field(default_factory=time.monotonic)

    @functools.cached_property
    def keys(self) -> RunKeys:
        """PRNG keys of the run's seed."""
        return run_keys(self.config.seed)


def as_planned(config: TrainConfig, plan: Plan) -> TrainConfig:
    """The config with the dtype to compute in, the batch, how it is split, the learning
    rate and the measurements that the run takes: config.json keeps them, so that a
    resumed run has the same where the defaults, or the device, have changed."""
    rate, probe = plan.learning_rate, plan.probe
    chosen: dict[str, Any] = {"every": 0}
    if probe is not None:
        chosen = {
            name: getattr(probe, name)
            for name in ("every", "at_start", "prompts", "group_size")
        }
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, compute_dtype=plan.model.dtype),
        sampling=dataclasses.replace(config.sampling, **config.batch._asdict()),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=None if rate is None else rate.value
        ),
        instrument=dataclasses.replace(config.instrument, **chosen),
        micro_batch_tokens=plan.micro_batch_tokens,
    )
