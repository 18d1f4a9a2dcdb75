"""Attention over prompts and their completions, however it is computed."""

import math
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import ModelConfig, init_policy, next_token_logits
from grpo_jax.models import tree
from grpo_jax.models.forward import teacher_forced
from grpo_jax.models.tree import Tree, TreeAttention, chosen_attention
from grpo_jax.parallel.platform import compiling_for

P, G, L, T, H, KV, D = 2, 2, 29, 37, 4, 2, 8
HOW = ("dense", "blocks", "flash")
# Scale 1; a window, a soft cap.
SETTINGS = [(None, None), (11, None), (40, 1.5)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tree, "SHORT", 16)
    monkeypatch.setattr(tree, "MIN_BLOCK", 8)
    monkeypatch.setitem(tree.MAX_SCORES, "cpu", 1)


def arrays(dtype):
    rng = np.random.default_rng(0)
    shapes = {
        "prefix_q": (P, L, H, D), "prefix_k": (P, L, KV, D), "prefix_v": (P, L, KV, D),
        "q": (P, G, T, H, D), "k": (P, G, T, KV, D), "v": (P, G, T, KV, D),
    }  # fmt: skip
    return {name: rng.normal(0, 1, s).astype(dtype) for name, s in shapes.items()}


LENGTHS = np.array([L - 7, 12])  # of the prompts
MASK = np.arange(L) >= L - LENGTHS[:, None]
TREE = Tree(
    MASK, np.maximum(MASK.cumsum(1) - 1, 0).astype(np.int32), LENGTHS.astype(np.int32)
)


def attended(how, window, softcap, slides, x):
    attention = TreeAttention(TREE, window, how, scale=1.0, softcap=softcap)
    prefix = x["prefix_k"], x["prefix_v"]
    own = x["k"], x["v"]
    return (
        attention.prompts(x["prefix_q"], *prefix, slides),
        attention.completions(x["q"], prefix, own, slides),
    )


def expected(window, softcap, x):
    """The same in numpy and float64, one query at a time."""
    prompts, completions = np.zeros_like(x["prefix_q"]), np.zeros_like(x["q"])

    def one(q, k, v):
        k, v = k[-window:] if window else k, v[-window:] if window else v
        s = k @ q
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        w = np.exp(s - s.max())
        return w / w.sum() @ v

    for p, h in np.ndindex(P, H):
        start, kv = L - LENGTHS[p], h // (H // KV)
        before = x["prefix_k"][p, start:, kv], x["prefix_v"][p, start:, kv]
        for i in range(start, L):
            seen = slice(0, i + 1 - start)
            keys = (part[seen] for part in before)
            prompts[p, i, h] = one(x["prefix_q"][p, i, h], *keys)
        for g, t in np.ndindex(G, T):
            own = x["k"][p, g, : t + 1, kv], x["v"][p, g, : t + 1, kv]
            keys = (np.concatenate(pair) for pair in zip(before, own, strict=True))
            completions[p, g, t, h] = one(x["q"][p, g, t, h], *keys)
    return prompts, completions


def real(pair):
    """Without what padding attends to."""
    return np.where(MASK[..., None, None], pair[0], 0), np.asarray(pair[1])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("window", "softcap"), SETTINGS)
def test_every_way_is_one_softmax_over_what_is_seen(how, window, softcap):
    x = arrays(np.float64)
    slides = None if window is None else np.array(True)
    with jax.enable_x64(True):
        actual = jax.jit(partial(attended, how, window, softcap, slides))(x)
        chex.assert_trees_all_close(
            real(actual), real(expected(window, softcap, x)), atol=1e-12
        )


def test_a_layer_that_does_not_slide_has_no_window():
    x = arrays(np.float32)
    for how in HOW:
        wide = jax.jit(partial(attended, how, 11, None, np.array(False)))(x)
        plain = jax.jit(partial(attended, how, None, None, None))(x)
        chex.assert_trees_all_close(real(wide), real(plain), rtol=1e-6, atol=1e-6)


