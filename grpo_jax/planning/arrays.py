"""Bytes of what a program holds, part by part, on one device.

L prompt tokens and T completion tokens are padded lengths; a micro-batch has p prompts
and g samples of each.
"""

from typing import NamedTuple

from grpo_jax.logprobs import chunk_length, chunk_tokens
from grpo_jax.models.config import ModelConfig, num_factors, num_parameters
from grpo_jax.models.tree import SHORT, block_queries, chosen_attention
from grpo_jax.parallel.platform import platform
from grpo_jax.parallel.sharding import MeshShape, batch_shards
from grpo_jax.rollouts.micro_batches import MicroBatch


class Sizes(NamedTuple):
    """A model's sizes on one device, of those that `tensor` splits its share."""

    layers: int
    width: int
    mlp: float
    heads: float  # x head_dim
    kv: float  # x head_dim
    num_heads: float
    vocab: float
    size: int  # bytes of a number in the layers

    @staticmethod
    def of(c: ModelConfig, tensor: int, widened: bool) -> "Sizes":
        return Sizes(
            layers=c.num_layers,
            width=c.width,
            mlp=c.mlp_width / tensor,
            heads=c.num_heads * c.head_dim / tensor,
            kv=c.num_kv_heads * c.head_dim / max(1, min(tensor, c.num_kv_heads)),
            num_heads=c.num_heads / tensor,
            vocab=c.vocab_size / tensor,
            size=4 if widened or c.dtype == "float32" else 2,
        )


class Weights(NamedTuple):
    """What a device holds of the parameters, and copies of them in a program."""

    trained: float  # bytes, float32
    base: float  # parameters (not bytes) without LoRA's factors
    layer: float  # parameters of one layer, gathered over fsdp
    table: float  # entries of [V, D], gathered over fsdp
    unembedding: float  # bytes of the copy that logits are computed with
    gathered: float  # bytes of two layers and the embedding table under fsdp
    is_cast_back: bool  # bfloat16 computed in float32: both copies exist
    layers_copy: float  # bytes of all layers in bfloat16, which a TPU makes beforehand
    turned: float  # bytes of the embedding transposed, which a GPU keeps in an update

    @staticmethod
    def of(c: ModelConfig, s: Sizes, mesh: MeshShape) -> "Weights":
        shards, on, narrow = mesh.fsdp * mesh.tensor, platform(), s.size == 2
        parameters = num_parameters(c)
        table = s.vocab * c.width
        embeddings = c.vocab_size * c.width * (1 if c.tie_embeddings else 2)
        layer = (parameters - embeddings - c.width) / c.num_layers / mesh.tensor
        is_cast_back = s.size == 4 and c.dtype == "bfloat16"
        is_copied = c.tie_embeddings or s.size == 2 or mesh.fsdp > 1
        return Weights(
            trained=(num_factors(c) if c.lora_rank else parameters) * 4 / shards,
            base=parameters / shards,
            layer=layer,
            table=table,
            unembedding=table * (6 if is_cast_back else s.size * is_copied),
            gathered=(2 * layer + table) * s.size if mesh.fsdp > 1 else 0,
            is_cast_back=is_cast_back,
            layers_copy=2 * layer * c.num_layers / mesh.fsdp * (on == "tpu" and narrow),
            turned=4 * table / mesh.fsdp * (on == "gpu" and c.tie_embeddings),
        )


def of_widened_base(
    c: ModelConfig, w: Weights, base_bytes: int, widened: bool
) -> float:
    """Bytes of LoRA's bfloat16 base in float32, where that is what is computed in."""
    return 4 * w.base if c.lora_rank and widened and base_bytes == 2 else 0


Lengths = tuple[int, int]  # (L, T)


