import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.models import pretrained
from grpo_jax.models.families import FAMILIES, family_of
from grpo_jax.models.hf_config import config_json, model_config

SMALL = gj.ModelConfig(
    vocab_size=9, num_layers=2, width=8, mlp_width=12, num_heads=2, num_kv_heads=1,
    head_dim=4,
)  # fmt: skip
GEMMA = dataclasses.replace(
    SMALL, activation="gelu_tanh", norm_offset=True, post_norms=True, query_scale=4,
    scale_embedding=True, sliding_window=3, sliding_layers=(0,), logit_softcap=9.0,
)  # fmt: skip
EXAMPLES = {
    "llama": dataclasses.replace(
        SMALL, rope_scaling="llama3", rope_factor=4.0, tie_embeddings=False
    ),
    "qwen2": dataclasses.replace(
        SMALL, qk_bias=True, sliding_window=3, sliding_layers=(1,)
    ),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, head_dim=8),
    "gemma2": dataclasses.replace(GEMMA, attention_softcap=7.0),
    "gemma3_text": dataclasses.replace(
        GEMMA, qk_norm=True, rope_local_theta=99.0, rope_scaling="linear",
        rope_factor=2.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    return gj.init_policy(EXAMPLES["llama"], jax.random.key(0))


@pytest.fixture
def saved(policy, tmp_path):
    gj.save_pretrained(policy, tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def edit_weights(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_config_survives_its_json(kind):
    config = EXAMPLES[kind]
    assert family_of(config) == kind
    values = json.loads(json.dumps(config_json(config, dtype="float32", ids={})))
    assert model_config(values, "config.json") == config


def test_an_export_loads_again(policy, saved):
    again = gj.load_pretrained(saved)
    assert again.config == policy.config and again.graphdef == policy.graphdef
    chex.assert_trees_all_equal(again.params, policy.params, strict=True)
    assert sorted(p.name for p in saved.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


def test_shards_of_bfloat16_load_again(policy, tmp_path, monkeypatch):
    low = policy.replace(jax.tree.map(lambda x: x.astype("bfloat16"), policy.params))
    gj.save_pretrained(low, tmp_path, max_shard_bytes=600)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}" + (
        ".safetensors"
    )
    assert all(f.stat().st_size < 600 + 3000 for f in files)  # with its header
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_BLOCK_BYTES", 120)  # 7 of 9 rows, 5 of 8
        again = gj.load_pretrained(tmp_path)
    assert again.config.compute_dtype == "bfloat16"
    chex.assert_trees_all_equal(again.params, low.params, strict=True)
    wide = gj.load_pretrained(tmp_path, dtype="float32")
    assert wide.config.compute_dtype == "float32"
    expected = jax.tree.map(lambda x: x.astype("float32"), low.params)
    chex.assert_trees_all_equal(wide.params, expected, strict=True)
    # An export over it removes the old one.
    gj.save_pretrained(policy, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model.safetensors"]
    chex.assert_trees_all_equal(
        gj.load_pretrained(tmp_path).params, policy.params, strict=True
    )


@pytest.mark.parametrize("stored", [np.float16, None], ids=["float16", "mixed"])
def test_other_dtypes_on_disk_become_float32(saved, stored):
    def change(arrays):
        for name in arrays:
            if stored is not None or "norm" in name:
                arrays[name] = arrays[name].astype(stored or ml_dtypes.bfloat16)

    edit_weights(saved, change)
    policy = gj.load_pretrained(saved)
    assert policy.config.compute_dtype == "float32"
    chex.assert_type(jax.tree.leaves(policy.params), np.float32)


def test_parameters_get_the_shardings_asked_for(policy, saved):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.P())
    shardings = jax.tree.map(lambda _: spec, policy.params)
    again = gj.load_pretrained(saved, shardings=shardings)
    assert {x.sharding for x in jax.tree.leaves(again.params)} == {spec}
    chex.assert_trees_all_equal(again.params, policy.params, strict=True)


def test_an_unembedding_that_repeats_the_embedding_is_tied(policy, tmp_path):
    config = dataclasses.replace(policy.config, tie_embeddings=True)
    tied = gj.init_policy(config, jax.random.key(0))
    gj.save_pretrained(tied, tmp_path)

    def repeat(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    edit_weights(tmp_path, repeat)
    chex.assert_trees_all_equal(
        gj.load_pretrained(tmp_path).params, tied.params, strict=True
    )

    def differ(arrays):
        arrays["lm_head.weight"][3, 3] += 1

    edit_weights(tmp_path, differ)
    with pytest.raises(ConfigError, match="lm_head.*differs .* set it to false"):
        gj.load_pretrained(tmp_path)


def remove(arrays):
    del arrays["model.layers.1.mlp.up_proj.weight"]


def add(arrays):
    arrays["model.layers.2.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)


def reshape(arrays):
    name = "model.layers.0.self_attn.k_proj.weight"
    arrays[name] = np.zeros((8, 4), np.float32)


def retype(arrays):
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"layers.1.mlp.up_proj.weight \[12, 8\] is missing"),
        (add, r"layers.2.mlp.up_proj.weight \[3, 4\] in .*model.safetensors is no ten"),
        (reshape, r"layers.0.self_attn.k_proj.weight must be \[4, 8\] .* got \[8, 4\]"),
        (retype, r"model.norm.weight must be one of F32, BF16, F16, got I8 in .*model"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    edit_weights(saved, change)
    with pytest.raises(ConfigError, match=message):
        gj.load_pretrained(saved)


def test_a_file_cut_off_is_named(policy, tmp_path):
    gj.save_pretrained(policy, tmp_path, max_shard_bytes=1500)
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=f"{file.name} is damaged or cut off"):
        gj.load_pretrained(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{file.name} is damaged or cut off"):
        gj.load_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=f"{file.name} does not exist"):
        gj.load_pretrained(tmp_path)


def test_an_index_that_points_elsewhere_is_named(policy, tmp_path):
    gj.save_pretrained(policy, tmp_path, max_shard_bytes=1500)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    files = values["weight_map"]
    wrong = next(x for x in files.values() if x != files["model.norm.weight"])
    files["model.norm.weight"] = wrong
    index.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"places model.norm.weight in {wrong}, whi"):
        gj.load_pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(ConfigError, match="index.json has no weight_map"):
        gj.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(model_type="mixtral"),
            r"model_type 'mixtral' is not .* Qwen2ForCausalLM",
        ),
        (dict(model_type=None), "of model_type None is not supported"),
        (dict(model_type="gemma3"), "of Gemma 3, text-only checkpoints; supported"),
        (dict(architectures=["LlamaForTokenClassification"]), "ForToken.* is not supp"),
        (dict(hidden_act="relu"), "hidden_act='relu' is not supported, only 'silu'"),
        (dict(mlp_bias=True), "mlp_bias=True is not supported"),
        (dict(num_local_experts=8), "num_local_experts=8 is not supported"),
        (dict(quantization_config={"bits": 4}), "quantization_config=.* is not supp"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (dict(rope_scaling={"type": "yarn"}), "rope_type='yarn' is not"),
        (
            dict(rope_parameters="absent", rope_scaling={"type": "yarn"}),
            "rope_type='yarn' is not supported, only default, linear and llama3",
        ),
        (
            dict(rope_parameters="absent", rope_scaling={"type": "linear"}),
            "rope_type='linear' needs a number as factor",
        ),
        (dict(hidden_size="absent"), "hidden_size must be a whole number, got None"),
        (dict(hidden_size="8"), "hidden_size must be a whole number, got '8'"),
        (dict(num_key_value_heads=3), "config.json: num_kv_heads must divide"),
    ],
)
def test_a_config_that_is_not_supported_says_what(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ConfigError, match=message):
        gj.load_pretrained(saved)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2", dict(layer_types=["full_attention"]), "must have 2 entries"),
        (
            "qwen2",
            dict(layer_types=["chunked_attention"] * 2),
            "'chunked_attention' is",
        ),
        ("qwen2", dict(use_sliding_window=False), "sliding_window=None with sliding"),
        ("gemma2", dict(hidden_activation="gelu"), "hidden_activation='gelu' is not"),
        ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attent"),
        ("gemma3_text", dict(attn_logit_softcapping=5.0), "attn_logit_softcapping=5.0"),
        (
            "gemma3_text",
            dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
            "rope_parameters=.* must be one per layer type",
        ),
        (
            "gemma3_text",
            dict(rope_parameters={"sliding_attention": {"rope_type": "linear"}}),
            "rope_parameters.sliding_attention.rope_type='linear' is not supported",
        ),
        (
            "llama",
            dict(rope_parameters={"full_attention": {}, "sliding_attention": {"a": 1}}),
            "config.json",
        ),
    ],
)
def test_a_feature_that_is_not_supported_is_named(kind, changes, message):
    values = config_json(EXAMPLES[kind], dtype="float32", ids={}) | changes
    if kind == "llama":
        values["rope_parameters"]["full_attention"] = {"rope_type": "yarn"}
    with pytest.raises(ConfigError, match=message):
        model_config(values, "config.json")


