"""TIC-GRPO's claims on policies over short token sequences, all enumerated, in float64.

Each test names the statements of the theory that it holds (E). Tokens are drawn by a
softmax whose features depend on the tokens before; token 0 ends a completion.
"""

import dataclasses
import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj

CLOSE = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)
WIDTH = 5
TIC = gj.OBJECTIVES["tic_grpo"]
UNCLIPPED = dataclasses.replace(TIC, clip=(None, 1e9))
TOKENS = dataclasses.replace(gj.OBJECTIVES["grpo_up_clip"], clip=(None, 1e9))


@pytest.fixture(autouse=True)
def in_float64(x64):
    yield


def tree(length, *, vocab=3, ends=True, seed=0):
    """All completions of at most `length` tokens, their features and rewards."""
    rng = np.random.default_rng(seed)
    tokens = np.array(list(itertools.product(range(vocab), repeat=length)))
    over = np.cumsum(tokens == 0, 1) - (tokens == 0) > 0  # a 0 came before
    if ends:
        keep = ~(over & (tokens > 0)).any(1)
        tokens, over = tokens[keep], over[keep]
    else:
        over = np.zeros_like(over)
    prefixes = [[tuple(row[:t]) for t in range(length)] for row in tokens]
    distinct = sorted({p for row in prefixes for p in row})
    drawn = rng.normal(size=(len(distinct), vocab, WIDTH))
    table = dict(zip(distinct, drawn, strict=True))
    features = np.array([[table[p] for p in row] for row in prefixes])
    rewards = (rng.random(len(tokens)) < 0.5).astype(float)
    rewards[:2] = [1, 0]
    return SimpleNamespace(
        features=features, chosen=tokens[..., None], mask=1.0 - over, rewards=rewards,
        theta=rng.normal(size=(2, WIDTH)) * 0.5,  # the old policy's and the new one's
    )  # fmt: skip


def log_probs(theta, features, chosen, mask):
    """[S, T] log-probs of the tokens, 0 after the end."""
    logits = jax.nn.log_softmax(features @ theta)
    return jnp.take_along_axis(logits, chosen, -1)[..., 0] * mask


def log_probs_of(t):
    """A `tree`'s log-probs as a function of theta alone."""
    return partial(log_probs, features=t.features, chosen=t.chosen, mask=t.mask)


def group_gradients(objective, t, groups, advantages=None):
    """[P, D] minus the gradient, times T, of each group's loss at the new theta."""
    arrays = dict(
        behaviour_logprobs=log_probs_of(t)(t.theta[0])[groups],
        rewards=t.rewards[groups],
        completion_mask=t.mask[groups],
    )
    if advantages is not None:
        arrays["advantages"] = advantages[groups]

    def losses(theta):
        logprobs = log_probs_of(t)(theta)[groups]
        return gj.per_prompt_losses(objective, logprobs=logprobs, **arrays)[0]

    return -t.mask.shape[1] * np.asarray(jax.jit(jax.jacrev(losses))(t.theta[1]))


def exact(t, which=1):
    """(probabilities [S], pass rate, gradient of it, scores [S, D]) of one theta."""

    @jax.jit
    def figures(theta):
        scores = jax.jacrev(lambda x: log_probs_of(t)(x).sum(1))(theta)
        p = jnp.exp(log_probs_of(t)(theta).sum(1))
        return p, p @ t.rewards, (p * t.rewards) @ scores, scores

    p, rate, gradient, scores = map(np.asarray, figures(t.theta[which]))
    CLOSE(p.sum(), 1)
    return p, rate, gradient, scores


# E1: token scores are martingale differences: E|sum_t s_t|^2 = sum_t E|s_t|^2, whatever
# the length a completion stops at.
@pytest.mark.parametrize("ends", [True, False])
def test_token_scores_are_uncorrelated(ends):
    t = tree(4, ends=ends)
    p, _, _, totals = exact(t)
    scores = np.asarray(jax.jit(jax.jacrev(log_probs_of(t)))(t.theta[1]))  # [S, T, D]
    CLOSE(scores.sum(1), totals)
    CLOSE(p @ (totals**2).sum(1), p @ (scores**2).sum((1, 2)))
    cross = np.einsum("s,sad,sbe->abde", p, scores, scores)
    CLOSE(cross[0, 2], 0 * cross[0, 2])
    assert np.abs(cross[2, 2]).max() > 1e-3