def weighted(how, window, softcap, slides, x):
    rng = np.random.default_rng(1)
    prompts, completions = attended(how, window, softcap, slides, x)
    kept = jnp.where(MASK[..., None, None], prompts, 0)
    return (kept * rng.normal(size=kept.shape)).sum() + (
        completions * rng.normal(size=completions.shape)
    ).sum()


# Derivatives of the plain softmax over one joined row, by JAX alone, in float64.
def plain(window, softcap, slides, x):
    near = L + T if window is None else window

    def one(q, k, v, seen):  # [N, H, D], [M, KV, D], [M, KV, D], [N, M]
        k, v = (jnp.repeat(y, H // KV, axis=1) for y in (k, v))
        s = jnp.einsum("nhd,mhd->hnm", q, k)
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        w = jax.nn.softmax(jnp.where(seen, s, -1e30), axis=-1)
        return jnp.einsum("hnm,mhd->nhd", w, v)

    i = np.arange(L + T)
    seen = (i[:, None] >= i) & (i[:, None] - i < near)
    prompts, completions = [], []
    for p in range(P):
        there = seen & (i >= L - LENGTHS[p])
        k, v = x["prefix_k"][p], x["prefix_v"][p]
        prompts.append(one(x["prefix_q"][p], k, v, there[:L, :L]))
        rows = [
            one(
                x["q"][p, g],
                jnp.concatenate((k, x["k"][p, g])),
                jnp.concatenate((v, x["v"][p, g])),
                there[L:],
            )
            for g in range(G)
        ]
        completions.append(jnp.stack(rows))
    return jnp.stack(prompts), jnp.stack(completions)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("window", "softcap"), SETTINGS)
def test_gradients_are_those_of_a_plain_softmax(monkeypatch, how, window, softcap):
    x = arrays(np.float64)
    slides = None if window is None else np.array(True)
    function = partial(weighted, how, window, softcap, slides)
    with jax.enable_x64(True):
        exact = jax.jit(jax.grad(function))(x)
    x32 = jax.tree.map(np.float32, x)
    single = jax.jit(jax.grad(function))(x32)
    with jax.enable_x64(True), monkeypatch.context() as patch:
        patch.setitem(globals(), "attended", lambda how, *rest: plain(*rest))
        true = jax.jit(jax.grad(function))(x)
    chex.assert_trees_all_close(exact, true, atol=1e-11)
    chex.assert_trees_all_close(single, true, rtol=1e-5, atol=1e-5)


# Forward mode, reverse over forward and forward over forward.
@pytest.mark.parametrize(("window", "softcap"), SETTINGS)
def test_modes_of_modes_are_those_of_a_plain_softmax(monkeypatch, window, softcap):
    x = arrays(np.float64)
    rng = np.random.default_rng(2)
    along = jax.tree.map(lambda y: rng.normal(size=y.shape), x)
    slides = None if window is None else np.array(True)

    def derivatives(x):
        loss = partial(weighted, "blocks", window, softcap, slides)

        def slope(x):
            return jax.jvp(loss, (x,), (along,))[1]

        return slope(x), jax.grad(slope)(x), jax.jvp(slope, (x,), (along,))[1]

    with jax.enable_x64(True):
        actual = jax.jit(derivatives)(x)
        with monkeypatch.context() as patch:
            patch.setitem(globals(), "attended", lambda how, *rest: plain(*rest))
            true = jax.jit(lambda x: derivatives(x))(x)
    chex.assert_trees_all_close(actual, true, rtol=1e-9, atol=1e-9)


MODEL = dict(vocab_size=30, num_layers=3, width=32, mlp_width=48, head_dim=8)
WINDOWS = dict(sliding_window=7, sliding_layers=(0, 2), attention_softcap=3.0)


@pytest.mark.parametrize(
    ("more", "remat"), [({}, "dots"), (WINDOWS, "full")], ids=["plain", "windows"]
)
def test_a_model_has_the_same_gradients_every_way(more, remat):
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 30, (P, 24)).astype(np.int32)
    mask = np.ones_like(prompts)
    mask[0, :5] = mask[1, 20:] = 0  # padded on either side
    completions = rng.integers(0, 30, (P, G, 20)).astype(np.int32)
    found = []
    for how in HOW:
        config = ModelConfig(**MODEL, **more, attention=how, remat=remat)
        policy = init_policy(config, jax.random.key(0))

        def loss(params, policy=policy):
            policy = policy.replace(params)
            return teacher_forced(policy, prompts, mask, completions, 1.0)[
                ..., :37
            ].sum()

        found.append(jax.jit(jax.value_and_grad(loss))(policy.params))
        logits = next_token_logits(policy, prompts, mask)
        found[-1] = (*found[-1], np.where(mask[..., None], logits, 0))
    for other in found[1:]:
        chex.assert_trees_all_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_no_array_has_the_square_of_a_length():
    length, sizes = 1030, {}
    prompts, completions = (
        np.zeros((1, 9), np.int32),
        np.zeros((1, 2, length), np.int32),
    )
    for how in ("auto", "dense"):
        config = ModelConfig(**MODEL, attention=how)
        policy = init_policy(config, jax.random.key(0))

        def loss(params, policy=policy):
            policy, mask = policy.replace(params), np.ones_like(prompts)
            return teacher_forced(policy, prompts, mask, completions, 1.0).sum()

        text = jax.jit(jax.grad(loss)).lower(policy.params).compile().as_text()
        shapes = re.findall(r"\[([0-9,]+)\]", text)
        sizes[how] = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert sizes["auto"] < length**2 / 4 and sizes["dense"] >= length**2


