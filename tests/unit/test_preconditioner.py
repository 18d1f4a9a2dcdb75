import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import (
    PEER_STD,
    PromptWeights,
    batch_std_weights,
    beta_weights,
    centred_advantages,
    finite_group_weights,
    group_mean_weights,
    mean_over_prompts,
    posterior_weights,
    scale_by_group_std,
    scale_by_prompt_weights,
    std_weights,
    unit_weights,
    whitened_advantages,
)
from grpo_jax.preconditioner import apply_weights
from grpo_jax.prompt_weights import WEIGHTS

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
    state = tx.init({"w": jnp.zeros((3, 4))})
    updates, _ = jax.jit(partial(tx.update, rewards=REWARDS))(grads, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
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


# The mean left out: the first update broadcasts the parameters [3] to [2, 3].
@pytest.mark.parametrize("with_params", [True, False])
def test_forgetting_the_mean_over_prompts_is_an_error(with_params):
    def losses(params):
        return jnp.stack([params["w"].sum(-1), 2 * params["w"].sum(-1)])

    tx = optax.chain(scale_by_group_std(), optax.adam(0.1))
    params = {"w": jnp.zeros(3)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.jacrev(losses)(params)
        given = params if with_params else None
        updates, state = tx.update(grads, state, given, rewards=REWARDS)
        return optax.apply_updates(params, updates), state

    message = r"\['w'\] must be .*got \(2.*chain mean_over_prompts\(\)"
    params, state = step(params, state)
    with pytest.raises(ValueError, match=message):
        step(params, state)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 3)])
def test_the_mean_is_over_prompts_and_nothing_else(shape):
    tx = mean_over_prompts()
    state = tx.init({"w": jnp.zeros(3)})
    message = r"gradient \['w'\] must be \[P, \*\(3,\)\], one per prompt"
    with pytest.raises(ValueError, match=message):
        jax.jit(tx.update)({"w": jnp.zeros(shape)}, state)
    updates, _ = tx.update({"w": jnp.ones((5, 3))}, state)
    np.testing.assert_array_equal(updates["w"], np.ones(3))


TRANSFORMS = {
    "std": (lambda eps, ddof: scale_by_group_std(eps=eps, ddof=ddof), (0.25, 1)),
    "power": (
        lambda power: scale_by_prompt_weights(std_weights(power=power)),
        (1.5,),
    ),
    "batch_std": (
        lambda eps, ddof: scale_by_prompt_weights(
            batch_std_weights(eps=eps, ddof=ddof)
        ),
        (0.25, 1),
    ),
    "group_mean": (
        lambda eps: scale_by_prompt_weights(group_mean_weights(eps=eps)),
        (0.25,),
    ),
    "posterior": (
        lambda power, prior, discount: scale_by_prompt_weights(
            posterior_weights(5, power=power, prior=prior, discount=discount)
        ),
        (1.5, 0.25, 0.5),
    ),
}


# Under a scan, with hyperparameters that are traced, in front of accumulation.
@pytest.mark.parametrize("name", TRANSFORMS)
def test_hyperparameters_can_be_injected(name):
    factory, values = TRANSFORMS[name]
    rewards = binary(1, 2)
    params, grads = jnp.zeros(3), jnp.arange(6.0).reshape(2, 3)
    after = optax.MultiSteps(optax.sgd(1.0), 2)

    def run(tx):
        tx = optax.chain(tx, mean_over_prompts(), after)

        def step(state, _):
            updates, state = tx.update(
                grads, state, params, rewards=rewards, prompt_ids=jnp.arange(2)
            )
            return state, updates

        state = jax.jit(tx.init)(params)
        return jax.jit(lambda state: jax.lax.scan(step, state, None, 4)[1])(state)

    actual, expected = run(optax.inject_hyperparams(factory)(*values)), factory(*values)
    np.testing.assert_allclose(actual, run(expected), rtol=1e-6)
    assert np.abs(actual).max() > 0.1


def test_injected_hyperparameters_move():
    def factory(eps):
        return optax.chain(scale_by_group_std(eps=eps), mean_over_prompts())

    tx = optax.inject_hyperparams(factory)(optax.linear_schedule(0.0, 2.0, 1))
    state, got = tx.init(jnp.zeros(())), []
    for _ in range(2):
        updates, state = jax.jit(partial(tx.update, rewards=REWARDS))(
            jnp.ones(2), state
        )
        got.append(float(updates))
    np.testing.assert_allclose(got, [1 / 4, 1 / 8], rtol=1e-6)  # std 2; (w + 0) / 2


