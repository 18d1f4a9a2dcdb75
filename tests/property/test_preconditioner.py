"""GRPO's division by std, three equal ways, on the library's own losses."""

import dataclasses
import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax as gj
from grpo_jax.preconditioner import apply_weights
from grpo_jax.training.weighing import weigh

P, G, T, V, D = 5, 4, 6, 7, 3


def problem(dtype):
    """A softmax policy, ragged completions, and rewards with a tied group and a gap."""
    rng = np.random.default_rng(0)
    params = {
        "hidden": rng.normal(size=(P, G, T, D)).astype(dtype),
        "unembedding": rng.normal(size=(D, V)).astype(dtype),
    }
    rewards = rng.choice([0.0, 0.25, 1.0], size=(P, G)).astype(dtype)
    rewards[1] = 0.35  # tied
    rewards[3, 0] = np.nan  # missing
    lengths = rng.integers(1, T + 1, size=(P, G))
    arrays = dict(
        rewards=jnp.asarray(rewards),
        completion_mask=jnp.asarray(np.arange(T) < lengths[..., None], dtype),
    )
    tokens = jnp.asarray(rng.integers(V, size=(P, G, T)))
    return params, tokens, arrays


def extras(dtype=np.float32):
    """What some objectives need beside the log-probs and rewards."""
    rng = np.random.default_rng(7)
    return dict(
        entropy=jnp.asarray(rng.uniform(0.2, 0.6, (P, G, T)), dtype),
        token_weights=jnp.asarray(rng.uniform(0.5, 2.0, (P, G, T)), dtype),
        token_ids=jnp.asarray(rng.integers(V, size=(P, G, T))),
    )


def losses_fn(objective, tokens, arrays, behaviour):
    def losses(params):
        logprobs = gj.token_logprobs(params["hidden"], params["unembedding"], tokens)
        return gj.per_prompt_losses(
            objective, logprobs=logprobs, behaviour_logprobs=behaviour, **arrays
        )[0]

    return losses


def three_forms(objective, dtype):
    """Gradients of the same batch: whitened advantages, optax transform, cotangent."""
    params, tokens, arrays = problem(dtype)
    on_policy = gj.token_logprobs(params["hidden"], params["unembedding"], tokens)
    behaviour = on_policy + 0.3 * np.sin(np.arange(T, dtype=dtype))[None, None]
    plain = losses_fn(
        dataclasses.replace(objective, scale="none"), tokens, arrays, behaviour
    )

    whitened = losses_fn(
        dataclasses.replace(objective, scale="std"), tokens, arrays, behaviour
    )
    first = jax.jit(jax.grad(lambda params: whitened(params).mean()))(params)

    transform = optax.chain(gj.scale_by_group_std(), gj.mean_over_prompts())
    per_prompt = jax.jit(jax.jacrev(plain))(params)
    second, _ = jax.jit(transform.update)(
        per_prompt, transform.init(params), rewards=arrays["rewards"]
    )

    _, pull_back = jax.vjp(plain, params)
    (third,) = jax.jit(pull_back)(gj.inverse_std(arrays["rewards"]) / P)
    return first, second, third


@pytest.mark.parametrize("name", ["reinforce", "grpo", "dr_grpo"])
def test_three_forms_are_equal_in_float32(name):
    objective = dataclasses.replace(gj.OBJECTIVES[name], kl_coef=0.0)
    forms = three_forms(objective, np.float32)
    chex.assert_trees_all_close(*forms, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["reinforce", "grpo", "dr_grpo"])
def test_three_forms_are_equal_in_float64(name, x64):
    objective = dataclasses.replace(gj.OBJECTIVES[name], kl_coef=0.0)
    forms = three_forms(objective, np.float64)
    assert max(abs(x).max() for x in jax.tree.leaves(forms[0])) > 0.01
    chex.assert_trees_all_close(*forms, rtol=0, atol=1e-12)


