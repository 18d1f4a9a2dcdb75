"""How many probe prompts a run can afford to measure."""

import dataclasses

from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.errors import ConfigError
from grpo_jax.runs.config import StepBatch, TrainConfig

# Costs in forward passes over tokens, measured on a CPU (BUILD_NOTES.md). A step is
# counted low: without what the host and the optimizer do.
SAMPLING, GRADIENT, SECOND_ORDER = 2, 4, 6
FLOOR = 160  # fixed cost, in tokens, of a pass over one prompt's few samples
LEAST_PROMPTS = 8  # unless fewer are asked for: they seldom tell cosines (BUILD_NOTES)
MOST_PROMPTS = 32  # unless more are asked for: they cost memory and file size
VECTOR_BYTES = 128 * 2**20  # limit of `ProbePlan.vector_bytes`


@dataclasses.dataclass(frozen=True)
class ProbePlan:
    """Size and cost of a run's probe measurements."""

    prompts: int
    group_size: int
    width: int  # coordinates kept of a gradient
    exact: bool  # whether these are all of them
    share: float  # of a step's time that all measurements take, averaged over steps
    every: int  # steps between measurements
    at_start: bool  # whether one comes before the first step

    @property
    def num_directions(self) -> int | None:
        """Sums that gradients are hashed to; None: all coordinates are kept."""
        return None if self.exact else self.width

    @property
    def vector_bytes(self) -> int:
        """Bytes of every part's gradient or its sums, and of three more a prompt."""
        return 4 * self.prompts * (num_parts(self.group_size) + 3) * self.width

    def text(self, steps: int) -> str:
        """One line about the measurements of a run of `steps` steps."""
        kept = "full gradients" if self.exact else f"gradients in {self.width:,} sums"
        return (
            f"{self.prompts} probe prompts x {self.group_size} samples, {kept}, "
            f"{self._when(steps)}: about {100 * self.share:.0f} % of step time"
        )

    def _when(self, steps: int) -> str:
        if self.every >= steps:
            return "at the start and at the end" if self.at_start else "at the end"
        start = "at the start, " if self.at_start else ""
        return f"{start}every {self.every} steps and at the end"


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
    the same prompts; the run measures the share that it takes. Where LEAST_PROMPTS do
    not fit, and neither `every` nor `prompts` was given, there are fewer measurements:
    at the start and at the end, or at the end alone.

    Args:
        config: With instrument, sampling and steps.
        parameters: Trained coordinates.
        train_prompts: Prompts to choose from.
        prompt_tokens: L, of the padded prompts.
        max_new_tokens: T.

    Returns:
        None where the instrument is off.

    Raises:
        ConfigError: LEAST_PROMPTS fit in none of these ways, or the task has too few.
    """
    wanted, batch = config.instrument, config.batch
    if not wanted.every:
        return None
    group_size = wanted.group_size or max(8, -(-batch.group_size // 4) * 4)
    step = step_cost(batch, prompt_tokens, max_new_tokens)
    per_prompt = _cost(group_size, prompt_tokens, max_new_tokens)
    if train_prompts < max(2, wanted.prompts or 0):
        raise ConfigError(
            f"instrument.prompts must be from 2 to {train_prompts}, the task's trained "
            f"prompts, got {wanted.prompts or 'no number'}; lower it, or set "
            "instrument.every to 0."
        )
    budget = wanted.max_overhead * config.steps * step / per_prompt  # prompts measured
    every, at_start, prompts = _schedule(config, budget, train_prompts)
    width = max(1, VECTOR_BYTES // (4 * prompts * (num_parts(group_size) + 3)))
    looks = _looks(config.steps, every, at_start)
    share = looks * prompts * per_prompt / (config.steps * step)
    exact = parameters <= width
    size = parameters if exact else width
    return ProbePlan(prompts, group_size, size, exact, share, every, at_start)


def _schedule(
    config: TrainConfig, budget: float, train_prompts: int
) -> tuple[int, bool, int]:
    """(every, at_start, prompts) of the first way in which enough prompts fit.

    Args:
        config: With instrument and steps.
        budget: Prompts that may be measured in the whole run.
        train_prompts: As `plan_probe`.
    """
    wanted, steps = config.instrument, config.steps
    if wanted.prompts:
        return wanted.every, wanted.at_start, wanted.prompts
    least = min(LEAST_PROMPTS, train_prompts)
    ways = [(wanted.every, wanted.at_start)]
    if not {"every", "at_start"} & wanted.given:
        ways += [(steps, True), (steps, False)]
    for every, at_start in ways:
        prompts = int(budget / _looks(steps, every, at_start))
        if prompts >= least:
            return every, at_start, min(prompts, MOST_PROMPTS, train_prompts)
    looks = _looks(steps, *ways[-1])
    share = wanted.max_overhead * least * looks / budget
    times = f"{looks} times" if looks > 1 else "once"
    raise ConfigError(
        f"instrument.max_overhead {wanted.max_overhead:g} is too low for {least} probe "
        f"prompts, below which little can be told: measured {times}, they would take "
        f"about {100 * share:.0f} % of step time; raise "
        "steps or max_overhead, give instrument.prompts, or set instrument.every to 0."
    )


def _looks(steps: int, every: int, at_start: bool) -> int:
    """Measurements of a run."""
    return len({*range(0, steps + 1, every), steps} - (set() if at_start else {0}))


def step_cost(batch: StepBatch, prompt_tokens: int, max_new_tokens: int) -> int:
    """Forward passes over tokens that a training step takes."""
    tokens = prompt_tokens + batch.group_size * max_new_tokens  # of a prompt
    return (SAMPLING + GRADIENT) * batch.prompts * tokens


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
