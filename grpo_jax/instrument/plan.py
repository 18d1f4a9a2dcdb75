"""How many probe prompts a run can afford to measure."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.errors import ConfigError
from grpo_jax.instrument.widths import ASSUMED, SELDOM, expected_width
from grpo_jax.runs.config import StepBatch, TrainConfig

# Costs in forward passes over tokens, measured on a CPU (BUILD_NOTES.md). A step is
# counted low: without what the host and the optimizer do.
SAMPLING, GRADIENT, SECOND_ORDER = 2, 4, 6
FLOOR = 160  # fixed cost, in tokens, of a pass over one prompt's few samples
EVERY = 40  # steps between measurements, unless given or too dear
MANY_SAMPLES = 16  # of a prompt, where LEAST_PROMPTS with so many fit
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
        return vector_bytes(self.prompts, self.group_size, self.width)

    def text(self, steps: int) -> str:
        """One line about the measurements of a run of `steps` steps."""
        hashed = f"gradients hashed to {self.width:,} sums"
        kept = "full gradients" if self.exact else hashed
        told = [expected_width(self.prompts, self.group_size, x) for x in ASSUMED]
        seldom = max(x[0] if x else 0.0 for x in told) < SELDOM
        return (
            f"{self.prompts} probe prompts x {self.group_size} samples"
            f"{' (they seldom tell cosines: grpo-jax plan)' * seldom}, {kept}, "
            f"{self._when(steps)}: about {100 * self.share:.0f} % of the time of all "
            "steps"
        )

    def _when(self, steps: int) -> str:
        times = ["at the start"] if self.at_start else []
        times += [f"every {self.every} steps"] if self.every < steps else []
        return " and ".join(filter(None, (", ".join(times), "at the end")))


def plan_probe(
    config: TrainConfig,
    *,
    parameters: int,
    train_prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
    slow_start: bool = False,
) -> ProbePlan | None:
    """Chooses probe prompts and coordinates within config.instrument.max_overhead.

    From a count of forward passes, not from a clock, so that the same command measures
    the same prompts; the run measures the share that it takes. Where LEAST_PROMPTS do
    not fit, and neither `every` nor `prompts` was given, there are fewer measurements:
    at the start and at the end, or at the end alone. Where a step has fewer samples of
    a prompt, a probe prompt has 16 if these fit: more prompts of 8 tell less.

    Args:
        config: With instrument, sampling and steps.
        parameters: Trained coordinates.
        train_prompts: Prompts to choose from.
        prompt_tokens: L, of the padded prompts.
        max_new_tokens: T.
        slow_start: By default none comes before the first step, which would wait
            for it.

    Returns:
        None where the instrument is off.

    Raises:
        ConfigError: LEAST_PROMPTS fit in none of these ways, or the task has too few.
    """
    wanted, batch = config.instrument, config.batch
    if wanted.every == 0:
        return None
    step = step_cost(batch, prompt_tokens, max_new_tokens)
    if train_prompts < max(2, wanted.prompts or 0):
        raise ConfigError(
            f"instrument.prompts must be from 2 to {train_prompts}, the task's trained "
            f"prompts, got {wanted.prompts or 'no number'}; lower it, or set "
            "instrument.every to 0."
        )

    def affordable(group_size: int) -> float:
        """Prompts that may be measured in the whole run, with so many samples each."""
        per_prompt = measurement_cost(group_size, prompt_tokens, max_new_tokens)
        return wanted.max_overhead * config.steps * step / per_prompt

    times, prompts, group_size = _schedule(
        config, affordable, train_prompts, slow_start
    )
    size = kept_coordinates(prompts, group_size, parameters)
    looks = _looks(config.steps, times)
    share = wanted.max_overhead * looks * prompts / affordable(group_size)
    return ProbePlan(prompts, group_size, size, size == parameters, share, *times)


def kept_coordinates(prompts: int, group_size: int, parameters: int) -> int:
    """Coordinates kept of each gradient: all, or as many as VECTOR_BYTES hold."""
    fitting = VECTOR_BYTES // vector_bytes(prompts, group_size, 1)
    return min(parameters, max(1, fitting))


def vector_bytes(prompts: int, group_size: int, width: int) -> int:
    """Bytes of every part's gradient or its sums, and of three more a prompt."""
    return 4 * prompts * (num_parts(group_size) + 3) * width


