"""Each stage of a run's plan by itself."""

import dataclasses
import json

import jax
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.parallel.platform import compiling_for
from grpo_jax.planning import plan as stages
from grpo_jax.planning.devices import check_attention
from grpo_jax.planning.evaluated import evaluated_prompts
from grpo_jax.planning.headline import attention_text, headline
from grpo_jax.planning.learning_rate import learning_rate
from grpo_jax.planning.plan import (
    ModelStage,
    make_plan,
    memory_stage,
    model_stage,
    probe_stage,
    task_stage,
)
from grpo_jax.planning.shapes import Lengths, lengths_stage, shapes_stage
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.rollouts.micro_batches import TOKENS
from grpo_jax.runs.config import (
    InstrumentConfig,
    MeshConfig,
    ObjectiveConfig,
    SamplingConfig,
    TrainConfig,
    WarmStartConfig,
    WeightsConfig,
)

GRPO = gj.OBJECTIVES["grpo"]
LENGTHS = Lengths(
    prompts=[[1] * 5, [1] * 7],
    prompt_length=10,
    answer_tokens=8,
    max_new_tokens=8,
    warnings=[],
)


@pytest.fixture(scope="module")
def task():
    """40 trained prompts; answers and EOS have 8 tokens."""
    return gj.load_task("chains", train_prompts=40, heldout_prompts=16)


def config(prompts=4, group_size=4, **more):
    sampling = SamplingConfig(
        prompts=prompts, group_size=group_size, **more.pop("sampling", {})
    )
    return TrainConfig(sampling=sampling, **more)


def objective(name="grpo", **changes):
    return dataclasses.replace(gj.OBJECTIVES[name], **changes)


# ---- task


@pytest.mark.parametrize(
    ("changes", "row", "words"),
    [
        (dict(prompts=41), {}, "sampling.prompts must be at most 40, the task's"),
        (
            dict(prompts=21),
            dict(refills=1),
            "objective.refills needs at least 42 trained prompts, .* got 40",
        ),
        (
            dict(warm_start=WarmStartConfig(enabled=False, max_steps=3)),
            {},
            "warm_start.max_steps changes nothing: this run has no warm start",
        ),
    ],
)
def test_task_stage_refuses(task, changes, row, words):
    with pytest.raises(ConfigError, match=words):
        task_stage(config(**changes), objective(**row), task, None)


def test_task_stage_needs_prompts_of_both_parts(task):
    for part, counts in (("train", "0 and 16"), ("heldout", "40 and 0")):
        empty = dataclasses.replace(task, **{part: []})
        with pytest.raises(ConfigError, match=f"held-out prompts, got {counts}"):
            task_stage(config(), GRPO, empty, None)


def test_task_stage_leaves_out_long_prompts(task):
    stage = task_stage(config(), GRPO, task, None)
    assert stage.task is task and stage.warm_starts and stage.warnings == []
    limited = config(sampling=dict(max_prompt_tokens=6))
    stage = task_stage(limited, GRPO, task, None)
    assert max(map(len, encode_prompts(stage.task, stage.task.train))) <= 6
    (warning,) = stage.warnings
    left_out = 40 - len(stage.task.train)
    assert warning.startswith(f"{left_out} trained and ") and "=6 tokens" in warning


def test_a_pretrained_model_has_no_warm_start(task, tmp_path):
    assert not task_stage(config(), GRPO, task, tmp_path).warm_starts


# ---- lengths


def test_lengths_are_of_the_longest_answer(task):
    lengths = lengths_stage(config(), GRPO, task, warm_starts=True)
    assert len(lengths.prompts) == 40 and lengths.prompt_length == 10
    assert lengths.max_new_tokens == lengths.answer_tokens == 8
    assert lengths.warnings == []
    longer = config(sampling=dict(max_new_tokens=20))
    lengths = lengths_stage(longer, GRPO, task, warm_starts=False)
    assert (lengths.max_new_tokens, lengths.answer_tokens) == (20, 8)


def test_lengths_stage_refuses_to_cut_right_answers(task):
    short = config(sampling=dict(max_new_tokens=7))
    words = "sampling.max_new_tokens must be at least 8 for task chains, .* got 7"
    with pytest.raises(ConfigError, match=words):
        lengths_stage(short, GRPO, task, warm_starts=False)


