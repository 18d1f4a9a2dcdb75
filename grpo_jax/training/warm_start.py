"""Supervised learning before reinforcement learning, stopped by a measured figure.

Where one completion is right, the clean stage ends when the measured pass rate reaches
its target, not at a fixed step (the jump from a plateau comes at a different step for
every seed); a second stage on spoiled answers then gives a policy with room to improve.
Where many are right, worked solutions are imitated for a fixed number of steps, and
the figure is the loss on demonstrations that are set aside. The result is cached by a
hash of everything it depends on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.errors import ConfigError
from grpo_jax.evaluation.exact import exact_pass_rates, token_loss
from grpo_jax.models.policy import Policy
from grpo_jax.parallel.processes import Processes, gather_to_host
from grpo_jax.rollouts.demonstrations import Demonstrations
from grpo_jax.rollouts.encoding import (
    answer_rollouts,
    encode_prompts,
)
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.params import load_params, params_digest, save_params
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.types import Task, WarmStart

_VERSION = 5  # of this procedure: results of another one are not reused
_CHECK_EVERY = 25  # steps between two measurements
_MEASURED_PROMPTS = 256
# The peak rate over the second stage's rate, which is steady wherever the first stage's
# schedule was stopped.
_PEAK_OVER_STEADY = 5


class WarmStarted(NamedTuple):
    """The policy after the warm start, and how it came about."""

    policy: Policy
    pass_rate: float | None  # on trained prompts, exact; None: no target
    loss: float | None  # nats a token of demonstrations set aside; None: a target
    left_out: int  # trained prompts whose worked text is too long to be shown
    steps: int  # of both stages
    reached: bool  # the clean stage's target, before its step limit
    cached: bool

    def __str__(self) -> str:
        if self.loss is None:
            return f"pass rate {self.pass_rate:.3f} on trained prompts"
        left_out = f", {self.left_out} too long to be shown" if self.left_out else ""
        return f"{self.loss:.3f} nats a token on solutions set aside{left_out}"


def warm_start(
    policy: Policy,
    task: Task,
    settings: WarmStart,
    *,
    seed: int,
    prompt_length: int,
    length: int,
    temperature: float,
    cache: Path,
    report: Callable[[str, int, str], None],
    warn: Callable[[str], None],
    processes: Processes,
) -> WarmStarted | None:
    """A policy that answers some of the task's prompts, from the cache if it is there.

    Args:
        policy: What to start from; it keeps its parameters.
        task: Whose prompts.
        settings: How to learn.
        seed: The seed of the order of demonstrations.
        prompt_length, length: Padded tokens of prompts and of answers with EOS; longer
            demonstrations are left out.
        temperature: At which pass rates are measured.
        cache: Directory of earlier results.
        report: Called with (stage, step, "pass rate 0.250") at every measurement.
        warn: Called with a sentence where the cache cannot be used.
        processes: The processes of the run; if asked to stop, nothing is kept.

    Returns:
        None if asked to stop.

    Raises:
        ConfigError: every demonstration is too long, or the learning diverged.
    """
    sizes = prompt_length, length
    name = _fingerprint(policy, task, settings, seed, temperature, sizes)
    file = cache / f"{name}.safetensors"
    cached = _cached(file, policy, warn)
    if all(processes.exchange(cached is not None)):
        return cached
    demonstrations = Demonstrations(task, settings, *sizes)
    if settings.target_pass_rate is None:
        rng = host_rng(seed, Stream.WARM_START_SET_ASIDE)
        measured = demonstrations.set_aside(rng)
    else:
        count = min(_MEASURED_PROMPTS, len(task.train))
        spread = np.linspace(0, len(task.train) - 1, count).astype(int)
        measured = answer_rollouts(task, [task.train[i] for i in spread], *sizes)
    student = _Student(
        policy,
        demonstrations,
        measured,
        temperature=temperature,
        by_pass_rate=settings.target_pass_rate is not None,
        rng=host_rng(seed, Stream.WARM_START_BATCHES),
        report=report,
        processes=processes,
    )
    facts = _both_stages(student, settings)
    if facts is None:
        return None
    facts["left_out"] = demonstrations.left_out
    params = gather_to_host(student.params)
    try:
        save_params(file, params, {"facts": json.dumps(facts)})
    except OSError as error:
        warn(f"the warm start could not be cached ({error}).")
    return WarmStarted(policy.replace(student.params), **facts, cached=False)


def _cached(
    file: Path, policy: Policy, warn: Callable[[str], None]
) -> WarmStarted | None:
    """An earlier result; None if there is none that can be read."""
    if not file.exists():
        return None
    try:
        params, metadata = load_params(file, policy.params)
        facts = json.loads(metadata["facts"])
    except (ConfigError, KeyError, ValueError) as error:
        warn(f"the cached warm start is of no use ({error}); learning anew.")
        return None
    params = jax.tree.map(jnp.asarray, params)
    return WarmStarted(policy.replace(params), **facts, cached=True)


def _both_stages(student: "_Student", settings: WarmStart) -> dict[str, Any] | None:
    """Facts about learning clean, then spoiled answers; None if asked to stop."""
    rate, target = settings.learning_rate, settings.target_pass_rate
    decaying = optax.cosine_decay_schedule(rate, settings.max_steps)
    clean = student.learn(
        "clean answers",
        optax.adamw(decaying, weight_decay=0.0),
        settings.max_steps,
        target=target,
    )
    if clean is None:
        return None
    spoiled = student.learn(
        "spoiled answers",
        optax.adamw(rate / _PEAK_OVER_STEADY, weight_decay=0.0),
        settings.noisy_steps,
        spoiled=True,
        done=clean.steps,
    )
    if spoiled is None:
        return None
    figure = student.measure()
    return {
        "pass_rate": None if target is None else figure,
        "loss": figure if target is None else None,
        "steps": clean.steps + spoiled.steps,
        "reached": clean.reached or target is None,
    }


class _Stage(NamedTuple):
    """How a stage of learning ended."""

    steps: int
    reached: bool  # its target


class _Student:
    """Parameters that learn from demonstrations, and are measured as they do.

    Args:
        policy: What to start from; it keeps its parameters.
        demonstrations: What to imitate.
        measured: [N, 1, T] answers whose pass rate, or loss, is the figure.
        temperature: The temperature at which the pass rate is measured.
        by_pass_rate: Whether the figure is the pass rate.
        rng: Draws the batches.
        report: Called with (stage, step, figure as text).
        processes: The processes of the run.
    """

    def __init__(
        self,
        policy: Policy,
        demonstrations: Demonstrations,
        measured: Rollouts,
        *,
        temperature: float,
        by_pass_rate: bool,
        rng: np.random.Generator,
        report: Callable[[str, int, str], None],
        processes: Processes,
    ):
        self.params = jax.tree.map(jnp.copy, policy.params)
        self._policy, self._demonstrations = policy, demonstrations
        self._measured, self._temperature = measured, temperature
        self._by_pass_rate, self._rng = by_pass_rate, rng
        self._report, self._processes = report, processes

    def measure(self) -> float:
        """The pass rate, or the loss in nats a token."""
        policy = self._policy.replace(self.params)
        if not self._by_pass_rate:
            return token_loss(policy, self._measured)
        return float(exact_pass_rates(policy, self._measured, self._temperature).mean())

    def learn(
        self,
        stage: str,
        optimizer: optax.GradientTransformation,
        steps: int,
        *,
        spoiled: bool = False,
        target: float | None = None,
        done: int = 0,
    ) -> _Stage | None:
        """Makes supervised steps until the figure reaches the target.

        Args:
            stage: As reported.
            optimizer: This stage's optimizer, from its initial state.
            steps: At most.
            spoiled: Whether answers are spoiled on purpose.
            target: The figure to reach; None makes all steps.
            done: Steps of earlier stages, for the report.

        Returns:
            None if asked to stop.

        Raises:
            ConfigError: the figure is not finite.
        """
        step = jax.jit(
            partial(_supervised_step, self._policy, optimizer), donate_argnums=(0, 1)
        )
        opt_state = optimizer.init(self.params)
        what = "pass rate" if self._by_pass_rate else "nats a token"
        for i in range(1, steps + 1):
            if self._processes.stopping:
                return None
            batch = self._demonstrations.batch(self._rng, spoiled)
            self.params, opt_state = step(self.params, opt_state, batch)
            if i % _CHECK_EVERY and i != steps:
                continue
            figure = self.measure()
            self._processes.synchronise()
            self._report(stage, done + i, f"{what} {figure:.3f}")
            if not np.isfinite(figure):
                raise ConfigError(
                    f"the warm start diverged by step {done + i}, {what} {figure}; "
                    "lower warm_start.learning_rate."
                )
            if target is not None and figure >= target:
                return _Stage(i, True)
        return _Stage(steps, False)


def _supervised_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    answers: Rollouts,
) -> tuple[Any, Any]:
    """(params, opt_state) after a step on the loss per token of answers [N, 1, T]."""
    micro = MicroBatch(answers.prompts.shape[0], 1)

    def loss(params: Any) -> jax.Array:
        logprobs = batch_logprobs(policy.replace(params), answers, 1.0, micro)
        return -logprobs.sum() / answers.completion_mask.sum()

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _fingerprint(
    policy: Policy,
    task: Task,
    settings: WarmStart,
    seed: int,
    temperature: float,
    sizes: tuple[int, int],
) -> str:
    """Hash of everything that the result depends on, the data included."""
    rng = np.random.default_rng(0)
    shown = [
        [settings.demonstrations(rng, 64, spoiled) for spoiled in (False, True)],
        [task.train, task.heldout, sorted(task.tokenizer.get_vocab().items())],
        # One prompt shows what the template makes of every prompt.
        [encode_prompts(task, task.train[:1]), sorted(task.stop_ids), task.end_id],
    ]
    facts = dataclasses.asdict(settings)
    del facts["demonstrations"], facts["longest"]
    parts = [
        _VERSION, task.name, shown, facts, dataclasses.asdict(policy.config),
        params_digest(policy.params), seed,
        temperature, sizes if settings.longest is None else None,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