def test_a_group_size_is_a_shape():
    tx = optax.inject_hyperparams(
        lambda group_size: scale_by_prompt_weights(finite_group_weights(group_size))
    )(4)
    state = tx.init(jnp.zeros(()))
    with pytest.raises(ValueError, match="group_size must be an integer outside jit"):
        jax.jit(partial(tx.update, rewards=binary(1, 2)))(jnp.ones(2), state)


def test_a_new_rule_keeps_its_state():
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
    message = (
        r"rewards must be \[P, G\], .*update\(grads, state, params, rewards=rewards"
    )
    with pytest.raises(ValueError, match=message):
        tx.update(np.float32([1, 2]), tx.init(np.float32(0)))


def test_rewards_and_ids_may_be_lists():
    grads, rule = np.float32([1, 2]), posterior_weights(3)
    for tx, more in (
        (scale_by_group_std(), {}),
        (scale_by_prompt_weights(rule), {"prompt_ids": [2, 0]}),
    ):
        state = tx.init(np.float32(0))
        got = tx.update(grads, state, rewards=[[0, 1, 1], [0, 1, 0]], **more)
        arrays = {name: np.array(ids) for name, ids in more.items()}
        rewards = np.float32([[0, 1, 1], [0, 1, 0]])
        expected = tx.update(grads, state, rewards=rewards, **arrays)
        chex.assert_trees_all_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize("wrong", ["std", std_weights, None, 1.0])
def test_a_rule_is_one(wrong):
    with pytest.raises(
        ValueError, match=r"(?s)must be PromptWeights, got .*std_weights\(\)"
    ):
        scale_by_prompt_weights(wrong)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        *(
            (rule, {"eps": eps}, "eps must not be negative, got")
            for rule in (std_weights, batch_std_weights, group_mean_weights)
            for eps in (-1e-3, NAN, "1", None)
        ),
        *(
            (rule, {"ddof": ddof}, "ddof must be 0 or 1, got")
            for rule in (std_weights, batch_std_weights)
            for ddof in (2, -1, 0.5, "1", None)
        ),
        *(
            (rule, {"power": power}, "power must be a finite number or a schedule, got")
            for rule in (std_weights, posterior_weights)
            for power in ("1", NAN, INF, None, (1,))
        ),
        *(
            (finite_group_weights, {"group_size": size}, message)
            for size, message in (
                (2.5, r"group_size must be a whole number, got 2\.5"),
                ("4", "group_size must be a whole number, got '4'"),
                (True, "group_size must be a whole number, got True"),
                (1, "group_size must be at least 2, got 1"),
            )
        ),
        (
            posterior_weights,
            {"num_prompts": 0},
            "num_prompts must be at least 1, got 0",
        ),
        (posterior_weights, {"num_prompts": 2.5}, "must be a whole number, got 2.5"),
        (posterior_weights, {"prior": "1"}, "prior must be positive, got '1'"),
        (posterior_weights, {"prior": NAN}, "prior must be positive, got nan"),
        (
            posterior_weights,
            {"discount": NAN},
            r"discount must be in \[0, 1\], got nan",
        ),
        (
            posterior_weights,
            {"discount": None},
            r"discount must be in \[0, 1\], got None",
        ),
    ],
)
def test_settings_of_rules_are_refused_where_they_are_made(rule, settings, message):
    with pytest.raises(ValueError, match=message):
        rule(**settings)


@pytest.mark.parametrize("jit", [True, False])
def test_gradients_of_different_numbers_of_prompts_have_no_mean(jit):
    tx = mean_over_prompts()
    state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(())})
    grads = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    update = jax.jit(tx.update) if jit else tx.update
    message = r"of the same prompts, .*\['a'\] \(3, 2\) and \['b'\] \(4,\)"
    with pytest.raises(ValueError, match=message):
        update(grads, state)


def binary(*solved, group_size=4):
    return np.float32([[1] * k + [0] * (group_size - k) for k in solved])


NAN = float("nan")
RULES = {
    "std": std_weights(),
    "std_power_end": std_weights(power=optax.linear_schedule(0.0, 2.0, 2)),
    "batch_std": batch_std_weights(),
    "group_mean": group_mean_weights(),
    "beta": beta_weights(),
    "finite_group": finite_group_weights(),
    "shrunk": posterior_weights(),
    "posterior": posterior_weights(5),
}
ALONE = sorted(set(RULES) - {"batch_std"})  # a tied group among others gets 0


def apply(name, rewards, ids=None):
    rule, ids = RULES[name], np.arange(len(rewards)) if ids is None else ids
    return jax.jit(partial(apply_weights, rule))(rewards, rule.init(), ids)


