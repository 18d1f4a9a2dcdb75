"""What a step over many devices holds, sends and takes, by formulas.

Parameters, moments and gradients are split fsdp x tensor ways and gathered layer by
layer in the compute dtype; prompts are split data x fsdp ways; heads, the MLP and the
vocabulary tensor ways. Traffic and memory were compared with programs for 8 virtual
devices; times with nothing.
"""

import dataclasses
from typing import NamedTuple

from grpo_jax.models.config import ModelConfig, num_parameters
from grpo_jax.parallel.sharding import MeshShape
from grpo_jax.planning.memory import Memory, estimate_memory
from grpo_jax.rollouts.micro_batches import MicroBatch


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
        """Tokens of an update: P (L + G T)."""
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
        """Bytes received in the update."""
        return self.gathers + self.scatters + self.data + self.tensor


def num_devices(mesh: MeshShape) -> int:
    """Devices of a mesh."""
    return mesh.data * mesh.fsdp * mesh.tensor


def prompt_shards(mesh: MeshShape) -> int:
    """Parts that the prompts of a step are split into."""
    return mesh.data * mesh.fsdp


def micro_batches(step: Step, mesh: MeshShape) -> int:
    """Backward passes of a device in an update."""
    prompts = step.prompts // prompt_shards(mesh)
    return prompts * step.group_size // (step.micro.prompts * step.micro.samples)


def traffic(c: ModelConfig, step: Step, mesh: MeshShape) -> Traffic:
    """Bytes that each device receives in a step.

    With N parameters, b bytes of the compute dtype, M micro-batches, and of a ring over
    n devices a gather or scatter of X bytes (n - 1) / n X, an all-reduce twice that:

        gathers  = 2 M (F - 1) / F  b N / tensor        F: fsdp
        scatters = M (F - 1) / F  4 N / tensor
        data     = M 2 (D - 1) / D  4 N / (F tensor)    D: data
        tensor   = layers r 2 (S - 1) / S  tokens width b    S: tensor
                   r = 2 forward + 2 backward + 1 where a layer is computed again
    """
    size = _compute_bytes(c)
    n, parts = num_parameters(c) / mesh.tensor, micro_batches(step, mesh)
    tokens = step.tokens / prompt_shards(mesh)
    gathered = _ring_share(mesh.fsdp) * n * size
    reduces = 5 if c.remat == "full" else 4
    stream = c.num_layers * 2 * _ring_share(mesh.tensor) * c.width * size
    return Traffic(
        gathers=2 * parts * gathered,
        scatters=parts * _ring_share(mesh.fsdp) * n * 4,
        data=parts * 2 * _ring_share(mesh.data) * n * 4 / mesh.fsdp,
        tensor=reduces * stream * tokens,
        sampling=2 * gathered + 2 * stream * tokens,
    )


def _compute_bytes(c: ModelConfig) -> int:
    return 2 if c.dtype == "bfloat16" else 4


def _ring_share(ways: int) -> float:
    """The share of a gathered array that comes from the other devices."""
    return (ways - 1) / ways


def update_seconds(
    c: ModelConfig, step: Step, mesh: MeshShape, *, flops: float
) -> float:
    """Seconds of an update's arithmetic at `flops` useful operations a second.

    6 N a token for the weights (the embedding counts as the unembedding), and
    12 layers heads head_dim a token and key that it attends to: the prompt and, on
    average, half the completion. Recomputation is not counted: `flops` is peak x MFU.
    """
    keys = step.prompt_tokens + step.max_new_tokens / 2
    weights = num_parameters(c) - c.vocab_size * c.width * (not c.tie_embeddings)
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * keys
    return step.tokens * (6 * weights + attention) / (flops * num_devices(mesh))


def sampling_seconds(
    c: ModelConfig, step: Step, mesh: MeshShape, *, bytes_a_second: float
) -> float:
    """Seconds to read the weights and half the final cache once for every token."""
    cached = step.prompt_tokens + step.group_size * step.max_new_tokens / 2
    cached *= step.prompts / prompt_shards(mesh)
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * cached
    read = (num_parameters(c) + cache) * _compute_bytes(c) / mesh.tensor
    return step.max_new_tokens * read / bytes_a_second


def memory_per_device(
    c: ModelConfig, step: Step, mesh: MeshShape, *, reference: bool = False
) -> Memory:
    """Bytes on each device, without the instrument."""
    shards = prompt_shards(mesh)
    return estimate_memory(
        c,
        prompts=step.prompts,
        group_size=step.group_size,
        prompt_tokens=step.prompt_tokens,
        max_new_tokens=step.max_new_tokens,
        micro=MicroBatch(step.micro.prompts * shards, step.micro.samples, (shards, 1)),
        reference=reference,
        mesh=mesh,
    )
