"""`grpo-jax look ROLLOUTS [--pretrained DIR]`: the instrument on anybody's rollouts:
phase, geometry, curvature, and what other prompt weights would do.

No run and no task are needed: the rollouts hold prompts, completions and rewards, and
the policy that sampled them holds the gradients.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.commands._arguments import parse
from grpo_jax.commands._look_sources import (
    load_source,
    measured_steps,
    sampling_temperature,
    source_of,
)
from grpo_jax.diagnostics.phases import phase
from grpo_jax.errors import ConfigError
from grpo_jax.instrument.live import hash_key
from grpo_jax.instrument.measurement import measure, update_effect
from grpo_jax.instrument.plan import (
    kept_coordinates,
    measurement_cost,
    vector_bytes,
)
from grpo_jax.instrument.record import make_row, update_fields
from grpo_jax.instrument.rows import Row, usable
from grpo_jax.models.config import num_parameters
from grpo_jax.models.policy import Policy, add_lora, merge_lora
from grpo_jax.parallel.processes import gather_to_host
from grpo_jax.planning.memory import MemoryInputs, readable
from grpo_jax.report.instrument_text import reading
from grpo_jax.report.page import write_look
from grpo_jax.rollouts.checks import check_rollouts, warn_if_unlikely
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.command_configs import LookConfig
from grpo_jax.runs.directory import versions
from grpo_jax.runs.lines import without_nan
from grpo_jax.runs.paths import use_compile_cache
from grpo_jax.runs.recorded import run_config
from grpo_jax.streams import run_keys
from grpo_jax.training.console import format_seconds

Parameters = Literal["all", "lora", "last-layers"]


class Look(NamedTuple):
    """A measurement of the prompts of rollouts.

    Attributes:
        row: As a line of instrument.jsonl; `grpo_jax/instrument/rows.py` has fields.
        unlikely: Share of sampled tokens that the policy can hardly have produced.
    """

    row: Row
    unlikely: float

    @property
    def phase(self) -> str:
        """ "I", "II", "III", or "unknown" where none is right in 95 % of cases."""
        return self.row["phase"]["label"]

    def text(self) -> str:
        """What the measurement shows, in sentences with intervals."""
        return "\n".join(reading(usable([dict(self.row)])))


def look(
    policy: Policy,
    rollouts: Rollouts,
    *,
    temperature: float = 1.0,
    parameters: Parameters = "all",
    layers: int = LookConfig.layers,
    lora_rank: int = LookConfig.lora_rank,
    change: Any = None,
    step: int = 0,
    prompts: Sequence[int] | np.ndarray | None = None,
    sigma_history: Sequence[float] = (),
    key: jax.Array | None = None,
    micro_batch_tokens: int = 2**14,
) -> Look:
    """Measures every prompt's gradient on rollouts, with no run: the instrument.

    Args:
        policy: That sampled the rollouts; of another one's, ratios would be missing.
        rollouts: [P, G, T] with rewards [P, G], four samples of a prompt or more.
        temperature: Of sampling.
        parameters: Whose gradients: "all" that are trained, "lora" of factors that are
            made here, "last-layers" of the last few. A policy with factors has these
            for all.
        layers: How many last ones.
        lora_rank: Of factors made here, which change nothing yet.
        change: A change of the parameters, a tree like policy.params, along which
            slope and curvature are measured too ("all" only).
        step: Written into the row.
        prompts: [P] names of the prompts, whole numbers; default 0 to P - 1.
        sigma_history: Mean sigma of earlier measurements, which C = 8/3 of the mean so
            far is made of.
        key: Of the sums that gradients are kept as, and of factors made here.
        micro_batch_tokens: Tokens in one pass, about.

    Raises:
        ValueError: the rollouts are not such, or have groups of fewer than four.
    """
    check_rollouts(rollouts, policy.config.vocab_size)
    rewards = np.asarray(rollouts.scored_rewards)
    count, group_size = rewards.shape
    if group_size < 4:
        raise ConfigError(
            f"rollouts must have four samples of a prompt or more, got {group_size}; "
            "two of them give a direction, along which the others are measured."
        )
    if change is not None and parameters != "all":
        raise ConfigError(f'change needs parameters "all", got {parameters!r}.')
    key = jax.random.key(0) if key is None else key
    policy = _of_parameters(policy, parameters, lora_rank, key)
    last = layers if parameters == "last-layers" else None
    width, size = _width(policy, last, count, group_size)
    unlikely = warn_if_unlikely(policy, rollouts, temperature=temperature)
    program = jax.jit(
        partial(
            measure,
            width=width,
            exact=width == size,
            micro_batch_tokens=micro_batch_tokens,
            layers=last,
        )
    )
    rollouts = jax.tree.map(jnp.asarray, rollouts._replace(solving=None))
    measured = program(policy, rollouts, None, np.float32(temperature), key)
    measurement = gather_to_host(measured)
    directions = None if width == size else width
    row = make_row(
        measurement,
        phase(
            measurement.geometry,
            jnp.asarray(rewards),
            sigma_history=tuple(sigma_history),
            num_directions=directions,
        ),
        rewards,
        None,
        step=step,
        prompts=np.arange(count) if prompts is None else prompts,
        num_directions=directions,
    )
    if change is not None:
        split = micro_batch(
            count, group_size, rollouts.prompts.shape[1],
            rollouts.completions.shape[2], micro_batch_tokens,
        )  # fmt: skip
        effect = jax.jit(partial(update_effect, micro=split))(
            policy, change, rollouts, None, np.float32(temperature)
        )
        unknown = np.full(count, np.nan)
        row["update"] = update_fields(gather_to_host(effect), unknown)
    return Look(row, unlikely)


def _of_parameters(
    policy: Policy, parameters: Parameters, rank: int, key: jax.Array
) -> Policy:
    """The policy with those parameters in `params`, or all of its layers."""
    if parameters == "lora" and policy.frozen is None:
        return add_lora(policy, rank=rank, alpha=2.0 * rank, key=key)
    if parameters == "last-layers" and policy.frozen is not None:
        return merge_lora(policy)
    return policy


def _width(
    policy: Policy, layers: int | None, prompts: int, group_size: int
) -> tuple[int, int]:
    """(coordinates kept of a gradient, coordinates that it has)."""
    params = policy.params if layers is None else policy.params["layers"]
    size = sum(x.size for x in jax.tree.leaves(params))
    if layers is not None:
        total = policy.config.num_layers
        if layers > total:
            raise ConfigError(f"layers must be at most {total}, got {layers}.")
        size = size * layers // total
    return kept_coordinates(prompts, group_size, size), size


# ---- the command


class Forecast(NamedTuple):
    """What a measurement will take."""

    seconds: float
    peak_bytes: int

    def text(self) -> str:
        return (
            f"about {format_seconds(self.seconds)} and {readable(self.peak_bytes, 'B')}"
        )


def forecast(
    policy: Policy,
    rollouts: Rollouts,
    micro_batch_tokens: int = 2**14,
    layers: int | None = None,
) -> Forecast:
    """Time and peak memory of `look` on rollouts [P, G, T], without compiling it.

    From a count of products, at the rate at which this device multiplies two matrices
    of the model's sizes now; and from the formulas of `grpo-jax plan`.
    """
    count, group_size, tokens = rollouts.completions.shape
    length, model = rollouts.prompts.shape[1], policy.config
    passes = count * measurement_cost(group_size, length, tokens)
    width, _ = _width(policy, layers, count, group_size)
    memory = MemoryInputs(
        model=model,
        prompts=1,
        group_size=1,
        prompt_tokens=length,
        max_new_tokens=tokens,
        micro_batch_tokens=micro_batch_tokens,
        probe_prompts=count,
        probe_group=group_size,
        probe_bytes=vector_bytes(count, group_size, width),
        base_bytes=max(x.dtype.itemsize for x in jax.tree.leaves(policy.params)),
        widened=jax.default_backend() == "cpu",
    ).estimate()
    held = sum(x.nbytes for x in jax.tree.leaves((policy.params, policy.frozen)))
    seconds = 2 * num_parameters(model) * passes / _product_rate(model.width)
    return Forecast(seconds, held + memory.look)


def _product_rate(width: int) -> float:
    """Floating-point operations a second in products of the model's width."""
    x = jnp.ones((512, width), jnp.float32)
    w = jnp.ones((width, 4 * width), jnp.float32)
    product = jax.jit(lambda x, w: x @ w)
    product(x, w).block_until_ready()
    began, repeats = time.monotonic(), 10
    for _ in range(repeats):
        product(x, w).block_until_ready()
    return repeats * 2 * x.size * w.shape[1] / (time.monotonic() - began)


