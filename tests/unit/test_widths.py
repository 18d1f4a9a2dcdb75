"""What a measurement is expected to tell, from the simulated table."""

import pytest

from grpo_jax.instrument.plan import ProbePlan
from grpo_jax.instrument.widths import (
    _HALF,
    _TOLD,
    ASSUMED,
    GROUP_SIZES,
    PROMPTS,
    expected_width,
    prompts_needed,
)
from grpo_jax.planning.told import told_by, told_lines


def test_the_tables_have_an_entry_for_every_size():
    for table in (_TOLD, _HALF):
        assert table.keys() == ASSUMED.keys()
        for rows in table.values():
            assert [len(row) for row in rows] == [len(PROMPTS)] * len(GROUP_SIZES)


def test_simulated_sizes_are_taken_as_they_are():
    assert expected_width(8, 16, "a mix of skills") == (0.99, 0.207)
    assert expected_width(256, 64, "one skill") == (1.0, 0.062)
    assert expected_width(900, 90, "one skill") == (1.0, 0.062)


# 45 and 90 are halfway from 32 to 64 and from 64 to 128 in logs, up to .6 %.
def test_between_them_they_are_interpolated_in_logs():
    _, half = expected_width(90, 16, "one skill")
    assert half == pytest.approx((0.255 + 0.185) / 2, abs=1e-3)
    told, half = expected_width(16, 45, "one skill")
    assert told == pytest.approx((0.97 + 1.0) / 2, abs=1e-3)
    assert half == pytest.approx((0.249 + 0.148) / 2, abs=1e-3)


@pytest.mark.parametrize("size", [(4, 8), (8, 4)])
def test_nothing_is_said_of_less_than_was_simulated(size):
    assert expected_width(*size, "one skill") is None
    assert prompts_needed(1.0, 4, "one skill") is None


@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_the_fewest_prompts_that_are_enough(group_size):
    for half in (0.05, 0.1):
        count = prompts_needed(half, group_size, "a mix of skills")
        assert expected_width(count, group_size, "a mix of skills")[1] <= half
        assert expected_width(count - 1, group_size, "a mix of skills")[1] > half


# At G = 8 prompts of one skill have too little signal, however many there are.
def test_more_prompts_do_not_replace_samples():
    assert prompts_needed(0.5, 8, "one skill") is None
    assert prompts_needed(0.5, 16, "one skill") == 14
    assert prompts_needed(0.5, 32, "one skill") == 6


def probe(prompts, group_size):
    return ProbePlan(prompts, group_size, 10, True, 0.1, 40, True)


def test_the_plan_says_it_in_a_table():
    lines = told_lines(told_by(probe(8, 16)))
    assert lines[1].split()[-6:] == ["a", "mix", "of", "skills", "one", "skill"]
    assert lines[2].startswith("  8 prompts x 16 samples ")
    assert lines[2].split()[5:] == ["99", "%,", "+-0.21", "31", "%,", "+-0.37"]
    assert lines[3].startswith("  to +-0.10, x 16 samples")
    assert any("x 32 samples" in line and "not by 256" in line for line in lines)
    assert "SmolLM2-135M's on task ladder" in " ".join(lines)
    nothing = told_lines(told_by(probe(4, 4)))
    assert nothing[2].split()[-2:] == ["-", "-"]
    assert nothing[3].startswith("  to +-0.10, x 8 samples")


def test_a_run_says_so_where_cosines_are_seldom_told():
    assert "seldom tell cosines" in probe(8, 8).text(400)
    assert "seldom tell cosines" in probe(4, 32).text(400)
    assert "seldom" not in probe(8, 16).text(400)
