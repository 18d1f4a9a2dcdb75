"""What a compiler says of a run's program, beside what the formulas say."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from grpo_jax.parallel.collectives import Collective, collectives_of
from grpo_jax.parallel.hlo import Operation, Source, Sources, arrays_of, bytes_of
from grpo_jax.parallel.hlo import operations as operations_of
from grpo_jax.parallel.topology import Chip
from grpo_jax.planning.memory import Memory

# Where an operation was traced -> the part of the program that it belongs to: files of
# the package, and functions of them. "" is every other function of the file.
VOCABULARY, ATTENTION, PRODUCTS = "vocabulary", "attention", "matrix products"
LAYERS, ADDING, OPTIMIZER = "rest of the layers", "adding up gradients", "optimizer"
SENDING = "collectives waited for"
DRAWING, OTHER = "rest of sampling", "other"
PARTS: dict[str, dict[str, str]] = {
    "logprobs.py": {"soft_capped": "", "": VOCABULARY},
    "models/attention.py": {"rotate": LAYERS, "rotary_table": LAYERS, "": ATTENTION},
    **{f"models/{name}.py": {"": ATTENTION} for name in ("tree", "flash", "block")},
    "models/linear.py": {"": PRODUCTS},
    "models/lora.py": {"": PRODUCTS},
    "models/decoder.py": {
        "Decoder.logits": VOCABULARY,
        "Decoder.unembedding_param": VOCABULARY,
        "Decoder.unembedding_matrix": VOCABULARY,
        "": LAYERS,
    },
    "models/forward.py": {"": LAYERS},
    "rollouts/decoding.py": {
        "TokenDecoder._unembed": VOCABULARY,
        "_fuse": PRODUCTS,
        "": LAYERS,
    },
    "rollouts/draw.py": {"": DRAWING},
    "rollouts/sampling.py": {"": DRAWING},
    "training/step.py": {"make_train_step": OPTIMIZER, "": ADDING},
}
_CYCLES = re.compile(r'"estimated_cycles":"([0-9]+)"')
_KERNEL = 'custom_call_target="tpu_custom_call"'
_ON_CHIP = re.compile(r"S\([1-9][0-9]*\)")  # a layout in a memory smaller than HBM
_NO_ARRAYS = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "constant",
}  # fmt: skip
# The compiler's refusals.
_SIZE = r"([0-9.]+)([KMGT]?)"
_REFUSALS = [
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Planned(NamedTuple):
    """What the formulas say of a program on one device, in bytes."""

    arguments: int  # the state that it takes
    temporary: int
    beside: int  # the state that it does not take

    @property
    def peak(self) -> int:
        """Bytes while it runs."""
        return self.arguments + self.temporary + self.beside


def planned(memory: Memory, name: str) -> Planned:
    """The formulas' figures of the program "update" or "sampling"."""
    taken = {
        "update": memory.state - memory.reference,
        "sampling": memory.parameters + memory.frozen,
    }[name]
    return Planned(taken, memory.phases()[name], memory.state - taken)


