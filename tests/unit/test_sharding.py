"""Rules of sharding, without any devices."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.models.policy import abstract_policy
from grpo_jax.parallel.meshes import make_mesh
from grpo_jax.parallel.sharding import (
    AXES,
    batch_shards,
    constrain,
    flatten_rows,
    tree_shardings,
)
from grpo_jax.planning.devices import check_mesh
from grpo_jax.planning.optimizer import make_optimizer, make_schedule
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch, split_batch
from grpo_jax.runs.config import NEW_BATCH, MeshConfig, OptimizerConfig, StepBatch
from grpo_jax.runs.config_files import from_dict
from grpo_jax.training.state import init_state
from tests.helpers import TINY, random_rollouts, tiny_policy

MESH = AbstractMesh((2, 2, 2), AXES)
EVERYTHING = dataclasses.replace(
    TINY,
    vocab_size=20,
    qk_bias=True,
    output_bias=True,
    qk_norm=True,
    post_norms=True,
    norm_offset=True,
    tie_embeddings=False,
    lora_rank=2,
)


def specs(tree):
    shardings = tree_shardings(tree, MESH)
    return {
        jax.tree_util.keystr(path): tuple(x.spec)
        for path, x in jax.tree_util.tree_leaves_with_path(shardings)
    }


def test_every_parameter_is_sharded_by_its_name():
    policy = abstract_policy(EVERYTHING)
    actual = specs(policy.frozen) | specs(policy.params)
    layer, into, out = "['layers']['{}']['{}']", (None, "fsdp", "tensor"), ()
    out = (None, "tensor", "fsdp")
    expected = {
        "['embedding']['embedding']": ("tensor", "fsdp"),
        "['unembedding']": ("fsdp", "tensor"),
        "['final_norm']['scale']": (),
    }
    for name in ("q", "k", "v", "gate", "up"):
        expected[layer.format(name, "kernel")] = into
        expected[layer.format(name, "lora_a")] = (None, "fsdp", None)
        expected[layer.format(name, "lora_b")] = (None, None, "tensor")
    for name in ("o", "down"):
        expected[layer.format(name, "kernel")] = out
        expected[layer.format(name, "lora_a")] = (None, "tensor", None)
        expected[layer.format(name, "lora_b")] = (None, None, "fsdp")
    for name in ("q", "k", "v"):
        expected[layer.format(name, "bias")] = (None, "tensor")
    expected[layer.format("o", "bias")] = (None, "fsdp")
    assert {k: v for k, v in actual.items() if "_norm" not in k} == {
        k: v for k, v in expected.items() if "_norm" not in k
    }
    assert all(spec == () for name, spec in actual.items() if "_norm" in name)


def test_a_size_that_does_not_divide_is_replicated():
    policy = abstract_policy(dataclasses.replace(TINY, vocab_size=19, mlp_width=25))
    actual = specs(policy.params)
    assert actual["['embedding']['embedding']"] == (None, "fsdp")
    assert actual["['layers']['up']['kernel']"] == (None, "fsdp", None)


def test_moments_are_sharded_like_their_parameters():
    settings = OptimizerConfig(learning_rate=3e-4)
    optimizer = make_optimizer(settings, make_schedule(settings, total_updates=1))
    policy = abstract_policy(TINY)
    state = jax.eval_shape(
        lambda params: init_state(params, optimizer, gj.std_weights()), policy.params
    )
    actual = specs(state)
    for name, spec in specs(policy.params).items():
        same = {v for k, v in actual.items() if k.endswith(name)}
        assert same == {spec}, name
    assert actual[".updates"] == ()


@pytest.mark.parametrize(
    ("mesh", "p", "g", "expected"),
    [
        ((1, 1, 1), 3, 5, (1, 1)),
        ((8, 1, 1), 8, 4, (8, 1)),
        ((2, 4, 1), 16, 4, (8, 1)),
        ((2, 2, 2), 2, 8, (2, 2)),
        ((2, 4, 1), 4, 2, (4, 2)),
        ((1, 8, 1), 2, 8, (1, 8)),
        ((2, 4, 1), 3, 5, (1, 1)),
    ],
)
def test_prompts_are_split_first_and_samples_take_the_rest(mesh, p, g, expected):
    shape = MeshConfig(**dict(zip(AXES, mesh, strict=True)))
    assert batch_shards(p, g, shape) == expected


def test_every_part_of_a_batch_has_prompts_of_every_shard():
    prompts = np.arange(8)  # shard i has 2 i and 2 i + 1
    parts = split_batch(prompts, MicroBatch(4, 3, (4, 1)), False)
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])
    samples = np.broadcast_to(np.arange(8), (1, 8))
    parts = split_batch(samples, MicroBatch(1, 4, (1, 2)), True)
    np.testing.assert_array_equal(parts[:, 0], [[0, 1, 4, 5], [2, 3, 6, 7]])


@pytest.mark.parametrize("shards", [(2, 1), (2, 2), (1, 2)])
def test_log_probs_of_parts_come_back_in_order(shards):
    policy = tiny_policy()
    rollouts = random_rollouts(policy, 4, 4)
    call = jax.jit(batch_logprobs, static_argnames=("temperature", "micro"))
    expected = call(policy, rollouts, 1.0, MicroBatch(4, 4))
    actual = call(policy, rollouts, 1.0, MicroBatch(2, 2, shards))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_tokens_of_a_micro_batch_are_those_of_one_device():
    assert micro_batch(8, 4, 10, 20, 180) == MicroBatch(2, 4)
    assert micro_batch(8, 4, 10, 20, 180, (4, 1)) == MicroBatch(8, 4, (4, 1))
    assert micro_batch(8, 4, 10, 20, 90, (4, 1)) == MicroBatch(4, 4, (4, 1))
    assert micro_batch(2, 8, 10, 20, 90, (1, 2)) == MicroBatch(1, 8, (1, 2))


def test_without_a_mesh_nothing_happens():
    assert make_mesh(MeshConfig()) is None
    x = jnp.zeros((2, 3, 4))
    assert constrain(x, "prompts", "samples") is x
    chex.assert_shape(flatten_rows(x), (6, 4))


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * 8)


def refused(mesh, batch=NEW_BATCH, model=TINY):
    with pytest.raises(ConfigError) as error:
        check_mesh(MeshConfig(**mesh), batch, model)
    return str(error.value)


def test_more_devices_than_visible_are_refused():
    message = refused({"data": 512})
    assert "needs 512 devices, and there are 1 (cpu)" in message


def test_a_mesh_with_idle_devices_is_refused(eight_devices):
    batch = StepBatch(6, 9)
    message = refused({"data": 2, "fsdp": 4}, batch)
    assert "make sampling.prompts a multiple of 8" in message
    check_mesh(MeshConfig(fsdp=8), StepBatch(2, 8), TINY)


def test_heads_that_cannot_be_split_are_refused(eight_devices):
    assert "must divide model.num_kv_heads=2, got 4" in refused({"tensor": 4})


def test_sizes_below_one_are_refused():
    with pytest.raises(ConfigError, match="mesh.data must be at least 1, got 0"):
        from_dict(gj.TrainConfig, {"mesh": {"data": 0}})
