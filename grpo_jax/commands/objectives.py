"""`grpo-jax objectives [NAME ...]`: every method's formula, axes and source, or those
of the methods that are named; module:name is an Objective of your own."""

import dataclasses
from collections.abc import Sequence

from grpo_jax.commands._arguments import parse
from grpo_jax.objectives.objective import Objective
from grpo_jax.user_code import find_object


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectivesOptions:
    """Which methods are printed."""

    names: tuple[str, ...]  # of objectives, or module:name of your own; default: all


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    names = parse(ObjectivesOptions, argv, __doc__, positional=True).names
    from grpo_jax.objectives.presets import OBJECTIVES

    for name in names or OBJECTIVES:
        row = _row(name)
        lines = [f"{name}", f"  loss      {row.formula()}", f"  axes      {row.axes()}"]
        if row.mechanisms():
            lines.append(f"  and       {'; '.join(row.mechanisms())}")
        print("\n".join([*lines, f"  source    {row.source}", ""]))
    return 0


def _row(name: str) -> Objective:
    """The row of that name, or the user's own."""
    from grpo_jax.runs.objects import as_objective

    return as_objective(find_object(name, "objective") if ":" in name else name)