def measured(
    lowered: jax.stages.Lowered,
    expected: Planned,
    chip: Chip,
    trips: int | Sequence[int] = 1,
) -> dict[str, Any]:
    """What compiling a program says, as JSON types.

    Args:
        lowered: The program.
        expected: The formulas' figures.
        chip: What it is compiled for.
        trips: Iterations of loops whose end depends on values, as in `operations`.
    """
    result: dict[str, Any] = {"planned": expected._asdict() | {"peak": expected.peak}}
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        matches = (pattern.search(str(error)) for pattern in _REFUSALS)
        used = next(filter(None, matches), None)
        if used is None:
            raise
        needs, has = (_bytes(*used.group(i, i + 1)) for i in (1, 3))
        peak = needs + expected.beside
        off = peak / expected.peak - 1
        refused = {"compiled": False, "peak": peak, "limit": has, "off": off}
        return result | refused | {"fits": False}
    m: Any = program.memory_analysis()
    arguments = m.argument_size_in_bytes
    kept = arguments + m.output_size_in_bytes - m.alias_size_in_bytes
    # Where the compiler states its peak: the sum has room twice that was used twice.
    # A CPU's compiler states arguments and outputs alone, rounded up.
    stated = m.peak_memory_in_bytes
    during = stated if stated > 1.01 * kept else kept + m.temp_size_in_bytes
    peak = during + expected.beside
    text: Any = program.as_text()
    return result | {
        "compiled": True,
        "arguments": arguments,
        "temporary": during - arguments,
        "peak": peak,
        "off": peak / expected.peak - 1,
        "fits": peak <= chip.memory,
        **_read(text, chip, trips),
    }


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _read(text: str, chip: Chip, trips: int | Sequence[int]) -> dict[str, Any]:
    """Time, arrays and collectives, from a program's text."""
    program, sources = list(operations_of(text, trips=trips)), Sources(text)
    cycles = cycles_by_part(program, sources)
    total = sum(cycles.values())
    collectives = list(collectives_of(program))
    sent = sum(x.sent for x in collectives)
    return {
        "seconds": total / chip.ghz / 1e9 if chip.ghz and total else None,
        "kernels": sum(
            x.times for x in program if _KERNEL in x.line and not _CYCLES.search(x.line)
        ),
        "parts": {part: n / total for part, n in cycles.most_common() if n},
        "arrays": _largest(program, sources),
        "collectives": _summed(collectives),
        "sending_seconds": sent / chip.link,  # at the least
    }


def part_of(sources: Iterable[Source]) -> str:
    """The part of a program that an operation belongs to.

    Args:
        sources: Functions that it was traced in, innermost first.
    """
    for file, function in sources:
        rules = PARTS.get(file.rpartition("/grpo_jax/")[2], {})
        name = function.partition(".<locals>")[0]
        part = rules.get(name, rules.get("", ""))
        if not rules and "attention" in file.rpartition("/")[2]:
            part = ATTENTION  # a kernel, of this package or of jax
        if part:
            return part
    return OTHER


def cycles_by_part(program: Iterable[Operation], sources: Sources) -> Counter[str]:
    """Part -> cycles in one run of a program, as the compiler estimates them; nothing
    where it does not, as for CPUs and GPUs and for most collectives."""
    cycles: Counter[str] = Counter()
    for operation in program:
        estimate = _CYCLES.search(operation.line)
        if estimate and not operation.fused:
            part = part_of(sources.of(operation.line))
            cycles[part] += int(estimate.group(1)) * operation.times
    return cycles


def _largest(program: Iterable[Operation], sources: Sources) -> list[dict[str, Any]]:
    """The largest arrays that operations write to a device's memory."""
    found: dict[str, dict[str, Any]] = {}
    for operation in program:
        if operation.fused or operation.kind in _NO_ARRAYS:
            continue
        if _ON_CHIP.search(operation.shape) or operation.kind.endswith("-start"):
            continue
        for dtype, sizes in arrays_of(operation.shape):
            name = f"{dtype}[{','.join(map(str, sizes))}]"
            if name not in found:
                found[name] = {
                    "array": name,
                    "bytes": bytes_of(dtype, sizes),
                    "part": part_of(sources.of(operation.line)),
                }
    return sorted(found.values(), key=lambda x: -x["bytes"])[:5]


def _summed(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Collectives of a kind together, the most bytes first."""
    sums: dict[tuple[str, bool], list[float]] = {}
    for x in collectives:
        row = sums.setdefault((x.kind, x.overlaps), [0, 0.0])
        row[0] += x.times
        row[1] += x.sent
    return [
        {"kind": kind, "overlaps": overlaps, "runs": int(runs), "sent": sent}
        for (kind, overlaps), (runs, sent) in sorted(
            sums.items(), key=lambda item: -item[1][1]
        )
    ]