@pytest.mark.parametrize("name", ALONE)
def test_a_tied_or_empty_group_weighs_exactly_nothing(name):
    rewards = [[1, 1, 1], [0, 0, 0], [0.35] * 3, [NAN, 1, NAN], [NAN] * 3, [1, 0, 0]]
    weights, _ = apply(name, np.float32(rewards), np.arange(6) % 5)
    assert not np.asarray(weights)[:5].any() and weights[5] > 0


def test_a_batch_std_weighs_tied_groups_like_the_others():
    weights, _ = apply("batch_std", binary(4, 2, 0))  # mean 1/2, std 1/2
    np.testing.assert_allclose(weights, [2, 2, 2], rtol=1e-5)
    assert not np.asarray(apply("batch_std", binary(4, 4))[0]).any()


@pytest.mark.parametrize("name", sorted(RULES))
def test_missing_rewards_are_as_if_never_sampled(name):
    gaps = np.float32([[1, NAN, 0, NAN, 0], [NAN, 1, 0, 1, NAN], [NAN, 0, 0, 0, NAN]])
    present = np.float32([[1, 0, 0], [1, 0, 1], [0, 0, 0]])
    if name == "finite_group":  # its G is the group's size as sampled
        present = gaps[:, [0, 2, 4, 1, 3]]
    actual, expected = apply(name, gaps), apply(name, present)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    chex.assert_tree_all_finite(actual)


@pytest.mark.parametrize("name", sorted(RULES))
def test_weights_are_float32_constants_that_broadcast_openly(name):
    with jax.numpy_rank_promotion("raise"):
        weights, state = apply(name, binary(1, 2, 3))
    chex.assert_shape(weights, (3,))
    chex.assert_type(weights, np.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, RULES[name].init())
    grad = jax.jit(jax.grad(lambda r: apply(name, r)[0].sum()))(binary(1, 2, 3))
    assert not np.asarray(grad).any()


# w_2 = sigma^2 and w_3 = sqrt 2 sigma^2, over (1 - 1/8) sigma^2 for groups of 8.
@pytest.mark.parametrize(("group_size", "weight"), [(2, 8 / 7), (3, 2**0.5 * 8 / 7)])
def test_small_groups_weigh_all_pass_rates_alike(group_size, weight):
    rewards = binary(*range(9), group_size=8)
    actual = weights_of(finite_group_weights(group_size), rewards)
    np.testing.assert_allclose(actual, [0] + [weight] * 7 + [0], rtol=1e-5)


# In such groups the std is 1/2 or sqrt 2 / 3 whenever it is not 0.
@pytest.mark.parametrize(("group_size", "factor"), [(2, 2.0), (3, 3 / 2**0.5)])
def test_whitening_small_groups_rescales_every_sample_alike(group_size, factor):
    groups = np.float32(list(itertools.product((0, 1), repeat=group_size)))
    whitened = jax.jit(partial(whitened_advantages, eps=0.0))(groups)
    expected = factor * np.asarray(jax.jit(centred_advantages)(groups))
    np.testing.assert_allclose(whitened, expected, rtol=1e-6)
    weights = np.asarray(weights_of(finite_group_weights(), groups))
    tied = groups.min(1) == groups.max(1)
    np.testing.assert_allclose(weights, np.where(tied, 0, factor), rtol=1e-5)


# 1 / sigma over 1 - 1/4; the next order is 1 + O(1 / (G sigma^2)).
def test_a_large_group_weighs_by_the_inverse_std():
    actual = weights_of(finite_group_weights(2048), binary(1, 2))
    np.testing.assert_allclose(actual, [16 / 27**0.5, 8 / 3], rtol=2e-3)


# p = 1/1000 is far below 1/4: sqrt 3, up to p (G - 1) and smaller.
def test_a_rare_success_saturates():
    actual = weights_of(finite_group_weights(4), binary(1, group_size=1000))
    np.testing.assert_allclose(actual, [3**0.5], rtol=3e-3)


@pytest.mark.parametrize("group_size", [1, 0, -2])
def test_a_finite_group_holds_two(group_size):
    message = f"group_size must be at least 2, got {group_size}"
    with pytest.raises(ValueError, match=message):
        finite_group_weights(group_size)


# MaxRL: (3/4, -1/4, ..) times 4.
def test_group_mean_weights():
    rewards = binary(1, 2)
    weights = np.asarray(weights_of(group_mean_weights(eps=0.0), rewards))
    actual = np.asarray(centred_advantages(rewards)) * weights[:, None]
    np.testing.assert_allclose(actual, [[3, -1, -1, -1], [1, 1, -1, -1]], rtol=1e-6)


