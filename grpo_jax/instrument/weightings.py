"""The prompt weights whose effect every run is compared with."""

from grpo_jax.preconditioner import std_weights, unit_weights
from grpo_jax.prompt_weights import posterior_weights

RULES = {
    "reinforce": unit_weights(),
    "std": std_weights(),
    "shrunk": posterior_weights(),
    "1/std^2": std_weights(power=2.0),
}
WEIGHTINGS = 1 + len(RULES)  # of a counterfactual step: the run's weights come first
