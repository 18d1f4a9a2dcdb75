"""`grpo-jax`: hands a command line to its subcommand's module in `commands/`."""

import ast
import importlib
import importlib.resources
import os
import sys
import textwrap
from types import ModuleType

from grpo_jax.commands._arguments import synopsis
from grpo_jax.errors import (
    ConfigError,
    MissingPackageError,
    nearest,
    needs_the_whole_install,
)

# Subcommand -> its module, in the order of --help.
COMMANDS = {
    "train": "train",
    "plan": "plan",
    "eval": "evaluate",
    "warmup": "warmup",
    "export": "export",
    "audit": "audit",
    "objectives": "objectives",
    "report": "report",
    "replay": "replay",
    "look": "look",
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (0 done, 1 failed, 2 bad input)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        return _bad(
            f"unknown command {argv[0]!r}; {nearest(argv[0], COMMANDS)}"
            f"commands: {', '.join(COMMANDS)}."
        )
    try:
        with needs_the_whole_install(f"grpo-jax {argv[0]}"):
            return _module(argv[0]).main(argv[1:])
    except ConfigError as error:
        return _bad(str(error))
    except (OSError, MissingPackageError) as error:
        if isinstance(error, BrokenPipeError) and {"-h", "--help"} & {*argv}:
            # What reads the help, as `head`, has enough of it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _bad(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def usage() -> str:
    """What `grpo-jax --help` prints: the synopsis of every subcommand."""
    lines = ["usage: grpo-jax COMMAND [...]", ""]
    for command in COMMANDS:
        _, arguments, description = synopsis(_docstring(command))
        text = f"{arguments}: {description}" if arguments else description
        lines += textwrap.wrap(
            text,
            width=88,
            initial_indent=f"  {command:<10} ",
            subsequent_indent=" " * 13,
            break_on_hyphens=False,
        )
    lines += ["", "`grpo-jax COMMAND --help` lists every argument and setting."]
    return "\n".join(lines) + "\n"


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"grpo_jax.commands.{COMMANDS[command]}")


def _docstring(command: str) -> str:
    """The docstring of a subcommand's module, from its text: importing most of them
    imports jax."""
    file = importlib.resources.files("grpo_jax.commands") / f"{COMMANDS[command]}.py"
    return ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
