"""The loop: owns the host, the clock and the disk; the maths is in step.py.

A step is sample -> score -> update. The device's work is waited for where its result is
needed: the completions before scoring, the new parameters before they are sampled from;
metrics are written while the device samples the next step.
"""

import contextlib
import dataclasses
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.evaluation.exact import exact_pass_rates
from grpo_jax.evaluation.figures import pass_rate_interval
from grpo_jax.evaluation.sampled import answer_prompts
from grpo_jax.instrument.live import Instrument
from grpo_jax.intervals import mean_interval
from grpo_jax.models.hub import local_directory
from grpo_jax.models.lora import without_lora
from grpo_jax.models.policy import Policy, init_policy
from grpo_jax.objectives.loss import needs_entropy
from grpo_jax.objectives.presets import Objective
from grpo_jax.parallel.processes import (
    LostProcess,
    Processes,
    SharedFailure,
    exit_at_once,
    gather_to_host,
    join,
)
from grpo_jax.parallel.sharding import (
    group_sharding,
    make_mesh,
    on_mesh,
    put_on_mesh,
    single_device_mesh,
    tree_shardings,
    with_shardings,
)
from grpo_jax.planning.plan import Plan, make_plan
from grpo_jax.planning.resolve import warm_start_settings
from grpo_jax.rewards.pool import verifier_pool
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollouts.encoding import answer_rollouts, encode_prompts, pad_left
from grpo_jax.rollouts.judging import (
    HostRollouts,
    ScoredRollouts,
    fetch_to_host,
    jitted_group_statistics,
    score_rollouts,
)
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.rollouts.refine import refined_prompts
from grpo_jax.rollouts.sampling import sample
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.config_files import to_dict
from grpo_jax.runs.directory import claim, record
from grpo_jax.runs.fields import PART
from grpo_jax.runs.lines import (
    JsonLines,
    NoLines,
    keep_until,
    read_lines,
    rewrite,
    to_numbers,
)
from grpo_jax.runs.params import save_params
from grpo_jax.runs.paths import cache_directory, count_compiles, use_compile_cache
from grpo_jax.runs.policies import (
    data_fingerprint,
    fingerprint,
    load_base,
    with_factors,
)
from grpo_jax.tasks.types import Task
from grpo_jax.training import counterfactual
from grpo_jax.training.console import Console
from grpo_jax.training.optimizer import make_optimizer, make_schedule
from grpo_jax.training.state import (
    Batch,
    TrainState,
    empty_history,
    init_state,
    part_of,
    with_history,
)
from grpo_jax.training.step import make_train_step
from grpo_jax.training.warm_start import warm_start
from grpo_jax.training.watchdog import Watchdog
from grpo_jax.training.weighing import has_token_weights, token_weights, weigh

SKIPPED_LIMIT = 5  # non-finite gradients in a row that end a run
_PATIENCE = 30  # seconds for a shared file system to show what was written


class TrainResult(NamedTuple):
    """What a run left behind."""

    run_dir: Path
    metrics: dict[str, Any]  # the last line of metrics.jsonl
    finished: bool  # False: stopped by a signal, to be resumed


class NonFiniteGradients(RuntimeError):
    """Too many updates in a row had no finite gradient; the batch was saved."""


def train(config: TrainConfig, *, task: Task | None = None) -> TrainResult:
    """Runs (or continues) a training run, from prompts to a finished report.

    Args:
        config: What to run.
        task: A task of your own, instead of the one config.task names.

    Returns:
        `TrainResult`: the run's directory and the last step's metrics.

    Raises:
        ConfigError: the run cannot start as configured; nothing was written.
        NonFiniteGradients: five updates in a row had to be skipped.
        OSError: a line could not be written (a full disk); what was computed is in a
            checkpoint where that could be saved.
        LostProcess: another process of the run ended; to be resumed.
    """
    if task is not None:
        named = dataclasses.replace(config.task, name=task.name)
        config = dataclasses.replace(config, task=named)
    join(config.distributed)
    with _Signals() as signals:
        processes = Processes(lambda: signals.asked, config.distributed.timeout_s)
        if processes.count == 1:
            return _train(config, task, processes)
        try:
            return _train(config, task, processes)
        except jax.errors.JaxRuntimeError as error:
            raise LostProcess(
                f"process {processes.index} cannot go on "
                f"({str(error).strip().splitlines()[0][:300]}); where that is no fault "
                "of its own, another process ended, whose output says why. Continue "
                "with the same command and --resume."
            ) from error


def _train(config, task, processes):
    plan = processes.together(lambda: make_plan(config, task))
    mesh = processes.together(lambda: make_mesh(config.mesh))
    with verifier_pool(plan.task.reward, config.scoring) as pool, on_mesh(mesh):
        directory = _claimed(config, facts_of(config, plan), processes)
        use_compile_cache()
        return Run(config, plan, directory, processes, pool, mesh).train()


def _claimed(config, facts, processes):
    """The run's directory, claimed by the process that writes, seen by all."""
    given = (to_dict(config), facts)

    def alike():
        for index, other in enumerate(processes.exchange(given)):
            if other != given:
                raise ConfigError(
                    f"process {processes.index} was given another config or other data "
                    f"than process {index}; give all of them the same."
                )

    processes.together(alike)

    def claimed():
        if processes.is_writer:
            with processes.writing():
                return claim(config, facts)

    directory = processes.first(processes.together(claimed))

    def seen():
        for _ in range(_PATIENCE):
            if (directory / "config.json").exists():
                return
            time.sleep(1)
        raise ConfigError(
            f"process {processes.index} does not see {directory.absolute()}, which "
            "process 0 wrote to; all need --run-dir on a file system that they share."
        )

    processes.together(seen)
    return directory


