"""What may be wrapped in what: the rows of README's table."""

import re
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import grpo_jax as gj

README = (Path(__file__).parents[2] / "README.md").read_text()
P = 4
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(3, P, 5)).astype(np.float32)  # of three batches
REWARDS = RNG.choice([0.0, 1.0], (3, P, 6)).astype(np.float32)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=5), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(2, 2)), jnp.float32),
}
RULE = gj.std_weights()


def losses(params, inputs):
    return jnp.tanh(inputs @ params["w"]) * params["b"].sum()


by_pull_back = gj.weighted_value_and_grad(losses, RULE)


def weights_first(inner):
    return optax.chain(gj.scale_by_prompt_weights(RULE), gj.mean_over_prompts(), inner)


def steps(tx, grads_of, **more):
    """Parameters after the three batches; `more` of a batch goes to tx.update."""

    @jax.jit
    def step(params, state, i):
        grads = grads_of(params, i)
        batch = {name: values[i] for name, values in more.items()}
        updates, state = tx.update(grads, state, params, **batch)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, jax.jit(tx.init)(PARAMS)
    for i in range(3):
        params, state = step(params, state, i)
    return params


def pulled_back(params, i):
    return by_pull_back(
        params, jnp.asarray(INPUTS)[i], rewards=jnp.asarray(REWARDS)[i]
    )[1]


def per_prompt(params, i):
    return jax.jacrev(losses)(params, jnp.asarray(INPUTS)[i])


LABELS = {"w": "trained", "b": "other"}
WITHOUT_AXIS = (ValueError, r"put wrappers such as optax\.MultiSteps after that")
MASKED = (ValueError, r"must see every parameter, .*put optax\.masked or multi_transf")
# Name: (the wrapper, the error where it is around the weights in place of after them).
WRAPPERS = {
    "MultiSteps": (partial(optax.MultiSteps, every_k_schedule=2), WITHOUT_AXIS),
    # jax's own: of parameters [5] an update, or zeros [4, 5].
    "apply_if_finite": (
        partial(optax.apply_if_finite, max_consecutive_errors=3),
        (TypeError, r"cond branches must have equal output types"),
    ),
    "masked": (
        lambda tx: optax.chain(
            optax.masked(tx, {"w": True, "b": False}),
            optax.masked(optax.set_to_zero(), {"w": False, "b": True}),
        ),
        MASKED,
    ),
    "multi_transform": (
        lambda tx: optax.multi_transform(
            {"trained": tx, "other": optax.set_to_zero()}, LABELS
        ),
        MASKED,
    ),
    "inject_hyperparams": (
        lambda tx: optax.inject_hyperparams(
            lambda factor: optax.chain(tx, optax.scale(factor))
        )(optax.linear_schedule(1.0, 2.0, 3)),
        None,
    ),
    "schedule_free": (
        partial(optax.contrib.schedule_free, learning_rate=0.1, b1=0.9),
        None,
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_of_the_optimizer(name):
    """Of gradients by the pull-back, or behind the weights in a chain: the same."""
    wrapper, error = WRAPPERS[name]
    rewards = jnp.asarray(REWARDS)
    expected = steps(wrapper(optax.sgd(1.0)), pulled_back)
    after = weights_first(wrapper(optax.sgd(1.0)))
    actual = steps(after, per_prompt, rewards=rewards)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected["w"] - PARAMS["w"]).max() > 0.01
    around = wrapper(weights_first(optax.sgd(1.0)))
    if error is not None:
        with pytest.raises(error[0], match=error[1]):
            steps(around, per_prompt, rewards=rewards)
    else:
        actual = steps(around, per_prompt, rewards=rewards)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_multi_steps_of_two_halves_is_the_whole():
    """Whose inner update is made once; MultiSteps has it from the mean of both."""
    halves = [(INPUTS[0][i : i + 2], REWARDS[0][i : i + 2]) for i in (0, 2)]
    tx = optax.MultiSteps(optax.adam(0.1), 2)
    params, state = PARAMS, tx.init(PARAMS)
    for inputs, rewards in halves:
        _, grads, _ = by_pull_back(PARAMS, inputs, rewards=rewards)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    tx = optax.adam(0.1)
    grads = pulled_back(PARAMS, 0)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    expected = optax.apply_updates(PARAMS, updates)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_parts_of_the_parameters_have_rules_of_their_own():
    """Weights inside multi_transform, the mean after it: std for w, none for b."""
    rules = {
        "trained": gj.scale_by_prompt_weights(gj.std_weights()),
        "other": gj.scale_by_prompt_weights(gj.unit_weights()),
    }
    tx = optax.chain(optax.multi_transform(rules, LABELS), gj.mean_over_prompts())
    grads = per_prompt(PARAMS, 0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), rewards=REWARDS[0])
    expected = pulled_back(PARAMS, 0) | {"b": grads["b"].mean(0)}
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


def test_a_number_of_a_rule_may_be_traced():
    """As `inject_hyperparams` has it, a schedule of eps for instance."""

    @jax.jit
    def grads_at(eps):
        f = gj.weighted_value_and_grad(losses, gj.std_weights(eps=eps))
        return f(PARAMS, INPUTS[0], rewards=REWARDS[0])[1]

    f = gj.weighted_value_and_grad(losses, gj.std_weights(eps=0.5))
    expected = f(PARAMS, INPUTS[0], rewards=REWARDS[0])[1]
    chex.assert_trees_all_close(grads_at(0.5), expected, rtol=1e-5)


def test_flax_train_state():
    state = TrainState.create(apply_fn=losses, params=PARAMS, tx=optax.sgd(1.0))
    step = jax.jit(lambda s, i: s.apply_gradients(grads=pulled_back(s.params, i)))
    for i in range(3):
        state = step(state, i)
    expected = steps(optax.sgd(1.0), pulled_back)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-6)
    tx = weights_first(optax.sgd(1.0))
    state = TrainState.create(apply_fn=losses, params=PARAMS, tx=tx)
    with pytest.raises(ValueError, match="as flax's TrainState does, take the gradie"):
        state.apply_gradients(grads=per_prompt(PARAMS, 0))


def test_flax_nnx_optimizer():
    """Both forms: its `update` hands rewards on."""

    def losses_of(model, inputs):
        return jnp.tanh(model(inputs)[:, 0])

    def trained(tx, form):
        model = nnx.Linear(5, 1, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def functional(params, inputs):
            return losses_of(nnx.merge(graph, params, rest), inputs)

        if form == "pull_back":
            f = gj.weighted_value_and_grad(functional, RULE)
            optimizer.update(model, f(params, INPUTS[0], rewards=REWARDS[0])[1])
        else:
            grads = jax.jacrev(functional)(params, INPUTS[0])
            optimizer.update(model, grads, rewards=REWARDS[0])
        return nnx.state(model, nnx.Param)

    actual = trained(optax.sgd(1.0), "pull_back")
    expected = trained(weights_first(optax.sgd(1.0)), "per_prompt")
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_readme_has_a_row_for_each():
    table = README[README.index("| wrapped in |") :].split("\n\n")[0]
    named = re.findall(r"`(?:optax\.|contrib\.|nnx\.)*(\w+)`", table)
    assert {*WRAPPERS, "TrainState", "Optimizer"} <= set(named)
