"""Collectives of a compiled program, parsed from its HLO text."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from grpo_jax.parallel.hlo import Operation, arrays_of, bytes_of, operations

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
_STARTED = "-start"
_AWAITED = '"is_sync":true'  # of a GPU's: started, and awaited at once
# A TPU's program may write a reduce-scatter as a computation with this name: an
# all-reduce, and the device's slice of it.
SCATTERED = "all-reduce-scatter"
_CHANNEL = re.compile(r"channel_id=([0-9]+)")


class Collective(NamedTuple):
    """One collective operation, from the view of one device."""

    kind: str
    nbytes: int  # of its result
    devices: int  # in its group
    place: str  # "entry", or "body" or "condition" of a loop
    times: int  # that it runs
    # Other work may run meanwhile: it is started and awaited, or fused with the work
    overlaps: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs, with devices in a ring."""
        n = self.devices
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }[self.kind]
        return share * self.nbytes * self.times


def parse_collectives(text: str, *, trips: int | Sequence[int] = 1) -> list[Collective]:
    """Collectives in a program's text, `jitted.lower(...).compile().as_text()`.

    Args:
        text: HLO.
        trips: As in `operations`.
    """
    return list(collectives_of(operations(text, trips=trips)))


def collectives_of(program: Iterable[Operation]) -> Iterator[Collective]:
    """The collectives among the operations of a program.

    One that runs beside several fusions is written in each of them, and counted once.
    """
    seen = set()
    for operation in program:
        kind = operation.kind.removesuffix(_STARTED)
        if kind not in KINDS:
            continue
        channel = _CHANNEL.search(operation.line)
        if operation.fused and channel:
            sizes = tuple(arrays_of(operation.shape))
            key = kind, channel.group(1), sizes, operation.loop
            if key in seen:
                continue
            seen.add(key)
        is_started = operation.kind.endswith(_STARTED)
        nbytes = _nbytes(operation.shape, kind if is_started else None)
        devices = _devices(operation.line)
        is_beside = is_started and _AWAITED not in operation.line
        overlaps = is_beside or operation.overlaps
        if kind == "all-reduce" and operation.computation.startswith(SCATTERED):
            kind, nbytes, overlaps = "reduce-scatter", nbytes // devices, False
        place, times = operation.place, operation.times
        yield Collective(kind, nbytes, devices, place, times, overlaps)


def bytes_sent(text: str, *, trips: int = 1) -> float:
    """Bytes that a device sends in one run of a program; arguments as in
    `parse_collectives`."""
    return sum(x.sent for x in parse_collectives(text, trips=trips))


def _nbytes(shape: str, started: str | None) -> int:
    """Bytes of a result. That of a `started` operation stands after its operands and
    before its context, but for an all-reduce that is no wrapper's."""
    if started and (started != "all-reduce" or shape.startswith("((")):
        shape = _members(shape)[1]
    return sum(bytes_of(dtype, sizes) for dtype, sizes in arrays_of(shape))


def _members(shape: str) -> list[str]:
    """The shapes in a tuple's, which may be tuples."""
    depth, members = 0, [""]
    for character in shape:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 1:
            members.append("")
        else:
            members[-1] += character
    return members


def _devices(line: str) -> int:
    """Devices in a group, which HLO lists, counts, or gives as axes of a device mesh or
    as parts of them ('axis':(before)size)."""
    listed = re.search(r"replica_groups=\{\{([0-9,]+)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    counted = re.search(r"replica_groups=\[[0-9]+,([0-9]+)\]", line)
    if counted:
        return int(counted.group(1))
    axes = re.search(r"replica_groups=mesh\[([^]]*)\] ?\{([^}]*)\}", line)
    if axes is None:
        return 2  # a permutation: from one to another
    sizes = dict(re.findall(r"'(\w+)'=([0-9]+)", axes.group(1)))
    used = re.findall(r"'(\w+)'(?::\([0-9]+\)([0-9]+))?", axes.group(2))
    return math.prod(int(part or sizes[name]) for name, part in used)
