"""The effect of other prompts' gradients on hard prompts, and its test."""

import numpy as np
import pytest

from grpo_jax.report.instrument_text import rate_factor_interval, reading
from grpo_jax.report.interference import effect_on_hard
from tests.unit.test_instrument_figures import made_row

NAN = float("nan")


def row_of(gradients, rates, *, exact=False, raw=None, step=0):
    """A row of prompts with these (sampled) gradients [P, D]; raw norms [P]."""
    row = made_row(step, prompts=len(gradients), exact=exact)
    norms = np.linalg.norm(gradients, axis=1)
    unit = gradients / np.where(norms > 0, norms, NAN)[:, None]
    raw = norms**2 if raw is None else np.asarray(raw)
    field = row["exact"] if exact else row["geometry"]
    field["cosines"] = (unit @ unit.T).tolist()
    if exact:
        field["norms"] = norms.tolist()
        row["pass_rate"] = rates
    else:
        field |= {"squared_norms": (norms**2).tolist(), "raw_squared_norms": raw}
        row["group_mean"] = rates
        row["group_std"] = [(p * (1 - p)) ** 0.5 for p in rates]  # of rewards 0 and 1
    return row


# Gradients (1, 0), (.6, .8) and (0, 2): the first two are hard; L^2 = 1 + 1 + 4.
GRADIENTS = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [0.0, 0.0]])
RATES = [0.1, 0.2, 0.5, 0.0]


@pytest.mark.parametrize("exact", [False, True])
def test_the_effect_on_hard_prompts_with_signal(exact):
    effect = effect_on_hard([row_of(GRADIENTS, RATES, exact=exact)] * 3)
    assert (effect.prompts, effect.measurements) == (6, 3)
    np.testing.assert_allclose(effect.own, 1 / 6**0.5)
    np.testing.assert_allclose(effect.others, (0.6 + (0.6 + 1.6)) / 2 / 6**0.5)
    assert (effect.band is None) == exact and effect.hurt == 0
    opposed = GRADIENTS * [[1.0], [-1.0], [1.0], [1.0]]
    opposed = effect_on_hard([row_of(opposed, RATES, exact=exact)])
    np.testing.assert_allclose(opposed.others, (-0.6 + (-0.6 - 1.6)) / 2 / 6**0.5)
    assert opposed.hurt == 1
    assert opposed.direction == (-1 if exact else 0)  # one sample of signs says little


# Of 4 prompts along one line the sum of all products is 12, 0 or -4: 12 is 2 of 16.
def test_the_direction_is_what_random_signs_do_not_do():
    aligned = np.ones((4, 1))
    once, often = (effect_on_hard([row_of(aligned, [0.1] * 4)] * n) for n in (1, 8))
    assert once.band == (-0.5, 1.5) and once.others == 1.5 and once.direction == 0
    assert often.others == 1.5 and often.direction == 1 and often.band[1] < 1.2
    spread = np.array([[1.0], [1.0], [-1.0], [-1.0]])
    assert effect_on_hard([row_of(spread, [0.1] * 4)] * 40).direction == -1


def test_gradients_in_hashed_sums_are_no_exact_ones():
    row = row_of(GRADIENTS, RATES, exact=True)
    row |= {"directions": 64} | {"group_mean": RATES}
    assert effect_on_hard([row]).band is not None
    del row["directions"]  # as older versions wrote
    assert effect_on_hard([row]).band is not None


def test_too_few_hard_prompts_are_not_said_to_be_helped_or_hurt():
    rates = [0.1] * 3 + [0.5]
    row = row_of(np.ones((4, 1)), rates)
    assert effect_on_hard([row] * 8).different == 3
    text = reading([row] * 8)[2]
    assert "3 probe prompts with signal had a pass rate below 1/3: at least 4" in text
    assert "change by" not in text


def test_without_hard_prompts_there_is_no_effect():
    row = row_of(GRADIENTS, [0.5, 0.6, 0.7, 0.0])
    assert effect_on_hard([row]) is None
    assert "No measurement has a prompt with signal and a pass" in reading([row])[2]


@pytest.mark.parametrize(
    ("exact", "factor", "words"),
    [
        (True, 1, "interference helps them on average, and hurts 0 % of them"),
        (False, 8, "interference helps them on average (with random signs"),
        (False, 1, "interference is not shown to help or to hurt them (with random"),
    ],
)
def test_the_sentence_names_a_direction_that_was_shown(exact, factor, words):
    rows = [row_of(np.ones((4, 1)), [0.1] * 4, exact=exact)] * factor
    assert words in reading(rows)[2]


# Groups of 4: s is 1/2 at one or three right, 3^-.5 at two.
@pytest.mark.parametrize(
    ("sigma", "words"),
    [
        ([0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "below 1, so the upper"),
        ([0.5] * 6 + [3**-0.5] * 2, "not below 1, so the theorem"),
        ([0.5, 0.5, 0.0, 3**-0.5, 0.5, 0.0, 0.5, 0.0], "is not known"),
    ],
)
def test_c_is_below_one_only_where_its_interval_is(sigma, words):
    row = made_row(0, prompts=8, exact=False)
    row["sigma"] = sigma
    assert words in reading([row])[1]
    low, high = rate_factor_interval([row] * 4)  # the same prompts once more
    assert (low, high) == rate_factor_interval([row])
    assert low < 8 / 3 * np.mean(sigma) < high


def test_c_of_exact_pass_rates_is_no_interval():
    assert rate_factor_interval([made_row(0)]) == (0.8, 0.8)
