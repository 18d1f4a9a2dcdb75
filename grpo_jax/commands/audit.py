"""`grpo-jax audit FILE --verifier gsm8k|math [--answer-field F] [--solution-field F]
[--output FILE.json] [--workers N]`: which gold answers the verifier accepts against
themselves and rewritten."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.commands._arguments import parse
from grpo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What is audited, and where the result goes."""

    file: str  # rows with gold answers: .jsonl, .json or .parquet
    verifier: str | None = None  # gsm8k | math | exact; must be given
    answer_field: str | None = None  # of the golds, as "a.b" too; default: answer
    # Of the worked solutions, with the gold in the last box; default: solution
    solution_field: str | None = None
    output: str | None = None  # also write the result to this .json file
    workers: int = 2  # processes


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    options = parse(AuditOptions, argv, __doc__, positional=True)
    if options.verifier is None:
        raise ConfigError("audit needs a verifier: give --verifier gsm8k or math.")
    from grpo_jax.rewards.audit import audit_file

    audit = audit_file(
        options.file,
        options.verifier,
        answer_field=options.answer_field,
        solution_field=options.solution_field,
        workers=options.workers,
    )
    print(audit.text())
    if options.output is not None:
        Path(options.output).write_text(json.dumps(audit.as_dict(), indent=2))
    return 0
