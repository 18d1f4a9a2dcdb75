import dataclasses
import math

import jax
import pytest

from grpo_jax import ModelConfig, init_policy
from grpo_jax.models.config import num_factors, num_parameters
from grpo_jax.models.policy import abstract_policy
from grpo_jax.parallel.sharding import AXES
from grpo_jax.planning.memory import Memory, MemoryInputs, estimate_memory, readable
from grpo_jax.planning.micro import choose_budget
from grpo_jax.planning.remedies import remedies
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.runs.config import MeshConfig

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


def test_a_reference_on_the_host_is_on_the_device_while_it_scores_alone():
    without, device = estimate(), estimate(reference=True)
    host = estimate(reference=True, reference_memory="host")
    size = 4 * num_parameters(SMALL)
    assert host.state == without.state == device.state - size
    assert host.host == size and device.host == without.host == 0
    phases = host.phases()
    assert phases.pop("scoring") > size and device.phases()["scoring"] == 0
    assert phases == {k: v for k, v in without.phases().items() if k != "scoring"}


# Keys and values: 4 prompts * (16 + 8 * 32) tokens * 3 layers * 2 heads * 6 * 4 bytes.
def test_the_cache_holds_each_prompt_once_per_group():
    assert estimate().cache == 2 * 4 * (16 + 8 * 32) * 3 * 2 * 6 * 4
    low = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    assert 2 * estimate(low).cache == estimate().cache
    assert estimate(low, widened=True).cache == estimate().cache


# The layers' kernels side by side, and the table transposed where it is tied.
def test_the_sampler_lays_its_weights_out_once_more():
    table = SMALL.vocab_size * SMALL.width
    all_but_last_norm = num_parameters(SMALL) - SMALL.width
    assert estimate().sampler_weights == 4 * all_but_last_norm
    untied = dataclasses.replace(SMALL, tie_embeddings=False)
    assert estimate(untied).sampler_weights == 4 * (all_but_last_norm - table)


# One micro-batch: its gradients; several: their sum too. AdamW holds five copies.
def test_gradients_and_what_the_optimizer_makes_of_them():
    trained = 4 * num_parameters(SMALL)
    assert estimate().gradients == trained
    assert estimate(micro=(2, 8)).gradients == 2 * trained
    assert estimate().optimizing == 5 * trained
    assert estimate(copies=2).update_copies == 2 * trained


# Kept per layer and token, full: the stream of 8 numbers. 4 * 8 * 32 completion tokens
# and 4 * 16 of prompts, 3 layers, 4 bytes.
def test_one_layer_is_held_beside_what_all_layers_keep():
    tokens = 4 * 8 * 32 + 4 * 16
    completion, prompt = 4 * 32 * 4 * 32 * 32, 4 * 32 * 4 * 32 * 16  # scores of 4 heads
    kept = 3 * tokens * 8 * 4
    mlp = completion + prompt + tokens * (6 * 12 + 7 * 8 + 6 * 24 + 2 * 12) * 4
    attention = 3.25 * completion + 2.25 * prompt + tokens * (6 * 8 + 4 * 24) * 4
    assert estimate().activations == kept + max(mlp, attention)


# 512 tokens a chunk, 9 tokens in the vocabulary; the table's transpose, gradient and
# one chunk's share of it; the layers' gradients do not exist yet.
def test_logits_are_of_one_chunk():
    tokens = 4 * 8 * 32 + 4 * 16
    kept, table = 3 * tokens * 8 * 4, 4 * 9 * 8
    expected = kept + 2 * 4 * 512 * 9 + 3 * table - 4 * num_parameters(SMALL)
    assert estimate().logits == expected


def test_smaller_parts_and_more_recomputation_need_less():
    assert estimate(micro=(1, 8)).activations < estimate().activations
    full, dots, none = (
        estimate(dataclasses.replace(SMALL, remat=remat)).activations
        for remat in ("full", "dots", "none")
    )
    assert full < dots < none


