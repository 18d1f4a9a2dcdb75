"""What a run will hold in memory, estimated before anything is allocated."""

import math
from typing import NamedTuple

from grpo_jax.logprobs import MAX_LOGITS
from grpo_jax.models.config import ModelConfig
from grpo_jax.training.step import MicroBatch


def num_parameters(c: ModelConfig) -> int:
    """Of a decoder of that shape, norms and biases included."""
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.width * (2 * heads + 2 * kv) + 3 * c.width * c.mlp_width
    layer += 2 * c.width * (1 + c.post_norms) + 2 * c.head_dim * c.qk_norm
    layer += (heads + 2 * kv) * c.qk_bias + c.width * c.output_bias
    embeddings = c.vocab_size * c.width * (1 if c.tie_embeddings else 2)
    return c.num_layers * layer + embeddings + c.width


def num_factors(c: ModelConfig) -> int:
    """LoRA's trained parameters; 0 without it."""
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sides = {
        "q": c.width + heads, "o": c.width + heads, "k": c.width + kv,
        "v": c.width + kv, "gate": c.width + c.mlp_width, "up": c.width + c.mlp_width,
        "down": c.width + c.mlp_width,
    }  # fmt: skip
    return c.num_layers * c.lora_rank * sum(sides[name] for name in c.lora_targets)


class Memory(NamedTuple):
    """Bytes on the device."""

    state: int  # parameters, Adam's two moments, the reference policy
    cache: int  # keys and values while sampling, and the weights as it reads them
    update: int  # gradients, one micro-batch's activations, one chunk of logits
    look: int = 0  # the instrument's gradients and directions, and the same activations

    @property
    def peak(self) -> int:
        """Sampling, the update and a look do not overlap."""
        return self.state + max(self.cache, self.update, self.look)

    def advice(self) -> str:
        """The settings that make the largest part smaller."""
        parts = {
            self.state: "model.lora_rank trains factors of a frozen base",
            self.cache: "lower sampling.prompts, sampling.group_size or "
            "sampling.max_new_tokens",
            self.update: "lower micro_batch_tokens",
            self.look: "lower instrument.prompts, or switch it off with "
            "instrument.every 0",
        }
        return parts[max(parts)]


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
    looks: bool = False,
    base_bytes: int = 4,
) -> Memory:
    """Bytes from shapes alone: leading terms, good to a few tens of percent.

    Args:
        reference: A reference policy is kept.
        copies: Further copies of the trained parameters that a step holds.
        looks: The instrument is on: 8 copies of them more while it looks, as measured,
            and one beside an update.
        base_bytes: Of each frozen parameter, with LoRA.
    """
    parameters = num_parameters(c)
    size = 4 if c.compute_dtype == "float32" else 2
    cached = prompts * (prompt_tokens + group_size * max_new_tokens)
    cache = 2 * cached * c.num_layers * c.num_kv_heads * c.head_dim * size
    tokens = micro.prompts * (prompt_tokens + micro.samples * max_new_tokens)
    scores = micro.prompts * micro.samples * c.num_heads * max_new_tokens
    scores *= prompt_tokens + max_new_tokens
    wide = 4 * c.width + 4 * c.mlp_width + 4 * c.num_heads * c.head_dim
    kept = {"full": c.width, "dots": wide, "none": 2 * wide}[c.remat]
    layer = tokens * 2 * wide * size + 2 * scores * 4
    stack = c.num_layers * tokens * kept * size
    if c.remat == "none":
        stack += c.num_layers * scores * 4
    rows = micro.prompts * micro.samples
    chunk = max(rows, min(512, MAX_LOGITS // c.vocab_size))
    logits = 3 * 4 * min(chunk, tokens) * c.vocab_size
    work = stack + layer + logits
    trained = num_factors(c) if c.lora_rank else parameters
    frozen = parameters * base_bytes if c.lora_rank else 0
    layers = parameters - c.vocab_size * c.width * (1 if c.tie_embeddings else 2)
    return Memory(
        state=frozen + trained * 4 * ((4 if reference else 3) + copies),
        cache=cache + layers * size,
        update=trained * 4 * (4 + looks) + work,
        look=(trained * 4 * 8 + work) * looks,
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
