"""What watches a run: pass rates, probe measurements, counterfactual updates."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.diagnostics.counterfactual import Counterfactual
from grpo_jax.instrument.live import Instrument
from grpo_jax.parallel.processes import Processes
from grpo_jax.training.counterfactual import counterfactual_row
from grpo_jax.training.due import Due
from grpo_jax.training.journal import Journal
from grpo_jax.training.learner import Learner, WeighedBatch
from grpo_jax.training.pass_rates import PassRates
from grpo_jax.training.watchdog import Watchdog

ANNOUNCED_S = 5  # seconds of the last one for which the next is announced
_DOING = {"evaluation": "evaluating", "measurement": "measuring"}


class BeforeUpdate(NamedTuple):
    """What is measured or copied before an update, for `after_update`."""

    counterfactual: Counterfactual | None
    params: Any  # a copy; None where no measurement waits for the update


class Observers:
    """Evaluates, measures and compares where it is due, and writes the rows.

    Args:
        due: What is due when.
        pass_rates: Evaluation.
        instrument: None where it is off.
        learner: Computes the counterfactual updates.
        journal: Where the rows go.
        watchdog: Warns of slow phases.
        processes: The processes of the run. If asked to stop, they start nothing new:
            the resumed run makes up for it.
        say: Gets a sentence as something slow begins.
    """

    def __init__(
        self,
        due: Due,
        pass_rates: PassRates,
        instrument: Instrument | None,
        learner: Learner,
        journal: Journal,
        watchdog: Watchdog,
        processes: Processes,
        say: Callable[[str], None],
    ):
        self._due, self._pass_rates, self._instrument = due, pass_rates, instrument
        self._learner, self._journal = learner, journal
        self._watchdog, self._processes, self._say = watchdog, processes, say
        self._took: dict[str, float] = {}  # phase -> seconds of the last one

    def prepare(self, params: Any, step: int, keep_measurement: bool) -> dict[str, Any]:
        """Evaluates and measures before the first step, due or not: what these need is
        compiled here, and no step waits for it. A run that does not measure its start
        compiles the measurement where the first one is due.

        Args:
            params: After `step` steps.
            step: Where the run starts or resumes.
            keep_measurement: Whether the measurement belongs into instrument.jsonl.
        """
        here = f"step {step}" if step else "the start"
        self._say(f"evaluating {here} (the first evaluation compiles its sampler)")
        metrics = self._evaluate(params, step)
        if self._instrument is None or self._processes.stopping:
            return metrics
        if not (keep_measurement or self._due.measurement(0)):
            return metrics
        self._say(f"measuring {here} (the first measurement compiles its programs)")
        with self._phase("measurement"):
            metrics |= self._instrument.measure(params, step)
            self._instrument.compile(params)
            if not keep_measurement:
                self._instrument.discard()
        return metrics

    def before_update(
        self, weighed: WeighedBatch, params: Any, step: int
    ) -> BeforeUpdate:
        """To be called before the update of `step`, which donates `params`."""
        compared = None
        if self._due.comparison(step):
            compared = self._learner.compare_weights(weighed.state, weighed.batch)
        instrument = self._instrument
        waiting = instrument is not None and instrument.pending is not None
        return BeforeUpdate(
            compared, jax.tree.map(jnp.copy, params) if waiting else None
        )

    def after_update(
        self, before: BeforeUpdate, params: Any, rewards: Any, step: int
    ) -> dict[str, float]:
        """Times spent on comparing the update with its prediction; writes the rows that
        waited for the update."""
        metrics: dict[str, float] = {}
        if before.params is not None and self._instrument is not None:
            with self._watchdog.phase("measurement"):
                metrics = self._instrument.compare_update(before.params, params)
            self.write_measurement()
        if before.counterfactual is not None:
            row = counterfactual_row(step, before.counterfactual, rewards)
            self._journal.counterfactual(row)
        return metrics

    def observe(
        self, params: Any, step: int, *, evaluates: bool = False
    ) -> dict[str, Any]:
        """Metrics of the policy after `step` steps, where they are due.

        Args:
            params: After these steps.
            step: How many.
            evaluates: An evaluation is due in any case.
        """
        metrics: dict[str, Any] = {}
        if (evaluates or self._due.evaluation(step)) and not self._processes.stopping:
            self._announce("evaluation", step)
            metrics |= self._evaluate(params, step)
        measures = self._due.measurement(step) and not self._processes.stopping
        if measures and self._instrument is not None:
            self._announce("measurement", step)
            with self._phase("measurement"):
                metrics |= self._instrument.measure(params, step)
        return metrics

    def write_measurement(self) -> None:
        """Writes the measurement in progress; its `update` is null if none followed."""
        row = None if self._instrument is None else self._instrument.take_row()
        if row is not None:
            self._journal.measurement(row)

    def _evaluate(self, params: Any, step: int) -> dict[str, Any]:
        with self._phase("evaluation"):
            metrics = dict(self._pass_rates.measure(params, step))
        return metrics | {"time/evaluation_s": self._took["evaluation"]}

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase that is watched and timed."""
        began = time.monotonic()
        with self._watchdog.phase(name):
            yield
        self._took[name] = time.monotonic() - began

    def _announce(self, phase: str, step: int) -> None:
        """Says what begins, where it is new or the last one took long."""
        took = self._took.get(phase)
        if took is not None and took <= ANNOUNCED_S:
            return
        self._journal.show()
        new = " (compiles its programs)" if took is None else ""
        self._say(f"step {step}: {_DOING[phase]}{new}")
