"""What processes exchange: a single one, and two of which the second is simulated."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.parallel.processes import (
    Processes,
    SharedError,
    gather_to_host,
    join,
    local_shards_to_host,
    owned_samples,
)
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.judging import HostRollouts, fetch_to_host, score_rollouts
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.config import DistributedConfig, TrainConfig
from grpo_jax.tasks.registry import load_task


class SimulatedPair(Processes):
    """The first of two processes; `others` are the second one's messages, in order."""

    def __init__(self, *others):
        super().__init__()
        self.count, self._others = 2, list(others)

    def _gather(self, value):
        return [value, self._others.pop(0)]


def test_a_single_process_exchanges_with_itself():
    asked = []
    processes = Processes(lambda: bool(asked))
    assert (processes.count, processes.index, processes.is_writer) == (1, 0, True)
    assert processes.exchange("x") == ["x"] and processes.first("x") == "x"
    assert processes.together(lambda: 3) == 3
    assert not processes.stopping
    asked.append(True)
    assert processes.stopping
    with pytest.raises(OSError, match="full"), processes.writing():
        raise OSError("full")


def test_a_stop_request_counts_from_the_next_exchange():
    processes = SimulatedPair(("b", True, None), ("b", False, None))
    assert not processes.stopping
    assert processes.exchange("a") == ["a", "b"]
    assert processes.stopping
    processes.exchange("a")
    assert not processes.stopping  # no process asks any more


def test_a_failure_ends_all_and_is_raised_once():
    processes = SimulatedPair((None, False, None), (None, False, None))
    with processes.writing():
        raise OSError("no room")
    with pytest.raises(SharedError, match="no room"):
        processes.exchange(None)
    processes.exchange(None)
    other = SimulatedPair((None, False, "their disk"))
    with pytest.raises(SharedError, match="their disk"):
        other.exchange(None)


def test_a_bad_config_of_one_is_an_error_of_all():
    with pytest.raises(ConfigError, match="process 1: no such file"):
        SimulatedPair(("no such file", False, None)).together(lambda: 1)

    def bad():
        raise ConfigError("mine")

    with pytest.raises(ConfigError, match="^mine"):
        SimulatedPair((None, False, None)).together(bad)


def test_arrays_of_one_process_are_its_own():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    assert owned_samples(x).all() and owned_samples(x).shape == (2, 3)
    for read in (local_shards_to_host, gather_to_host):
        np.testing.assert_array_equal(read({"x": x})["x"], x)


def rollouts_of(lengths):
    p, g = lengths.shape
    mask = (np.arange(5) < lengths[..., None]).astype(np.int32)
    prompts = np.ones((p, 2), np.int32)
    ids = np.full((p, g, 5), 7, np.int32)
    return Rollouts(prompts, prompts, ids * mask, mask, ids.astype(float), None)


def test_shares_of_rewards_make_the_whole():
    """Two processes, one with the last sample of each prompt, against one."""
    seen = []

    def reward(example, completion):
        seen.append((example.prompt, completion))
        if completion == "":
            raise ValueError("empty")
        return len(completion)

    task = dataclasses.replace(load_task("chains"), reward=reward)
    examples = [Example("p", ""), Example("q", "")]
    lengths = np.array([[1, 0, 3], [2, 5, 4]])
    rollouts = rollouts_of(lengths)
    alone = score_rollouts(task, fetch_to_host(rollouts), examples, None, Processes())
    mine = np.array([[True, True, False]] * 2)
    told = []

    class Recorded(Processes):
        count = 2

        def __init__(self, other):
            self.other = other

        def exchange(self, value):
            told.append(value)
            return [value] if self.other is None else [value, self.other]

    def part(mine, other):
        kept = rollouts._replace(
            completion_mask=rollouts.completion_mask * mine[..., None]
        )
        return score_rollouts(
            task, HostRollouts(kept, mine), examples, None, Recorded(other)
        )

    part(~mine, None)
    seen.clear()
    both = part(mine, told[-1])
    assert len(seen) == 4
    np.testing.assert_array_equal(both.rollouts.rewards, alone.rollouts.rewards)
    np.testing.assert_array_equal(both.scores.solved, alone.scores.solved)
    np.testing.assert_array_equal(both.lengths, lengths)
    np.testing.assert_array_equal(both.ended, alone.ended)
    assert both.scores.errors == alone.scores.errors == ["ValueError: empty"]
    assert both.texts[0][2] == "" and both.texts[1][1] == alone.texts[1][1]


def test_a_process_without_a_share_scores_nothing():
    def reward(example, completion):
        raise AssertionError("not mine")

    task = dataclasses.replace(load_task("chains"), reward=reward)
    rollouts, nothing = rollouts_of(np.ones((1, 2), int)), np.zeros((1, 2), bool)
    found = score_rollouts(
        task, HostRollouts(rollouts, nothing), [Example("p", "")], None, Processes()
    )
    assert np.isnan(found.scores.rewards).all() and not found.scores.errors


def test_alone_nothing_is_joined():
    join(DistributedConfig())
    assert Processes().count == 1


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"coordinator": "a:1"}, "belong together"),
        ({"processes": 2, "process": 0}, "belong together"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "below"),
        ({"heartbeat_s": 1}, "heartbeat_s must be at least 10"),
    ],
)
def test_bad_settings_are_refused(settings, error):
    with pytest.raises(ConfigError, match=error):
        TrainConfig(distributed=DistributedConfig(**settings))
