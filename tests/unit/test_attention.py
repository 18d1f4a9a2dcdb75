from functools import partial

import chex
import jax
import numpy as np
import pytest

from grpo_jax.models.attention import (
    ByLayer,
    Part,
    rotary_stretch,
    rotary_table,
    rotate,
    shared_prefix_attention,
    within_window,
)

P, G, S, H, KV, D, L, U = 2, 3, 4, 4, 2, 6, 5, 4


def softmax_attention(q, k, v, scale=None, softcap=None):
    """One query [d] over keys and values [N, d]."""
    scores = k @ q * (len(q) ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ v


def random(seed, *shape):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


SCORES = [{}, dict(scale=0.7, softcap=0.9)]


# With a mask per query, queries 2 and 3 see no token of the second prompt.
@pytest.mark.parametrize("scores", SCORES, ids=["plain", "capped"])
@pytest.mark.parametrize("by_query", [False, True])
def test_shared_prefix_attention_is_attention_over_concatenated_keys(by_query, scores):
    q, suffix_mask = random(0, P, G, S, H, D), np.tril(np.ones((S, U), bool))
    prefix_k, prefix_v = random(1, P, L, KV, D), random(2, P, L, KV, D)
    suffix_k, suffix_v = random(3, P, G, U, KV, D), random(4, P, G, U, KV, D)
    prefix_mask = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], bool)
    seen_prefix = np.repeat(prefix_mask[:, None], S, axis=1)  # [P, S, L]
    if by_query:
        seen_prefix &= np.arange(L) < L - np.arange(S)[:, None]
    parts = [
        Part(
            prefix_k.transpose(0, 2, 3, 1),
            prefix_v.swapaxes(1, 2),
            seen_prefix if by_query else prefix_mask,
        ),
        Part(suffix_k.transpose(0, 1, 3, 4, 2), suffix_v.swapaxes(2, 3), suffix_mask),
    ]
    actual = jax.jit(partial(shared_prefix_attention, **scores))(q, parts)
    chex.assert_shape(actual, (P, G, S, H, D))
    for p, g, s, h in np.ndindex(P, G, S, H):
        shared = h // (H // KV)  # consecutive query heads share a key/value head
        live, seen = seen_prefix[p, s], suffix_mask[s]
        k = np.concatenate((prefix_k[p, live, shared], suffix_k[p, g, seen, shared]))
        v = np.concatenate((prefix_v[p, live, shared], suffix_v[p, g, seen, shared]))
        expected = softmax_attention(q[p, g, s, h], k, v, **scores)
        np.testing.assert_allclose(actual[p, g, s, h], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_an_empty_prefix_leaves_self_attention(scale):
    q = scale * random(0, P, 1, S, H, D)
    k, v = random(1, P, 1, KV, D, S), random(2, P, 1, KV, S, D)
    own = Part(k, v, np.tril(np.ones((S, S), bool)))
    empty = np.zeros((P, KV, D, L), np.float32), np.full((P, KV, L, D), 7, np.float32)
    attend = jax.jit(shared_prefix_attention)
    actual = attend(q, [Part(*empty, np.zeros((P, L), bool)), own])
    np.testing.assert_allclose(actual, attend(q, [own]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scores", SCORES, ids=["plain", "capped"])
def test_a_part_of_its_own_sees_what_its_mask_says(scores):
    q, k, v = random(0, P, L, H, D), random(1, P, L, KV, D), random(2, P, L, KV, D)
    mask = np.tril(np.ones((P, L, L), bool)) & np.array([0, 0, 1, 1, 1], bool)
    mask[1, :, 3] = False
    part = Part(k.transpose(0, 2, 3, 1)[:, None], v.swapaxes(1, 2)[:, None], mask)
    attend = jax.jit(partial(shared_prefix_attention, **scores))
    actual = attend(q[:, None], [part])[:, 0]
    for p, s, h in np.ndindex(P, 3, H):
        seen = np.flatnonzero(mask[p, 2 + s])
        args = q[p, 2 + s, h], k[p, seen, h // 2], v[p, seen, h // 2]
        expected = softmax_attention(*args, **scores)
        np.testing.assert_allclose(actual[p, 2 + s, h], expected, rtol=1e-4, atol=1e-5)


# cos(1) and sin(1) on the pair (0, 2) at frequency 1; the pair (1, 3) turns by
# theta^(-1/2) = 0.1 per position.
def test_rotate_turns_each_pair_by_its_own_angle():
    x = np.array([[1, 1, 0, 0]], np.float32)  # one head of dimension 4
    actual = jax.jit(lambda x, p: rotate(x, rotary_table(p, 4, 100.0)))(x, np.array(1))
    expected = [np.cos(1), np.cos(0.1), np.sin(1), np.sin(0.1)]
    np.testing.assert_allclose(actual[0], expected, rtol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    q, k = random(0, 1, D), random(1, 1, D)

    def product(i, j):
        turned = (rotate(x, rotary_table(n, D, 1e4)) for x, n in ((q, i), (k, j)))
        return (next(turned) * next(turned)).sum()

    near, far = jax.jit(product)(5, 3), jax.jit(product)(105, 103)
    np.testing.assert_allclose(near, far, rtol=1e-3)
    assert abs(near - jax.jit(product)(5, 4)) > 1e-2


# Frequencies 1, 1/10, 1/100 and 1/1000 turn 100 / 2 pi = 15.9, 1.59, 0.159 and 0.0159
# times in 100 tokens: kept, between, and two stretched fully. Between, (1.59 - 1) / 3 =
# 0.197 of the frequency is kept and 0.803 of it divided by 8.
def test_llama_stretches_slow_wavelengths():
    stretch = rotary_stretch(8, 1e4, 8.0, (1.0, 4.0), 100)
    kept = (10 / (2 * np.pi) - 1) / 3
    between = 1 / (kept + (1 - kept) / 8)
    np.testing.assert_allclose(stretch, [1, between, 8, 8], rtol=1e-6)


def test_a_stretched_table_is_that_of_shorter_distances():
    far = rotary_table(np.array(24), D, 1e4, np.full(3, 8))
    near = rotary_table(np.array(3), D, 1e4)
    np.testing.assert_allclose(far, near, rtol=1e-5)


def test_a_window_counts_the_query_itself():
    near = within_window(np.array([5, 6]), np.array([3, 4, 5, 6]), 2)
    np.testing.assert_array_equal(near, [[0, 1, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize("slides", [None, False, True])
def test_by_layer_picks_traced_or_not(slides):
    pair = ByLayer((np.zeros(2), np.ones(1)), (np.full(2, 3.0), np.full(1, 4.0)))
    expected = pair.sliding if slides else pair.full
    assert pair.select(slides) is expected
    if slides is not None:
        traced = jax.jit(pair.select)(np.array(slides))
        chex.assert_trees_all_equal(traced, expected)