RULES = {
    "unit": gj.unit_weights(),
    "std": gj.std_weights(),
    "std_ddof_1": gj.std_weights(ddof=1, eps=1e-4),
    "std_scheduled": gj.std_weights(power=optax.linear_schedule(0.5, 2.0, 1)),
    "batch_std": gj.batch_std_weights(),
    "group_mean": gj.group_mean_weights(),
    "beta": gj.beta_weights(),
    "finite_group": gj.finite_group_weights(),
    "finite_group_64": gj.finite_group_weights(64),
    "shrunk": gj.posterior_weights(power=2.0),
    "posterior": gj.posterior_weights(9),
    "posterior_scheduled": gj.posterior_weights(
        9, power=optax.linear_schedule(0.0, 2.0, 1), discount=0.5
    ),
}
PLAIN = dataclasses.replace(gj.OBJECTIVES["dr_grpo"], kl_coef=0.0)


@functools.cache
def gradient_functions(dtype):
    """(of the mean loss under given advantages, per prompt, pulled back), compiled, and
    the losses themselves."""
    params, tokens, arrays = problem(dtype)
    on_policy = gj.token_logprobs(params["hidden"], params["unembedding"], tokens)
    behaviour = on_policy + 0.3 * np.sin(np.arange(T, dtype=dtype))[None, None]

    def losses(params, rewards, advantages=None):
        now = {**arrays, "rewards": rewards, "advantages": advantages}
        return losses_fn(PLAIN, tokens, now, behaviour)(params)

    def pulled_back(params, rewards, cotangent):
        return jax.vjp(partial(losses, rewards=rewards), params)[1](cotangent)[0]

    mean = jax.jit(jax.grad(lambda *x: losses(*x).mean()))
    return mean, jax.jit(jax.jacrev(losses)), jax.jit(pulled_back), losses


def three_forms_over_two_batches(rule, dtype):
    """As `three_forms`, of any weights, the state carried from batch to batch: the
    third with the trainer's weights, and once more by `weighted_value_and_grad`."""
    params, _, arrays = problem(dtype)
    mean, per_prompt, pulled_back, losses = gradient_functions(dtype)
    in_one = jax.jit(gj.weighted_value_and_grad(losses, rule))
    transform = optax.chain(gj.scale_by_prompt_weights(rule), gj.mean_over_prompts())
    mask = arrays["completion_mask"]

    @jax.jit
    def weighed(states, grads, rewards, ids):
        rollouts = gj.Rollouts(*[None] * 3, mask, jnp.zeros_like(mask), rewards)
        on_losses, losses_state = apply_weights(rule, rewards, states[0], ids)
        update, update_state = transform.update(
            grads, states[1], rewards=rewards, prompt_ids=ids
        )
        result = weigh(PLAIN, rule, rollouts, None, ids, states[2], max_length=T)
        advantages = gj.centred_advantages(rewards) * on_losses[:, None]
        states = losses_state, update_state, result.weights_state
        return (advantages, update, result.weights), states

    states = rule.init(), transform.init(params), rule.init()
    state = rule.init()
    other = np.random.default_rng(5).choice([0.0, 0.5, 1.0], (P, G)).astype(dtype)
    for rewards, ids in (
        (arrays["rewards"], [0, 2, 4, 6, 8]),
        (other, [8, 1, 0, 2, 3]),
    ):
        rewards, ids = jnp.asarray(rewards), jnp.asarray(ids)
        grads = per_prompt(params, rewards)
        (advantages, second, cotangent), states = weighed(states, grads, rewards, ids)
        first = mean(params, rewards, advantages)
        third = pulled_back(params, rewards, cotangent / P)
        _, fourth, state = in_one(
            params, rewards, rewards=rewards, state=state, prompt_ids=ids
        )
        yield first, second, third, fourth


