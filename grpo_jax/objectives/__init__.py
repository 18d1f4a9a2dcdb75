"""The family of objectives: small pure axis functions, and a table of their choices."""

from grpo_jax.objectives.loss import per_prompt_losses as per_prompt_losses
from grpo_jax.objectives.loss import policy_loss as policy_loss
from grpo_jax.objectives.objective import Objective as Objective
from grpo_jax.objectives.presets import OBJECTIVES as OBJECTIVES
