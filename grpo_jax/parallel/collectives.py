"""Collectives of a compiled program, parsed from its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(body|condition|to_apply|calls)=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count[^0-9]*"?n"?:"?([0-9]+)')


class Collective(NamedTuple):
    """One collective operation, from the view of one device."""

    kind: str
    nbytes: int  # of its result
    devices: int  # in its group
    place: str  # "entry", or "body" or "condition" of a loop
    times: int  # that it runs

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


def parse_collectives(text: str, *, trips: int = 1) -> list[Collective]:
    """Collectives in a program's text, `jitted.lower(...).compile().as_text()`.

    Args:
        text: HLO.
        trips: Iterations of loops whose count the compiler does not know (sampling's).
    """
    computations, entry = _computations(text)

    def walk(name: str, place: str, times: int) -> Iterator[Collective]:
        for line in computations.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                shape, kind, started = match.groups()
                nbytes = _nbytes(shape, kind if started else None)
                yield Collective(kind, nbytes, _devices(line), place, times)
                continue
            trip_count = _TRIPS.search(line)
            n = int(trip_count.group(1)) if trip_count else trips
            for role, called in _CALLED.findall(line):
                loop = role in ("body", "condition")
                yield from walk(
                    called, role if loop else place, times * n if loop else times
                )

    return list(walk(entry, "entry", 1))


def bytes_sent(text: str, *, trips: int = 1) -> float:
    """Bytes that a device sends in one run of a program; arguments as in
    `parse_collectives`."""
    return sum(x.sent for x in parse_collectives(text, trips=trips))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines of each computation by its name, name of the entry computation)."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            lines = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        else:
            lines.append(line)
    return computations, entry


def _nbytes(shape: str, started: str | None) -> int:
    """Bytes of a result; that of a `started` operation may begin with its operands."""
    arrays = _ARRAY.findall(shape)
    if started == "all-gather":
        arrays = arrays[len(arrays) // 2 :]
    if started == "collective-permute":
        arrays = arrays[1:2]
    return sum(
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in arrays
    )


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
