"""Scale axis: the prompt weights that are part of an objective."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from grpo_jax.advantages import leave_one_out_inverse_std
from grpo_jax.preconditioner import PromptWeights, std_weights, unit_weights
from grpo_jax.prompt_weights import batch_std_weights, beta_weights, group_mean_weights

if TYPE_CHECKING:  # objective.py imports this module
    from grpo_jax.objectives.objective import Objective


class Scale(NamedTuple):
    """A row of `SCALES`.

    Attributes:
        weights: objective -> the prompt weights.
        divisor: objective -> what `Objective.formula` divides A by; None: nothing.
        uses: The objective's numbers that it reads.
        per_sample: (objective, rewards [P, G]) -> [P, G] factors of the advantages,
            for a scale that differs within a group.
        by_length: Rewards are divided by their completion's length first. A group tied
            at a reward that is not 0 is then told apart by its lengths, at full size.
        pass_rates: It is made of pass rates, as `Rule.pass_rates`.
    """

    weights: Callable[["Objective"], PromptWeights]
    divisor: Callable[["Objective"], str | None]
    uses: tuple[str, ...] = ()
    per_sample: Callable[["Objective", jax.Array], jax.Array] | None = None
    by_length: bool = False
    pass_rates: bool = False


def _std(o: "Objective") -> dict[str, Any]:
    return {"eps": o.std_eps, "ddof": o.std_ddof}


def _std_text(of: str) -> Callable[["Objective"], str]:
    def text(o: "Objective") -> str:
        ddof = f", ddof {o.std_ddof}" if o.std_ddof else ""
        return f"{of} + {o.std_eps:g}{ddof}"

    return text


SCALES = {
    "none": Scale(lambda o: unit_weights(), lambda o: None),
    # GRPO: the preconditioner
    "std": Scale(
        lambda o: std_weights(**_std(o)), _std_text("std"), ("std_eps", "std_ddof")
    ),
    "batch_std": Scale(
        lambda o: batch_std_weights(**_std(o)),
        _std_text("batch's std"),
        ("std_eps", "std_ddof"),
    ),
    # MaxRL
    "group_mean": Scale(
        lambda o: group_mean_weights(eps=o.std_eps),
        lambda o: f"mean + {o.std_eps:g}",
        ("std_eps",),
        pass_rates=True,
    ),
    # BNPO
    "beta": Scale(
        lambda o: beta_weights(),
        lambda o: "Beta density at mean, fitted to the batch's means",
        pass_rates=True,
    ),
    "length_std": Scale(
        lambda o: std_weights(**_std(o)),
        _std_text("std"),
        ("std_eps", "std_ddof"),
        by_length=True,
    ),
    # NeMo-RL
    "leave_one_out_std": Scale(
        lambda o: unit_weights(),
        _std_text("std of others"),
        ("std_eps", "std_ddof"),
        per_sample=lambda o, r: leave_one_out_inverse_std(r, **_std(o)),
    ),
}
