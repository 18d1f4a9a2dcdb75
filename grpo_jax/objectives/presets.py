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
from grpo_jax.objectives.ratios import RATIOS, SEQUENCE_RATIOS
from grpo_jax.objectives.surrogates import SURROGATES

_CHOICES = {
    "baseline": ("none", "mean", "leave_one_out"),
    "scale": (
        "none", "std", "batch_std", "group_mean", "beta", "length_std",
        "leave_one_out_std",
    ),
    "ratio": tuple(RATIOS),
    "surrogate": tuple(SURROGATES),
    "mask": ("tv", "kl"),
    "hinge": ("ratio", "log", "sqrt"),
    "token_weight": ("none", "conflict", "nthr"),
    "aggregation": tuple(AGGREGATIONS),
    "divergence": DIVERGENCES,
    "kl_in": ("loss", "reward"),
    "overlong": ("keep", "mask", "punish"),
}  # fmt: skip
# The scales that read the std's settings.
_STD_SCALES = ("std", "batch_std", "length_std", "leave_one_out_std")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """One member of the GRPO family: only choices of maths, no engineering knobs.

    The loss of a prompt is sum_(i,t) C_it (w_it l_it) + kl_coef sum_(i,t) C_it kl_it:
    l the surrogate of ratio and advantage, w the token weights, C the aggregation.
    Whatever a field says about the loop around the loss (the last block), the loss
    itself does not read it; `grpo_jax.train` honours it.
    """

    # Advantages: [P, G], constants
    baseline: Literal["none", "mean", "leave_one_out"]
    scale: Literal[
        "none",
        "std",  # the preconditioner, `inverse_std`
        "batch_std",  # of all the batch's rewards
        "group_mean",  # MaxRL
        "beta",  # BNPO
        "length_std",  # "std" of rewards divided by their completion's length
        "leave_one_out_std",  # NeMo-RL: of the group's other samples
    ]
    std_eps: float = 1e-6  # added to the std (or the group mean), in reward units
    std_ddof: int = 0  # 0: population std, 1: sample std

    # The term of a token, or of a completion
    ratio: Literal[
        "none",
        "token",
        "standardised",
        "sequence_mean_token",
        "sequence_mean",
        "sequence_sum",
        "clipped_geometric",
    ]
    surrogate: Literal[
        "logp",
        "is",
        "ppo",
        "hard_clip",
        "cispo",
        "copg",
        "hinge",
        "relative_is",
        "rpe",
        "masked_is",
        "fisher_rao",
    ]
    # (low, high): the ratio's region is [1 - low, 1 + high]; low None: no lower edge.
    # "clipped_geometric" cuts log-ratios at (-low, high); "hinge": its margins.
    clip: tuple[float | None, float] = (0.2, 0.2)
    dual_clip: float | None = None  # "ppo": loss at most -dual_clip A where A < 0
    ratio_cap: float | None = None  # "ppo", "masked_is": r itself is cut here
    mixture: float = 0.5  # "relative_is", "rpe": r / (mixture r + 1 - mixture)
    mask: Literal["tv", "kl"] = "tv"  # "masked_is": its distance of probabilities
    mask_limit: float = 0.15  # "masked_is": the distance past which a token is dropped
    hinge: Literal["ratio", "log", "sqrt"] = "ratio"  # "hinge": its classifier
    tau: float = 1e-3  # "fisher_rao": the penalty's temperature

    # Token weights, and how tokens become a prompt's loss
    token_weight: Literal["none", "conflict", "nthr"] = "none"
    entropy_coef: float = 0.0  # A less entropy_coef * the completion's mean entropy
    entropy_limit: float | None = None  # nats; completions above it have weight 0
    aggregation: Literal[
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "group_token_mean",
        "batch_token_mean",
        "constant",
        "first_rest",
        "first_rest_sequence_mean",
    ]
    first_token_weight: float = 1e-3  # "first_rest...": of each first token

    # KL(policy || reference)
    divergence: Literal["k1", "k2", "k3"] = "k3"  # its estimator
    kl_in: Literal["loss", "reward"] = "loss"
    kl_coef: float = 0.0  # 0 loads no reference policy

    # What the loop around the loss does
    drafts: int = 0  # drafts per prompt; the best is appended to it (iGRPO)
    refills: int = 0  # times tied groups are sampled again on new prompts (DAPO)
    overlong: Literal["keep", "mask", "punish"] = "keep"  # completions cut off (DAPO)
    overlong_share: float = 0.2  # "punish": the last share of the budget it spans
    tis_cap: float | None = None  # weight min(trainer's pi / sampler's pi, tis_cap)
    stop_deviation: float | None = None  # no more updates past mean |r - 1| (ESPO)
    history: int = 1  # rollouts of the last so many iterates in an update (RT-PG)
    disjoint: bool = False  # each update of a rollout has its own prompts (TIC-GRPO)
    source: str  # where each choice is printed, or that it is a convention

    def __post_init__(self):
        for axis, choices in _CHOICES.items():
            check_choice(axis, getattr(self, axis), choices)
        self._check_clip()
        for name, rule, good in (
            ("kl_coef", "not be negative", self.kl_coef >= 0),
            ("entropy_coef", "not be negative", self.entropy_coef >= 0),
            ("entropy_limit", "be positive or None", _positive(self.entropy_limit)),
            ("dual_clip", "be above 1 or None", _positive(self.dual_clip, 1)),
            ("ratio_cap", "be at least 1 or None", _least_one(self.ratio_cap)),
            ("tis_cap", "be at least 1 or None", _least_one(self.tis_cap)),
            ("mask_limit", "be positive", self.mask_limit > 0),
            ("tau", "be positive", self.tau > 0),
            ("mixture", "be in (0, 1)", 0 < self.mixture < 1),
            ("first_token_weight", "be positive", self.first_token_weight > 0),
            ("overlong_share", "be in (0, 1]", 0 < self.overlong_share <= 1),
            ("stop_deviation", "be positive or None", _positive(self.stop_deviation)),
            ("drafts", "not be negative", self.drafts >= 0),
            ("refills", "not be negative", self.refills >= 0),
            ("history", "be at least 1", self.history >= 1),
        ):
            if not good:
                raise ValueError(f"{name} must {rule}, got {getattr(self, name)}.")
        if not self.std_eps >= 0 or self.std_ddof not in (0, 1):
            raise ValueError(
                "std_eps must not be negative and std_ddof must be 0 or 1, "
                f"got {self.std_eps} and {self.std_ddof}."
            )
        if self.kl_in == "loss" and self.divergence == "k1" and self.kl_coef:
            raise ValueError(
                "divergence k1 in the loss constrains nothing (its gradient has mean "
                "zero on policy); use kl_in='reward', or k2 or k3."
            )
        if self.surrogate == "rpe" and self.mixture * (1 + self.clip[1]) >= 1:
            raise ValueError(
                f"mixture (1 + clip's high) must be below 1, got {self.mixture} and "
                f"{self.clip}; the relative ratio never exceeds 1 / mixture."
            )
        linear = SURROGATES[self.surrogate].linear
        if self.entropy_coef and not (linear and self.ratio != "clipped_geometric"):
            raise ValueError(
                "entropy_coef needs a surrogate and a ratio that do not depend on A's "
                f"sign, got {self.surrogate} and {self.ratio}; the shift of A is not "
                "proportional to A."
            )
        if self.surrogate == "ppo" and self.ratio_cap is not None:
            if self.ratio_cap < 1 + self.clip[1]:
                raise ValueError(
                    f"ratio_cap must be at least 1 + clip's high in ppo, got "
                    f"{self.ratio_cap} and {self.clip}; it is the outer bound."
                )
        in_reward = self.kl_coef and self.kl_in == "reward"
        if in_reward and self.scale in ("group_mean", "beta"):
            raise ValueError(
                f"scale {self.scale} needs rewards that are pass rates; KL in the "
                "reward changes them: use kl_in='loss' or another scale."
            )

    def _check_clip(self):
        pair = isinstance(self.clip, tuple) and len(self.clip) == 2
        low, high = self.clip if pair else (0.0, 0.0)
        free = low is None and self.surrogate != "hinge"
        in_log_space = (self.surrogate == "hinge" and self.hinge == "log") or (
            self.ratio == "clipped_geometric"
            and "clip" not in SURROGATES[self.surrogate].uses
        )
        most = math.inf if in_log_space else 1
        if not ((free or (low is not None and 0 < low < most)) and 0 < high < math.inf):
            raise ValueError(
                f"clip must be a pair (low in (0, 1), high > 0), got {self.clip}; "
                "it keeps the ratio in [1 - low, 1 + high], and low may be None for no "
                "lower edge (but of a hinge)."
            )

    def has_ratio(self) -> bool:
        """Whether it corrects for a behaviour policy other than the current one."""
        return self.ratio != "none" and self.surrogate != "logp"

    def uses(self) -> frozenset[str]:
        """The fields that the chosen axes read; changing another changes nothing."""
        # Where the ratio is exactly 1 nothing is ever clipped or capped.
        numbers = set(SURROGATES[self.surrogate].uses if self.ratio != "none" else ())
        if self.surrogate != "logp" or self.ratio in SEQUENCE_RATIOS:
            numbers.add("ratio")
        if self.ratio == "clipped_geometric":
            numbers.add("clip")
        if self.scale in _STD_SCALES:
            numbers |= {"std_eps", "std_ddof"}
        if self.scale == "group_mean":
            numbers.add("std_eps")
        if self.aggregation.startswith("first_rest"):
            numbers.add("first_token_weight")
        if self.kl_coef:
            numbers |= {"divergence", "kl_in"}
        if self.overlong == "punish":
            numbers.add("overlong_share")
        return frozenset(numbers | _ALWAYS_USED)

    def formula(self) -> str:
        """The loss of one prompt, as it is computed, in one line."""
        term = SURROGATES[self.surrogate].text(self)
        if self.surrogate != "logp":
            term += f", r = {RATIOS[self.ratio]}"
        if self.ratio == "clipped_geometric":
            low, high = self.clip
            floor = "" if low is None else f" (A < 0: at least {-low:g})"
            term += f" cut at {high:g}{floor}"
        if self.token_weight != "none":
            factor = {"conflict": "lambda", "nthr": "eta"}[self.token_weight]
            term = f"{factor} [{term}]"
        if self.entropy_limit is not None:
            term = f"1[H_i <= {self.entropy_limit:.4g}] {term}"
        advantage = self._advantage()
        kl = f"{self.kl_coef:g} {{}}{self.divergence}({{}}, ref)"
        once = self.ratio in SEQUENCE_RATIOS
        if self.kl_coef and self.kl_in == "loss":
            term = f"[{term}] + {kl.format('mean_t ' if once else '', 'pi')}"
        if self.kl_coef and self.kl_in == "reward":
            advantage += f", R less {kl.format('sum_t ', 'pi_old')}"
        total = AGGREGATIONS[self.aggregation].format(first=self.first_token_weight)
        if once:
            total = _one_term(self.aggregation, total)
        return f"{total} {term};  A = {advantage}"

    def axes(self) -> str:
        """The choice on every axis, and the numbers that these choices read."""
        names = ["baseline", "scale", "ratio", "surrogate", "aggregation"]
        if self.token_weight != "none":
            names.append("token_weight")
        numbers = [n for n in _NUMBERS if n in self.uses() and getattr(self, n)]
        return ", ".join(f"{name} {getattr(self, name)}" for name in names + numbers)

    def _advantage(self):
        reward = "R/|o|" if self.scale == "length_std" else "R"
        centred = (
            reward
            + {
                "none": "",
                "mean": " - mean",
                "leave_one_out": " - mean of others",
            }[self.baseline]
        )
        ddof = f", ddof {self.std_ddof}" if self.std_ddof else ""
        eps = f" + {self.std_eps:g}"
        divisor = {
            "none": None,
            "std": f"std{eps}{ddof}",
            "batch_std": f"batch's std{eps}{ddof}",
            "group_mean": f"mean{eps}",
            "beta": "Beta density at mean, fitted to the batch's means",
            "length_std": f"std{eps}{ddof}",
            "leave_one_out_std": f"std of others{eps}{ddof}",
        }[self.scale]
        if divisor is not None:
            centred = f"({centred}) / ({divisor})"
        if self.entropy_coef:
            centred += f" - {self.entropy_coef:g} H_i"
        return centred

    def mechanisms(self) -> list[str]:
        """What the loop around the loss has to do, in words; mostly nothing."""
        punish = f"rewards fall by up to 1 over the last {self.overlong_share:.0%} of T"
        rows = (
            (self.drafts, f"{self.drafts} drafts, the best appended to the prompt"),
            (self.refills, f"tied groups sampled again, up to {self.refills} times"),
            (self.overlong == "mask", "completions cut off have weight 0"),
            (self.overlong == "punish", punish),
            (self.tis_cap, f"weight min(pi / sampler's pi, {self.tis_cap})"),
            (
                self.stop_deviation,
                f"no more updates once mean |r - 1| > {self.stop_deviation}",
            ),
            (self.history > 1, f"rollouts of the last {self.history} iterates"),
            (self.disjoint, "each update of a rollout has its own prompts"),
        )
        return [text for given, text in rows if given]