def of_sampling(
    c: ModelConfig,
    s: Sizes,
    prompts: int,
    group_size: int,
    lengths: Lengths,
    mesh: MeshShape,
) -> tuple[float, float]:
    """(cache, work) bytes of p prompts and g samples of each on a device.

    cache  = 2 layers kv p (L + g T)
    work   = max(decode, prefill - cache)
    decode = p g (2 V + 2 mlp + heads (L + T)) in float32, of one token
    """
    shards = batch_shards(prompts, group_size, mesh)
    p, g = prompts // shards[0], group_size // shards[1]
    length, t = lengths
    cache = 2 * s.layers * s.kv * p * (length + g * t) * s.size
    decode = 4 * p * g * (2 * s.vocab + 2 * s.mlp + s.num_heads * (length + t))
    one_layer = 3 * s.mlp + 3 * s.width + 2 * s.heads
    queries = length
    if chosen_attention(c.attention, length, c.head_dim) != "dense":
        queries = block_queries(round(p * s.num_heads * length))
    prefill = p * length * one_layer * s.size + 8 * p * s.num_heads * length * queries
    # All layers' keys and values of the prompts, before they are split by layer.
    prefill += 2 * s.layers * s.kv * p * length * s.size
    return cache, max(decode, prefill - cache)


def of_scores(
    c: ModelConfig, s: Sizes, micro: MicroBatch, lengths: Lengths
) -> tuple[float, float]:
    """float32 bytes of one layer's attention scores of completion tokens that exist at
    once: (on their completion, on their prompt)."""
    length, t = lengths
    rows, heads = s.num_heads * micro.prompts, c.num_heads * micro.prompts
    queries = {
        "dense": t * micro.samples,
        "blocks": block_queries(heads * (length + t)),  # of one sample
        "flash": 0,
    }[chosen_attention(c.attention, t, c.head_dim)]
    of_prompts = {
        "dense": length, "blocks": block_queries(heads * length), "flash": 0,
    }[chosen_attention(c.attention, length, c.head_dim)]  # fmt: skip
    return 4 * rows * queries * t, 4 * rows * max(queries, of_prompts) * length


def of_saved(c: ModelConfig, s: Sizes, micro: MicroBatch, lengths: Lengths) -> float:
    """Bytes that all layers save for a micro-batch's backward pass, by `c.remat`."""
    per_token = {
        "full": s.width,
        "dots": 2 * s.mlp + s.width + 2 * s.heads + 2 * s.kv,
        "none": 6 * s.mlp + 7 * s.width + 5 * s.heads + 2 * s.kv,
    }[c.remat]
    if c.remat != "none" and max(lengths) > SHORT:
        per_token += s.heads  # attention's output
    return s.layers * micro.tokens(*lengths) * per_token * s.size


def of_activations(
    c: ModelConfig, s: Sizes, micro: MicroBatch, lengths: Lengths
) -> float:
    """Bytes at the peak of a micro-batch's backward pass through the layers: what all
    of them save, and one layer's arrays, in its MLP or in its attention."""
    tokens = micro.tokens(*lengths)
    completion, prompt = of_scores(c, s, micro, lengths)
    wide = (6 + (c.lora_rank > 0)) * s.mlp + 5 * s.width + 4 * s.heads + 2 * s.kv
    mlp = completion + prompt + tokens * wide * s.size
    attention = 3.25 * completion + 2.25 * prompt
    attention += tokens * (6 * s.width + 4 * s.heads) * s.size
    layer = attention if c.remat == "none" else max(mlp, attention)
    if chosen_attention(c.attention, max(lengths), c.head_dim) == "blocks":
        # Keys, values and their gradients once more in every stretch of blocks.
        layer += tokens * (10 * s.kv + 4 * s.heads) * s.size
    if chosen_attention(c.attention, lengths[1], c.head_dim) == "flash":
        # The prompt's gradients of every completion, float32.
        layer += 8 * micro.prompts * micro.samples * s.kv * lengths[0]
    return of_saved(c, s, micro, lengths) + layer


