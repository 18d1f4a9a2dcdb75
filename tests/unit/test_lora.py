import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.models.policy import add_lora, combined_params, merge_lora

SHAPE = dict(
    vocab_size=13,
    width=16,
    mlp_width=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    qk_bias=True,
)


@pytest.fixture(scope="module")
def base():
    return gj.init_policy(gj.ModelConfig(**SHAPE), jax.random.key(0))


def adapted(base, *, seed=None, **settings):
    policy = add_lora(
        base, key=jax.random.key(1), **{"rank": 3, "alpha": 6.0} | settings
    )
    if seed is None:
        return policy
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return policy.replace(
        jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), policy.params)
    )


def logits(policy):
    ids = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 13
    return gj.next_token_logits(policy, ids)


def test_a_fresh_adapter_changes_nothing(base):
    np.testing.assert_array_equal(logits(adapted(base)), logits(base))


@pytest.mark.parametrize("targets", [("q", "v"), ("o", "down"), None])
def test_merged_is_the_same_policy(base, targets):
    settings = {} if targets is None else {"targets": targets}
    policy = adapted(base, seed=2, **settings)
    merged = merge_lora(policy)
    assert merged.frozen is None and merged.config == base.config
    chex.assert_trees_all_equal_shapes_and_dtypes(merged.params, base.params)
    assert np.abs(logits(merged) - logits(base)).max() > 0.1
    np.testing.assert_allclose(logits(merged), logits(policy), rtol=2e-4, atol=2e-4)


def test_one_kernel_by_hand(base):
    """W + alpha / rank A B, for the one layer map and the one layer."""
    policy = adapted(base, seed=3, targets=("k",))
    kernel = base.params["layers"]["k"]["kernel"][1]
    a, b = (policy.params["layers"]["k"][f"lora_{f}"][1] for f in "ab")
    merged = merge_lora(policy).params["layers"]["k"]["kernel"][1]
    np.testing.assert_allclose(merged, kernel + 6.0 / 3 * (a @ b), rtol=1e-5, atol=1e-5)


def test_the_base_is_shared_and_only_factors_are_trained(base):
    policy = adapted(base)
    ours, theirs = (jax.tree.leaves(x) for x in (policy.frozen, base.params))
    assert all(a is b for a, b in zip(ours, theirs, strict=True))
    names = {
        path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(policy.params)
    }
    assert names == {"lora_a", "lora_b"}


def test_sampling_is_its_teacher_forced_twin(base):
    policy = adapted(base, seed=4)
    ids = np.array([[2, 3, 4], [0, 5, 6]], np.int32)
    mask = np.array([[1, 1, 1], [0, 1, 1]], np.int32)
    rollouts = gj.sample(
        policy, ids, mask, group_size=3, max_new_tokens=6, key=jax.random.key(5),
        eos_id=1, pad_id=0,
    )  # fmt: skip
    again = gj.completion_logprobs(policy, rollouts)
    np.testing.assert_allclose(again, rollouts.behaviour_logprobs, atol=1e-4)


def test_merging_two_dicts_keeps_every_leaf():
    params = {"layers": {"q": {"lora_a": 1}}}
    frozen = {"layers": {"q": {"kernel": 2}, "k": {"kernel": 3}}, "norm": 4}
    assert combined_params(params, frozen) == {
        "layers": {"q": {"lora_a": 1, "kernel": 2}, "k": {"kernel": 3}},
        "norm": 4,
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "lora_rank must be at least 1"),
        ({"alpha": 0.0}, "lora_alpha must be positive"),
        ({"targets": ("q", "query")}, "lora_targets.*query"),
        ({"targets": ()}, "lora_targets"),
    ],
)
def test_bad_settings_are_refused(base, settings, said):
    with pytest.raises(ValueError, match=said):
        adapted(base, **settings)


def test_a_policy_is_adapted_once(base):
    with pytest.raises(ValueError, match="already"):
        add_lora(adapted(base), rank=2, alpha=1.0, key=jax.random.key(0))


def test_compute_dtype_goes_with_the_run(base):
    half = dataclasses.replace(base.config, compute_dtype="bfloat16")
    policy = adapted(base, seed=2).reconfigured(compute_dtype="bfloat16")
    assert policy.config.compute_dtype == half.compute_dtype
    assert logits(policy).dtype == jnp.float32
