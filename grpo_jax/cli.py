"""`grpo-jax`: builds a config, calls the library, prints what it answers. No maths."""

import sys

from grpo_jax.errors import ConfigError, nearest
from grpo_jax.training.config import TrainConfig, load_config_file

_USAGE = """\
usage: grpo-jax COMMAND [...]

  train    train a policy, from prompts to a finished report
           (`grpo-jax train --help` lists every setting)
  objectives [NAME ...]: every method's formula, axes and source (or of those named)
  report   RUN_DIR [RUN_DIR ...] [--output FILE]: write the report of a run, or of
           several overlaid
"""
# Shorter spellings of the settings that every run names.
_SHORT = {
    "--task": "--task.name",
    "--objective": "--objective.name",
    "--weights": "--weights.name",
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (0 done, 1 failed, 2 bad input)."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"train": _train, "objectives": _objectives, "report": _report}
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if argv else 2
    if argv[0] not in commands:
        return _bad(
            f"unknown command {argv[0]!r}; {nearest(argv[0], commands)}"
            f"commands: {', '.join(commands)}."
        )
    try:
        return commands[argv[0]](argv[1:])
    except ConfigError as error:
        return _bad(str(error))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _bad(message):
    print(f"error: {message}", file=sys.stderr)
    return 2


def _train(argv):
    import tyro

    base = TrainConfig()
    if argv and argv[0].partition("=")[0] == "--config":
        given = argv[0].partition("=")[2] or (argv[1] if len(argv) > 1 else "")
        if not given:
            raise ConfigError("--config needs a .yaml, .yml or .json file.")
        argv = argv[1 if "=" in argv[0] else 2 :]
        base = load_config_file(given)
    elif "--config" in [arg.partition("=")[0] for arg in argv]:
        raise ConfigError("--config FILE comes first, flags that change it after it.")
    argv = [
        _SHORT.get(flag, flag) + equals + value
        for flag, equals, value in (arg.partition("=") for arg in argv)
    ]
    if base == TrainConfig() and "--resume" in argv:
        # A run goes on with what it was started with; flags may still change it.
        base = _config_of_run(argv) or base
    try:
        config = tyro.cli(
            TrainConfig,
            default=base,
            args=argv,
            prog="grpo-jax train",
            description="Train a policy. --config FILE.yaml|json comes first, flags on "
            "top of it; --task, --objective and --weights are short for their .name.",
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    from grpo_jax.training.loop import NonFiniteGradients, train

    try:
        train(config)
    except NonFiniteGradients as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _config_of_run(argv):
    """The config of the run that --run-dir names; None where there is none yet."""
    from grpo_jax.training.config import from_dict
    from grpo_jax.training.run_directory import read_config_dict

    directory = None
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--run-dir", "--run_dir"):
            directory = value if equals else next(iter(argv[i + 1 :]), None)
    if directory is None:
        return None
    return from_dict(TrainConfig, read_config_dict(directory))


def _objectives(argv):
    """Prints the table of methods from the presets themselves."""
    from grpo_jax.errors import unknown_name
    from grpo_jax.objectives.presets import OBJECTIVES

    if {"-h", "--help"} & set(argv):
        print("usage: grpo-jax objectives [NAME ...]")
        return 0
    for name in argv:
        if name not in OBJECTIVES:
            raise unknown_name("objective", name, OBJECTIVES)
    for name in argv or OBJECTIVES:
        row = OBJECTIVES[name]
        lines = [f"{name}", f"  loss      {row.formula()}", f"  axes      {row.axes()}"]
        if row.mechanisms():
            lines.append(f"  and       {'; '.join(row.mechanisms())}")
        print("\n".join([*lines, f"  source    {row.source}", ""]))
    return 0


def _report(argv):
    from pathlib import Path

    output, directories = None, []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--output":
            output = next(arguments, None)
            if output is None:
                raise ConfigError("--output needs a file.")
        elif argument.startswith("-"):
            raise ConfigError(
                f"unknown option {argument!r}; {nearest(argument, ['--output'])}"
                "usage: grpo-jax report RUN_DIR [RUN_DIR ...] [--output FILE]."
            )
        else:
            directories.append(Path(argument))
    if not directories:
        raise ConfigError("report needs at least one run directory.")
    from grpo_jax.training.report import write_report

    default = directories[0] / "report.html" if len(directories) == 1 else "report.html"
    print(f"report: {write_report(directories, Path(output or default))}")
    return 0
