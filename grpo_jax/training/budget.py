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


class Memory(NamedTuple):
    """Bytes on the device."""

    state: int  # parameters, Adam's two moments, the reference policy
    cache: int  # keys and values while sampling
    update: int  # gradients, one micro-batch's activations, one chunk of logits
    look: int = 0  # the instrument's gradients and directions, and the same activations

    @property
    def peak(self) -> int:
        """Sampling, the update and a look do not overlap."""
        return self.state + max(self.cache, self.update, self.look)


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
) -> Memory:
    """Bytes from shapes alone: leading terms, good to a few tens of percent.

    Args:
        reference: A reference policy is kept.
        copies: Further copies of the parameters that a step holds.
        looks: The instrument is on: 8 copies of the parameters more while it looks, as
            measured, and one beside an update.
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
    return Memory(
        state=parameters * 4 * ((4 if reference else 3) + copies),
        cache=cache,
        update=parameters * 4 * (2 + looks) + work,
        look=(parameters * 4 * 8 + work) * looks,
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
