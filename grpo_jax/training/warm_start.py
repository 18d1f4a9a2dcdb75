"""Supervised learning before reinforcement learning, stopped by what it can do.

Where one completion is right, the clean stage ends when the measured pass rate reaches
its target, not at a fixed step (the jump from a plateau comes at a different step for
every seed); a second stage on spoiled answers then gives a policy with room to improve.
Where many are right, worked solutions are imitated for a fixed number of steps, and
what is measured is the loss on demonstrations that are set aside. The result is cached
by a hash of everything it depends on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from grpo_jax.tasks.types import Task, WarmStart

_VERSION = 5  # of this procedure: a change to it must not find old results
_CHECK_EVERY = 25  # steps between two looks at the pass rate
_PROBE = 256  # prompts looked at


class WarmStarted(NamedTuple):
    policy: Policy
    pass_rate: float | None  # on trained prompts, exact; None: no target
    loss: float | None  # nats a token of demonstrations set aside; None: a target
    left_out: int  # trained prompts whose worked text is too long to be shown
    steps: int  # of both stages
    reached: bool  # the clean stage's target, before its step limit
    cached: bool

    def __str__(self):
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
    """A policy that answers some of the task's prompts, from cache where there is one.

    Args:
        policy: What to start from.
        prompt_length, length: Padded tokens of prompts and of answers with EOS; longer
            demonstrations are left out.
        cache: Directory of earlier results.
        report: Called with (stage, step, "pass rate 0.250") at every measurement.
        warn: Called with a sentence where the cache cannot be used.
        processes: The run's processes; where they are asked to stop, nothing is kept.

    Returns:
        None if stopped.

    Raises:
        ConfigError: every demonstration is too long.
    """
    sizes = prompt_length, length
    name = _fingerprint(policy, task, settings, seed, temperature, sizes)
    file = cache / f"{name}.safetensors"
    found = None
    if file.exists():
        try:
            params, facts = load_params(file, policy.params)
            found = params, json.loads(facts["facts"])
        except (ConfigError, KeyError, ValueError) as error:
            warn(f"the cached warm start is of no use ({error}); learning anew.")
    if all(processes.exchange(found is not None)):
        params, facts = found
        params = jax.tree.map(jnp.asarray, params)
        return WarmStarted(policy.replace(params), **facts, cached=True)
    by_rate = settings.target_pass_rate is not None
    shown = Demonstrations(task, settings, *sizes)
    if by_rate:
        count = min(_PROBE, len(task.train))
        spread = np.linspace(0, len(task.train) - 1, count).astype(int)
        probe = answer_rollouts(task, [task.train[i] for i in spread], *sizes)
    else:
        probe = shown.set_aside(np.random.default_rng([seed, 6]))

    def measure():
        """The pass rate, or the loss where there is no target."""
        now = policy.replace(params)
        if by_rate:
            return float(exact_pass_rates(now, probe, temperature).mean())
        return token_loss(now, probe)

    rng = np.random.default_rng([seed, 2])
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.max_steps)
    optimizer = optax.adamw(schedule, weight_decay=0.0)
    step = jax.jit(partial(_supervised_step, policy, optimizer), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, policy.params)  # the caller keeps its own
    opt_state = optimizer.init(params)

    def learn(stage, steps, spoiled, target, done):
        """(steps taken, target reached), or None if stopped."""
        nonlocal params, opt_state
        for i in range(1, steps + 1):
            if processes.stopping:
                return None
            params, opt_state = step(params, opt_state, shown.batch(rng, spoiled))
            if i % _CHECK_EVERY == 0 or i == steps:
                figure = measure()
                processes.exchange(None)  # whether one was asked to stop
                what = "pass rate" if by_rate else "nats a token"
                report(stage, done + i, f"{what} {figure:.3f}")
                if not np.isfinite(figure):
                    raise ConfigError(
                        f"the warm start diverged by step {done + i}, {what} {figure}; "
                        "lower warm_start.learning_rate."
                    )
                if target is not None and figure >= target:
                    return i, True
        return steps, False

    clean = learn(
        "clean answers", settings.max_steps, False, settings.target_pass_rate, 0
    )
    if clean is None:
        return None
    steps, reached = clean
    # The second stage goes on at a steady fifth of the peak rate, wherever the first
    # one's schedule was stopped.
    steady = optax.adamw(settings.learning_rate / 5, weight_decay=0.0)
    step = jax.jit(partial(_supervised_step, policy, steady), donate_argnums=(0, 1))
    opt_state = steady.init(params)
    noisy = learn("spoiled answers", settings.noisy_steps, True, None, steps)
    if noisy is None:
        return None
    figure = measure()
    facts = {
        "pass_rate": figure if by_rate else None,
        "loss": None if by_rate else figure,
        "left_out": shown.left_out,
        "steps": steps + noisy[0],
        "reached": reached or not by_rate,
    }
    kept = gather_to_host(params)
    try:
        save_params(file, kept, {"facts": json.dumps(facts)})
    except OSError as error:
        warn(f"the warm start could not be cached ({error}).")
    return WarmStarted(policy.replace(params), **facts, cached=False)


def _supervised_step(policy, optimizer, params, opt_state, answers: Rollouts):
    micro = MicroBatch(answers.prompts.shape[0], 1)

    def loss(params):
        logprobs = batch_logprobs(policy.replace(params), answers, 1.0, micro)
        return -logprobs.sum() / answers.completion_mask.sum()

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _fingerprint(policy, task, settings, seed, temperature, sizes):
    """Hash of all that the result depends on, the data included."""
    rng = np.random.default_rng(0)
    shown = [
        [settings.demonstrations(rng, 64, spoiled) for spoiled in (False, True)],
        [task.train, task.heldout, sorted(task.tokenizer.get_vocab().items())],
        # One prompt shows what the template makes of all.
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
