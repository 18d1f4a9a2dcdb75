"""The training loop: one step is sample, score, weigh, update.

The device's results are waited for where they are needed: completions before scoring,
new parameters at the end of the update. A step's row is written while the device
samples the next step, or at once where a checkpoint or the end follows.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import summary
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.objective import Objective
from grpo_jax.parallel.processes import UnwrittenError, gather_to_host
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.lines import read_lines, to_numbers
from grpo_jax.runs.snapshots import load_policy
from grpo_jax.training.collector import Collected
from grpo_jax.training.context import RunContext
from grpo_jax.training.due import Due
from grpo_jax.training.first_updates import WATCHED, advice, too_far
from grpo_jax.training.handle import Requests, StepListener
from grpo_jax.training.journal import Journal, evaluated_text
from grpo_jax.training.learner import WeighedBatch
from grpo_jax.training.mismatch import mismatch_warning
from grpo_jax.training.observers import Observers
from grpo_jax.training.odd_weights import odd_weights, rule_name
from grpo_jax.training.parts import Parts
from grpo_jax.training.saving import SKIPPED_LIMIT, SamplerFailedError, Saver
from grpo_jax.training.start import Resumed
from grpo_jax.training.watchdog import Watchdog

_EVALUATED = ("eval/", "time/evaluation_s")  # how fields of an evaluation begin


class TrainResult(NamedTuple):
    """Where a run's files are, and how it ended."""

    run_dir: Path
    metrics: dict[str, Any]  # the last row of metrics.jsonl
    finished: bool  # False: stopped by a signal, to be resumed

    @property
    def history(self) -> dict[str, np.ndarray]:
        """Field of metrics.jsonl -> its values [N], one of every row; NaN (None for
        text) where a row lacks it."""
        rows = read_lines(self.run_dir / "metrics.jsonl")
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _column([row.get(name) for row in rows]) for name in names}

    def policy(self, step: int | None = None) -> Policy:
        """The policy after `step` steps, of those that were saved; None: the last.

        Raises:
            ConfigError: no such checkpoint.
        """
        return load_policy(self.run_dir, step)


def _column(values: list[Any]) -> np.ndarray:
    """[N] floats, or objects where a value is text."""
    if any(isinstance(x, str) for x in values):
        return np.array(values, object)
    return np.array([np.nan if x is None else x for x in values], float)


class Stopwatch:
    """Seconds of a step's phases, one after the other."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._began = self._phase_began = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a phase and begins the next one."""
        now = time.monotonic()
        self.times[name], self._phase_began = now - self._phase_began, now

    def restart(self) -> None:
        """Leaves out what happened since the last phase ended."""
        self._phase_began = time.monotonic()

    def total(self, name: str) -> None:
        """Ends the step."""
        self.times[name] = time.monotonic() - self._began


