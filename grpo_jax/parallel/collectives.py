"""What a compiled program sends between devices, read from its text."""

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
    """One exchange between devices, as one device takes part in it."""

    kind: str
    nbytes: int  # of its result
    devices: int  # that take part
    place: str  # "entry", or "body" or "condition" of a loop
    times: int  # it runs

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all, where devices stand in a ring."""
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
    """Of a program's text, `jitted.lower(...).compile().as_text()`.

    Args:
        trips: How often loops run whose count the compiler does not know (sampling's).
    """
    computations, entry = _computations(text)

    def walk(name: str, place: str, times: int) -> Iterator[Collective]:
        for line in computations.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                shape, kind, started = found.groups()
                nbytes = _nbytes(shape, kind if started else None)
                yield Collective(kind, nbytes, _devices(line), place, times)
                continue
            known = _TRIPS.search(line)
            n = int(known.group(1)) if known else trips
            for role, called in _CALLED.findall(line):
                loop = role in ("body", "condition")
                yield from walk(
                    called, role if loop else place, times * n if loop else times
                )

    return list(walk(entry, "entry", 1))


def bytes_sent(text: str, *, trips: int = 1) -> float:
    """What a device sends in one run of a program."""
    return sum(x.sent for x in parse_collectives(text, trips=trips))


def _computations(text):
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


def _nbytes(shape, started):
    """Of the result. What is `started` may stand with its operands before it."""
    arrays = _ARRAY.findall(shape)
    if started == "all-gather":
        arrays = arrays[len(arrays) // 2 :]
    if started == "collective-permute":
        arrays = arrays[1:2]
    return sum(
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in arrays
    )


def _devices(line):
    """In a group: listed, counted, or as axes of a mesh of devices, whole or in part
    ('axis':(before)size)."""
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
