"""Collectives read from a program's text."""

import pytest

from grpo_jax.parallel.collectives import Collective, bytes_sent, parse_collectives

TEXT = """HloModule step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}

%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[4,8]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %n = (s32[], f32[4]) while(%i), condition=%more, body=%inner
}

%inner (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = bf16[10]{0} collective-permute(%a), source_target_pairs={{0,1}}
}

%more (c: (s32[], f32[4])) -> pred[] {
  %all = pred[] all-reduce(%d), replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[], /*index=1*/f32[2,3]{1,0}) all-reduce(%u, %v), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""  # noqa: E501


def test_kinds_sizes_groups_and_how_often():
    assert parse_collectives(TEXT, trips=5) == [
        Collective("all-gather", 128, 4, "body", 3),
        Collective("all-reduce", 1, 4, "condition", 15),
        Collective("collective-permute", 20, 2, "body", 15),
        Collective("all-reduce", 28, 2, "entry", 1),
    ]


def test_bytes_of_a_ring():
    expected = 3 * 128 * 3 / 4 + 15 * 2 * 3 / 4 + 15 * 20 + 28
    assert bytes_sent(TEXT, trips=5) == pytest.approx(expected)


def test_what_is_started_stands_with_its_operands():
    text = """ENTRY %main (p: f32[4]) -> f32[4] {
  %g = (f32[1,8], f32[4,8]) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %p = (bf16[10], bf16[10], u32[], u32[]) collective-permute-start(%b)
  %r = f32[6] all-reduce-start(%c), replica_groups={{0,1},{2,3}}, to_apply=%add
  %d = f32[4,8] all-gather-done(%g)
}
"""
    assert [(x.kind, x.nbytes) for x in parse_collectives(text)] == [
        ("all-gather", 128), ("collective-permute", 20), ("all-reduce", 24),
    ]  # fmt: skip


# Results that stand beside operands of other sizes, in the forms of TPU and GPU. The
# bytes are those of the result: f32 4 each, bf16 2.
@pytest.mark.parametrize(
    ("started", "nbytes"),
    [
        ("((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%a)", 64),
        ("((f32[8,2], f32[4]), (f32[2,2], f32[1])) reduce-scatter-start(%a, %b)", 20),
        ("((bf16[8]), bf16[8]{0:T(256)}, s32[]{:S(2)}) all-to-all-start(%a)", 16),
        ("((f32[1,8], bf16[3]), (f32[4,8], bf16[12])) all-gather-start(%a, %b)", 152),
        ("(f32[1,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) all-gather-start(%a)", 128),
        ("((f32[6]), f32[6], s32[]) all-reduce-start(%a)", 24),
        ("(f32[6], f32[5]) all-reduce-start(%a, %b)", 44),
    ],
)
def test_of_what_is_started_the_result_is_sent(started, nbytes):
    text = f"""ENTRY %main (p: f32[4]) -> f32[4] {{
  %s = {started}, replica_groups=[2,4]<=[8], dimensions={{0}}
  %d = f32[4] all-gather-done(%s)
}}
"""
    assert [x.nbytes for x in parse_collectives(text)] == [nbytes]


def test_what_a_gpu_awaits_at_once_is_waited_for():
    text = """ENTRY %main (p: f32[4]) -> f32[4] {
  %r = f32[6] all-reduce-start(%c), replica_groups={{0,1}}, backend_config={"collective_backend_config":{"is_sync":true}}
  %s = f32[6] all-reduce-start(%c), replica_groups={{0,1}}, backend_config={"collective_backend_config":{"is_sync":false}}
}
"""  # noqa: E501
    assert [x.overlaps for x in parse_collectives(text)] == [False, True]


# As libtpu writes it: 4480 x 4096 x 4 bytes, of which each of 16 devices keeps a part.
def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    text = """%all-reduce-scatter.clone.1 (input.2: f32[4480,4096]) -> f32[280,4096] {
  %all-reduce.69 = f32[4480,4096] all-reduce(%input.2), channel_id=77, replica_groups=[4,16]<=[64]
  ROOT %dynamic-slice.21 = f32[280,4096] dynamic-slice(%all-reduce.69, %at, %zero)
}

ENTRY %main (p: f32[4480,4096]) -> f32[280,4096] {
  ROOT %f = f32[280,4096] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.clone.1
}
"""  # noqa: E501
    (found,) = parse_collectives(text)
    assert found == Collective("reduce-scatter", 280 * 4096 * 4, 16, "entry", 1)
    assert found.sent == 15 * 280 * 4096 * 4
