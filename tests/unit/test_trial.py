"""Each reward of the user's is called once before a run depends on it."""

import random
from decimal import Decimal

import numpy as np
import pytest

from grpo_jax import Example
from grpo_jax.errors import ConfigError
from grpo_jax.rewards.pool import VerifierPool
from grpo_jax.rewards.spec import parse_reward
from grpo_jax.rewards.trial import try_rewards
from grpo_jax.rewards.verifiers import exact

EXAMPLE = Example("1+1=", "2")
OWN = """
import os, random, time

def good(example, completion):
    return float(completion == example.answer)

def batch(completions, **columns):
    return [1.0]

async def judge(example, completion):
    return 1.0

def key(example, completion):
    return float(len(os.environ["TRIAL_KEY"]))

def asleep(example, completion):
    time.sleep(60)

def leaves(example, completion):
    raise SystemExit

def undecided(example, completion):
    return float("nan")

def text(example, completion):
    return "1.0"

def nothing(example, completion):
    pass

random.seed(0)

def draws(example, completion):
    return random.random()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "tried_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def tried(*names, timeout=10.0):
    """Warnings of trying rewards by name."""
    rewards, said = [parse_reward(name) for name in names], []
    with VerifierPool(rewards, workers=1, timeout=timeout) as pool:
        try_rewards(rewards, EXAMPLE, "2", pool, said.append)
    return said


def test_rewards_that_answer_are_taken_in_silence(own):
    names = ("exact", "length(start=1,end=2)", "tried_rewards:good")
    assert tried(*names) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch", r"TypeError: batch\(\) takes 1 positional argument but 2 were given"),
        ("judge", "TypeError: .*coroutine"),
        ("leaves", "SystemExit"),
        ("key", "KeyError: 'TRIAL_KEY'"),
        ("text", "TypeError: it returned '1.0', not a number"),
        ("nothing", "TypeError: it returned None, not a number"),
    ],
)
def test_a_reward_that_raises_ends_the_run_before_it_starts(own, name, words):
    with pytest.raises(ConfigError, match=f"reward tried_rewards:{name} .*{words}"):
        tried("exact", f"tried_rewards:{name}")


def test_the_error_says_how_a_reward_is_called_and_with_what(own):
    with pytest.raises(ConfigError) as error:
        tried("tried_rewards:batch")
    assert "batch(example, completion)" in str(error.value)
    assert "'1+1='" in str(error.value) and "\n" not in str(error.value)


def test_a_variable_that_is_set_here_but_not_in_workers_is_pointed_to(own, monkeypatch):
    with pytest.raises(ConfigError) as error:
        tried("tried_rewards:key")
    assert "--scoring.environment" not in str(error.value)  # set nowhere
    monkeypatch.setenv("TRIAL_KEY", "the secret")
    with pytest.raises(ConfigError, match="--scoring.environment TRIAL_KEY") as error:
        tried("tried_rewards:key")
    assert "the secret" not in str(error.value)


def test_what_hangs_or_gives_no_number_is_a_warning(own):
    [hung] = tried("tried_rewards:asleep", timeout=0.5)
    assert "tried_rewards:asleep" in hung and "0.5 s" in hung
    [undecided] = tried("tried_rewards:undecided")
    assert "the reward is nan" in undecided


def test_random_streams_of_a_worker_are_left_alone(own):
    from grpo_jax.rewards.scoring import score

    rewards = [parse_reward("tried_rewards:draws")]
    with VerifierPool(rewards, workers=1) as pool:
        try_rewards(rewards, EXAMPLE, "2", pool, print)
        scores = score(rewards, [EXAMPLE], [["2"]], pool=pool)
    expected = np.float32(random.Random(0).random())
    assert scores.rewards[0, 0] == expected


def test_random_streams_of_this_process_are_left_alone():
    def draws(example, completion):
        return random.random() + np.random.rand()

    random.seed(1), np.random.seed(1)
    try_rewards(draws, EXAMPLE, "2", None, print)
    found = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    assert found == (random.random(), np.random.rand())


def test_functions_of_this_process_are_called_but_not_the_packages_own():
    def raises(example, completion):
        raise LookupError(completion)

    with pytest.raises(ConfigError, match=r"raises fails .*LookupError: 2"):
        try_rewards(raises, EXAMPLE, "2", None, print)
    try_rewards(exact, EXAMPLE, "2", None, print)


@pytest.mark.parametrize("value", ["1.0", b"1", None, [1.0], {"score": 1}, 1j])
def test_what_is_no_number_is_a_missing_reward(value):
    from grpo_jax.rewards.scoring import score

    with pytest.raises(ConfigError, match="it returned .*, not a number"):
        try_rewards(lambda e, c: value, EXAMPLE, "2", None, print)
    scores = score(lambda e, c: value, [EXAMPLE], [["2"]])
    assert np.isnan(scores.rewards).all() and "not a number" in scores.errors[0]


@pytest.mark.parametrize(
    "value",
    [True, 1, 1.0, np.True_, np.int8(1), np.float32(1), np.ones(()), Decimal(1)],
)
def test_numbers_of_any_kind_are_rewards(value):
    from grpo_jax.rewards.scoring import score

    try_rewards(lambda e, c: value, EXAMPLE, "2", None, print)
    assert score(lambda e, c: value, [EXAMPLE], [["2"]]).rewards == 1
