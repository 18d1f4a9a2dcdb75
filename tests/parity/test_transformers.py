"""Our decoder and checkpoints against Hugging Face's own models on tiny random weights.

Every model goes through a directory that transformers wrote, so reading is tested too.
"""

import json

import chex
import jax
import numpy as np
import pytest

import grpo_jax as gj

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

V, L, NEW = 61, 17, 12
SHAPE = dict(
    vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5,
    max_position_embeddings=128, attention_dropout=0.0,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
QWEN = dict(rope_parameters=PLAIN_ROPE)
SLIDING = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
GEMMA2 = dict(
    rope_parameters=PLAIN_ROPE, sliding_window=5, query_pre_attn_scalar=9,
    final_logit_softcapping=3.0, attn_logit_softcapping=2.0,
)  # fmt: skip
GEMMA3 = dict(
    rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    sliding_window=4, query_pre_attn_scalar=9,
)  # fmt: skip
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
MODELS = {
    "qwen2": ("Qwen2", QWEN | TIED),
    "qwen2_untied": ("Qwen2", QWEN | UNTIED),
    "qwen2_sliding": ("Qwen2", QWEN | TIED | SLIDING),
    "qwen3": ("Qwen3", QWEN | TIED),
    "qwen3_untied": ("Qwen3", QWEN | UNTIED | dict(attention_bias=True)),
    "llama": ("Llama", dict(rope_parameters=PLAIN_ROPE) | UNTIED),
    "llama3": ("Llama", dict(rope_parameters=LLAMA_ROPE, head_dim=8) | TIED),
    "llama_bias": ("Llama", dict(rope_parameters=PLAIN_ROPE, attention_bias=True)),
    "gemma2": ("Gemma2", GEMMA2 | TIED),
    "gemma3": ("Gemma3", GEMMA3 | TIED),
    "gemma3_capped": ("Gemma3", GEMMA3 | UNTIED | dict(final_logit_softcapping=3.0)),
}
# One of each family, and each with windows.
SAMPLED = ["qwen2_sliding", "qwen3", "llama3", "gemma2", "gemma3"]


def their_model(name):
    import transformers

    family, settings = MODELS[name]
    config_name = family + ("TextConfig" if family == "Gemma3" else "Config")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**SHAPE | settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """pair(name): their model, ours, and the directory between them."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            model = their_model(name)
            model.save_pretrained(directory)
            made[name] = model, gj.load_pretrained(directory), directory
        return made[name]

    return make


def their_logits(model, ids, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        logits = model(torch.tensor(ids, dtype=torch.long), attention_mask=mask).logits
    return logits.float().numpy()


def padded_rows():
    ids = np.random.default_rng(0).integers(2, V, size=(5, L)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :5] = mask[2, :11] = 0  # left padding
    mask[3, 12:] = mask[4, 1:] = 0  # right padding; one row of a single token
    return ids, mask


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_theirs(pair, name):
    model, policy, _ = pair(name)
    ids, mask = padded_rows()
    live = mask.astype(bool)
    with jax.default_matmul_precision("highest"):
        actual = np.asarray(jax.jit(gj.next_token_logits)(policy, ids, mask))
    expected = their_logits(model, ids, mask)
    gap = np.abs(actual[live] - expected[live]).max()
    print(f"max |logit difference| of {name}: {gap:.1e}")
    np.testing.assert_allclose(actual[live], expected[live], rtol=0, atol=1e-5)
    assert np.abs(expected[live]).max() > 1


@pytest.mark.parametrize("name", SAMPLED)
def test_greedy_tokens_equal_theirs(pair, name):
    model, policy, _ = pair(name)
    ids, mask = (x[:3] for x in padded_rows())
    rollouts = gj.sample(
        policy, ids, mask, group_size=1, max_new_tokens=NEW, key=jax.random.key(0),
        top_k=1, eos_id=-1, pad_id=0,
    )  # fmt: skip
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, L:]
    np.testing.assert_array_equal(rollouts.completions[:, 0], theirs.numpy())


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_logprobs_are_the_teacher_forced_ones_and_theirs(pair, name):
    model, policy, _ = pair(name)
    ids, mask = padded_rows()
    rollouts = gj.sample(
        policy, ids, mask, group_size=2, max_new_tokens=NEW, key=jax.random.key(0),
        temperature=1.5, eos_id=-1, pad_id=0,
    )  # fmt: skip
    twin = jax.jit(gj.completion_logprobs)(policy, rollouts, temperature=1.5)
    np.testing.assert_allclose(twin, rollouts.behaviour_logprobs, atol=1e-5)
    for p in range(len(ids)):
        row = np.concatenate((ids[p][mask[p] > 0], rollouts.completions[p, 1]))
        logits = torch.tensor(their_logits(model, row[None])[0, -NEW - 1 : -1] / 1.5)
        theirs = torch.log_softmax(logits, -1).numpy()
        theirs = theirs[np.arange(NEW), rollouts.completions[p, 1]]
        np.testing.assert_allclose(twin[p, 1], theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_their_model_bit_by_bit(pair, name, dtype, tmp_path):
    import transformers

    model, _, directory = pair(name)
    if dtype == "bfloat16":
        directory = tmp_path / "theirs"
        model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="10KB")
        assert len([*directory.glob("*.safetensors")]) > 2
        model.float()
    policy = gj.load_pretrained(directory)
    assert policy.config.compute_dtype == dtype
    chex.assert_type(jax.tree.leaves(policy.params), dtype)
    sizes = dict(max_shard_bytes=10_000) if dtype == "bfloat16" else {}
    gj.save_pretrained(policy, tmp_path / "ours", **sizes, eos_ids=[3, 4])
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    wrong = {k: v for k, v in info.items() if k != "error_msgs"}
    assert not any(wrong.values()), wrong
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert type(back) is type(theirs) and back.dtype == getattr(torch, dtype)
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    ids, mask = padded_rows()
    theirs.config._attn_implementation = "eager"
    for x in (None, mask):
        np.testing.assert_array_equal(
            their_logits(back, ids, x), their_logits(theirs, ids, x)
        )
    assert back.generation_config.eos_token_id == [3, 4]
    again = gj.load_pretrained(tmp_path / "ours")
    assert again.config == policy.config
    chex.assert_trees_all_equal(again.params, policy.params, strict=True)


# Rounding differs, so both are compared to float32, with the same rounded weights.
@pytest.mark.parametrize("name", SAMPLED)
def test_bfloat16_is_as_close_to_float32_as_theirs(pair, name, tmp_path):
    import transformers

    model, _, directory = pair(name)
    ids, mask = padded_rows()
    live = mask.astype(bool)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = their_logits(model, ids, mask)[live]
    model.load_state_dict(
        transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    )
    model.float()
    logits = jax.jit(gj.next_token_logits)
    ours = np.asarray(logits(gj.load_pretrained(tmp_path), ids, mask))[live]
    wide = gj.load_pretrained(tmp_path, dtype="float32")
    exact = np.asarray(logits(wide, ids, mask))[live]
    errors = [np.abs(x - exact).mean() for x in (ours, theirs)]
    print(f"bfloat16 {name}: ours {errors[0]:.3f}, theirs {errors[1]:.3f}")
    assert errors[0] < 1.3 * errors[1]


@pytest.mark.parametrize("name", ["qwen2_sliding", "llama3", "gemma2", "gemma3"])
def test_the_older_spelling_of_a_config_is_the_same_model(pair, name, tmp_path):
    _, policy, directory = pair(name)
    values = json.loads((directory / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["torch_dtype"] = values.pop("dtype")
    if name == "gemma3":
        values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if name in ("qwen2_sliding", "gemma2"):
        del values["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    assert gj.load_pretrained(tmp_path).config == policy.config
