"""The shape of a decoder: one frozen record, no behaviour but its own checks."""

import dataclasses
from typing import Literal

from grpo_jax.errors import check_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    vocab_size: int = 0  # tokens; 0 in a run's config: taken from the tokenizer
    num_layers: int = 2
    width: int = 64  # D, of the residual stream
    mlp_width: int = 172  # of the gate and up projections
    num_heads: int = 4  # query heads
    num_kv_heads: int = 4  # key/value heads; divides num_heads
    head_dim: int = 16  # even, for RoPE
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    qk_bias: bool = False  # biases on the query, key and value projections (Qwen2)
    qk_norm: bool = False  # RMSNorm over each head's query and key (Qwen3)
    tie_embeddings: bool = True  # the unembedding is the embedding's transpose
    # What the layers compute in; parameters, log-probs and statistics stay float32.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # What a layer keeps for its backward pass: everything, the matmul results, nothing.
    remat: Literal["none", "dots", "full"] = "full"

    def __post_init__(self):
        positive = (
            "num_layers", "width", "mlp_width", "num_heads", "num_kv_heads", "head_dim"
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads={self.num_heads}, "
                f"got {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}.")
        for name, choices in (
            ("compute_dtype", ("float32", "bfloat16")),
            ("remat", ("none", "dots", "full")),
        ):
            check_choice(name, getattr(self, name), choices)
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
