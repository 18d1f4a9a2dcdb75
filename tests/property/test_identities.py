"""Equalities between members of the family, in float64."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.objectives.surrogates import SURROGATES

P, G, T, V, D = 3, 4, 5, 6, 3
NAMES = tuple(gj.OBJECTIVES)
EQUAL = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)

pytestmark = pytest.mark.usefixtures("x64")


def of(name, **changes):
    return dataclasses.replace(gj.OBJECTIVES[name], kl_coef=0.0, **changes)


def batch(seed=0, spread=0.4, solved=None):
    """Ragged and off policy; with `solved`, binary rewards of so many successes."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(size=(P, G, T)) - 0.1
    lengths = rng.integers(1, T + 1, (P, G, 1))
    rewards = rng.normal(size=(P, G))
    if solved is not None:
        rewards = (np.arange(G) < np.array(solved)[:, None]).astype(float)
    return dict(
        logprobs=logprobs,
        behaviour_logprobs=logprobs - spread * rng.normal(size=(P, G, T)),
        rewards=rewards,
        completion_mask=(np.arange(T) < lengths).astype(float),
    )


def extras():
    rng = np.random.default_rng(9)
    shape = (P, G, T)
    return dict(
        entropy=rng.uniform(0.4, 0.9, shape),
        token_ids=rng.integers(0, 3, shape),
        token_weights=rng.uniform(0.5, 2, shape),
    )


def loss_and_grads(objective, arrays):
    def loss(logprobs):
        return gj.policy_loss(objective, **arrays | {"logprobs": logprobs})[0]

    return jax.jit(jax.value_and_grad(loss))(arrays["logprobs"])


def grads_of(objective, arrays):
    grads = np.asarray(loss_and_grads(objective, arrays)[1])
    assert abs(grads).max() > 1e-3
    return grads


# ---- baselines


# The kernel h_ij = (R_i - R_j) (S_i - S_j) / 2 averaged over the pairs i < j.
def test_rloo_is_a_u_statistic_and_reinforce_a_share_of_it():
    rng, arrays = np.random.default_rng(1), batch()
    hidden, tokens = rng.normal(size=(P, G, T, D)), rng.integers(V, size=(P, G, T))
    matrix, mask = rng.normal(size=(D, V)), arrays["completion_mask"]

    def sequences(matrix):
        return (gj.token_logprobs(hidden, matrix, tokens) * mask).sum(-1)

    def gradient(objective):
        def loss(matrix):
            logprobs = gj.token_logprobs(hidden, matrix, tokens)
            return gj.policy_loss(objective, **arrays | {"logprobs": logprobs})[0]

        return jax.jit(jax.grad(loss))(matrix)

    scores = np.asarray(jax.jit(jax.jacrev(sequences))(matrix))  # [P, G, D, V]
    kernel = [
        (arrays["rewards"][:, i] - arrays["rewards"][:, j])[:, None, None]
        * (scores[:, i] - scores[:, j])
        / 2
        for i, j in itertools.combinations(range(G), 2)
    ]
    statistic = np.mean(kernel, axis=(0, 1))
    EQUAL(-gradient(of("rloo")), statistic)
    EQUAL(-gradient(of("reinforce")) * G / (G - 1), statistic)


# ---- expectations over all groups of a bandit with K answers, the first two right


K, THETA = 3, np.array([0.3, -0.5, 0.2])
RIGHT = np.array([1.0, 1.0, 0.0])


def expected_gradient(objective, group_size):
    """Of all K^G groups, weighted by their probability: one loss per group."""
    groups = np.array(list(itertools.product(range(K), repeat=group_size)))

    def losses(theta):
        logprobs = jax.nn.log_softmax(theta)[groups][..., None]
        return gj.per_prompt_losses(
            objective,
            logprobs=logprobs,
            behaviour_logprobs=jax.lax.stop_gradient(logprobs),
            rewards=RIGHT[groups],
            completion_mask=jnp.ones_like(logprobs),
        )[0]

    probability = jnp.exp(jax.nn.log_softmax(THETA)[groups].sum(-1))
    return -jax.jit(lambda x: jax.vjp(losses, x)[1](probability)[0])(THETA)


