"""Programs compiled for TPUs that are not there; of a small model, because the compiler
takes minutes of a core for two layers of 1.5 B."""

import dataclasses
import importlib.util
import itertools
import os
import re

import pytest

from grpo_jax import ModelConfig
from grpo_jax.parallel.meshes import make_mesh
from grpo_jax.parallel.topology import topology
from grpo_jax.planning.compiled import VOCABULARY, measured, planned
from grpo_jax.planning.plan import make_plan
from grpo_jax.runs.config import (
    InstrumentConfig,
    MeshConfig,
    SamplingConfig,
    TrainConfig,
)
from grpo_jax.training.ahead import lower_ahead

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install 'grpo-jax[aot]'",
    ),
]
MODEL = ModelConfig(
    vocab_size=8192, num_layers=2, width=512, mlp_width=1536, num_heads=4,
    num_kv_heads=2, head_dim=128, qk_bias=True, compute_dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """libtpu's settings stay within these tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def update(name, mesh, prompts):
    """(figures, text) of an update compiled for a topology."""
    config = TrainConfig(
        model=MODEL,
        mesh=mesh,
        sampling=SamplingConfig(prompts=prompts, group_size=4, max_new_tokens=128),
        instrument=InstrumentConfig(every=0),
        micro_batch_tokens=4 * 128 + 64,
    )
    at = topology(name)
    plan = make_plan(config, with_weights=False, local_devices=False)
    lowered = Kept(lower_ahead(config, plan, at.devices)["update"])
    expected = planned(plan.memory.estimate(), "update")
    return measured(lowered, expected, at.chip), lowered.text


class Kept:
    """A program whose text is kept when it is compiled."""

    def __init__(self, lowered):
        self.lowered, self.text = lowered, ""

    def compile(self):
        program = self.lowered.compile()
        self.text = program.as_text()
        return program


def test_an_update_compiled_for_a_chip_that_is_not_there():
    figures, text = update("v5e:1", MeshConfig(), 2)
    assert figures["fits"] and abs(figures["off"]) < 0.25, figures
    # Gradients of a token's occurrences are added up in float32.
    assert not re.findall(r" = bf16\S* scatter\(", text)
    assert figures["seconds"] > 0 and VOCABULARY in figures["parts"]
    assert not figures["collectives"]


@pytest.mark.parametrize(
    "name", ["v5e:2x2", "v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4"]
)
def test_real_topologies_take_every_mesh_of_all_their_chips(name):
    devices = topology(name).devices
    powers = [2**i for i in range(7)]
    for data, fsdp in itertools.product(powers, powers):
        tensor, rest = divmod(len(devices), data * fsdp)
        if tensor and not rest:
            mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
            assert mesh is not None
            assert dataclasses.astuple(MeshConfig(**mesh.shape)) == (data, fsdp, tensor)
            assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}
