"""What the experiments share."""

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.policy import Policy
from grpo_jax.rollouts.encoding import answer_rollouts, encode_imitated, encode_prompts
from grpo_jax.rollouts.sampling import sample
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.types import Task


def pick_answers(task: Task, count: int, *, seed: int, length: int) -> Rollouts:
    """[P, 1, length] right answers of up to `count` trained prompts, drawn by `seed`.

    Prompts are padded to what any trained prompt and its answer take, so that other
    seeds have the same shapes.
    """
    pick = np.random.default_rng([seed, 9]).permutation(len(task.train))
    prompts, answers = (f(task, task.train) for f in (encode_prompts, encode_imitated))
    rows = zip(prompts, answers, strict=True)
    longest = max(len(prompt) + len(answer) - 1 for prompt, answer in rows)
    examples = [task.train[i] for i in pick[:count]]
    answers = answer_rollouts(task, examples, longest, length)
    return jax.tree.map(jnp.asarray, answers)


def sample_groups(
    policy: Policy, answers: Rollouts, tokenizer, key: jax.Array, group_size: int
) -> Rollouts:
    """Groups [P, group_size, T] for `pick_answers`, with rewards: 1 where
    the completion is the answer, token by token."""
    found = sample(
        policy,
        answers.prompts,
        answers.prompt_mask,
        group_size=group_size,
        max_new_tokens=answers.completions.shape[-1],
        key=key,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    right = (found.completions == answers.completions) | (found.completion_mask == 0)
    right &= found.completion_mask == answers.completion_mask
    return found._replace(rewards=right.all(-1).astype(jnp.float32))
