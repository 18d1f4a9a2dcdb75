import json

import numpy as np
import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.planning.informative import (
    Counted,
    expected_informative,
    informative_share,
    read_pass_rates,
)


# p = .18, G = 2: 1 - .0324 - .6724; p = 1/2, G = 4: 1 - 2 / 16.
@pytest.mark.parametrize(
    ("p", "g", "expected"),
    [(0.18, 2, 0.2952), (0.5, 4, 0.875), (0.0, 8, 0.0), (1.0, 8, 0.0)],
)
def test_share_of_informative_groups(p, g, expected):
    assert informative_share(p, g) == pytest.approx(expected)


# 1 of 4 solved, groups of 2: of the 6 pairs, 3 hold the right one.
def test_counts_are_unbiased_where_a_group_was_asked():
    assert Counted(0.25, 1, 4).informative(2) == pytest.approx(0.5)
    assert Counted(0.25, 1, 4).informative(8) == informative_share(0.25, 8)
    rng = np.random.default_rng(0)
    solved = rng.binomial(16, 0.1, 20_000)
    counted = [Counted(k / 16, int(k), 16) for k in solved]
    expected = informative_share(0.1, 8)
    assert expected_informative(counted, 8) == pytest.approx(expected, abs=0.01)


def test_reads_what_eval_writes_and_lists(tmp_path):
    rows = [
        dict(index=3, solved=[True, False, None], rewards=[1, 0, None]),
        dict(index=4, solved=[None]),
        dict(index=5, solved=[True, True]),
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [Counted(0.5, 1, 2), Counted(1.0, 2, 2)]
    assert read_pass_rates(file) == read_pass_rates(tmp_path) == expected
    rates = tmp_path / "rates.json"
    rates.write_text("[0.25, 1]")
    assert read_pass_rates(rates) == [Counted(0.25), Counted(1.0)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no prompt with a known outcome"),
        ("[]", "no prompt with a known outcome"),
        ("[0.5, 50]", "got 50; a share, not a percentage"),
        ("[true]", "got True"),
        ("[0.5", "is not JSON"),
        ('{"rewards": [1]}', "line 1, must have a list `solved`"),
        ('{"solved": 3}', "line 1, must have a list `solved`"),
        ("hello", "line 1, must have a list `solved`"),
        ('{"solved": "yes"}', "line 1, must have a list `solved`"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, text, words):
    file = tmp_path / "rates"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_pass_rates(file)
    assert words in str(caught.value) and "rates" in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read --pass-rates"):
        read_pass_rates(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="no samples.jsonl"):
        read_pass_rates(tmp_path)
