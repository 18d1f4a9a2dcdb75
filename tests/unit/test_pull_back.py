"""`weighted_value_and_grad`: the [P, ...] form at the memory of one gradient."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import grpo_jax as gj
from grpo_jax.preconditioner import stateless

P, G, D = 6, 4, 3
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(P, D)).astype(np.float32)
REWARDS = np.float32([[k >= n for n in range(G)] for k in (0, 1, 2, 3, 1, 0)])
PARAMS = {"w": RNG.normal(size=D).astype(np.float32), "b": np.float32(0.5)}
RULES = {
    "unit": gj.unit_weights(),
    "std": gj.std_weights(),
    "std_scheduled": gj.std_weights(power=optax.linear_schedule(0.0, 2.0, 2)),
    "batch_std": gj.batch_std_weights(),
    "beta": gj.beta_weights(),
    "posterior": gj.posterior_weights(9),
}


def losses(params, inputs):
    return jnp.sin(inputs @ params["w"] + params["b"]) * params["b"]


def by_definition(rule, params, state, **rewards):
    """(value, grads, state) by per-prompt gradients and a chain of transforms."""
    tx = optax.chain(gj.scale_by_prompt_weights(rule), gj.mean_over_prompts())
    first, second = tx.init(params)
    first = first._replace(weights_state=state)
    grads = jax.jacrev(losses)(params, INPUTS)
    grads, (first, _) = tx.update(grads, (first, second), **rewards)
    weights, _ = gj.apply_weights(
        rule, rewards["rewards"], state, rewards["prompt_ids"]
    )
    return (weights * losses(params, INPUTS)).mean(), grads, first.weights_state


@pytest.mark.parametrize("micro_batches", [1, 2, 6])
@pytest.mark.parametrize("name", RULES)
def test_it_is_the_definition_with_the_state_carried(name, micro_batches):
    rule, ids = RULES[name], np.int32([8, 0, 3, 5, 1, 2])
    f = gj.weighted_value_and_grad(losses, rule, micro_batches=micro_batches)
    actual_state, expected_state = None, rule.init()
    for rewards in (REWARDS, 1 - REWARDS[::-1]):
        more = dict(rewards=rewards, prompt_ids=ids)
        actual = jax.jit(f)(PARAMS, INPUTS, state=actual_state, **more)
        expected = by_definition(rule, PARAMS, expected_state, **more)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
        actual_state, expected_state = actual[2], expected[2]


def test_grads_are_the_gradient_of_value_with_constant_weights():
    f = gj.weighted_value_and_grad(losses, gj.std_weights())
    value, grads, _ = jax.jit(f)(PARAMS, INPUTS, rewards=REWARDS)
    weights, _ = gj.apply_weights(gj.std_weights(), REWARDS, ())
    expected = jax.value_and_grad(lambda p: (weights * losses(p, INPUTS)).mean())
    chex.assert_trees_all_close((value, grads), expected(PARAMS), rtol=1e-5)


def test_aux_is_where_value_and_grad_has_it():
    def with_aux(params, inputs):
        out = losses(params, inputs)
        return out, {"losses": out, "constant": jnp.float32(2)}

    ordinary = jax.value_and_grad(
        lambda p: (with_aux(p, INPUTS)[0].mean(), with_aux(p, INPUTS)[1]), has_aux=True
    )
    make = partial(gj.weighted_value_and_grad, with_aux, gj.unit_weights())
    one, parts = (jax.jit(make(has_aux=True, micro_batches=n)) for n in (1, 3))
    *same, _ = one(PARAMS, INPUTS, rewards=REWARDS)
    chex.assert_trees_all_close(tuple(same), ordinary(PARAMS), rtol=1e-5)
    (value, aux), grads, _ = parts(PARAMS, INPUTS, rewards=REWARDS)
    chex.assert_trees_all_close((value, grads), (same[0][0], same[1]), rtol=1e-5)
    expected = same[0][1]["losses"].reshape(3, 2)
    np.testing.assert_allclose(aux["losses"], expected, rtol=1e-6)
    np.testing.assert_array_equal(aux["constant"], [2, 2, 2])


def test_parts_of_the_prompts_one_by_one_are_exact_for_rules_of_one_group():
    """As `optax.MultiSteps` accumulates them; the batch's std is that of the parts."""
    for name, exact in (("std", True), ("batch_std", False)):
        f = jax.jit(gj.weighted_value_and_grad(losses, RULES[name]))
        parts = [
            f(PARAMS, INPUTS[i : i + 2], rewards=REWARDS[i : i + 2]) for i in (0, 2, 4)
        ]
        mean = jax.tree.map(lambda *x: sum(x) / 3, *(x[1] for x in parts))
        whole = f(PARAMS, INPUTS, rewards=REWARDS)[1]
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), mean, whole)
        assert bool(max(jax.tree.leaves(gaps)) < 1e-6) is exact