class _Times(NamedTuple):
    """When is measured, besides the end; fields as `ProbePlan`."""

    every: int
    at_start: bool


def _schedule(
    config: TrainConfig,
    affordable: Callable[[int], float],
    train_prompts: int,
    slow_start: bool,
) -> tuple[_Times, int, int]:
    """(times, prompts, samples of each) of the first way in which enough prompts fit.

    Args:
        config: With instrument, sampling and steps.
        affordable: Samples of a prompt -> prompts measured in the whole run.
        train_prompts, slow_start: As `plan_probe`.
    """
    wanted, steps = config.instrument, config.steps
    start = not slow_start if wanted.at_start is None else wanted.at_start
    ways = [_Times(EVERY if wanted.every is None else wanted.every, start)]
    own = -(-config.batch.group_size // 4) * 4
    sizes = [wanted.group_size or max(8, own)]
    if wanted.prompts:
        return ways[0], wanted.prompts, sizes[0]
    if wanted.group_size is None and own < MANY_SAMPLES:
        sizes.insert(0, MANY_SAMPLES)
    if wanted.every is None:
        ways.append(_Times(steps, start))
        if wanted.at_start is None:
            ways.append(_Times(steps, at_start=False))
    least = min(LEAST_PROMPTS, train_prompts)
    for times, size in itertools.product(ways, sizes):
        prompts = int(affordable(size) / _looks(steps, times))
        if prompts >= least:
            return times, min(prompts, MOST_PROMPTS, train_prompts), size
    budget = affordable(sizes[-1])
    looks = _looks(steps, ways[-1])
    share = wanted.max_overhead * least * looks / budget
    often = f"{looks} times" if looks > 1 else "once"
    raise ConfigError(
        f"instrument.max_overhead {wanted.max_overhead:g} is too low for {least} probe "
        f"prompts, below which little can be told: measured {often}, they would take "
        f"about {100 * share:.0f} % of step time; raise "
        "steps or max_overhead, give instrument.prompts, or set instrument.every to 0."
    )


def _looks(steps: int, times: _Times) -> int:
    """Measurements of a run."""
    start = {0} if times.at_start else set()
    return len(start | {*range(times.every, steps + 1, times.every), steps})


def step_cost(batch: StepBatch, prompt_tokens: int, max_new_tokens: int) -> int:
    """Forward passes over tokens that a training step takes."""
    tokens = prompt_tokens + batch.group_size * max_new_tokens  # of a prompt
    return (SAMPLING + GRADIENT) * batch.prompts * tokens


def measurement_cost(group_size: int, prompt_tokens: int, max_new_tokens: int) -> int:
    """Forward passes over tokens that a measurement of one prompt in a run takes: with
    sampling, and derivatives along the update that follows."""
    once = prompt_tokens + group_size * max_new_tokens
    look = look_cost(group_size, prompt_tokens, max_new_tokens)
    return round(look) + (SAMPLING + SECOND_ORDER) * once


def look_cost(
    group_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    gradient: float = GRADIENT,
    second_order: float = SECOND_ORDER,
) -> float:
    """Forward passes over tokens that a look at one prompt's samples takes.

    Args:
        group_size: G.
        prompt_tokens: L.
        max_new_tokens: T.
        gradient: Forward passes that a gradient counts as.
        second_order: That derivatives along a direction count as.
    """
    completions = group_size * max_new_tokens
    parts = num_parts(group_size) * (prompt_tokens + FLOOR) + completions
    halves = 2 * (prompt_tokens + FLOOR) + completions
    hidden_states = prompt_tokens + completions
    return gradient * parts + second_order * halves + hidden_states
