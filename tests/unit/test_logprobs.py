from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import logprobs as module
from grpo_jax import token_logprobs

LEAD, T, D, V = (2, 3), 7, 5, 11


def inputs(lead=LEAD):
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (*lead, T, D)).astype(np.float32)
    unembedding = rng.normal(0, 1, (D, V)).astype(np.float32)
    return hidden, unembedding, rng.integers(0, V, (*lead, T)).astype(np.int32)


def full(hidden, unembedding, token_ids, temperature=1.0):
    """The definition, all logits at once: (log-probs, entropy)."""
    logprobs = jax.nn.log_softmax(hidden @ unembedding / temperature)
    chosen = jnp.take_along_axis(logprobs, token_ids[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)


# 6 rows: chunks of 1, 1, 2, 4 and 7 of the 7 tokens.
@pytest.mark.parametrize("chunk_size", [1, 6, 12, 24, 512])
def test_any_chunking_equals_the_full_log_softmax(chunk_size):
    expected = full(*inputs())
    chunked = partial(token_logprobs, chunk_size=chunk_size, with_entropy=True)
    actual = jax.jit(chunked)(*inputs())
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-6)
    chex.assert_shape(actual, (*LEAD, T))
    chex.assert_type(actual, jnp.float32)


@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 2)])
def test_any_leading_axes(lead):
    expected, _ = full(*inputs(lead))
    actual = jax.jit(partial(token_logprobs, chunk_size=3))(*inputs(lead))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


# Logits divided by 1/4 are up to 40 nats, so their rounding is some 1e-5 of them.
@pytest.mark.parametrize("temperature", [0.25, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = full(*inputs(), temperature)
    tempered = partial(token_logprobs, with_entropy=True, chunk_size=13)
    actual = jax.jit(tempered)(*inputs(), temperature=temperature)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4, atol=5e-5)


def test_the_cap_comes_before_the_temperature():
    hidden, unembedding, token_ids = inputs()
    capped = 2 * np.tanh(hidden @ unembedding / 2)
    expected, _ = full(capped, np.eye(V, dtype=np.float32), token_ids, 0.5)
    actual = jax.jit(partial(token_logprobs, softcap=2.0, temperature=0.5))(*inputs())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# Equal logits: log-prob -ln V, entropy ln V. One far above: both 0.
def test_entropy_of_the_uniform_and_of_the_certain():
    hidden = np.array([[0.0], [50.0]], np.float32)
    unembedding = np.array([[1.0] + [0.0] * (V - 1)], np.float32)
    logprobs, entropy = jax.jit(partial(token_logprobs, with_entropy=True))(
        hidden, unembedding, np.zeros(2, np.int32)
    )
    np.testing.assert_allclose(logprobs, [-np.log(V), 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(entropy, [np.log(V), 0], rtol=1e-6, atol=1e-6)


def test_large_logits_do_not_overflow():
    hidden, unembedding, token_ids = inputs()
    actual = jax.jit(token_logprobs)(1e4 * hidden, unembedding, token_ids)
    chex.assert_tree_all_finite(actual)
    assert (np.asarray(actual) <= 0).all()


def test_gradients_equal_the_definitions():
    hidden, unembedding, token_ids = inputs()
    weights = np.random.default_rng(1).normal(0, 1, (2, *LEAD, T)).astype(np.float32)

    def scalar(function, h, u):
        logprobs, entropy = function(h, u, token_ids)
        return (weights[0] * logprobs + weights[1] * entropy).sum()

    chunked = partial(token_logprobs, chunk_size=12, with_entropy=True)
    actual, expected = (
        jax.jit(jax.grad(partial(scalar, f), (0, 1)))(hidden, unembedding)
        for f in (chunked, full)
    )
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_forward_over_forward_works():
    hidden, unembedding, token_ids = inputs()
    direction = np.random.default_rng(1).normal(0, 1, hidden.shape).astype(np.float32)

    def second_derivative(function):
        def along(t):
            return function(hidden + t * direction, unembedding, token_ids)

        def slope(t):
            return jax.jvp(along, (t,), (jnp.ones(()),))[1]

        return jax.jit(lambda t: jax.jvp(slope, (t,), (jnp.ones(()),))[1])(0.0)

    actual = second_derivative(partial(token_logprobs, chunk_size=12))
    expected = second_derivative(lambda *x: full(*x)[0])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_inputs_give_float32_logprobs():
    hidden, unembedding, token_ids = inputs()
    low = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(unembedding, jnp.bfloat16)
    actual = jax.jit(token_logprobs)(*low, token_ids)
    expected, _ = full(*(x.astype(jnp.float32) for x in low), token_ids)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        hidden, unembedding, token_ids = inputs()
        hidden, unembedding = hidden.astype(float), unembedding.astype(float)
        actual = jax.jit(token_logprobs)(hidden, unembedding, token_ids)
        expected, _ = full(hidden, unembedding, token_ids)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_a_large_vocabulary_shortens_the_chunks(monkeypatch):
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", 2 * 6 * V)  # two tokens of six rows
    jaxpr = str(jax.make_jaxpr(lambda *x: token_logprobs(*x))(*inputs()))
    assert f"f32[2,3,2,{V}]" in jaxpr and f"f32[2,3,{T},{V}]" not in jaxpr


def test_the_loop_over_chunks_holds_one_float32_table():
    """The sum of gradients; beside a bfloat16 copy, not the parameters themselves."""
    hidden, unembedding, token_ids = inputs()

    def loss(hidden, unembedding):
        return token_logprobs(hidden, unembedding, token_ids, chunk_size=6).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
        hidden.astype(jnp.bfloat16), unembedding
    )
    loops = [x for x in jaxpr.eqns if x.primitive.name == "scan"]
    tables = [
        [str(v.aval.dtype) for v in x.invars if v.aval.shape == (D, V)] for x in loops
    ]
    assert tables == [["bfloat16"], ["bfloat16", "float32"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(unembedding=(V, D)), r"unembedding must be \[5, V\] .* transpose"),
        (dict(unembedding=(D,)), r"unembedding must be \[5, V\] .* got \(5,\)"),
        (dict(token_ids=(2, 3)), r"token_ids must be \(2, 3, 7\) .* got \(2, 3\)"),
        (dict(token_ids=(2, 3, 6)), r"token_ids must be \(2, 3, 7\)"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    chunk_size = changes.pop("chunk_size", 512)
    arrays = dict(zip(("hidden", "unembedding", "token_ids"), inputs(), strict=True))
    for name, shape in changes.items():
        arrays[name] = np.zeros(shape, arrays[name].dtype)
    with pytest.raises(ValueError, match=message):
        jax.jit(partial(token_logprobs, chunk_size=chunk_size))(**arrays)
