"""Command lines to records of settings, by tyro: what the subcommands share."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from grpo_jax.errors import ConfigError
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.config_files import load_config_file

T = TypeVar("T")
Settings = TypeVar("Settings", bound=TrainConfig)

# Short spellings of the settings that every run names.
SHORT = {
    "--task": "--task.name",
    "--objective": "--objective.name",
    "--weights": "--weights.name",
}
_MORE = (
    "--config FILE.yaml|json comes first, flags on top of it; --task, --objective and "
    "--weights are short for their .name."
)


# What int() and float() say of a text that is none -> what they want.
_NUMBERS = {
    "invalid literal for int() with base 10": "a whole number",
    "could not convert string to float": "a number",
}


class Synopsis(NamedTuple):
    """A subcommand as `grpo-jax --help` shows it."""

    command: str
    arguments: str  # such as 'RUN_DIR OUT_DIR [--step N]'
    description: str


def synopsis(doc: str | None) -> Synopsis:
    """What the docstring of a subcommand's module begins with.

    Its first paragraph is '`grpo-jax COMMAND ARGUMENTS`: description.'
    """
    first = " ".join((doc or "").partition("\n\n")[0].split())
    usage, _, description = first.partition("`: ")
    command, _, arguments = usage.removeprefix("`grpo-jax ").partition(" ")
    return Synopsis(command, arguments, description)


def parse(
    kind: type[T],
    argv: Sequence[str],
    doc: str | None,
    *,
    default: T | None = None,
    positional: bool = False,
) -> T:
    """A record from the arguments of a subcommand.

    Args:
        kind: A dataclass; every field is a flag, its comment the flag's help.
        doc: The docstring of the subcommand's module.
        default: Values of the flags that are not given; None: the fields' defaults.
        positional: Required fields are positional arguments.

    Raises:
        ConfigError: arguments that do not make a `kind`.
        SystemExit: --help was given, and printed.
    """
    import tyro

    command, arguments, description = synopsis(doc)
    options: dict[str, Any] = {} if default is None else {"default": default}
    if positional:
        options["config"] = (
            tyro.conf.PositionalRequiredArgs,
            tyro.conf.PositionalMetavarFromFieldName,
        )
    usage = f" usage: grpo-jax {command} {arguments}." if positional else ""
    with _one_line_errors(usage):
        return tyro.cli(
            kind,
            args=argv,
            prog=f"grpo-jax {command}",
            description=description[:1].upper() + description[1:],
            **options,
        )


def parse_run(
    kind: type[Settings], argv: Sequence[str], doc: str | None, *, begun: bool = False
) -> Settings:
    """The settings of a run: flags, over those of --config FILE or, with --resume, over
    those that the run in --run-dir began with.

    Args:
        kind, argv, doc: As `parse`.
        begun: A run that --run-dir holds is meant without --resume too.

    Raises:
        ConfigError, SystemExit: as `parse`.
    """
    file, rest = _config_file(spelled_out(argv))
    base = TrainConfig() if file is None else load_config_file(file)
    if base == TrainConfig():
        named = named_run(rest)
        run_dir = named.run_dir
        if run_dir is not None and (named.resume or (begun and _holds_run(run_dir))):
            from grpo_jax.runs.recorded import run_config

            base = run_config(run_dir)
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(TrainConfig)}
    more = f"{_MORE} {_choices()}" if {"-h", "--help"} & {*rest} else _MORE
    return parse(kind, rest, f"{_first(doc)} {more}", default=kind(**fields))


def _holds_run(directory: str) -> bool:
    return (Path(directory) / "config.json").exists()


def _choices() -> str:
    """The names that an objective's axes and --weights may have, from their registries
    (importing them imports jax, for which a mistyped flag should not wait)."""
    from grpo_jax.objectives.objective import choices
    from grpo_jax.prompt_weights import WEIGHTS

    rows = {f"--objective.{name}": names for name, names in choices().items()}
    rows["--weights"] = ("objective", *WEIGHTS)
    texts = (f"{k.replace('_', '-')}: {', '.join(v)}" for k, v in rows.items())
    return f"Choices of {'; '.join(texts)}."


def _first(doc: str | None) -> str:
    return (doc or "").partition("\n\n")[0]


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The arguments with the flags of `SHORT` in full."""
    parts = (argument.partition("=") for argument in argv)
    return [SHORT.get(flag, flag) + equals + value for flag, equals, value in parts]


def _config_file(argv: list[str]) -> tuple[str | None, list[str]]:
    """(the file of a leading --config, the other arguments)."""
    if "--config" not in [argument.partition("=")[0] for argument in argv]:
        return None, argv
    flag, equals, file = argv[0].partition("=")
    if flag != "--config":
        raise ConfigError("--config FILE comes first, flags that change it after it.")
    if not equals:
        file = argv[1] if len(argv) > 1 else ""
    if not file:
        raise ConfigError("--config needs a .yaml, .yml or .json file.")
    return file, argv[1:] if equals else argv[2:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TaskName:
    name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedRun:
    """The flags that decide which run's settings the other flags change."""

    run_dir: str | None = None
    resume: bool = False
    task: _TaskName = _TaskName()


def named_run(argv: Sequence[str]) -> NamedRun:
    """The run that the arguments name; other arguments are left for `parse`."""
    import tyro

    with _one_line_errors():
        named, _ = tyro.cli(
            NamedRun, args=argv, add_help=False, return_unknown_args=True
        )
    return named


@contextlib.contextmanager
def _one_line_errors(usage: str = "") -> Iterator[None]:
    """Turns what tyro prints before it exits with 2 into a ConfigError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(complaint(printed.getvalue()) + usage) from None
    except ValueError as error:  # a check of the record itself
        raise ConfigError(str(error)) from error


def complaint(box: str) -> str:
    """One sentence of what a box of tyro's says, with the flags that it suggests.

    A box is a title, then sections between rules: the complaint, perhaps suggestions
    or the help of a flag, and last where to read on. On a terminal it is coloured, and
    its edges are drawn in Unicode where the encoding has them.
    """
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    sections: list[list[str]] = [[]]
    for line in filter(None, (line.strip(" │") for line in box.splitlines())):
        if set(line) <= {"-", "─"} or line.startswith("╭"):
            sections.append([])
        elif not line.startswith("╰"):
            sections[-1].append(line)
    text = " ".join(sections[min(1, len(sections) - 1)])
    flag = re.match(r"Error parsing (--[\w.-]+):", text)
    value = re.search(rf"({'|'.join(map(re.escape, _NUMBERS))}): ('.*?')", text)
    missing = re.match(r"Missing value for argument '(.*?)'", text)
    if value:
        name = flag[1] if flag else "an argument"
        return f"{name} must be {_NUMBERS[value[1]]}, got {value[2]}."
    if missing:
        return f"{missing[1]} needs a value."
    text = re.sub(r"^Error parsing (?:[A-Z]\w*: )?", "", text)
    near = [
        repr(name)
        for section in sections[2:]
        for line in section
        if section[0].startswith("Perhaps you meant") and line.startswith("--")
        for name in re.findall(r"--[\w.-]+", line)
    ]
    if near:
        text = f"{text}; did you mean {' or '.join(near)}?"
    text = text[:1].lower() + text[1:]
    return text if text.endswith((".", "?")) else f"{text}."