def of_logits(
    c: ModelConfig, s: Sizes, w: Weights, micro: MicroBatch, lengths: Lengths
) -> float:
    """Bytes at the peak of the loss, beyond the gradients: what the layers save, one
    chunk's logits and their gradient, and of the unembedding its copy and its gradient;
    on a CPU also one chunk's. A TPU has a third array of a chunk's logits where tensor
    splits them."""
    chunks = 3 if platform() == "tpu" and s.vocab < c.vocab_size else 2
    head = w.unembedding + w.turned + chunks * of_chunk(c, s, micro, lengths)
    tables = 2 if platform() == "cpu" else 1
    head += tables * 4 * w.table * (not c.lora_rank)
    # The layers' gradients do not exist yet, and the table's is counted above.
    return max(0, of_saved(c, s, micro, lengths) + head - w.trained)


def of_chunk(c: ModelConfig, s: Sizes, micro: MicroBatch, lengths: Lengths) -> float:
    """Bytes of one chunk's logits."""
    rows = micro.prompts * micro.samples
    step = chunk_length(lengths[1], rows, chunk_tokens(c.vocab_size, platform()))
    return 4 * rows * step * s.vocab


def of_scoring(
    c: ModelConfig, s: Sizes, w: Weights, micro: MicroBatch, lengths: Lengths,
    mesh: MeshShape,
) -> float:  # fmt: skip
    """Bytes of log-probs of completions, without gradients: a forward pass, what is
    gathered, the unembedding, and all layers cast to bfloat16 where that is what is
    computed in."""
    head = 2 * w.table if w.is_cast_back else w.unembedding
    cast = 2 * s.layers * w.layer / mesh.fsdp if s.size == 2 else 0
    return cast + w.gathered + head + of_forward(c, s, micro, lengths)


def of_look(
    c: ModelConfig, s: Sizes, w: Weights, half: MicroBatch, lengths: Lengths,
    parts: int, sums: int, layers: int | None = None,
) -> float:  # fmt: skip
    """Bytes of a measurement of probe prompts, on top of the state: the gradients of a
    prompt's parts, the directions, and the sums of all.

    Of so many last layers where `layers` is given: beside them a copy of the others.
    """
    measured, others, table = w.trained, 0.0, not c.lora_rank
    if layers is not None:
        measured, table = 4 * w.layer * layers, False
        others = 4 * w.layer * (c.num_layers - layers)
    return w.gathered + others + sums + max(
        (parts + 2) * measured + of_backward(c, s, w, half, lengths, table),
        (parts // 2 + 1) * measured + of_derivatives(c, s, w, half, lengths, table),
    )  # fmt: skip


def of_backward(
    c: ModelConfig, s: Sizes, w: Weights, micro: MicroBatch, lengths: Lengths,
    table: bool,
) -> float:  # fmt: skip
    """Bytes at the peak of a probe's backward pass, beyond the gradients: in the
    layers, or in the loss; beside the unembedding, and its gradient where the table's
    is taken."""
    loss = of_saved(c, s, micro, lengths) + 2 * of_chunk(c, s, micro, lengths)
    head = w.unembedding * (2 if table else 1)
    return head + max(of_activations(c, s, micro, lengths), loss)


def of_derivatives(
    c: ModelConfig, s: Sizes, w: Weights, micro: MicroBatch, lengths: Lengths,
    table: bool,
) -> float:  # fmt: skip
    """Bytes of a forward pass with first and second directional derivatives: four of
    each array of one layer, or of one chunk's logits; beside the unembedding, with two
    more along the direction where it changes the table."""
    head = w.unembedding * (3 if table else 1)
    return head + 4 * of_forward(c, s, micro, lengths)


def of_forward(c: ModelConfig, s: Sizes, micro: MicroBatch, lengths: Lengths) -> float:
    """Bytes of a forward pass: the arrays of one layer, or one chunk's logits."""
    per_token = 3 * s.mlp + 2 * s.width + 2 * s.heads
    layer = micro.tokens(*lengths) * per_token * s.size
    layer += sum(of_scores(c, s, micro, lengths))
    return max(layer, of_chunk(c, s, micro, lengths))