def look_at(config: LookConfig, *, say: Callable[[str], None] = print) -> list[Look]:
    """`look` on a file of rollouts, written to `config.output` as JSON and a page.

    Raises:
        ConfigError: the rollouts or the policy cannot be read, or do not fit.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output must be a directory, {output} is a file.")
    use_compile_cache(lambda text: say(f"warning: {text}"))
    looks, notes = [], []
    temperature, key = sampling_temperature(config), _key(config)
    policy, source = None, ""
    for step, rollouts in measured_steps(config):
        wanted = source_of(config, step)
        if policy is None or wanted != source:
            policy = None  # two would not fit where one does
            source = wanted
            policy = _of_parameters(
                load_source(config, step), config.parameters, config.lora_rank, key
            )
        rollouts, left_out = _first_prompts(rollouts, config.prompts)
        p, g, t = rollouts.completions.shape
        where = "" if step is None else f"step {step}: "
        say(
            f"{where}{p} prompts x {g} samples, {rollouts.prompts.shape[1]} + {t} "
            f"tokens, under {source}"
        )
        if left_out:
            say(f"{left_out} further prompts are left out (--prompts)")
        last = config.layers if config.parameters == "last-layers" else None
        expected = forecast(policy, rollouts, config.micro_batch_tokens, last)
        say(f"measuring, {expected.text()}; and its compilation")
        began = time.monotonic()
        looks.append(
            look(
                policy,
                rollouts,
                temperature=temperature,
                parameters=config.parameters,
                layers=config.layers,
                lora_rank=config.lora_rank,
                step=0 if step is None else step,
                sigma_history=[x.row["phase"]["mean_sigma"] for x in looks],
                key=key,
                micro_batch_tokens=config.micro_batch_tokens,
            )
        )
        say(f"measured in {format_seconds(time.monotonic() - began)}")
        notes.append(_note(config, step, rollouts, source, looks[-1]))
        _write(config, looks, notes, output)  # a series may be stopped
    for sentence in reading(usable([dict(x.row) for x in looks])):
        say(sentence)
    say(f"written to {output / 'look.json'} and {output / 'look.html'}")
    return looks


def _key(config: LookConfig) -> jax.Array:
    """Of sums and new factors: a run's own sums, or by seed."""
    if config.run_dir is None:
        return jax.random.key(config.seed)
    return hash_key(run_keys(run_config(config.run_dir).seed).probe)


