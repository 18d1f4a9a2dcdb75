"""The shape of a decoder: one frozen record that checks itself."""

import dataclasses
from typing import Annotated, Literal

from grpo_jax.records import Dtype, Record

# Fields of how a model is computed, not of what it is.
COMPUTATION = ("compute_dtype", "remat", "attention")
LINEAR_MAPS = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Record):
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, gated MLP.

    The fields are independent of each other. Together they cover Qwen2 and 2.5, Qwen3,
    Llama 3, Gemma 2 and the text models of Gemma 3.
    """

    vocab_size: int = 0  # tokens; 0 in a run's config: taken from the tokenizer
    num_layers: int = 2
    width: int = 64  # D, of the residual stream
    mlp_width: int = 172  # of the gate and up projections
    num_heads: int = 4  # query heads
    num_kv_heads: int = 4  # key/value heads; divides num_heads
    head_dim: int = 16  # even, for RoPE
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    # How RoPE is stretched to contexts longer than the original: not at all, all
    # wavelengths by rope_factor, or (Llama 3) only those of slow rotations.
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0  # wavelengths are multiplied by this
    rope_original_length: int = 8192  # llama3: tokens of the original context
    # llama3: at most this many turns in the original context: stretched by rope_factor
    rope_slow_turns: float = 1.0
    # llama3: at least this many turns: not stretched
    rope_fast_turns: float = 4.0
    # rope_theta of sliding layers, never scaled (Gemma 3); None: as in other layers
    rope_local_theta: float | None = None
    sliding_window: int | None = None  # tokens a sliding layer sees, query included
    sliding_layers: tuple[int, ...] = ()  # indices of the layers that slide
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the MLP's gate
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    norm_offset: bool = False  # RMSNorm multiplies by 1 + its weight (Gemma)
    post_norms: bool = False  # RMSNorm after attention and after the MLP too (Gemma)
    qk_bias: bool = False  # biases on the query, key and value projections (Qwen2)
    output_bias: bool = False  # a bias on attention's output projection
    qk_norm: bool = False  # RMSNorm over each head's query and key (Qwen3, Gemma 3)
    # Attention scores are divided by the root of this; None: head_dim (Gemma)
    query_scale: int | None = None
    # Scores or logits x become cap * tanh(x / cap) (Gemma 2); None: not capped
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embedding: bool = False  # embeddings are multiplied by sqrt(width) (Gemma)
    tie_embeddings: bool = True  # the unembedding is the embedding's transpose
    # LoRA: 0 trains every parameter, else low-rank factors of this rank beside the
    # targets' kernels, which are frozen
    lora_rank: int = 0
    lora_alpha: float = 16.0  # the factors' product is multiplied by lora_alpha / rank
    lora_targets: tuple[str, ...] = LINEAR_MAPS
    max_positions: int = 32_768  # written into an exported config; not a limit here
    # Of the layers; log-probs and statistics are float32, and so are parameters,
    # unless they were loaded as bfloat16. None: float32, but bfloat16 on accelerators
    # for a pretrained model that is stored in it
    compute_dtype: Annotated[Literal["float32", "bfloat16"], Dtype()] | None = None
    # How attention over long sequences is computed: all scores at once (dense), block
    # by block (blocks), or by a kernel for TPUs and GPUs (flash; no forward mode). None
    # of a short sequence's is; auto: flash where there is a kernel, else blocks
    attention: Literal["auto", "dense", "blocks", "flash"] = "auto"
    # What a layer saves for its backward pass: everything, matmul results, nothing (but
    # attention's output where that was computed block by block).
    remat: Literal["none", "dots", "full"] = "full"

    def __post_init__(self):
        super().__post_init__()
        self._check_sizes()
        self._check_positive()
        self._check_windows()
        self._check_lora()

    @property
    def dtype(self) -> str:
        """What the layers compute in, where nothing else was chosen before."""
        return self.compute_dtype or "float32"

    def _check_sizes(self) -> None:
        at_least_one = (
            "num_layers", "width", "mlp_width", "num_heads", "num_kv_heads",
            "head_dim", "rope_original_length", "sliding_window", "max_positions",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads={self.num_heads}, "
                f"got {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}.")

    def _check_positive(self) -> None:
        positive = (
            "rope_theta", "rope_local_theta", "rope_factor", "rope_slow_turns",
            "norm_eps", "lora_alpha", "query_scale", "attention_softcap",
            "logit_softcap",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if not self.rope_fast_turns > self.rope_slow_turns:
            raise ValueError(
                f"rope_fast_turns must be more than rope_slow_turns="
                f"{self.rope_slow_turns}, got {self.rope_fast_turns}."
            )

    def _check_windows(self) -> None:
        outside = [i for i in self.sliding_layers if not 0 <= i < self.num_layers]
        if outside or len({*self.sliding_layers}) != len(self.sliding_layers):
            raise ValueError(
                "sliding_layers must be different layers of "
                f"0 to {self.num_layers - 1}, got {self.sliding_layers}."
            )
        if self.sliding_layers and self.sliding_window is None:
            raise ValueError(
                f"sliding_window must be given where layers slide, got None with "
                f"sliding_layers={self.sliding_layers}."
            )

    def _check_lora(self) -> None:
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}.")
        unknown = [name for name in self.lora_targets if name not in LINEAR_MAPS]
        if unknown or len({*self.lora_targets}) != len(self.lora_targets):
            raise ValueError(
                f"lora_targets must be different ones of {', '.join(LINEAR_MAPS)}, "
                f"got {self.lora_targets}."
            )
        if self.lora_rank and not self.lora_targets:
            raise ValueError("lora_targets must name at least one map, got none.")


def linear_sizes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear map of a layer, by its name in LINEAR_MAPS."""
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "q": (c.width, heads),
        "k": (c.width, kv),
        "v": (c.width, kv),
        "o": (heads, c.width),
        "gate": (c.width, c.mlp_width),
        "up": (c.width, c.mlp_width),
        "down": (c.mlp_width, c.width),
    }


def num_parameters(c: ModelConfig) -> int:
    """Parameters of a decoder, norms and biases included, LoRA factors not."""
    sizes = linear_sizes(c)
    layer = sum(inputs * outputs for inputs, outputs in sizes.values())
    layer += 2 * c.width * (1 + c.post_norms) + 2 * c.head_dim * c.qk_norm
    layer += sum(sizes[name][1] for name in "qkv") * c.qk_bias
    layer += sizes["o"][1] * c.output_bias
    embeddings = c.vocab_size * c.width * (1 if c.tie_embeddings else 2)
    return c.num_layers * layer + embeddings + c.width


def num_factors(c: ModelConfig) -> int:
    """Parameters of the LoRA factors; 0 without LoRA."""
    sizes = linear_sizes(c)
    return c.num_layers * c.lora_rank * sum(sum(sizes[n]) for n in c.lora_targets)