def exact():
    """(p, grad p) of the bandit."""
    return jax.jit(jax.value_and_grad(lambda x: jax.nn.softmax(x) @ RIGHT))(THETA)


@pytest.mark.parametrize("group_size", [2, 5])
def test_what_std_normalisation_estimates(group_size):
    p, slope = exact()
    delta = slope / (p * (1 - p))
    weight = gj.expected_group_std(p, group_size)
    EQUAL(expected_gradient(of("grpo", std_eps=0.0), group_size), weight * delta)
    EQUAL(expected_gradient(of("rloo"), group_size), slope)
    centred = expected_gradient(of("reinforce"), group_size)
    EQUAL(centred, (1 - 1 / group_size) * slope)
    # A group whose mean is p itself.
    off = jnp.minimum(p, 1 - p) / 2
    group = jnp.stack([p + off, p - off] + [p] * (group_size - 2))[None]
    finite, _ = gj.finite_group_weights(group_size).weights(group, ())
    EQUAL(finite * centred, weight * delta)


# E[centred / mean] = (1 - (1 - p)^(G - 1)) grad p / p.
def test_max_rl_estimates_the_gradient_of_log_p(group_size=4):
    p, slope = exact()
    actual = expected_gradient(of("max_rl", std_eps=0.0), group_size)
    EQUAL(actual, (1 - (1 - p) ** (group_size - 1)) * slope / p)


# ---- KL(policy || reference) of completions of two tokens, by enumeration


PREFIX = np.array([[0.2, -0.4, 0.7]])
NEXT = np.array([[0.3, 0.1, -0.9], [-0.5, 0.8, 0.2], [1.1, -0.3, 0.4]])
REFERENCE = (np.array([[-0.1, 0.6, 0.3]]), NEXT[::-1] + 0.5 * np.eye(3))


def token_logprobs(first, later):
    """[9, 2] log-probs of the tokens of all completions; `later` by first token."""
    first, later = jax.nn.log_softmax(first), jax.nn.log_softmax(later)
    pairs = np.array(list(itertools.product(range(3), repeat=2)))
    return jnp.stack([first[0, pairs[:, 0]], later[pairs[:, 0], pairs[:, 1]]], 1)


def kl_of_completions(*logits):
    logprobs = token_logprobs(*logits)
    gap = (logprobs - token_logprobs(*REFERENCE)).sum(1)
    return jnp.exp(logprobs.sum(1)) @ gap


def kl_of_tokens(reverse):
    """Each token's KL given its prefix, prefixes as often as they are sampled."""

    def total(first, later):
        kl = 0.0
        pairs = zip((first, later), REFERENCE, strict=True)
        often = (np.ones(1), jnp.exp(jax.nn.log_softmax(PREFIX)[0]))
        for (logits, reference), weights in zip(pairs, often, strict=True):
            p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
            p, q = (q, p) if reverse else (p, q)
            kl += weights @ (jnp.exp(p) * (p - q)).sum(1)
        return kl

    return total


def expected_kl_gradient(divergence, kl_in):
    """What the objective descends with rewards of 0, over all groups of one."""
    objective = dataclasses.replace(
        gj.OBJECTIVES["reinforce"], baseline="none", kl_coef=1.0, kl_in=kl_in,
        divergence=divergence,
    )  # fmt: skip
    reference = token_logprobs(*REFERENCE)[:, None]

    def losses(first, later):
        logprobs = token_logprobs(first, later)[:, None]
        return gj.per_prompt_losses(
            objective,
            logprobs=logprobs,
            behaviour_logprobs=jax.lax.stop_gradient(logprobs),
            reference_logprobs=reference,
            rewards=jnp.zeros((9, 1)),
            completion_mask=jnp.ones((9, 1, 2)),
        )[0]

    probability = jnp.exp(token_logprobs(PREFIX, NEXT).sum(1))
    return jax.jit(lambda *x: jax.vjp(losses, *x)[1](probability))(PREFIX, NEXT)


