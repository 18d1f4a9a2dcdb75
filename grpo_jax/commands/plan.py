"""`grpo-jax plan [--json FILE] [--device-gib N] [--pass-rates FILE]`:
print what `train` with the same settings will need: memory, shapes, and the share of
groups with a learning signal; start nothing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.commands._arguments import parse_run
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.lines import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(TrainConfig):
    """The settings of `train`, which is not started, and options of the plan."""

    json: str | None = None  # also write the plan to this file
    device_gib: float | None = None  # memory planned for; default: this device's
    # Pass rates to count informative groups by: a directory of `grpo-jax eval --samples
    # K`, its samples.jsonl, or a JSON list; default: a table of examples
    pass_rates: str | None = None


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    options = parse_run(PlanOptions, argv, __doc__, begun=True)
    from grpo_jax.planning.forecast import forecast, forecast_text

    result = forecast(
        options, device_gib=options.device_gib, pass_rates=options.pass_rates
    )
    print(forecast_text(result))
    if options.json is not None:
        write_json(Path(options.json), result)
    return 0
