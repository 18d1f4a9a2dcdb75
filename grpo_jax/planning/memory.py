"""What a run will hold in memory, estimated before anything is allocated."""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

from grpo_jax.logprobs import MAX_LOGITS
from grpo_jax.models.config import ModelConfig, num_factors, num_parameters
from grpo_jax.parallel.sharding import MeshShape, batch_shards
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.runs.config import MeshConfig


class Memory(NamedTuple):
    """Bytes on one device: what is always held, then what each phase adds to it.

    A phase's peak is what `memory_analysis` of its program says, argument + output -
    alias + temp, and what is held without being an argument of it.
    """

    # Held from the first step to the last.
    parameters: int  # trained ones, float32
    optimizer: int  # Adam's two moments
    reference: int  # the reference policy
    frozen: int  # the base that LoRA leaves as it is
    # Sampling.
    cache: int  # keys and values of prompts and completions
    sampler_weights: int  # laid out for a loop over tokens, in the compute dtype
    sampler_logits: int  # of one token of every completion, and what a layer makes
    evaluation: int  # all three, of as many prompts as a step has completions
    # An update: the larger of the last two is held with neither of the two before.
    update_copies: int  # of parameters: where the gradient is taken, before a look
    gradients: int  # summed, and of one micro-batch
    activations: int  # kept by the layers of a micro-batch, and those of one layer
    logits: int  # of one chunk, and the unembedding's copy and gradient
    optimizing: int  # gradient, both new moments and the change
    # The instrument.
    look: int = 0  # gradients, directions, sums of gradients, activations
    counterfactual: int = 0  # gradient and change under every weighting

    @property
    def state(self) -> int:
        """Held from the first step to the last."""
        return self.parameters + self.optimizer + self.reference + self.frozen

    def phases(self) -> dict[str, int]:
        """Name -> bytes beside `state`; phases do not overlap."""
        layers = self.gradients + max(self.activations, self.logits)
        return {
            "sampling": self.cache + self.sampler_weights + self.sampler_logits,
            "evaluation": self.evaluation,
            "update": self.update_copies + max(self.optimizing, layers),
            "look": self.look,
            "counterfactual": self.counterfactual,
        }

    def largest(self) -> str:
        """The phase with the peak."""
        phases = self.phases()
        return max(phases, key=phases.__getitem__)

    @property
    def peak(self) -> int:
        return self.state + max(self.phases().values())

    def advice(self) -> str:
        """The settings that make the largest part smaller."""
        phase = self.largest()
        work = self.phases()[phase]
        if phase == "update" and self.optimizing + self.update_copies == work:
            work, phase = 0, "state"  # made of the same parameters
        if self.state >= work:
            phase = "state"
        return {
            "state": "model.lora_rank trains factors of a frozen base",
            "sampling": "lower sampling.prompts, sampling.group_size or "
            "sampling.max_new_tokens",
            "evaluation": "lower sampling.prompts or sampling.group_size, whose "
            "product is evaluated at a time",
            "update": "lower micro_batch_tokens",
            "look": "lower instrument.prompts, or switch it off with "
            "instrument.every 0",
            "counterfactual": "switch it off with instrument.counterfactual_every 0",
        }[phase]


