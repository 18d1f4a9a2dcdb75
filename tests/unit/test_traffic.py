import pytest

from grpo_jax import ModelConfig
from grpo_jax.models.config import num_parameters
from grpo_jax.planning.traffic import (
    Step,
    memory_per_device,
    micro_batches,
    num_devices,
    prompt_shards,
    sampling_seconds,
    traffic,
    update_seconds,
)
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.runs.config import MeshConfig

MODEL = ModelConfig(vocab_size=100, compute_dtype="bfloat16")
STEP = Step(
    prompts=32, group_size=4, prompt_tokens=10, max_new_tokens=20,
    micro=MicroBatch(2, 4),
)  # fmt: skip


def test_counts_of_a_step():
    assert STEP.tokens == 32 * (10 + 4 * 20)
    mesh = MeshConfig(data=2, fsdp=4, tensor=2)
    assert num_devices(mesh) == 16 and prompt_shards(mesh) == 8
    assert micro_batches(STEP, mesh) == 2  # 4 prompts a device, 2 at a time


def test_one_device_sends_nothing():
    assert set(traffic(MODEL, STEP, MeshConfig())) == {0}


# 8 prompts a device, 4 micro-batches; 3/4 of what is gathered comes from the others:
# twice (forward, backward; prompts, tokens) in 2 bytes, and the gradients in 4.
def test_traffic_over_fsdp():
    n = num_parameters(MODEL)
    sent = traffic(MODEL, STEP, MeshConfig(fsdp=4))
    assert sent.gathers == 2 * 4 * 3 / 4 * n * 2
    assert sent.scatters == 4 * 3 / 4 * n * 4
    assert sent.sampling == 2 * 3 / 4 * n * 2 and sent.data == sent.tensor == 0
    assert sent.update == sent.gathers + sent.scatters


# All tokens on both devices: 2 layers, 5 all-reduces of [tokens, 64] in 2 bytes with
# recomputation, each of which is received once (2 * 1/2); 2 while sampling.
def test_traffic_over_tensor():
    one = 2 * STEP.tokens * 64 * 2
    sent = traffic(MODEL, STEP, MeshConfig(tensor=2))
    assert sent.tensor == 5 * one and sent.sampling == 2 * one


def test_traffic_over_data():
    sent = traffic(MODEL, STEP, MeshConfig(data=2))
    assert sent.data == 8 * 2 / 2 * num_parameters(MODEL) * 4


# 6 N a token, and 12 layers heads head_dim keys: 10 of the prompt, 10 on average.
def test_seconds_of_an_update():
    per_token = 6 * num_parameters(MODEL) + 12 * 2 * 4 * 16 * 20
    expected = STEP.tokens * per_token / (4 * 1e9)
    assert update_seconds(MODEL, STEP, MeshConfig(fsdp=4), flops=1e9) == pytest.approx(
        expected
    )


# Keys and values of 2 layers, 64 wide: of 10 + 4 * 10 tokens on average a prompt.
def test_seconds_of_sampling():
    read = 2 * (num_parameters(MODEL) + 32 * (10 + 4 * 10) * 2 * 2 * 64)
    expected = 20 * read / 1e9
    seconds = sampling_seconds(MODEL, STEP, MeshConfig(), bytes_a_second=1e9)
    assert seconds == pytest.approx(expected)


def test_devices_hold_their_share():
    full = memory_per_device(MODEL, STEP, MeshConfig())
    half = memory_per_device(MODEL, STEP, MeshConfig(fsdp=2))
    assert half.state == full.state // 2 and half.cache == full.cache // 2