def facts_of(config, plan):
    """What config.json keeps besides the config: what was resolved of the task and the
    model, and fingerprints of the data and of what the policy starts from."""
    task, base = plan.task, ""
    if config.pretrained:
        base = fingerprint(local_directory(config.pretrained))
    return {
        "note": task.note,
        "eos_ids": list(task.ends),
        "template": task.template,
        "system": task.system,
        "max_new_tokens": plan.max_new_tokens,
        "model": dataclasses.asdict(plan.model),
        "data": data_fingerprint(task),
        "base": base,
    }


def _named_interval(name, stem, interval):
    return dict(zip((name, f"{stem}_low", f"{stem}_high"), interval, strict=True))


class _Signals:
    """The first SIGTERM or SIGINT asks the run to save and end, which it does when the
    phase it is in is over; the second kills it."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller's signals stay theirs
                break
        return self

    def _handle(self, number, frame):
        self.asked = True
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)  # so the next one ends it at once

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Scored(NamedTuple):
    """A step's rollouts with their rewards, ready for the update."""

    state: TrainState  # with what the weights remember of these rewards
    batch: Batch
    indices: np.ndarray  # of the prompts
    judged: ScoredRollouts  # on the host
    mine: np.ndarray  # [P, G] which of them this process scored
    metrics: dict[str, Any]  # on the device
    host: dict[str, float]


class _Spent:
    """What a step's sampling cost: every completion drawn, kept or not."""

    def __init__(self):
        self.tokens = self.failures = 0
        self.errors: list[str] = []

    def add(self, judged: ScoredRollouts) -> None:
        self.tokens += int(judged.lengths.sum())
        self.failures += judged.scores.failures
        self.errors = self.errors + judged.scores.errors


def _reward_parts(scores: Scores) -> dict[str, float]:
    """Each reward's own mean, where there are several; before any refills."""
    return {
        f"{PART}{name}": float(np.nanmean(values))
        for name, values in scores.parts.items()
        if np.isfinite(values).any()
    }


def _tied(rewards):
    return np.asarray(jitted_group_statistics(rewards).tied)


