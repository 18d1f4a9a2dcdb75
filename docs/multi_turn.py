"""GRPO over several turns: a policy guesses a number, an environment answers.

    python docs/multi_turn.py [seed] [--deaf]

A new model learns to find a number from 0 to 9 in at most four guesses. Without hearing
the answers (`--deaf`) four guesses find four numbers of ten at best. What to change for
a task of your own: docs/multi_turn.md.
"""

import sys

import jax
import numpy as np
import optax

import grpo_jax as gj

HIGHER, LOWER, WHAT, START, END, PAD = range(10, 16)  # 0 to 9 are numbers
PROMPTS, GROUP, TURNS = 10, 32, 4
TURN, LENGTH = 2, 16  # tokens at most: of a turn; of a dialogue


def game(dialogue, said):
    """The environment: (the tokens it answers, reward, whether the dialogue is over).

    `said` are the tokens of a turn: a guess is a number and END.
    """
    if said[0] > 9 or said[1:] != [END]:
        return [WHAT], 0.0, False
    if said[0] == dialogue["secret"]:
        return [], 1.0, True
    return [HIGHER if said[0] < dialogue["secret"] else LOWER], 0.0, False


def deaf(dialogue, said):
    """The same game with one and the same answer to every wrong guess."""
    answer, reward, over = game(dialogue, said)
    return [WHAT for _ in answer], reward, over


def play(policy, examples, environment, key, ends=END):
    """Rollouts [P, G, T] of P examples: G dialogues of each, turn by turn."""
    rows = [
        dict(example, group=p, completion=[], logprobs=[], mask=[], reward=0.0)
        for p, example in enumerate(examples)
        for _ in range(GROUP)
    ]
    active = np.ones(len(rows), bool)
    for turn in range(TURNS):
        so_far = [row["prompt"] + row["completion"] for row in rows]
        sampled = gj.sample(
            policy, *gj.pad_left(so_far, LENGTH, PAD), active=active, group_size=1,
            max_new_tokens=TURN, key=jax.random.fold_in(key, turn), eos_id=ends,
            pad_id=PAD,
        )  # fmt: skip
        for new in sampled.to_rows():  # of active dialogues; "group" is their number
            row, said = rows[new["group"]], new["completion"]
            answer, row["reward"], over = environment(row, said)
            row["completion"] += said + answer
            row["mask"] += [1] * len(said) + [0] * len(answer)
            row["logprobs"] += new["logprobs"] + [None] * len(answer)
            active[new["group"]] = not over
    return gj.Rollouts.from_rows(rows, None, pad_to=LENGTH)


def train(examples, environment, ends=END, steps=200, seed=0):
    """(the last policy, the pass rate of every step)."""
    key, rng, history = jax.random.key(seed), np.random.default_rng(seed), []
    model = gj.ModelConfig(vocab_size=16, width=32, mlp_width=64, head_dim=16)
    learner = gj.Learner("grpo", optax.adam(5e-3))
    state = learner.init(gj.init_policy(model, key))
    for step in range(steps):
        batch, now = rng.choice(examples, PROMPTS, False), jax.random.fold_in(key, step)
        rollouts = play(learner.policy(state), batch, environment, now, ends)
        state, metrics = learner.step(state, rollouts)
        history.append(float(metrics["reward/mean"]))
    return learner.policy(state), history


SECRETS = [dict(prompt=[START], secret=number) for number in range(10)]

if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    environment = deaf if "--deaf" in sys.argv else game
    _, rates = train(SECRETS, environment, seed=numbers[0] if numbers else 0)
    print(f"step 1: pass rate {rates[0]:.3f}")
    for step in range(20, len(rates) + 1, 20):
        print(f"steps to {step}: pass rate {np.mean(rates[step - 20 : step]):.3f}")
