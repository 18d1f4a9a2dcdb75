"""When a run says that its sampler has other numbers than the trainer."""

import dataclasses

import pytest

import grpo_jax as gj
from grpo_jax.training.mismatch import mismatch_warning


@pytest.mark.parametrize(
    ("mean", "changes", "said"),
    [
        (0.03, {}, None),  # bfloat16
        (float("nan"), {}, None),
        (0.06, {}, "nothing corrects for it: --objective.tis-cap 2"),
        (0.06, dict(tis_cap=2.0), None),
        (0.4, dict(tis_cap=2.0), None),
        (0.06, dict(history=2), "and nothing corrects for it."),  # takes no tis_cap
        (0.6, {}, "another policy sampled"),
        (0.6, dict(tis_cap=2.0), "another policy sampled"),
    ],
)
def test_what_is_said_of_a_mismatch(mean, changes, said):
    objective = dataclasses.replace(gj.OBJECTIVES["grpo"], **changes)
    metrics = {"mismatch/mean_abs": mean, "mismatch/max_abs": 1.25}
    text = mismatch_warning(metrics, objective)
    if said is None:
        assert text is None
    else:
        assert said in text and f"by {mean:g} nats a token" in text
        assert "1.2 at most" in text