class Loop:
    """The steps of a run, and what follows them.

    Args:
        context: The run.
        parts: What samples, scores, weighs and updates.
        observers: Evaluation, probe measurements, counterfactual updates.
        journal: Where rows go.
        saver: Where the state goes.
        watchdog: Warns of slow phases.
        due: Says which steps are evaluated, measured, saved.
        resumed: The first state and step.
        listener: Whom the journal's rows are told to, and who may ask for more.
        keep_measurement: Whether instrument.jsonl gets a row for the step that this
            process starts at; a resumed run measures there in any case.

    Attributes:
        state, step: After the newest update.
        journal: As given; closed by whoever made it.
    """

    def __init__(
        self,
        context: RunContext,
        parts: Parts,
        observers: Observers,
        journal: Journal,
        saver: Saver,
        watchdog: Watchdog,
        due: Due,
        resumed: Resumed,
        listener: StepListener,
        *,
        keep_measurement: bool,
    ):
        self.context, self.journal = context, journal
        self.state, self.step = resumed.state, resumed.step
        self._collector = parts.collector
        self._learner, self._shapes = parts.learner, parts.shapes
        self._observers, self._saver = observers, saver
        self._watchdog, self._due, self._listener = watchdog, due, listener
        self._keep_measurement = keep_measurement
        self._warned_of_ties: set[str] = set()
        self._warned_of_rate = self._warned_of_weights = False
        self._odd_weights: str | None = None  # of the newest step
        # The trainer's own sampler has the trainer's numbers, up to rounding.
        self._warned_of_mismatch = context.plan.given.sampler is None

    def run(self) -> TrainResult:
        """Makes the remaining steps, or as many as fit before a stop."""
        processes, config = self.context.processes, self.context.config
        try:
            self._prepare()
            self.context.console.start(self.step, config.steps)
            while self.step < config.steps and not processes.stopping:
                self._make_step()
            self.journal.flush()
            self._observers.write_measurement()
            processes.synchronise()
        except UnwrittenError as error:
            if not processes.is_shared(error):
                raise  # the others were not told of it; they see this process end
            raise self._saver.save_unwritten(self.state, self.step, error) from error
        except SamplerFailedError as error:
            if processes.count > 1:
                raise  # the others may be elsewhere; they see this process end
            raise self._without_samples(error) from error.__cause__
        return self._end()

    def _make_step(self) -> None:
        """Samples, scores, weighs and updates; returns early if asked to stop."""
        collector, learner, observers = self._collector, self._learner, self._observers
        timer = Stopwatch()
        with self._watchdog.phase("sampling"):
            sampling = collector.sample(self.state.params, self.step)
            self.journal.flush()  # the last step's row, while the device samples
            sampled = collector.fetch(sampling)
        timer.lap("time/sample_s")
        if self.context.processes.stopping:
            return  # the resumed run makes the step again, identically
        with self._watchdog.phase("scoring"):
            collected = collector.score(self.state.params, self.step, sampling, sampled)
            self._check_rewards(collected)
            if learner.settings.rescores:
                timer.lap("time/score_s")
            weighed = learner.weigh(self.state, collected.rollouts, collected.indices)
        timer.lap(f"time/{'reference' if learner.settings.rescores else 'score'}_s")
        if self.context.processes.stopping:
            return
        with self._watchdog.phase("update"):
            before = observers.before_update(weighed, self.state.params, self.step + 1)
            timer.restart()
            self.state, updated = learner.update(weighed.state, weighed.batch)
        timer.lap("time/update_s")
        self.step += 1  # the step is made, whatever fails from here on
        metrics, host = weighed.metrics | updated, collected.metrics
        self._watch_first_updates(metrics)
        self._watch_mismatch(metrics)
        self._watch_weights(weighed, collected)
        # Kept now in case observing fails, and again with what it measured.
        self.journal.keep(self.step, metrics, timer.times | host)
        rewards = collected.rollouts.scored_rewards
        compare_times = observers.after_update(
            before, self.state.params, rewards, self.step
        )
        del before  # a copy of the parameters
        self._warn(collected, metrics)
        asked = self._listener.requests()
        observed = self._observe(collected, compare_times, timer, asked)
        self.journal.keep(self.step, metrics, timer.times | host | observed)
        self._save_if_due(collected.rollouts, asked)

    def _watch_first_updates(self, metrics: dict[str, Any]) -> None:
        """Warns once where the first updates move the policy too far."""
        config = self.context.config
        warmup = -(-config.optimizer.warmup_steps // config.updates_per_rollout)
        if self._warned_of_rate or self.step > WATCHED + warmup:
            return
        names = {"update/log_prob_change", "kl/mean"} & metrics.keys()
        figures = to_numbers({name: metrics[name] for name in names})
        measured = too_far(self.step, figures, warmup=warmup)
        if measured is None:
            return
        self._warned_of_rate = True
        rate = self.context.plan.learning_rate
        advised = "The optimizer's learning rate is probably too high."
        if rate is not None:
            advised = advice(rate.value, rate.default)
        self.context.console.warn(f"step {self.step}: {measured}. {advised}")

    def _watch_mismatch(self, metrics: dict[str, Any]) -> None:
        """Warns once where the user's sampler has other numbers than the trainer."""
        if self._warned_of_mismatch:
            return
        names = ("mismatch/mean_abs", "mismatch/max_abs")
        figures = to_numbers({name: metrics[name] for name in names})
        warning = mismatch_warning(figures, self._learner.settings.objective)
        if warning is not None:
            self._warned_of_mismatch = True
            self.context.console.warn(f"step {self.step}: {warning}")

    def _watch_weights(self, weighed: WeighedBatch, collected: Collected) -> None:
        """Warns once of prompt weights that are not finite or negative."""
        names = ("weights/mean", "weights/min")
        mean, least = to_numbers({n: weighed.metrics[n] for n in names}).values()
        self._odd_weights = None
        if math.isfinite(mean) and least >= 0:
            return
        train = self.context.plan.task.train
        self._odd_weights = odd_weights(
            rule_name(self.context.config),
            gather_to_host(weighed.batch.weights),
            [train[i].prompt for i in collected.indices],
        )
        if not self._warned_of_weights:
            self._warned_of_weights = True
            self.context.console.warn(f"step {self.step}: {self._odd_weights}.")

    def _check_rewards(self, collected: Collected) -> None:
        """Ends the run, with what it has, where no sample of a step got a reward."""
        reason = collected.without_rewards
        if reason is None:
            return
        log, train = self.context.config.log, self.context.plan.task.train
        self.journal.samples(self.step + 1, collected, train, log.samples_prompts)
        self._observers.write_measurement()
        raise self._saver.save_before(
            self.state, self.step, f"step {self.step + 1}: {reason}"
        )

    def _without_samples(self, error: SamplerFailedError) -> RuntimeError:
        """The error to raise where the user's sampler failed, in a step, an evaluation
        or a measurement; what the run has is saved."""
        self.context.console.stop()
        self.journal.flush()
        self._observers.write_measurement()
        return self._saver.save_before(
            self.state,
            self.step,
            str(error).rstrip("."),
            kind=SamplerFailedError,
            remedy="Mend the sampler",
        )

    def _observe(
        self,
        collected: Collected,
        compare_times: dict[str, float],
        timer: Stopwatch,
        asked: Requests,
    ) -> dict[str, Any]:
        """Metrics measured after an update; logs samples and ends the timer too.

        Args:
            collected: The step's rollouts.
            compare_times: Times of comparing the update with its prediction.
            timer: The step's timer.
            asked: What is done though it is not due.
        """
        step, params, spent_s = self.step, self.state.params, "time/instrument_s"
        if self._due.samples(step):
            log, train = self.context.config.log, self.context.plan.task.train
            self.journal.samples(step, collected, train, log.samples_prompts)
        observed = self._observers.observe(params, step, evaluates=asked.evaluation)
        spent = observed.pop(spent_s, 0) + compare_times.get(spent_s, 0)
        if spent:
            timer.times[spent_s] = spent
        timer.total("time/step_s")
        return observed

    def _save_if_due(self, rollouts: Rollouts, asked: Requests) -> None:
        failed = int(self.state.skipped_in_a_row) >= SKIPPED_LIMIT
        due = failed or asked.saving or self._due.checkpoint(self.step)
        if not (due or self._saver.overdue()):
            return
        # The row first: metrics.jsonl always has the row of a checkpoint's step.
        self.journal.flush()
        self.context.processes.synchronise()
        self._saver.save(self.state, self.step, self.journal.last_row)
        if failed:
            self._observers.write_measurement()
            raise self._saver.save_rollouts(rollouts, self.step, self._odd_weights)

    def _prepare(self) -> None:
        """Compiles what a step needs and measures the start; less if asked to stop."""
        began, processes, step = time.monotonic(), self.context.processes, self.step
        plan, say = self.context.plan, self.context.console.say
        lengths = " or ".join(map(str, plan.buckets))
        say(
            f"compiling the update: {plan.model.num_layers} layers, completions of "
            f"{lengths} tokens"
        )
        with self._watchdog.phase("compilation"):
            self._learner.compile(self.state, self._shapes, lambda: processes.stopping)
        if processes.stopping:
            return
        observed = self._observers.prepare(
            self.state.params, step, self._keep_measurement
        )
        if processes.stopping:
            return
        if step == 0:
            watched = ("time/evaluation_s", "time/instrument_s")
            start_s = time.monotonic() - self.context.began
            start_s -= sum(observed.get(name, 0.0) for name in watched)
            self.journal.keep(0, {}, observed | {"time/start_s": start_s})
            self.journal.flush()
        else:  # the row may lack them: a stop ends a step early
            if "eval/heldout_pass_rate" in observed:
                say(f"step {step}: {evaluated_text(observed)}")
            evaluated, measured = (
                self._due.evaluation(step),
                self._due.measurement(step),
            )
            late = {
                name: value
                for name, value in observed.items()
                if (evaluated if name.startswith(_EVALUATED) else measured)
            }
            self.journal.complete(step, late)
        seconds = time.monotonic() - began
        say(f"ready after {seconds:.1f} s; the first step compiles its sampler")

    def _end(self) -> TrainResult:
        """Saves the last step and reports the run.

        Raises:
            OSError: the last step could not be saved.
        """
        step, context, unsaved = self.step, self.context, None
        if step:
            self._saver.save(self.state, step, self.journal.last_row)
            self._saver.wait()
            unsaved = self._saver.unsaved(step)
        context.console.stop()
        last = self.journal.last_metrics()
        # A stop may have left out the last evaluation or measurement.
        required = {"eval/heldout_pass_rate"}
        if self._due.measurement(step):
            required.add("phase/label")
        finished = step >= context.config.steps and required <= last.keys()
        if not finished and unsaved is None:
            saved = ", saved" if step else ""
            context.console.say(
                f"stopped at step {step}{saved}; continue with --resume "
                f"--run-dir {context.directory}"
            )
        error = self._listener.error
        with self._watchdog.phase("report"):
            self._saver.report()
            # None exits while another still works; all fail where on_step did.
            failed = context.processes.first(None if error is None else summary(error))
        if unsaved is not None:
            raise unsaved
        if failed is not None:
            raise RuntimeError(
                f"on_step failed after step {step}: {failed}; what was trained is "
                f"saved in {context.directory}, continue with resume."
            ) from error
        return TrainResult(context.directory, last, finished)

    def _warn(self, collected: Collected, metrics: dict[str, Any]) -> None:
        """Warns of rewards that are missing, of hung checks, of groups all tied.

        Args:
            collected: The step's rollouts.
            metrics: Of the step's groups and of its last update.
        """
        console, cost, step = self.context.console, collected.cost, self.step
        if cost.errors:
            console.warn(
                f"step {step}: {len(cost.errors)} rewards missing: "
                f"{cost.errors[0][:200]}"
            )
        if cost.failures:
            console.warn(
                f"step {step}: {cost.failures} checks hung or died; they score 0."
            )
        if float(metrics["group/informative"]) > 0:
            return
        effect = effect_of_ties(
            bool(metrics["update/empty"]),
            self.context.plan.objective,
            skips=self.context.config.optimizer.skip_empty,
        )
        if effect not in self._warned_of_ties:
            self._warned_of_ties.add(effect)
            console.warn(
                f"step {step}: no group is informative; {effect} (said once; see "
                "group/informative in metrics.jsonl)."
            )


def effect_of_ties(empty: bool, objective: Objective, *, skips: bool) -> str:
    """What the update of a step does whose groups are all tied, in words.

    Args:
        empty: Its gradient is 0 everywhere.
        objective: Whose loss it is.
        skips: Such an update is left out.
    """
    if empty and skips:
        return "the gradient is 0 and the update is left out"
    if empty:
        return (
            "the gradient is 0, and only the optimizer's mean of past ones and weight "
            "decay move anything"
        )
    only_kl = objective.baseline != "none" and not objective.entropy_coef
    if objective.kl_coef and only_kl:
        return "the update goes only towards the starting policy (KL)"
    return "the update follows only what the loss has beside comparisons in a group"
