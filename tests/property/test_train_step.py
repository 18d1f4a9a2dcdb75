"""The update's gradient, on a model, under everything that must not change it."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax as gj
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.training.state import Batch
from tests.helpers import (
    assert_gradients_close,
    one_update,
    random_rollouts,
    tiny_policy,
    train_step,
    weighed,
)

P, G, T = 4, 6, 7

SLOW = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
    """Flax's own layers broadcast: strictness is for the maths layer's tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


def full_batch(policy, objective, seed=0):
    rollouts = random_rollouts(policy, P, G, tokens=T, seed=seed)
    rollouts = rollouts._replace(rewards=rollouts.rewards.at[0, 1].set(jnp.nan))
    other = tiny_policy(seed=5)
    reference = gj.completion_logprobs(other, rollouts)
    reference = reference if objective.kl_coef else None
    return weighed(objective, rollouts, None, reference)


def gradient(policy, objective, batch, micro=MicroBatch(P, G)):  # noqa: B008
    """Gradients as an SGD step of rate 1 applies them."""
    state, metrics = one_update(policy, objective, batch, micro, optax.sgd(1.0), T)
    changes = jax.tree.map(jnp.subtract, policy.params, state.params)
    return changes, metrics


@pytest.mark.parametrize("name", ["grpo", SLOW("rloo")])
def test_step_is_the_gradient_of_policy_loss(name):
    objective, policy = gj.OBJECTIVES[name], tiny_policy()
    batch = full_batch(policy, objective)
    r = batch.rollouts

    def loss(params):
        logprobs = batch_logprobs(policy.replace(params), r, 1.0, MicroBatch(P, G))
        sampled = r.behaviour_logprobs if objective.kl_in == "reward" else logprobs
        return gj.policy_loss(
            objective,
            logprobs=logprobs,
            behaviour_logprobs=jax.lax.stop_gradient(sampled),
            rewards=r.rewards,
            completion_mask=r.completion_mask,
            reference_logprobs=batch.reference_logprobs,
            max_length=T,
        )[0]

    expected = jax.jit(jax.grad(loss))(policy.params)
    assert_gradients_close(gradient(policy, objective, batch)[0], expected)


@pytest.mark.parametrize(
    ("name", "micro"),
    [
        ("grpo", (1, 3)),
        SLOW("grpo", (2, 6)),
        ("rloo", (4, 2)),
        SLOW("dr_grpo", (1, 6)),
    ],
)
def test_any_micro_batch_split_gives_the_same_gradient(name, micro):
    objective, policy = gj.OBJECTIVES[name], tiny_policy()
    batch = full_batch(policy, objective)
    expected, metrics = gradient(policy, objective, batch)
    actual, split_metrics = gradient(policy, objective, batch, MicroBatch(*micro))
    assert_gradients_close(actual, expected)
    chex.assert_trees_all_close(split_metrics, metrics, rtol=1e-4, atol=1e-5)


def test_permuting_prompts_changes_no_gradient():
    objective, policy = gj.OBJECTIVES["grpo"], tiny_policy()
    batch = full_batch(policy, objective)
    order = np.array([2, 0, 3, 1])
    permuted = jax.tree.map(lambda x: x[order], batch)
    expected, _ = gradient(policy, objective, batch)
    assert_gradients_close(gradient(policy, objective, permuted)[0], expected)


def test_padding_of_prompts_and_completions_changes_no_gradient():
    """Three more columns on either side of the prompts and after the completions."""
    objective, policy = gj.OBJECTIVES["dr_grpo"], tiny_policy()
    batch = full_batch(policy, objective)
    r = batch.rollouts
    around, after = ((0, 0), (2, 3)), ((0, 0), (0, 0), (0, 3))
    padded = gj.Rollouts(
        jnp.pad(r.prompts, around, constant_values=7),
        jnp.pad(r.prompt_mask, around),
        jnp.pad(r.completions, after, constant_values=9),
        jnp.pad(r.completion_mask, after),
        jnp.pad(r.behaviour_logprobs, after),
        r.rewards,
    )
    expected, _ = gradient(policy, objective, batch)
    assert_gradients_close(
        gradient(policy, objective, weighed(objective, padded))[0], expected
    )


@pytest.mark.slow
def test_remat_changes_no_gradient():
    objective, policy = gj.OBJECTIVES["grpo"], tiny_policy()
    objective = dataclasses.replace(objective, kl_coef=0.0)
    batch = full_batch(policy, objective)
    expected, _ = gradient(policy, objective, batch)
    for remat in ("none", "dots"):
        other = tiny_policy(remat=remat)
        assert_gradients_close(gradient(other, objective, batch)[0], expected)


def test_on_policy_ratio_is_exactly_one():
    objective, policy = gj.OBJECTIVES["grpo"], tiny_policy()
    _, metrics = gradient(policy, objective, full_batch(policy, objective))
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["ratio/clipped"] == 0
    assert metrics["mismatch/max_abs"] < 1e-5


def test_old_logprobs_of_the_same_policy_give_the_on_policy_gradient():
    objective, policy = gj.OBJECTIVES["grpo"], tiny_policy()
    batch = full_batch(policy, objective)
    expected, _ = gradient(policy, objective, batch)
    old = gj.completion_logprobs(policy, batch.rollouts)
    actual, _ = gradient(policy, objective, batch._replace(old_logprobs=old))
    assert_gradients_close(actual, expected)


def test_a_non_finite_gradient_changes_nothing_but_the_count():
    objective, policy = gj.OBJECTIVES["reinforce"], tiny_policy()
    batch = full_batch(policy, objective)
    rollouts = batch.rollouts
    huge = rollouts._replace(rewards=rollouts.rewards * 3e38)
    state, metrics = one_update(
        policy, objective, weighed(objective, huge), MicroBatch(P, G)
    )
    chex.assert_trees_all_equal(state.params, policy.params)
    assert state.skipped_in_a_row == 1 and state.updates == 0
    assert not np.isfinite(metrics["gradient/norm"]) and metrics["update/norm"] == 0


@pytest.fixture
def optimized():
    """Programs as a run compiles them, not as the rest of the suite does."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_doubling_the_vocabulary_costs_no_more_than_its_weights():
    """Temp memory of an update from V = 32k to 64k: the weights' gradient, doubled by
    the optimizer's own temporaries, and no logits."""
    objective = gj.OBJECTIVES["dr_grpo"]

    def temp_bytes(vocab_size):
        config = dataclasses.replace(
            tiny_policy().config, vocab_size=vocab_size, width=64
        )
        policy = jax.eval_shape(lambda: gj.init_policy(config, jax.random.key(0)))
        shape = jax.ShapeDtypeStruct
        ids, floats = (shape((4, 8, 128), x) for x in (jnp.int32, jnp.float32))
        prompts, rewards = shape((4, 16), jnp.int32), shape((4, 8), jnp.float32)
        rollouts = gj.Rollouts(prompts, prompts, ids, ids, floats, rewards)
        batch = Batch(rollouts, rollouts.rewards, shape((4,), jnp.float32))
        step, init = train_step(policy, objective, MicroBatch(4, 8), max_length=128)
        state = jax.eval_shape(init, policy.params)
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
        compiled = lowered.compile({"xla_cpu_use_fusion_emitters": True})
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(2**15), temp_bytes(2**16)
    weights = 64 * 2**15 * 4  # the added [D, V] in bytes
    logits = 4 * 8 * 128 * 2**15 * 4  # what [P, G, T, V] logits would add
    assert large - small <= 2.2 * weights < logits / 20
