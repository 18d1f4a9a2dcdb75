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
from grpo_jax.models.decoder import Policy
from grpo_jax.models.sharding import batch_devices
from grpo_jax.rollouts.encoding import (
    answer_rollouts,
    encode_imitated,
    encode_prompts,
    pack_answers,
)
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Example, Task, WarmStart
from grpo_jax.training.checkpoint import load_params, params_digest, save_params
from grpo_jax.training.config import WarmStartConfig
from grpo_jax.training.processes import Peers, whole
from grpo_jax.training.step import MicroBatch, batch_logprobs

_VERSION = 5  # of this procedure: a change to it must not find old results
_CHECK_EVERY = 25  # steps between two looks at the pass rate
_PROBE = 256  # prompts looked at
_ASIDE = 64  # demonstrations set aside, a tenth of them at most
_TRIES = 100  # draws of a batch before its demonstrations count as too long


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


def warm_start_settings(config: WarmStartConfig, task: Task) -> WarmStart:
    """The task's own settings with the config's overrides.

    Raises:
        ConfigError: a target pass rate where it cannot be measured exactly.
    """
    overrides = dataclasses.asdict(config)
    del overrides["enabled"]
    given = {name: value for name, value in overrides.items() if value is not None}
    own = task.warm_start
    assert own is not None
    if "target_pass_rate" in given and own.target_pass_rate is None:
        raise ConfigError(
            f"warm_start.target_pass_rate needs a task with one right completion, and "
            f"{task.name} has many; set warm_start.max_steps instead."
        )
    if given.get("noisy_steps") and not own.noisy_steps:
        raise ConfigError(
            f"warm_start.noisy_steps changes nothing: task {task.name} has no spoiled "
            "answers; leave it out."
        )
    return dataclasses.replace(own, **given)


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
    peers: Peers,
) -> WarmStarted | None:
    """A policy that answers some of the task's prompts, from cache where there is one.

    Args:
        policy: What to start from.
        prompt_length, length: Padded tokens of prompts and of answers with EOS; longer
            demonstrations are left out.
        cache: Directory of earlier results.
        report: Called with (stage, step, "pass rate 0.250") at every measurement.
        warn: Called with a sentence where the cache cannot be used.
        peers: The run's processes; where they are asked to stop, nothing is kept.

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
    if all(peers.exchange(found is not None)):
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
            return float(pass_rates(now, probe, temperature).mean())
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
            if peers.stopping:
                return None
            params, opt_state = step(params, opt_state, shown.batch(rng, spoiled))
            if i % _CHECK_EVERY == 0 or i == steps:
                figure = measure()
                peers.exchange(None)  # whether one was asked to stop
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
    kept = whole(params)
    try:
        save_params(file, kept, {"facts": json.dumps(facts)})
    except OSError as error:
        warn(f"the warm start could not be cached ({error}).")
    return WarmStarted(policy.replace(params), **facts, cached=False)


class Demonstrations:
    """Batches of demonstrations that fit, never one that is set aside."""

    def __init__(self, task: Task, settings: WarmStart, prompt_length, length):
        self.task, self.settings = task, settings
        self.sizes = prompt_length, length
        self.aside: frozenset[str] = frozenset()  # prompts
        self.left_out = 0
        if settings.longest is None:
            self.left_out = len(task.train) - len(self._fitting(task.train))
            if self.left_out == len(task.train):
                raise ConfigError(
                    f"every solution of task {task.name} is longer than {length} "
                    "tokens, what a completion may have; raise max_new_tokens, or "
                    "leave the warm start out with --warm-start.no-enabled."
                )

    def set_aside(self, rng) -> Rollouts:
        """Some demonstrations, which no batch will show."""
        prompts = dict.fromkeys(e.prompt for e in self.task.train)
        count = max(1, min(_ASIDE, len(prompts) // 10))
        rows = {}
        for _ in range(_TRIES):
            found = self._fitting(self._draw(rng, False))
            rows |= {example.prompt: row for example, *row in found}
            if len(rows) >= count:
                break
        rows = dict(list(rows.items())[:count])
        if len(prompts) > 1:
            self.aside = frozenset(rows)
        return self._packed(list(rows.values()))

    def batch(self, rng, spoiled: bool) -> Rollouts:
        rows = []
        for _ in range(_TRIES):
            rows += [
                row
                for example, *row in self._fitting(self._draw(rng, spoiled))
                if example.prompt not in self.aside
            ]
            if len(rows) >= self.settings.batch_size:
                return self._packed(rows[: self.settings.batch_size])
        raise ConfigError(
            f"fewer than 1 in {_TRIES} demonstrations of task {self.task.name} fit "
            f"into {self.sizes[1]} tokens; raise max_new_tokens."
        )

    def _draw(self, rng, spoiled):
        return self.settings.demonstrations(rng, self.settings.batch_size, spoiled)

    def _fitting(self, examples) -> list[tuple[Example, list[int], list[int]]]:
        prompts = encode_prompts(self.task, examples)
        answers = encode_imitated(self.task, examples)
        return [
            row
            for row in zip(examples, prompts, answers, strict=True)
            if len(row[1]) <= self.sizes[0] and len(row[2]) <= self.sizes[1]
        ]

    def _packed(self, rows):
        prompts, answers = zip(*rows, strict=True)
        return pack_answers(
            prompts, answers, *self.sizes, self.task.tokenizer.pad_token_id
        )


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

    At most about `budget` tokens are looked at in one go, on each device.
    """
    return np.exp(_answers_logprobs(policy, answers, temperature, budget))


def token_loss(policy: Policy, answers: Rollouts, budget: int = 2**14) -> float:
    """Mean -log-prob of the answers' tokens [N, 1, T], their EOS included, in nats."""
    logprobs = _answers_logprobs(policy, answers, 1.0, budget)
    return float(-logprobs.sum() / answers.completion_mask.sum())


def _answers_logprobs(policy, answers, temperature, budget):
    """[N] log-probs of answers [N, 1, T], about `budget` tokens at a time."""
    n, _, t = answers.completions.shape
    devices = batch_devices()
    part = max(1, budget // (answers.prompts.shape[1] + t)) * devices
    part = min(part, -(-n // devices) * devices)
    # Filled up to whole parts with rows that are there already, and cut again.
    filled = np.resize(np.arange(n), -(-n // part) * part)
    answers = jax.tree.map(lambda x: np.asarray(x)[filled], answers)
    micro, temperature = MicroBatch(part, 1), jnp.float32(temperature)
    logprobs = _answer_logprobs(policy, answers, temperature, micro)
    return whole(logprobs)[:n, 0]


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
