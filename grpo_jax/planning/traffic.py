"""What a step over many devices would hold and send, on paper.

Parameters, moments and gradients are cut fsdp x tensor ways and gathered layer by
layer in float32; prompts are cut data x fsdp ways; heads, the MLP and the vocabulary
tensor ways. Traffic and memory were compared with programs for 8 virtual devices; times
with nothing.
"""

import dataclasses
from typing import NamedTuple

from grpo_jax.models.config import ModelConfig, num_parameters
from grpo_jax.planning.memory import Memory, estimate_memory
from grpo_jax.rollouts.micro_batches import MicroBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ways a step is cut; the product is the number of devices."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def prompt_ways(self) -> int:
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One rollout and one update of it, over all devices."""

    prompts: int
    group_size: int
    prompt_tokens: int
    max_new_tokens: int
    micro: MicroBatch  # of each group of `tensor` devices

    @property
    def tokens(self) -> int:
        return self.prompts * (
            self.prompt_tokens + self.group_size * self.max_new_tokens
        )


class Traffic(NamedTuple):
    """Bytes that each device receives in a step."""

    gathers: float  # of parameters, forward and backward of every micro-batch
    scatters: float  # of gradients over fsdp, float32, every micro-batch
    data: float  # all-reduces of gradients over data, float32, every micro-batch
    tensor: float  # all-reduces of the residual stream in the update
    sampling: float  # weights gathered twice, and all-reduces of every token sampled

    @property
    def update(self) -> float:
        return self.gathers + self.scatters + self.data + self.tensor


def micro_batches(step: Step, layout: Layout) -> int:
    """How many backward passes a device makes in an update."""
    prompts = step.prompts // layout.prompt_ways
    return prompts * step.group_size // (step.micro.prompts * step.micro.samples)


def traffic(c: ModelConfig, step: Step, layout: Layout) -> Traffic:
    """Bytes that each device receives in a step.

    With N parameters, b bytes of the compute dtype, M micro-batches, and of a ring over
    n devices a gather or scatter of X bytes (n - 1) / n X, an all-reduce twice that:

        gathers  = 2 M (F - 1) / F  4 N / tensor        F: fsdp
        scatters = M (F - 1) / F  4 N / tensor
        data     = M 2 (D - 1) / D  4 N / (F tensor)    D: data
        tensor   = layers r 2 (S - 1) / S  tokens width b    S: tensor
                   r = 2 forward + 2 backward + 1 where a layer is computed again
    """
    size = 2 if c.compute_dtype == "bfloat16" else 4
    n, parts = num_parameters(c) / layout.tensor, micro_batches(step, layout)
    tokens = step.tokens / layout.prompt_ways
    gathered = _received(layout.fsdp) * n * 4  # then cast, so gradients add up in it
    reduces = 5 if c.remat == "full" else 4
    stream = c.num_layers * 2 * _received(layout.tensor) * c.width * size
    return Traffic(
        gathers=2 * parts * gathered,
        scatters=parts * _received(layout.fsdp) * n * 4,
        data=parts * 2 * _received(layout.data) * n * 4 / layout.fsdp,
        tensor=reduces * stream * tokens,
        sampling=2 * gathered + 2 * stream * tokens,
    )


def _received(ways):
    """Of what is gathered over `ways` devices, the part that comes from the others."""
    return (ways - 1) / ways


def update_seconds(c: ModelConfig, step: Step, layout: Layout, *, flops: float):
    """Seconds of an update's arithmetic at `flops` useful operations a second.

    6 N a token for the weights (the embedding counts as the unembedding), and
    12 layers heads head_dim a token and key that it attends to: half the completion and
    the prompt. What is computed again is not counted: `flops` is peak x MFU.
    """
    seen = step.prompt_tokens + step.max_new_tokens / 2
    weights = num_parameters(c) - c.vocab_size * c.width * (not c.tie_embeddings)
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * seen
    return step.tokens * (6 * weights + attention) / (flops * layout.devices)


def sampling_seconds(
    c: ModelConfig, step: Step, layout: Layout, *, bytes_a_second: float
) -> float:
    """Seconds to read the weights and half the final cache once for every token."""
    size = 2 if c.compute_dtype == "bfloat16" else 4
    cached = step.prompt_tokens + step.group_size * step.max_new_tokens / 2
    cached *= step.prompts / layout.prompt_ways
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * cached
    read = (num_parameters(c) + cache) * size / layout.tensor
    return step.max_new_tokens * read / bytes_a_second


def memory_per_device(
    c: ModelConfig, step: Step, layout: Layout, *, reference: bool = False
) -> Memory:
    """Bytes on each device, without the instrument."""
    ways = layout.prompt_ways
    return estimate_memory(
        c,
        prompts=step.prompts,
        group_size=step.group_size,
        prompt_tokens=step.prompt_tokens,
        max_new_tokens=step.max_new_tokens,
        micro=MicroBatch(step.micro.prompts * ways, step.micro.samples, (ways, 1)),
        reference=reference,
        mesh=layout,
    )