def gradient_of(function):
    return jax.jit(jax.grad(function, argnums=(0, 1)))(PREFIX, NEXT)


def test_k1_in_the_reward_descends_the_kl_of_completions():
    actual, expected = expected_kl_gradient("k1", "reward"), kl_of_completions
    jax.tree.map(EQUAL, actual, gradient_of(expected))


@pytest.mark.parametrize(("divergence", "reverse"), [("k2", False), ("k3", True)])
def test_kl_in_the_loss_descends_that_of_tokens_with_prefixes_frozen(
    divergence, reverse
):
    actual = expected_kl_gradient(divergence, "loss")
    jax.tree.map(EQUAL, actual, gradient_of(kl_of_tokens(reverse)))
    # The last token has no say in a prefix; the first one does.
    whole = gradient_of(kl_of_completions)
    assert np.abs(actual[0] - whole[0]).max() > 0.03
    if not reverse:
        EQUAL(actual[1], whole[1])


def test_k3_in_the_reward_lacks_the_gradient_of_its_value():
    in_reward, in_loss = (expected_kl_gradient("k3", x) for x in ("reward", "loss"))
    whole = gradient_of(kl_of_completions)
    jax.tree.map(lambda a, b, c: EQUAL(a, b - c), in_reward, whole, in_loss)


# ---- what a loss is on policy


def test_which_losses_are_zero_on_policy():
    arrays = batch(spread=0.0, solved=[1, 2, 3]) | extras()
    arrays["token_weights"] = np.ones((P, G, T))
    arrays = jax.tree.map(jnp.asarray, arrays)
    zero = {"grpo", "gspo", "gmpo", "tic_grpo"}
    other = {"reinforce", "rloo", "max_rl", "cispo", "dapo", "dr_grpo"}
    losses = {x: gj.policy_loss(of(x), **arrays)[0] for x in zero | other}
    assert {name for name, loss in losses.items() if abs(loss) < 1e-12} == zero
    assert all(abs(losses[name]) > 1e-3 for name in other)


# ---- pairs of objectives


@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_hpo_has_the_gradient_of_ppo_clip(spread):
    arrays = batch(spread=spread)
    ppo = of("grpo", aggregation="batch_token_mean", clip=(0.1, 0.3))
    hinge = of("hpo", clip=(0.1, 0.3))
    EQUAL(grads_of(hinge, arrays), grads_of(ppo, arrays))


@pytest.mark.parametrize("spread", [1e-3, 0.4])
def test_gspo_is_gspo_token(spread):
    arrays = batch(spread=spread)
    one, other = (loss_and_grads(of(x), arrays) for x in ("gspo", "gspo_token"))
    EQUAL(one[0], other[0])
    EQUAL(one[1], other[1])


# Groups of equal means leave nothing to fit; means 1/4, 1/2, 3/4 fit Beta(3/2, 3/2).
@pytest.mark.parametrize(
    ("solved", "scale", "factor"),
    [([2, 2, 2], "none", 1), ([1, 2, 3], "std", math.pi / 8)],
)
def test_bnpo_between_reinforce_and_grpo(solved, scale, factor):
    arrays = batch(solved=solved)
    other = of("bnpo", scale=scale, std_eps=0.0)
    expected = factor * grads_of(other, arrays)
    np.testing.assert_allclose(grads_of(of("bnpo"), arrays), expected, rtol=1e-10)


@pytest.mark.parametrize("clip", [(0.99, 50.0), (None, 50.0)])
def test_gmpo_cutting_nothing_is_unclipped_gspo(clip):
    arrays = batch(spread=0.2)
    gspo = of("gspo", surrogate="is")
    one, other = (loss_and_grads(x, arrays) for x in (of("gmpo", clip=clip), gspo))
    EQUAL(one[0], other[0])
    EQUAL(one[1], other[1])


