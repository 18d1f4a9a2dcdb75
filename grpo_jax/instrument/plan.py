"""How many probe prompts a run can afford to measure."""

import dataclasses

from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.errors import ConfigError
from grpo_jax.runs.config import TrainConfig

# Costs in forward passes over tokens, measured on a CPU (BUILD_NOTES.md). A step is
# counted low: without what the host and the optimizer do.
SAMPLING, GRADIENT, SECOND_ORDER = 2, 4, 6
FLOOR = 160  # fixed cost, in tokens, of a pass over one prompt's few samples
MOST_PROMPTS = 32  # unless more are asked for: they cost memory and file size
VECTOR_BYTES = 128 * 2**20  # limit of `ProbePlan.vector_bytes`


@dataclasses.dataclass(frozen=True)
class ProbePlan:
    """Size and cost of a run's probe measurements."""

    prompts: int
    group_size: int
    width: int  # coordinates kept of a gradient
    exact: bool  # whether these are all of them
    share: float  # of a step's time that measurements take, averaged over steps

    @property
    def num_directions(self) -> int | None:
        """Sums that gradients are hashed to; None: all coordinates are kept."""
        return None if self.exact else self.width

    @property
    def vector_bytes(self) -> int:
        """Bytes of every part's gradient or its sums, and of three more a prompt."""
        return 4 * self.prompts * (num_parts(self.group_size) + 3) * self.width

    def text(self, every: int) -> str:
        """One line about measurements every `every` steps."""
        kept = "full gradients" if self.exact else f"gradients in {self.width:,} sums"
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
    """Chooses probe prompts and coordinates within config.instrument.max_overhead.

    From a count of forward passes, not from a clock, so that the same command measures
    the same prompts; the run measures the share that it takes.

    Args:
        config: With instrument, sampling and steps.
        parameters: Trained coordinates.
        train_prompts: Prompts to choose from.
        prompt_tokens: L, of the padded prompts.
        max_new_tokens: T.

    Returns:
        None where the instrument is off.

    Raises:
        ConfigError: not even two prompts fit, or the group is too small to be split.
    """
    wanted, sampling = config.instrument, config.sampling
    if not wanted.every:
        return None
    group_size = wanted.group_size or max(8, -(-sampling.group_size // 4) * 4)
    step = (SAMPLING + GRADIENT) * sampling.prompts
    step *= prompt_tokens + sampling.group_size * max_new_tokens
    per_prompt = _cost(group_size, prompt_tokens, max_new_tokens)
    allowed = wanted.max_overhead * wanted.every * step / per_prompt
    prompts = wanted.prompts or min(MOST_PROMPTS, int(allowed))
    if train_prompts < max(2, wanted.prompts or 0):
        raise ConfigError(
            f"instrument.prompts must be from 2 to {train_prompts}, the task's trained "
            f"prompts, got {wanted.prompts or 'no number'}; lower it, or set "
            "instrument.every to 0."
        )
    prompts = min(prompts, train_prompts)
    if prompts < 2:
        share = 2 * per_prompt / (wanted.every * step)
        raise ConfigError(
            f"instrument.max_overhead {wanted.max_overhead:g} is too low for two probe "
            f"prompts: they would take about {100 * share:.0f} % of step time; raise "
            "instrument.every or max_overhead, or set instrument.every to 0."
        )
    width = max(1, VECTOR_BYTES // (4 * prompts * (num_parts(group_size) + 3)))
    measured = {*range(0, config.steps + 1, wanted.every), config.steps}
    share = (len(measured) - 1) * prompts * per_prompt / (config.steps * step)
    exact = parameters <= width
    return ProbePlan(prompts, group_size, parameters if exact else width, exact, share)


def _cost(group_size: int, prompt_tokens: int, max_new_tokens: int) -> int:
    """Forward passes over tokens that a measurement of one prompt takes."""
    completions = group_size * max_new_tokens
    once = prompt_tokens + completions
    parts = num_parts(group_size) * (prompt_tokens + FLOOR) + completions
    halves = 2 * (prompt_tokens + FLOOR) + completions
    gradients = GRADIENT * parts
    along_gradients, along_update = SECOND_ORDER * halves, SECOND_ORDER * once
    hidden_states = once
    sampling = SAMPLING * once
    return gradients + along_gradients + along_update + sampling + hidden_states