# The last 20 % are punished: 8 tokens and 8 * .2 / .8 = 2 more.
def test_punished_length_is_beyond_the_longest_answer(task):
    punishing = objective(overlong="punish", overlong_share=0.2)
    lengths = lengths_stage(config(), punishing, task, warm_starts=False)
    assert lengths.max_new_tokens == 10 and lengths.warnings == []
    exact = config(sampling=dict(max_new_tokens=8))
    (warning,) = lengths_stage(exact, punishing, task, warm_starts=False).warnings
    assert "8 of 8 tokens and will be punished" in warning
    assert "raise sampling.max_new_tokens to 10" in warning


# ---- model


def test_a_new_model_has_the_vocabulary_of_the_tokenizer(task):
    model, base_bytes, _ = model_stage(config(), task, None)
    assert model.vocab_size == len(task.tokenizer) and base_bytes == 4


def test_the_mesh_is_checked_where_the_run_is_here(task):
    wide = config(mesh=MeshConfig(fsdp=2))
    if len(jax.devices()) < 2:
        with pytest.raises(ConfigError, match="needs 2 devices"):
            model_stage(wide, task, None)
    model_stage(wide, task, None, local_devices=False)


@pytest.fixture(scope="module")
def directory(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = gj.ModelConfig(vocab_size=len(task.tokenizer), max_positions=16)
    policy = gj.init_policy(shape, jax.random.key(0))
    gj.save_pretrained(policy, folder, tokenizer=task.tokenizer)
    return folder


def test_a_pretrained_model_is_its_own_shape(task, directory):
    pretrained = config(pretrained=str(directory))
    model, base_bytes, stored = model_stage(pretrained, task, directory)
    assert model.max_positions == 16 and base_bytes == 4 and stored == "float32"
    file = directory / "config.json"
    text = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(text) | {"dtype": "bfloat16"}))
        stages = [
            model_stage(
                config(pretrained=str(directory), model={"compute_dtype": dtype}),
                task,
                directory,
                with_weights=False,
                local_devices=here,
            )
            for dtype in ("bfloat16", "float32", None)
            for here in (True, False)
        ]
    finally:
        file.write_text(text)
    # In bfloat16 on accelerators only, unless another dtype is asked for.
    dtypes = [stage.config.compute_dtype for stage in stages]
    assert dtypes == ["bfloat16"] * 2 + ["float32"] * 3 + ["bfloat16"]
    assert {stage.stored for stage in stages} == {"bfloat16"}
    # A base that is computed with in float32 is kept so.
    assert [stage.base_bytes for stage in stages] == [2, 2, 4, 4, 4, 2]


def test_the_model_directory_is_resolved_once(directory, monkeypatch):
    """A Hub name would be looked up at every resolution."""
    names = []

    def resolved(name):
        names.append(name)
        return directory

    monkeypatch.setattr(stages, "local_directory", resolved)
    made = make_plan(config(pretrained="org/name"))
    assert names == ["org/name"] and made.model.max_positions == 16
    assert "the default for a pretrained model trained in full" in made.headline


# ---- shapes


def test_shapes_of_plain_prompts(task):
    shapes = shapes_stage(config(), GRPO, task, LENGTHS)
    assert shapes.refine == [] and shapes.train_prompt_length == 10
    assert shapes.buckets == [8]


def test_drafts_lengthen_the_prompts_of_the_update(task):
    drafts = objective("igrpo")
    shapes = shapes_stage(config(), drafts, task, LENGTHS)
    # "{prompt}{draft}\n{prompt}" of 7 + 8 + 1 + 7 tokens, padded to 32.
    assert shapes.train_prompt_length == 32 and "draft" in shapes.refine
    unused = config(sampling=dict(refine_template="{prompt}{draft}"))
    with pytest.raises(ConfigError, match="refine_template changes nothing: grpo has"):
        shapes_stage(unused, GRPO, task, LENGTHS)


def test_a_history_has_one_completion_length(task):
    long = LENGTHS._replace(max_new_tokens=256)
    assert shapes_stage(config(), GRPO, task, long).buckets == [64, 128, 256]
    history = objective("rt_pg", history=2)
    shapes = shapes_stage(config(), history, task, long)
    assert shapes.buckets == [256]