class _Shape(NamedTuple):
    """A model's sizes on one of the devices that it is cut over."""

    layers: int
    width: int
    mlp: float
    heads: float  # x head_dim
    kv: float  # x head_dim
    num_heads: float
    vocab: float
    size: int  # bytes of the compute dtype

    @staticmethod
    def of(c: ModelConfig, tensor_ways: int, widened: bool) -> "_Shape":
        n = tensor_ways
        return _Shape(
            c.num_layers,
            c.width,
            c.mlp_width / n,
            c.num_heads * c.head_dim / n,
            c.num_kv_heads * c.head_dim / max(1, min(n, c.num_kv_heads)),
            c.num_heads / n,
            c.vocab_size / n,
            4 if widened or c.compute_dtype == "float32" else 2,
        )


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
    weightings: int = 0,
    evaluated: tuple[int, int] | None = None,
    updated: int | None = None,
    base_bytes: int = 4,
    widened: bool = False,
    mesh: MeshShape = MeshConfig(),  # noqa: B008  (frozen)
) -> Memory:
    """Bytes on each device, from shapes alone.

    The counts of arrays are those that XLA holds at its peak on a CPU; a test compares
    the sums with `memory_analysis`, within 15 %.

    Args:
        micro: The split of an update, over all devices together, with their shards.
        reference: A reference policy is kept.
        copies: Of the trained parameters that an update holds besides.
        probe: Micro-batches of one probe prompt's half, and of all of them along an
            update; None: no instrument.
        probe_bytes: Sums of gradients that a look holds.
        weightings: That a counterfactual step compares; 0: none.
        evaluated: (prompts, samples of each) evaluated at a time; None: none.
        updated: Prompts of one update, where they are not `prompts`.
        base_bytes: Of each frozen parameter, with LoRA.
        widened: bfloat16 is computed in float32, as XLA does on a CPU.
        mesh: Parameters, moments and gradients are cut over fsdp, gathered layer by
            layer; prompts, or the samples of each, over data and fsdp; heads, the MLP
            and the vocabulary over tensor.
    """
    s = _Shape.of(c, mesh.tensor, widened)
    cut = mesh.fsdp * mesh.tensor
    parameters = num_parameters(c)
    trained = (num_factors(c) if c.lora_rank else parameters) * 4 / cut
    table = s.vocab * c.width  # a whole [V, D] on one device
    embedded = c.vocab_size * c.width * (1 if c.tie_embeddings else 2)
    layer = (parameters - embedded - c.width) / c.num_layers / mesh.tensor  # one's
    # Two layers, and the table of the embedding.
    gathered = (2 * layer + table) * s.size if mesh.fsdp > 1 else 0
    copied = c.tie_embeddings or s.size == 2 or mesh.fsdp > 1
    both = s.size == 4 and c.compute_dtype == "bfloat16"  # and its float32 twin
    unembedding = table * (6 if both else s.size * copied)
    own_micro = MicroBatch(*micro.on_device)
    length, t = prompt_tokens, max_new_tokens

    def sampling(p, g):
        """(cache, logits and a layer's) of p prompts, g samples each."""
        shards = batch_shards(p, g, mesh)
        p, g = p // shards[0], g // shards[1]
        cache = 2 * s.layers * s.kv * p * (length + g * t) * s.size
        rows = p * g
        decoding = 4 * rows * (2 * s.vocab + 2 * s.mlp + s.num_heads * (length + t))
        made = 3 * s.mlp + 3 * c.width + 2 * s.heads
        prefill = p * length * made * s.size + 8 * p * s.num_heads * length**2
        prefill += 2 * s.layers * s.kv * p * length * s.size  # before it is unstacked
        return cache, max(decoding, prefill - cache)

    cache, sampler_logits = sampling(prompts, group_size)
    weights = s.layers * layer * s.size + unembedding
    evaluation = 0
    if evaluated:
        evaluation = weights + sum(sampling(*evaluated))

    activations = _activations(c, s, own_micro, length, t)
    stack = _kept(c, s, own_micro, length, t)
    rows = own_micro.prompts * own_micro.samples
    chunk = min(max(rows, min(512, MAX_LOGITS // c.vocab_size)), rows * t)
    head = unembedding + 2 * 4 * chunk * s.vocab
    head += 2 * 4 * table * (not c.lora_rank)  # its gradient, and one chunk's
    split = (micro.prompts, micro.samples) != (updated or prompts, group_size)
    gradients = trained * (1 + split)
    look = counterfactual = 0.0
    if probe is not None:
        work = (_activations(c, s, probe[0], length, t), _along(s, probe[0], length, t))
        look = 6 * trained + probe_bytes + max(work)
        look = gathered + max(look, 2 * trained + _along(s, probe[1], length, t))
    if weightings:
        beside = 2 * trained + activations, trained + _along(s, own_micro, length, t)
        counterfactual = 2 * weightings * trained + max(beside) + gathered
    return Memory(
        parameters=round(trained),
        optimizer=round(2 * trained),
        reference=round(trained * reference),
        frozen=round(parameters * base_bytes / cut if c.lora_rank else 0),
        cache=round(cache),
        sampler_weights=round(weights),
        sampler_logits=round(sampler_logits),
        evaluation=round(evaluation),
        update_copies=round(trained * copies),
        gradients=round(gradients),
        activations=round(activations + gathered + unembedding * both),
        # The gradients of layers do not exist yet, that of the table is in `head`.
        logits=round(max(0, stack + head - trained)),
        optimizing=round(4 * trained),
        look=round(look),
        counterfactual=round(counterfactual),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryInputs:
    """All that a run's memory depends on, the micro-batch not yet derived."""

    model: ModelConfig
    prompts: int
    group_size: int
    prompt_tokens: int
    max_new_tokens: int
    micro_batch_tokens: int
    history: int = 1  # iterates in an update
    parts: int = 1  # that a rollout is cut in, an update each
    reference: bool = False
    copies: int = 0  # as `estimate_memory`
    probe_prompts: int = 0  # 0: no instrument
    probe_group: int = 0
    probe_bytes: int = 0
    weightings: int = 0
    evaluation_samples: int = 1
    base_bytes: int = 4
    widened: bool = False
    mesh: MeshConfig = MeshConfig()

    @property
    def updated(self) -> int:
        """Prompts of one update."""
        return max(1, self.history * self.prompts // self.parts)

    def estimate(self) -> Memory:
        """`estimate_memory`, with the micro-batches that the run will derive."""
        c, g, t = self.model, self.group_size, self.max_new_tokens
        budget = self.micro_batch_tokens
        shards = batch_shards(self.updated, g, self.mesh)
        micro = micro_batch(self.updated, g, self.prompt_tokens, t, budget, shards)
        probe = None
        if self.probe_prompts:
            size = partial(
                micro_batch,
                prompt_tokens=self.prompt_tokens,
                max_tokens=t,
                budget=budget,
            )
            # One more sample of each: the answer, where it is known.
            group = self.probe_group
            probe = size(1, group // 2 + 1), size(self.probe_prompts, group + 1)
        return estimate_memory(
            c,
            prompts=self.prompts,
            group_size=g,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=t,
            micro=micro,
            reference=self.reference,
            copies=self.copies + (probe is not None),
            probe=probe,
            probe_bytes=self.probe_bytes if probe else 0,
            weightings=self.weightings,
            evaluated=(
                max(1, self.prompts * g // self.evaluation_samples),
                self.evaluation_samples,
            ),
            updated=self.updated,
            base_bytes=self.base_bytes,
            widened=self.widened,
            mesh=self.mesh,
        )


def _tokens(micro, length, t):
    """(of completions, of prompts) in a micro-batch."""
    return micro.prompts * micro.samples * t, micro.prompts * length


def _scores(s, micro, length, t):
    """float32 bytes of attention scores: (completions' own, to prompts)."""
    rows = 4 * micro.prompts * micro.samples * s.num_heads * t
    return rows * t, rows * length


def _kept(c: ModelConfig, s: _Shape, micro: MicroBatch, length: int, t: int) -> float:
    """Bytes that a micro-batch's layers keep for their backward passes."""
    own, prompt = _tokens(micro, length, t)
    wide = {
        "full": s.width,
        "dots": 2 * s.mlp + s.width + 2 * s.heads + 2 * s.kv,
        "none": 6 * s.mlp + 7 * s.width + 5 * s.heads + 2 * s.kv,
    }[c.remat]
    kept = (own + prompt) * wide * s.size
    if c.remat == "none":
        kept += sum(_scores(s, micro, length, t))
        kept += 8 * micro.prompts * s.num_heads * length**2
    return s.layers * kept


def _activations(
    c: ModelConfig, s: _Shape, micro: MicroBatch, length: int, t: int
) -> float:
    """Bytes at the peak of a micro-batch's backward pass through the layers: what they
    keep, and one layer's, in its MLP or in its attention."""
    own, prompt = _tokens(micro, length, t)
    own_scores, prompt_scores = _scores(s, micro, length, t)
    wide = (6 + (c.lora_rank > 0)) * s.mlp + 7 * s.width + 6 * s.heads + 2 * s.kv
    mlp = own_scores + prompt_scores + (own + prompt) * wide * s.size
    narrow = 6 * s.width + 4 * s.heads
    attention = 3.25 * own_scores + 2.25 * prompt_scores
    attention += (own + prompt) * narrow * s.size
    work = attention if c.remat == "none" else max(mlp, attention)
    return _kept(c, s, micro, length, t) + work


def _along(s: _Shape, micro: MicroBatch, length: int, t: int) -> float:
    """Bytes of one layer with first and second derivatives, run forward: four of each
    array."""
    tokens = sum(_tokens(micro, length, t))
    wide = tokens * (3 * s.mlp + 2 * s.width + 2 * s.heads) * s.size
    return 4 * (wide + sum(_scores(s, micro, length, t)))


def readable(count: float, unit: str = "") -> str:
    """1234567 -> '1.23M': three significant digits, decimal prefixes."""
    if count < 1000:
        return f"{count:.0f}{unit}"
    count = float(f"{count:.3g}")  # rounded first: 999,999 is 1.00M
    power = min(4, int(math.log10(count) // 3))
    value = count / 1000**power
    digits = max(0, 2 - int(math.log10(value)))
    return f"{value:.{digits}f}{' kMGT'[power].strip()}{unit}"
