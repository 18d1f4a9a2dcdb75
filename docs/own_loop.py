"""GRPO in a loop of your own: sample, score, step.

    python docs/own_loop.py

A new model learns to answer a digit with the next one, in 10 to 20 seconds on a CPU
core. `gj.Learner` is the trainer's own step: any objective, prompt weights, optax
optimizer. Rollouts may come from elsewhere too; a step needs their log-probs and
rewards.
"""

import jax
import numpy as np
import optax

import grpo_jax as gj

EOS, PAD = 10, 11  # the other tokens are digits


def train(steps: int = 60, seed: int = 0) -> list[float]:
    """The mean reward of every step."""
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    model = gj.ModelConfig(vocab_size=12, width=32, mlp_width=64, head_dim=16)
    policy = gj.init_policy(model, key)
    learner = gj.Learner("grpo", optax.adam(5e-3))
    state, history = learner.init(policy), []
    for step in range(steps):
        prompts = rng.integers(0, 10, (32, 1))
        rollouts = gj.sample(
            learner.policy(state), prompts, np.ones_like(prompts), group_size=8,
            max_new_tokens=1, key=jax.random.fold_in(key, step), eos_id=EOS, pad_id=PAD,
        )  # fmt: skip
        right = rollouts.completions[..., 0] == (prompts + 1) % 10  # [P, G]
        rewards = np.asarray(right, np.float32)
        state, metrics = learner.step(state, rollouts._replace(rewards=rewards))
        history.append(float(metrics["reward/mean"]))
    return history


if __name__ == "__main__":
    for step, reward in enumerate(train(), 1):
        if step % 10 == 0:
            print(f"step {step}: reward {reward:.3f}")
