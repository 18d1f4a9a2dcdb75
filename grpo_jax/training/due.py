"""Which steps are followed by what: evaluation, measurement, comparison, saving."""

import dataclasses

from grpo_jax.runs.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Due:
    """What follows a number of steps; step 0 is the start of the run.

    Evaluation and measurement are due at the start (measurement where the config says
    so), at the end and every so many steps between; the others every so many steps.

    Attributes:
        with_instrument: Whether the run has probe prompts.
    """

    config: TrainConfig
    with_instrument: bool

    def evaluation(self, step: int) -> bool:
        """Whether pass rates are evaluated."""
        return self._ends(step) or _every(self.config.evaluation.every, step)

    def measurement(self, step: int) -> bool:
        """Whether the probe prompts are measured."""
        wanted = self.config.instrument
        if not self.with_instrument or (step == 0 and not wanted.at_start):
            return False
        return self._ends(step) or _every(wanted.every or 0, step)

    def comparison(self, step: int) -> bool:
        """Whether prompt weights are compared by a counterfactual update."""
        return _every(self.config.instrument.counterfactual_every, step)

    def samples(self, step: int) -> bool:
        """Whether samples.jsonl gets an entry; the first step's is not waited for."""
        period = self.config.log.samples_every
        return _every(period, step) or (period > 0 and step == 1)

    def checkpoint(self, step: int) -> bool:
        """Whether a checkpoint is saved in the middle of the run."""
        return _every(self.config.checkpoint.every, step)

    def _ends(self, step: int) -> bool:
        return step in (0, self.config.steps)


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0
