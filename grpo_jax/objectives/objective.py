"""Objective: one choice per axis, and the numbers that the choices read.

The choices of an axis are the keys of its registry; what an entry needs (its function,
text, numbers, properties) is there. `docs/extending.md` adds one of each kind.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from grpo_jax.errors import (
    UP_TO_ONE,
    Bound,
    OneOf,
    check_fields,
    field_rules,
    positive,
)
from grpo_jax.objectives import formula
from grpo_jax.objectives.aggregation import AGGREGATIONS
from grpo_jax.objectives.baselines import BASELINES
from grpo_jax.objectives.divergences import DIVERGENCES
from grpo_jax.objectives.ratios import RATIOS
from grpo_jax.objectives.scales import SCALES
from grpo_jax.objectives.surrogates import HINGES, MASKS, SURROGATES
from grpo_jax.objectives.token_weights import TOKEN_WEIGHTS
from grpo_jax.records import Record

_NotNegative = Annotated[float, Bound("not be negative", lambda x: x >= 0)]
_Count = Annotated[int, Bound("not be negative", lambda x: x >= 0)]
_Positive = Annotated[float, positive()]
_PositiveOrNone = Annotated[float, Bound("be positive or None", lambda x: x > 0)] | None
_AboveOneOrNone = Annotated[float, Bound("be above 1 or None", lambda x: x > 1)] | None
_CapOrNone = Annotated[float, Bound("be at least 1 or None", lambda x: x >= 1)] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Record):
    """One member of the GRPO family: only choices of maths, no engineering knobs.

    The loss of a prompt is sum_(i,t) C_it (w_it l_it) + kl_coef sum_(i,t) C_it kl_it:
    l the surrogate of ratio and advantage, w the token weights, C the aggregation.
    The fields of the last block are about the loop around the loss: the loss does not
    read them, `grpo_jax.train` honours them.
    """

    # Advantages: [P, G], constants
    baseline: Annotated[str, OneOf(BASELINES)]
    scale: Annotated[str, OneOf(SCALES)]
    std_eps: _NotNegative = 1e-6  # added to the std (or the group mean), reward units
    # 0: population std, 1: sample std
    std_ddof: Annotated[int, Bound("be 0 or 1", lambda x: x in (0, 1))] = 0

    # The term of a token, or of a completion
    ratio: Annotated[str, OneOf(RATIOS)]
    surrogate: Annotated[str, OneOf(SURROGATES)]
    # (low, high): the ratio's region is [1 - low, 1 + high]; low None: no lower edge.
    # "clipped_geometric" cuts log-ratios at (-low, high); "hinge": its margins.
    clip: tuple[float | None, float] = (0.2, 0.2)
    dual_clip: _AboveOneOrNone = None  # "ppo": loss at most -dual_clip A where A < 0
    ratio_cap: _CapOrNone = None  # "ppo", "masked_is": r itself is cut here
    # "relative_is", "rpe": r / (mixture r + 1 - mixture)
    mixture: Annotated[float, Bound("be in (0, 1)", lambda x: 0 < x < 1)] = 0.5
    # "masked_is": its distance of probabilities, past which a token is dropped
    mask: Annotated[str, OneOf(MASKS)] = "tv"
    mask_limit: _Positive = 0.15
    hinge: Annotated[str, OneOf(HINGES)] = "ratio"  # "hinge": its classifier
    tau: _Positive = 1e-3  # "fisher_rao": the penalty's temperature

    # Token weights, and how tokens become a prompt's loss
    token_weight: Annotated[str, OneOf(TOKEN_WEIGHTS)] = "none"
    entropy_coef: _NotNegative = 0.0  # A less this times the completion's mean entropy
    entropy_limit: _PositiveOrNone = None  # nats; completions above it have weight 0
    aggregation: Annotated[str, OneOf(AGGREGATIONS)]
    first_token_weight: _Positive = 1e-3  # "first_rest...": of each first token

    # KL(policy || reference)
    kl_coef: _NotNegative = 0.0  # 0 loads no reference policy
    divergence: Annotated[str, OneOf(DIVERGENCES)] = "k3"  # its estimator
    kl_in: Literal["loss", "reward"] = "loss"

    # What the loop around the loss does
    drafts: _Count = 0  # drafts per prompt; the best is appended to it (iGRPO)
    refills: _Count = 0  # times tied groups are sampled again on new prompts (DAPO)
    overlong: Literal["keep", "mask", "punish"] = "keep"  # completions cut off (DAPO)
    # "punish": the last share of the budget it spans
    overlong_share: Annotated[float, UP_TO_ONE] = 0.2
    tis_cap: _CapOrNone = None  # weight min(trainer's pi / sampler's pi, tis_cap)
    stop_deviation: _PositiveOrNone = None  # no more updates past mean |r - 1| (ESPO)
    # Rollouts of the last so many iterates in an update (RT-PG)
    history: Annotated[int, Bound("be at least 1", lambda x: x >= 1)] = 1
    disjoint: bool = False  # each update of a rollout has its own prompts (TIC-GRPO)
    source: str  # where each choice is printed, or that it is a convention

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        _check_clip(self)
        _check_kl(self)
        check = SURROGATES[self.surrogate].check
        if check is not None:
            check(self)
        linear = SURROGATES[self.surrogate].linear
        if self.entropy_coef and not (linear and not RATIOS[self.ratio].reads_sign):
            raise ValueError(
                "entropy_coef needs a surrogate and a ratio that do not depend on A's "
                f"sign, got {self.surrogate} and {self.ratio}; the shift of A is not "
                "proportional to A."
            )

    def has_ratio(self) -> bool:
        """Whether it corrects for a behaviour policy other than the current one."""
        reads_ratio = SURROGATES[self.surrogate].reads_ratio
        return RATIOS[self.ratio].corrects and reads_ratio

    def uses(self) -> frozenset[str]:
        """The fields that the chosen axes read; changing another changes nothing."""
        surrogate, ratio = SURROGATES[self.surrogate], RATIOS[self.ratio]
        # Where the ratio is exactly 1 nothing is ever clipped or capped.
        numbers = {*ratio.uses, *(surrogate.uses if ratio.corrects else ())}
        if surrogate.reads_ratio or ratio.sequence:
            numbers.add("ratio")
        numbers.update(BASELINES[self.baseline].uses, SCALES[self.scale].uses)
        numbers.update(AGGREGATIONS[self.aggregation].uses)
        if self.kl_coef:
            numbers.update(("divergence", "kl_in"))
        if self.overlong == "punish":
            numbers.add("overlong_share")
        return frozenset(numbers | (_FIELDS - _sometimes_read()))

    def formula(self) -> str:
        """The loss of one prompt, as it is computed, in one line."""
        return formula.loss(self)

    def axes(self) -> str:
        """The choice on every axis, and the numbers that these choices read."""
        return formula.choices(self)

    def mechanisms(self) -> list[str]:
        """What the loop around the loss has to do, in words; [] for most."""
        return formula.mechanisms(self)


_CHOICES = {
    name: rule
    for name, row in field_rules(Objective).items()
    for rule in row.rules
    if isinstance(rule, OneOf)
}
# Every axis that can be extended: its field of `Objective` and its registry.
AXES: dict[str, Mapping[str, Any]] = {
    name: rule.choices
    for name, rule in _CHOICES.items()
    if isinstance(rule.choices, Mapping)
}
_FIELDS = {field.name for field in dataclasses.fields(Objective)} - {"source"}


def choices() -> dict[str, tuple[str, ...]]:
    """Field of `Objective` -> the names that it may have, where it is a choice."""
    return {name: tuple(rule.choices) for name, rule in _CHOICES.items()}


def _sometimes_read() -> set[str]:
    """The fields that only some objectives read."""
    entries = (entry for registry in AXES.values() for entry in registry.values())
    numbers = {name for entry in entries for name in getattr(entry, "uses", ())}
    return numbers | {"ratio", "divergence", "kl_in", "overlong_share"}


def _check_clip(o: Objective) -> None:
    pair = isinstance(o.clip, tuple) and len(o.clip) == 2
    low, high = o.clip if pair else (0.0, 0.0)
    surrogate = SURROGATES[o.surrogate]
    hinge = "hinge" in surrogate.uses
    in_log_space = (hinge and o.hinge == "log") or (
        "clip" in RATIOS[o.ratio].uses and "clip" not in surrogate.uses
    )
    most = math.inf if in_log_space else 1
    low_is_good = not hinge if low is None else 0 < low < most
    if not (low_is_good and 0 < high < math.inf):
        raise ValueError(
            f"clip must be a pair (low in (0, 1), high > 0), got {o.clip}; "
            "it keeps the ratio in [1 - low, 1 + high], and low may be None for no "
            "lower edge (but of a hinge)."
        )


def _check_kl(o: Objective) -> None:
    if o.kl_coef and o.kl_in == "loss" and not DIVERGENCES[o.divergence].in_loss:
        raise ValueError(
            f"divergence {o.divergence} in the loss constrains nothing (its gradient "
            "has mean zero on policy); use kl_in='reward', or k2 or k3."
        )