def test_weights_once_and_losses_with_a_penalty_that_they_do_not_multiply():
    """What its module says to do for KL: the same gradient, and the penalty's."""

    def penalty(params):
        return (INPUTS @ params["w"]) ** 2

    weights, _ = gj.apply_weights(gj.std_weights(), REWARDS, ())
    both = jax.grad(lambda p: (weights * losses(p, INPUTS) + penalty(p)).mean())(PARAMS)
    f = gj.weighted_value_and_grad(losses, gj.std_weights())
    _, grads, _ = f(PARAMS, INPUTS, rewards=REWARDS)
    expected = jax.tree.map(
        jnp.add, grads, jax.grad(lambda p: penalty(p).mean())(PARAMS)
    )
    chex.assert_trees_all_close(both, expected, rtol=1e-4)


# ---- transformations of jax


def test_it_is_traced_once_and_everything_may_be_donated():
    rule = gj.posterior_weights(9)
    f = gj.weighted_value_and_grad(chex.assert_max_traces(losses, 1), rule)
    tx = optax.adam(0.1)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, opt_state, state, rewards):
        ids = jnp.arange(P)
        _, grads, state = f(
            params, INPUTS, rewards=rewards, state=state, prompt_ids=ids
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    params = jax.tree.map(jnp.asarray, PARAMS)
    carried = params, tx.init(params), rule.init()
    given = jax.tree.leaves(carried)
    for _ in range(3):
        carried = step(*carried, REWARDS)
    assert all(x.is_deleted() for x in given)
    assert np.abs(carried[0]["w"] - PARAMS["w"]).max() > 0.01
    assert carried[2].count == 3


@pytest.mark.parametrize("name", ["std", "batch_std", "posterior"])
def test_a_named_axis_is_the_global_batch(name):
    """Of vmap here, of pmap and of shard_map (next test) likewise."""
    f = gj.weighted_value_and_grad(losses, RULES[name])
    ids = np.arange(P)

    def local(inputs, rewards, ids):
        return f(PARAMS, inputs, rewards=rewards, prompt_ids=ids, axis_name="data")

    split = [x.reshape(3, 2, *x.shape[1:]) for x in (INPUTS, REWARDS, ids)]
    actual = jax.jit(jax.vmap(local, axis_name="data"))(*split)
    expected = f(PARAMS, INPUTS, rewards=REWARDS, prompt_ids=ids)
    expected = jax.tree.map(lambda x: jnp.stack([x] * 3), expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_shards_of_prompts_and_of_parameters_give_the_global_batch():
    root = str(Path(__file__).parents[2])
    output = subprocess.check_output(
        [sys.executable, "-m", "tests.unit.pull_back_on_devices"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
        text=True,
    )
    gaps = json.loads(output.splitlines()[-1])
    assert len(gaps) == 12 and max(gaps.values()) < 1e-6, gaps


def test_memory_is_that_of_one_gradient(monkeypatch):
    """16 prompts: jacrev holds 16 copies of the parameters, the pull-back few."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments/benchmarks")
    import pull_back

    megabytes = pull_back.main(prompts=16, width=128)
    parameters = 4 * (2 * 1024 * 128 + 128**2) / 1e6
    definition, whole, parts, whitened = megabytes.values()
    assert definition > 16 * parameters and whole < definition / 4
    assert parts < whole and whole < 1.1 * whitened


def test_low_precision_parameters_have_such_gradients_and_a_float32_value():
    def in_bfloat16(params, inputs):
        return losses(params, inputs.astype(jnp.bfloat16))

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    f = gj.weighted_value_and_grad(in_bfloat16, gj.std_weights())
    value, grads, _ = jax.jit(f)(params, INPUTS, rewards=REWARDS)
    assert value.dtype == np.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    expected = gj.weighted_value_and_grad(losses, gj.std_weights())
    _, expected, _ = expected(PARAMS, INPUTS, rewards=REWARDS)
    chex.assert_trees_all_close(jax.tree.map(np.float32, grads), expected, atol=0.05)


# ---- any tree of parameters


def check_model(params, apply):
    """The gradient by params, of `apply(params, inputs)` -> [P], against jax.grad."""
    f = gj.weighted_value_and_grad(apply, gj.std_weights())
    weights, _ = gj.apply_weights(gj.std_weights(), REWARDS, ())
    _, grads, _ = jax.jit(f)(params, INPUTS, rewards=REWARDS)
    expected = jax.grad(lambda p: (weights * apply(p, INPUTS)).mean())(params)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(grads)) > 0.01
    tx = optax.adamw(0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    changed = optax.apply_updates(params, updates)
    assert jax.tree.structure(changed) == jax.tree.structure(params)


def test_parameters_of_flax_linen():
    model = linen.Dense(1)
    params = model.init(jax.random.key(0), INPUTS)
    check_model(params, lambda params, x: model.apply(params, x)[:, 0])


def test_parameters_of_flax_nnx():
    graph, params, rest = nnx.split(nnx.Linear(D, 1, rngs=nnx.Rngs(0)), nnx.Param, ...)
    check_model(params, lambda params, x: nnx.merge(graph, params, rest)(x)[:, 0])


def test_a_module_of_flax_nnx_as_it_is():
    """Counts and keys of its random streams are constants."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, 1, rngs=rngs)
            self.dropout = nnx.Dropout(0.0, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.linear(x))[:, 0]

    model, weights = Model(nnx.Rngs(0)), gj.inverse_std(REWARDS)
    f = gj.weighted_value_and_grad(lambda model, x: model(x), gj.std_weights())
    _, grads, _ = nnx.jit(f)(model, INPUTS, rewards=REWARDS)
    expected = nnx.grad(lambda model: (weights * model(INPUTS)).mean())(model)
    actual = nnx.state(grads, nnx.Param)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param).update(model, actual)


def test_parameters_of_haiku():
    haiku = pytest.importorskip("haiku")
    model = haiku.without_apply_rng(haiku.transform(lambda x: haiku.Linear(1)(x)))
    params = model.init(jax.random.key(0), INPUTS)
    check_model(params, lambda params, x: model.apply(params, x)[:, 0])


def test_a_module_of_equinox_as_it_is():
    """Functions, integers and Python's floats are constants, as in `filter_grad`."""
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0))
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(D, 5, key=keys[0]),
            eqx.nn.Lambda(jax.nn.tanh),
            eqx.nn.Dropout(0.0),
            eqx.nn.Linear(5, "scalar", key=keys[1]),
        ]
    )
    weights, _ = gj.apply_weights(gj.std_weights(), REWARDS, ())

    def apply(model, inputs):
        return jax.vmap(model)(inputs)

    f = gj.weighted_value_and_grad(apply, gj.std_weights())
    _, grads, _ = eqx.filter_jit(f)(model, INPUTS, rewards=REWARDS)
    expected = eqx.filter_grad(lambda m: (weights * apply(m, INPUTS)).mean())(model)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)
    eqx.apply_updates(model, grads)