def test_evaluation_holds_a_prompt_for_every_completion():
    evaluated = estimate(evaluated=(32, 1))
    weights = evaluated.sampler_weights
    assert evaluated.evaluation - weights > 2 * 32 * (16 + 32) * 3 * 2 * 6 * 4
    assert estimate().evaluation == 0


# The gradient and the change under each of 5 weightings; along one of them, four of
# each array of a layer: 3 of the MLP's and 4 others, and the scores; beside that the
# unembedding, in full training with its gradient, or twice along the direction. In a
# measurement a gradient a part and two more, then half of them and a direction.
def test_the_instrument_holds_gradients_and_derivatives():
    trained, tokens = 4 * num_parameters(SMALL), 4 * 8 * 32 + 4 * 16
    scores = 4 * 8 * 4 * 4 * 32 * (32 + 16)
    layer = 4 * (tokens * (3 * 12 + 2 * 8 + 2 * 24) * 4 + scores)
    activations, table = estimate().activations, 4 * 9 * 8
    assert estimate(weightings=5).counterfactual == 10 * trained + max(
        2 * trained + activations, trained + 3 * table + layer
    )
    small, large = MicroBatch(1, 1), MicroBatch(4, 8)
    measuring = estimate(probe=(small, large), probe_bytes=7).look
    assert measuring == 2 * trained + 3 * table + layer
    for parts in (2, 4):
        beside = (
            (parts + 2) * trained + 2 * table + activations,
            (parts / 2 + 1) * trained + 3 * table + layer,
        )
        measured = (large, small)
        measuring = estimate(probe=measured, probe_bytes=7, probe_parts=parts).look
        assert measuring == 7 + max(beside)


# 9 x 32 logits of 512 tokens are more than a layer of 4 samples.
def test_derivatives_of_a_large_vocabulary_hold_a_chunks_logits():
    wordy = dataclasses.replace(SMALL, vocab_size=2**15, lora_rank=1)
    few = MicroBatch(1, 4)
    look = estimate(wordy, probe=(MicroBatch(1, 1), few)).look
    table, chunk = 4 * 2**15 * 8, 4 * 4 * 32 * 2**15
    assert look == 2 * 4 * num_factors(wordy) + table + 4 * chunk


def test_a_bfloat16_base_computed_in_float32_is_held_in_both():
    low = dataclasses.replace(SMALL, lora_rank=1, compute_dtype="bfloat16")
    shapes = dict(probe=(MicroBatch(1, 4), MicroBatch(4, 8)), evaluated=(32, 1))
    held = estimate(low, base_bytes=2, widened=True, weightings=5, **shapes)
    wide = estimate(low, base_bytes=4, widened=True, weightings=5, **shapes)
    for phase, size in held.phases().items():
        if phase == "scoring":  # no reference on the host goes with LoRA
            continue
        assert size == wide.phases()[phase] + 4 * num_parameters(SMALL)
    assert held.frozen == wide.frozen / 2


def test_devices_share_what_is_cut():
    data, fsdp, tensor = (MeshConfig(**{name: 2}) for name in AXES)
    assert estimate(mesh=fsdp).state == estimate().state // 2
    assert estimate(mesh=data).cache == estimate().cache // 2
    assert estimate(mesh=tensor).cache == estimate().cache // 2
    cut = estimate(micro=(4, 8, (2, 1)), mesh=data)
    assert cut.activations == estimate().activations // 2


def test_devices_share_samples_where_prompts_are_few():
    """2 prompts of 8 samples over 8 devices: each has one sample of both."""
    few = dict(SHAPE, prompts=2, group_size=8, micro_batch_tokens=10**6)
    memory = MemoryInputs(model=SMALL, mesh=MeshConfig(data=8), **few).estimate()
    one_sample = MemoryInputs(model=SMALL, **dict(few, group_size=1)).estimate()
    assert (
        memory.cache == one_sample.cache
        and memory.activations == one_sample.activations
    )


NONE = dict.fromkeys(Memory._fields, 0)