@pytest.mark.parametrize("name", ["std", "beta", "posterior"])
def test_three_forms_of_a_rule_are_equal_in_float32(name):
    for forms in three_forms_over_two_batches(RULES[name], np.float32):
        chex.assert_trees_all_close(*forms, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_three_forms_of_every_rule_are_equal_in_float64(name, x64):
    for forms in three_forms_over_two_batches(RULES[name], np.float64):
        assert max(abs(x).max() for x in jax.tree.leaves(forms[0])) > 0.01
        chex.assert_trees_all_close(*forms, rtol=0, atol=1e-12)


def grads_of(objective, arrays, logprobs, behaviour, **more):
    def loss(logprobs):
        return gj.policy_loss(
            objective,
            logprobs=logprobs,
            behaviour_logprobs=behaviour,
            **arrays,
            **more,
        )[0]

    return jax.jit(jax.grad(loss))(logprobs)


def random_logprobs(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(-rng.exponential(size=(P, G, T)).astype(dtype))


# Of the rest, one has no baseline and three divide by what a constant changes.
INVARIANT = sorted(set(gj.OBJECTIVES) - {"rt_pg", "bnpo", "max_rl", "fr_ppo"})


@pytest.mark.parametrize("name", INVARIANT)
def test_adding_a_constant_to_a_groups_rewards_changes_nothing(name):
    arrays = problem(np.float32)[2] | extras()
    objective = dataclasses.replace(gj.OBJECTIVES[name], kl_coef=0.0)
    logprobs, behaviour = random_logprobs(1), random_logprobs(2)
    shifted = {**arrays, "rewards": arrays["rewards"] + jnp.arange(P)[:, None]}
    np.testing.assert_allclose(
        grads_of(objective, shifted, logprobs, behaviour),
        grads_of(objective, arrays, logprobs, behaviour),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", list(gj.OBJECTIVES))
def test_permuting_prompts_and_samples_permutes_gradients(name):
    arrays = problem(np.float32)[2] | extras()
    objective, rng = gj.OBJECTIVES[name], np.random.default_rng(3)
    logprobs, behaviour, reference = (random_logprobs(i) for i in range(3))
    order = (rng.permutation(P)[:, None], rng.permutation(G)[None])

    def permuted(x):
        return x[order]

    expected = permuted(
        grads_of(objective, arrays, logprobs, behaviour, reference_logprobs=reference)
    )
    actual = grads_of(
        objective,
        jax.tree.map(permuted, arrays),
        permuted(logprobs),
        permuted(behaviour),
        reference_logprobs=permuted(reference),
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", list(gj.OBJECTIVES))
def test_padding_changes_nothing(name):
    arrays = problem(np.float32)[2] | extras()
    objective, live = gj.OBJECTIVES[name], arrays["completion_mask"] > 0
    clean = [random_logprobs(i) for i in range(3)]
    dirty = [
        jnp.where(live, x, bad)
        for x, bad in zip(clean, (-1e4, jnp.inf, -jnp.inf), strict=True)
    ]
    gradients = [
        grads_of(objective, arrays, lp, old, reference_logprobs=reference)
        for lp, old, reference in (clean, dirty)
    ]
    np.testing.assert_array_equal(gradients[1], gradients[0])
    assert (np.asarray(gradients[0])[~np.asarray(live)] == 0).all()


def test_a_missing_reward_leaves_the_group_of_the_others():
    """Group of 4 with one missing = group of 3: same losses, same gradients."""
    objective = dataclasses.replace(gj.OBJECTIVES["grpo"], kl_coef=0.0)
    _, _, arrays = problem(np.float32)
    logprobs, behaviour = random_logprobs(1), random_logprobs(2)
    rewards = arrays["rewards"].at[:, 0].set(jnp.nan)
    four = grads_of(objective, {**arrays, "rewards": rewards}, logprobs, behaviour)
    three = {name: x[:, 1:] for name, x in arrays.items()}
    expected = grads_of(objective, three, logprobs[:, 1:], behaviour[:, 1:])
    np.testing.assert_allclose(four[:, 1:], expected, rtol=1e-6, atol=1e-8)
    assert not np.asarray(four)[:, 0].any()


def test_reinforce_is_rloo_up_to_the_group_size():
    """(G - 1) / G times leave-one-out, exactly: the group mean holds the sample."""
    _, _, arrays = problem(np.float32)
    arrays["rewards"] = jnp.nan_to_num(arrays["rewards"])
    logprobs = random_logprobs(1)
    rloo = dataclasses.replace(gj.OBJECTIVES["rloo"], kl_coef=0.0)
    np.testing.assert_allclose(
        grads_of(gj.OBJECTIVES["reinforce"], arrays, logprobs, logprobs),
        (G - 1) / G * grads_of(rloo, arrays, logprobs, logprobs),
        rtol=1e-5,
        atol=1e-8,
    )