class Run:
    """One process's part of a run: `train` is the whole of it; `replay.py` recomputes
    single steps with the same methods."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        directory: Path,
        processes=None,
        pool=None,
        mesh=None,
    ):
        self.config, self.plan, self.directory = config, plan, directory
        self.mesh = mesh  # None: one device
        self.processes, self.pool, self.task = processes or Processes(), pool, plan.task
        self.console = Console(config.log.lines_every, process=self.processes.index)
        limit = config.distributed.timeout_s if self.processes.count > 1 else None
        self.watchdog = Watchdog(self.console.alert, limit=limit, end=self._abandon)
        self.compiles = count_compiles()
        self.order = None  # (epoch, its permutation of the prompts)
        self.told_of_ties = False
        self.temperature = config.sampling.temperature
        self.tokenizer = plan.task.tokenizer
        # Derived keys: parameters, training samples, evaluation samples.
        root = jax.random.key(config.seed)
        keys = (jax.random.fold_in(root, i) for i in range(7))
        self.init_key, self.run_key, self.eval_key, *keys = keys
        self.draft_key, self.refill_key, self.probe_key, self.lora_key = keys

    def train(self) -> TrainResult:
        self.console.say(self.plan.headline)
        for warning in self.plan.warnings:
            self.console.warn(warning)
        self.console.say(f"run directory: {self.directory}")
        if self.processes.is_writer:
            with self.processes.writing():
                self.tokenizer.save_pretrained(self.directory / "tokenizer")
        policy = self.starting_policy()
        if policy is None:
            self.console.say(
                "stopped during the warm start, of which nothing is kept; start again "
                f"with --resume --run-dir {self.directory}"
            )
            return TrainResult(self.directory, {}, False)
        self.build(policy)
        checkpoints = Checkpoints(
            self.directory / "checkpoints",
            keep=self.config.checkpoint.keep,
            warn=self.console.alert,
            processes=self.processes,
        )
        with checkpoints:
            self.checkpoints = checkpoints
            state, data = self._starting_state(policy)
            # A new run's was written when it was claimed.
            if self.config.resume and self.processes.is_writer:
                facts = facts_of(self.config, self.plan)
                with self.processes.writing():
                    record(self.directory, self.config, facts)
            del policy  # its parameters are the state's now, to be given away
            self._open_files(data)
            try:
                return self._loop(state, data["step"])
            finally:
                self.watchdog.stop()
                self.console.stop()
                for file in self.files.values():
                    file.close()

    # ---- before the first step

    def starting_policy(self) -> Policy | None:
        """The policy at step 0, which is also the reference; None if stopped."""
        policy = self._base_policy()
        if policy is None:
            return None
        policy = put_on_mesh(policy, self.mesh)
        if not self.plan.model.lora_rank:
            return policy
        policy = with_factors(policy, self.plan.model, self.lora_key)
        return put_on_mesh(policy, self.mesh)

    def _base_policy(self) -> Policy | None:
        """All parameters to start from, without LoRA's factors."""
        config, plan = self.config, self.plan
        file = self.directory / "initial.safetensors"
        if config.pretrained or self.processes.first(file.exists()):
            return load_base(self.directory, plan.model, config.pretrained, self.mesh)
        policy = init_policy(without_lora(plan.model), self.init_key)
        if plan.warm_starts:
            settings = warm_start_settings(config.warm_start, plan.task)
            began = time.monotonic()
            result = warm_start(
                policy,
                plan.task,
                settings,
                seed=config.seed,
                prompt_length=plan.prompt_length,
                length=plan.answer_tokens,
                temperature=self.temperature,
                cache=cache_directory() / "warm_starts",
                report=lambda stage, step, figure: (
                    self.console.say(f"warm start, {stage}: step {step}, {figure}")
                    if step % 100 == 0
                    else None
                ),
                warn=self.console.alert,
                processes=self.processes,
            )
            if result is None:
                return None
            how = "cached" if result.cached else f"{time.monotonic() - began:.0f} s"
            self.console.say(
                f"warm start: {result.steps} supervised steps, {result} ({how})"
            )
            if not result.reached:
                self.console.warn(
                    "the warm start ended at its step limit, not at its target pass "
                    f"rate of {settings.target_pass_rate}."
                )
            policy = result.policy
        params = gather_to_host(policy.params)
        if self.processes.is_writer:
            with self.processes.writing():
                save_params(file, params)
        self.processes.exchange(None)  # whether it was written
        return policy

    def build(self, start: Policy):
        """What every step uses: optimizer, weights, sampler, fixed sets of prompts."""
        config, plan, objective = self.config, self.plan, self.plan.objective
        self.policy = start.replace(None)  # parameters live in the state alone
        self.uses_reference = bool(objective.kl_coef)
        # A copy: the start's own buffers are given away to the first update.
        self.reference = (
            start.replace(jax.tree.map(jnp.copy, start.params))
            if self.uses_reference
            else None
        )
        total = config.steps * config.updates_per_rollout
        self.schedule = make_schedule(config.optimizer, total)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.weights = plan.weights
        self.sample = partial(
            sample,
            max_new_tokens=plan.max_new_tokens,
            temperature=self.temperature,
            eos_id=self.task.ends,
            pad_id=self.tokenizer.pad_token_id,
        )
        pick = np.random.default_rng([config.seed, 3]).permutation(len(plan.task.train))
        count = min(config.evaluation.prompts, len(plan.task.train))
        self.eval_sets = {
            "train": [plan.task.train[i] for i in pick[:count]],
            "heldout": plan.task.heldout,
        }
        self.probe_ids = pick[: plan.probe.prompts] if plan.probe else []
        self.start_ids = pick[: config.sampling.prompts]
        self.eval_prompts = {
            name: self._padded(encode_prompts(self.task, examples))
            for name, examples in self.eval_sets.items()
        }
        self.answers = {}
        if plan.task.single_answer:
            sets = dict(self.eval_sets)
            if plan.probe is not None:
                sets["probe"] = [plan.task.train[i] for i in self.probe_ids]
            for name, examples in sets.items():
                self.answers[name] = answer_rollouts(
                    self.task, examples, plan.prompt_length, plan.max_new_tokens
                )

        self.objective = self._settled(start)

    def _settled(self, start: Policy) -> Objective:
        """The objective, without an entropy limit that the start is above already."""
        objective = self.plan.objective
        if not needs_entropy(objective) or objective.entropy_limit is None:
            return objective
        group = self._rollouts(start.params, self.start_ids, self.eval_key, 1)
        _, entropy = batch_logprobs(
            start, group, self.temperature, MicroBatch(1, 1), with_entropy=True
        )
        entropy, mask = gather_to_host((entropy, group.completion_mask))
        mean = float(entropy[mask > 0].mean())
        if mean <= objective.entropy_limit:
            return objective
        self.console.say(
            f"the mean entropy at the start is {mean:.3f} nats, above the limit of "
            f"{objective.entropy_limit:.3f}: completions are not filtered by entropy"
        )
        return dataclasses.replace(objective, entropy_limit=None)

    def first_state(self, policy) -> TrainState:
        """The state before any update."""
        shapes = self._rollout_shapes(self.plan.max_new_tokens)
        history = empty_history(self.plan.objective, shapes)
        state = init_state(policy.params, self.optimizer, self.weights, history)
        return put_on_mesh(state, self.mesh)

    def _starting_state(self, policy):
        state, start = self.first_state(policy), {"step": 0}
        if not self.config.resume:
            return state, start
        with self.watchdog.phase("restoring"):
            restored = self.checkpoints.restore(state)
        if restored is None:
            self.console.warn("no whole checkpoint to resume from; starting at step 0.")
            return state, start
        state, data = restored
        if data["step"] > self.config.steps:
            raise ConfigError(
                f"steps must be at least {data['step']}, where {self.directory} is "
                f"already, got {self.config.steps}."
            )
        self.console.say(f"resumed at step {data['step']}.")
        return state, data

    def _open_files(self, data):
        self.files, step = {}, data["step"]
        # At step 0 everything is written again, the look at the start included. A look
        # waits for the update after it, so one of this very step is taken again.
        looks = self.processes.first(self._looks())
        self.looks_now = self._due(step) or any(r["step"] == step for r in looks)
        kept = dict.fromkeys(("metrics", "samples", "counterfactual"), step or -1)
        kept["instrument"] = step - 1
        for name, last in kept.items():
            if not self.processes.is_writer:
                self.files[name] = NoLines()
                continue
            path = self.directory / f"{name}.jsonl"
            with self.processes.writing():
                if path.exists():
                    keep_until(path, last)
                self.files[name] = JsonLines(path)
            if name not in self.files:  # all end at the next exchange
                self.files[name] = NoLines()
                continue
            owed = data.get("unwritten", {}).get(name, [])
            there = read_lines(path) if owed else []  # of an earlier resume from here
            for row in owed:
                if row not in there:
                    self._line(name, row)
        self.instrument = self.make_instrument([r for r in looks if r["step"] < step])

    def _looks(self):
        """What later looks have to know of the looks so far."""
        return [
            {name: row[name] for name in ("step", "phase")}
            for row in read_lines(self.directory / "instrument.jsonl")
        ]

    def make_instrument(self, earlier: list[dict]) -> Instrument | None:
        """None where it is off; `earlier`: the rows of looks before this start."""
        plan = self.plan
        if plan.probe is None:
            return None
        p, g = plan.probe.prompts, plan.probe.group_size

        # As many completions at a time as a step samples; the last part filled up.
        sampling = self.config.sampling
        size = min(p, max(1, sampling.prompts * sampling.group_size // g))

        def sample_and_score(params, key):
            parts = []
            for start in range(0, p, size):
                part = np.resize(self.probe_ids[start : start + size], size)
                sampled = self._rollouts(params, part, key, g)
                parts.append(fetch_to_host(sampled, all_processes=True))
            found = self.judge(
                jax.tree.map(lambda *x: np.concatenate(x)[:p], *parts), self.probe_ids
            )
            if found.scores.errors:
                self.console.warn(
                    f"instrument: {len(found.scores.errors)} rewards missing: "
                    f"{found.scores.errors[0][:200]}"
                )
            return jax.tree.map(jnp.asarray, found.rollouts)

        return Instrument(
            plan.probe,
            self.policy,
            sample_and_score,
            self.answers.get("probe"),
            prompts=self.probe_ids,
            temperature=self.temperature,
            prompt_tokens=plan.prompt_length,
            max_new_tokens=plan.max_new_tokens,
            micro_batch_tokens=self.config.micro_batch_tokens,
            key=self.probe_key,
            sigma_history=[
                float("nan") if x is None else x
                for x in (row["phase"]["mean_sigma"] for row in earlier)
            ],
        )

    def _due(self, step: int) -> bool:
        """Whether the instrument looks at the policy after `step` steps."""
        if self.plan.probe is None:
            return False
        every = self.config.instrument.every
        return step in (0, self.config.steps) or step % every == 0

    def _rollout_shapes(self, t: int) -> Rollouts:
        p, g = self.config.sampling.prompts, self.config.sampling.group_size
        shape = jax.ShapeDtypeStruct
        prompt = shape((p, self.plan.train_prompt_length), jnp.int32)
        ids, floats = shape((p, g, t), jnp.int32), shape((p, g, t), jnp.float32)
        rewards = shape((p, g), jnp.float32)
        rollouts = Rollouts(prompt, prompt, ids, ids, floats, rewards)
        return with_shardings(rollouts, self.mesh)

    def compile_updates(self, state):
        """Every program of the update, before the first step needs it."""
        config, plan, objective = self.config, self.plan, self.objective
        p, g = config.sampling.prompts, config.sampling.group_size
        self.parts = config.updates_per_rollout if objective.disjoint else 1
        several = config.updates_per_rollout > 1
        # Without a ratio every update is on policy: taken where the rollout was.
        self.stay = several and not objective.has_ratio()
        # A history keeps its samplers' log-probs instead.
        self.keeps_old = several and not self.stay and objective.history == 1
        self.programs = {}
        for t in plan.buckets:
            if self.processes.stopping:
                return
            self.programs[t] = self._programs(state, t, p, g)

    def _programs(self, state, t, p, g):
        config, plan, objective = self.config, self.plan, self.objective
        length, tokens = plan.train_prompt_length, config.micro_batch_tokens
        rollouts = self._rollout_shapes(t)
        floats = rollouts.behaviour_logprobs
        policy = self.policy.replace(state.params)
        programs = {}

        def compiled(name, function, *arguments, donate=(), lies=None):
            """`lies`: shapes of the results -> their shardings, where it matters."""
            shardings = {}
            if self.mesh is not None and lies is not None:
                shapes = jax.eval_shape(function, *arguments)
                shardings["out_shardings"] = lies(shapes)
            jitted = jax.jit(function, donate_argnums=donate, **shardings)
            lowered = jitted.lower(*arguments)
            programs[name] = lowered.compile()
            if not shardings:
                return lowered.out_info
            return jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                shapes,
                shardings["out_shardings"],
            )

        by_name = partial(tree_shardings, mesh=self.mesh)
        by_group = partial(jax.tree.map, lambda x: group_sharding(x.shape, self.mesh))

        def weighed(shapes):
            trained, weights, *rest = shapes
            batch = by_name(Batch(trained, None, None, weights))
            return batch.rollouts, batch.weights, *by_name(tuple(rest))

        whole = micro_batch(p, g, length, t, tokens)
        if self.keeps_old or self.uses_reference:
            rescore = partial(batch_logprobs, temperature=self.temperature, micro=whole)
            compiled("rescore", rescore, policy, rollouts, lies=by_group)
        reference = floats if self.uses_reference else None
        ids = jax.ShapeDtypeStruct((p,), jnp.int32)
        trained, weights, _, _ = compiled(
            "weigh",
            partial(weigh, objective, self.weights, max_length=plan.max_new_tokens),
            rollouts,
            reference,
            ids,
            state.weights_state,
            lies=weighed,
        )
        factors = None
        if has_token_weights(objective):
            factors = compiled(
                "token_weights",
                partial(
                    token_weights,
                    objective,
                    temperature=self.temperature,
                    eos_id=self.task.ends,
                ),
                policy,
                rollouts,
                lies=by_group,
            )
        old = floats if self.keeps_old else None
        batch = Batch(trained, old, reference, weights, factors)
        shared = {"temperature": self.temperature, "max_length": plan.max_new_tokens}
        if config.instrument.counterfactual_every:
            look = partial(
                counterfactual.look,
                objective,
                self.optimizer,
                micro=whole,
                **shared,
            )
            compiled("counterfactual", look, self.policy, state, batch)
        if objective.history > 1:
            _, batch = compiled(
                "with_history",
                with_history,
                state.history,
                batch,
                lies=lambda shapes: (
                    by_name({"history": shapes[0]})["history"],
                    by_name(shapes[1]),
                ),
            )
        step = make_train_step(
            dataclasses.replace(self.policy, frozen=None),
            objective,
            self.optimizer,
            micro=micro_batch(
                batch.weights.shape[0] // self.parts, g, length, t, tokens
            ),
            **shared,
        )

        def update(state, batch, index, at, frozen):
            return step(state, part_of(batch, index, self.parts), at, frozen)

        at, frozen = state.params if self.stay else None, self.policy.frozen
        arguments = state, batch, np.int32(0), at, frozen
        compiled("update", update, *arguments, donate=0, lies=by_name)
        return programs

    # ---- one step

    def _prompt_order(self, epoch):
        if self.order is None or self.order[0] != epoch:
            rng = np.random.default_rng([self.config.seed, 4, epoch])
            self.order = epoch, rng.permutation(len(self.plan.prompts))
        return self.order[1]

    def _prompts_of(self, step):
        """Indices of a step's P trained prompts, all different.

        An epoch is a fresh permutation, cut into whole steps: the data position is a
        function of the step, and what is left over (fewer than P) sits this epoch out.
        """
        p = self.config.sampling.prompts
        epoch, place = divmod(step, len(self.plan.prompts) // p)
        return self._prompt_order(epoch)[place * p : (place + 1) * p]

    def _padded(self, rows, length=None):
        length = length or self.plan.prompt_length
        return pad_left(rows, length, self.tokenizer.pad_token_id)

    def _rollouts(self, params, indices, key, group_size, rows=None):
        """Completions of prompts by index, or of `rows` of token ids in their place."""
        if rows is None:
            ids, mask = self._padded([self.plan.prompts[i] for i in indices])
        else:
            ids, mask = self._padded(rows, self.plan.train_prompt_length)
        return self.sample(
            self.policy.replace(params),
            ids,
            mask,
            group_size=group_size,
            key=key,
            prompt_indices=np.asarray(indices, np.int32),
        )

    def _train_rollouts(self, params, indices, key):
        """A step's completions, of prompts that a draft has joined where it says so."""
        group_size, drafts = self.config.sampling.group_size, self.objective.drafts
        if not drafts:
            return self._rollouts(params, indices, key, group_size)
        draft_key = jax.random.fold_in(self.draft_key, jax.random.bits(key))
        sampled = self._rollouts(params, indices, draft_key, drafts)
        found = self.judge(fetch_to_host(sampled, all_processes=True), indices)
        self.spent.add(found)
        scored = found.rollouts
        rows = refined_prompts(
            self.plan.refine,
            [self.plan.prompts[i] for i in indices],
            scored.completions,
            scored.completion_mask,
            scored.rewards,
            self.task.stop_ids,
        )
        return self._rollouts(params, indices, key, group_size, rows)

    def _refilled(self, params, step, indices, judged):
        """Tied groups replaced by informative ones of other prompts, as far as the
        allowed number of tries goes; the rest stay, with weight 0."""
        indices, texts = np.array(indices), list(judged.texts)
        # Writable.
        rollouts, lengths = jax.tree.map(np.array, (judged.rollouts, judged.lengths))
        rounds = replaced = 0
        while rounds < self.objective.refills:
            tied = np.flatnonzero(_tied(rollouts.rewards))
            if not len(tied):
                break
            rounds += 1
            rng = np.random.default_rng([self.config.seed, 5, step, rounds])
            others = np.setdiff1d(np.arange(len(self.plan.prompts)), indices)
            fresh = rng.permutation(others)[: len(indices)]
            key = jax.random.fold_in(jax.random.fold_in(self.refill_key, step), rounds)
            sampled = self._train_rollouts(params, fresh, key)
            found = self.judge(fetch_to_host(sampled, all_processes=True), fresh)
            self.spent.add(found)
            more, more_texts = found.rollouts, found.texts
            good = np.flatnonzero(~_tied(more.rewards))
            pairs = list(zip(tied, good, strict=False))
            for old, new in pairs:
                indices[old], texts[old] = fresh[new], more_texts[new]
                lengths[old] = found.lengths[new]
                for x, y in zip(rollouts, more, strict=True):
                    x[old] = y[new]
            replaced += len(pairs)
        info = {"group/refills": rounds, "group/refilled": replaced}
        judged = judged._replace(rollouts=rollouts, texts=texts, lengths=lengths)
        return indices, judged, info

    def _trimmed(self, judged: ScoredRollouts) -> Rollouts:
        """Completions cut to the shortest bucket that holds them all."""
        rollouts, longest = judged.rollouts, int(judged.lengths.max())
        t = next(t for t in self.plan.buckets if t >= longest)
        return rollouts._replace(
            completions=rollouts.completions[..., :t],
            completion_mask=rollouts.completion_mask[..., :t],
            behaviour_logprobs=rollouts.behaviour_logprobs[..., :t],
        )

    def sampled(self, params, step):
        """(indices of a step's prompts, their completions on the device)."""
        self.spent = _Spent()
        indices = self._prompts_of(step)
        key = jax.random.fold_in(self.run_key, step)
        return indices, self._train_rollouts(params, indices, key)

    def fetch(self, rollouts: Rollouts) -> HostRollouts:
        """A step's completions on the host, all of them where groups are refilled."""
        return fetch_to_host(rollouts, all_processes=bool(self.objective.refills))

    def scored(self, state, step, indices, sampled: HostRollouts) -> Scored:
        """The step's completions scored and weighed."""
        judged = self.judge(sampled, indices)
        self.spent.add(judged)
        host = _reward_parts(judged.scores)
        if self.objective.refills:
            indices, judged, refilled = self._refilled(
                state.params, step, indices, judged
            )
            host |= refilled
        host["tokens/sampled"] = self.spent.tokens
        if self.pool is not None:
            host["reward/failed"] = self.spent.failures
        judged = judged._replace(rollouts=self._trimmed(judged))
        state, batch, metrics = self._batch(state, judged.rollouts, indices)
        return Scored(state, batch, indices, judged, sampled.owned, metrics, host)

    def _prepare(self, state, step):
        """Compiles what a step needs and looks at the start; less if asked to stop."""
        began = time.monotonic()
        with self.watchdog.phase("compilation"):
            self.compile_updates(state)
        if self.processes.stopping:
            return
        # Evaluated and looked at even on resume, where it is there already: what these
        # need is compiled before the first step. Its own sampling is compiled in it.
        row = self.evaluate(state.params, step)
        if self.instrument is not None and not self.processes.stopping:
            with self.watchdog.phase("look"):
                row |= self.instrument.measure(state.params, step)
                self.instrument.compile(state.params)
                if not self.looks_now:
                    self.instrument.discard()
        if self.processes.stopping:
            return
        if step == 0:
            self._write(0, {}, row)
        else:
            self._complete(step, row)
        self.console.say(f"ready after {time.monotonic() - began:.1f} s")

    def _complete(self, step, looked):
        """Puts what a stop left out of the step's line into it."""
        if not self.processes.is_writer:
            return
        path = self.directory / "metrics.jsonl"
        lines = read_lines(path)
        if not lines or lines[-1]["step"] != step:
            return
        owed = {
            name: value
            for name, value in looked.items()
            if name not in lines[-1]
            and (self._evaluates(step) if name.startswith("eval/") else self._due(step))
        }
        if owed:
            lines[-1] |= owed
            with self.processes.writing():
                rewrite(path, lines)
            self.files["metrics"].close()
            self.files["metrics"] = JsonLines(path)

    def _loop(self, state, step) -> TrainResult:
        config = self.config
        pending, row = None, {}
        try:
            self._prepare(state, step)
            self.console.start(step, config.steps)
            while step < config.steps and not self.processes.stopping:
                step_began = time.monotonic()
                with self.watchdog.phase("sampling"):
                    indices, sampled = self.sampled(state.params, step)
                    if pending is not None:  # written while the device samples
                        row, pending = self._write(*pending), None
                    sampled = self.fetch(sampled)
                times = {"time/sample_s": time.monotonic() - step_began}
                if self.processes.stopping:
                    break  # the step is made again, the same, on resume

                began = time.monotonic()
                with self.watchdog.phase("scoring"):
                    scored = self.scored(state, step, indices, sampled)
                judged, batch = scored.judged, scored.batch
                times["time/score_s"] = time.monotonic() - began
                if self.processes.stopping:
                    break

                with self.watchdog.phase("update"):
                    compared = self._compared(scored.state, batch, step + 1)
                    watched = self.instrument is not None and self.instrument.pending
                    before = jax.tree.map(jnp.copy, state.params) if watched else None
                    began = time.monotonic()
                    state, updated = self.update(scored.state, batch)
                times["time/update_s"] = time.monotonic() - began
                # From here on the step is made, whatever else fails.
                step += 1
                metrics, host = scored.metrics | updated, scored.host
                pending = (step, metrics, times | host)
                if watched:
                    with self.watchdog.phase("look"):
                        times |= self.instrument.compare_update(before, state.params)
                    del before
                    self._write_look()
                if compared is not None:
                    rewards = judged.rollouts.rewards
                    line = counterfactual.record(step, compared, rewards)
                    self._line("counterfactual", line)
                self._tell(step, judged.rollouts)
                self._log_samples(step, scored)
                looked = self._look(state.params, step)
                spent = looked.pop("time/instrument_s", 0) + times.get(
                    "time/instrument_s", 0
                )
                if spent:
                    times["time/instrument_s"] = spent
                times["time/step_s"] = time.monotonic() - step_began
                pending = (step, metrics, times | host | looked)
                failed = int(state.skipped_in_a_row) >= SKIPPED_LIMIT
                if step % config.checkpoint.every == 0 or failed:
                    # The line first: a checkpoint's step is never missing there.
                    row, pending = self._write(*pending), None
                    self.processes.exchange(None)  # whether it was written
                    self._save(state, step, row)
                if failed:
                    self._write_look()
                    self._give_up(step, judged.rollouts)
            if pending is not None:
                row, pending = self._write(*pending), None
            self._write_look()
            self.processes.exchange(None)  # whether all of it was written
        except OSError as error:
            if self.processes.count > 1 and not isinstance(error, SharedFailure):
                raise  # the others, elsewhere in the step, learn of it by its end
            raise self._rescued(state, step, pending, error) from error
        return self._end(state, step, row)

    def _end(self, state, step, row) -> TrainResult:
        if step:
            self._save(state, step, row)
            with self.watchdog.phase("saving"):
                self.checkpoints.wait()
        self.console.stop()
        lines = read_lines(self.directory / "metrics.jsonl")
        last = self.processes.first((lines or [{}])[-1])
        # A stop may have left the last look out.
        wanted = {"eval/heldout_pass_rate", *(["phase/label"] * self._due(step))}
        finished = step >= self.config.steps and wanted <= last.keys()
        if not finished:
            saved = ", saved" if step else ""
            self.console.say(
                f"stopped at step {step}{saved}; continue with --resume "
                f"--run-dir {self.directory}"
            )
        with self.watchdog.phase("report"):
            self._report(finished)
            self.processes.exchange(None)  # none leaves before the others
        return TrainResult(self.directory, last, finished)

    def _rescued(self, state, step, pending, error) -> OSError:
        """What to raise where something cannot be written: the disk is full, say. A
        step whose line is not on disk is saved if it can be, the line with it; where
        another file's is not, the checkpoint before makes the steps since again."""
        self.console.stop()
        # Where writing the line itself failed, it is among the unwritten ones already.
        failed = self.processes.first(bool(self.files["metrics"].unwritten))
        if pending is not None and not failed:
            with contextlib.suppress(OSError):  # now it is
                self._write(*pending)
            self.processes.failure = None  # all end here anyway
        unwritten = self.processes.first(
            {name: file.unwritten for name, file in self.files.items()}
        )
        if step and unwritten["metrics"]:
            self._save(state, step, {}, {"unwritten": unwritten})
        self.checkpoints.wait()
        newest = self.checkpoints.newest()
        saved = "nothing is saved" if newest is None else f"step {newest} is saved"
        return OSError(
            f"{error}; stopped at step {step}, {saved}. Make room, then continue with "
            f"--resume --run-dir {self.directory}"
        )

    def _tell(self, step, rollouts):
        """Warns of rewards that are missing, hung or say nothing."""
        errors = self.spent.errors
        if errors:
            self.console.warn(
                f"step {step}: {len(errors)} rewards missing: {errors[0][:200]}"
            )
        if self.spent.failures:
            self.console.warn(
                f"step {step}: {self.spent.failures} checks hung or died; they score 0."
            )
        if _tied(rollouts.rewards).all() and not self.told_of_ties:
            self.told_of_ties = True
            self.console.warn(
                f"step {step}: no group is informative, all its prompts have "
                "weight 0 (said once; see group/informative in metrics.jsonl)."
            )

    def judge(self, sampled: HostRollouts, indices) -> ScoredRollouts:
        examples = [self.task.train[i] for i in indices]
        return score_rollouts(self.task, sampled, examples, self.pool, self.processes)

    def _batch(self, state, rollouts, indices):
        """(state, batch, metrics): the rollouts weighed, with what they need beside."""
        programs = self.programs[rollouts.completions.shape[-1]]
        policy = self.policy.replace(state.params)
        rollouts = put_on_mesh(rollouts, self.mesh)
        old = programs["rescore"](policy, rollouts) if self.keeps_old else None
        reference = None
        if self.uses_reference:
            reference = programs["rescore"](self.reference, rollouts)
        ids = jnp.asarray(indices, jnp.int32)
        rollouts, weights, weights_state, metrics = programs["weigh"](
            rollouts, reference, ids, state.weights_state
        )
        state = state._replace(weights_state=weights_state)
        factors = None
        if "token_weights" in programs:
            factors = programs["token_weights"](policy, rollouts)
        batch = Batch(rollouts, old, reference, weights, factors)
        return state, jax.block_until_ready(batch), metrics

    def update(self, state, batch):
        """All updates of one rollout, or fewer where the objective stops early."""
        programs = self.programs[batch.rollouts.completions.shape[-1]]
        update = programs["update"]
        if "with_history" in programs:
            history, batch = programs["with_history"](state.history, batch)
            state = state._replace(history=history)
        at = jax.tree.map(jnp.copy, state.params) if self.stay else None
        metrics, mismatch = {}, None
        for i in range(self.config.updates_per_rollout):
            state, metrics = update(
                state, batch, np.int32(i % self.parts), at, self.policy.frozen
            )
            if i == 0:  # the sampler is compared with the policy it sampled from
                mismatch = metrics["mismatch/max_abs"]
            if self.objective.stop_deviation is not None and metrics["update/stopped"]:
                break
        metrics = metrics | {"mismatch/max_abs": mismatch}
        return jax.block_until_ready(state), metrics

    def _give_up(self, step, rollouts):
        part = "" if self.processes.count == 1 else f"-process-{self.processes.index}"
        file = self.directory / f"nonfinite-step-{step}{part}.npz"
        np.savez(file, step=step, **rollouts._asdict())
        self.checkpoints.wait()
        self._report(finished=False)
        raise NonFiniteGradients(
            f"{SKIPPED_LIMIT} updates in a row had a non-finite gradient; stopped at "
            f"step {step}. Its rollouts are in {file}, the parameters (not touched by "
            "the skipped updates) in the checkpoint of the same step; `grpo-jax replay "
            f"{self.directory} {step}` computes it again. A new run with a lower "
            "optimizer.learning_rate or a warm-up is the usual cure."
        )

    # ---- looking and writing

    def _look(self, params, step) -> dict[str, float]:
        """Evaluation and instrument where they are due; asked to stop, the resumed run
        makes up for them."""
        metrics = {}
        if self._evaluates(step) and not self.processes.stopping:
            metrics |= self.evaluate(params, step)
        if self._due(step) and not self.processes.stopping:
            with self.watchdog.phase("look"):
                metrics |= self.instrument.measure(params, step)
        return metrics

    def _evaluates(self, step: int) -> bool:
        every = self.config.evaluation.every
        return step in (0, self.config.steps) or (every > 0 and step % every == 0)

    def _exact(self, params, name):
        return exact_pass_rates(
            self.policy.replace(params),
            self.answers[name],
            self.temperature,
            self.config.micro_batch_tokens,
        )

    def evaluate(self, params, step) -> dict[str, float]:
        """Pass rates of the policy after `step` steps."""
        with self.watchdog.phase("evaluation"):
            return self._pass_rates(params, step)

    def _pass_rates(self, params, step):
        metrics = {}
        key = jax.random.fold_in(self.eval_key, step)
        exact = self.plan.task.single_answer
        for name in ("train", "heldout"):
            if exact:
                interval = mean_interval(self._exact(params, name))
            else:
                interval = self._sampled_pass_rate(params, name, key)
            metrics |= _named_interval(
                f"eval/{name}_pass_rate", f"eval/{name}", interval
            )
        if exact:
            name = "eval/heldout_sampled"
            interval = self._sampled_pass_rate(params, "heldout", key)
            metrics |= _named_interval(name, name, interval)
        return metrics

    def _sampled_pass_rate(self, params, name, key):
        """Share of prompts solved by samples, with its interval."""
        s = self.config.sampling
        parts = answer_prompts(
            self.sample,
            self.policy.replace(params),
            self.task,
            self.eval_sets[name],
            self.eval_prompts[name],
            samples=self.config.evaluation.samples,
            rows=s.prompts * s.group_size,  # at a time, as many as a step samples
            key=key,
            pool=self.pool,
            processes=self.processes,
            warn=self.console.warn,
        )
        return pass_rate_interval([row for part in parts for row in part])

    def _compared(self, state, batch, step):
        """What other weights would do with the batch, where that is due."""
        every = self.config.instrument.counterfactual_every
        if not every or step % every:
            return None
        t = batch.rollouts.completions.shape[-1]
        return gather_to_host(
            self.programs[t]["counterfactual"](self.policy, state, batch)
        )

    def row(self, step, metrics, host) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        row = {"step": step} | to_numbers(metrics) | host
        if step:
            applied = row["update/applied"]
            row["learning_rate"] = float(self.schedule(max(0, applied - 1)))
        return row | {"compiles": self.compiles()}

    def _write(self, step, metrics, host):
        row = self.row(step, metrics, host)
        self._line("metrics", row)
        if step:
            self.console.step(step, row)
        if "eval/heldout_pass_rate" in row:
            self.console.say(
                f"step {step}: pass rate {row['eval/train_pass_rate']:.3f} on trained "
                f"prompts, {row['eval/heldout_pass_rate']:.3f} on held-out ones"
            )
        return row

    def _line(self, name, row):
        """A line of one of the files."""
        with self.processes.writing():
            self.files[name].write(row)

    def _log_samples(self, step, scored: Scored):
        every = self.config.log.samples_every
        if not every or step % every:
            return
        rewards, texts = scored.judged.rollouts.rewards, scored.judged.texts
        for p in np.flatnonzero(scored.mine.any(1))[: self.config.log.samples_prompts]:
            example = self.task.train[scored.indices[p]]
            here = np.flatnonzero(scored.mine[p])
            found = [float(r) for r in rewards[p, here]]
            self._line(
                "samples",
                {
                    "step": step,
                    "prompt": example.prompt,
                    "answer": example.answer,
                    "completions": [texts[p][g] for g in here],
                    "rewards": [None if np.isnan(r) else r for r in found],
                },
            )

    def _write_look(self):
        """The row of the look in progress, complete or not."""
        if self.instrument is not None and self.instrument.pending:
            self._line("instrument", self.instrument.take_row())

    def _abandon(self, waited):
        exit_at_once(
            f"process {self.processes.index} {waited}; it, or another one, is stuck. "
            f"Continue with the same command, --resume and --run-dir {self.directory}."
        )

    def _save(self, state, step, row, more=None):
        score = row.get("eval/heldout_pass_rate")
        with self.watchdog.phase("saving"):
            self.checkpoints.save(step, state, {"step": step} | (more or {}), score)

    def _report(self, finished):
        if not self.processes.is_writer:
            return
        from grpo_jax.report.page import write_report

        try:
            with on_mesh(single_device_mesh(self.mesh)):
                path = write_report([self.directory], self.directory / "report.html")
        except (
            Exception
        ) as error:  # a full disk, say: what was learnt is safe elsewhere
            self.console.warn(
                f"the report could not be written ({type(error).__name__}: {error})."
            )
            return
        if finished:
            self.console.say(f"report: {path}")
