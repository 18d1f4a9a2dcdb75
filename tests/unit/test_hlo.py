"""Operations, loops and sources read from a program's text."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.parallel.collectives import parse_collectives
from grpo_jax.parallel.hlo import Source, Sources, arrays_of, bytes_of, operations

TEXT = """HloModule step

FileNames
1 "/somewhere/grpo_jax/models/attention.py"
2 "/somewhere/grpo_jax/training/step.py"

FunctionNames
1 "step"
2 "attention"

FileLocations
1 {file_name_id=2 function_name_id=1 line=11 end_line=11 column=2 end_column=34}
2 {file_name_id=1 function_name_id=2 line=9 end_line=9 column=20 end_column=38}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%counted (c: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7), metadata={op_name="while"}
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%until (c: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(7)
  %less = pred[] compare(%i, %limit), direction=LT
  ROOT %both = pred[] and(%less, %undone)
}

%fused (p: f32[4]) -> f32[4] {
  %g = f32[16]{0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8]
}

%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f = f32[16] fusion(%a), kind=kCustom, calls=%fused, metadata={stack_frame_id=2}
  %h = f32[16] fusion(%f), kind=kCustom, calls=%fused
}

%other (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = f32[4] sort(%x), metadata={op_name="sort" stack_frame_id=1}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%counted, body=%body
  %v = (s32[], f32[4]) while(%w), condition=%until, body=%other
  %u = (s32[], f32[4]) while(%v), condition=%until, body=%other
}
"""


def times(kind, **how):
    return [x.times for x in operations(TEXT, **how) if x.kind == kind]


def test_a_loop_that_counts_to_a_constant_runs_that_often():
    assert times("fusion") == [7, 7]


def test_loops_that_end_by_values_run_as_often_as_is_said():
    assert times("sort") == [1, 1]
    assert times("sort", trips=5) == [5, 5]
    assert times("sort", trips=[3, 4]) == [3, 4]
    assert times("fusion", trips=[3, 4]) == [7, 7]


def test_a_collective_beside_several_fusions_is_one():
    (gather,) = parse_collectives(TEXT)
    assert gather.overlaps and gather.times == 7 and gather.nbytes == 64


@pytest.mark.parametrize(
    ("line", "overlaps"),
    [
        (
            "%g = f32[4,8] all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8]",
            False,
        ),
        ("%g = (f32[4], f32[8]) all-gather-start(%a), replica_groups=[2,4]<=[8]", True),
    ],
)
def test_what_is_started_and_awaited_later_overlaps(line, overlaps):
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n"
    assert [x.overlaps for x in parse_collectives(text)] == [overlaps]


def test_functions_of_an_operation_innermost_first():
    sources = Sources(TEXT)
    found = {x.kind: list(sources.of(x.line)) for x in operations(TEXT)}
    outer = Source("/somewhere/grpo_jax/training/step.py", "step")
    inner = Source("/somewhere/grpo_jax/models/attention.py", "attention")
    assert found["sort"] == [outer] and found["while"] == []
    line = next(x.line for x in operations(TEXT) if x.kind == "fusion")
    assert list(sources.of(line)) == [inner, outer]


def test_sources_of_a_program_compiled_here():
    def inner(x):
        return jnp.sin(x)

    def outer(x):
        return inner(x) * 2

    text = jax.jit(outer).lower(jnp.ones(8)).compile().as_text()
    sources = Sources(text)
    chains = Counter(
        tuple(f.function.rpartition(".")[2] for f in sources.of(x.line))
        for x in operations(text)
        if x.kind == "sine"
    )
    assert chains and all(chain[:2] == ("inner", "outer") for chain in chains)


def test_bytes_of_arrays():
    arrays = arrays_of("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[5], f32[])")
    assert arrays == [("bf16", (2, 3)), ("pred", (5,)), ("f32", ())]
    assert [bytes_of(*x) for x in arrays] == [12, 5, 4]
