"""Default learning rates, warnings of high ones, and of updates that go too far."""

import numpy as np
import pytest

from grpo_jax import TrainConfig
from grpo_jax.planning.learning_rate import RATES, learning_rate
from grpo_jax.training.first_updates import advice, too_far
from grpo_jax.training.step import Part, PromptTerms, SampleTerms, log_prob_change


def config(rate=None, **more):
    return TrainConfig(optimizer={"learning_rate": rate}, **more)


@pytest.mark.parametrize(
    ("pretrained", "lora", "expected"),
    [
        (None, False, (3e-4, "the default for a new model")),
        (None, True, (3e-4, "the default for a new model")),
        ("d", False, (1e-5, "the default for a pretrained model trained in full")),
        ("d", True, (3e-4, "the default for LoRA on a pretrained model")),
    ],
)
def test_the_default_is_by_what_is_trained(pretrained, lora, expected):
    rate = learning_rate(config(pretrained=pretrained), lora=lora)
    assert (rate.value, rate.source) == expected
    assert rate.warning is None and rate.default == rate.value
    given = learning_rate(config(1e-7, pretrained=pretrained), lora=lora)
    assert given[:3] == (1e-7, rate.value, "as given") and given.warning is None


@pytest.mark.parametrize("kind", RATES)
def test_a_high_rate_is_warned_of(kind):
    rule, pretrained = RATES[kind], None if kind == "new" else "d"

    def warning(rate):
        made = learning_rate(config(rate, pretrained=pretrained), lora=kind == "lora")
        return made.warning

    assert rule.default < rule.high and warning(rule.high) is None
    text = warning(1.01 * rule.high) or ""
    assert rule.trained in text and f"The default is {rule.default:g}" in text


def part(q, factors, advantages):
    """A batch of coefficients q [P, G, T], prompt weights [P] and advantages [P, G]."""
    each = np.full(len(q), 1 / len(q))
    prompt = PromptTerms(None, None, factors * each, each)
    empty = dict.fromkeys(SampleTerms._fields)
    return Part(
        prompt, SampleTerms(**empty | dict(advantages=advantages, coefficients=q))
    )


def test_the_change_of_log_probs_is_a_lower_bound_reached_along_the_advantages():
    rng = np.random.default_rng(0)
    q = rng.uniform(size=(3, 4, 5)) * (rng.uniform(size=(3, 4, 5)) > 0.3)
    factors, advantages = rng.uniform(size=3), rng.normal(size=(3, 4))
    slopes = (factors[:, None] * advantages)[..., None] + 0 * q
    batch = part(q, factors, advantages)

    def both(change):
        rms = np.sqrt((q * change**2).sum() / q.sum())
        return log_prob_change(batch, (q * slopes * change).sum() / len(q)), rms

    for _ in range(5):
        bound, rms = both(rng.normal(size=q.shape))
        assert 0 < bound < rms
    np.testing.assert_allclose(*both(-0.7 * slopes), rtol=1e-5)
    assert log_prob_change(part(q, factors, 0 * advantages), 0.3) == 0


def test_no_alarm_where_runs_learned_and_one_where_they_were_destroyed():
    """Figures of runs on a pretrained model; see BUILD_NOTES.md."""

    def measured(step, change, kl, **more):
        row = {"update/log_prob_change": change, "kl/mean": kl}
        return too_far(step, row, **more)

    for name, change, kl in (
        ("full at 1e-5", 0.065, 0.077), ("full at 3e-5", 0.309, 0.207),
        ("LoRA at 3e-4", 0.069, 0.131), ("chains at 3e-4", 0.047, 0.018),
    ):  # fmt: skip
        assert all(measured(step, change, kl) is None for step in range(1, 5)), name
    assert "3.1 nats a token or more" in measured(1, 3.092, 0)
    assert "0.75 nats a token from where it started" in measured(2, 0.4, 0.7505)
    assert "is far for one update" in too_far(1, {"update/log_prob_change": 3.0})
    # Later a policy may be far from its start; a warm-up only delays the updates.
    assert measured(9, 3.0, 2.0) is None
    assert measured(9, 3.0, 2.0, warmup=5) and not measured(9, 0.3, 2.0, warmup=5)


def test_the_advice_is_a_lower_rate():
    assert "--optimizer.learning-rate 1e-05," in advice(3e-4, 1e-5)
    assert "--optimizer.learning-rate 1e-06," in advice(1e-5, 1e-5)
