"""What a run will hold in memory, estimated from shapes before anything is allocated.

The formulas count the arrays that are alive at a program's peak, as XLA on a CPU keeps
them. L prompt tokens and T completion tokens are padded lengths.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.evaluation.sampled import prompts_at_a_time
from grpo_jax.logprobs import MAX_LOGITS
from grpo_jax.models.config import ModelConfig, num_factors, num_parameters
from grpo_jax.parallel.sharding import MeshShape, batch_shards
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.runs.config import MeshConfig


class Memory(NamedTuple):
    """Bytes on one device: the persistent state, and what each phase adds to it.

        peak      = state + max(phases)
        state     = parameters + optimizer + reference + frozen
        sampling  = cache + sampler_weights + sampler_logits
        update    = update_copies
                    + max(optimizing, gradients + max(activations, logits))

    A phase's peak is what `memory_analysis` of its program says (argument + output -
    alias + temp) plus the part of the state that is no argument of it. Field names are
    those of `grpo-jax plan --json`.
    """

    # State: allocated from the first step to the last.
    parameters: int  # trained ones, float32
    optimizer: int  # Adam's two moments
    reference: int  # the reference policy
    frozen: int  # LoRA's base
    # Sampling.
    cache: int  # keys and values of prompts and completions
    sampler_weights: int  # copied into the layout and dtype of the token loop
    sampler_logits: int  # of one token of every completion, and one layer's arrays
    evaluation: int  # the three above, for as many prompts as a step has completions
    # Update.
    update_copies: int  # of parameters: gradient point, or before a probe measurement;
    # and of a bfloat16 base in float32, where that is what is computed in
    gradients: int  # the sum, and one micro-batch's
    activations: int  # saved by all layers for one micro-batch, and one layer's arrays
    logits: int  # of one chunk, and the unembedding's copy and gradient
    optimizing: int  # gradient, both new moments and the change
    # Instrument.
    look: int = 0  # a probe measurement: gradients, directions, sums, activations
    counterfactual: int = 0  # gradient and change under every weighting

    @property
    def state(self) -> int:
        """Bytes allocated from the first step to the last."""
        return self.parameters + self.optimizer + self.reference + self.frozen

    def phases(self) -> dict[str, int]:
        """Name -> bytes on top of `state`; phases do not overlap in time."""
        backward = self.gradients + max(self.activations, self.logits)
        return {
            "sampling": self.cache + self.sampler_weights + self.sampler_logits,
            "evaluation": self.evaluation,
            "update": self.update_copies + max(self.optimizing, backward),
            "look": self.look,
            "counterfactual": self.counterfactual,
        }

    def largest(self) -> str:
        """The phase with the peak."""
        phases = self.phases()
        return max(phases, key=phases.__getitem__)

    @property
    def peak(self) -> int:
        """Bytes at the peak of the largest phase."""
        return self.state + max(self.phases().values())

    def advice(self) -> str:
        """The settings that make the largest part smaller."""
        phase = self.largest()
        work = self.phases()[phase]
        if phase == "update" and self.optimizing + self.update_copies == work:
            work, phase = 0, "state"  # as large as the parameters, like the state
        if self.state >= work:
            phase = "state"
        return _ADVICE[phase]


_ADVICE = {
    "state": "model.lora_rank trains factors of a frozen base",
    "sampling": "lower sampling.prompts, sampling.group_size or "
    "sampling.max_new_tokens",
    "evaluation": "lower sampling.prompts or sampling.group_size, whose "
    "product is evaluated at a time",
    "update": "lower micro_batch_tokens",
    "look": "lower instrument.prompts, or switch it off with instrument.every 0",
    "counterfactual": "switch it off with instrument.counterfactual_every 0",
}


def estimate_memory(
    c: ModelConfig,
    *,
    prompts: int,
    group_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    micro: MicroBatch,
    reference: bool,
    copies: int = 0,
    probe: tuple[MicroBatch, MicroBatch] | None = None,
    probe_bytes: int = 0,
    probe_parts: int = 4,
    weightings: int = 0,
    evaluated: tuple[int, int] | None = None,
    updated: int | None = None,
    base_bytes: int = 4,
    widened: bool = False,
    mesh: MeshShape = MeshConfig(),  # noqa: B008  (frozen)
) -> Memory:
    """Bytes on each device, from shapes alone; within 15 % of `memory_analysis` on the
    shapes that a test compares.

    Args:
        micro: The split of an update over all devices together, with its shards.
        reference: A reference policy is kept.
        copies: Further copies of the trained parameters during an update.
        probe: Micro-batches of a probe measurement: of half a group of one prompt, and
            of all probe prompts along an update; None: no instrument.
        probe_bytes: Of the sums of gradients in a probe measurement.
        probe_parts: Of a probe group, each with a gradient.
        weightings: Compared in a counterfactual step; 0: none.
        evaluated: (prompts, samples of each) evaluated at a time; None: none.
        updated: Prompts of one update, if not `prompts`.
        base_bytes: Of each frozen parameter, with LoRA.
        widened: bfloat16 is computed in float32, as XLA does on a CPU.
        mesh: Parameters, moments and gradients are split over fsdp and gathered layer
            by layer; prompts, or the samples of each, over data and fsdp; heads, the
            MLP and the vocabulary over tensor.
    """
    s = _Sizes.of(c, mesh.tensor, widened)
    w = _Weights.of(c, s, mesh)
    widened_base = 4 * w.base if c.lora_rank and widened and base_bytes == 2 else 0
    lengths = prompt_tokens, max_new_tokens
    local = MicroBatch(*micro.on_device)
    cache, sampler_logits = _sampling(s, prompts, group_size, lengths, mesh)
    sampler_weights = s.layers * w.layer * s.size + w.unembedding + widened_base
    evaluation = 0.0
    if evaluated is not None:
        evaluation = sampler_weights + sum(_sampling(s, *evaluated, lengths, mesh))
    activations = _activations(c, s, local, lengths)
    is_split = (micro.prompts, micro.samples) != (updated or prompts, group_size)
    look = counterfactual = 0.0
    if probe is not None:
        half, everything = probe
        directions = (probe_parts // 2 + 1) * w.trained + probe_bytes
        look = w.gathered + max(
            (probe_parts + 2) * w.trained
            + probe_bytes
            + _backward(c, s, w, half, lengths),
            directions + _derivatives(c, s, w, half, lengths),
            2 * w.trained + _derivatives(c, s, w, everything, lengths),
        )
        look += widened_base
    if weightings:
        # Per weighting its gradient and its change; then one of them is followed.
        beside = (
            2 * w.trained + activations,
            w.trained + _derivatives(c, s, w, local, lengths),
        )
        counterfactual = 2 * weightings * w.trained + max(beside) + w.gathered
        counterfactual += widened_base
    return Memory(
        parameters=round(w.trained),
        optimizer=round(2 * w.trained),
        reference=round(w.trained * reference),
        frozen=round(w.base * base_bytes if c.lora_rank else 0),
        cache=round(cache),
        sampler_weights=round(sampler_weights),
        sampler_logits=round(sampler_logits),
        evaluation=round(evaluation),
        update_copies=round(w.trained * copies + widened_base),
        gradients=round(w.trained * (1 + is_split)),
        activations=round(activations + w.gathered + w.unembedding * w.is_cast_back),
        logits=round(_logits(c, s, w, local, lengths)),
        optimizing=round(4 * w.trained),
        look=round(look),
        counterfactual=round(counterfactual),
    )


class _Sizes(NamedTuple):
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
    def of(c: ModelConfig, tensor: int, widened: bool) -> "_Sizes":
        return _Sizes(
            layers=c.num_layers,
            width=c.width,
            mlp=c.mlp_width / tensor,
            heads=c.num_heads * c.head_dim / tensor,
            kv=c.num_kv_heads * c.head_dim / max(1, min(tensor, c.num_kv_heads)),
            num_heads=c.num_heads / tensor,
            vocab=c.vocab_size / tensor,
            size=4 if widened or c.dtype == "float32" else 2,
        )


class _Weights(NamedTuple):
    """What a device holds of the parameters, and copies of them in a program."""

    trained: float  # bytes, float32
    base: float  # parameters (not bytes) without LoRA's factors
    layer: float  # parameters of one layer, gathered over fsdp
    table: float  # entries of [V, D], gathered over fsdp
    unembedding: float  # bytes of the copy that logits are computed with
    gathered: float  # bytes of two layers and the embedding table under fsdp
    is_cast_back: bool  # bfloat16 computed in float32: both copies exist

    @staticmethod
    def of(c: ModelConfig, s: _Sizes, mesh: MeshShape) -> "_Weights":
        shards = mesh.fsdp * mesh.tensor
        parameters = num_parameters(c)
        table = s.vocab * c.width
        embeddings = c.vocab_size * c.width * (1 if c.tie_embeddings else 2)
        layer = (parameters - embeddings - c.width) / c.num_layers / mesh.tensor
        is_cast_back = s.size == 4 and c.dtype == "bfloat16"
        is_copied = c.tie_embeddings or s.size == 2 or mesh.fsdp > 1
        return _Weights(
            trained=(num_factors(c) if c.lora_rank else parameters) * 4 / shards,
            base=parameters / shards,
            layer=layer,
            table=table,
            unembedding=table * (6 if is_cast_back else s.size * is_copied),
            gathered=(2 * layer + table) * s.size if mesh.fsdp > 1 else 0,
            is_cast_back=is_cast_back,
        )


Lengths = tuple[int, int]  # (L, T)


def _sampling(
    s: _Sizes, prompts: int, group_size: int, lengths: Lengths, mesh: MeshShape
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
    prefill = p * length * one_layer * s.size + 8 * p * s.num_heads * length**2
    # All layers' keys and values of the prompts, before they are split by layer.
    prefill += 2 * s.layers * s.kv * p * length * s.size
    return cache, max(decode, prefill - cache)


def _tokens(micro: MicroBatch, lengths: Lengths) -> int:
    """Tokens of a micro-batch: p (L + g T)."""
    return micro.prompts * (lengths[0] + micro.samples * lengths[1])


def _scores(s: _Sizes, micro: MicroBatch, lengths: Lengths) -> tuple[float, float]:
    """float32 bytes of one layer's attention scores of completion tokens: (on their
    completion, on their prompt)."""
    length, t = lengths
    rows = 4 * micro.prompts * micro.samples * s.num_heads * t
    return rows * t, rows * length


def _saved(c: ModelConfig, s: _Sizes, micro: MicroBatch, lengths: Lengths) -> float:
    """Bytes that all layers save for a micro-batch's backward pass, by `c.remat`."""
    per_token = {
        "full": s.width,
        "dots": 2 * s.mlp + s.width + 2 * s.heads + 2 * s.kv,
        "none": 6 * s.mlp + 7 * s.width + 5 * s.heads + 2 * s.kv,
    }[c.remat]
    layer = _tokens(micro, lengths) * per_token * s.size
    if c.remat == "none":
        layer += sum(_scores(s, micro, lengths))
        layer += 8 * micro.prompts * s.num_heads * lengths[0] ** 2  # among prompts
    return s.layers * layer


