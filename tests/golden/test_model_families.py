"""Logits of every model family, as transformers computes them, for machines without it.

Weights follow from a fixed numpy seed; `model_logits.npz` holds what transformers
5.23.0 (torch 2.13.0, float32, CPU, eager attention) makes of them. Written again by

    python -m tests.golden.test_model_families

which needs torch: it exports each model and lets transformers load it.
"""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj

FILE = Path(__file__).with_name("model_logits.npz")
SHAPE = gj.ModelConfig(
    vocab_size=17, num_layers=3, width=16, mlp_width=20, num_heads=4, num_kv_heads=2,
    head_dim=6, rope_theta=500.0, norm_eps=1e-5, max_positions=64,
)  # fmt: skip
LLAMA3 = dict(
    rope_scaling="llama3", rope_theta=100.0, rope_factor=8.0, rope_original_length=32
)
GEMMA = dict(
    activation="gelu_tanh", norm_offset=True, post_norms=True, query_scale=9,
    scale_embedding=True, sliding_window=4,
)  # fmt: skip
MODELS = {
    "qwen2": dict(qk_bias=True, sliding_window=5, sliding_layers=(1, 2)),
    "qwen3": dict(qk_norm=True, tie_embeddings=False),
    "llama3": LLAMA3,
    "llama_bias": dict(qk_bias=True, output_bias=True, tie_embeddings=False),
    "gemma2": GEMMA
    | dict(sliding_layers=(0, 2), attention_softcap=2.0, logit_softcap=3.0),
    "gemma3": GEMMA
    | dict(sliding_layers=(0, 1), rope_local_theta=50.0, qk_norm=True)
    | dict(rope_scaling="linear", rope_factor=8.0),
}  # fmt: skip
IDS = np.random.default_rng(1).integers(0, 17, size=(3, 11)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[1, :4] = MASK[2, 7:] = 0


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
    """Not here: flax's layers broadcast over leading axes."""


def make_policy(name):
    config = dataclasses.replace(SHAPE, **MODELS[name])
    shapes = jax.eval_shape(lambda k: gj.init_policy(config, k), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, x):
        size = dict(kernel=0.3, embedding=0.3, unembedding=0.5).get(path[-1].key, 0.2)
        mean = 1.0 if path[-1].key == "scale" and not config.norm_offset else 0.0
        return jnp.asarray(mean + size * rng.normal(size=x.shape), jnp.float32)

    return shapes.replace(jax.tree_util.tree_map_with_path(draw, shapes.params))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    with np.load(FILE) as stored:
        expected = stored[name]
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(gj.next_token_logits)(make_policy(name), IDS, MASK)
    chex.assert_shape(logits, (*IDS.shape, SHAPE.vocab_size))
    live = MASK.astype(bool)
    np.testing.assert_allclose(logits[live], expected[live], rtol=0, atol=1e-5)


# Without this a feature that does nothing at this size would pass above.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", dict(sliding_window=6)),
        ("qwen2", dict(sliding_layers=(2,))),
        ("llama3", dict(rope_scaling="none")),
        ("llama3", dict(rope_slow_turns=0.5)),
        ("llama3", dict(rope_fast_turns=6.0)),
        ("llama3", dict(rope_original_length=16)),
        ("gemma2", dict(activation="silu")),
        ("gemma2", dict(norm_offset=False)),
        ("gemma2", dict(post_norms=False)),
        ("gemma2", dict(query_scale=None)),
        ("gemma2", dict(attention_softcap=None)),
        ("gemma2", dict(logit_softcap=None)),
        ("gemma2", dict(scale_embedding=False)),
        ("gemma3", dict(rope_local_theta=None)),
        ("gemma3", dict(rope_scaling="none")),
        ("gemma3", dict(sliding_window=3)),
    ],
)
def test_every_feature_moves_these_logits(name, change):
    policy = make_policy(name)
    config = dataclasses.replace(policy.config, **change)
    other = gj.init_policy(config, jax.random.key(0))
    layers = {k: policy.params["layers"][k] for k in other.params["layers"]}
    other = other.replace(policy.params | {"layers": layers})
    a, b = (jax.jit(gj.next_token_logits)(x, IDS, MASK) for x in (policy, other))
    assert np.abs(a - b)[MASK > 0].max() > 1e-3


def main():
    import tempfile

    import torch
    import transformers

    logits = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            gj.save_pretrained(make_policy(name), directory)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, attn_implementation="eager", dtype=torch.float32
            )
            ids, mask = torch.tensor(IDS, dtype=torch.long), torch.tensor(MASK)
            with torch.no_grad():
                logits[name] = model(ids, attention_mask=mask).logits.numpy()
    np.savez_compressed(FILE, **logits)


if __name__ == "__main__":
    main()
