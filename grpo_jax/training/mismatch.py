"""Whether a sampler's log-probs are those of the policy that is trained."""

from collections.abc import Mapping

from grpo_jax.objectives.objective import Objective

# Mean |difference| in nats a token; bfloat16's rounding gives up to .03.
UNCORRECTED = 0.05  # from here on tokens need a weight
FOREIGN = 0.5  # from here on another policy sampled


def mismatch_warning(metrics: Mapping[str, float], objective: Objective) -> str | None:
    """What to say of a step's mismatch, if it is more than rounding makes and nothing
    corrects for it, or more than a correction mends; else None.

    Args:
        metrics: mismatch/mean_abs and mismatch/max_abs, in nats a token.
        objective: Whose `tis_cap` corrects for small ones.
    """
    mean, largest = metrics["mismatch/mean_abs"], metrics["mismatch/max_abs"]
    if not mean > (UNCORRECTED if objective.tis_cap is None else FOREIGN):
        return None
    text = (
        f"the sampler's log-probs differ from the trainer's by {mean:.2g} nats a token "
        f"on average, {largest:.2g} at most"
    )
    if mean > FOREIGN:
        return (
            f"{text}: another policy sampled. Does the sampler have the step's "
            "parameters, the run's tokenizer, and log-probs of its temperature?"
        )
    if objective.history > 1:
        return f"{text}, and nothing corrects for it."
    return (
        f"{text}, and nothing corrects for it: --objective.tis-cap 2 weighs each token "
        "with min(trainer's pi / sampler's pi, 2)."
    )
