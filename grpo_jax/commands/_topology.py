"""`grpo-jax plan --topology`: what the compiler of devices that are not there says."""

import dataclasses
import itertools
import math
import sys
from collections import Counter
from typing import Any

from grpo_jax.parallel.topology import Topology
from grpo_jax.planning.compiled import SENDING, measured, planned
from grpo_jax.planning.faster import speedups
from grpo_jax.planning.memory import MemoryInputs, readable
from grpo_jax.planning.plan import Plan
from grpo_jax.planning.remedies import remedies
from grpo_jax.rollouts.sampling import cache_lengths

MOST = 3  # settings to change that are named


def compiled(plan: Plan, at: Topology, lowered: dict[str, Any]) -> dict[str, Any]:
    """What compiling the programs of `lower_ahead` says, as JSON types."""
    # What is compiled has no instrument.
    inputs = dataclasses.replace(plan.memory, probe_prompts=0, weightings=0)
    memory = inputs.estimate()
    lengths = [0, *cache_lengths(plan.max_new_tokens)]
    trips = [b - a for a, b in itertools.pairwise(lengths)]
    programs: dict[str, dict[str, Any]] = {}
    for name, program in lowered.items():
        print(f"compiling {name} for {at.name}: minutes ...", file=sys.stderr)
        expected = planned(memory, name)
        programs[name] = measured(program, expected, at.chip, trips)
    return {
        "topology": at.name,
        "devices": math.prod(dataclasses.astuple(inputs.mesh)),
        "memory": at.chip.memory,
        "fits": all(program["fits"] for program in programs.values()),
        "programs": programs,
        "advice": _advice(inputs, at.chip.memory, programs)[:MOST],
    }


def _advice(
    inputs: MemoryInputs, limit: int, programs: dict[str, dict[str, Any]]
) -> list[str]:
    """What to change first: so that it fits, and then, where the compiler estimates
    times, so that it is faster.

    The formulas are corrected by how far they are off for the program that needs most.
    """
    largest = max(programs.values(), key=lambda x: x["peak"])
    least = min([limit, *(x["limit"] for x in programs.values() if "limit" in x)])
    corrected = round(least / (1 + largest["off"]))
    if not all(program["fits"] for program in programs.values()):
        return remedies(inputs, corrected)
    if any(program["seconds"] is None for program in programs.values()):
        return []
    times: Counter[str] = Counter()
    for program in programs.values():
        for part, share in program["parts"].items():
            times[part] += share * program["seconds"]
        waited = [x["sent"] for x in program["collectives"] if not x["overlaps"]]
        sent = sum(x["sent"] for x in program["collectives"])
        if sent:
            times[SENDING] += program["sending_seconds"] * sum(waited) / sent
    total = times.total()
    return speedups(
        inputs, corrected, {k: v / total for k, v in times.items() if total}
    )


def compiled_text(result: dict[str, Any]) -> str:
    """`compiled` as a person reads it."""
    count, memory = result["devices"], readable(result["memory"], "B")
    devices = "1 device" if count == 1 else f"{count} devices"
    lines = [f"compiled for {devices} of {result['topology']} with {memory} each"]
    for name, program in result["programs"].items():
        lines += _program_lines(name, program)
    if result["advice"]:
        first = "make it fit" if not result["fits"] else "change first for speed"
        lines.append(f"  what would {first}, each alone:")
        lines += [f"    {text}" for text in result["advice"]]
    return "\n".join(lines)


def _program_lines(name: str, program: dict[str, Any]) -> list[str]:
    fits = "fits" if program["fits"] else "does not fit"
    expected = program["planned"]
    off = f"{100 * program['off']:+.0f} % beside the formula's"
    peak = f"{readable(program['peak'], 'B')} ({off} {readable(expected['peak'], 'B')})"
    lines = [f"  {name}: {fits}, {peak}"]
    if not program["compiled"]:
        has = readable(program["limit"], "B")
        return [*lines, f"    the compiler refuses it: a program has {has}"]
    rows = [
        ("parameters and other arguments", program["arguments"], expected["arguments"]),
        ("temporary", program["temporary"], expected["temporary"]),
        ("state that it does not take", expected["beside"], expected["beside"]),
    ]
    lines += [
        f"    {text:<32}{readable(count, 'B'):>8}   formula {readable(said, 'B'):>8}"
        for text, count, said in rows
        if count or said
    ]
    arrays = ", ".join(
        f"{x['array']} {readable(x['bytes'], 'B')} ({x['part']})"
        for x in program["arrays"][:MOST]
    )
    lines.append(f"    largest arrays: {arrays}")
    if program["parts"]:
        parts = ", ".join(
            f"{part} {100 * share:.0f} %"
            for part, share in program["parts"].items()
            if share >= 0.005
        )
        seconds = program["seconds"]
        time = "time" if seconds is None else f"{seconds:.3g} s"
        lines.append(f"    {time} by the compiler's estimate: {parts}")
    else:
        lines.append("    the compiler estimates no time for these devices")
    if program["kernels"]:
        lines.append(
            f"    without {program['kernels']} runs of kernels written by hand"
        )
    for x in program["collectives"]:
        how = "beside other work" if x["overlaps"] else "waited for"
        sent = readable(x["sent"], "B")
        lines.append(f"    {x['kind']}: {x['runs']} times, {sent} sent, {how}")
    return lines