def test_phases_do_not_overlap():
    memory = Memory(**NONE | dict(parameters=5, cache=3, activations=7))
    assert memory.peak == 12 and memory.largest() == "update"
    memory = memory._replace(sampler_weights=6)
    assert memory.peak == 14 and memory.largest() == "sampling"
    memory = memory._replace(optimizing=8, gradients=2, logits=6)
    assert memory.phases()["update"] == 9


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(parameters=9, cache=3), "model.lora_rank"),
        (dict(parameters=1, optimizing=4), "model.lora_rank"),
        (dict(cache=3), "sampling.prompts"),
        (dict(activations=3), "micro_batch_tokens"),
        (dict(look=3), "instrument.every 0"),
        (dict(counterfactual=3), "instrument.counterfactual_every 0"),
        (dict(evaluation=3), "sampling.group_size"),
    ],
)
def test_advice_names_the_setting_of_the_largest_part(sizes, words):
    assert words in Memory(**NONE | sizes).advice()


def test_inputs_derive_the_micro_batch():
    inputs = MemoryInputs(model=SMALL, micro_batch_tokens=272, **SHAPE)
    expected = estimate(micro=(1, 8), evaluated=(32, 1))
    assert inputs.estimate() == expected
    halved = dataclasses.replace(inputs, parts=2, micro_batch_tokens=10**6)
    assert halved.updated == 2
    assert halved.estimate().gradients == 4 * num_parameters(SMALL)


# A group of 8 has 16 + 8 x 32 = 272 tokens, and all 4 of them 1,088.
def test_the_largest_micro_batch_that_fits_is_chosen():
    inputs = MemoryInputs(model=SMALL, micro_batch_tokens=1088, **SHAPE)

    def limit(tokens):
        memory = dataclasses.replace(inputs, micro_batch_tokens=tokens).estimate()
        return math.ceil((memory.state + memory.phases()["update"]) / 0.9)

    assert choose_budget(inputs, None) == (1088, "")
    assert choose_budget(inputs, limit(1088)) == (1088, "")
    for tokens in (544, 272, 144, 80, 48):
        assert choose_budget(inputs, limit(tokens)).tokens == tokens
    tight = math.ceil(0.9 * limit(48))  # all of the device for 1 x 1
    assert choose_budget(inputs, tight).tokens == 48
    assert choose_budget(inputs, tight - 9).tokens == 1088  # nothing fits


# 8 samples of 100 tokens and a prompt of 500: 1,300 tokens, but 500 + 4 x 100 and the
# prompt once more in two parts, 500 x 2 + 800; of a short prompt not worth it.
def test_a_whole_group_is_taken_where_its_repeated_prompts_cost_more():
    shape = dict(SHAPE, prompt_tokens=500, max_new_tokens=100)
    inputs = MemoryInputs(model=SMALL, micro_batch_tokens=1000, **shape)
    assert inputs.micro == MicroBatch(1, 4)
    assert choose_budget(inputs, 10**12).tokens == 1300
    assert choose_budget(inputs, None).tokens == 1000
    memory = inputs.estimate()
    tight = math.ceil((memory.state + memory.phases()["update"]) / 0.9)
    assert choose_budget(inputs, tight).tokens == 1000
    short = dataclasses.replace(inputs, prompt_tokens=210)
    assert short.micro == MicroBatch(1, 4)
    assert choose_budget(short, 10**12).tokens == 1000
    # More than twice the budget is too much.
    few = dataclasses.replace(inputs, micro_batch_tokens=640)
    assert choose_budget(few, 10**12).tokens == 640


def test_advice_is_what_train_would_take():
    """Not prompts for a part of the devices, or of the updates of a rollout."""
    sizes = SHAPE | {"prompts": 512}
    inputs = MemoryInputs(model=SMALL, micro_batch_tokens=48, **sizes)

    def advised(**changes):
        changed = dataclasses.replace(inputs, **changes)
        limit = dataclasses.replace(changed, prompts=64).estimate().peak
        advice = remedies(changed, limit)
        return [line for line in advice if line.startswith("sampling.prompts")]

    assert advised() == ["sampling.prompts 64"]
    assert advised(parts=128) == advised(mesh=MeshConfig(data=48)) == []


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
