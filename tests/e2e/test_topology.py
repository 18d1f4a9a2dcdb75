"""Programs compiled for devices that are not there: updates of two layers of a model of
1.5 B parameters, whose memory and arrays are those of the whole one."""

import dataclasses
import importlib.util
import itertools
import os
import re

import jax
import pytest

from grpo_jax import ModelConfig
from grpo_jax.parallel.collectives import KINDS, SCATTERED
from grpo_jax.parallel.hlo import arrays_of, bytes_of, operations
from grpo_jax.parallel.meshes import make_mesh
from grpo_jax.parallel.platform import compiling_for
from grpo_jax.parallel.topology import topology
from grpo_jax.planning.compiled import VOCABULARY, measured, planned
from grpo_jax.planning.plan import make_plan
from grpo_jax.runs.config import (
    InstrumentConfig,
    MeshConfig,
    ObjectiveConfig,
    SamplingConfig,
    TrainConfig,
)
from grpo_jax.training.ahead import lower_ahead

pytestmark = pytest.mark.slow
tpus = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install 'grpo-jax[aot]'",
)
gpus = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the compiler for NVIDIA GPUs: pip install 'grpo-jax[aot-cuda]'",
)
MODEL = ModelConfig(
    vocab_size=151_936, num_layers=2, width=1536, mlp_width=8960, num_heads=12,
    num_kv_heads=2, head_dim=128, qk_bias=True, compute_dtype="bfloat16",
)  # fmt: skip
T = 1024


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """The compilers' settings stay within these tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def cheap():
    """With little of the compiler's time; its memory at full effort may be another."""
    names = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
    before = [getattr(jax.config, name) for name in names]
    for name in names:
        jax.config.update(name, -1.0)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


class Kept:
    """A program whose text is kept when it is compiled."""

    def __init__(self, lowered):
        self.lowered, self.text = lowered, ""

    def compile(self):
        program = self.lowered.compile()
        self.text = program.as_text()
        return program


def update(name, mesh, prompts, model=MODEL, samples=2):
    """(figures, text) of an update in several micro-batches, and of several chunks of
    logits each, compiled for a topology."""
    config = TrainConfig(
        model=model,
        mesh=mesh,
        sampling=SamplingConfig(prompts=prompts, group_size=4, max_new_tokens=T),
        objective=ObjectiveConfig(kl_coef=0.0),
        instrument=InstrumentConfig(every=0),
        micro_batch_tokens=samples * T + 64,
    )
    at = topology(name)
    with compiling_for(at.chip.platform):
        plan = make_plan(config, with_weights=False, local_devices=False)
        lowered = Kept(lower_ahead(config, plan, at.devices)["update"])
        expected = planned(plan.memory.estimate(), "update")
    return measured(lowered, expected, at.chip), lowered.text


def is_table(sizes, mesh):
    """Whether an array is the embedding, or a device's part of it, either way round."""
    rows = {MODEL.vocab_size // n for n in (1, mesh.tensor, mesh.fsdp)}
    columns = {MODEL.width // n for n in (1, mesh.tensor, mesh.fsdp)}
    return len(sizes) == 2 and any(
        a in rows and b in columns for a, b in (sizes, sizes[::-1])
    )


@pytest.mark.parametrize(
    ("name", "mesh", "prompts"),
    [
        pytest.param("v5e:1", MeshConfig(), 2, marks=tpus),
        pytest.param("v5e:2x2", MeshConfig(fsdp=2, tensor=2), 4, marks=tpus),
        pytest.param("v5p:4x4x4", MeshConfig(data=4, fsdp=16), 64, marks=tpus),
        pytest.param("h100:8", MeshConfig(fsdp=8), 8, marks=gpus),
    ],
)
def test_an_update_compiled_for_devices_that_are_not_there(name, mesh, prompts):
    figures, text = update(name, mesh, prompts)
    print(name, {k: figures[k] for k in ("planned", "peak", "off", "arrays")})
    assert figures["fits"] and abs(figures["off"]) < 0.15
    program = list(operations(text))
    # Gradients of a token's occurrences are added up in float32, and so are those of
    # the table: loops carry its parameters and their gradient, and a copy to read.
    assert not re.findall(r" = bf16\S* scatter\(", text)
    for loop in (x for x in program if x.kind == "while"):
        tables = [t for t, n in arrays_of(loop.shape) if is_table(n, mesh)]
        assert tables.count("f32") <= 2 and tables.count("bf16") <= 1, loop.shape
    shapes = {n for x in program if not x.fused for _, n in arrays_of(x.shape)}
    assert not [n for n in shapes if n[-2:] == (T, T)]
    assert bool(figures["collectives"]) == (name != "v5e:1")
    # The compiler for GPUs estimates no time.
    assert (figures["seconds"] is None) == name.startswith("h100")
    assert (VOCABULARY in figures["parts"]) == (not name.startswith("h100"))


@tpus
def test_a_number_of_chips_is_the_squarest_slice():
    assert [len(topology(f"v5e:{n}").devices) for n in (1, 4, 8, 16)] == [1, 4, 8, 16]


# A vocabulary whose 1187 x 16 columns the compiler cannot cut by itself.
@tpus
@pytest.mark.parametrize("tied", [True, False])
def test_what_an_update_sends_over_fsdp(tied):
    """Parameters rounded to bfloat16, and gradients in float32, scattered."""
    model = dataclasses.replace(MODEL, vocab_size=18992, tie_embeddings=tied)
    _, text = update("v5e:2x2", MeshConfig(fsdp=4), 4, model, 4)
    large = [
        (x.kind.removesuffix("-start"), dtype)
        for x in operations(text)
        if x.kind.removesuffix("-start") in KINDS
        for dtype, sizes in arrays_of(x.shape)
        if bytes_of(dtype, sizes) > 100_000 and not x.computation.startswith(SCATTERED)
    ]
    assert set(large) == {("all-gather", "bf16"), ("reduce-scatter", "f32")}


@tpus
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