# As the Hub has them: the older spelling, with layers that slide by default.
def test_defaults_of_older_configs():
    gemma3 = dict(
        architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", vocab_size=9,
        hidden_size=8, intermediate_size=12, num_hidden_layers=7, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=3,
        query_pre_attn_scalar=4, rope_theta=1e6, rope_local_base_freq=1e4,
        sliding_window_pattern=6, rope_scaling={"rope_type": "linear", "factor": 8.0},
        torch_dtype="bfloat16",
    )  # fmt: skip
    config = model_config(gemma3, "config.json")
    assert config.sliding_layers == (0, 1, 2, 3, 4, 6)
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert (config.rope_scaling, config.rope_factor) == ("linear", 8.0)
    assert config.tie_embeddings and config.logit_softcap is None
    gemma2 = gemma3 | dict(architectures=["Gemma2ForCausalLM"], model_type="gemma2")
    config = model_config(gemma2, "config.json")
    assert config.sliding_layers == (0, 2, 4, 6) and config.logit_softcap == 30.0
    qwen = gemma3 | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    assert model_config(qwen, "config.json").sliding_layers == ()
    qwen |= dict(use_sliding_window=True, max_window_layers=5)
    assert model_config(qwen, "config.json").sliding_layers == (5, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(qk_bias=True, qk_norm=True),
            r"qwen2 needs qk_norm=False \(has True\); qwen3 needs output_bias=qk_bias",
        ),
        (dict(activation="gelu_tanh"), "llama needs activation='silu'"),
        (dict(rope_local_theta=9.0), "llama needs no rope_local_theta"),
    ],
)
def test_a_model_of_no_family_says_what_fits(changes, message, tmp_path):
    config = dataclasses.replace(SMALL, **changes)
    policy = gj.init_policy(config, jax.random.key(0))
    with pytest.raises(ConfigError, match=message):
        gj.save_pretrained(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_of_another_dtype_are_refused(policy, tmp_path):
    mixed = policy.params | {"unembedding": policy.params["unembedding"].astype("f2")}
    with pytest.raises(ConfigError, match="all float32 or all bfloat16, got float16, "):
        gj.save_pretrained(policy.replace(mixed), tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got"):
        gj.load_pretrained(tmp_path, dtype="float16")


def test_a_failed_export_leaves_the_old_one(policy, saved):
    class Broken:
        eos_token_id = 1

        def save_pretrained(self, folder):
            (Path(folder) / "config.json").write_text("half")
            raise OSError("disk full")

    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        gj.save_pretrained(policy, saved, tokenizer=Broken())
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_directories_without_a_model_are_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a directory; give one"):
        gj.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="config.json does not exist"):
        gj.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        gj.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="config.json must hold a mapping, got list"):
        gj.load_pretrained(tmp_path)
    values = config_json(SMALL, dtype="float32", ids={})
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="no model.safetensors .* convert its .bin"):
        gj.load_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="it has no tokenizer.json") as error:
        gj.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_name_of_the_hub_is_one_line_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot be had from the Hugging Face") as e:
        gj.load_pretrained("no-one/nothing-7b")
    assert "\n" not in str(e.value) and str(e.value).startswith("no-one/nothing-7b is")


