"""`grpo-jax look ROLLOUTS [--pretrained DIR]`: the instrument on anybody's rollouts:
phase, geometry, curvature, and what other prompt weights would do.

No run and no task are needed: the rollouts hold prompts, completions and rewards, and
the policy that sampled them holds the gradients.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.commands._arguments import parse
from grpo_jax.commands._look_forecast import forecast, kept_and_all
from grpo_jax.commands._look_sources import (
    load_source,
    measured_steps,
    sampling_temperature,
    source_of,
)
from grpo_jax.diagnostics.phases import phase
from grpo_jax.errors import ConfigError, check_kind, unknown_name
from grpo_jax.instrument.live import hash_key
from grpo_jax.instrument.measurement import measure, update_effect
from grpo_jax.instrument.record import make_row, update_fields
from grpo_jax.instrument.rows import Row, by_prompts, usable
from grpo_jax.models.policy import Policy, add_lora, merge_lora
from grpo_jax.parallel.processes import gather_to_host
from grpo_jax.report.instrument_text import reading
from grpo_jax.report.page import steps_of, write_look
from grpo_jax.rollouts.checks import (
    MOST_UNLIKELY,
    check_rollouts,
    unlikely_share,
    warn_if_unlikely,
)
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.rollouts.reading import StepRollouts
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.command_configs import LookConfig
from grpo_jax.runs.directory import versions
from grpo_jax.runs.lines import without_nan
from grpo_jax.runs.paths import use_compile_cache
from grpo_jax.runs.recorded import run_config
from grpo_jax.streams import run_keys
from grpo_jax.training.console import format_seconds

# Of one shape one program, also over the steps of a series.
_measure = jax.jit(
    measure, static_argnames=("width", "exact", "micro_batch_tokens", "layers")
)
_update_effect = jax.jit(update_effect, static_argnames=("micro",))
LONG = 300  # seconds; above it, what takes less is printed
ENOUGH_TOKENS = 200  # whose share of unlikely ones is no chance
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
        prompts: [P] a whole number for each prompt, which names it; default 0 to P - 1.
        sigma_history: Mean sigma of earlier measurements, which C = 8/3 of the mean so
            far is made of.
        key: Of the sums that gradients are kept as, and of factors made here.
        micro_batch_tokens: Tokens in one pass, about.

    Raises:
        ValueError: the rollouts are not such, or have groups of fewer than four.
    """
    check_kind("policy", policy, Policy, "gj.load_pretrained(DIR) makes one")
    check_rollouts(rollouts, policy.config.vocab_size)
    if reason := _unmeasurable(rollouts):
        raise ConfigError(reason)
    rewards = np.asarray(rollouts.scored_rewards)
    count, group_size = rewards.shape
    prompts = _names(prompts, count)
    if parameters not in get_args(Parameters):
        raise unknown_name("parameters", str(parameters), get_args(Parameters))
    if change is not None and parameters != "all":
        raise ConfigError(f'change needs parameters "all", got {parameters!r}.')
    key = jax.random.key(0) if key is None else key
    policy = _of_parameters(policy, parameters, lora_rank, key)
    last = layers if parameters == "last-layers" else None
    width, size = kept_and_all(policy, last, count, group_size)
    unlikely = warn_if_unlikely(policy, rollouts, temperature=temperature)
    rollouts = jax.tree.map(jnp.asarray, rollouts._replace(solving=None))
    measured = _measure(
        policy,
        rollouts,
        None,
        np.float32(temperature),
        key,
        width=width,
        exact=width == size,
        micro_batch_tokens=micro_batch_tokens,
        layers=last,
    )
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
        prompts=prompts,
        num_directions=directions,
    )
    if change is not None:
        split = micro_batch(
            count, group_size, rollouts.prompts.shape[1],
            rollouts.completions.shape[2], micro_batch_tokens,
        )  # fmt: skip
        effect = _update_effect(
            policy, change, rollouts, None, np.float32(temperature), micro=split
        )
        unknown = np.full(count, np.nan)
        row["update"] = update_fields(gather_to_host(effect), unknown)
    return Look(row, unlikely)


