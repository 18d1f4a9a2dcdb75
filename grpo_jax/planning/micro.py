"""How many tokens a backward pass takes on a device, where that is left open."""

import dataclasses
import math
from typing import NamedTuple

from grpo_jax.parallel.sharding import batch_shards
from grpo_jax.planning.memory import MemoryInputs
from grpo_jax.rollouts.micro_batches import MicroBatch, splits

_SHARE = 0.9  # of a device's memory that is planned for
_WORTH = 1.25  # tokens computed over those of whole groups, from which these are taken
_LARGEST = 2  # times as many tokens at most, for a whole group
# Phases whose bytes depend on it.
_PHASES = "scoring", "update", "look", "counterfactual"


class Budget(NamedTuple):
    """The tokens of a backward pass on a device, and why."""

    tokens: int
    text: str = ""  # after the micro-batch in the headline


def choose_budget(inputs: MemoryInputs, limit: int | None) -> Budget:
    """The most tokens, up to those of `inputs`, whose update fits in 90 % of a device.

    Where these would cut a group, and its repeated prompts cost a quarter more tokens,
    they are those of a whole group, up to twice as many. If no micro-batch fits in
    90 %, the largest that fits in 100 % is taken; if none does, `inputs` stay.

    Args:
        inputs: With the tokens to begin at.
        limit: Bytes of a device; None: not known, and nothing is changed.
    """
    most = inputs.micro_batch_tokens
    sizes = inputs.prompt_tokens, inputs.max_new_tokens
    if limit is None:
        return Budget(most)
    first = inputs.micro
    smaller = [x.tokens(*sizes) for x in _splits(inputs)]
    tokens = [most, *(n for n in smaller if n < first.tokens(*sizes))]
    if (whole := _whole_group(inputs)) is not None:
        tokens = [whole, *tokens]
    needed = {n: _needed(inputs, n) for n in tokens}
    rooms = (_SHARE * limit, limit)
    fitting = (n for room in rooms for n in tokens if needed[n] <= room)
    chosen = next(fitting, most)
    if chosen == most:
        return Budget(most)
    if chosen > most:
        return Budget(chosen, " (a whole group, its prompt encoded once)")
    before = f"{first.prompts} x {first.samples}"
    return Budget(chosen, f" (lowered from {before} for the device's memory)")


def reductions_text(inputs: MemoryInputs) -> str:
    """How often an update adds up its gradients over devices; nothing of one device."""
    micro = inputs.micro
    if math.prod(micro.shards) == 1:
        return ""
    samples = inputs.updated * inputs.group_size
    parts = samples // (micro.prompts * micro.samples)
    often = "once an update" if parts == 1 else f"after each of {parts} in an update"
    return f", gradients added up over devices {often}"


def _splits(inputs: MemoryInputs) -> list[MicroBatch]:
    shards = batch_shards(inputs.updated, inputs.group_size, inputs.mesh)
    return splits(inputs.updated, inputs.group_size, shards)


def _whole_group(inputs: MemoryInputs) -> int | None:
    """Tokens of a whole group on a device, where they are worth it; else None."""
    length, t = inputs.prompt_tokens, inputs.max_new_tokens
    most = inputs.micro_batch_tokens
    groups = [x for x in _splits(inputs) if x.prompts == x.shards[0]]
    whole, cut = groups[0], inputs.micro
    parts = whole.samples // cut.samples
    tokens = whole.tokens(length, t)
    computed = tokens + (parts - 1) * length
    worth = computed >= _WORTH * tokens and most < tokens <= _LARGEST * most
    return tokens if worth else None


def _needed(inputs: MemoryInputs, tokens: int) -> int:
    """Bytes at the peak of what the micro-batch changes."""
    memory = dataclasses.replace(inputs, micro_batch_tokens=tokens).estimate()
    phases = memory.phases()
    return memory.state + max(phases[x] for x in _PHASES)
