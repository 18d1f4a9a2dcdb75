"""What is said of prompt weights that no rule should give."""

import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.training.odd_weights import odd_weights, rule_name

PROMPTS = ["ab", "cd", "ef"]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0, 1, 1e9], None),
        (
            [1, np.nan, np.inf],
            "gave nan to prompt 'cd' (2 of 3 weights are not finite)",
        ),
        ([1, 2, -np.inf], "gave -inf to prompt 'ef' (1 of 3 weights are not finite)"),
        ([-0.5, 1, np.nan], "gave nan to prompt 'ef' (1 of 3 weights are not finite)"),
        ([1, -0.5, -1], "gave -0.5 to prompt 'cd' (2 of 3 weights are negative)"),
    ],
)
def test_the_first_prompt_and_its_weight_are_named(weights, said):
    found = odd_weights("the rule", np.float32(weights), PROMPTS)
    assert found is None if said is None else found.startswith(f"the rule {said}: ")


def test_a_rule_has_the_name_it_was_given_by():
    named = gj.TrainConfig(weights=gj.WeightsConfig(name="my.rules:focal"))
    assert rule_name(named) == "the prompt weights my.rules:focal"
    assert rule_name(gj.TrainConfig()) == "the scale of objective grpo"