def test_on_policy_grpo_needs_no_importance_ratio():
    arrays = batch(spread=0.0)
    expected = grads_of(of("grpo_no_is"), arrays)
    for name in ("grpo", "gspo_token", "nthr"):
        EQUAL(grads_of(of(name, token_weight="none"), arrays), expected)


def test_a_standardised_ratio_has_the_tokens_gradient_on_policy():
    arrays = batch(spread=0.0)
    standardised = of("grpo", ratio="standardised")
    EQUAL(grads_of(standardised, arrays), grads_of(of("grpo"), arrays))


# d = (1, 3, 2): mean 2, std sqrt(2/3) < 1, so only centred: z = (-1, 1, 0). Ten times
# that: divided by sqrt(200/3) it is (-1, 1, 0) sqrt(3/2).
@pytest.mark.parametrize(("size", "z"), [(1, 1.0), (10, 1.5**0.5)])
def test_a_standardised_ratio_off_policy(size, z):
    d = size * np.array([[[1.0, 3, 2], [0, 0, 0]]])
    arrays = dict(
        logprobs=d - 40, behaviour_logprobs=np.full((1, 2, 3), -40.0),
        rewards=np.array([[1.0, -1.0]]), completion_mask=np.ones((1, 2, 3)),
    )  # fmt: skip
    objective = of("espo", scale="none", ratio="standardised")
    loss, _ = loss_and_grads(objective, arrays)
    EQUAL(loss, (3 - math.exp(-z) - math.exp(z) - 1) / 6)


# Completions far above the cap, at it, just below, and far below: nothing, all, all.
@pytest.mark.parametrize("sign", [1, -1])
def test_tic_grpo_has_no_gradient_above_its_cap(sign):
    arrays = batch(solved=[2, 2, 2]) | dict(completion_mask=np.ones((P, G, T)))
    logs = np.log([1.2801, 1.2799, 5.0, 0.01])  # of the whole completions' ratios
    arrays["behaviour_logprobs"] = arrays["logprobs"] - (logs / T)[None, :, None]
    arrays["rewards"] = sign * np.array([[1.0, 0, 0, 1]] * P)
    grads = grads_of(of("tic_grpo"), arrays)
    assert (grads[:, [0, 2]] == 0).all() and (grads[:, [1, 3]] != 0).all()
    arrays["rewards"] = sign * np.array([[0.0, 1, 1, 0]] * P)
    assert (grads_of(of("tic_grpo"), arrays)[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.9])
def test_the_relative_ratio_is_bounded(mixture):
    z = np.linspace(-40, 40, 801)
    ratio = np.asarray(jax.jit(gj.relative_ratio, static_argnums=1)(z, mixture))
    assert (ratio >= 0).all() and (ratio <= 1 / mixture).all()
    assert (np.diff(ratio) >= 0).all() and ratio[400] == 1
    r = np.exp(z[390:411])  # p / (mixture p + (1 - mixture) q) with q = 1
    EQUAL(ratio[390:411], r / (mixture * r + 1 - mixture))


# At the edges of its relative ratio: r = e (1 - m) / (1 - m e), e = 1.2 and 0.8.
@pytest.mark.parametrize(("edge", "reward"), [(1.2, 1.0), (0.8, -1.0)])
def test_ppo_rpe_has_no_gradient_at_its_edges(edge, reward):
    r = edge * 0.5 / (1 - 0.5 * edge)
    arrays = dict(
        logprobs=np.array([[[math.log(r) - 3], [0.0]]]),
        behaviour_logprobs=np.array([[[-3.0], [0.0]]]),
        rewards=np.array([[reward, -reward]]), completion_mask=np.ones((1, 2, 1)),
    )  # fmt: skip
    _, grads = loss_and_grads(of("ppo_rpe"), arrays)
    assert abs(grads[0, 0, 0]) < 1e-12


