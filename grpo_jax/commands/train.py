"""`grpo-jax train`: train a policy, from prompts to a finished report."""

import sys
from collections.abc import Sequence

from grpo_jax.commands._arguments import parse_run
from grpo_jax.runs.config import TrainConfig


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    config = parse_run(TrainConfig, argv, __doc__)
    # jax is imported once the settings are known to be right.
    from grpo_jax.parallel.processes import LostProcessError, exit_at_once
    from grpo_jax.training.run import train
    from grpo_jax.training.saving import (
        NonFiniteGradientsError,
        RewardsFailedError,
        SamplerFailedError,
    )

    try:
        train(config)
    except (NonFiniteGradientsError, RewardsFailedError, SamplerFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except LostProcessError as error:
        exit_at_once(str(error))
    return 0  # also when a signal stopped it: the steps made are saved