def test_leaves_that_are_not_arrays_of_floats_are_constants():
    params = PARAMS | {"count": 3, "steps": np.int32([2]), "act": jnp.tanh, "rate": 0.5}

    def apply(params, inputs):
        assert params["count"] == 3 and params["rate"] == 0.5
        return params["act"](losses(params, inputs)) * params["steps"]

    f = gj.weighted_value_and_grad(apply, gj.std_weights())
    _, grads, _ = f(params, INPUTS, rewards=REWARDS)
    assert {name for name, x in grads.items() if x is not None} == {"w", "b"}


# ---- what it says of bad input


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, x: losses(p, x).mean(), r"return \[6\] .*got \(\).*not their mean"),
        (
            lambda p, x: x * p["b"],
            r"return \[6\] .*got \(6, 3\).*mean over its samples",
        ),
        (lambda p, x: losses(p, x)[:4], r"got \(4,\) float32; its prompts must be"),
        (lambda p, x: losses(p, x) > 0, r"\[6\] floats, .* got \(6,\) bool"),
        (lambda p, x: (losses(p, x), 0), "one array .*got a tuple.*has_aux=True"),
    ],
)
def test_losses_are_one_per_prompt(function, message):
    f = gj.weighted_value_and_grad(function, gj.std_weights())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        jax.jit(f)(PARAMS, INPUTS, rewards=REWARDS)


def test_aux_is_the_second_of_two():
    f = gj.weighted_value_and_grad(losses, gj.std_weights(), has_aux=True)
    with pytest.raises(ValueError, match=r"return \(\[P\] losses, aux\) with has_aux"):
        f(PARAMS, INPUTS, rewards=REWARDS)