def _unmeasurable(rollouts: Rollouts) -> str:
    """Why rollouts cannot be measured, or "": prompts are compared, and groups are cut
    into parts that have a baseline each."""
    count, group_size = rollouts.completions.shape[:2]
    if count < 2:
        return (
            f"rollouts must have two prompts or more, got {count}: the instrument "
            "compares them."
        )
    if group_size < 4:
        return (
            f"rollouts must have four samples of a prompt or more, got {group_size}; "
            "two of them give a direction, along which the others are measured."
        )
    return ""


def _names(prompts: Any, count: int) -> list[int]:
    """Names of P prompts, as given or by their place."""
    try:
        names = np.arange(count) if prompts is None else np.asarray(prompts)
    except ValueError:  # lists of several lengths
        names = np.zeros(0)
    if names.shape != (count,) or names.dtype.kind not in "iu":
        raise ConfigError(
            f"prompts must be a whole number for each of the {count} prompts, which "
            f"names it, got {prompts!r:.100}."
        )
    return [int(x) for x in names]


def _of_parameters(
    policy: Policy, parameters: Parameters, rank: int, key: jax.Array
) -> Policy:
    """The policy with those parameters in `params`, or all of its layers."""
    if parameters == "lora" and policy.frozen is None:
        return add_lora(policy, rank=rank, alpha=2.0 * rank, key=key)
    if parameters == "last-layers" and policy.frozen is not None:
        return merge_lora(policy)
    return policy


# ---- the command


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
    numbers: dict[Any, int] = {}  # of prompts, in the order in which they came
    for found in measured_steps(config):
        step = found.step
        if (reason := _unmeasurable(found.rollouts)) and config.every_step:
            say(f"step {step} is left out: {reason}")
            continue
        if reason:
            raise ConfigError(reason)
        wanted = source_of(config, step)
        if policy is None or wanted != source:
            policy = None  # two would not fit where one does
            source = wanted
            policy = _of_parameters(
                load_source(config, step), config.parameters, config.lora_rank, key
            )
        with _as_config_error():
            check_rollouts(found.rollouts, policy.config.vocab_size)
        rollouts, names, left_out = _first_prompts(found.rollouts, numbers, config)
        note = _note(config, found, rollouts, source)
        say(note)
        if left_out:
            say(f"{left_out} further prompts are left out (--prompts)")
        last = config.layers if config.parameters == "last-layers" else None
        expected = forecast(policy, rollouts, config.micro_batch_tokens, last)
        unlikely = _refuse_if_unlikely(policy, rollouts, temperature, source)
        of_step = " for this step" * config.every_step
        text = f"{expected.text()}{of_step}, and half a minute or more to compile"
        if looks:  # compiled, if it has the shape of the last one
            text = f"about {format_seconds(expected.seconds)}{of_step}"
        say(f"measuring: {text}")
        if expected.seconds > LONG and policy.frozen is None and last is None:
            say("fewer --prompts, or --parameters lora, take less time")
        began = time.monotonic()
        before = [x for x in looks if x.row["prompts"] == names]
        looks.append(
            look(
                policy,
                rollouts,
                temperature=temperature,
                parameters=config.parameters,
                layers=config.layers,
                lora_rank=config.lora_rank,
                step=0 if step is None else step,
                prompts=names,
                sigma_history=[x.row["phase"]["mean_sigma"] for x in before],
                key=key,
                micro_batch_tokens=config.micro_batch_tokens,
            )
        )
        say(f"measured in {format_seconds(time.monotonic() - began)}")
        notes.append(f"{note} {unlikely:.0%} of the sampled tokens are unlikely.")
        _write(config, looks, notes, output)  # a series may be stopped
    if not looks:
        raise ConfigError("no step could be measured.")
    for line in _said(looks):
        say(line)
    say(f"written to {output / 'look.json'} and {output / 'look.html'}")
    return looks


def _said(looks: Sequence[Look]) -> list[str]:
    """What the looks show: of steps with other prompts each for itself."""
    series = by_prompts([dict(x.row) for x in looks])
    if len(series) == 1:
        return reading(usable(series[0]))
    lines = ["The steps have different prompts, so each is read for itself."]
    for rows in series:
        lines += [f"{steps_of(rows)}:", *reading(usable(rows))]
    return lines


