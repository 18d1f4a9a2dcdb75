"""The step as a public object."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.training.state import init_state

from ..helpers import TINY, random_prompts

P, G, T = 4, 4, 5
EOS, PAD = 1, 0


@functools.cache
def scored(seed=0):
    policy = gj.init_policy(TINY, jax.random.key(0))
    ids, mask = random_prompts(P, 6, seed=seed)
    rollouts = gj.sample(
        policy, ids, mask, group_size=G, max_new_tokens=T, key=jax.random.key(seed),
        eos_id=EOS, pad_id=PAD,
    )  # fmt: skip
    rewards = np.random.default_rng(seed).integers(0, 2, (P, G)).astype(np.float32)
    rewards[0], rewards[1] = [1, 0, 0, 0], [1, 1, 1, 1]
    return policy, rollouts._replace(rewards=rewards)


def test_a_step_is_the_gradient_of_the_policy_loss_through_the_optimizer():
    """Against jax.grad of `policy_loss` on log-probs of the policy itself."""
    policy, rollouts = scored()
    objective = dataclasses.replace(gj.OBJECTIVES["grpo"], kl_coef=0.0)
    optimizer = optax.sgd(0.5)
    learner = gj.Learner(objective, optimizer)
    state, metrics = learner.step(learner.init(policy), rollouts)

    def loss(params):
        logprobs = gj.completion_logprobs(policy.replace(params), rollouts)
        return gj.policy_loss(
            objective, logprobs=logprobs,
            behaviour_logprobs=jax.lax.stop_gradient(logprobs),
            rewards=rollouts.rewards, completion_mask=rollouts.completion_mask,
        )[0]  # fmt: skip

    grads = jax.grad(loss)(policy.params)
    expected = jax.tree.map(lambda x, g: x - 0.5 * g, policy.params, grads)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-4, atol=1e-6)
    assert metrics["reward/mean"] == pytest.approx(float(rollouts.rewards.mean()))
    norm = float(optax.tree.norm(grads))
    assert metrics["gradient/norm"] == pytest.approx(norm, rel=1e-4)


def test_the_policy_given_stays_the_users_and_an_init_begins_anew():
    policy, rollouts = scored()
    before = jax.device_get(policy.params)
    learner = gj.Learner("reinforce", optax.sgd(0.1))
    first, _ = learner.step(learner.init(policy), rollouts)
    chex.assert_trees_all_equal(policy.params, before)
    again, _ = learner.step(learner.init(policy), rollouts)
    chex.assert_trees_all_equal(first.params, again.params)
    chex.assert_trees_all_equal(learner.policy(again).params, again.params)


def test_weights_take_the_place_of_the_scale():
    """GRPO is the objective without a scale under std weights, bit by bit."""
    policy, rollouts = scored()
    grpo = dataclasses.replace(gj.OBJECTIVES["grpo"], kl_coef=0.0)
    plain = gj.Learner(grpo, optax.adam(1e-2))
    own = gj.Learner(grpo, optax.adam(1e-2), weights=gj.std_weights())
    unit = gj.Learner(grpo, optax.adam(1e-2), weights=gj.unit_weights())
    a, b, c = (x.step(x.init(policy), rollouts)[0].params for x in (plain, own, unit))
    chex.assert_trees_all_equal(a, b)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(a, c)


def test_the_reference_is_the_start_or_the_one_given():
    """At the reference itself the KL and its gradient are 0; elsewhere it is not."""
    policy, rollouts = scored()
    far = policy.replace(jax.tree.map(lambda x: 1.5 * x, policy.params))
    kl = dataclasses.replace(gj.OBJECTIVES["grpo"], kl_coef=1.0)
    start = gj.Learner(kl, optax.sgd(0.1))
    assert float(start.step(start.init(policy), rollouts)[1]["kl/mean"]) == 0
    given = gj.Learner(kl, optax.sgd(0.1), reference=far)
    state, metrics = given.step(given.init(policy), rollouts)
    assert float(metrics["kl/mean"]) > 1e-4
    chex.assert_tree_all_finite(state.params)
    lora = gj.add_lora(policy, rank=2, alpha=4.0, key=jax.random.key(1))
    with pytest.raises(ConfigError, match="same config"):
        gj.Learner(kl, optax.sgd(0.1), reference=lora).init(policy)


def on_devices():
    """Bytes of arrays on the devices."""
    arrays = [x for x in jax.live_arrays() if x.sharding.memory_kind == "device"]
    return sum(x.nbytes for x in arrays)


@pytest.mark.parametrize("donate", [True, False])
def test_a_reference_on_the_host_scores_the_same_and_leaves_the_device(donate):
    policy, rollouts = scored()
    size = sum(x.nbytes for x in jax.tree.leaves(policy.params))
    far = policy.replace(jax.tree.map(lambda x: 1.5 * x, policy.params))
    last, held = {}, {}
    for memory in ("device", "host"):
        learner = gj.Learner("grpo", optax.adam(1e-2), reference_memory=memory)
        start = far.replace(jax.tree.map(jnp.copy, far.params))
        state = learner.init(start, donate=donate)
        del start
        for _ in range(2):  # the first one donates what the reference was copied from
            state, metrics = learner.step(state, rollouts)
        kinds = {
            x.sharding.memory_kind for x in jax.tree.leaves(learner.settings.reference)
        }
        assert kinds == {"device": {"device"}, "host": {"pinned_host"}}[memory]
        last[memory] = jax.device_get((state, metrics))
        held[memory] = on_devices()
        del learner, state, metrics
    chex.assert_trees_all_equal(*last.values())
    assert float(last["host"][1]["kl/mean"]) > 0
    assert held["device"] - held["host"] == size


def test_a_reference_on_the_host_needs_one_that_is_kept_apart():
    host = dict(reference_memory="host")
    with pytest.raises(ConfigError, match="nothing with kl_coef 0"):
        gj.Learner("reinforce", optax.sgd(0.1), **host)
    with pytest.raises(ConfigError, match="unknown reference_memory 'hots'"):
        gj.Learner("grpo", optax.sgd(0.1), reference_memory="hots")
    policy, _ = scored()
    lora = gj.add_lora(policy, rank=2, alpha=4.0, key=jax.random.key(1))
    with pytest.raises(ConfigError, match="nothing with LoRA"):
        gj.Learner("grpo", optax.sgd(0.1), **host).init(lora)


def test_several_updates_of_a_rollout_and_new_shapes():
    policy, rollouts = scored()
    learner = gj.Learner("grpo", optax.sgd(0.01), updates=2)
    state, metrics = learner.step(learner.init(policy), rollouts)
    assert int(state.updates) == 2 and float(metrics["ratio/deviation"]) > 0
    half = jax.tree.map(lambda x: x[:2], rollouts)
    state, _ = learner.step(state, half)
    assert int(state.updates) == 4


def test_rewards_of_other_types_are_the_same_rewards():
    """As `completions == answers` gives them; also after a step with floats."""
    policy, rollouts = scored()
    learner = gj.Learner("grpo", optax.sgd(0.1))
    norms = []
    for rewards in (
        rollouts.rewards,
        rollouts.rewards > 0,
        rollouts.rewards.astype(int),
    ):
        state = learner.init(policy)
        if norms:  # the programs of floats are there
            learner.compile(state, [rollouts])
        _, metrics = learner.step(state, rollouts._replace(rewards=rewards))
        norms.append(float(metrics["gradient/norm"]))
    assert norms == [norms[0]] * 3 and norms[0] > 0


def test_lora_trains_its_factors_alone():
    policy, rollouts = scored()
    lora = gj.add_lora(policy, rank=2, alpha=4.0, key=jax.random.key(1))
    learner = gj.Learner("cispo", optax.adam(1e-2))
    state, _ = learner.step(learner.init(lora), rollouts)
    chex.assert_trees_all_equal_shapes(state.params, lora.params)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, lora.params)
    assert any(jax.tree.leaves(moved))


# ---- what cannot be


def wrong(**changes):
    _, rollouts = scored()
    return rollouts._replace(**changes)


def set_at(field, index, value):
    _, rollouts = scored()
    x = np.array(getattr(rollouts, field))
    x[index] = value
    return wrong(**{field: x})


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        (lambda: 3, "rollouts must be Rollouts"),
        (lambda: wrong(rewards=None), "must have rewards"),
        (lambda: set_at("completions", (2, 1, 0), 19), "prompt 2, sample 1 .*outside"),
        (lambda: wrong(behaviour_logprobs=np.full((P, G, T), np.nan)), "with_logprobs"),
    ],
)
def test_rollouts_that_cannot_be_trained_on_are_refused(rollouts, message):
    policy, _ = scored()
    learner = gj.Learner("grpo", optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        learner.step(learner.init(policy), rollouts())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gj.Learner("gppo", optax.sgd(1.0)), "did you mean 'g"),
        (lambda: gj.Learner(3, optax.sgd(1.0)), "dataclasses.replace"),
        (lambda: gj.Learner("grpo", 1e-3), "optax.adamw"),
        (lambda: gj.Learner("grpo", optax.sgd, weights=None), "optax.adamw"),
        (lambda: gj.Learner("grpo", optax.sgd(1.0), weights=gj.std_weights), "std_w"),
        (lambda: gj.Learner("dr_grpo", optax.sgd(1.0)), "max_new_tokens=T"),
        (lambda: gj.Learner("reinforce", optax.sgd(1.0), updates=2), "must be 1"),
        (lambda: gj.Learner("grpo", optax.sgd(1.0)).init(3), "load_pretrained"),
        (lambda: gj.Learner("grpo", optax.sgd(1.0)).policy(None), "learner.init"),
    ],
)
def test_arguments_of_the_wrong_kind_show_the_right_one(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_weights_that_remember_prompts_need_their_ids():
    policy, rollouts = scored()
    rule = gj.posterior_weights(num_prompts=8)
    learner = gj.Learner("grpo", optax.sgd(0.1), weights=rule)
    with pytest.raises(ConfigError, match="prompt_ids"):
        learner.step(learner.init(policy), rollouts)
    with pytest.raises(ConfigError, match=r"one of each of 4 .*\(3,\)"):
        learner.step(learner.init(policy), rollouts, prompt_ids=np.arange(3))
    state, _ = learner.step(
        learner.init(policy), rollouts, prompt_ids=np.array([0, 2, 4, 6])
    )
    seen = jax.tree.leaves(state.weights_state)
    arrays = [np.asarray(x) for x in seen if x.ndim == 1]
    moved = {i for x in arrays for i in np.flatnonzero(x != x[1])}  # 1 was not there
    assert moved == {0, 2, 4, 6}


def test_completions_longer_than_the_learner_was_told_are_refused():
    policy, rollouts = scored()
    longest = int(rollouts.completion_mask.sum(-1).max())
    learner = gj.Learner("dr_grpo", optax.sgd(0.1), max_new_tokens=longest - 1)
    with pytest.raises(ConfigError, match=f"have up to {longest} tokens"):
        learner.step(learner.init(policy), rollouts)


def test_an_objective_with_a_history_needs_the_shapes_first():
    policy, rollouts = scored()
    name = next(n for n, o in gj.OBJECTIVES.items() if o.history > 1)
    learner = gj.Learner(name, optax.sgd(0.1), max_new_tokens=T)
    with pytest.raises(ConfigError, match="history"):
        learner.init(policy)
    with pytest.raises(ValueError, match="must have rewards"):
        learner.init(policy, rollouts=rollouts._replace(rewards=None))
    state, _ = learner.step(learner.init(policy, rollouts=rollouts), rollouts)
    assert int(state.updates) == 1


def test_the_state_is_that_of_the_trainer():
    policy, _ = scored()
    learner = gj.Learner("reinforce", optax.adam(1e-3))
    mine, theirs = (
        learner.init(policy),
        init_state(policy.params, optax.adam(1e-3), gj.unit_weights()),
    )
    chex.assert_trees_all_equal(mine, theirs)


# ---- docs/own_loop.py


def own_loop():
    path = Path(__file__).parents[2] / "docs/own_loop.py"
    spec = importlib.util.spec_from_file_location("own_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, path


def test_the_loop_of_the_documentation_learns():
    module, path = own_loop()
    rewards = module.train()
    assert np.mean(rewards[:2]) < 0.4 and np.mean(rewards[-5:]) > 0.8
    body = path.read_text().split('every step."""')[1].split("return history")[0]
    assert len(body.strip().splitlines()) <= 25
