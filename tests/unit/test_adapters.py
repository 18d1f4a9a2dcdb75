"""Adapters as PEFT writes them, and merged models that keep what was learnt."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.models.adapters import factors_of
from grpo_jax.models.pretrained import check_weights, read_config
from grpo_jax.models.rounding import rounding_loss
from grpo_jax.runs.policies import fingerprint, with_settings

SHAPE = dict(
    vocab_size=13, width=8, mlp_width=12, num_heads=2, num_kv_heads=1, head_dim=4
)
IDS = np.arange(10, dtype=np.int32).reshape(2, 5) % 13


def random_factors(policy):
    leaves, tree = jax.tree.flatten(policy.params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return policy.replace(
        tree.unflatten([0.3 * jax.random.normal(k, x.shape) for k, x in pairs])
    )


@pytest.fixture(scope="module")
def base():
    return gj.init_policy(gj.ModelConfig(**SHAPE), jax.random.key(0))


@pytest.fixture(scope="module")
def adapted(base):
    settings = dict(rank=2, alpha=6.0, targets=("q", "down"))
    return random_factors(gj.add_lora(base, key=jax.random.key(1), **settings))


@pytest.fixture
def saved(tmp_path, monkeypatch, base, adapted):
    """tmp_path/base and tmp_path/adapter, whose config names ../base: no folder of the
    one the tests run in."""
    monkeypatch.chdir(tmp_path)
    gj.save_pretrained(base, tmp_path / "base")
    folder = tmp_path / "adapter"
    gj.save_adapter(adapted.params, adapted.config, folder, base="../base")
    return folder


def rewrite(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_is_its_base_with_its_factors(saved, adapted):
    policy = gj.load_pretrained(saved)
    assert policy.config == adapted.config == read_config(saved)
    chex.assert_trees_all_equal(policy.params, adapted.params)
    chex.assert_trees_all_equal(policy.frozen, adapted.frozen)
    ours, theirs = (gj.next_token_logits(p, IDS) for p in (policy, adapted))
    np.testing.assert_array_equal(ours, theirs)
    check_weights(saved)


def test_the_base_is_loaded_in_the_dtype_that_is_asked_for(saved):
    policy = gj.load_pretrained(saved, dtype=jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(policy.frozen)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(policy.params)} == {"float32"}
    assert policy.config.compute_dtype == "bfloat16"


def test_a_scale_by_the_root_of_the_rank_is_the_same_function(saved, adapted):
    """alpha' / sqrt(2) = 6 / 2."""
    rewrite(saved, use_rslora=True, lora_alpha=6 / 2**0.5)
    logits = gj.next_token_logits(gj.load_pretrained(saved), IDS)
    np.testing.assert_allclose(logits, gj.next_token_logits(adapted, IDS), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_dora": True},
            "use_dora must be False or None, got True; merge the adap",
        ),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"bias": "all"}, "bias must be 'none' or None, got 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must be"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern must be"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be"),
        ({"r": 0}, "r must be a whole number above 0, got 0"),
        (
            {"r": 3},
            r"lora_A.weight must be \[3, 8\] by the base model and adapter_config",
        ),
        ({"lora_alpha": None}, "lora_alpha must be above 0, got None"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "gone"}, "gone is not a directory"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(ConfigError, match=message):
        gj.load_pretrained(saved)


def test_factors_of_some_layers_or_of_other_modules_are_refused(saved):
    file = saved / "adapter_model.safetensors"
    arrays = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file({k: x for k, x in arrays.items() if k != name}, file)
    with pytest.raises(ConfigError, match=f"{name} is missing from"):
        gj.load_pretrained(saved)
    other = "base_model.model.lm_head.lora_A.weight"
    save_file(arrays | {other: arrays[name]}, file)
    with pytest.raises(ConfigError, match=f"{other} in .* is no factor of a layer's"):
        read_config(saved)
    file.unlink()
    with pytest.raises(ConfigError, match="adapter_model.safetensors does not exist"):
        check_weights(saved)


def test_a_directory_of_both_is_refused(saved):
    (saved / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="holds a model and an adapter"):
        gj.load_pretrained(saved)


