import itertools
import math

import numpy as np
import pytest

from grpo_jax import Example
from grpo_jax.evaluation.figures import (
    cut_off_share,
    mean_reward_interval,
    missing_and_failed,
    pass_at_k,
    pass_rate_interval,
    summarise,
    table,
)
from grpo_jax.evaluation.sampled import PromptAnswers
from grpo_jax.rollouts.judging import completions_ended


def answered(index, solved, tokens=None):
    rewards = [None if s is None else float(s) for s in solved]
    tokens = tokens or [3] * len(solved)
    return PromptAnswers(index, list(solved), rewards, tokens, [""] * len(solved))


def example(**tags):
    return Example("?", "1", tags=tuple(tags.items()))


@pytest.mark.parametrize("solved", range(6))
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(solved, k):
    outcomes = [1] * solved + [0] * (5 - solved)
    subsets = list(itertools.combinations(outcomes, k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    assert pass_at_k(solved, 5, k) == pytest.approx(expected)


def test_one_sample_of_each_prompt_has_the_exact_binomial_interval():
    rows = [answered(i, [i < 8]) for i in range(10)]
    value, low, high = pass_rate_interval(rows)
    # Clopper and Pearson 1934 at n = 10, 8 successes: (0.444, 0.975).
    assert (value, round(low, 3), round(high, 3)) == (0.8, 0.444, 0.975)


def test_a_missing_reward_is_left_out():
    rows = [answered(0, [True]), answered(1, [None]), answered(2, [False])]
    assert pass_rate_interval(rows)[0] == 0.5
    rows = [answered(0, [True, None]), answered(1, [None, None])]
    assert summarise(rows, [example()] * 2, [1])["avg@2"]["all"]["value"] == 1.0


def test_nothing_known_is_no_rate():
    rows = [answered(0, [None]), answered(1, [None])]
    entry = summarise(rows, [example()] * 2, [1])["pass rate"]["all"]
    assert math.isnan(entry["value"]) and entry["prompts"] == 0


def test_several_samples_count_by_prompt():
    rows = [answered(0, [True, True]), answered(1, [True, False]), answered(2, [0, 0])]
    assert pass_rate_interval(rows)[0] == pytest.approx(0.5)


def test_no_spread_is_no_certainty():
    rows = [answered(i, [False, False]) for i in range(10)]
    value, low, high = pass_rate_interval(rows)
    assert (value, low) == (0, 0) and high == pytest.approx(1 - 0.025**0.1)
    entry = summarise(rows, [example()] * 10, [2])["pass@2"]["all"]
    assert entry["high"] == pytest.approx(high)


def test_summary_has_every_tag_and_every_k():
    examples = [example(level="1"), example(level="2"), example(level="2")]
    rows = [answered(0, [1, 1]), answered(1, [1, 0]), answered(2, [0, 0])]
    found = summarise(rows, examples, [1, 2])
    assert list(found) == ["avg@2", "pass@1", "pass@2", "reward", "tokens"]
    values = {name: entry["value"] for name, entry in found["pass@2"].items()}
    assert values == {"all": pytest.approx(2 / 3), "level=1": 1.0, "level=2": 0.5}
    assert found["avg@2"]["level=2"]["value"] == 0.25
    assert found["avg@2"]["level=2"]["prompts"] == 2
    lines = table(found).splitlines()
    assert len(lines) == 4 and len({len(line.rstrip()) > 0 for line in lines}) == 1


def rewarded(index, rewards, failed=0):
    """Answers of these rewards, none of which solves its prompt."""
    solved = [None if r is None else False for r in rewards]
    count = len(rewards)
    return PromptAnswers(index, solved, rewards, [3] * count, [""] * count, failed)


# By prompt: (2 + 4) / 2 = 3 and 1; the prompt without rewards is left out: mean 2, std
# sqrt(2), and t = tan(.475 pi) = 12.706 of one degree of freedom: half width t.
def test_mean_reward_is_over_prompts_that_have_rewards():
    rows = [rewarded(0, [2.0, 4.0]), rewarded(1, [None, 1.0]), rewarded(2, [None] * 2)]
    mean, low, high = mean_reward_interval(rows)
    half = math.tan(0.475 * math.pi)
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))
    entry = summarise(rows, [example()] * 3, [1])["reward"]["all"]
    assert entry == {"value": 2.0, "low": low, "high": high, "prompts": 2}


def test_rewards_that_do_not_differ_have_a_mean_without_an_interval():
    mean, *ends = mean_reward_interval([rewarded(0, [0.5]), rewarded(1, [0.5])])
    assert mean == 0.5 and all(math.isnan(x) for x in ends)
    assert all(math.isnan(x) for x in mean_reward_interval([rewarded(0, [None])]))


def test_answers_that_were_not_judged_are_counted():
    rows = [rewarded(0, [None, 1.0]), rewarded(1, [0.0, 0.0], failed=3)]
    assert missing_and_failed(rows) == (1, 3)
    assert missing_and_failed([]) == (0, 0)


def test_table_says_none_where_there_is_no_figure():
    line = table(summarise([rewarded(0, [None])], [example()], [1])).splitlines()[1]
    assert line.split() == ["all", "0", "none", "none", "3.0"]


# The last token decides, not the length: an end at the limit is an end.
def test_completions_without_an_end_of_their_own_were_cut_off():
    tokens = [[5, 6, 7], [5, 6, 1], [5, 2, 0], [1, 6, 0], [0, 0, 0]]
    completions = np.array([tokens, tokens[::-1]])
    lengths = np.array([[3, 3, 2, 2, 0], [0, 2, 2, 3, 3]])
    ended = completions_ended(completions, lengths, (1, 2))
    assert ended[0].tolist() == [False, True, True, False, False]
    assert ended[1].tolist() == ended[0].tolist()[::-1]


def test_the_share_cut_off_is_a_figure():
    rows = [answered(0, [1, 0]), answered(1, [1, 1]), answered(2, [0, 1])]
    cuts = [[True, False], [False, False], [True, True]]
    rows = [row._replace(cut_off=cut) for row, cut in zip(rows, cuts, strict=True)]
    assert cut_off_share(rows) == 3 / 6
    examples = [example(level="1"), example(level="2"), example(level="2")]
    found = summarise(rows, examples, [2])["cut off"]
    assert found["all"]["value"] == 0.5 and found["all"]["prompts"] == 3
    assert found["level=1"]["value"] == 0.5 and found["level=2"]["value"] == 0.5
    # Answers of an older version do not say.
    assert "cut off" not in summarise([*rows, answered(2, [1, 1])], examples, [2])