# ---- probe


def test_probe_stage_switches_a_default_instrument_off():
    model = gj.ModelConfig(vocab_size=20)
    stage = probe_stage(config(2, 2), model, 40, LENGTHS, slow=False)
    assert stage.probe is None
    assert stage.warnings[0].startswith("the instrument is off: ")
    wanted = config(2, 2, instrument=InstrumentConfig(every=41))
    with pytest.raises(ConfigError, match="instrument.max_overhead"):
        probe_stage(wanted, model, 40, LENGTHS, slow=False)


def test_probe_stage_warns_of_a_large_share():
    model = gj.ModelConfig(vocab_size=20)
    stage = probe_stage(config(16, 16), model, 40, LENGTHS, slow=False)
    assert stage.probe is not None and stage.warnings == []
    wanted = config(16, 16, instrument=InstrumentConfig(prompts=32))
    (warning,) = probe_stage(wanted, model, 40, LENGTHS, slow=False).warnings
    assert "more than instrument.max_overhead; lower instrument.prompts" in warning
    off = config(instrument=InstrumentConfig(every=0))
    assert probe_stage(off, model, 40, LENGTHS, slow=False) == (None, [])


# ---- memory


def memory(task, wanted=None, row=GRPO, model=None, **options):
    wanted = wanted or config()
    stage = ModelStage(model or gj.ModelConfig(vocab_size=20), 4)
    shapes = shapes_stage(wanted, row, task, LENGTHS)
    asked = evaluated_prompts(wanted, task, LENGTHS).sampled(task)
    return memory_stage(wanted, row, stage, LENGTHS, shapes, None, asked, **options)


def test_memory_stage_reads_objective_and_config(task):
    stage = memory(task)
    assert stage.inputs.reference and not stage.inputs.copies
    assert stage.peak == stage.inputs.estimate().peak and stage.warnings == []
    two = config(updates_per_rollout=2)
    inputs = memory(task, two, objective("tic_grpo")).inputs
    assert inputs.parts == 2 and not inputs.reference and not inputs.probe_prompts
    assert memory(task, two, objective(ratio="none", surrogate="logp")).inputs.copies
    host = config(reference_memory="host")
    assert memory(task, host).inputs.reference_memory == "host"
    with pytest.raises(ConfigError, match="nothing with kl_coef 0"):
        memory(task, host, objective("reinforce"))
    with pytest.raises(ConfigError, match="nothing with LoRA"):
        memory(task, host, model=gj.ModelConfig(vocab_size=20, lora_rank=2))
    counterfactual = config(instrument=InstrumentConfig(counterfactual_every=3))
    assert memory(task, counterfactual).inputs.weightings == 5


def test_micro_batches_are_as_given_or_as_fit(task):
    # Of one small layer, so that activations decide.
    model = gj.ModelConfig(vocab_size=20, num_layers=1, width=8, mlp_width=8)
    stage = memory(task, model=model)
    assert stage.inputs.micro_batch_tokens == TOKENS
    assert stage.micro_batch == "micro-batch 4 x 4"
    given = config(micro_batch_tokens=10 + 2 * 8)
    assert memory(task, given, model=model).micro_batch == "micro-batch 1 x 2"
    group = dataclasses.replace(stage.inputs, micro_batch_tokens=10 + 4 * 8).estimate()
    limit = round((group.state + group.phases()["update"]) / 0.9) + 1
    lowered = memory(task, model=model, device_bytes=limit)
    words = "micro-batch 1 x 4 (lowered from 4 x 4 for the device's memory)"
    assert lowered.micro_batch == words
    assert lowered.inputs.micro_batch_tokens == 10 + 4 * 8
    whole = config(micro_batch_tokens=TOKENS)  # is respected, with a warning
    kept = memory(task, whole, model=model, device_bytes=limit)
    assert kept.micro_batch == "micro-batch 4 x 4"
    assert kept.warnings[0].startswith("about ")


