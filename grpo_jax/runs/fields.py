"""Every field of metrics.jsonl and instrument.jsonl, and what it means."""

PART = "reward/of "  # and the name of one of several rewards


# Field -> what it is. A run writes no other.
FIELDS = {
    "step": "rollouts trained on so far; 0 is the start, before any update",
    "reward/mean": "mean reward of the step's samples as scored, missing ones left out",
    "reward/missing": "samples whose reward function raised or returned no number",
    "reward/failed": "checks that hung or whose worker died; they score 0 (only where "
    "rewards are computed in worker processes)",
    f"{PART}NAME": "mean of one of several rewards, before its weight",
    "group/informative": "fraction of groups whose rewards are not all equal",
    "group/std_mean": "mean over prompts of the within-prompt std (ddof 0)",
    "group/refills": "times that tied groups were sampled again (dynamic sampling)",
    "group/refilled": "tied groups replaced by informative ones that way",
    "weights/mean": "mean prompt weight (1 / (std + eps) under std-normalisation)",
    "weights/max": "largest prompt weight",
    "completion/length_mean": "tokens per completion, EOS included",
    "tokens/completion": "completion tokens of the step's batch",
    "tokens/sampled": "all tokens drawn for it, drafts and discarded refills included",
    "entropy/sampled": "nats per token, the sampled estimate -mean(log-prob)",
    "entropy/mean": "nats per token, exact (only where the objective uses it)",
    "kl/mean": "nats per token to the starting policy (only with a reference)",
    "ratio/mean": "mean over tokens of policy / behaviour policy, at the step's last "
    "update, like the next two; 1 on policy",
    "ratio/deviation": "mean over tokens of |ratio - 1|",
    "ratio/clipped": "fraction of tokens without gradient for being clipped",
    "mismatch/max_abs": "max |sampler's - trainer's| token log-prob, in nats",
    "loss/policy": "the surrogate part of the loss; 0 on policy by construction",
    "loss/penalty": "what is not proportional to the advantages: KL in the loss, "
    "entropy shift, Fisher-Rao",
    "gradient/norm": "global norm before clipping",
    "update/norm": "global norm of the parameters' change",
    "update/applied": "optimizer updates applied since step 0",
    "update/skipped": "optimizer updates skipped since step 0 for not being finite",
    "update/stopped": "1 if the step's later updates were left out: the ratio had "
    "moved past stop_deviation",
    "update/skipped_in_a_row": "of these, those since the last applied one",
    "learning_rate": "of the step's last update",
    "time/sample_s": "seconds until the completions were on the host; drafts included",
    "time/score_s": "seconds of reward functions, refills and recomputed log-probs",
    "time/update_s": "seconds of the update, the device's work included",
    "time/step_s": "seconds of the whole step, evaluation and instrument included",
    "compiles": "programs compiled since this process began the run",
    "eval/train_pass_rate": "pass rate of trained prompts: the mean of the exact ones "
    "where one answer is right, else the share solved (first reward 1) by samples",
    "eval/train_low": "lower end of its 95 % interval over prompts; Wilson if sampled",
    "eval/train_high": "upper end",
    "eval/heldout_pass_rate": "the same of the held-out prompts",
    "eval/heldout_low": "lower end of its 95 % interval",
    "eval/heldout_high": "upper end",
    "eval/heldout_sampled": "share of held-out prompts solved by one sample each",
    "eval/heldout_sampled_low": "lower end of its 95 % Wilson interval",
    "eval/heldout_sampled_high": "upper end",
    "phase/label": "I, II or III, as the probe set's debiased cosines have it; unknown "
    "where they hold too little signal",
    "phase/small_fraction": "fraction of the probe set's pairs with |cos| < 0.1, "
    "debiased",
    "phase/rate_factor": "C = 8/3 of the mean std of rewards over the looks so far "
    "(low where only groups tell it); for rewards 0 and 1, below 1 the bound of "
    "arXiv:2601.23135 for std-normalisation is the better one",
    "geometry/mean_cosine": "mean cosine between the probe prompts' gradients, "
    "debiased",
    "geometry/std_cosine": "std of those cosines, debiased",
    "geometry/mean_abs_cosine": "mean |cos|, debiased",
    "geometry/violating_fraction": "fraction of pairs with a negative inner product",
    "geometry/chi": "largest eigenvalue of the matrix of sampled cosines",
    "geometry/attenuation": "debiased over raw squared norm: what sampling leaves of a "
    "cosine",
    "geometry/exact_mean_abs_cosine": "mean |cos| of the exact gradients (where one "
    "answer is right)",
    "geometry/exact_std_cosine": "std of the exact cosines",
    "curvature/sigma2_rank_correlation": "Spearman, |curvature| along a prompt's own "
    "gradient against the variance of its rewards, over the probe prompts with signal "
    "in both halves of the group",
    "time/instrument_s": "seconds of the instrument's look, or of its comparison after "
    "the update that follows one",
}


# Field of a line of instrument.jsonl -> what it is; lists are over its probe prompts.
INSTRUMENT_FIELDS = {
    "step": "of the policy looked at",
    "phase": "label, its shares of bootstrap samples, and what it was decided on",
    "prompts": "indices among the trained prompts",
    "group_size": "samples of each",
    "directions": "sums that gradients were hashed to; null: whole gradients",
    "group_mean": "mean reward of the sampled group",
    "group_std": "std of the group (ddof 0)",
    "sigma": "std of the group (ddof 1)",
    "pass_rate": "exact, where one answer is right; else null",
    "curvature": "u'Hu / |u|^2 along the prompt's own gradient, unbiased given u: one "
    "half's gradient, measured on the other half, mean of both",
    "halves": "how many halves are behind curvature, spread and slope: 0, 1 or 2",
    "spread": "range over completions of what |curvature| is at most sigma^2 times of",
    "slope": "change of expected reward per unit length along the same u",
    "geometry": "raw cosines and squared norms, and the summary of `PromptGeometry`",
    "null": "cosines of differences of a group's parts: sampling noise alone",
    "features": "cosines of mean hidden states, raw and less their mean",
    "weightings": "first-order change of each prompt for a gradient step of length 1 "
    "under other prompt weights: of its own doing, and the others'",
    "exact": "cosines, norms, curvature and slope (along the same u) from the one "
    "right answer; null where there is none",
    "update": "slope and curvature along the update that followed, per update and to "
    "its square, the change predicted and realised; null where none followed",
}
