"""`grpo-jax`: builds a config, calls the library, prints what it answers. No maths."""

import dataclasses
import sys

from grpo_jax.errors import ConfigError, nearest
from grpo_jax.runs.config import EvalConfig, TrainConfig, WarmupConfig
from grpo_jax.runs.config_files import from_dict, load_config_file

_USAGE = """\
usage: grpo-jax COMMAND [...]

  train    train a policy, from prompts to a finished report
  plan     [--json FILE] [--device-gib N] [--pass-rates FILE] and train's settings: the
           memory, the shapes and the informative groups of that run, before it starts
  eval     ask a model or a run a task's prompts: greedy, avg@k, pass@k
  warmup   teach a model a task's solutions, and save it
           (`grpo-jax train --help` lists every setting; so do eval and warmup)
  export   RUN_DIR OUT_DIR [--step N] [--adapter]: write a run's policy as a model that
           transformers loads; --adapter: its LoRA factors alone, as PEFT reads them
  audit    FILE --verifier gsm8k|math [--output FILE.json] [--workers N]: which gold
           answers the verifier accepts against themselves and rewritten
  objectives [NAME ...]: every method's formula, axes and source (or of those named)
  report   RUN_DIR [RUN_DIR ...] [--output FILE]: write the report of a run, or of
           several overlaid
  replay   RUN_DIR STEP [--output FILE.npz]: compute a step of a run again, compare it
           with what metrics.jsonl has, and keep its rollouts and gradient norms
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
    commands = {
        "train": _train,
        "plan": _plan,
        "eval": _eval,
        "warmup": _warmup,
        "export": _export,
        "audit": _audit,
        "objectives": _objectives,
        "report": _report,
        "replay": _replay,
    }
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _bad(message):
    print(f"error: {message}", file=sys.stderr)
    return 2


def _train(argv):
    config = _train_config(argv, "train", "Train a policy.")
    from grpo_jax.parallel.processes import LostProcess, exit_at_once
    from grpo_jax.training.loop import NonFiniteGradients, train

    try:
        train(config)
    except NonFiniteGradients as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except LostProcess as error:
        exit_at_once(str(error))
    return 0


def _plan(argv):
    """Prints what `train` with the same settings would hold and do."""
    own, argv = _taken(
        argv, {"--json": str, "--device-gib": float, "--pass-rates": str}
    )
    config = _train_config(
        argv,
        "plan",
        "Print what `grpo-jax train` with the same settings would hold in memory and "
        "do; nothing is allocated. Besides the settings: --json FILE writes it, "
        "--device-gib N plans for a device of that memory, --pass-rates FILE (a "
        "directory of `grpo-jax eval --samples K`, its samples.jsonl, or a JSON list) "
        "tells how many groups will be informative.",
    )
    from pathlib import Path

    from grpo_jax.commands.plan import forecast, forecast_text
    from grpo_jax.runs.lines import write_json

    found = forecast(
        config,
        device_gib=own.get("--device-gib"),
        pass_rates=own.get("--pass-rates"),
    )
    print(forecast_text(found))
    if "--json" in own:
        write_json(Path(own["--json"]), found)
    return 0


def _taken(argv, known):
    """(the options that `known` maps to their types, the other arguments)."""
    options, rest = {}, []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag not in known:
            rest.append(argument)
            continue
        value = value if equals else next(arguments, "")
        if not value or (not equals and value.startswith("--")):
            raise ConfigError(f"{flag} needs a value, got {value or 'none'}.")
        try:
            options[flag] = known[flag](value)
        except ValueError as error:
            raise ConfigError(f"{flag} must be a number, got {value!r}.") from error
    return options, rest


def _train_config(argv, command, description):
    """A TrainConfig from --config FILE, a run that is gone on with, and flags."""
    base, argv = TrainConfig(), _long(argv)
    if argv and argv[0].partition("=")[0] == "--config":
        given = argv[0].partition("=")[2] or (argv[1] if len(argv) > 1 else "")
        if not given:
            raise ConfigError("--config needs a .yaml, .yml or .json file.")
        argv = argv[1 if "=" in argv[0] else 2 :]
        base = load_config_file(given)
    elif "--config" in [arg.partition("=")[0] for arg in argv]:
        raise ConfigError("--config FILE comes first, flags that change it after it.")
    if base == TrainConfig() and "--resume" in argv:
        # A run goes on with what it was started with; flags may still change it.
        base = _config_of_run(argv) or base
    return _parsed(
        TrainConfig,
        argv,
        command,
        f"{description} --config FILE.yaml|json comes first, flags on top of it; "
        "--task, --objective and --weights are short for their .name.",
        base,
    )


def _long(argv):
    """The flags with their short spellings written out."""
    return [
        _SHORT.get(flag, flag) + equals + value
        for flag, equals, value in (arg.partition("=") for arg in argv)
    ]


def _parsed(kind, argv, command, description, base=None):
    """A config of that kind from flags, over `base`."""
    import tyro

    default = {} if base is None else {"default": base}
    try:
        return tyro.cli(
            kind,
            args=argv,
            prog=f"grpo-jax {command}",
            description=description,
            **default,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _eval(argv):
    argv, base = _long(argv), None
    directory = _value(argv, "--run-dir")
    if directory is not None:
        base = _like_run(directory, _value(argv, "--task.name"))
    config = _parsed(
        EvalConfig,
        argv,
        "eval",
        "Ask a model directory (--pretrained) or a run (--run-dir) a task's prompts. "
        "An interrupted evaluation goes on where it was.",
        base,
    )
    from grpo_jax.commands.evaluate import evaluate

    evaluate(config)
    return 0


def _like_run(directory, task_name):
    """An EvalConfig that asks as a run did: the same task, unless another is named."""
    from grpo_jax.runs.directory import read_facts

    facts = read_facts(directory)
    run = from_dict(TrainConfig, facts["config"])
    settings = {}
    if task_name in (None, run.task.name):
        # All held-out prompts, where training looked at some of a file's.
        heldout = run.task.heldout_prompts or 0
        settings = dict(
            task=dataclasses.replace(run.task, heldout_prompts=heldout),
            max_new_tokens=facts.get("max_new_tokens"),
            max_prompt_tokens=run.sampling.max_prompt_tokens,
        )
    return EvalConfig(
        run_dir=directory,
        compute_dtype=run.model.compute_dtype,
        temperature=run.sampling.temperature,
        **settings,
    )


def _warmup(argv):
    config = _parsed(
        WarmupConfig,
        _long(argv),
        "warmup",
        "Teach a new model, or a pretrained one, the worked solutions of a task.",
    )
    from grpo_jax.commands.warmup import warm_up

    warm_up(config)
    return 0


def _export(argv):
    usage = "usage: grpo-jax export RUN_DIR OUT_DIR [--step N] [--adapter]."
    directories, options = _arguments(argv, {"--step": int, "--adapter": None}, usage)
    if len(directories) != 2:
        raise ConfigError(f"export needs a run and a directory to write to; {usage}")
    from grpo_jax.commands.export import export

    step = export(
        *directories,
        step=options.get("--step"),
        adapter="--adapter" in options,
    )
    print(f"step {step} of {directories[0]} written to {directories[1]}")
    return 0


def _audit(argv):
    usage = "usage: grpo-jax audit FILE --verifier NAME [--output FILE] [--workers N]."
    known = {"--verifier": str, "--output": str, "--workers": int}
    files, options = _arguments(argv, known, usage)
    if len(files) != 1 or "--verifier" not in options:
        raise ConfigError(f"audit needs one file and a verifier; {usage}")
    import json
    from pathlib import Path

    from grpo_jax.rewards.audit import audit_file

    found = audit_file(
        files[0], options["--verifier"], workers=options.get("--workers", 2)
    )
    print(found.text())
    if "--output" in options:
        Path(options["--output"]).write_text(json.dumps(found.as_dict(), indent=2))
    return 0


def _arguments(argv, known, usage):
    """(plain arguments, options): `known` maps an option to its type, None for a bare
    one."""
    plain, options = [], {}
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") and flag != "-h":
            plain.append(argument)
        elif flag in ("-h", "--help"):
            print(usage)
            raise SystemExit(0)
        elif flag not in known:
            raise ConfigError(
                f"unknown option {flag!r}; {nearest(flag, list(known))}{usage}"
            )
        elif known[flag] is None:
            options[flag] = True
        else:
            value = value if equals else next(arguments, "")
            try:
                options[flag] = known[flag](value)
            except ValueError as error:
                raise ConfigError(
                    f"{flag} must be a whole number, got {value!r}."
                ) from error
            if value == "":
                raise ConfigError(f"{flag} needs a value; {usage}")
    return plain, options


def _config_of_run(argv):
    """The config of the run that --run-dir names; None where there is none yet."""
    from grpo_jax.runs.directory import read_config_dict

    directory = _value(argv, "--run-dir")
    if directory is None:
        return None
    return from_dict(TrainConfig, read_config_dict(directory))


def _value(argv, name):
    """What a flag is given, in either spelling; None where it is not there."""
    found = None
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") == name:
            found = value if equals else next(iter(argv[i + 1 :]), None)
    return found


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

    usage = "usage: grpo-jax report RUN_DIR [RUN_DIR ...] [--output FILE]."
    names, options = _arguments(argv, {"--output": str}, usage)
    directories, output = [Path(name) for name in names], options.get("--output")
    if not directories:
        raise ConfigError("report needs at least one run directory.")
    from grpo_jax.report.page import write_report

    default = directories[0] / "report.html" if len(directories) == 1 else "report.html"
    print(f"report: {write_report(directories, Path(output or default))}")
    return 0


def _replay(argv):
    usage = "usage: grpo-jax replay RUN_DIR STEP [--output FILE.npz]."
    plain, options = _arguments(argv, {"--output": str}, usage)
    if len(plain) != 2 or not plain[1].isdigit():
        raise ConfigError(f"replay needs a run and a step of it; {usage}")
    import logging

    import numpy as np

    from grpo_jax.commands.replay import replay

    # orbax, on what it does with a directory that is only read.
    logging.getLogger("absl").setLevel(logging.ERROR)

    found = replay(plain[0], int(plain[1]))
    print(found.text())
    if "--output" in options:
        with open(options["--output"], "wb") as file:
            np.savez(file, **found.arrays)
        print(f"rollouts, weights and gradient norms: {options['--output']}")
    return 0
