"""`grpo-jax plan [--json FILE] [--device-gib N] [--topology T] [--pass-rates FILE]`:
print what `train` with the same settings will need: memory, shapes, and the share of
groups with a learning signal; start nothing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_jax.commands._arguments import parse_run
from grpo_jax.errors import ConfigError
from grpo_jax.parallel.topology import parse_topology, topology
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.lines import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(TrainConfig):
    """The settings of `train`, which is not started, and options of the plan."""

    json: str | None = None  # also write the plan to this file
    device_gib: float | None = None  # memory planned for; default: this device's
    # Compile for devices that need not be there, such as v5e:1, v5e:2x4, v5p:4x4x4 or
    # h100:8: takes minutes, and needs grpo-jax[aot], for GPUs grpo-jax[aot-cuda]
    topology: str | None = None
    # Pass rates to count informative groups by: a directory of `grpo-jax eval --samples
    # K`, its samples.jsonl, or a JSON list; default: a table of examples
    pass_rates: str | None = None


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    options = parse_run(PlanOptions, argv, __doc__, begun=True)
    from grpo_jax.planning.forecast import forecast, forecast_text

    if options.topology is not None:
        return _with_compiler(options, options.topology)
    result = forecast(
        options, device_gib=options.device_gib, pass_rates=options.pass_rates
    )
    print(forecast_text(result))
    _write(options, result)
    return 0


def _with_compiler(options: PlanOptions, name: str) -> int:
    """The plan, and what the compiler of a topology says of it."""
    if options.device_gib is not None:
        raise ConfigError(
            "--topology has the memory of its chips, and --device-gib was given too; "
            "leave one out."
        )
    parse_topology(name)
    import jax

    jax.config.update("jax_platforms", "cpu")  # no device is looked for
    from grpo_jax.commands._topology import compiled, compiled_text
    from grpo_jax.parallel.platform import compiling_for
    from grpo_jax.planning.forecast import forecast, forecast_text
    from grpo_jax.planning.plan import make_plan
    from grpo_jax.training.ahead import lower_ahead

    at = topology(name)
    memory = at.chip.memory
    with compiling_for(at.chip.platform):  # the formulas too are of these devices
        plan = make_plan(
            options, with_weights=False, local_devices=False, device_bytes=memory
        )
        lowered = lower_ahead(options, plan, at.devices)
        result = forecast(
            options,
            device_gib=memory / 2**30,
            pass_rates=options.pass_rates,
            plan=plan,
        )
        print(forecast_text(result), flush=True)
        result["compiled"] = compiled(plan, at, lowered)
    print(f"\n{compiled_text(result['compiled'])}")
    _write(options, result)
    return 0


def _write(options: PlanOptions, result: dict[str, Any]) -> None:
    if options.json is not None:
        write_json(Path(options.json), result)
