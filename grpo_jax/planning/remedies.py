"""What would make a run fit in memory."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from grpo_jax.parallel.sharding import batch_shards
from grpo_jax.planning.memory import MemoryInputs, readable
from grpo_jax.runs.optimizers import OPTIMIZERS


class Change(NamedTuple):
    """A run with one setting changed; as text it is 'setting value'."""

    setting: str
    value: Any
    inputs: MemoryInputs

    def __str__(self) -> str:
        return f"{self.setting} {self.value}"


def changes(x: MemoryInputs) -> dict[str, list[Change]]:
    """The settings that shrink a run -> their values, the smallest change first.

    Settings that change no result come first. Empty lists are settings that cannot be
    lowered further.
    """
    on_host = x.reference_memory == "host"
    return {
        "micro_batch_tokens": _inputs(
            x, "micro_batch_tokens", "micro_batch_tokens", _halves(x.micro_batch_tokens)
        ),
        "model.remat": _model(x, "remat", ["full"] * (x.model.remat != "full")),
        "reference_memory": _inputs(
            x,
            "reference_memory",
            "reference_memory",
            ["host"] * (x.reference and not on_host and not x.model.lora_rank),
        ),
        "instrument.every": _off(x, "instrument.every", "probe_prompts"),
        "instrument.counterfactual_every": _off(
            x, "instrument.counterfactual_every", "weightings"
        ),
        "model.compute_dtype": _model(
            x, "compute_dtype", ["bfloat16"] * (x.model.dtype == "float32")
        ),
        "optimizer.mean_dtype": _bfloat16_mean(x),
        "sampling.prompts": _sampling(x, "prompts", least=1),
        "sampling.group_size": _sampling(x, "group_size", least=2),
        "sampling.max_new_tokens": _inputs(
            x,
            "sampling.max_new_tokens",
            "max_new_tokens",
            _halves(x.max_new_tokens, least=16),
        ),
        # `train` has no reference on the host without a KL term, or with LoRA.
        "objective.kl_coef": (
            [] if on_host else _off(x, "objective.kl_coef", "reference")
        ),
        "model.lora_rank": _model(
            x, "lora_rank", [] if x.model.lora_rank or on_host else [64, 16, 4]
        ),
    }


def tensor_changes(x: MemoryInputs) -> list[Change]:
    """Wider meshes along `tensor`, the one axis that splits a completion."""
    heads, kv_heads = x.model.num_heads, x.model.num_kv_heads
    return [
        Change(
            "mesh.tensor",
            n,
            dataclasses.replace(x, mesh=dataclasses.replace(x.mesh, tensor=n)),
        )
        for n in range(x.mesh.tensor + 1, kv_heads + 1)
        if kv_heads % n == 0 and heads % n == 0
    ]


def _halves(value: int, least: int = 1) -> list[int]:
    halves = [value // 2**i for i in range(1, 20)]
    return [half for half in halves if half >= least]


def _inputs(
    x: MemoryInputs, setting: str, field: str, values: Iterable[Any]
) -> list[Change]:
    return [
        Change(setting, value, dataclasses.replace(x, **{field: value}))
        for value in values
    ]


def _model(x: MemoryInputs, field: str, values: Sequence[Any]) -> list[Change]:
    models = [dataclasses.replace(x.model, **{field: value}) for value in values]
    return [
        Change(f"model.{field}", value, dataclasses.replace(x, model=model))
        for value, model in zip(values, models, strict=True)
    ]


def _bfloat16_mean(x: MemoryInputs) -> list[Change]:
    optimizer = x.optimizer
    if "mean_dtype" not in OPTIMIZERS.get(optimizer.name, ()):
        return []
    optimizer = dataclasses.replace(optimizer, mean_dtype="bfloat16")
    change = Change(
        "optimizer.mean_dtype", "bfloat16", dataclasses.replace(x, optimizer=optimizer)
    )
    return [change] * (optimizer != x.optimizer)


def _off(x: MemoryInputs, setting: str, field: str) -> list[Change]:
    return _inputs(x, setting, field, [0] if getattr(x, field) else [])


def _sampling(x: MemoryInputs, field: str, least: int) -> list[Change]:
    values = _halves(getattr(x, field), least)
    rows = _inputs(x, f"sampling.{field}", field, values)
    return [row for row in rows if _is_accepted(row.inputs)]


def _is_accepted(x: MemoryInputs) -> bool:
    """`train` would accept it: all devices have work, and all updates of a rollout the
    same number of prompts."""
    shards = batch_shards(x.prompts, x.group_size, x.mesh)
    devices = x.mesh.data * x.mesh.fsdp
    return math.prod(shards) == devices and x.prompts % x.parts == 0


def remedies(inputs: MemoryInputs, limit: int) -> list[str]:
    """Settings that would make the run fit in `limit` bytes, each alone; if none does,
    what makes the largest part smaller."""
    options = changes(inputs).values()
    peaks = [[change.inputs.estimate().peak for change in rows] for rows in options]
    fitting = [
        next((c for c, peak in zip(rows, row, strict=True) if peak <= limit), None)
        for rows, row in zip(options, peaks, strict=True)
    ]
    texts = [str(change) for change in fitting if change is not None]
    if texts:
        return texts
    memory = inputs.estimate()
    least = min((peak for row in peaks for peak in row), default=memory.peak)
    return [
        f"no one setting is enough (the best leaves {readable(least, 'B')}); first, "
        f"{memory.advice()}"
    ]


def too_long(inputs: MemoryInputs, limit: int) -> str | None:
    """What to say where an update does not fit even with one completion at a time on a
    device; None if it fits, or if even the parameters do not."""
    single = dataclasses.replace(
        inputs, micro_batch_tokens=1, probe_prompts=0, weightings=0
    )
    memory = single.estimate()
    without_completion = memory.state + memory.update_copies + memory.optimizing
    if _update_peak(single) <= limit or without_completion > limit:
        return None
    shrunk = changes(single)
    helps = []
    for options in (tensor_changes(single), shrunk["sampling.max_new_tokens"]):
        fitting = (c for c in options if _update_peak(c.inputs) <= limit)
        helps += [str(change) for change in list(fitting)[:1]]
    helps += [str(change) for change in shrunk["model.remat"]]
    needed = readable(_update_peak(single), "B")
    return (
        f"an update of one completion of {single.max_new_tokens:,} tokens needs "
        f"{needed}, and no mesh.data or mesh.fsdp splits a "
        f"completion; what helps is {' or '.join(helps) or 'a larger device'}"
    )


def _update_peak(x: MemoryInputs) -> int:
    memory = x.estimate()
    return memory.state + memory.phases()["update"]
