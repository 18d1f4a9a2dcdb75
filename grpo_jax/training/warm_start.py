"""Supervised learning before reinforcement learning, stopped by what it can do.

The clean stage ends when the measured pass rate reaches its target, not at a fixed step
(the jump from a plateau comes at a different step for every seed); a second stage on
spoiled answers then gives a policy with room to improve. The result is cached by a hash
of everything it depends on.
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
from grpo_jax.models.decoder import Policy
from grpo_jax.rollouts.encoding import answer_rollouts
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Task, WarmStart
from grpo_jax.training.checkpoint import load_params, save_params
from grpo_jax.training.config import WarmStartConfig
from grpo_jax.training.step import MicroBatch, batch_logprobs

_VERSION = 3  # of this procedure: a change to it must not find old results
_CHECK_EVERY = 25  # steps between two looks at the pass rate
_PROBE = 256  # prompts looked at


class WarmStarted(NamedTuple):
    policy: Policy
    pass_rate: float  # on trained prompts, exact
    steps: int  # of both stages
    reached: bool  # the clean stage's target, before its step limit
    cached: bool


def warm_start_settings(config: WarmStartConfig, task: Task) -> WarmStart:
    """The task's own settings with the config's overrides."""
    overrides = dataclasses.asdict(config)
    del overrides["enabled"]
    given = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(task.warm_start, **given)


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
    report: Callable[[str, int, float], None],
    warn: Callable[[str], None],
    stop: Callable[[], bool],
) -> WarmStarted | None:
    """A policy that answers some of the task's prompts, from cache where there is one.

    Args:
        policy: Freshly initialised.
        prompt_length, length: Padded tokens of prompts and of answers with EOS.
        cache: Directory of earlier results.
        report: Called with (stage, step, pass rate) at every measurement.
        warn: Called with a sentence where the cache cannot be used.
        stop: Polled every step; True ends it with nothing kept.

    Returns:
        None if stopped.
    """
    file = (
        cache / f"{_fingerprint(policy, task, settings, seed, temperature)}.safetensors"
    )
    if file.exists():
        try:
            params, facts = load_params(file, policy.params)
            facts = json.loads(facts["facts"])
            params = jax.tree.map(jnp.asarray, params)
            return WarmStarted(policy.replace(params), **facts, cached=True)
        except (ConfigError, KeyError, ValueError) as error:
            warn(f"the cached warm start is of no use ({error}); learning anew.")
    encode = partial(
        answer_rollouts, task.tokenizer, prompt_length=prompt_length, length=length
    )
    count = min(_PROBE, len(task.train))
    spread = np.linspace(0, len(task.train) - 1, count).astype(int)
    probe = encode([task.train[i] for i in spread])
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
            if stop():
                return None
            batch = encode(
                task.warm_start.demonstrations(rng, settings.batch_size, spoiled)
            )
            params, opt_state = step(params, opt_state, batch)
            if i % _CHECK_EVERY == 0 or i == steps:
                rate = float(
                    pass_rates(policy.replace(params), probe, temperature).mean()
                )
                report(stage, done + i, rate)
                if rate >= target:
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
    noisy = learn("spoiled answers", settings.noisy_steps, True, 2.0, steps)
    if noisy is None:
        return None
    facts = {
        "pass_rate": float(
            pass_rates(policy.replace(params), probe, temperature).mean()
        ),
        "steps": steps + noisy[0],
        "reached": reached,
    }
    try:
        save_params(file, params, {"facts": json.dumps(facts)})
    except OSError as error:
        warn(f"the warm start could not be cached ({error}).")
    return WarmStarted(policy.replace(params), **facts, cached=False)


@partial(jax.jit, static_argnames="micro")
def _answer_logprobs(policy, rollouts, temperature, micro):
    return batch_logprobs(policy, rollouts, temperature, micro).sum(-1)


def pass_rates(
    policy: Policy,
    answers: Rollouts,
    temperature: float,
    budget: int = 2**16,
) -> np.ndarray:
    """[N] exact pass rates of answers [N, 1, T], each the one right completion.

    At most about `budget` tokens are looked at in one go.
    """
    n, _, t = answers.completions.shape
    part = max(1, min(n, budget // (answers.prompts.shape[1] + t)))
    # Filled up to whole parts with rows that are there already, and cut again.
    filled = np.resize(np.arange(n), -(-n // part) * part)
    answers = jax.tree.map(lambda x: np.asarray(x)[filled], answers)
    micro, temperature = MicroBatch(part, 1), jnp.float32(temperature)
    logprobs = _answer_logprobs(policy, answers, temperature, micro)
    return np.exp(np.asarray(logprobs)[:n, 0])


def _supervised_step(policy, optimizer, params, opt_state, answers: Rollouts):
    micro = MicroBatch(answers.prompts.shape[0], 1)

    def loss(params):
        logprobs = batch_logprobs(policy.replace(params), answers, 1.0, micro)
        return -logprobs.sum() / answers.completion_mask.sum()

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _fingerprint(policy, task, settings, seed, temperature):
    """Hash of all that the result depends on, the data included."""
    rng = np.random.default_rng(0)
    shown = [
        [settings.demonstrations(rng, 64, spoiled) for spoiled in (False, True)],
        [task.train, task.heldout, sorted(task.tokenizer.get_vocab().items())],
    ]
    facts = dataclasses.asdict(settings)
    del facts["demonstrations"], facts["longest"]
    parts = [
        _VERSION, task.name, shown, facts, dataclasses.asdict(policy.config), seed,
        temperature,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
