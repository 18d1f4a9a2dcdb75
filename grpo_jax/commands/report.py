"""`grpo-jax report RUN_DIR [RUN_DIR ...] [--output FILE]`: write the report of a run,
or of several overlaid."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.commands._arguments import parse
from grpo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Which runs are reported, and where."""

    run_dirs: tuple[str, ...]  # run directories
    # An .html file; default: report.html, in the run's directory if there is only one
    output: str | None = None


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    options = parse(ReportOptions, argv, __doc__, positional=True)
    directories = [Path(name) for name in options.run_dirs]
    if not directories:
        raise ConfigError("report needs at least one run directory.")
    from grpo_jax.report.page import write_report

    default = directories[0] / "report.html" if len(directories) == 1 else "report.html"
    print(f"report: {write_report(directories, Path(options.output or default))}")
    return 0