# What padding attends to may not grow from layer to layer, or it would be NaN times 0.
@pytest.mark.parametrize("how", ["dense", "blocks"])
def test_padding_changes_no_derivative_of_a_deep_model(how):
    config = ModelConfig(**MODEL | dict(num_layers=24), attention=how)
    policy = init_policy(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 30, (1, 9)).astype(np.int32)
    completions = rng.integers(0, 30, (1, 2, 20)).astype(np.int32)
    along = jax.tree.map(jnp.ones_like, policy.params)

    def derivatives(padding):
        ids = np.pad(prompt, ((0, 0), (0, padding)))
        mask = np.arange(ids.shape[1])[None] < prompt.shape[1]

        def loss(params):
            policy_ = policy.replace(params)
            return teacher_forced(policy_, ids, mask, completions, 1.0).mean()

        def slope(params):
            return jax.jvp(loss, (params,), (along,))[1]

        return jax.jit(lambda p: jax.jvp(slope, (p,), (along,)))(policy.params)

    found = derivatives(200)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, derivatives(0), rtol=1e-3)


def test_platforms_with_a_kernel_take_it_for_long_sequences():
    assert chosen_attention("auto", 300, 64) == "blocks"
    assert chosen_attention("blocks", 8, 64) == "dense"  # one block
    assert chosen_attention("flash", 8, 64) == "flash"
    for target in ("tpu", "gpu"):
        with compiling_for(target):
            assert chosen_attention("auto", 300, 64) == "flash"
            assert chosen_attention("auto", 8, 64) == "dense"
            assert chosen_attention("auto", 300, 40) == "blocks"  # no such kernel


def test_the_instrument_takes_no_kernel_without_forward_mode():
    config = ModelConfig(**MODEL, attention="flash")
    policy = init_policy(config, jax.random.key(0)).with_all_modes()
    assert policy.config.attention == "blocks"
    policy = init_policy(ModelConfig(**MODEL), jax.random.key(0))
    assert policy.with_all_modes() is policy
