import numpy as np
import pytest

from grpo_jax import Example
from grpo_jax.rollouts.scoring import score
from grpo_jax.tasks import exact_match

EXAMPLES = [Example("1+1=", "2"), Example("2+1=", "3")]


def test_rewards_are_prompts_by_group():
    scores = score(exact_match, EXAMPLES, [["2", "3", ""], ["3", "3", "2"]])
    np.testing.assert_array_equal(scores.rewards, [[1, 0, 0], [1, 1, 0]])
    assert scores.rewards.dtype == np.float32 and scores.errors == []


def test_the_reward_sees_the_example_and_the_text():
    seen = []
    score(lambda *call: seen.append(call) or 0.0, EXAMPLES, [["a"], ["b"]])
    assert seen == [(EXAMPLES[0], "a"), (EXAMPLES[1], "b")]


def test_a_reward_that_raises_is_missing_and_told():
    def reward(example, completion):
        return 1 / len(completion)

    scores = score(reward, EXAMPLES, [["xx", ""], ["", "x"]])
    np.testing.assert_array_equal(scores.rewards, [[0.5, np.nan], [np.nan, 1]])
    assert scores.errors == ["ZeroDivisionError: division by zero"] * 2


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e39, np.float64(-1e39)])
def test_a_reward_that_is_not_finite_in_float32_is_missing_and_told(value):
    scores = score(lambda e, c: value if c else 1.0, EXAMPLES[:1], [["x", ""]])
    np.testing.assert_array_equal(scores.rewards, [[np.nan, 1]])
    assert len(scores.errors) == 1


@pytest.mark.parametrize("value", [None, "good", [1.0, 2.0], {}, 1j, object()])
def test_a_reward_that_is_no_number_is_missing_and_told(value):
    scores = score(lambda e, c: value if c else 1.0, EXAMPLES[:1], [["x", ""]])
    np.testing.assert_array_equal(scores.rewards, [[np.nan, 1]])
    assert len(scores.errors) == 1 and "Error" in scores.errors[0]


@pytest.mark.parametrize("value", [True, 1, np.float64(1), np.int32(1), np.bool_(1)])
def test_any_kind_of_number_will_do(value):
    assert score(lambda e, c: value, EXAMPLES[:1], [["x"]]).rewards.tolist() == [[1.0]]


def test_an_interrupt_is_not_swallowed():
    def interrupted(example, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, EXAMPLES[:1], [["x"]])


def test_examples_and_completions_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        score(exact_match, EXAMPLES, [["2"]])
