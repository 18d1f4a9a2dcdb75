"""What a run will hold in memory, estimated from shapes before anything is allocated.

The formulas count the arrays that are alive at a program's peak, as XLA keeps them on a
CPU or on what `compiling_for` names. L prompt tokens and T completion tokens are padded
lengths.
"""

import dataclasses
import math
from typing import NamedTuple

from grpo_jax.diagnostics.probe import num_parts
from grpo_jax.evaluation.sampled import prompts_at_a_time
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.tree import of_all_modes
from grpo_jax.parallel.sharding import MeshShape, batch_shards
from grpo_jax.planning.arrays import (
    Sizes,
    Weights,
    of_activations,
    of_derivatives,
    of_logits,
    of_look,
    of_sampling,
    of_scoring,
    of_widened_base,
)
from grpo_jax.planning.optimizer import optimizer_bytes, optimizing_copies
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.runs.config import MeshConfig
from grpo_jax.runs.optimizers import OptimizerConfig


class Memory(NamedTuple):
    """Bytes on one device: the persistent state, and what each phase adds to it.

        peak      = state + max(phases)
        state     = parameters + optimizer + reference + frozen
        sampling  = cache + sampler_weights + sampler_logits
        scoring   = reference, from the host, and a forward pass; 0 where it is in
                    the state
        update    = update_copies
                    + max(optimizing, gradients + max(activations, logits))

    A phase's peak is what `memory_analysis` of its program says (argument + output -
    alias + temp) plus the part of the state that is no argument of it. Field names are
    those of `grpo-jax plan --json`.
    """

    # State: allocated from the first step to the last.
    parameters: int  # trained ones, float32
    optimizer: int  # its state: of AdamW two moments
    reference: int  # the reference policy; 0 if on the host
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
    optimizing: int  # gradient, change, new moments and parameters
    # Instrument.
    look: int = 0  # a probe measurement: gradients, directions, sums, activations
    counterfactual: int = 0  # gradient and change under every weighting
    # A reference policy on the host.
    scoring: int = 0  # its copy on the device while it scores, and a forward pass
    host: int = 0  # of the host's memory, for each device; in no sum

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
            "scoring": self.scoring,
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
    "state": "model.lora_rank trains factors of a frozen base; optimizer.name lion "
    "or adafactor keeps fewer moments",
    "sampling": "lower sampling.prompts, sampling.group_size or "
    "sampling.max_new_tokens",
    "evaluation": "lower sampling.prompts or sampling.group_size, whose "
    "product is evaluated at a time",
    "scoring": "lower micro_batch_tokens",
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
    reference_memory: str = "device",
    copies: int = 0,
    probe: tuple[MicroBatch, MicroBatch] | None = None,
    probe_bytes: int = 0,
    probe_parts: int = 4,
    weightings: int = 0,
    evaluated: tuple[int, int] | None = None,
    updated: int | None = None,
    base_bytes: int = 4,
    widened: bool = False,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  (frozen)
    mesh: MeshShape = MeshConfig(),  # noqa: B008  (frozen)
) -> Memory:
    """Bytes on each device, from shapes alone; within 15 % of `memory_analysis` on the
    shapes that a test compares.

    Args:
        micro: The split of an update over all devices together, with its shards.
        reference: A reference policy is kept.
        reference_memory: Where: one of `MEMORIES`.
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
    modes = _of_instrument(c)
    s = Sizes.of(c, mesh.tensor, widened)
    w = Weights.of(c, s, mesh)
    widened_base = of_widened_base(c, w, base_bytes, widened)
    lengths = prompt_tokens, max_new_tokens
    local = MicroBatch(*micro.on_device)
    cache, sampler_logits = of_sampling(c, s, prompts, group_size, lengths, mesh)
    sampler_weights = s.layers * w.layer * s.size + w.unembedding + widened_base
    evaluation = 0.0
    if evaluated is not None:
        evaluation = sampler_weights + sum(of_sampling(c, s, *evaluated, lengths, mesh))
    activations = of_activations(c, s, local, lengths)
    activations += w.layers_copy * (base_bytes == 4)
    is_split = (micro.prompts, micro.samples) != (updated or prompts, group_size)
    look = counterfactual = 0.0
    if probe is not None:
        half, everything = probe
        look = widened_base + max(
            of_look(modes, s, w, half, lengths, probe_parts, probe_bytes),
            w.gathered
            + 2 * w.trained
            + of_derivatives(modes, s, w, everything, lengths, not c.lora_rank),
        )
    if weightings:
        # Per weighting its gradient and its change; then one of them is followed.
        beside = (
            2 * w.trained + activations,
            w.trained + of_derivatives(modes, s, w, local, lengths, not c.lora_rank),
        )
        counterfactual = 2 * weightings * w.trained + max(beside) + w.gathered
        counterfactual += widened_base
    kept = round(w.trained * reference)
    on_host = reference_memory == "host"
    scoring = 0.0
    if kept and on_host:
        scoring = kept + of_scoring(c, s, w, local, lengths, mesh)
    return Memory(
        parameters=round(w.trained),
        optimizer=round(optimizer_bytes(c, optimizer, mesh, w.trained)),
        reference=0 if on_host else kept,
        frozen=round(w.base * base_bytes if c.lora_rank else 0),
        cache=round(cache),
        sampler_weights=round(sampler_weights),
        sampler_logits=round(sampler_logits),
        evaluation=round(evaluation),
        update_copies=round(w.trained * copies + widened_base),
        gradients=round(w.trained * (1 + is_split)),
        activations=round(activations + w.gathered + w.unembedding * w.is_cast_back),
        logits=round(of_logits(c, s, w, local, lengths)),
        optimizing=round(optimizing_copies(optimizer) * w.trained),
        look=round(look),
        counterfactual=round(counterfactual),
        scoring=round(scoring),
        host=kept if on_host else 0,
    )


def _of_instrument(c: ModelConfig) -> ModelConfig:
    """As the instrument computes it, which needs forward mode."""
    return dataclasses.replace(c, attention=of_all_modes(c.attention, c.head_dim))


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
    reference_memory: str = "device"
    copies: int = 0  # as `estimate_memory`
    probe_prompts: int = 0  # 0: no instrument
    probe_group: int = 0
    probe_bytes: int = 0
    weightings: int = 0
    evaluation_samples: int = 1
    evaluation_prompts: int = 0  # whose completions are sampled; 0: many
    base_bytes: int = 4
    widened: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def updated(self) -> int:
        """Prompts of one update."""
        return max(1, self.history * self.prompts // self.parts)

    @property
    def micro(self) -> MicroBatch:
        """The micro-batch of an update at the longest completions."""
        shards = batch_shards(self.updated, self.group_size, self.mesh)
        return self._split(self.updated, self.group_size, shards)

    def _split(
        self, prompts: int, samples: int, shards: tuple[int, int] | None = None
    ) -> MicroBatch:
        sizes = self.prompt_tokens, self.max_new_tokens, self.micro_batch_tokens
        return micro_batch(prompts, samples, *sizes, shards)

    def estimate(self) -> Memory:
        """`estimate_memory`, with the micro-batches that the run will derive."""
        probe = None
        if self.probe_prompts:
            # One more sample of each prompt: the right answer, if there is only one.
            probe = (
                self._split(1, self.probe_group // 2 + 1),
                self._split(self.probe_prompts, self.probe_group + 1),
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
            micro=self.micro,
            reference=self.reference,
            reference_memory=self.reference_memory,
            copies=self.copies + (probe is not None),
            probe=probe,
            probe_bytes=self.probe_bytes if probe else 0,
            probe_parts=num_parts(self.probe_group) if probe else 4,
            weightings=self.weightings,
            evaluated=(prompts_at_a_time(completions, samples, asked), samples),
            updated=self.updated,
            base_bytes=self.base_bytes,
            widened=self.widened,
            optimizer=self.optimizer,
            mesh=self.mesh,
        )


def estimate_look(
    c: ModelConfig,
    *,
    group_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    micro_batch_tokens: int,
    sums: int,
    base_bytes: int,
    widened: bool,
    layers: int | None = None,
) -> int:
    """Bytes of a measurement of prompts that are there, on top of the policy's, on one
    device; arguments as `estimate_memory` and `MemoryInputs`.

    Args:
        sums: Bytes of the gradients of all prompts, as they are kept.
        layers: Gradients are those of so many last layers; None: of all trained
            parameters.
    """
    modes = _of_instrument(c)
    s = Sizes.of(c, 1, widened)
    w = Weights.of(c, s, MeshConfig())
    half = micro_batch(
        1, group_size // 2, prompt_tokens, max_new_tokens, micro_batch_tokens
    )
    widened_base = of_widened_base(c, w, base_bytes, widened)
    lengths = prompt_tokens, max_new_tokens
    parts = num_parts(group_size)
    return round(
        widened_base + of_look(modes, s, w, half, lengths, parts, sums, layers)
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
