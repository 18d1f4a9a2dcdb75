"""OBJECTIVES: one row per method of the family, with the source of each choice.

An ablation is one line: `dataclasses.replace(OBJECTIVES["grpo"], scale="none")`.
"""

import math
from types import MappingProxyType

from grpo_jax.objectives.objective import Objective

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
        "ascends log p_x as G grows; a group of G gives ((1 - p) - (1 - p)^G) times "
        "grad logit p); eps 1e-6 is a convention; on policy",
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
