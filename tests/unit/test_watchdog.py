"""The watchdog speaks of long waits, by name, and of nothing else."""

import time

import pytest

from grpo_jax.training.watchdog import Watchdog


@pytest.fixture
def watched():
    """(watchdog that warns from 0.2 s on, what it said)."""
    said = []
    watchdog = Watchdog(said.append, least=0.2, unknown=1.0)
    yield watchdog, said
    watchdog.stop()


def spend(watchdog, name, seconds, times=1):
    for _ in range(times):
        with watchdog.phase(name):
            time.sleep(seconds)


def test_a_long_wait_is_named_at_doubling_intervals(watched):
    watchdog, said = watched
    spend(watchdog, "scoring", 0.001, times=3)
    spend(watchdog, "scoring", 1.0)  # at 0.2, 0.4 and 0.8 s
    assert len(said) == 3 and all("waiting for scoring" in line for line in said)
    assert "its median is 0.00 s" in said[0]


def test_ten_times_the_median_is_allowed(watched):
    watchdog, said = watched
    spend(watchdog, "update", 0.05, times=3)
    spend(watchdog, "update", 0.35)
    assert not said


def test_first_ones_may_compile(watched):
    watchdog, said = watched
    spend(watchdog, "look", 0.001, times=2)
    spend(watchdog, "look", 0.5)
    assert not said
    spend(watchdog, "sampling", 1.1)
    assert len(said) == 1 and "may compile" in said[0]


def test_a_phase_inside_another_belongs_to_it(watched):
    watchdog, said = watched
    spend(watchdog, "scoring", 0.001, times=3)
    with watchdog.phase("evaluation"):
        spend(watchdog, "scoring", 0.5)
    assert not said


def test_nothing_is_said_after_the_end(watched):
    watchdog, said = watched
    spend(watchdog, "saving", 0.001, times=3)
    with watchdog.phase("saving"):
        watchdog.stop()
        time.sleep(0.3)
    spend(watchdog, "saving", 0.3)
    assert not said
