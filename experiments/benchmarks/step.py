"""Time of one GRPO step: sample and update, against the machine's own matmul peak.

Shape of work (the defaults): a Qwen2-style decoder, 6 layers, width 256, MLP 688, 4
heads of 64, 2 KV heads, tied vocabulary of 2,048, float32; 8 prompts x 8 samples, 64
prompt and 128 sampled tokens, no early stop, one AdamW update per rollout, no KL.

    python experiments/benchmarks/step.py [--json] [--steps 6] [--remat none]

Figures are in BUILD_NOTES.md. Compare programs only within one run: alternate them and
take medians.
"""

import dataclasses
import json
import resource
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from shape import Shape, TrainStep, make_step, model_config, one_step

import grpo_jax as gj
from grpo_jax.models.config import num_parameters
from grpo_jax.models.policy import Policy


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 6  # timed, after one that compiles
    prompts: int = 8
    group_size: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 128
    layers: int = 6
    width: int = 256
    mlp_width: int = 688
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 2048
    compute_dtype: str = "float32"
    remat: str = "full"
    micro_batch_tokens: int = 2304  # 2 prompts of the default shape
    objective: str = "grpo"
    json: bool = False  # end with one line of JSON


def matmul_peak(dtype: str, size: int) -> float:
    """FLOP/s of a square product, the best of several."""
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def arithmetic(c: Config, model: gj.ModelConfig) -> tuple[float, float]:
    """(sampling, training) FLOP with the prompt encoded once per group.

    2 per weight and token forward, 6 with the backward pass; attention included,
    recomputation not.
    """
    dense = num_parameters(model) - model.vocab_size * model.width
    head = model.vocab_size * model.width
    prompt = c.prompts * c.prompt_tokens
    new = c.prompts * c.group_size * c.new_tokens
    pairs = new * (c.prompt_tokens + c.new_tokens / 2) + prompt * c.prompt_tokens / 2
    attention = 2 * c.layers * pairs * c.heads * c.head_dim
    forward = 2 * (dense * (prompt + new) + head * new + attention)
    return forward, 3 * forward


class StepTimes(NamedTuple):
    sample_s: float
    update_s: float


class Timings(NamedTuple):
    first_step_s: float  # compilation included
    steps: list[StepTimes]
    mismatch: float  # largest |log-prob of the trainer - of the sampler|, last step


def time_steps(c: Config, policy: Policy, made: TrainStep) -> Timings:
    """Times of one step that compiles and of `steps` more, on random rewards."""
    update = jax.jit(made.update, donate_argnums=0)
    rng = np.random.default_rng(0)
    prompts = rng.integers(
        3, c.vocab, size=(c.prompts, c.prompt_tokens), dtype=np.int32
    )
    rewards = jnp.asarray(rng.random((c.prompts, c.group_size)) < 0.5, jnp.float32)

    state, times = made.init(policy.params), []
    for i in range(c.steps + 1):
        before = jax.tree.map(jnp.copy, state.params)
        state, rollouts, (began, sampled, ended) = one_step(
            policy, made, update, state, prompts, rewards, i,
            new_tokens=c.new_tokens, now=time.perf_counter,
        )  # fmt: skip
        times.append(StepTimes(sampled - began, ended - sampled))
    scored = jax.jit(gj.completion_logprobs)(policy.replace(before), rollouts)
    mismatch = float(jnp.abs(scored - rollouts.behaviour_logprobs).max())
    return Timings(sum(times[0]), times[1:], mismatch)


def main(c: Config) -> None:
    model = model_config(c, qk_bias=True, compute_dtype=c.compute_dtype, remat=c.remat)
    device = jax.devices()[0]
    peak = matmul_peak(c.compute_dtype, 2048 if device.platform == "cpu" else 8192)
    policy = gj.init_policy(model, jax.random.key(0))
    shape = Shape(c.prompts, c.group_size, c.prompt_tokens, c.new_tokens)
    made = make_step(policy, c.objective, shape, c.micro_batch_tokens)
    timings = time_steps(c, policy, made)
    sample_s = statistics.median(t.sample_s for t in timings.steps)
    update_s = statistics.median(t.update_s for t in timings.steps)
    total = statistics.median(sum(t) for t in timings.steps)
    sampling, training = arithmetic(c, model)
    tokens = c.prompts * c.group_size * c.new_tokens
    stats = device.memory_stats() or {}
    memory = stats.get(
        "peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    result = {
        "median_step_s": round(total, 4),
        "sample_s": round(sample_s, 4),
        "update_s": round(update_s, 4),
        "first_step_s": round(timings.first_step_s, 2),
        "sampled_tokens_per_s": round(tokens / sample_s),
        "tokens_per_s": round(tokens / total),
        "sample_share_of_peak": round(sampling / sample_s / peak, 4),
        "update_share_of_peak": round(training / update_s / peak, 4),
        "times_the_floor": round(total / ((sampling + training) / peak), 2),
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "peak_memory_mb": round(memory / 1e6, 1),
        "mismatch_max_abs": timings.mismatch,
        "parameters": num_parameters(model),
        "micro_batch": [made.micro.prompts, made.micro.samples],
        "device": device.device_kind,
        "jax": jax.__version__,
    }
    for name, value in result.items():
        print(f"{name:24} {value}")
    if c.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Config))