def _activations(
    c: ModelConfig, s: _Sizes, micro: MicroBatch, lengths: Lengths
) -> float:
    """Bytes at the peak of a micro-batch's backward pass through the layers: what all
    of them save, and one layer's arrays, in its MLP or in its attention."""
    tokens = _tokens(micro, lengths)
    completion, prompt = _scores(s, micro, lengths)
    wide = (6 + (c.lora_rank > 0)) * s.mlp + 7 * s.width + 6 * s.heads + 2 * s.kv
    mlp = completion + prompt + tokens * wide * s.size
    attention = 3.25 * completion + 2.25 * prompt
    attention += tokens * (6 * s.width + 4 * s.heads) * s.size
    layer = attention if c.remat == "none" else max(mlp, attention)
    return _saved(c, s, micro, lengths) + layer


def _logits(
    c: ModelConfig, s: _Sizes, w: _Weights, micro: MicroBatch, lengths: Lengths
) -> float:
    """Bytes at the peak of the loss, beyond the gradients: what the layers save, one
    chunk's logits and their gradient, and of the unembedding its copy, its gradient and
    one chunk's."""
    head = w.unembedding + 2 * _chunk(c, s, micro, lengths)
    head += 2 * 4 * w.table * (not c.lora_rank)
    # The layers' gradients do not exist yet, and the table's is counted above.
    return max(0, _saved(c, s, micro, lengths) + head - w.trained)


