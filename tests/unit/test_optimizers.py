"""Each optimizer's update, state and settings."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.models.policy import abstract_policy
from grpo_jax.parallel.sharding import AXES, tree_shardings
from grpo_jax.planning.headline import _optimizer_text
from grpo_jax.planning.learning_rate import learning_rate
from grpo_jax.planning.memory import estimate_memory
from grpo_jax.planning.optimizer import make_optimizer
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.runs.config import CheckpointConfig, MeshConfig, OptimizerConfig
from tests.e2e.test_train import digits_task, small_config

RATE, DECAY = 0.1, 0.5
# A global norm of 5, clipped to 1: gradients times 1/5.
PARAMS = {"q": {"kernel": jnp.array([[2.0, -2.0]]), "bias": jnp.array([1.0])}}
GRADS = {"q": {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([-4.0])}}


def updates(grads=GRADS, params=PARAMS, times=1, **settings):
    config = OptimizerConfig(**settings)
    optimizer = make_optimizer(config, optax.constant_schedule(RATE))
    state = optimizer.init(params)
    for _ in range(times):
        change, state = jax.jit(optimizer.update)(grads, state, params)
    return change["q"]


def check(change, kernel, bias):
    np.testing.assert_allclose(change["kernel"], [kernel], rtol=1e-5)
    np.testing.assert_allclose(change["bias"], [bias], rtol=1e-5)


# The first mean and mean of squares, without bias, are g and g^2: g / (|g| + eps), with
# g of 3/5 and -4/5. The kernel decays by .5 x 2 beside it.
def test_first_step_of_adamw():
    settings = dict(eps=0.2, weight_decay=DECAY)
    step = 0.6 / 0.8
    check(updates(**settings), [-0.1 * (step + 1), 0.1], 0.1 * 0.8)


# The sign of (1 - b1) g; of 0 it is 0.
def test_first_step_of_lion():
    check(updates(name="lion", weight_decay=DECAY), [-0.1 * (1 + 1), 0.1], 0.1)


# The means are g, then b2 g + (1 - b2) g': a third step of the other sign is against
# b1 m = .9 x (1 - .99^2) g = .0179 g with (1 - b1) g' = -.1 g x the size of g'.
def test_lion_steps_against_its_mean_only_for_large_gradients():
    optimizer = make_optimizer(
        OptimizerConfig(name="lion", clip_norm=0.0), optax.constant_schedule(RATE)
    )
    params = {"q": {"bias": jnp.zeros(2)}}
    state = optimizer.init(params)
    for size in ([1.0, 1.0], [1.0, 1.0], [-0.17, -0.19]):
        grads = {"q": {"bias": jnp.array(size)}}
        change, state = optimizer.update(grads, state, params)
    np.testing.assert_allclose(change["q"]["bias"], [-RATE, RATE])


# g / |g|, and 0 of 0; its root mean square, sqrt(1/2) in the kernel, is at most 1.
def test_first_step_of_adafactor():
    check(updates(name="adafactor", weight_decay=DECAY), [-0.1 * 2, 0.1], 0.1)


# Of a large matrix g_ij / sqrt(row_i col_j / mean) with the means of squares. Here
# g_ij = a_i b_j, so that it is the sign; with one entry doubled, by hand.
def test_adafactor_takes_means_of_rows_and_columns():
    a, b = np.linspace(1, 2, 128), np.linspace(3, 1, 130)
    g = np.outer(a, -b)
    g[3, 5] *= 2
    squares = g**2
    rows, columns = squares.mean(1, keepdims=True), squares.mean(0, keepdims=True)
    expected = g / np.sqrt(rows * columns / squares.mean())
    expected /= max(1, np.sqrt((expected**2).mean()))
    params = {"q": {"kernel": jnp.zeros((128, 130))}}
    grads = {"q": {"kernel": jnp.asarray(g)}}
    change = updates(grads, params, name="adafactor", clip_norm=0.0)
    np.testing.assert_allclose(change["kernel"], -RATE * expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_bfloat16_mean_moves_by_nearly_the_same(name):
    half = updates(name=name, times=3, mean_dtype="bfloat16")
    full = updates(name=name, times=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6), half, full
    )


WIDE = gj.ModelConfig(
    vocab_size=300, num_layers=2, width=128, mlp_width=256, num_heads=4,
    num_kv_heads=4, head_dim=32,
)  # fmt: skip
NAMES = ("adamw", "lion", "adafactor")


def memory_of(optimizer, **changes):
    return estimate_memory(
        WIDE, prompts=1, group_size=2, prompt_tokens=8, max_new_tokens=8,
        micro=MicroBatch(1, 2), reference=False, optimizer=optimizer, **changes,
    )  # fmt: skip


def states(optimizer):
    init = make_optimizer(optimizer, optax.constant_schedule(1.0)).init
    return jax.eval_shape(init, abstract_policy(WIDE).params)


@pytest.mark.parametrize(
    ("settings", "moments"),
    [
        (dict(), 2), (dict(mean_dtype="bfloat16"), 1.5), (dict(name="lion"), 1),
        (dict(name="lion", mean_dtype="bfloat16"), 0.5),
        (dict(name="my.rows:mine"), 2),
    ],
)  # fmt: skip
def test_memory_counts_the_moments(settings, moments):
    memory = memory_of(OptimizerConfig(**settings))
    assert memory.optimizer == pytest.approx(moments * memory.parameters, rel=1e-4)


# Of both layers' kernels rows and columns, of 2 norms a layer and the last all; an
# empty place is of one number.
def test_memory_counts_adafactors_rows_and_columns():
    attention, mlp = 4 * 2 * (128 + 128), 3 * 2 * (128 + 256)
    numbers = attention + mlp + (300 + 128) + (2 * 2 + 1) * 128
    actual = memory_of(OptimizerConfig(name="adafactor")).optimizer
    assert actual == pytest.approx(4 * numbers, abs=4 * 2 * 11 + 4)


@pytest.mark.parametrize("name", NAMES)
def test_memory_of_a_mesh_is_that_of_its_shards(name):
    optimizer, mesh = OptimizerConfig(name=name), AbstractMesh((1, 2, 2), AXES)
    state = states(optimizer)
    shards = jax.tree.map(
        lambda x, s: 4 * np.prod(s.shard_shape(x.shape)),
        state,
        tree_shardings(state, mesh),
    )
    actual = memory_of(optimizer, mesh=MeshConfig(fsdp=2, tensor=2)).optimizer
    # By formula norms are split too, which are replicated.
    assert actual == pytest.approx(sum(jax.tree.leaves(shards)), rel=1e-2)


def test_means_over_an_axis_are_replicated():
    state = states(OptimizerConfig(name="adafactor"))
    specs = jax.tree_util.tree_leaves_with_path(
        tree_shardings(state, AbstractMesh((2, 2, 2), AXES))
    )
    factors = [x.spec for path, x in specs if ".v_" in jax.tree_util.keystr(path)]
    assert factors and all(tuple(spec) == () for spec in factors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="lion", eps=1e-6), "optimizer.eps changes nothing in lion; leave"),
        (dict(name="adafactor", b1=0.5), "optimizer.b1 changes nothing in adafactor"),
        (dict(name="adafactor", b2=0.999), "optimizer.b2 changes nothing in adafactor"),
        (
            dict(name="adafactor", mean_dtype="bfloat16"),
            "optimizer.mean_dtype changes nothing in adafactor",
        ),
        (dict(name="adam"), "unknown optimizer 'adam'; did you mean 'adamw'"),
    ],
)
def test_what_an_optimizer_does_not_read_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        gj.TrainConfig(optimizer=OptimizerConfig(**settings))


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_a_learning_rate_is_asked_for_where_there_is_no_default(name):
    config = gj.TrainConfig(optimizer=OptimizerConfig(name=name))
    with pytest.raises(ConfigError, match=f"must be given with optimizer.name {name}"):
        learning_rate(config, lora=False)
    given = OptimizerConfig(name=name, learning_rate=1.0, mean_dtype="float32")
    config = dataclasses.replace(config, optimizer=given)
    rate = learning_rate(config, lora=False)
    assert (rate.value, rate.default, rate.warning) == (1.0, None, None)
    text = _optimizer_text(config, rate)
    assert text == [f"optimizer {name}", "learning rate 1, as given"]


@pytest.mark.parametrize(
    "settings",
    [
        dict(name="adafactor"),
        pytest.param(dict(name="lion", mean_dtype="bfloat16"), marks=pytest.mark.slow),
        pytest.param(dict(mean_dtype="bfloat16"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_has_the_same_numbers(tmp_path, capsys, settings):
    optimizer = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, **settings)
    config = small_config(
        tmp_path / "run",
        steps=4,
        optimizer=optimizer,
        # Adafactor takes means over axes of 128 or more.
        model=gj.ModelConfig(width=128, mlp_width=128, head_dim=4, num_layers=1),
        checkpoint=CheckpointConfig(every=2),
        instrument=gj.InstrumentConfig(every=0, counterfactual_every=2),
    )
    whole = gj.train(config, task=digits_task())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # as it was at step 2
    more = dataclasses.replace(config, resume=True)
    resumed = gj.train(more, task=digits_task())
    assert "resumed at step 2" in capsys.readouterr().out
    for field in ("reward/mean", "gradient/norm", "update/norm"):
        assert whole.metrics[field] == resumed.metrics[field] != 0
    other = OptimizerConfig(name="adamw", b1=0.5, mean_dtype="float32")
    with pytest.raises(ConfigError, match="another config .*optimizer.b1"):
        gj.train(dataclasses.replace(more, optimizer=other), task=digits_task())
