"""What `grpo-jax plan` says of a run: memory, shapes and informative groups."""

import contextlib
import dataclasses
import math
from typing import Any

import jax

from grpo_jax.errors import ConfigError
from grpo_jax.intervals import rate_interval
from grpo_jax.parallel.platform import compiling_for, platform
from grpo_jax.parallel.sharding import batch_shards
from grpo_jax.planning.devices import device_memory
from grpo_jax.planning.informative import (
    GROUP_SIZES,
    PASS_RATES,
    Counted,
    expected_informative,
    informative_share,
    read_pass_rates,
)
from grpo_jax.planning.memory import MemoryInputs, readable
from grpo_jax.planning.plan import Plan, make_plan
from grpo_jax.planning.remedies import remedies, too_long
from grpo_jax.planning.told import told_by, told_lines
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.runs.config import TrainConfig

_GIB = 2**30


def forecast(
    config: TrainConfig,
    *,
    device_gib: float | None = None,
    pass_rates: str | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """What `grpo-jax plan` prints, as JSON types: bytes, tokens and shares.

    Args:
        device_gib: Memory of the device planned for; None: of this machine's, if it has
            as many as the mesh needs.
        pass_rates: As `read_pass_rates`; None: a table of examples.
        plan: The config's; None: it is made here.

    Raises:
        ConfigError: as `make_plan` and `read_pass_rates`.
    """
    if device_gib is not None and not 0 < device_gib < float("inf"):
        raise ConfigError(f"--device-gib must be positive, got {device_gib:g}.")
    counted = None if pass_rates is None else read_pass_rates(pass_rates)
    devices = math.prod(dataclasses.astuple(config.mesh))
    local_devices = device_gib is None and devices <= len(jax.devices())
    if device_gib is not None:
        limit = round(device_gib * _GIB)
    else:
        limit = device_memory() if local_devices else None
    # Devices elsewhere are accelerators; what holds for both kinds is a GPU's.
    elsewhere = not local_devices and platform() == "cpu"
    with compiling_for("gpu") if elsewhere else contextlib.nullcontext():
        if plan is None:
            plan = make_plan(
                config,
                with_weights=False,
                local_devices=local_devices,
                device_bytes=limit,
            )
        return {
            "run": plan.headline,
            # The memory section says it.
            "warnings": [w for w in plan.warnings if not w.startswith("about ")],
            "memory": _memory(plan.memory, limit),
            "step": _step(config, plan),
            "instrument": None if plan.probe is None else told_by(plan.probe),
            "informative": _informative(config, counted),
        }


def _memory(inputs: MemoryInputs, limit: int | None) -> dict[str, Any]:
    memory = inputs.estimate()
    fits = limit is None or memory.peak <= limit
    return {
        "bytes": memory._asdict(),
        "held": memory.state,
        "phases": memory.phases(),
        "peak": memory.peak,
        "peak_in": memory.largest(),
        "device": limit,
        "share_of_device": None if limit is None else memory.peak / limit,
        "fits": fits,
        "completion": None if limit is None or fits else too_long(inputs, limit),
        "advice": [] if limit is None or fits else remedies(inputs, limit),
    }


def _step(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    p, g = config.batch
    length = plan.train_prompt_length
    updated, splits = plan.memory.updated, {}
    shards = batch_shards(updated, g, config.mesh)
    for t in plan.buckets:
        split = micro_batch(updated, g, length, t, plan.micro_batch_tokens, shards)
        splits[str(t)] = [split.prompts, split.samples]
    return {
        "prompts": p,
        "group_size": g,
        "completions": p * g + p * plan.objective.drafts,
        "prompt_bucket": plan.prompt_length,
        "trained_prompt_bucket": length,
        "max_new_tokens": plan.max_new_tokens,
        "completion_buckets": plan.buckets,
        "micro_batches": splits,  # completion bucket -> prompts x samples
        "tokens": p * (length + g * plan.max_new_tokens),  # of one update, at most
        "steps": config.steps,
        "updates": config.steps * config.updates_per_rollout,
    }


def _informative(config: TrainConfig, counted: list[Counted] | None) -> dict[str, Any]:
    p, g = config.batch
    sizes = sorted({g, *GROUP_SIZES})
    if counted is None:
        rows = {
            str(rate): {str(n): informative_share(rate, n) for n in sizes}
            for rate in PASS_RATES
        }
        return {"group_size": g, "examples": rows}
    shares = {str(n): expected_informative(counted, n) for n in sizes}
    _, *rate_ends = rate_interval([c.rate for c in counted])
    _, *share_ends = rate_interval([c.informative(g) for c in counted])
    return {
        "group_size": g,
        "prompts_measured": len(counted),
        "samples_each": min(c.asked for c in counted),  # 0: rates that were given
        "mean_pass_rate": sum(c.rate for c in counted) / len(counted),
        "mean_pass_rate_interval": rate_ends,  # 95 %, over prompts; so is the next one
        "informative_prompts_interval": [p * share for share in share_ends],
        "never_solved": sum(c.rate == 0 for c in counted),
        "always_solved": sum(c.rate == 1 for c in counted),
        "shares": shares,
        "informative_prompts": p * shares[str(g)],
        "wasted_prompts": p * (1 - shares[str(g)]),
    }


# Fields of `Memory` -> their lines.
_STATE = {
    "parameters": "parameters, float32",
    "optimizer": "optimizer state",
    "reference": "reference policy",
    "frozen": "frozen base",
}
_PHASES = {
    "sampling": {
        "sampler_weights": "sampler's copy of the weights",
        "cache": "keys and values",
        "sampler_logits": "logits and one layer's arrays",
    },
    "evaluation": {},
    "scoring": {},
    "update": {
        "update_copies": "copies of the parameters",
        "gradients": "gradients",
        "activations": "activations of a micro-batch",
        "logits": "or logits of a chunk and the table's gradient",
        "optimizing": "or gradient, change, new moments and parameters",
    },
    "look": {},
    "counterfactual": {},
}
# Phase -> (its line, where the peak is).
_PHASE_NAMES = {
    "sampling": ("sampling", "sampling"),
    "evaluation": (
        "evaluation, as many prompts as a step has completions",
        "evaluation",
    ),
    "scoring": ("scoring by the reference policy, from the host", "scoring"),
    "update": ("update", "an update"),
    "look": ("probe measurement of the instrument", "a probe measurement"),
    "counterfactual": ("counterfactual step", "a counterfactual step"),
}


def forecast_text(result: dict[str, Any]) -> str:
    """`forecast` as a person reads it."""
    parts = [result["run"], *(f"warning: {w}" for w in result["warnings"])]
    parts += ["", *_memory_lines(result["memory"])]
    parts += ["", *_step_lines(result["step"])]
    if result["instrument"]:
        parts += ["", *told_lines(result["instrument"])]
    informative = result["informative"]
    if "examples" in informative:
        parts += ["", *_example_lines(informative["examples"])]
    else:
        parts += ["", *_measured_lines(informative, result["step"]["prompts"])]
    return "\n".join(parts)


def _line(text: str, count: int, indent: int = 2) -> str:
    return f"{' ' * indent}{text:<{58 - indent}}{readable(count, 'B'):>8}"


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    sizes = memory["bytes"]
    lines = ["memory of one device"]
    lines += [_line(text, sizes[name]) for name, text in _STATE.items() if sizes[name]]
    lines.append(_line("state, allocated throughout the run", memory["held"]))
    for phase, count in memory["phases"].items():
        if count:
            lines.append(_line(f"+ {_PHASE_NAMES[phase][0]}", count))
            lines += [
                _line(text, sizes[name], 6)
                for name, text in _PHASES[phase].items()
                if sizes[name]
            ]
    peak = f"peak, in {_PHASE_NAMES[memory['peak_in']][1]}"
    lines.append(_line(peak, memory["peak"]))
    if sizes["host"]:
        host = "in the host's memory, for each device: reference policy"
        lines.append(_line(host, sizes["host"]))
    if memory["device"] is None:
        lines.append("  the device's memory is not known; give --device-gib N")
    else:
        share = f"{100 * memory['share_of_device']:.0f} % of the device's"
        lines.append(f"  {share} {readable(memory['device'], 'B')}")
    if not memory["fits"]:
        lines += [f"  {memory['completion']}"] if memory["completion"] else []
        lines.append("  it does not fit; what would make it fit, each alone:")
        lines += [f"    {text}" for text in memory["advice"]]
    return lines


def _step_lines(step: dict[str, Any]) -> list[str]:
    sizes = ", ".join(
        f"{p} x {g} at {t}" for t, (p, g) in step["micro_batches"].items()
    )
    return [
        "a step",
        f"  {step['prompts']} prompts x {step['group_size']} samples: "
        f"{step['completions']} completions, at most {step['tokens']:,} tokens",
        f"  prompts padded to {step['trained_prompt_bucket']} tokens, completions to "
        f"{' or '.join(map(str, step['completion_buckets']))}",
        f"  micro-batches of prompts x samples: {sizes}",
        f"  {step['steps']:,} steps, {step['updates']:,} optimizer updates",
    ]


def _example_lines(rows: dict[str, dict[str, float]]) -> list[str]:
    sizes = list(next(iter(rows.values())))
    lines = [
        "informative groups, 1 - p^G - (1 - p)^G (--pass-rates FILE for yours)",
        "  p      " + "".join(f"{f'G {n}':>8}" for n in sizes),
    ]
    for rate, shares in rows.items():
        cells = "".join(f"{100 * shares[n]:>6.0f} %" for n in sizes)
        lines.append(f"  {rate:<7}{cells}")
    return lines


def _measured_lines(informative: dict[str, Any], prompts: int) -> list[str]:
    sizes = informative["shares"].items()
    shares = ", ".join(f"{100 * share:.0f} % at {n}" for n, share in sizes)
    few = 0 < informative["samples_each"] < informative["group_size"]
    rate = _between(informative["mean_pass_rate_interval"], 3)
    count = f"{informative['informative_prompts']:.1f}"
    if not few:  # else the estimate has a bias that no interval over prompts knows
        count += " " + _between(informative["informative_prompts_interval"], 1)
    return [
        f"informative groups, over {informative['prompts_measured']} prompts of mean "
        f"pass rate {informative['mean_pass_rate']:.3f} {rate} (95 %)",
        f"  by group size: {shares}",
        f"  of {prompts} prompts a step, {count} are informative and "
        f"{informative['wasted_prompts']:.1f} have no gradient"
        + ("; too few on average, with fewer samples each than a group" if few else ""),
        *_tied_lines(informative),
    ]


def _between(ends: list[float], digits: int) -> str:
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _tied_lines(informative: dict[str, Any]) -> list[str]:
    """What prompts of one outcome in all samples say: little, if these are few."""
    never, always = informative["never_solved"], informative["always_solved"]
    if not never + always:
        return []
    text = f"  {never} prompts were never solved and {always} always"
    if samples := informative["samples_each"]:
        rate = 1 - 0.05 ** (1 / samples)
        text += (
            f"; in {samples} samples each, one prompt in 20 of pass rate {rate:.2g} is "
            "never solved"
        )
    return [text]