def _chunk(c: ModelConfig, s: _Sizes, micro: MicroBatch, lengths: Lengths) -> float:
    """Bytes of one chunk's logits."""
    rows = micro.prompts * micro.samples
    tokens = max(rows, min(512, MAX_LOGITS // c.vocab_size))
    return 4 * min(tokens, rows * lengths[1]) * s.vocab


def _backward(
    c: ModelConfig, s: _Sizes, w: _Weights, micro: MicroBatch, lengths: Lengths
) -> float:
    """Bytes at the peak of a probe's backward pass, beyond the gradients: in the
    layers, or in the loss; beside the unembedding, and its gradient without LoRA."""
    loss = _saved(c, s, micro, lengths) + 2 * _chunk(c, s, micro, lengths)
    head = w.unembedding * (1 if c.lora_rank else 2)
    return head + max(_activations(c, s, micro, lengths), loss)


def _derivatives(
    c: ModelConfig, s: _Sizes, w: _Weights, micro: MicroBatch, lengths: Lengths
) -> float:
    """Bytes of a forward pass with first and second directional derivatives: four of
    each array of one layer, or of one chunk's logits; beside the unembedding, with two
    more along the direction without LoRA."""
    per_token = 3 * s.mlp + 2 * s.width + 2 * s.heads
    layer = _tokens(micro, lengths) * per_token * s.size
    layer += sum(_scores(s, micro, lengths))
    head = w.unembedding * (1 if c.lora_rank else 3)
    return head + 4 * max(layer, _chunk(c, s, micro, lengths))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryInputs:
    """Everything that a run's memory depends on, before micro-batches are derived."""

    model: ModelConfig
    prompts: int
    group_size: int
    prompt_tokens: int
    max_new_tokens: int
    micro_batch_tokens: int
    history: int = 1  # rollouts in an update
    parts: int = 1  # updates of a rollout, each with other prompts
    reference: bool = False
    copies: int = 0  # as `estimate_memory`
    probe_prompts: int = 0  # 0: no instrument
    probe_group: int = 0
    probe_bytes: int = 0
    weightings: int = 0
    evaluation_samples: int = 1
    evaluation_prompts: int = 0  # whose completions are sampled; 0: many
    base_bytes: int = 4
    widened: bool = False
    mesh: MeshConfig = MeshConfig()

    @property
    def updated(self) -> int:
        """Prompts of one update."""
        return max(1, self.history * self.prompts // self.parts)

    def estimate(self) -> Memory:
        """`estimate_memory`, with the micro-batches that the run will derive."""
        split = partial(
            micro_batch,
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.max_new_tokens,
            budget=self.micro_batch_tokens,
        )
        shards = batch_shards(self.updated, self.group_size, self.mesh)
        probe = None
        if self.probe_prompts:
            # One more sample of each prompt: the right answer, if there is only one.
            probe = (
                split(1, self.probe_group // 2 + 1),
                split(self.probe_prompts, self.probe_group + 1),
            )
        completions = self.prompts * self.group_size
        samples = self.evaluation_samples
        asked = self.evaluation_prompts or completions
        return estimate_memory(
            self.model,
            prompts=self.prompts,
            group_size=self.group_size,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            micro=split(self.updated, self.group_size, shards=shards),
            reference=self.reference,
            copies=self.copies + (probe is not None),
            probe=probe,
            probe_bytes=self.probe_bytes if probe else 0,
            probe_parts=num_parts(self.probe_group) if probe else 4,
            weightings=self.weightings,
            evaluated=(prompts_at_a_time(completions, samples, asked), samples),
            updated=self.updated,
            base_bytes=self.base_bytes,
            widened=self.widened,
            mesh=self.mesh,
        )


def readable(count: float, unit: str = "") -> str:
    """1234567 -> '1.23M': three significant digits, decimal prefixes."""
    if count < 1000:
        return f"{count:.0f}{unit}"
    count = float(f"{count:.3g}")  # rounded first: 999,999 is 1.00M
    power = min(4, int(math.log10(count) // 3))
    value = count / 1000**power
    digits = max(0, 2 - int(math.log10(value)))
    return f"{value:.{digits}f}{' kMGT'[power].strip()}{unit}"