def _positive(value, least=0.0):
    return value is None or value > least


def _least_one(value):
    return value is None or value >= 1


def _one_term(aggregation, total):
    """A completion is one action: its term is spread equally over its tokens."""
    once = {
        "sequence_mean_token_sum": "mean_i",
        "constant": "1/T mean_i",
        "sequence_mean_token_mean": "mean_i 1/|o|",
    }
    return once.get(aggregation, f"{total} 1/|o|")


_ALWAYS_USED = frozenset(
    {
        "baseline", "scale", "surrogate", "token_weight", "entropy_coef",
        "entropy_limit", "aggregation", "kl_coef", "drafts", "refills", "overlong",
        "tis_cap", "stop_deviation", "history", "disjoint",
    }
)  # fmt: skip
_NUMBERS = (
    "std_eps", "std_ddof", "clip", "dual_clip", "ratio_cap", "mixture", "mask",
    "mask_limit", "hinge", "tau", "entropy_coef", "entropy_limit", "first_token_weight",
    "kl_coef", "divergence", "kl_in",
)  # fmt: skip
_GRPO_STD = "std ddof 0 and eps 1e-6 are conventions"
_CLIP = "clip 0.2 is a convention"

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
    "rloo_trl": Objective(
        baseline="leave_one_out", scale="none", ratio="sequence_sum", surrogate="ppo",
        clip=(0.2, 0.2), aggregation="sequence_mean_token_sum", divergence="k1",
        kl_in="reward", kl_coef=0.05,
        source="TRL's RLOOTrainer (not the paper's RLOO): PPO clip on the whole "
        "completion's ratio; clip and beta are its defaults",
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
    "dapo": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="ppo", clip=(0.2, 0.28),
        aggregation="group_token_mean", refills=3, overlong="punish",
        source="Yu et al. 2025, arXiv:2503.14476 eq. 8 (clip, token mean of a group, "
        "no KL), eq. 11 (dynamic sampling; the bound of 3 refills is ours), eq. 13 "
        f"(soft overlong punishment, cache 4096 of 20480); {_GRPO_STD}",
    ),
    "gspo": Objective(
        baseline="mean", scale="std", ratio="sequence_mean", surrogate="ppo",
        clip=(3e-4, 4e-4), aggregation="sequence_mean_token_sum",
        source="Zheng et al. 2025, arXiv:2507.18071 eq. 5 and 7 (length-normalised "
        f"sequence ratio, clip 3e-4 and 4e-4, no KL); {_GRPO_STD}",
    ),
    "gspo_token": Objective(
        baseline="mean", scale="std", ratio="sequence_mean_token", surrogate="ppo",
        clip=(3e-4, 4e-4), aggregation="sequence_mean_token_mean",
        source="Zheng et al. 2025, arXiv:2507.18071 eq. 13 and 14 (GSPO's value, each "
        f"token's own gradient; takes advantages per token); {_GRPO_STD}",
    ),
    "cispo": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="cispo",
        clip=(None, 4.0), aggregation="batch_token_mean",
        source="MiniMax 2025, arXiv:2506.13585 (stopped, capped weight; no lower "
        f"edge); the cap 1 + 4 = 5 is ScaleRL's and TRL's; {_GRPO_STD}",
    ),
    "degrpo": Objective(
        baseline="mean", scale="none", ratio="token", surrogate="ppo", clip=(0.2, 0.2),
        aggregation="first_rest", first_token_weight=1e-3, divergence="k3",
        kl_coef=1e-3,
        source="Fang et al. 2025, arXiv:2505.13379 (control token weighted apart, "
        "no std; alpha, beta, clip); the surrogate as in its code, the rest by mean "
        "over the batch's tokens; the paper's: aggregation='first_rest_sequence_mean'",
    ),
    "tic_grpo": Objective(
        baseline="mean", scale="none", ratio="sequence_sum", surrogate="hard_clip",
        clip=(None, 0.28), aggregation="constant", disjoint=True,
        source="Pang et al. 2025, arXiv:2508.02833v5 eq. 8 (whole-trajectory ratio "
        "clipped above only, constant 1/T, no std, disjoint prompts per inner step); "
        "1.28 is DAPO's edge, not stated",
    ),
    "tic_grpo_std": Objective(
        baseline="mean", scale="std", ratio="sequence_sum", surrogate="hard_clip",
        clip=(None, 0.28), aggregation="constant", disjoint=True,
        source="Pang et al. 2025, arXiv:2508.02833 as read in its v2: tic_grpo with "
        f"the group's std; {_GRPO_STD}",
    ),
    "grpo_up_clip": Objective(
        baseline="mean", scale="none", ratio="token", surrogate="hard_clip",
        clip=(None, 0.28), aggregation="constant", disjoint=True,
        source="Pang et al. 2025, arXiv:2508.02833v5, its ablation GRPO_2: up-only "
        "clip and 1/T on token ratios; 1.28 as in tic_grpo",
    ),
    "grpo_no_is": Objective(
        baseline="mean", scale="std", ratio="none", surrogate="is",
        aggregation="sequence_mean_token_mean", disjoint=True,
        source="Pang et al. 2025, arXiv:2508.02833v5, its ablation without importance "
        "sampling: every inner step takes its own prompts' gradient as if on policy; "
        f"{_GRPO_STD}",
    ),
    "bnpo": Objective(
        baseline="mean", scale="beta", ratio="token", surrogate="ppo",
        clip=(0.2, 0.28), dual_clip=10.0, aggregation="sequence_mean_token_sum",
        source="Xiao et al. 2025, arXiv:2506.02864 (advantage over a fitted Beta "
        "density); clip, dual clip and sum as in its code. Not TRL's loss of the name",
    ),
    "gmpo": Objective(
        baseline="mean", scale="std", ratio="clipped_geometric", surrogate="is",
        clip=(0.4, 0.4), aggregation="sequence_mean_token_sum",
        source="Zhao et al. 2025, arXiv:2507.20673 (geometric mean of token ratios cut "
        "at e^-0.4 and e^0.4 by the sign of A); std ddof 0 and eps 1e-6 as in the "
        "other rows (its code: 1 and 1e-8)",
    ),
    "gtpo": Objective(
        baseline="mean", scale="none", ratio="none", surrogate="is",
        token_weight="conflict", entropy_coef=0.1, entropy_limit=math.log(2),
        aggregation="sequence_mean_token_mean",
        source="Simoni et al. 2025, arXiv:2508.03772 (conflict tokens, entropy "
        "shift and filter at ln 2; the trainer drops the filter where the run starts "
        "above it); its code's division by a count of conflicts is not in the formula",
    ),
    "nthr": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="ppo", clip=(0.2, 0.2),
        token_weight="nthr", aggregation="sequence_mean_token_mean", divergence="k3",
        kl_coef=0.04,
        source="Deng et al. 2025, arXiv:2505.18830 Sec. 5 (beta 1, eta 0) on grpo; "
        "the weights are `nthr_weights`",
    ),
    "dppo_tv": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="masked_is", mask="tv",
        mask_limit=0.15, ratio_cap=10.0, aggregation="batch_token_mean",
        source="arXiv:2602.04879 (mask by total variation); limit, cap 10 and token "
        f"mean as in its code; {_GRPO_STD}",
    ),
    "dppo_kl": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="masked_is", mask="kl",
        mask_limit=0.05, ratio_cap=10.0, aggregation="batch_token_mean",
        source="arXiv:2602.04879 (mask by KL of Bernoullis); limit, cap 10 and token "
        f"mean as in its code; {_GRPO_STD}",
    ),
    "copg": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="copg", clip=(0.2, 0.2),
        aggregation="batch_token_mean",
        source="arXiv:2311.05846 (log-probs clipped in place of ratios); group "
        f"advantages in place of a critic's; {_CLIP}; {_GRPO_STD}",
    ),
    "hpo": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="hinge",
        clip=(0.2, 0.2), hinge="ratio", aggregation="batch_token_mean",
        source="Yao et al. 2021, arXiv:2110.13799 (hinge loss of r - 1; its gradient "
        f"is PPO-clip's); group advantages; {_CLIP}; {_GRPO_STD}",
    ),
    "hpo_log": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="hinge",
        clip=(0.2, 0.2), hinge="log", aggregation="batch_token_mean",
        source="Yao et al. 2021, arXiv:2110.13799, its classifier log r: edges e^-0.2, "
        f"e^0.2; {_GRPO_STD}",
    ),
    "hpo_sqrt": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="hinge",
        clip=(0.2, 0.2), hinge="sqrt", aggregation="batch_token_mean",
        source="Yao et al. 2021, arXiv:2110.13799, its classifier sqrt r - 1: edges "
        f"0.64, 1.44; {_GRPO_STD}",
    ),
    "ppo_rpe": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="rpe", clip=(0.2, 0.2),
        mixture=0.5, aggregation="batch_token_mean",
        source="Kobayashi 2020, arXiv:2010.03290 (relative Pearson penalty, mixture "
        f"0.5); the strength per sign of A is derived, not printed; {_CLIP}; "
        f"{_GRPO_STD}",
    ),
    "fr_ppo": Objective(
        baseline="mean", scale="batch_std", ratio="token", surrogate="fisher_rao",
        tau=1e-3, aggregation="batch_token_mean",
        source="arXiv:2506.03757 (Fisher-Rao penalty, weighted by pi_old); tau as in "
        "its code, which whitens advantages over the batch: here the std of the "
        f"batch's rewards; {_GRPO_STD}",
    ),
    "espo": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="is",
        aggregation="batch_token_mean", stop_deviation=0.25,
        source="Sun et al. 2022, arXiv:2202.00079 (no clip; inner updates end once "
        f"mean |r - 1| > 0.25); group advantages; {_GRPO_STD}",
    ),
    "rt_pg": Objective(
        baseline="none", scale="none", ratio="sequence_sum", surrogate="relative_is",
        mixture=0.5, aggregation="sequence_mean_token_sum", history=4,
        source="arXiv:2506.06178v2 (power-mean weights on rollouts of the last "
        "iterates, no baseline, no clip); its mixture follows a divergence estimate: "
        "0.5 and 4 iterates are conventions",
    ),
    "max_rl": Objective(
        baseline="mean", scale="group_mean", ratio="none", surrogate="logp",
        aggregation="sequence_mean_token_sum",
        source="Tajwar et al. 2026, arXiv:2602.02710 (divide by the group's mean: "
        "ascends log p_x); eps 1e-6 is a convention; on policy",
    ),
    "igrpo": Objective(
        baseline="mean", scale="std", ratio="token", surrogate="ppo", clip=(0.2, 0.2),
        aggregation="sequence_mean_token_mean", drafts=4,
        source="arXiv:2602.09000 (drafts without gradient, the best appended to the "
        f"prompt, GRPO on the refinements); 4 drafts, no KL: conventions; {_CLIP}; "
        f"{_GRPO_STD}",
    ),
})
# fmt: on
