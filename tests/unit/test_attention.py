import jax
import numpy as np
import pytest

from grpo_jax.models.attention import (
    causal_attention,
    rotary_table,
    rotate,
    shared_prefix_attention,
)

P, G, S, H, KV, D, L, U = 2, 3, 4, 4, 2, 6, 5, 4


def softmax_attention(q, k, v):
    """One query [d] over keys and values [N, d]."""
    scores = k @ q / len(q) ** 0.5
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ v


def random(seed, *shape):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def test_shared_prefix_attention_is_attention_over_concatenated_keys():
    q, own_mask = random(0, P, G, S, H, D), np.tril(np.ones((S, U), bool))
    prefix_k, prefix_v = random(1, P, L, KV, D), random(2, P, L, KV, D)
    own_k, own_v = random(3, P, G, U, KV, D), random(4, P, G, U, KV, D)
    prefix_mask = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], bool)
    actual = jax.jit(shared_prefix_attention)(
        q,
        prefix_k.transpose(0, 2, 3, 1),
        prefix_v.swapaxes(1, 2),
        prefix_mask,
        own_k.transpose(0, 1, 3, 4, 2),
        own_v.swapaxes(2, 3),
        own_mask,
    )
    for p, g, s, h in np.ndindex(P, G, S, H):
        shared = h // (H // KV)  # consecutive query heads share a key/value head
        live, seen = prefix_mask[p], own_mask[s]
        k = np.concatenate((prefix_k[p, live, shared], own_k[p, g, seen, shared]))
        v = np.concatenate((prefix_v[p, live, shared], own_v[p, g, seen, shared]))
        expected = softmax_attention(q[p, g, s, h], k, v)
        np.testing.assert_allclose(actual[p, g, s, h], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_an_empty_prefix_leaves_self_attention(scale):
    q = scale * random(0, P, S, H, D)
    k, v = random(1, P, S, KV, D), random(2, P, S, KV, D)
    actual = jax.jit(shared_prefix_attention)(
        q[:, None],
        np.zeros((P, KV, D, L), np.float32),
        np.full((P, KV, L, D), 7, np.float32),
        np.zeros((P, L), bool),
        k.transpose(0, 2, 3, 1)[:, None],
        v.swapaxes(1, 2)[:, None],
        np.tril(np.ones((S, S), bool)),
    )[:, 0]
    expected = jax.jit(causal_attention)(q, k, v, np.ones((P, S), np.int32))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_causal_attention_skips_padding():
    q, k, v = random(0, 1, L, H, D), random(1, 1, L, KV, D), random(2, 1, L, KV, D)
    mask = np.array([[0, 0, 1, 1, 1]], np.int32)
    actual = jax.jit(causal_attention)(q, k, v, mask)
    for s, h in np.ndindex(3, H):
        seen = slice(2, 3 + s)
        args = q[0, 2 + s, h], k[0, seen, h // 2], v[0, seen, h // 2]
        expected = softmax_attention(*args)
        np.testing.assert_allclose(actual[0, 2 + s, h], expected, rtol=1e-4, atol=1e-5)


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