# 4 prompts x 4 samples, one prompt at a time on each device.
@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (2, "2 x 4, gradients added up over devices after each of 2 in an update"),
        (4, "4 x 4, gradients added up over devices once an update"),
    ],
)
def test_how_often_gradients_are_added_up_over_devices(task, devices, expected):
    mesh = MeshConfig(fsdp=devices)
    stage = memory(task, config(mesh=mesh, micro_batch_tokens=10 + 4 * 8))
    assert stage.micro_batch == f"micro-batch {expected}"


def test_memory_stage_warns(task, monkeypatch):
    model = gj.ModelConfig(vocab_size=20, max_positions=17)
    (warning,) = memory(task, config(pretrained="x"), model=model).warnings
    assert "up to 18 tokens, and the model was made for 17" in warning
    assert memory(task, model=model).warnings == []
    monkeypatch.setattr(stages, "device_memory", lambda: 1000)
    (warning,) = memory(task).warnings
    assert warning.startswith("about ") and "the device has 1.00kB: " in warning
    assert memory(task, local_devices=False).warnings == []


# ---- headline, and all stages


def test_headline_names_what_differs(task):
    def text(wanted, row=GRPO, probe=None, stored="float32"):
        shapes = shapes_stage(wanted, row, task, LENGTHS)
        model = gj.ModelConfig(vocab_size=20, lora_rank=4)
        rate = learning_rate(wanted, lora=False)
        return headline(
            wanted, row, task, model, LENGTHS, shapes,
            stored=stored, rate=rate, probe=probe, micro_batch="micro-batch 4 x 4",
            peak=5000,
            evaluated=evaluated_prompts(wanted, task, LENGTHS),
        )  # fmt: skip

    plain = text(config())
    assert plain.startswith("grpo on chains: ")
    assert " | about 5.00kB on the device\nevaluation: 40 trained and 16 " in plain
    assert "4 prompts x 4 samples, 10 + 8 tokens, micro-batch 4 x 4" in plain
    assert " | ends at <eos> (1) | " in plain
    assert " | learning rate 0.0003, the default for a new model | " in plain
    assert "of LoRA trained, float32, the default for a new model | " in plain
    given = config(model=gj.ModelConfig(compute_dtype="float32"))
    assert " trained, float32, as given | " in text(given)
    again = dataclasses.replace(given, resume=True, run_dir="run")
    assert " trained, float32, as the run began | " in text(again)
    pretrained = config(pretrained="x")
    assert " trained, float32, as the model is stored | " in text(pretrained)
    half = text(pretrained, stored="bfloat16")
    assert " float32, the default on CPUs for a model stored in bfloat16 | " in half
    assert "mesh" not in plain
    meshed = config(mesh=MeshConfig(data=2), weights=WeightsConfig(name="unit"))
    assert "mesh data 2 x fsdp 1 x tensor 1" in text(meshed)
    assert " | w = 1 | " in text(meshed)
    probe = probe_stage(
        config(16, 16), gj.ModelConfig(vocab_size=20), 40, LENGTHS, slow=False
    )
    assert "\ninstrument: " in text(config(), probe=probe.probe)


def test_warnings_are_in_the_order_of_the_stages(task):
    wanted = config(
        sampling=dict(max_prompt_tokens=6, max_new_tokens=8),
        objective=ObjectiveConfig(overlong="punish", overlong_share=0.2),
    )
    warnings = make_plan(wanted, task).warnings
    starts = ("left out", "will be punished", "the instrument is off")
    assert len(warnings) == 3
    assert all(start in text for start, text in zip(starts, warnings, strict=True))


def test_a_kernel_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match="flash is a kernel for TPUs and GPUs"):
        check_attention(gj.ModelConfig(attention="flash", head_dim=64))
    with compiling_for("tpu"):
        check_attention(gj.ModelConfig(attention="flash", head_dim=64))
        with pytest.raises(ConfigError, match="head_dim of 64, 128, 256, .* has 16"):
            check_attention(gj.ModelConfig(attention="flash", head_dim=16))


def test_the_headline_says_how_long_sequences_are_attended():
    assert attention_text(gj.ModelConfig(), 64, 256) == []
    assert attention_text(gj.ModelConfig(), 64, 257) == ["attention block by block"]
    with compiling_for("gpu"):
        text = attention_text(gj.ModelConfig(head_dim=64), 300, 8)
        assert text == ["attention by a kernel"]