def test_eos_ids_of_either_file(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert gj.eos_ids(tmp_path) == (7,)
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [5, 6, 5]}')
    assert gj.eos_ids(tmp_path) == (5, 6)
    generation.write_text("{}")
    assert gj.eos_ids(tmp_path) == (7,)
    (tmp_path / "config.json").write_text("{}")
    assert gj.eos_ids(tmp_path) == ()
    generation.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"eos_token_id must be .* got \['</s>'\]"):
        gj.eos_ids(tmp_path)


def test_a_tokenizer_travels_with_its_template_and_ids(policy, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "a", "b"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        eos_token="<eos>", pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )  # fmt: skip
    gj.save_pretrained(policy, tmp_path, tokenizer=tokenizer)
    again = gj.load_tokenizer(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["eos_token_id"], values["pad_token_id"]) == (1, 0)
    assert gj.eos_ids(tmp_path) == (1,)
    gj.save_pretrained(policy, tmp_path, tokenizer=tokenizer, eos_ids=[1, 3])
    assert gj.eos_ids(tmp_path) == (1, 3)


def test_every_family_has_an_example():
    assert EXAMPLES.keys() == FAMILIES.keys()


_MEASURED = """
import sys, jax, grpo_jax as gj

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))

gj.load_pretrained(sys.argv[1])  # the compiler's memory is not the checkpoint's
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = status("VmRSS")
policy = gj.load_pretrained(sys.argv[1])
parameters = sum(x.nbytes for x in jax.tree.leaves(policy.params))
print(status("VmHWM") - before - parameters)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux only")
def test_reading_needs_memory_for_one_file_beside_the_parameters(tmp_path):
    config = dataclasses.replace(
        SMALL, vocab_size=32_768, num_layers=14, width=512, mlp_width=2048, num_heads=8
    )
    policy = gj.init_policy(config, jax.random.key(0))
    gj.save_pretrained(policy, tmp_path, max_shard_bytes=85_000_000)
    shards = [f.stat().st_size for f in tmp_path.glob("*.safetensors")]
    assert len(shards) == 3 and sum(shards) > 200e6
    command = [sys.executable, "-c", _MEASURED, str(tmp_path)]
    excess = int(subprocess.check_output(command, text=True))
    assert excess < 1.5 * max(shards)