# ---- advantages of one's own


def losses_of(objective, arrays, *advantages):
    """The [P] losses under each of the advantages."""

    def losses(*advantages):
        arguments = extras() | arrays
        return [
            gj.per_prompt_losses(objective, **arguments, advantages=x)[0]
            for x in advantages
        ]

    return jax.jit(losses)(*advantages)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_advantage_per_token_may_be_the_completions(name):
    advantages = np.random.default_rng(3).normal(size=(P, G))
    advantages[0, 0] = 0
    per_token = np.repeat(advantages[..., None], T, -1)
    expected, actual = losses_of(of(name), batch(), advantages, per_token)
    assert np.asarray(expected).all()
    EQUAL(actual, expected)


# On policy every ratio is 1, so a mean over tokens of -r A is -2 whatever the rewards.
@pytest.mark.parametrize("name", ["rloo", "grpo", "bnpo", "fr_ppo", "max_rl"])
def test_given_advantages_take_the_place_of_baseline_and_scale(name):
    objective = of(name, surrogate="is", aggregation="group_token_mean")
    arrays = batch(spread=0.0) | dict(token_weights=None)
    (actual,) = losses_of(objective, arrays, np.full((P, G), 2.0))
    EQUAL(actual, [-2] * P)


# Each token by itself: their losses add up, positive and negative tokens alike.
@pytest.mark.parametrize("name", ["grpo", "gspo_token", "cispo", "hpo", "copg"])
def test_advantages_of_single_tokens_add_up(name):
    arrays, objective = batch(), of(name)
    advantages = np.random.default_rng(3).normal(size=(P, G, T))
    alone = [np.where(np.arange(T) == t, advantages, 0) for t in range(T)]
    whole, *parts = losses_of(objective, arrays, advantages, *alone)
    EQUAL(whole, sum(parts))


def test_advantages_in_the_padding_are_never_read():
    arrays = batch()
    live = arrays["completion_mask"] > 0
    advantages = np.random.default_rng(3).normal(size=(P, G, T))
    padded = [np.where(live, advantages, x) for x in (0, np.nan)]
    expected, actual = losses_of(of("grpo"), arrays, *padded)
    EQUAL(actual, expected)


def test_advantages_in_the_padding_make_no_conflict():
    arrays = batch()
    live = arrays["completion_mask"] > 0
    advantages = np.array([1.0, -1, 1, -1])[None, :, None]
    padded = [np.where(live, advantages, x) for x in (advantages, 50.0)]
    expected, actual = losses_of(of("gtpo"), arrays, *padded)
    EQUAL(actual, expected)


@pytest.mark.parametrize("axes", [2, 3])
def test_given_advantages_are_constants(axes):
    arrays, shape = batch(), (P, G, T)[:axes]

    def loss(advantages):
        return gj.policy_loss(of("grpo"), **arrays, advantages=advantages)[0]

    assert not np.asarray(jax.jit(jax.grad(loss))(np.ones(shape))).any()


# A less c H is what the entropy shift says it is, wherever the table calls it linear.
LINEAR = [n for n, row in SURROGATES.items() if row.linear and not row.penalty]


@pytest.mark.parametrize("surrogate", LINEAR)
def test_the_entropy_shift_is_one_of_the_advantages(surrogate):
    arrays = batch(spread=1.0)
    entropy, live = extras()["entropy"], arrays["completion_mask"]
    mean = (entropy * live).sum(-1) / live.sum(-1)
    objective = of("grpo", surrogate=surrogate, scale="none", clip=(0.2, 0.2))
    shifted = dataclasses.replace(objective, entropy_coef=0.5)
    advantages = arrays["rewards"] - arrays["rewards"].mean(1, keepdims=True)
    one = loss_and_grads(shifted, arrays | {"entropy": entropy})
    other = arrays | {"advantages": advantages - 0.5 * mean}
    EQUAL(one[1], loss_and_grads(objective, other)[1])
