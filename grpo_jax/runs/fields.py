"""Every field of metrics.jsonl and its meaning, as the report prints them."""

PART = "reward/of "  # prefix of the name of one of several rewards

# Field -> its meaning. A run writes no other.
FIELDS: dict[str, str] = {
    "step": "rollouts trained on so far; 0 before any update",
    "reward/mean": "mean reward of the step's samples as scored, missing ones left out",
    "reward/missing": "samples whose reward function raised or returned no number",
    "reward/failed": "checks that hung or whose worker died; they score 0 (only where "
    "rewards are computed in worker processes)",
    f"{PART}NAME": "mean of one of several rewards, before it is weighted",
    "group/informative": "fraction of groups whose rewards are not all equal: those "
    "that the prompt weights are made of, without KL and what else is added unweighted",
    "group/std_mean": "mean over prompts that have rewards of the within-prompt std "
    "(ddof 0)",
    "group/refills": "rounds of sampling to replace tied groups (dynamic sampling)",
    "group/refilled": "tied groups that informative ones replaced",
    "weights/mean": "mean prompt weight (1 / (std + eps) under std-normalisation)",
    "weights/min": "smallest prompt weight",
    "weights/max": "largest prompt weight",
    "completion/length_mean": "tokens per completion, EOS included",
    "completion/cut_off": "share of completions cut off at max_new_tokens, without an "
    "end of their own",
    "tokens/completion": "completion tokens of the step's batch",
    "tokens/sampled": "all tokens sampled, drafts and discarded refills included",
    "entropy/sampled": "nats per token, the sampled estimate -mean(log-prob)",
    "entropy/mean": "nats per token, exact (only where the objective uses it)",
    "kl/mean": "nats per token to the starting policy (only with a reference)",
    "ratio/mean": "mean over tokens of policy / behaviour policy, at the step's last "
    "update, like the next two; 1 on policy",
    "ratio/deviation": "mean over tokens of |ratio - 1|",
    "ratio/clipped": "fraction of tokens whose gradient clipping sets to 0",
    "mismatch/max_abs": "max |sampler's - trainer's| token log-prob, in nats, at the "
    "step's first update, like the next one",
    "mismatch/mean_abs": "mean over tokens of |sampler's - trainer's| log-prob, in "
    "nats",
    "loss/policy": "the surrogate part of the loss; its gradient is what matters. On "
    "policy it is 0 where the term is linear in a ratio and completions count alike "
    "(grpo, gspo, gmpo, tic_grpo), not with log pi as the term (reinforce, rloo, "
    "max_rl, cispo) nor with longer completions counting more (dapo, dr_grpo)",
    "loss/penalty": "the loss terms not proportional to the advantages: KL in the "
    "loss, entropy shift, Fisher-Rao",
    "gradient/norm": "global norm before clipping",
    "update/norm": "global norm of the parameters' change",
    "update/log_prob_change": "nats per token, root mean square: how far the step's "
    "last update moves the log-probs of its own samples at least, to first order "
    "(gradient times change over the rms of weighted advantages)",
    "update/applied": "optimizer updates applied since step 0",
    "update/skipped": "optimizer updates skipped since step 0: gradient not finite",
    "update/stopped": "1 if the step's remaining updates were left out: the ratio had "
    "moved past stop_deviation",
    "update/empty": "1 if the gradient of the step's last update was 0 everywhere, as "
    "where all groups tie and the loss has no other term; with optimizer.skip_empty "
    "it is left out, and the learning rate's schedule does not count it",
    "update/skipped_in_a_row": "optimizer updates skipped since the last applied one",
    "learning_rate": "learning rate of the step's last update",
    "time/sample_s": "seconds until the completions were on the host; drafts included",
    "time/score_s": "seconds of reward functions and refills",
    "time/reference_s": "seconds of log-probs computed again: by the starting policy, "
    "where the objective has a KL term, and by the policy that sampled, before the "
    "first of several updates (in time/score_s in runs of older versions)",
    "time/update_s": "seconds of the update, until the device has finished it",
    "time/step_s": "seconds of the step, evaluation and instrument included",
    "time/start_s": "seconds until the first step, evaluation and instrument left out: "
    "loading, warm start, compilation (only in the row of step 0)",
    "time/evaluation_s": "seconds of the evaluation",
    "compiles": "programs compiled since this process began the run",
    "eval/train_pass_rate": "pass rate of trained prompts: the mean of the exact ones "
    "where one answer is right, else the share solved (first reward 1) by samples",
    "eval/train_low": "lower end of its 95 % interval over prompts",
    "eval/train_high": "upper end of it",
    "eval/heldout_pass_rate": "pass rate of the held-out prompts, as of trained ones",
    "eval/heldout_low": "lower end of its 95 % interval",
    "eval/heldout_high": "upper end of it",
    "eval/heldout_sampled": "share of held-out prompts solved by one sample each",
    "eval/heldout_sampled_low": "lower end of its 95 % interval over prompts",
    "eval/heldout_sampled_high": "upper end of it",
    "eval/heldout_reward": "mean reward of the held-out prompts' samples, the weighted "
    "sum where there are several; missing ones left out",
    "eval/heldout_reward_low": "lower end of its 95 % Student interval over prompts",
    "eval/heldout_reward_high": "upper end of it",
    "eval/train_reward": "mean reward of the trained prompts' samples, where they are "
    "sampled",
    "eval/train_reward_low": "lower end of its 95 % interval",
    "eval/train_reward_high": "upper end of it",
    "eval/missing": "samples of the evaluation without a reward, left out",
    "eval/failed": "checks of the evaluation that hung or whose worker died; they "
    "score 0 (only where rewards are computed in worker processes)",
    "eval/train_cut_off": "share of their completions cut off at max_new_tokens (only "
    "where they are sampled)",
    "eval/heldout_cut_off": "share of sampled completions of held-out prompts cut off "
    "at max_new_tokens",
    "phase/label": "I, II or III where the probe prompts' debiased cosines tell it "
    "with 95 % confidence, for any distribution; else unknown",
    "phase/small_fraction": "fraction of pairs of probe prompts with |cos| < 0.1, if "
    "sampling noise keeps the shape of the cosines' distribution (instrument.jsonl has "
    "bounds that hold for any)",
    "phase/rate_factor": "C = 8/3 of the mean std of rewards over the measurements so "
    "far (too low where the std is that of sampled groups); for 0/1 rewards and C < 1 "
    "the bound of arXiv:2601.23135 for std-normalisation is the better one",
    "geometry/mean_cosine": "mean cosine between the probe prompts' gradients, "
    "debiased; null where noise hides it; pairs count by how far both prompts stand "
    "out from noise, equally as groups grow",
    "geometry/std_cosine": "std of those cosines, debiased, pairs counted alike",
    "geometry/mean_abs_cosine": "mean |cos|, if noise keeps the distribution's shape",
    "geometry/violating_fraction": "fraction of pairs with a negative inner product",
    "geometry/chi": "largest eigenvalue of the matrix of sampled cosines",
    "geometry/attenuation": "debiased over raw squared norm, mean over prompts: about "
    "the factor by which sampling noise shrinks a cosine",
    "geometry/exact_mean_abs_cosine": "mean |cos| of the exact gradients (where one "
    "answer is right)",
    "geometry/exact_std_cosine": "std of the exact cosines",
    "curvature/sigma2_rank_correlation": "Spearman, |curvature| along a prompt's "
    "gradient against the variance of its rewards, over the probe prompts with signal "
    "in both halves of the group; noise alone, which grows with sigma, gives up to +.3",
    "time/instrument_s": "seconds of the probe measurement, and of the comparison "
    "after the update that follows one",
}
