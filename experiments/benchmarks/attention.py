"""Time and memory of an update by the length of completions and the attention.

The shape of step.py with 4 prompts x 8 samples; completions are random tokens. For each
length the programs are alternated and medians compared. The floor is the update's own
arithmetic, three times the forward pass with half the scores of a square, at the
machine's matmul peak.

    python experiments/benchmarks/attention.py [--lengths 128 512 2048] [--repeats 3]

Figures are in BUILD_NOTES.md.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from shape import Shape, make_step, model_config
from step import Config as Model
from step import matmul_peak

import grpo_jax as gj
from grpo_jax.models.config import num_parameters
from grpo_jax.training.state import Batch


@dataclasses.dataclass(frozen=True)
class Config:
    lengths: tuple[int, ...] = (128, 512, 2048)
    attention: tuple[str, ...] = ("dense", "auto")
    prompts: int = 4
    group_size: int = 8
    prompt_tokens: int = 64
    micro_batch_tokens: int = 16384  # a run's default
    repeats: int = 3


def floor(c: Config, length: int) -> float:
    """Operations of an update's products."""
    model = model_config(Model())
    tokens = c.prompts * (c.prompt_tokens + c.group_size * length)
    seen = c.prompts * c.group_size * length * (c.prompt_tokens + length / 2)
    seen += c.prompts * c.prompt_tokens**2 / 2
    scores = 4 * model.num_layers * model.num_heads * model.head_dim * seen
    return 3 * (2 * num_parameters(model) * tokens + scores)


def batch_of(c: Config, made: Any, length: int) -> Batch:
    rng = np.random.default_rng(0)
    p, g, vocab = c.prompts, c.group_size, Model().vocab
    prompts = rng.integers(3, vocab, (p, c.prompt_tokens), dtype=np.int32)
    completions = rng.integers(3, vocab, (p, g, length), dtype=np.int32)
    rewards = jnp.asarray(rng.random((p, g)) < 0.5, jnp.float32)
    logprobs = jnp.full((p, g, length), -np.log(vocab), jnp.float32)
    rollouts = gj.Rollouts(
        prompts, np.ones_like(prompts), completions, np.ones_like(completions), logprobs
    )
    weights = made.rule.weights(rewards, ())[0]
    return Batch(rollouts._replace(rewards=rewards), rewards, weights)


def main(c: Config) -> None:
    peak = matmul_peak("float32", 2048)
    print(f"matmul peak {peak / 1e9:.0f} GFLOP/s")
    for length in c.lengths:
        shape = Shape(c.prompts, c.group_size, c.prompt_tokens, length)
        programs = {}
        for attention in c.attention:
            model = model_config(Model(), qk_bias=True, attention=attention)
            policy = gj.init_policy(model, jax.random.key(0))
            made = make_step(policy, "dr_grpo", shape, c.micro_batch_tokens)
            batch = jax.tree.map(jnp.asarray, batch_of(c, made, length))
            state = made.init(policy.params)
            compiled = jax.jit(made.update).lower(state, batch).compile()
            programs[attention] = (compiled, state, batch)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(c.repeats):
            for name, (compiled, state, batch) in programs.items():
                began = time.perf_counter()
                jax.block_until_ready(compiled(state, batch))
                seconds[name].append(time.perf_counter() - began)
        tokens = c.prompts * c.group_size * length
        for name, (compiled, _, _) in programs.items():
            median = statistics.median(seconds[name])
            memory = compiled.memory_analysis().temp_size_in_bytes
            print(
                f"T {length:5} {name:6} {median:8.2f} s, "
                f"{1e6 * median / tokens:6.0f} us a token, "
                f"{median * peak / floor(c, length):.2f} times the floor of "
                f"{floor(c, length) / peak:.2f} s, {memory / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Config))
