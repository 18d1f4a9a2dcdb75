import dataclasses

import jax
import pytest

from grpo_jax import ModelConfig, init_policy
from grpo_jax.models.decoder import abstract_policy
from grpo_jax.training.budget import (
    Memory,
    estimate_memory,
    num_factors,
    num_parameters,
    readable,
)
from grpo_jax.training.step import MicroBatch

SMALL = ModelConfig(
    vocab_size=9, num_layers=3, width=8, mlp_width=12, num_heads=4, num_kv_heads=2,
    head_dim=6,
)  # fmt: skip
SHAPE = dict(prompts=4, group_size=8, prompt_tokens=16, max_new_tokens=32)


def estimate(config=SMALL, micro=(4, 8), reference=False, **changes):
    return estimate_memory(
        config, micro=MicroBatch(*micro), reference=reference, **SHAPE | changes
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(qk_bias=True),
        dict(qk_norm=True),
        dict(tie_embeddings=False),
        dict(qk_bias=True, output_bias=True),
        dict(post_norms=True, norm_offset=True, qk_norm=True),
    ],
)
def test_num_parameters_is_what_init_makes(changes):
    config = dataclasses.replace(SMALL, **changes)
    abstract = jax.eval_shape(lambda k: init_policy(config, k), jax.random.key(0))
    actual = sum(x.size for x in jax.tree.leaves(abstract.params))
    assert num_parameters(config) == actual


def test_state_is_parameters_two_moments_and_perhaps_a_reference():
    assert estimate().state == 3 * 4 * num_parameters(SMALL)
    assert estimate(reference=True).state == 4 * 4 * num_parameters(SMALL)


# Keys and values: 4 prompts * (16 + 8 * 32) tokens * 3 layers * 2 heads * 6 * 4 bytes.
def test_the_cache_holds_each_prompt_once_per_group():
    layers = num_parameters(SMALL) - SMALL.vocab_size * SMALL.width
    cache = 2 * 4 * (16 + 8 * 32) * 3 * 2 * 6 * 4
    assert estimate().cache == cache + 4 * layers
    low = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    assert 2 * estimate(low).cache == estimate().cache


def test_smaller_parts_and_more_recomputation_need_less():
    assert estimate(micro=(1, 8)).update < estimate(micro=(4, 8)).update
    full, dots, none = (
        estimate(dataclasses.replace(SMALL, remat=remat)).update
        for remat in ("full", "dots", "none")
    )
    assert full < dots < none


def test_sampling_and_the_update_do_not_overlap():
    assert Memory(state=5, cache=3, update=7).peak == 12
    assert Memory(state=5, cache=8, update=7).peak == 13


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0B"), (999, "999B"), (1000, "1.00kB"), (12_345, "12.3kB"),
     (1_234_567, "1.23MB"), (140e9, "140GB"), (2.5e12, "2.50TB")],
)  # fmt: skip
def test_readable(count, expected):
    assert readable(count, "B") == expected


def test_lora_trains_little_and_keeps_the_base_as_stored():
    c = ModelConfig(vocab_size=1000, lora_rank=4, lora_targets=("q", "down"))
    policy = abstract_policy(c)
    factors = sum(x.size for x in jax.tree.leaves(policy.params))
    assert num_factors(c) == factors
    assert num_parameters(c) == sum(x.size for x in jax.tree.leaves(policy.frozen))
    shape = dict(
        prompts=2, group_size=2, prompt_tokens=8, max_new_tokens=8, reference=True,
        micro=MicroBatch(1, 1), base_bytes=2,
    )  # fmt: skip
    memory = estimate_memory(c, **shape)
    assert memory.state == 2 * num_parameters(c) + 4 * 4 * factors
