"""How many probe prompts a run can afford to look at."""

import dataclasses

from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.errors import ConfigError
from grpo_jax.runs.config import TrainConfig

# Costs in forward passes over tokens, measured on a CPU (BUILD_NOTES.md). A step is
# counted low: without what the host and the optimizer do.
SAMPLING, GRADIENT, SECOND_ORDER = 2, 4, 6


FLOOR = 160  # tokens that a pass over one prompt's few samples costs besides its own


MOST_PROMPTS = 32  # chosen for a run that does not say; more cost memory and file size


VECTOR_BYTES = 128 * 2**20  # of all parts' gradients, and three more a prompt


@dataclasses.dataclass(frozen=True)
class ProbePlan:
    """What a look looks at."""

    prompts: int
    group_size: int
    width: int  # coordinates kept of a gradient
    exact: bool  # all of them
    share: float  # of a step's time that looks should take, averaged over steps

    @property
    def num_directions(self) -> int | None:
        return None if self.exact else self.width

    @property
    def vector_bytes(self) -> int:
        """Of all parts' gradients or their sums, and three more a prompt."""
        return 4 * self.prompts * (num_parts(self.group_size) + 3) * self.width

    def text(self, every: int) -> str:
        kept = "whole gradients" if self.exact else f"gradients in {self.width:,} sums"
        return (
            f"{self.prompts} probe prompts x {self.group_size} samples, {kept}, every "
            f"{every} steps and at the end: about {100 * self.share:.0f} % of step time"
        )


def plan_probe(
    config: TrainConfig,
    *,
    parameters: int,
    train_prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
) -> ProbePlan | None:
    """Probe prompts and coordinates within config.instrument.max_overhead.

    From a count of forward passes, not from a clock, so that the same command looks at
    the same prompts; the run measures the share that it takes. None where the
    instrument is off.

    Raises:
        ConfigError: not even two prompts fit, or the group is too small to be cut.
    """
    wanted, sampling = config.instrument, config.sampling
    if not wanted.every:
        return None
    g = wanted.group_size or max(8, -(-sampling.group_size // 4) * 4)
    parts, t = num_parts(g), max_new_tokens
    step = (SAMPLING + GRADIENT) * sampling.prompts
    step *= prompt_tokens + sampling.group_size * t
    look = GRADIENT * (parts * (prompt_tokens + FLOOR) + g * t)  # of the parts
    look += SECOND_ORDER * (2 * (prompt_tokens + FLOOR) + g * t)  # along their mean
    look += SECOND_ORDER * (prompt_tokens + g * t)  # along the update
    look += (SAMPLING + 1) * (prompt_tokens + g * t)  # and the hidden states
    allowed = wanted.max_overhead * wanted.every * step / look
    prompts = wanted.prompts or min(MOST_PROMPTS, int(allowed))
    if train_prompts < max(2, wanted.prompts or 0):
        raise ConfigError(
            f"instrument.prompts must be from 2 to {train_prompts}, the task's trained "
            f"prompts, got {wanted.prompts or 'no number'}; lower it, or set "
            "instrument.every to 0."
        )
    prompts = min(prompts, train_prompts)
    if prompts < 2:
        share = 2 * look / (wanted.every * step)
        raise ConfigError(
            f"instrument.max_overhead {wanted.max_overhead:g} leaves no two probe "
            f"prompts: they would take about {100 * share:.0f} % of step time; raise "
            "instrument.every or max_overhead, or set instrument.every to 0."
        )
    width = max(1, VECTOR_BYTES // (4 * prompts * (parts + 3)))
    looks = len({*range(0, config.steps + 1, wanted.every), config.steps}) - 1
    share = looks * prompts * look / (config.steps * step)
    exact = parameters <= width
    return ProbePlan(prompts, g, parameters if exact else width, exact, share)
