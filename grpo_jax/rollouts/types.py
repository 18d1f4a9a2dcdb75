"""`Rollouts`: what sampling hands to scoring and to the update."""

from typing import NamedTuple

import jax


class Rollouts(NamedTuple):
    """Prompts and their groups of completions; the group is an axis.

    Attributes:
        prompts: [P, L] int32 token ids, padded on either side.
        prompt_mask: [P, L] int32, 1 on the prompt's tokens.
        completions: [P, G, T] int32, pad_id after each completion's end.
        completion_mask: [P, G, T] int32, 1 on sampled tokens, EOS included.
        behaviour_logprobs: [P, G, T] float32, of the distribution each token was drawn
            from (temperature and any truncation included); 0 after the end.
        rewards: [P, G] float32, NaN where a reward is missing; None before scoring.
        solving: [P, G] float32, what each reward holds for solving the prompt: the
            first reward's weight where that one is 1 or more, else 0. None: not told
            apart.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    completions: jax.Array
    completion_mask: jax.Array
    behaviour_logprobs: jax.Array
    rewards: jax.Array | None = None
    solving: jax.Array | None = None

    @property
    def scored_rewards(self) -> jax.Array:
        """The rewards, [P, G] float32.

        Raises:
            ValueError: the rollouts are not scored yet.
        """
        if self.rewards is None:
            raise ValueError(
                "rollouts must have rewards [P, G], got none; score them first, or "
                "set them with rollouts._replace(rewards=...)."
            )
        return self.rewards
