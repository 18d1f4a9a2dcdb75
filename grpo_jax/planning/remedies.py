"""What would make a run fit in memory."""

import dataclasses
import math
from collections.abc import Callable

from grpo_jax.parallel.sharding import batch_shards
from grpo_jax.planning.memory import MemoryInputs, readable


def remedies(inputs: MemoryInputs, limit: int) -> list[str]:
    """Settings that would make the run fit in `limit` bytes, each alone; or, where none
    does, what makes the largest part smaller."""
    found = []
    for text, changes in _changes(inputs):
        changed = next((c for c in changes if c.estimate().peak <= limit), None)
        if changed is not None:
            found.append(text(changed))
    memory = inputs.estimate()
    if found:
        return found
    least = min(
        (c.estimate().peak for _, changes in _changes(inputs) for c in changes),
        default=memory.peak,
    )
    return [
        f"no one setting is enough (the best leaves {readable(least, 'B')}); first, "
        f"{memory.advice()}"
    ]


def too_long(inputs: MemoryInputs, limit: int) -> str | None:
    """What to say where an update does not fit even with one completion at a time on a
    device; None where it does, or where already the parameters do not."""
    alone = dataclasses.replace(
        inputs, micro_batch_tokens=1, probe_prompts=0, weightings=0
    )

    def needed(x):
        memory = x.estimate()
        return memory.state + memory.phases()["update"]

    memory, t, model = alone.estimate(), alone.max_new_tokens, alone.model
    bare = memory.state + memory.update_copies + memory.optimizing
    if needed(alone) <= limit or bare > limit:
        return None
    shorter = [t // 2**i for i in range(1, 20) if t // 2**i >= 16]
    wider = [
        n
        for n in range(alone.mesh.tensor + 1, model.num_kv_heads + 1)
        if model.num_kv_heads % n == 0 and model.num_heads % n == 0
    ]

    def lengthened(n):
        return dataclasses.replace(alone, max_new_tokens=n)

    def split(n):
        mesh = dataclasses.replace(alone.mesh, tensor=n)
        return dataclasses.replace(alone, mesh=mesh)

    helps = []
    for name, values, change in (
        ("mesh.tensor", wider, split),
        ("sampling.max_new_tokens", shorter, lengthened),
    ):
        found = next((n for n in values if needed(change(n)) <= limit), None)
        helps += [] if found is None else [f"{name} {found}"]
    if model.remat != "full":
        helps.append("model.remat full")
    helps = " or ".join(helps) or "a larger device"
    return (
        f"an update of one completion of {t:,} tokens needs "
        f"{readable(needed(alone), 'B')}, and no mesh.data or mesh.fsdp splits a "
        f"completion; what helps is {helps}"
    )


Change = tuple[Callable[[MemoryInputs], str], list[MemoryInputs]]


def _changes(x: MemoryInputs) -> list[Change]:
    """Per setting: its name with the value, and the runs with it changed, the least
    change first. Those that change no result come first."""
    replace = dataclasses.replace
    halves = [x.micro_batch_tokens // 2**i for i in range(1, 20)]
    rows: list[Change] = [
        (
            lambda y: f"micro_batch_tokens {y.micro_batch_tokens}",
            [replace(x, micro_batch_tokens=n) for n in halves if n > 0],
        )
    ]

    def model(name, values):
        rows.append(
            (
                lambda y: f"model.{name} {getattr(y.model, name)}",
                [replace(x, model=replace(x.model, **{name: v})) for v in values],
            )
        )

    if x.model.remat != "full":
        model("remat", ["full"])
    if x.probe_prompts:
        rows.append(
            (lambda y: "instrument.every 0", [replace(x, probe_prompts=0)]),
        )
    if x.weightings:
        rows.append(
            (
                lambda y: "instrument.counterfactual_every 0",
                [replace(x, weightings=0)],
            )
        )
    if x.model.compute_dtype == "float32":
        model("compute_dtype", ["bfloat16"])
    for name, least, spelling in (
        ("prompts", 1, "sampling.prompts"),
        ("group_size", 2, "sampling.group_size"),
        ("max_new_tokens", 16, "sampling.max_new_tokens"),
    ):
        values = [getattr(x, name) // 2**i for i in range(1, 20)]
        smaller = [replace(x, **{name: v}) for v in values if v >= least]
        rows.append(
            (
                lambda y, n=name, s=spelling: f"{s} {getattr(y, n)}",
                [y for y in smaller if _possible(y)],
            )
        )
    if x.reference:
        rows.append(
            (lambda y: "objective.kl_coef 0", [replace(x, reference=False)]),
        )
    if not x.model.lora_rank:
        model("lora_rank", [64, 16, 4])
    return rows


def _possible(x: MemoryInputs) -> bool:
    """Whether all devices have work, and all updates as many prompts: or `train` would
    refuse it."""
    shards = batch_shards(x.prompts, x.group_size, x.mesh)
    devices = x.mesh.data * x.mesh.fsdp
    return math.prod(shards) == devices and x.prompts % x.parts == 0
