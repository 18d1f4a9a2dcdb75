from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import (
    PromptWeights,
    mean_over_prompts,
    scale_by_group_std,
    scale_by_prompt_weights,
    std_weights,
    unit_weights,
)

REWARDS = np.array([[0, 4], [0.35, 0.35]], np.float32)  # std 2, and tied


def weights_of(rule, rewards=REWARDS):
    return jax.jit(lambda r: rule.weights(r, rule.init())[0])(rewards)


@pytest.mark.parametrize(("power", "expected"), [(0, 1), (1, 1 / 2), (2, 1 / 4)])
def test_std_weights(power, expected):
    actual = weights_of(std_weights(eps=0.0, power=power))
    np.testing.assert_allclose(actual, [expected, 0], rtol=1e-6)


def test_eps_is_added_before_the_power():
    actual = weights_of(std_weights(eps=2.0, power=2))
    np.testing.assert_allclose(actual, [1 / 16, 0], rtol=1e-6)


def test_ddof_one_divides_by_the_sample_std():
    actual = weights_of(std_weights(eps=0.0, ddof=1))
    np.testing.assert_allclose(actual, [8**-0.5, 0], rtol=1e-6)


def test_unit_weights():
    np.testing.assert_array_equal(weights_of(unit_weights()), [1, 1])


def test_eps_must_not_be_negative():
    with pytest.raises(ValueError, match="eps must not be negative, got -0.1"):
        std_weights(eps=-0.1)


# Weights (1/2, 0): mean over two prompts of (1/2 * [4, 8], 0) is [1, 2]; sgd negates.
def test_chained_with_an_optimizer():
    params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    grads = {"w": np.array([[4, 8], [5, 5]], np.float32), "b": np.float32([12, 1])}
    tx = optax.chain(scale_by_group_std(eps=0.0), mean_over_prompts(), optax.sgd(1.0))
    update = jax.jit(lambda g, s: tx.update(g, s, params, rewards=REWARDS))
    updates, _ = update(grads, tx.init(params))
    np.testing.assert_allclose(updates["w"], [-1, -2], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -3, rtol=1e-6)


def test_the_prompt_axis_stays_and_so_does_the_dtype():
    tx = scale_by_group_std(eps=0.0)
    grads = {"w": jnp.ones((2, 3, 4), jnp.bfloat16)}
    updates, _ = jax.jit(partial(tx.update, rewards=REWARDS))(grads, tx.init(grads))
    assert updates["w"].shape == (2, 3, 4) and updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["w"][:, 0, 0].astype(np.float32), [0.5, 0])


@pytest.mark.parametrize("shape", [(), (3,), (1, 2)])
def test_a_gradient_without_the_prompt_axis_is_refused(shape):
    tx = scale_by_group_std()
    grads = {"layer": {"kernel": np.zeros(shape, np.float32)}}
    message = (
        r"gradient \['layer'\]\['kernel'\] must be \[2, \*param_shape\], one per "
        r"prompt, got \(.*\); differentiate the \[P\] losses"
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(partial(tx.update, rewards=REWARDS))(grads, tx.init(grads))


def test_a_rule_of_ones_own_keeps_its_state():
    counting = PromptWeights(
        init=lambda: jnp.zeros(()),
        weights=lambda rewards, n: (jnp.full(rewards.shape[:1], n), n + 1),
    )
    tx = optax.chain(scale_by_prompt_weights(counting), mean_over_prompts())
    update = jax.jit(partial(tx.update, rewards=REWARDS))
    grads, state = np.float32([2, 4]), tx.init(jnp.zeros(()))
    for expected in (0, 3, 6):
        updates, state = update(grads, state)
        np.testing.assert_allclose(updates, expected)


def test_rewards_are_a_required_keyword():
    tx = scale_by_group_std()
    with pytest.raises(TypeError, match="rewards"):
        tx.update(np.float32([1, 2]), tx.init(np.float32(0)))
