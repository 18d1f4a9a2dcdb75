"""Objective: one choice per axis. OBJECTIVES: one row per method of the family.

An ablation is one line: `dataclasses.replace(OBJECTIVES["grpo"], scale="none")`.
"""

import dataclasses
import math
from types import MappingProxyType
from typing import Literal

from grpo_jax.errors import check_choice
from grpo_jax.objectives.aggregation import AGGREGATIONS
from grpo_jax.objectives.divergences import DIVERGENCES
from grpo_jax.objectives.ratios import RATIOS
from grpo_jax.objectives.surrogates import SURROGATES

_CHOICES = {
    "baseline": ("none", "mean", "leave_one_out"),
    "scale": ("none", "std"),
    "ratio": RATIOS,
    "surrogate": SURROGATES,
    "aggregation": AGGREGATIONS,
    "divergence": DIVERGENCES,
    "kl_in": ("loss", "reward"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """One member of the GRPO family: only choices of maths, no engineering knobs."""

    baseline: Literal["none", "mean", "leave_one_out"]
    scale: Literal["none", "std"]  # "std": the preconditioner, `inverse_std`
    std_eps: float = 1e-6  # added to the std, in reward units
    std_ddof: int = 0  # 0: population std, 1: sample std
    ratio: Literal["none", "token"]
    surrogate: Literal["logp", "ppo"]
    clip: tuple[float, float] = (0.2, 0.2)  # "ppo": ratio kept in [1 - low, 1 + high]
    aggregation: Literal[
        "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"
    ]
    divergence: Literal["k1", "k3"] = "k3"  # estimator of KL(policy || reference)
    kl_in: Literal["loss", "reward"] = "loss"
    kl_coef: float = 0.0  # 0 loads no reference policy
    source: str  # where each choice is printed, or that it is a convention

    def __post_init__(self):
        for axis, choices in _CHOICES.items():
            check_choice(axis, getattr(self, axis), choices)
        pair = isinstance(self.clip, tuple) and len(self.clip) == 2
        if not (pair and 0 < self.clip[0] < 1 and 0 < self.clip[1] < math.inf):
            raise ValueError(
                f"clip must be a pair (low in (0, 1), high > 0), got {self.clip}; "
                "it keeps the ratio in [1 - low, 1 + high]."
            )
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef must not be negative, got {self.kl_coef}.")
        if not self.std_eps >= 0 or self.std_ddof not in (0, 1):
            raise ValueError(
                "std_eps must not be negative and std_ddof must be 0 or 1, "
                f"got {self.std_eps} and {self.std_ddof}."
            )
        if self.kl_in == "loss" and self.divergence == "k1" and self.kl_coef:
            raise ValueError(
                "divergence k1 in the loss constrains nothing (its gradient has mean "
                "zero on policy); use kl_in='reward', or k3."
            )

    def formula(self) -> str:
        """The loss of one prompt, as it is computed, in one line."""
        advantage = {
            "none": "R",
            "mean": "R - mean",
            "leave_one_out": "R - mean of others",
        }[self.baseline]
        if self.scale == "std":
            ddof = f", ddof {self.std_ddof}" if self.std_ddof else ""
            advantage = f"({advantage}) / (std + {self.std_eps:g}{ddof})"
        if self.surrogate == "logp":
            token = "-A log pi"
        else:
            low, high = self.clip
            ratio = "pi / sg pi" if self.ratio == "none" else "pi / pi_old"
            token = f"-min(r A, clip(r, {1 - low:g}, {1 + high:g}) A), r = {ratio}"
        total = {
            "sequence_mean_token_mean": "mean_i mean_t",
            "sequence_mean_token_sum": "mean_i sum_t",
            "constant": "mean_i sum_t/T",
        }[self.aggregation]
        kl = f"{self.kl_coef:g} {self.divergence}(pi, ref)"
        if self.kl_coef and self.kl_in == "loss":
            token = f"[{token}] + {kl}"
        if self.kl_coef and self.kl_in == "reward":
            advantage += f", R less sum_t {kl}"
        return f"{total} {token};  A = {advantage}"


# fmt: off
OBJECTIVES = MappingProxyType({
    "reinforce": Objective(
        baseline="mean", scale="none", ratio="none", surrogate="logp",
        aggregation="sequence_mean_token_sum",
        source="Williams 1992, with the group's mean as baseline; on policy",
    ),
    "rloo": Objective(
        baseline="leave_one_out", scale="none", ratio="none", surrogate="logp",
        aggregation="sequence_mean_token_sum", divergence="k1", kl_in="reward",
        kl_coef=0.03,
        source="Ahmadian et al. 2024, arXiv:2402.14740 Sec. 2 (leave-one-out, KL in "
        "the reward); beta 0.03 as in its experiments",
    ),
    "grpo": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="ppo", clip=(0.2, 0.2),
        aggregation="sequence_mean_token_mean", divergence="k3", kl_coef=0.04,
        source="Shao et al. 2024, arXiv:2402.03300 Sec. 4 (std, k3, beta 0.04); "
        "clip 0.2, ddof 0 and eps are conventions, not stated",
    ),
    "dr_grpo": Objective(
        baseline="mean", scale="none", ratio="token", surrogate="ppo", clip=(0.2, 0.2),
        aggregation="constant",
        source="Liu et al. 2025, arXiv:2503.20783 Sec. 3 (no std, constant length); "
        "clip 0.2 and beta 0 as in the authors' code",
    ),
})
# fmt: on
