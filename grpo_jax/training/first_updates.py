"""Whether the first updates of a run move the policy too far.

Two figures that a step has anyway: how far the update moves the log-probs of its own
samples, and the KL to the starting policy, where the objective has a reference. The
bounds lie between what runs that learned and runs that were destroyed showed
(BUILD_NOTES.md).
"""

from collections.abc import Mapping

WATCHED = 4  # steps, and those of the learning rate's warm-up
LARGEST_CHANGE = 1.0  # nats per token, root mean square, by one update
LARGEST_KL = 0.5  # nats per token to the starting policy, in the steps watched


def too_far(step: int, metrics: Mapping[str, float], *, warmup: int = 0) -> str | None:
    """What was measured, in words, if it is far above what is usual; else None.

    Args:
        step: Of the metrics, from 1; its KL is that of the updates before.
        metrics: update/log_prob_change and, with a reference policy, kl/mean.
        warmup: Steps in which the learning rate rises.
    """
    change, kl = metrics["update/log_prob_change"], metrics.get("kl/mean", 0.0)
    if step <= WATCHED and kl > LARGEST_KL:
        return (
            f"the policy is {kl:.2g} nats a token from where it started (KL), and "
            f"{LARGEST_KL:g} is far for {step - 1} steps"
        )
    if step <= WATCHED + warmup and change > LARGEST_CHANGE:
        return (
            f"the update moves the log-probs of its own samples by {change:.2g} nats a "
            f"token or more (root mean square, to first order), and {LARGEST_CHANGE:g} "
            "is far for one update"
        )
    return None


def advice(rate: float, default: float | None) -> str:
    """What to try instead of a learning rate; default None: a tenth of it."""
    lower = rate / 10 if default is None or rate <= default else default
    return (
        f"The learning rate of {rate:g} is probably too high: try "
        f"--optimizer.learning-rate {lower:g}, or --optimizer.warmup-steps."
    )