# Std 2, powers 0, 1 and 2 over three calls, then 2 for good.
def test_a_schedule_of_the_power_counts_calls():
    rule = std_weights(eps=0.0, power=optax.linear_schedule(0.0, 2.0, 2))
    call, state = jax.jit(rule.weights), rule.init()
    for expected in (1, 1 / 2, 1 / 4, 1 / 4):
        weights, state = call(REWARDS, state)
        np.testing.assert_allclose(weights, [expected, 0], rtol=1e-6)
    assert state == 4


# Prior 1/2: [1, 0, 0, 0] is m = 1.5 / 5, [1, 1, 1, 0] is 3.5 / 5: m (1 - m) = 0.21.
@pytest.mark.parametrize(
    ("power", "expected"), [(0, 1), (1, 0.21**-0.5), (2, 1 / 0.21)]
)
def test_one_groups_posterior(power, expected):
    actual = weights_of(posterior_weights(power=power), binary(1, 3))
    np.testing.assert_allclose(actual, [expected] * 2, rtol=1e-6)


# Successes .75 of 2 and a prior of 1/2 each way: m = 1.25 / 3.
def test_rewards_between_count_as_a_share():
    actual = weights_of(posterior_weights(), np.float32([[0.25, 0.5]]))
    m = (0.75 + 0.5) / 3
    np.testing.assert_allclose(actual, [(m * (1 - m)) ** -0.5], rtol=1e-6)


PASS_RATES = sorted(name for name, rule in RULES.items() if rule.pass_rates)


def test_these_rules_are_made_of_pass_rates():
    assert PASS_RATES == ["beta", "finite_group", "group_mean", "posterior", "shrunk"]
    assert sorted(n for n, rule in WEIGHTS.items() if rule.pass_rates) == PASS_RATES


# A right answer of weight 1 less a length reward's .9 per wrong one: the mean -.425 is
# no pass rate; and [0, 4] is a sum of rewards.
@pytest.mark.parametrize("rewards", [[1, -0.9, -0.9, -0.9], [0, 4, 1, 0]])
@pytest.mark.parametrize("name", PASS_RATES)
def test_rewards_that_are_no_pass_rates_are_refused(name, rewards):
    rule, ids = RULES[name], np.arange(2)
    rewards = np.float32([rewards, [1, 0, 0, NAN]])
    message = r"rewards must be in \[0, 1\] for weights made of pass rates, got .* to "
    with pytest.raises(ValueError, match=message):
        apply_weights(rule, jnp.asarray(rewards), rule.init(), ids)
    weights, _ = apply(name, rewards)  # inside jit, which cannot raise
    assert np.isnan(weights[0]) and np.isfinite(weights[1])


# Prompt 2, discount 1/2. Visit 1: (1, 3), m = 1.5/5. Visit 2: (2 + 1/2, 2 + 3/2),
# m = 3/7, m (1 - m) = 12/49. Visit 3 tied: (4 + 5/4, 7/4), weight 0 but remembered.
# Visit 4: (1 + 21/8, 3 + 7/8), m = 4.125/8.5. Prompt 0 comes second and third.
def test_a_posterior_remembers_each_prompt():
    rule = posterior_weights(3, discount=0.5)
    call, state = jax.jit(rule.weights), rule.init()
    m = 4.125 / 8.5
    for rewards, ids, expected in (
        (binary(1, 2), [2, 1], [0.21**-0.5, 2]),
        (binary(3, 2), [0, 2], [0.21**-0.5, 7 / 12**0.5]),
        (binary(4, 1), [2, 0], [0, 7 / 12**0.5]),
        (binary(1, 2), [2, 1], [(m * (1 - m)) ** -0.5, 2]),
    ):
        weights, state = call(rewards, state, np.int32(ids))
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
    # Prompt 0: (3, 1) then (1 + 3/2, 3 + 1/2); prompt 1: (2, 2) then (3, 3).
    np.testing.assert_allclose(state.successes, [2.5, 3, 3.625], rtol=1e-6)
    np.testing.assert_allclose(state.failures, [3.5, 3, 3.875], rtol=1e-6)
    assert state.count == 4


# Groups of 1, 2 and 3 right of 4, all of prompt 2: six of twelve.
def test_a_prompt_that_comes_twice_in_a_batch_counts_every_group():
    rule = posterior_weights(3, discount=0.5)
    rewards, ids = binary(1, 2, 3), np.int32([2, 2, 2])
    weights, state = apply_weights(rule, rewards, None, ids)
    np.testing.assert_allclose(state.successes, [0, 0, 6])
    np.testing.assert_allclose(state.failures, [0, 0, 6])
    np.testing.assert_allclose(weights, [2, 2, 2], rtol=1e-6)  # (1/4)^-1/2
    _, state = apply_weights(rule, rewards, state, np.int32([2, 1, 0]))
    np.testing.assert_allclose(state.successes, [3, 2, 4])


