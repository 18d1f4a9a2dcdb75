"""Rollouts that are refused, and those that a policy cannot have produced."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from tests.helpers import random_rollouts, tiny_policy

P, G, T, V = 4, 6, 7, 19


def rollouts(**changes):
    return random_rollouts(tiny_policy(), P, G, 5, T)._replace(**changes)


def with_one(field, value, at):
    return rollouts(**{field: getattr(rollouts(), field).at[at].set(value)})


def test_samples_pass():
    gj.check_rollouts(rollouts(), V)
    gj.check_rollouts(rollouts(rewards=None), V)
    gj.check_rollouts(rollouts(behaviour_logprobs=jnp.full((P, G, T), jnp.nan)), V)
    ended = np.asarray(rollouts().completion_mask)[2, 1].sum()
    padded = with_one("completions", V + 5, (2, 1, slice(ended, None)))
    gj.check_rollouts(padded, V)  # what is never read may be anything


NAN, INF = jnp.nan, jnp.inf
REFUSED = {
    "vocabulary": (
        with_one("completions", V, (2, 1, 0)),
        r"prompt 2, sample 1 .* has token ids outside \[0, 19\).*\(1 of 24 such\)",
    ),
    "prompt": (with_one("prompts", -1, (3, -1)), "prompt 3 .* has token ids outside"),
    "log-prob": (
        with_one("behaviour_logprobs", NAN, (1, 5, 0)),
        "prompt 1, sample 5 .* log-probs that are NaN",
    ),
    "positive": (
        with_one("behaviour_logprobs", 0.5, (1, 5, 0)),
        "prompt 1, sample 5 .* log-probs above 0",
    ),
    "no token": (
        with_one("completion_mask", 0, (0, 3)),
        "prompt 0, sample 3 .* has a reward and no token",
    ),
    "no prompt": (with_one("prompt_mask", 0, 1), "prompt 1 .* has no token"),
    "infinite": (with_one("rewards", INF, (2, 2)), "prompt 2, sample 2 .* infinite"),
    "shape": (
        rollouts(rewards=jnp.zeros((P, G + 1))),
        r"rewards of rollouts must fit .*got \(4, 7\)",
    ),
    "flat": (rollouts(completions=jnp.zeros((P, T), int)), "completions of rollouts"),
    "floats": (rollouts(prompts=jnp.zeros((P, 5))), "prompts of rollouts must be int"),
    "list": (rollouts()._replace(rewards=[[1.0]]), "rewards .* must be an array, got"),
    "none": (rollouts()._replace(prompts=None), "prompts of rollouts must be an array"),
    "kind": ({"prompts": 3}, "rollouts must be Rollouts, got dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_at_which_prompt(name):
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        gj.check_rollouts(given, V)


def share_without_warning(*arguments, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gj.warn_if_unlikely(*arguments, **changes)


# Ids in another order: the tokens of another tokenizer.
def test_tokens_of_another_tokenizer_bring_a_warning():
    policy, given = tiny_policy(), rollouts()
    policy = policy.replace(jax.tree.map(lambda x: 3 * x, policy.params))
    own = gj.sample(
        policy, given.prompts, given.prompt_mask, group_size=G, max_new_tokens=T,
        key=jax.random.key(3), eos_id=1, pad_id=0,
    )  # fmt: skip
    assert share_without_warning(policy, own) < 0.1
    shuffled = jnp.asarray(np.random.default_rng(0).permutation(V))
    other = own._replace(completions=shuffled[own.completions])
    with pytest.warns(UserWarning, match="cannot have produced them"):
        share = gj.warn_if_unlikely(policy, other)
    logprobs = np.asarray(gj.completion_logprobs(policy, other))
    floor = -1 - math.log(V)
    expected = (logprobs[np.asarray(other.completion_mask) > 0] < floor).mean()
    np.testing.assert_allclose(share, expected, rtol=1e-6)
    with pytest.warns(UserWarning, match="below -0.1 nats"):
        gj.warn_if_unlikely(policy, other, floor=-0.1, logprobs=jnp.asarray(logprobs))


# Likely tokens, sampled by somebody else; unknown log-probs say nothing.
def test_log_probs_of_another_policy_bring_a_warning():
    policy, given = tiny_policy(), rollouts()
    lower = given._replace(behaviour_logprobs=given.behaviour_logprobs - 0.6)
    with pytest.warns(UserWarning, match="by 0.60 nats a token"):
        gj.warn_if_unlikely(policy, lower)
    unknown = jnp.full((P, G, T), jnp.nan)
    share_without_warning(policy, given._replace(behaviour_logprobs=unknown))
    share_without_warning(policy, given)


# The bound: whatever the distribution, tokens below 1 / (e V) have less than 1 / e.
@pytest.mark.parametrize("sharpness", [0.0, 0.5, 1.0, 3.0])
def test_a_policy_s_own_samples_are_hardly_ever_below_the_floor(sharpness):
    rng = np.random.default_rng(0)
    logits = sharpness * rng.normal(size=(100, 1000))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert (p * (p < 1 / (math.e * 1000))).sum(1).max() < 1 / math.e
