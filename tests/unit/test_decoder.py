import dataclasses

import chex
import jax
import numpy as np
import pytest

from grpo_jax import ModelConfig, init_policy, next_token_logits
from grpo_jax.models.forward import split_prompts

SMALL = ModelConfig(
    vocab_size=9, num_layers=2, width=8, mlp_width=12, num_heads=2, num_kv_heads=1,
    head_dim=4, qk_bias=True, qk_norm=True, tie_embeddings=False,
    remat="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    return init_policy(SMALL, jax.random.key(0))


def logits(policy, rows, mask=None):
    mask = None if mask is None else np.array(mask, np.int32)
    result = jax.jit(next_token_logits)(policy, np.int32(rows), mask)
    chex.assert_shape(result, (*np.shape(rows), SMALL.vocab_size))
    chex.assert_type(result, np.float32)
    chex.assert_tree_all_finite(result)
    return np.asarray(result)


def test_logits_do_not_see_the_future(policy):
    a, b = logits(policy, [[1, 2, 3, 4]]), logits(policy, [[1, 2, 8, 8]])
    np.testing.assert_allclose(a[:, :2], b[:, :2], rtol=1e-5, atol=1e-6)
    assert np.abs(a[:, 2:] - b[:, 2:]).max() > 1e-2


def test_logits_depend_on_the_order_of_the_past(policy):
    a, b = logits(policy, [[1, 2, 3, 4]]), logits(policy, [[2, 1, 3, 4]])
    assert np.abs(a[:, -1] - b[:, -1]).max() > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(policy, side):
    row, padding = [1, 2, 3], [7, 7]
    expected = logits(policy, [row])
    if side == "left":
        actual = logits(policy, [padding + row], [[0, 0, 1, 1, 1]])[:, 2:]
    else:
        actual = logits(policy, [row + padding], [[1, 1, 1, 0, 0]])[:, :3]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# Both layers see 3 tokens, so the last logits see 1 + 2 * (3 - 1) = 5, counted in
# tokens even where padding lies between them.
def test_a_window_counts_tokens_not_places():
    config = dataclasses.replace(SMALL, sliding_window=3, sliding_layers=(0, 1))
    policy = init_policy(config, jax.random.key(0))
    row = [1, 2, 3, 4, 5, 6, 7]
    expected = logits(policy, [row])[0, -1]
    inside, outside = [1, 2, 8, *row[3:]], [8, 8, *row[2:]]
    np.testing.assert_allclose(logits(policy, [outside])[0, -1], expected, atol=1e-5)
    assert np.abs(logits(policy, [inside])[0, -1] - expected).max() > 1e-4
    gaps = [0, *row[:3], 0, 0, *row[3:5], 0, *row[5:], 0]
    mask = [0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0]
    actual = logits(policy, [gaps], [mask])[0, -2]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_split_prompts_finds_the_last_token_wherever_the_padding_is():
    prompts = np.int32([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0], [0, 0, 0, 0, 8]])
    mask = np.int32([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    split = jax.jit(split_prompts)(prompts, mask)
    np.testing.assert_array_equal(split.last_token, [7, 7, 8])
    np.testing.assert_array_equal(split.length, [2, 2, 0])
    expected = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(split.prefix_mask, expected)
    np.testing.assert_array_equal(split.tokens[:2, 3:], [[5, 6], [5, 6]])
    np.testing.assert_array_equal(split.positions[:2, 3:], [[0, 1], [0, 1]])


def test_parameters_stay_float32_under_a_bfloat16_compute_dtype():
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    policy = init_policy(config, jax.random.key(0))
    chex.assert_type(jax.tree.leaves(policy.params), np.float32)
    assert logits(policy, [[1, 2, 3]]).dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(width=-8), "width must be at least 1, got -8"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads must divide num_heads=4"),
        (dict(head_dim=5), "head_dim must be even, got 5"),
        (
            dict(compute_dtype="float16"),
            "compute_dtype must be one of float32, bfloat16, got",
        ),
        (dict(remat="some"), "remat must be one of none, dots, full, got 'some'"),
        (dict(rope_theta=0.0), "rope_theta must be positive, got 0.0"),
        (dict(norm_eps=-1.0), "norm_eps must be positive, got -1.0"),
        (dict(rope_local_theta=0.0), "rope_local_theta must be positive, got 0.0"),
        (dict(logit_softcap=0.0), "logit_softcap must be positive, got 0.0"),
        (dict(query_scale=0), "query_scale must be positive, got 0"),
        (dict(sliding_window=0), "sliding_window must be at least 1, got 0"),
        (dict(sliding_layers=(1,)), "sliding_window must be given where layers slide"),
        (
            dict(sliding_window=4, sliding_layers=(0, 2)),
            r"sliding_layers must be different layers of 0 to 1, got \(0, 2\)",
        ),
        (dict(sliding_window=4, sliding_layers=(1, 1)), "must be different layers"),
        (dict(rope_scaling="yarn"), "rope_scaling must be one of none, linear, llama3"),
        (
            dict(rope_fast_turns=1.0),
            "rope_fast_turns must be more than rope_slow_turns",
        ),
        (dict(activation="relu"), "activation must be one of silu, gelu_tanh, got"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
