"""A compiled program's text (HLO): what it runs, how often, and from which code."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(body|condition|to_apply|calls)=%?([\w.\-]+)")
_CALLS = ("while", "call", "conditional", "async-start")
_TRIPS = re.compile(r'known_trip_count[^0-9]*"?n"?:"?([0-9]+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
# A count from 0 up to a constant, as every scan has.
_BOUND = re.compile(r"^\s*%?([\w.\-]+) = s32\[\].* constant\(([0-9]+)\)")
_COUNTS = re.compile(r"ROOT .* compare\(.*[ ,(]%?([\w.\-]+)\), direction=LT")


class Operation(NamedTuple):
    """One line of a program."""

    kind: str  # such as "all-gather", "fusion"
    shape: str  # of its result, as written
    line: str
    place: str  # "entry", or "body" or "condition" of a loop
    loop: str  # name of that body or condition, "" of the entry
    computation: str  # name of the lines that it is one of
    times: int  # that it runs
    fused: bool  # part of another operation
    overlaps: bool  # with other work: started and awaited later, or fused with it


def operations(text: str, *, trips: int | Sequence[int] = 1) -> Iterator[Operation]:
    """What runs in a program's text, `jitted.lower(...).compile().as_text()`.

    Args:
        text: HLO.
        trips: Iterations of loops whose count the compiler does not know (sampling's):
            of all, or of each in the order of the text.
    """
    computations, entry = _computations(text)
    unknown = iter([trips] if isinstance(trips, int) else trips)
    counted: dict[str, int] = {}

    def trips_of(line: str) -> int:
        known = _trip_count(line, computations)
        if known is not None:
            return known
        if isinstance(trips, int):
            return trips
        if line not in counted:
            counted[line] = next(unknown, trips[-1])
        return counted[line]

    def walk(
        name: str, place: str, loop: str, times: int, fused: bool, overlaps: bool
    ) -> Iterator[Operation]:
        for line in computations.get(name, ()):
            match = _OPERATION.match(line)
            if match is None:
                continue
            shape, kind = match.groups()
            yield Operation(
                kind, shape, line, place, loop, name, times, fused, overlaps
            )
            runs = times * trips_of(line) if kind == "while" else times
            inside = fused or kind not in _CALLS
            beside = overlaps or kind in ("async-start", "fusion")
            for role, called in _CALLED.findall(line):
                at = (place, loop)
                if role in ("body", "condition"):
                    at = (role, called)
                yield from walk(called, *at, runs, inside, beside)

    return walk(entry, "entry", "", 1, False, False)


def _trip_count(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop runs; None where it depends on values."""
    stated, condition = _TRIPS.search(line), _CONDITION.search(line)
    if stated:
        return int(stated.group(1))
    lines = computations.get(condition.group(1), []) if condition else []
    bounds = {m.group(1): m.group(2) for x in lines if (m := _BOUND.match(x))}
    counts = [m.group(1) for x in lines if (m := _COUNTS.search(x))]
    return int(bounds[counts[0]]) if counts and counts[0] in bounds else None


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, sizes) of every array in a shape, which may be a tuple."""
    found = _ARRAY.findall(shape)
    return [(t, tuple(int(n) for n in sizes.split(",") if n)) for t, sizes in found]


def bytes_of(dtype: str, sizes: Sequence[int]) -> int:
    """Bytes of an array."""
    return _BYTES.get(dtype, 4) * math.prod(sizes)


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


class Source(NamedTuple):
    """A function that an operation was traced in."""

    file: str
    function: str  # qualified: Decoder.embed


class Sources:
    """From operations to the functions that they were traced in, by the tables that a
    program's text begins with; without them, none is known.

    Args:
        text: HLO.
    """

    def __init__(self, text: str):
        files, names, places, frames = (
            _table(text, name)
            for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
        )
        self._sources = {
            i: Source(
                files.get(_number(row, "file_name_id"), "").strip('"'),
                names.get(_number(row, "function_name_id"), "").strip('"'),
            )
            for i, row in places.items()
        }
        callers = {i: _number(row, "parent_frame_id") for i, row in frames.items()}
        nobody = min(callers.values(), default=0)  # 1 in the text of jaxlib 0.10
        # frame -> (its place, the frame that called it)
        self._frames = {
            i: (_number(row, "file_location_id"), callers[i] - nobody)
            for i, row in frames.items()
        }

    def of(self, line: str) -> Iterator[Source]:
        """Innermost first; none of what the compiler added."""
        frame = _number(line, "stack_frame_id")
        while frame in self._frames:
            place, frame = self._frames[frame]
            yield self._sources.get(place, Source("", ""))


def _table(text: str, name: str) -> dict[int, str]:
    match = re.search(rf"^{name}\n((?:[0-9]+ .*\n)+)", text, re.MULTILINE)
    rows = match.group(1).splitlines() if match else []
    return {int(i): row for i, row in (line.split(" ", 1) for line in rows)}


def _number(row: str, key: str) -> int:
    match = re.search(rf"{key}=([0-9]+)", row)
    return int(match.group(1)) if match else 0
