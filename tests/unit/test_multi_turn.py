"""docs/multi_turn.py: dialogues are joined as they went, and a policy learns."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.runs.paths import count_compiles
from tests.chat_forms import chatml
from tests.helpers import TINY

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "multi_turn.md").read_text()
BLOCKS = dict(re.findall(r"<!-- ([\w-]+) -->\n```python\n(.*?)```", GUIDE, re.S))
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def talk():
    spec = importlib.util.spec_from_file_location("multi_turn", DOCS / "multi_turn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policy():
    """New, and so near uniform: all kinds of turns happen."""
    config = dataclasses.replace(TINY, vocab_size=16, num_layers=1)
    return gj.init_policy(config, jax.random.key(0))


@pytest.fixture(scope="module")
def rollouts(talk, policy):
    return talk.play(policy, talk.SECRETS, talk.game, KEY)


def dialogues(rollouts):
    """(p, g, turns as [(what was sampled, what was answered)]) of each dialogue."""
    host = jax.device_get(rollouts)
    for p, g in np.ndindex(host.rewards.shape):
        turns = []
        length = host.completion_mask[p, g].nonzero()[0][-1] + 1
        for token, sampled in zip(
            host.completions[p, g, :length].tolist(),
            host.completion_mask[p, g].tolist(),
            strict=False,
        ):
            if sampled and (not turns or turns[-1][1]):
                turns.append(([], []))
            turns[-1][not sampled].append(token)
        yield p, g, turns


# The environment is asked again, turn by turn, about what the rollouts hold.
def test_dialogues_are_joined_as_they_went(talk, rollouts):
    assert rollouts.completions.shape == (10, talk.GROUP, talk.LENGTH)
    seen = set()
    for p, g, turns in dialogues(rollouts):
        assert 1 <= len(turns) <= talk.TURNS
        for i, (said, answered) in enumerate(turns):
            last = i == len(turns) - 1
            answer, reward, over = talk.game(talk.SECRETS[p], said)
            assert over or last is (i == talk.TURNS - 1)
            assert answered == ([] if last else answer)  # nothing attends to the last
            assert said[-1] == talk.END or len(said) == talk.TURN
            assert talk.END not in said[:-1]
            seen.add(tuple(answer))
        assert float(rollouts.rewards[p, g]) == reward == over
    assert len(seen) == 4  # higher, lower, what, right


def test_turns_log_probs_are_those_of_the_whole_dialogue(policy, rollouts):
    actual = gj.completion_logprobs(policy, rollouts)
    np.testing.assert_allclose(actual, rollouts.behaviour_logprobs, atol=2e-5)
    sampled = np.asarray(rollouts.completion_mask) > 0
    assert (np.asarray(rollouts.behaviour_logprobs)[sampled] < 0).all()


def test_answers_have_no_gradient_and_are_read(talk, policy, rollouts):
    rollouts = rollouts._replace(
        rewards=jax.random.normal(KEY, rollouts.rewards.shape)  # no group ties
    )
    sampled = np.asarray(rollouts.completion_mask) > 0

    @jax.jit
    def loss(logprobs):
        return gj.policy_loss(
            gj.OBJECTIVES["dr_grpo"],
            logprobs=logprobs,
            behaviour_logprobs=rollouts.behaviour_logprobs,
            rewards=rollouts.rewards,
            completion_mask=rollouts.completion_mask,
            max_length=talk.LENGTH,
        )[0]

    gradient = np.asarray(jax.grad(loss)(rollouts.behaviour_logprobs))
    np.testing.assert_array_equal(gradient != 0, sampled)

    first = (~sampled).argmax(-1)[..., None]  # [P, G, 1], the first answer
    places = np.arange(talk.LENGTH)
    answered = (places == first) & (sampled & (places > first)).any(-1, keepdims=True)
    changed = jnp.where(answered, talk.START, rollouts.completions)
    before = gj.completion_logprobs(policy, rollouts)
    after = gj.completion_logprobs(policy, rollouts._replace(completions=changed))
    differ = np.abs(before - after) > 1e-6
    later = sampled & (places > first) & answered.any(-1, keepdims=True)
    assert not differ[~later].any() and differ[later].mean() > 0.99


# A dialogue depends on its key, its number and itself: on no other, and no padding.
def test_a_dialogue_depends_on_no_other_and_on_no_padding(
    talk, policy, rollouts, monkeypatch
):
    again = talk.play(policy, talk.SECRETS, talk.game, KEY)
    jax.tree.map(np.testing.assert_array_equal, rollouts, again)
    other = talk.play(policy, talk.SECRETS, talk.game, jax.random.key(8))
    assert (np.asarray(other.completions) != rollouts.completions).any()
    monkeypatch.setattr(talk, "LENGTH", 24)
    wider = talk.play(policy, talk.SECRETS[:5], talk.game, KEY)
    assert wider.prompts.shape == (5, 24) and wider.completions.shape[2] == 24
    for name in ("completion_mask", "completions", "behaviour_logprobs"):
        expected, mask = getattr(rollouts, name)[:5], rollouts.completion_mask[:5]
        actual = getattr(wider, name)[..., : expected.shape[2]]
        np.testing.assert_allclose(actual * mask, expected * mask, atol=2e-5)


# ---- learning


@pytest.mark.slow
def test_a_policy_learns_to_use_the_answers(talk, monkeypatch, optimized):
    compiled, play = count_compiles(), talk.play
    counts = []

    def counted(*args):
        counts.append(compiled())
        return play(*args)

    monkeypatch.setattr(talk, "play", counted)
    policy, rates = talk.train(talk.SECRETS, talk.game, steps=120)
    assert counts[1] == counts[-1], "compiled after the first step"
    # Four guesses find four of ten numbers, whatever the policy, if it hears nothing.
    assert rates[0] < 0.1 and np.mean(rates[-20:]) > 0.7
    unheard = [
        play(policy, talk.SECRETS, talk.deaf, jax.random.fold_in(KEY, i)).rewards
        for i in range(5)
    ]
    assert np.mean(unheard) < 0.43  # .4, and 1,600 dialogues' three standard errors


@pytest.mark.slow
def test_a_deaf_policy_finds_four_of_ten(talk, optimized):
    _, rates = talk.train(talk.SECRETS, talk.deaf, steps=60)
    assert 0.2 < np.mean(rates[-20:]) < 0.42


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers(talk):
    one, other = (talk.train(talk.SECRETS, talk.game, steps=3) for _ in range(2))
    assert one[1] == other[1]
    jax.tree.map(np.testing.assert_array_equal, one[0].params, other[0].params)


# ---- the guide


def test_every_block_is_run_here():
    assert set(BLOCKS) == {"calculator", "chat"}
    assert len(BLOCKS) == GUIDE.count("```python")


def space_of(name, **names):
    exec(BLOCKS[name], names)
    return names


def test_a_tools_output_follows_its_call(talk, monkeypatch):
    monkeypatch.setitem(sys.modules, "multi_turn", talk)
    space = space_of("calculator")
    rollouts, call = space["rollouts"], space["CALL"]
    assert rollouts.rewards.shape == (25, talk.GROUP)
    calls = 0
    for p, g, turns in dialogues(rollouts):
        a, _, b = space["sums"][p]["prompt"]
        for said, inserted in turns[:-1]:
            assert said[-1] == call and inserted == [(a + b) % 10]
            calls += 1
        said = turns[-1][0]
        assert (said[-1] == call) <= (len(turns) == talk.TURNS)
        assert float(rollouts.rewards[p, g]) == (said == [(a + b) % 10, talk.END])
    assert calls > 10


# Joined as tokens, a dialogue is what its messages are in the template.
def test_a_tools_message_is_that_of_the_template():
    tokenizer = chatml()
    between = space_of("chat", tokenizer=tokenizer)["tool_message"]("4")

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    first, last = ids("2+2<|im_end|>"), ids("four<|im_end|>")
    words = [("assistant", "2+2"), ("user", "4"), ("assistant", "four")]
    talked = [dict(role=role, content=text) for role, text in words]
    question = [dict(role="user", content="2 and 2?")]
    row = dict(prompt=question, completion=talked, reward=1.0)
    expected = gj.Rollouts.from_rows([row] * 2, tokenizer, pad_to=1)
    joined = [*first, *between, *last]
    mask = [1] * len(first) + [0] * len(between) + [1] * len(last)
    np.testing.assert_array_equal(expected.completions[0, 0], joined)
    np.testing.assert_array_equal(expected.completion_mask[0, 0], mask)
