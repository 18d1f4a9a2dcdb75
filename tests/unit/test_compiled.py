"""What a compiled program says, read as figures; topologies that cannot be had."""

import ast
import dataclasses
import platform
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import grpo_jax
from grpo_jax import ModelConfig
from grpo_jax.commands._topology import compiled_text
from grpo_jax.errors import ConfigError
from grpo_jax.parallel.hlo import Source, Sources, operations
from grpo_jax.parallel.topology import CHIPS, hosts_of_gpus, topology
from grpo_jax.planning.compiled import (
    ATTENTION,
    LAYERS,
    OTHER,
    PARTS,
    PRODUCTS,
    VOCABULARY,
    Planned,
    cycles_by_part,
    measured,
    part_of,
    planned,
)
from grpo_jax.planning.faster import speedups
from grpo_jax.planning.memory import MemoryInputs

ROOT = Path(grpo_jax.__file__).parent
MODEL = ModelConfig(vocab_size=256, num_layers=2, width=64, compute_dtype="bfloat16")
INPUTS = MemoryInputs(
    model=MODEL, prompts=8, group_size=8, prompt_tokens=16, max_new_tokens=64,
    micro_batch_tokens=1024,
)  # fmt: skip


def functions(file):
    """Qualified names of a file's functions."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            members = (x for x in node.body if isinstance(x, ast.FunctionDef))
            yield from (f"{node.name}.{x.name}" for x in members)


@pytest.mark.parametrize("file", PARTS)
def test_parts_are_told_by_functions_that_exist(file):
    assert {*PARTS[file]} - {""} <= {*functions(file)}


def traced(*frames):
    return [Source(f"/x/grpo_jax/{file}", function) for file, function in frames]


@pytest.mark.parametrize(
    ("frames", "part"),
    [
        ([("models/attention.py", "causal_attention")], ATTENTION),
        ([("models/attention.py", "rotate")], LAYERS),
        (
            [
                ("logprobs.py", "soft_capped"),
                ("models/attention.py", "causal_attention"),
            ],
            ATTENTION,
        ),
        ([("logprobs.py", "token_logprobs.<locals>.one_chunk")], VOCABULARY),
        (
            [("models/linear.py", "Linear.__call__"), ("models/decoder.py", "Block.x")],
            PRODUCTS,
        ),
        ([("elsewhere.py", "f")], OTHER),
        ([("models/flash_attention.py", "kernel")], ATTENTION),
        ([], OTHER),
    ],
)
def test_the_innermost_function_with_a_part_decides(frames, part):
    assert part_of(traced(*frames)) == part


def test_cycles_count_once_per_run_and_not_inside_fusions():
    text = """FileNames
1 "/x/grpo_jax/models/attention.py"

FunctionNames
1 "causal_attention"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%inside (p: f32[4]) -> f32[4] {
  %m = f32[4] multiply(%p, %p), backend_config={"estimated_cycles":"1000"}
}

%more (c: (s32[])) -> pred[] {
  %n = s32[] constant(3)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

%body (c: (s32[])) -> (s32[]) {
  %f = f32[4] fusion(%a), calls=%inside, metadata={stack_frame_id=1}, backend_config={"estimated_cycles":"10"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%more, body=%body
  %c = f32[4] copy(%x), backend_config={"estimated_cycles":"5"}
}
"""  # noqa: E501
    cycles = cycles_by_part(operations(text), Sources(text))
    assert cycles == {ATTENTION: 30, OTHER: 5}


def test_a_program_s_memory_is_what_it_holds():
    x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    lowered = jax.jit(lambda x: jnp.sort(x, axis=0).sum()).lower(x)
    chip = CHIPS["v5e"]._replace(memory=10**7)
    result = measured(lowered, Planned(4_000_000, 4_000_000, 1_000_000), chip)
    assert result["arguments"] == 4_000_000  # what is sorted is 4 MB more
    assert 8_000_000 <= result["arguments"] + result["temporary"] < 8_100_000
    assert result["peak"] == result["arguments"] + result["temporary"] + 1_000_000
    assert result["fits"] and abs(result["off"]) < 0.02
    smaller = chip._replace(memory=8_500_000)
    assert not measured(lowered, Planned(1, 1, 1_000_000), smaller)["fits"]


class Refused:
    """A program that the compiler refuses with these words."""

    def __init__(self, words):
        self.words = words

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.words)


@pytest.mark.parametrize(
    "words",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (32.00G) exceeds available HBM (16.00G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 32.00G of "
        "16.00G hbm. Exceeded hbm capacity by 16.00G.",
    ],
)
def test_a_program_without_room_is_an_answer(words):
    expected = Planned(0, 2**34, 2**30)
    result = measured(Refused(words), expected, CHIPS["v5e"])
    assert not result["fits"] and result["peak"] == 2**35 + 2**30
    assert result["limit"] == 2**34 and result["off"] == pytest.approx(33 / 17 - 1)
    whole = dict(
        topology="v5e:1", devices=1, memory=2**34, fits=False,
        programs={"update": result}, advice=["micro_batch_tokens 512"],
    )  # fmt: skip
    text = compiled_text(whole)
    assert "does not fit, 35.4GB" in text and "a program has 17.2GB" in text


def test_another_error_of_the_compiler_is_not_swallowed():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measured(Refused("INTERNAL: a bug"), Planned(1, 1, 1), CHIPS["v5e"])


def test_the_formulas_name_all_of_the_state():
    memory = dataclasses.replace(INPUTS, reference=True).estimate()
    for name in ("update", "sampling"):
        expected = planned(memory, name)
        assert expected.peak == memory.state + memory.phases()[name]


def test_what_makes_it_faster_fits_and_differs():
    shares = {PRODUCTS: 0.5, VOCABULARY: 0.3, OTHER: 0.2}
    roomy = speedups(INPUTS, 1e12, shares)
    assert roomy == [
        "model.remat none (matrix products: 50 % of the time)",
        "sampling.max_new_tokens 32 (vocabulary: 30 % of the time)",
    ]
    model = dataclasses.replace(MODEL, remat="none")
    none = dataclasses.replace(INPUTS, model=model).estimate().peak
    assert speedups(INPUTS, none - 1, shares)[0].startswith("model.remat dots")
    assert speedups(INPUTS, 1, shares) == []


@pytest.mark.parametrize("name", ["v5e", "a100:8", "v5e:2x", "v5e:2x2x2x2", "x v5e:1"])
def test_names_that_are_no_topology(name):
    with pytest.raises(ConfigError, match="--topology must be a chip and the shape"):
        topology(name)


@pytest.mark.parametrize("name", ["h100:0", "h100:9", "h100:2x4", "h200:12"])
def test_numbers_of_gpus_that_are_no_hosts(name):
    with pytest.raises(ConfigError, match="1 to 8 GPUs or a multiple of 8"):
        topology(name)


def test_gpus_stand_in_hosts_of_8():
    assert [hosts_of_gpus("h100", n) for n in ("1", "6", "8", "32")] == [
        (1, 1), (1, 6), (1, 8), (4, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "extra"), [("v5e:1", r"\[aot\]"), ("h100:8", r"\[aot-cuda\]")]
)
def test_without_the_compiler(monkeypatch, name, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install 'grpo-jax{extra}'"):
        topology(name)


def test_where_the_compiler_does_not_run(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match="x86-64 Linux alone, got aarch64"):
        topology("v5e:1")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="x86-64 Linux alone"):
        topology("v5e:1")
