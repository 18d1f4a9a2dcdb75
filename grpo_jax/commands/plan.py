"""`grpo-jax plan [--json FILE] [--device-gib N] [--pass-rates FILE]`: with train's
settings, the memory, the shapes and the informative groups of that run, before it
starts."""

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
    # A directory of `grpo-jax eval --samples K`, its samples.jsonl, or a JSON list of
    # rates: how many groups will be informative; default: a table of examples
    pass_rates: str | None = None


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    options = parse_run(PlanOptions, argv, __doc__)
    from grpo_jax.planning.forecast import forecast, forecast_text

    result = forecast(
        options, device_gib=options.device_gib, pass_rates=options.pass_rates
    )
    print(forecast_text(result))
    if options.json is not None:
        write_json(Path(options.json), result)
    return 0