def _key(config: LookConfig) -> jax.Array:
    """Of sums and new factors: a run's own sums, or by seed."""
    if config.run_dir is None:
        return jax.random.key(config.seed)
    return hash_key(run_keys(run_config(config.run_dir).seed).probe)


def _refuse_if_unlikely(
    policy: Policy, rollouts: Rollouts, temperature: float, source: str
) -> float:
    """The share of unlikely tokens; ConfigError where it is no policy's own, of so many
    tokens that it is no chance."""
    share = unlikely_share(policy, rollouts, temperature=temperature)
    if share > MOST_UNLIKELY and int(rollouts.completion_mask.sum()) >= ENOUGH_TOKENS:
        raise ConfigError(
            f"{source}, at temperature {temperature:g}, gives {share:.0%} of the "
            "sampled tokens next to no probability: it cannot have produced them. Give "
            "the model, adapter, --temperature and --form (with its chat template) of "
            "the rollouts."
        )
    return share


@contextlib.contextmanager
def _as_config_error() -> Iterator[None]:
    """Errors of values as those of settings, which the command prints in a line."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _first_prompts(
    rollouts: Rollouts, numbers: dict[Any, int], config: LookConfig
) -> tuple[Rollouts, list[int], int]:
    """(rollouts of the first prompts, their numbers, how many prompts are left out).

    A prompt's number is the same in every step, and prompts are in the order of their
    numbers: those of an earlier step first, so that steps can be compared.

    Args:
        rollouts: Of one step.
        numbers: Of the prompts so far; more are added.
        config: How many are wanted.
    """
    ids, mask = np.asarray(rollouts.prompts), np.asarray(rollouts.prompt_mask) > 0
    times: dict[Any, int] = {}  # the same prompt may have several groups
    found = []
    for row, present in zip(ids, mask, strict=True):
        tokens = tuple(row[present].tolist())
        times[tokens] = times.get(tokens, 0) + 1
        found.append(numbers.setdefault((tokens, times[tokens]), len(numbers)))
    order = np.argsort(found)[: config.prompts]
    kept = jax.tree.map(lambda x: x[order], rollouts)
    return kept, [found[i] for i in order], len(found) - len(order)


def _note(
    config: LookConfig, found: StepRollouts, rollouts: Rollouts, source: str
) -> str:
    """Sentences on what is measured."""
    p, g, t = rollouts.completions.shape
    last = "layer" if config.layers == 1 else f"{config.layers} layers"
    of = {
        "all": "all trained parameters",
        "lora": "LoRA factors",
        "last-layers": f"the last {last}",
    }[config.parameters]
    where = "" if found.step is None else f" of step {found.step}"
    text = (
        f"{p} prompts x {g} samples{where} from {config.rollouts} "
        f"({rollouts.prompts.shape[1]} + {t} tokens), gradients of {of} of {source}. "
        f"Reward: {_sum(found.rewards)}."
    )
    if found.ended:
        text += (
            f" {found.ended} completions of the file got the token that ends an answer"
        )
        if config.max_new_tokens is None:
            text += ", as texts lack it; give --max-new-tokens if some were cut off"
        text += "."
    lengths = np.asarray(rollouts.completion_mask).sum(-1) - 1  # without that token
    longest = int(lengths.max())
    alike = int((lengths == longest).sum())
    all_ended = found.ended == found.completions
    if all_ended and config.max_new_tokens is None and alike > lengths.size / 10:
        text += (
            f" {alike} of {lengths.size} completions have the largest length, "
            f"{longest} tokens: if sampling stopped there, give --max-new-tokens "
            f"{longest}."
        )
    return text


def _sum(weights: Mapping[str, float]) -> str:
    """ "right + 0.2 form" of two fields with weights."""
    parts = [name if w == 1 else f"{w:g} {name}" for name, w in weights.items()]
    return " + ".join(parts).replace("+ -", "- ")


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
