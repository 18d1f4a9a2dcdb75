"""The prompt weights that every run is compared with."""

from grpo_jax.preconditioner import std_weights, unit_weights
from grpo_jax.prompt_weights import posterior_weights

# Compared besides the run's own weights, which come first.
RULES = {
    "reinforce": unit_weights(),
    "std": std_weights(),
    "shrunk": posterior_weights(),
    "1/std^2": std_weights(power=2.0),
}


WEIGHTINGS = 1 + len(RULES)
