"""`grpo-jax objectives [NAME ...]`: every method's formula, axes and source, or those
of the methods that are named."""

import dataclasses
from collections.abc import Sequence

from grpo_jax.commands._arguments import parse
from grpo_jax.errors import unknown_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectivesOptions:
    """Which methods are printed."""

    names: tuple[str, ...]  # of objectives; default: all


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    names = parse(ObjectivesOptions, argv, __doc__, positional=True).names
    from grpo_jax.objectives.presets import OBJECTIVES

    for name in names:
        if name not in OBJECTIVES:
            raise unknown_name("objective", name, OBJECTIVES)
    for name in names or OBJECTIVES:
        row = OBJECTIVES[name]
        lines = [f"{name}", f"  loss      {row.formula()}", f"  axes      {row.axes()}"]
        if row.mechanisms():
            lines.append(f"  and       {'; '.join(row.mechanisms())}")
        print("\n".join([*lines, f"  source    {row.source}", ""]))
    return 0
