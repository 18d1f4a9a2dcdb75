import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import (
    conflict_weights,
    dense_step_weights,
    nthr_weights,
    overlong_weights,
    truncated_importance_weights,
)
from grpo_jax.objectives import token_weights
from grpo_jax.objectives.token_weights import mean_entropy

NAN = float("nan")
conflicts = jax.jit(conflict_weights)


def padded(rows, fill=0):
    """([1, G, T] ids, mask) of completions of any lengths."""
    length = max(len(row) for row in rows)
    ids = [[*row, *[fill] * (length - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return np.array([ids]), np.array([mask], np.float32)


# Each case: completions, their advantages, and factor of every token.
CASES = {
    "nothing_shared": ([[1, 2], [3, 4]], [1, -1], [[1, 1], [1, 1]]),
    # Both runs span everything: 2 * 2 for the good one, 0 for the bad.
    "overlap": ([[5, 7], [5, 7]], [1, -1], [[4, 4], [0, 0]]),
    # From the start 1; 2 against 9 ends the run before the 3. From the end 4 against 8.
    "the_run_stops": (
        [[1, 2, 3, 4], [1, 9, 3, 8]], [1, -1], [[2, 1, 1, 1], [0, 1, 1, 1]],
    ),
    # Only the last tokens meet, at different places.
    "ragged_ends": ([[1, 2, 3], [9, 3]], [1, -1], [[1, 1, 2], [1, 0]]),
    # From the start 1; from the end 3 then 2: the long one's middle is its own.
    "ragged_both": (
        [[1, 4, 2, 3], [1, 2, 3]], [0.5, -2], [[2, 1, 2, 2], [0, 0, 0]],
    ),
    # Place 0 is shared by the first two, place 1 by the last two: the run goes on.
    "the_run_changes_hands": (
        [[1, 2], [1, 3], [4, 3]], [1, -1, 1], [[4, 1], [0, 0], [1, 4]],
    ),
    # A longer run from the start than a completion is long.
    "one_token": ([[1], [1, 2]], [1, -1], [[2], [0, 1]]),
    "zero_is_neither": ([[1, 2], [1, 2], [3, 4]], [1, 0, -1], [[1, 1]] * 3),
    "no_bad_one": ([[1, 2], [1, 2]], [1, 2], [[1, 1]] * 2),
    "an_empty_one": ([[], [1], [1]], [1, 1, -1], [[], [4], [0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_conflict_weights(name):
    rows, advantages, expected = CASES[name]
    ids, mask = padded(rows)
    actual = conflicts(ids, np.float32([advantages]), mask)
    np.testing.assert_array_equal(actual, padded(expected, fill=1)[0])


def plain_conflicts(rows, advantages):
    factors = [[1.0] * len(row) for row in rows]
    longest = max(len(row) for row in rows)
    for end in (False, True):
        for t in range(longest):
            at = [
                (i, len(row) - 1 - t if end else t)
                for i, row in enumerate(rows)
                if t < len(row)
            ]
            shared = {
                (i, k)
                for i, k in at
                for j, m in at
                if advantages[i] * advantages[j] < 0 and rows[i][k] == rows[j][m]
            }
            for i, k in shared:
                factors[i][k] *= 2.0 if advantages[i] > 0 else 0.0
            if not shared:
                break
    return factors


def test_conflict_weights_are_those_of_a_plain_loop():
    rng, groups = np.random.default_rng(0), []
    for _ in range(200):
        rows = [rng.integers(2, size=n).tolist() for n in rng.integers(6, size=4)]
        rows[0] += [0] * (5 - len(rows[0]))  # one is as long as the array
        advantages = rng.choice([-1.0, 0.0, 0.5, 1.0], 4)
        factors = padded(plain_conflicts(rows, advantages), fill=1)[0]
        groups.append((*padded(rows, fill=1), advantages, factors))
    ids, mask, advantages, factors = (np.stack(x) for x in zip(*groups, strict=True))
    actual = conflicts(ids[:, 0], advantages.astype(np.float32), mask[:, 0])
    np.testing.assert_array_equal(actual, factors[:, 0])
    assert {0, 1, 2, 4} <= set(np.unique(factors))


def test_mean_entropy():
    entropy = np.float32([[[1, 3, NAN], [2, NAN, NAN], [NAN, NAN, NAN]]])
    mask = np.array([[[1, 1, 0], [1, 0, 0], [0, 0, 0]]])
    np.testing.assert_allclose(jax.jit(mean_entropy)(entropy, mask), [[2, 2, 0]])
    grad = jax.jit(jax.grad(lambda x: mean_entropy(x, mask).sum()))(entropy)
    assert not np.asarray(grad).any()


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def plain_nthr(
    hidden, unembedding, ids, rewards, mask, beta, eta, temperature, softcap=np.inf
):
    """One group's factors, token pair by token pair."""
    g, t, _ = hidden.shape
    error = np.zeros((g, t, unembedding.shape[1]))
    for i, k in np.ndindex(g, t):
        logits = hidden[i, k] @ unembedding
        if np.isfinite(softcap):
            logits = softcap * np.tanh(logits / softcap)
        error[i, k] = -softmax(logits / temperature)
        error[i, k, ids[i, k]] += 1

    def influence(i, j, k):  # of completion i on token k of completion j
        return sum(
            (hidden[i, m] @ hidden[j, k]) * (error[i, m] @ error[j, k])
            for m in range(t)
            if mask[i, m]
        )

    def on_average(i, j):
        tokens = [influence(i, j, k) for k in range(t) if mask[j, k]]
        return sum(tokens) / max(1, len(tokens))

    mean = np.nanmean(rewards) if not np.isnan(rewards).all() else NAN
    right = [i for i in range(g) if rewards[i] > mean]
    factors = np.ones((g, t))
    if not right:
        return factors
    tau = beta * min(
        np.mean([on_average(i, j) for j in right if j != i] or [on_average(i, i)])
        for i in right
    )
    for j, k in np.ndindex(g, t):
        wrong = rewards[j] < mean and mask[j, k]
        if wrong and sum(influence(i, j, k) for i in right) > tau:
            factors[j, k] = eta
    return factors


P, G, T, D, V = 40, 4, 3, 5, 7


def nthr_batch():
    """Every number of right completions from none to all, ragged, with gaps."""
    rng = np.random.default_rng(1)
    rewards = (np.arange(G) < np.arange(P)[:, None] % (G + 1)).astype(float)
    rewards = rng.permuted(rewards, axis=1)
    rewards[::7, 0] = NAN
    lengths = rng.integers(1, T + 1, (P, G, 1)) * ~np.isnan(rewards)[..., None]
    hidden = rng.normal(size=(P, G, T, D)) + 0.5 * rng.normal(size=(P, 1, 1, D))
    ids = rng.integers(V, size=(P, G, T))
    return hidden, rng.normal(size=(D, V)), ids, rewards, np.arange(T) < lengths


@pytest.mark.parametrize(
    ("beta", "eta", "temperature", "max_logits"),
    [
        (1.0, 0.0, 1.0, None),
        (0.5, 0.25, 0.7, 2 * G * T),  # two words of seven at a time
        (1.0, 0.0, 1.0, 1),  # never fewer than one
    ],
)
def test_nthr_weights(beta, eta, temperature, max_logits, x64, monkeypatch):
    if max_logits is not None:
        monkeypatch.setitem(token_weights.MAX_LOGITS, "cpu", max_logits)
    batch = nthr_batch()
    settings = dict(beta=beta, eta=eta, temperature=temperature)
    actual = jax.jit(lambda *x: nthr_weights(*x, **settings))(*batch)
    hidden, unembedding, *rest = batch
    for p in range(P):
        group = (x[p] for x in rest)
        expected = plain_nthr(hidden[p], unembedding, *group, **settings)
        np.testing.assert_array_equal(actual[p], expected, err_msg=str(p))
    damped = np.asarray(actual == eta)
    assert 0.05 < damped[batch[-1]].mean() < 0.5 and not damped[~batch[-1]].any()


# All states are 1, the unembedding is 0, so <e, e'> = [same token] - 1/2 with V = 2 and
# tau is the only right one's mean influence on itself: two tokens, each 2 * 1/2 = 1.
# A wrong token of the same id gets 2 * 1/2 = 1, no more than tau; the other id -1.
def test_nthr_with_one_right_completion_compares_with_itself():
    hidden, unembedding = np.ones((1, 2, 2, 1)), np.zeros((1, 2))
    ids, mask = np.array([[[0, 0], [0, 1]]]), np.ones((1, 2, 2))
    arrays = hidden, unembedding, ids, np.float32([[1, 0]]), mask
    np.testing.assert_array_equal(jax.jit(nthr_weights)(*arrays), np.ones((1, 2, 2)))
    lower = jax.jit(lambda *x: nthr_weights(*x, beta=0.99))(*arrays)
    np.testing.assert_array_equal(lower, [[[1, 1], [0, 1]]])


@pytest.mark.parametrize("rewards", [[1, 1], [NAN, NAN], [1, NAN]])
def test_nthr_damps_nothing_without_a_wrong_answer(rewards):
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(1, 2, 3, 4)), rng.normal(size=(4, 5))
    ids, mask = rng.integers(5, size=(1, 2, 3)), np.ones((1, 2, 3))
    actual = jax.jit(nthr_weights)(hidden, unembedding, ids, np.array([rewards]), mask)
    assert (np.asarray(actual) == 1).all()


def test_nthr_weights_are_constants_whatever_the_padding_holds():
    hidden, unembedding, ids, rewards, mask = nthr_batch()
    other = np.where(mask[..., None], hidden, 1e3), unembedding, ids, rewards, mask
    actual = jax.jit(nthr_weights)(hidden, unembedding, ids, rewards, mask)
    np.testing.assert_array_equal(jax.jit(nthr_weights)(*other), actual)
    grad = jax.grad(lambda u: nthr_weights(hidden, u, ids, rewards, mask).sum())
    assert not np.asarray(jax.jit(grad)(unembedding)).any()


def test_nthr_weights_broadcast_openly():
    with jax.numpy_rank_promotion("raise"):
        jax.jit(nthr_weights)(*nthr_batch())


def test_nthr_weights_of_capped_logits(x64):
    settings = dict(beta=1.0, eta=0.0, temperature=0.5, softcap=0.8)
    batch = nthr_batch()
    actual = jax.jit(lambda *x: nthr_weights(*x, **settings))(*batch)
    hidden, unembedding, *rest = batch
    for p in range(P):
        expected = plain_nthr(hidden[p], unembedding, *(x[p] for x in rest), **settings)
        np.testing.assert_array_equal(actual[p], expected)
    plain = nthr_weights(*batch, temperature=0.5)
    assert (np.asarray(plain) != np.asarray(actual)).any()


# EOS is 1. The third has it in its padding only: it was cut off.
def test_overlong_weights():
    ids = np.array([[[5, 1, 0], [5, 6, 7], [5, 6, 1], [1, 0, 0]]])
    mask = np.array([[[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]])
    actual = jax.jit(overlong_weights, static_argnums=2)(ids, mask, 1)
    np.testing.assert_array_equal(actual[0], [[1] * 3, [0] * 3, [0] * 3, [1] * 3])
    several = jax.jit(overlong_weights, static_argnums=2)(ids, mask, (1, 7))
    np.testing.assert_array_equal(several[0], [[1] * 3, [1] * 3, [0] * 3, [1] * 3])


def test_truncated_importance_weights():
    now = np.log(np.float32([[[3, 1, 0.5, 1.5]]])) - 4
    sampled = np.full_like(now, -4)
    weights = jax.jit(truncated_importance_weights, static_argnums=2)
    np.testing.assert_allclose(weights(now, sampled, 2.0)[0, 0], [2, 1, 0.5, 1.5], 1e-5)
    np.testing.assert_allclose(weights(now, sampled, 1.0)[0, 0], [1, 1, 0.5, 1], 1e-5)
    chex.assert_tree_all_finite(weights(now + 1e4, sampled, 2.0))
    grad = jax.jit(jax.grad(lambda x: truncated_importance_weights(x, sampled).sum()))
    assert not np.asarray(grad(now)).any()


# (1, 3): mean 2. What padding holds is no value; nothing to divide by leaves 1.
def test_dense_step_weights():
    values = np.float32([[[1, 3, 99], [0, 0, 0], [5, NAN, NAN]]])
    mask = np.array([[[1, 1, 0], [1, 1, 1], [1, 0, 0]]])
    actual = jax.jit(dense_step_weights)(values, mask)
    np.testing.assert_allclose(actual[0], [[0.5, 1.5, 1], [1, 1, 1], [1, 1, 1]])
    grad = jax.jit(jax.grad(lambda x: jnp.sum(dense_step_weights(x, mask) ** 2)))
    assert not np.asarray(grad(values)).any()