@pytest.mark.parametrize("wrong", [None, np.ones(3), "grpo"])
def test_losses_are_a_function_with_an_example(wrong):
    with pytest.raises(ValueError, match=r"(?s)must be a function .*\n +losses = .*\n"):
        gj.weighted_value_and_grad(wrong, gj.std_weights())


@pytest.mark.parametrize("wrong", ["std", gj.std_weights, None])
def test_a_rule_is_one_with_an_example(wrong):
    message = (
        r"(?s)rule must be PromptWeights, got .*\n +rule = gj\.std_weights\(\).*\n"
    )
    with pytest.raises(ValueError, match=message):
        gj.weighted_value_and_grad(losses, wrong)
    with pytest.raises(ValueError, match=message):
        gj.apply_weights(wrong, REWARDS, ())


def test_the_weights_of_a_rule_are_one_per_prompt():
    f = gj.weighted_value_and_grad(losses, stateless(lambda r: r))
    with pytest.raises(
        ValueError, match=r"must be \[6\], one per prompt, got \(6, 4\)"
    ):
        f(PARAMS, INPUTS, rewards=REWARDS)


@pytest.mark.parametrize("state", [(), {"count": 0}, np.float32(0)])
def test_the_state_is_that_of_the_rule(state):
    f = gj.weighted_value_and_grad(losses, gj.posterior_weights(9))
    with pytest.raises(ValueError, match="what the last call returned, or None"):
        f(PARAMS, INPUTS, rewards=REWARDS, state=state, prompt_ids=np.arange(P))


def test_ids_are_needed_by_rules_that_remember():
    f = gj.weighted_value_and_grad(losses, gj.posterior_weights(9))
    with pytest.raises(ValueError, match=r"prompt_ids must be \[6\], one per prompt"):
        f(PARAMS, INPUTS, rewards=REWARDS)


@pytest.mark.parametrize("params", [{}, {"w": 1.0, "n": 2}, np.arange(3)])
def test_something_is_to_be_differentiated(params):
    f = gj.weighted_value_and_grad(lambda p, x: x[:, 0], gj.std_weights())
    with pytest.raises(ValueError, match="params must have arrays of floats, got"):
        f(params, INPUTS, rewards=REWARDS)


def test_micro_batches_divide_the_prompts_and_all_that_is_given():
    make = partial(gj.weighted_value_and_grad, losses, gj.std_weights())
    with pytest.raises(ValueError, match="must divide the 6 prompts, got 4"):
        make(micro_batches=4)(PARAMS, INPUTS, rewards=REWARDS)
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        make(micro_batches=0)
    f = gj.weighted_value_and_grad(
        lambda params, batch: batch["t"] * losses(params, batch["x"]),
        gj.std_weights(),
        micro_batches=2,
    )
    message = r"argument \[0\]\['t'\] must be \[6, \.\.\.\].*got \(\); let losses close"
    with pytest.raises(ValueError, match=message):
        f(PARAMS, {"x": INPUTS, "t": 0.5}, rewards=REWARDS)


def test_losses_that_close_over_prompts_are_told_that_they_get_a_part():
    f = gj.weighted_value_and_grad(
        lambda params, inputs: (inputs @ params["w"]) * INPUTS[:, 0],
        gj.std_weights(),
        micro_batches=2,
    )
    with pytest.raises(Exception, match="incompatible shapes") as raised:
        jax.jit(f)(PARAMS, INPUTS, rewards=REWARDS)
    note = raised.value.__notes__[0]
    assert note.startswith(
        "With micro_batches, losses get 3 of the 6 prompts at a time"
    )
    with pytest.raises(Exception) as raised:
        gj.weighted_value_and_grad(lambda params: 1 / 0, gj.std_weights())(
            PARAMS, rewards=REWARDS
        )
    assert "micro_batches" not in "".join(getattr(raised.value, "__notes__", []))


@pytest.mark.parametrize("ids", [list("abcdef"), np.array(list("abcdef")), [0.5] * P])
def test_prompt_ids_are_integers(ids):
    with pytest.raises(ValueError, match=r"prompt_ids must be integers, got (<U1|flo)"):
        gj.apply_weights(gj.posterior_weights(9), REWARDS, None, ids)


def test_traced_prompt_ids_are_integers():
    weigh = jax.jit(lambda x: gj.apply_weights(RULES["posterior"], REWARDS, None, x))
    with pytest.raises(ValueError, match="prompt_ids must be integers, got float32; g"):
        weigh(jnp.zeros(P))