def _first_prompts(rollouts: Rollouts, most: int | None) -> tuple[Rollouts, int]:
    """(rollouts of the first prompts, how many are left out)."""
    count = len(rollouts.prompts)
    kept = count if most is None else min(most, count)
    return jax.tree.map(lambda x: x[:kept], rollouts), count - kept


def _note(
    config: LookConfig, step: int | None, rollouts: Rollouts, source: str, seen: Look
) -> str:
    """A sentence on what was measured."""
    p, g, _ = rollouts.completions.shape
    of = {
        "all": "all trained parameters",
        "lora": "LoRA factors",
        "last-layers": f"the last {config.layers} layers",
    }[config.parameters]
    where = "" if step is None else f" of step {step}"
    return (
        f"{p} prompts x {g} samples{where} from {config.rollouts}, gradients of {of} "
        f"of {source}; {seen.unlikely:.0%} of the sampled tokens are unlikely under it."
    )


def _write(
    config: LookConfig, looks: Sequence[Look], notes: Sequence[str], output: Path
) -> None:
    """Writes look.json and look.html."""
    output.mkdir(parents=True, exist_ok=True)
    rows = [without_nan(dict(x.row)) for x in looks]
    content = {
        "settings": dataclasses.asdict(config),
        "versions": versions(),
        "notes": list(notes),
        "unlikely": [x.unlikely for x in looks],
        "rows": rows,
    }
    (output / "look.json").write_text(json.dumps(content, indent=1))
    title = f"A look at {Path(config.rollouts).name}"
    write_look(rows, output / "look.html", title=title, notes=notes)


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    look_at(parse(LookConfig, argv, __doc__, positional=True))
    return 0