def test_the_fingerprint_is_of_the_factors_and_of_the_base(saved, base, tmp_path):
    before = fingerprint(saved)
    rewrite(saved, base_model_name_or_path=str(tmp_path / "base"))
    assert fingerprint(saved) == before
    other = jax.tree.map(lambda x: x + 1, base.params)
    gj.save_pretrained(base.replace(other), tmp_path / "base")
    assert fingerprint(saved) != before


def test_lora_settings_are_the_adapters_own(adapted):
    stored = adapted.config
    for asked in (gj.ModelConfig(), gj.ModelConfig(lora_rank=2, lora_alpha=6.0)):
        assert with_settings(stored, asked) == stored
    with pytest.raises(
        ConfigError, match=r"model.lora_rank is the .* own \(2\), got 4"
    ):
        with_settings(stored, gj.ModelConfig(lora_rank=4))


# ---- merged models


def half_base(base, adapted):
    """The policy with a bfloat16 base."""
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params)
    return dataclasses.replace(adapted, frozen=frozen)


def test_merging_keeps_an_update_below_bfloat16s_spacing(base, adapted):
    """1 + 2^-12 is 1 in bfloat16, whose spacing at 1 is 2^-7, and exact in float32."""
    policy = half_base(base, adapted)
    ones = jax.tree.map(jnp.ones_like, policy.frozen)
    factors = jax.tree.map(jnp.ones_like, policy.params)  # A B is the rank, 2
    for target in factors["layers"].values():
        target["lora_b"] *= 2.0**-12 / 6  # times alpha / rank
    merged = gj.merge_lora(dataclasses.replace(policy, params=factors, frozen=ones))
    np.testing.assert_allclose(
        merged.params["layers"]["q"]["kernel"], 1 + 2.0**-12, rtol=1e-7
    )
    assert {x.dtype.name for x in jax.tree.leaves(merged.params)} == {"float32"}


def test_saving_merges_in_float32_or_says_what_is_lost(base, adapted, tmp_path):
    policy = half_base(base, adapted)
    small = policy.replace(jax.tree.map(lambda x: 1e-2 * x, policy.params))
    gj.save_pretrained(small, tmp_path / "wide")
    wide = gj.load_pretrained(tmp_path / "wide")
    chex.assert_trees_all_equal(wide.params, gj.merge_lora(small).params)
    message = "bfloat16 files would lose .* % of the update of layers.*--adapter"
    with pytest.raises(ConfigError, match=message):
        gj.save_pretrained(small, tmp_path / "half", dtype="bfloat16")
    assert not (tmp_path / "half").exists()
    gj.save_pretrained(small, tmp_path / "half", dtype=jnp.bfloat16, max_loss=1.5)
    half = gj.load_pretrained(tmp_path / "half")
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}


def test_the_loss_of_rounding_is_the_share_of_the_update(base):
    """At 1, bfloat16 has steps of 2^-7: a quarter step is lost whole, a step is kept,
    and of one and a quarter steps a fifth is lost."""
    start = {"layers": {"q": {"kernel": jnp.ones((3, 2, 2))}}, "norm": jnp.ones(4)}
    steps = jnp.array([1.0, 1.25, 0.0])[:, None, None] * 2.0**-7
    params = {"layers": {"q": {"kernel": 1 + steps * jnp.ones((3, 2, 2))}}}
    loss = rounding_loss(params | {"norm": jnp.ones(4)}, start, "bfloat16")
    assert loss.name == "layers.q.kernel, layer 1"
    np.testing.assert_allclose(loss.share, 1 / 5, rtol=1e-6)
    lost = rounding_loss(params | {"norm": jnp.full(4, 1 + 2.0**-9)}, start, "bfloat16")
    assert lost == (1.0, "norm")
    assert rounding_loss(start, start, "bfloat16").share == 0
    assert rounding_loss(params | {"norm": jnp.ones(4)}, start, "float32").share == 0


def test_every_factor_has_a_name_of_its_own(adapted):
    names = [f.name for f in factors_of(adapted.config)]
    assert len(set(names)) == len(names) == 2 * 2 * 2  # layers, targets, factors


@pytest.mark.parametrize("dtype", ["float16", float, "x", 3])
def test_another_dtype_of_files_is_refused(saved, dtype):
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16"):
        gj.load_pretrained(saved, dtype=dtype)
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16"):
        gj.save_pretrained(gj.load_pretrained(saved), saved / "x", dtype=dtype)
