"""Our decoder against Hugging Face's own Qwen2 and Qwen3 on tiny random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj

torch = pytest.importorskip("torch", reason="torch is not installed")

SHAPE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
    max_position_embeddings=128,
)


def their_model(family, tied):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SHAPE, tie_word_embeddings=tied, attention_dropout=0.0
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def our_policy(model, family, tied):
    """Their weights under our names: linear maps transposed, layers stacked."""
    theirs = {k: np.asarray(v.detach()) for k, v in model.named_parameters()}

    def stack(name):
        layers = range(SHAPE["num_hidden_layers"])
        return np.stack([theirs[f"model.layers.{i}.{name}"] for i in layers])

    def linear(name, bias=False):
        weights = {"kernel": stack(f"{name}.weight").swapaxes(1, 2)}
        return weights | ({"bias": stack(f"{name}.bias")} if bias else {})

    qwen2 = family == "Qwen2"
    layers = {
        **{n: linear(f"self_attn.{n}_proj", bias=qwen2) for n in "qkv"},
        "o": linear("self_attn.o_proj"),
        **{n: linear(f"mlp.{n}_proj") for n in ("gate", "up", "down")},
        "attention_norm": {"scale": stack("input_layernorm.weight")},
        "mlp_norm": {"scale": stack("post_attention_layernorm.weight")},
    }
    if not qwen2:
        for n in "qk":
            layers[f"{n}_norm"] = {"scale": stack(f"self_attn.{n}_norm.weight")}
    params = {
        "embedding": {"embedding": theirs["model.embed_tokens.weight"]},
        "layers": layers,
        "final_norm": {"scale": theirs["model.norm.weight"]},
    }
    if not tied:
        params["unembedding"] = theirs["lm_head.weight"].T
    config = gj.ModelConfig(
        vocab_size=61,
        num_layers=3,
        width=24,
        mlp_width=40,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        rope_theta=500.0,
        norm_eps=1e-5,
        qk_bias=qwen2,
        qk_norm=not qwen2,
        tie_embeddings=tied,
    )
    policy = gj.init_policy(config, jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, policy.params)
    assert shapes == jax.tree.map(jnp.shape, params)
    return policy.replace(jax.tree.map(jnp.asarray, params))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_logits_and_greedy_tokens_equal_theirs(family, tied):
    model = their_model(family, tied)
    policy = our_policy(model, family, tied)
    ids = np.random.default_rng(0).integers(2, 61, size=(3, 17)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :5] = 0  # left padding
    with torch.no_grad():
        expected = model(
            torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask)
        ).logits.numpy()
    with jax.default_matmul_precision("highest"):
        actual = np.asarray(gj.next_token_logits(policy, ids, mask))
    live = mask.astype(bool)
    np.testing.assert_allclose(actual[live], expected[live], rtol=0, atol=1e-5)

    rollouts = gj.sample(
        policy, ids, mask, group_size=1, max_new_tokens=12, key=jax.random.key(0),
        top_k=1, eos_id=-1, pad_id=0,
    )  # fmt: skip
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 17:]
    np.testing.assert_array_equal(rollouts.completions[:, 0], theirs.numpy())