# E2: E_old[rho s A] = grad J(theta) for the trajectory's ratio, any constant baseline;
# the tokens' ratios, or a ratio taken to the power 1 / length, miss it.
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_trajectory_ratio_is_unbiased(baseline):
    t = tree(3)
    old, gradient = exact(t, 0)[0], exact(t)[2]
    single = np.arange(len(old))[:, None]  # each completion a group of its own
    advantages = t.rewards - baseline
    CLOSE(old @ group_gradients(UNCLIPPED, t, single, advantages), gradient)
    for other in (TOKENS, dataclasses.replace(UNCLIPPED, ratio="sequence_mean")):
        biased = old @ group_gradients(other, t, single, advantages)
        assert np.linalg.norm(biased - gradient) > 0.05 * np.linalg.norm(gradient)


# E4: over all groups drawn from the old policy the unclipped loss with the group's mean
# estimates (G - 1) / G grad J(theta), with the mean of the others grad J(theta).
@pytest.mark.parametrize("group_size", [2, 3])
def test_group_baselines_of_the_trajectory_ratio(group_size):
    t = tree(2)
    old, gradient = exact(t, 0)[0], exact(t)[2]
    groups = np.array(list(itertools.product(range(len(old)), repeat=group_size)))
    chance = old[groups].prod(1)
    CLOSE(chance.sum(), 1)
    mean = chance @ group_gradients(UNCLIPPED, t, groups)
    CLOSE(mean, (1 - 1 / group_size) * gradient)
    others = dataclasses.replace(UNCLIPPED, baseline="leave_one_out")
    CLOSE(chance @ group_gradients(others, t, groups), gradient)


# E3: the token-level gradient after a small step lies between grad J(old) and grad
# J(new): at T = 1 it is the new one; the more tokens, the nearer to the old one.
# Distances in units of theirs, medians over 60 policies.
def test_the_token_ratio_moves_from_the_new_gradient_to_the_old():
    distances = []
    for length in (1, 2, 3, 5):
        trees = [tree(length, vocab=2, ends=False, seed=s) for s in range(60)]
        stack = [np.stack(x) for x in zip(*map(batch, trees), strict=True)]
        distances.append(np.median(small_step(*stack), 0))
    to_old, to_new = np.transpose(distances)
    CLOSE([to_old[0], to_new[0]], [1, 0], rtol=1e-6, atol=1e-6)
    assert (np.diff(to_old) < 0).all() and (np.diff(to_new) > 0).all()
    assert to_old[1] > to_new[1] and to_old[-1] < 0.6 and to_new[-1] > 0.85


def batch(t):
    return t.features, t.chosen, t.mask, t.rewards, t.theta[0], t.theta[1]


@jax.jit
@jax.vmap
def small_step(features, chosen, mask, rewards, old, direction):
    """Distances to grad J(old) and grad J(new) over their distance, as [2]."""
    logs = partial(log_probs, features=features, chosen=chosen, mask=mask)

    def mean(theta):
        return jnp.exp(logs(theta).sum(1)) @ rewards

    new = old + 1e-4 * direction / jnp.linalg.norm(direction)
    chance = jnp.exp(logs(old).sum(1))

    def loss(theta):
        losses, _ = gj.per_prompt_losses(
            TOKENS,
            logprobs=logs(theta)[:, None],
            behaviour_logprobs=logs(old)[:, None],
            rewards=rewards[:, None],
            completion_mask=mask[:, None],
            advantages=(rewards - mean(old))[:, None],
        )
        return chance @ losses * mask.shape[1]

    result, ends = -jax.grad(loss)(new), [jax.grad(mean)(x) for x in (old, new)]
    apart = jnp.linalg.norm(ends[1] - ends[0])
    return jnp.stack([jnp.linalg.norm(result - end) for end in ends]) / apart


# E6: completion by completion TIC-GRPO's gradient is 1{rho <= 1 + e} rho A s / T: above
# the cap it is 0 for either sign of A. E5: so its mean is that of the kept part of the
# new policy alone, which is not grad J.
def test_the_clipped_trajectory_ratio():
    t = tree(3)
    old = exact(t, 0)[0]
    p, rate, gradient, scores = exact(t)
    advantages, ratio = t.rewards - rate, p / old
    single = np.arange(len(p))[:, None]
    result = group_gradients(TIC, t, single, advantages)
    kept = ratio <= 1 + TIC.clip[1]
    CLOSE(result, (kept * ratio * advantages)[:, None] * scores, atol=1e-12)
    for sign in (1, -1):
        above = ~kept & (sign * advantages > 0)
        assert above.any() and (result[above] == 0).all()
    clipped = old @ result
    CLOSE(clipped, (p * kept * advantages) @ scores)
    assert 0.2 < p @ kept < 0.9
    assert np.linalg.norm(clipped - gradient) > 0.1 * np.linalg.norm(gradient)
