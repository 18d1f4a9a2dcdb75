"""What would make a compiled run faster, of what fits in memory."""

import dataclasses
from collections.abc import Callable, Mapping

from grpo_jax.planning.compiled import (
    ADDING,
    ATTENTION,
    LAYERS,
    OPTIMIZER,
    PRODUCTS,
    SENDING,
    VOCABULARY,
)
from grpo_jax.planning.memory import MemoryInputs
from grpo_jax.planning.remedies import Change, changes


def speedups(x: MemoryInputs, limit: float, shares: Mapping[str, float]) -> list[str]:
    """Settings to change, each alone and fitting in `limit` bytes by the formulas; that
    of the part which takes the most time first.

    Args:
        x: The run.
        limit: Bytes.
        shares: Part -> its share of time.
    """
    chosen: dict[str, str] = {}
    for part, share in sorted(shares.items(), key=lambda item: -item[1]):
        for change in _OPTIONS[part](x) if part in _OPTIONS else ():
            if change.setting in chosen or change.inputs.estimate().peak > limit:
                continue
            why = f"{part}: {100 * share:.0f} % of the time"
            chosen[change.setting] = f"{change} ({why})"
            break
    return list(chosen.values())


def _narrower(x: MemoryInputs) -> list[Change]:
    return changes(x)["model.compute_dtype"]


def _shorter(x: MemoryInputs) -> list[Change]:
    return changes(x)["sampling.max_new_tokens"][:1]


def _kept(x: MemoryInputs) -> list[Change]:
    """Less is computed again in the backward pass."""
    values = {"full": ("none", "dots"), "dots": ("none",), "none": ()}[x.model.remat]
    models = [dataclasses.replace(x.model, remat=value) for value in values]
    return [
        Change("model.remat", model.remat, dataclasses.replace(x, model=model))
        for model in models
    ]


def _fewer_parts(x: MemoryInputs) -> list[Change]:
    """Larger micro-batches, so that an update has fewer: the largest first."""
    micro, found = x.micro, []
    for factor in (8, 4, 2):
        more = dataclasses.replace(x, micro_batch_tokens=factor * x.micro_batch_tokens)
        if more.micro != micro:
            tokens = more.micro_batch_tokens
            found.append(Change("micro_batch_tokens", tokens, more))
    return found


_OPTIONS: dict[str, Callable[[MemoryInputs], list[Change]]] = {
    PRODUCTS: lambda x: [*_narrower(x), *_kept(x)],
    LAYERS: lambda x: [*_narrower(x), *_kept(x)],
    ATTENTION: lambda x: [*_kept(x), *_shorter(x)],
    VOCABULARY: lambda x: [*_narrower(x), *_shorter(x)],
    ADDING: _fewer_parts,
    OPTIMIZER: _fewer_parts,
    SENDING: _fewer_parts,
}
