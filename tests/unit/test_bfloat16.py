"""What computing in bfloat16 may cost: rounding, not sums that stop growing."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from grpo_jax import ModelConfig, init_policy, token_logprobs
from grpo_jax.models.forward import teacher_forced
from grpo_jax.models.linear import Linear
from grpo_jax.models.policy import Policy, abstract_policy
from grpo_jax.objectives.presets import OBJECTIVES
from grpo_jax.parallel.sharding import AXES
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.training.state import Batch
from tests.helpers import BFLOAT16_MODELS, bfloat16_errors, equations, train_step

MESH = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
# Sums of many terms; sums of two (`add_any`) are of branches of the residual stream.
SUMS = (
    "reduce_sum", "scatter-add", "cumsum", "reduce_window_sum", "psum",
    "psum_invariant", "reduce_scatter",
)  # fmt: skip


def low_sums(jaxpr):
    """Sums in bfloat16 in a jaxpr, with those that its loops carry."""
    for equation in equations(jaxpr):
        name, outputs = equation.primitive.name, [v.aval for v in equation.outvars]
        if name == "scan":
            body = equation.params["jaxpr"]
            inner = getattr(body, "jaxpr", body).outvars
            # What is not carried is stacked: an axis more than in the body.
            pairs = zip(outputs, inner, strict=True)
            outputs = [x for x, v in pairs if x.ndim == v.aval.ndim]
        if name in SUMS or name == "scan":
            yield from ((name, x.shape) for x in outputs if x.dtype == jnp.bfloat16)


def gradient_jaxpr(policy: Policy):
    prompts = np.ones((4, 6), np.int32)
    completions = np.ones((4, 2, 16), np.int32)

    def loss(params, frozen):
        other = dataclasses.replace(policy, params=params, frozen=frozen)
        return teacher_forced(other, prompts, prompts, completions, 1.0).sum()

    return jax.make_jaxpr(jax.grad(loss))(policy.params, policy.frozen).jaxpr


@pytest.mark.parametrize("mesh", [None, MESH], ids=["one device", "mesh"])
@pytest.mark.parametrize("name", BFLOAT16_MODELS)
def test_no_gradient_is_summed_in_bfloat16(name, mesh):
    """But that of the residual streams, which are bfloat16 themselves: one term a
    layer."""
    config = ModelConfig(**BFLOAT16_MODELS[name], compute_dtype="bfloat16")
    policy = abstract_policy(config)
    if mesh is None:
        found, rows = set(low_sums(gradient_jaxpr(policy))), 4
    else:
        with jax.sharding.use_abstract_mesh(mesh):
            found, rows = set(low_sums(gradient_jaxpr(policy))), 1
    width = config.width
    assert found == {("scan", (rows, 6, width)), ("scan", (rows, 2, 16, width))}


@pytest.mark.parametrize("name", BFLOAT16_MODELS)
def test_no_update_sums_in_bfloat16(name):
    """As above: nothing is added by parts of a batch, clipping or Adam."""
    policy = abstract_policy(
        ModelConfig(**BFLOAT16_MODELS[name], compute_dtype="bfloat16")
    )
    prompts, ids = np.ones((4, 6), np.int32), np.ones((4, 2, 16), np.int32)
    logprobs, rewards = np.zeros(ids.shape, np.float32), np.eye(4, 2, dtype=np.float32)
    rollouts = Rollouts(prompts, prompts, ids, ids, logprobs, rewards)
    batch = Batch(rollouts, rewards, np.ones(4, np.float32), None, None)
    step, init = train_step(policy, OBJECTIVES["grpo"], MicroBatch(2, 2), max_length=16)
    state = jax.eval_shape(init, policy.params)
    jaxpr = jax.make_jaxpr(step)(state, batch, None, policy.frozen).jaxpr
    width = policy.config.width
    assert set(low_sums(jaxpr)) == {
        ("scan", (2, 6, width)), ("scan", (2, 2, 16, width)),
    }  # fmt: skip


# A sum of ones in bfloat16 stops at 256.
@pytest.mark.parametrize("times", [64, 1024, 8192])
def test_a_token_is_counted_as_often_as_it_is_seen(times):
    config = ModelConfig(**BFLOAT16_MODELS["tied"], compute_dtype="bfloat16")
    policy = init_policy(config, jax.random.key(0))
    ids = np.full(times, 5, np.int32)

    def total(params):
        return policy.replace(params).module().embed(ids).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total))(policy.params)["embedding"]["embedding"]
    expected = np.zeros(gradient.shape)
    expected[5] = times
    np.testing.assert_array_equal(gradient, expected)


def test_a_bias_is_counted_for_every_row():
    linear = Linear(3, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rows = np.zeros((8192, 3), np.float32)
    gradient = nnx.grad(lambda m: m(rows).astype(jnp.float32).sum())(linear)
    np.testing.assert_array_equal(gradient["bias"][...], [8192, 8192])


# A chunk's product is rounded once, relative 2^-8 at most; a sum of n of them carried
# in bfloat16 would be rounded n times more.
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [1024, 2])
def test_chunks_of_logits_add_no_rounding(chunk_size, low):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1024, 16)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=(16, 64)) / 10, jnp.bfloat16)
    ids, signs = rng.integers(0, 64, 1024), rng.normal(0.3, 1, 1024)

    def loss(chunk_size, hidden, weights):
        logprobs = token_logprobs(hidden, weights, ids, chunk_size=chunk_size)
        return (signs * logprobs).sum()

    wide = weights.astype(jnp.float32)
    slope = partial(jax.grad(loss, 2), chunk_size)
    actual = jax.jit(slope)(hidden, weights if low else wide)
    exact = jax.jit(slope)(hidden.astype(jnp.float32), wide)
    error = jnp.linalg.norm(actual.astype(jnp.float32) - exact)
    assert error < 2**-8 * jnp.linalg.norm(exact)
    assert actual.dtype == (jnp.bfloat16 if low else jnp.float32)


def test_the_gradient_of_the_copy_works_forward_and_twice():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(6, 8)), jnp.bfloat16)
    weights, direction = rng.normal(size=(2, 8, 12)).astype(np.float32)
    ids = rng.integers(0, 12, 6)

    def value(hidden, t):
        return token_logprobs(hidden, weights + t * direction, ids, chunk_size=2).sum()

    def slope(hidden, t):
        return jax.jvp(partial(value, hidden), (t,), (1.0,))[1]

    def derivatives(hidden):
        return jax.jvp(partial(slope, hidden), (0.0,), (1.0,))

    low = jax.jit(derivatives)(hidden)
    np.testing.assert_allclose(low, derivatives(hidden.astype(jnp.float32)), rtol=0.02)
    np.testing.assert_allclose(jax.grad(value, 1)(hidden, 0.0), low[0], rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", BFLOAT16_MODELS)
def test_every_gradient_leaf_is_near_the_float32_one(name):
    errors = bfloat16_errors(name)
    assert max(errors.values()) < 0.04, errors