def test_a_posterior_of_other_prompts_is_refused():
    rule, other = posterior_weights(3), posterior_weights(4)
    with pytest.raises(ValueError, match="counts of 4 prompts.*num_prompts=3"):
        apply_weights(rule, binary(1), other.init(), np.int32([0]))
    with pytest.raises(ValueError, match="state must be the rule's"):
        apply_weights(rule, binary(1), (), np.int32([0]))


def test_without_discount_a_posterior_forgets_or_adds_up():
    rewards, ids = binary(1), np.int32([0])
    for discount, total in ((0.0, 4), (1.0, 12)):
        rule = posterior_weights(1, discount=discount)
        call, state = jax.jit(rule.weights), rule.init()
        for _ in range(3):
            _, state = call(rewards, state, ids)
        np.testing.assert_allclose(state.successes + state.failures, [total])


@pytest.mark.parametrize("unknown", [5, 7, -1])
def test_an_unknown_prompt_raises_and_leaves_no_trace_in_others(unknown):
    rewards, ids = binary(1, 2), np.int32([unknown, 4])
    weights, state = apply("posterior", rewards, ids)  # inside jit, which cannot raise
    np.testing.assert_allclose(state.successes, [0, 0, 0, 0, 2])
    assert np.isnan(weights[0]) and np.isfinite(weights[1])
    tied, _ = apply("posterior", binary(4, 2), ids)
    assert np.isnan(tied[0])
    rule = posterior_weights(5)
    with pytest.raises(ValueError, match=rf"must be 0 to 4, got \[{unknown}\]"):
        apply_weights(rule, rewards, rule.init(), ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prior=0.0), "prior must be positive, got 0.0"),
        (dict(discount=1.5), r"discount must be in \[0, 1\], got 1.5"),
        (dict(discount=NAN), r"discount must be in \[0, 1\], got nan"),
    ],
)
def test_a_posteriors_numbers_have_a_range(settings, message):
    with pytest.raises(ValueError, match=message):
        posterior_weights(3, **settings)


@pytest.mark.parametrize(("ids", "got"), [(None, "None"), (np.arange(3), r"\(3,\)")])
def test_weights_that_remember_prompts_need_their_ids(ids, got):
    message = rf"prompt_ids must be \[2\], one per prompt, got {got}; these weights"
    rule = RULES["posterior"]
    with pytest.raises(ValueError, match=message):
        apply_weights(rule, REWARDS, rule.init(), ids)
    tx = scale_by_prompt_weights(rule)
    with pytest.raises(ValueError, match=message):
        tx.update(np.ones(2), tx.init(np.ones(())), rewards=REWARDS, prompt_ids=ids)


# [1, 0, 0, 0]: 3/4 over the sample std 1/2 or the population std sqrt 3 / 4.
# [1, 0]: 1/2 over 1 / sqrt 2 or 1/2.
@pytest.mark.parametrize(
    ("peer", "of_four", "of_two"),
    [
        ("trl", 0.75 / 0.5001, 0.5 / (2**-0.5 + 1e-4)),
        ("verl", 0.75 / 0.500001, 0.5 / (2**-0.5 + 1e-6)),
        ("tunix", 0.75 / 0.500001, 0.5 / (2**-0.5 + 1e-6)),
        ("easydel", 0.75 / (3**0.5 / 4 + 1e-4), 0.5 / 0.5001),
        ("lmpo", 3**0.5, 1),
        ("oat", 1.5, 2**-0.5),
        ("openrlhf", 1.5, 2**-0.5),
    ],
)
def test_what_each_peer_divides_by(peer, of_four, of_two):
    rule = std_weights(**PEER_STD[peer])
    for rewards, expected in ((binary(1), of_four), ([[1.0, 0.0]], of_two)):
        rewards = np.float32(rewards)
        advantages = centred_advantages(rewards)[0] * weights_of(rule, rewards)[0]
        np.testing.assert_allclose(advantages[0], expected, rtol=1e-6)
        np.testing.assert_allclose(advantages.sum(), 0, atol=1e-6)


def test_every_peer_is_tested_and_the_table_is_read_only():
    assert len(PEER_STD) == 7
    with pytest.raises(TypeError):
        PEER_STD["mine"] = {}
