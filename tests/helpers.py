"""Small models, rollouts and tasks that several tests share."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np

import grpo_jax as gj
from grpo_jax.objectives.loss import scale_weights
from grpo_jax.parallel.sharding import on_mesh, put_on_mesh
from grpo_jax.planning.optimizer import make_optimizer, make_schedule
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.config import OptimizerConfig
from grpo_jax.training.state import Batch, init_state
from grpo_jax.training.step import make_gradients, make_train_step
from grpo_jax.training.weighing import weigh

TINY = gj.ModelConfig(
    vocab_size=19,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
)

_WIDER = dict(
    vocab_size=16, num_layers=2, width=32, mlp_width=48, num_heads=4, num_kv_heads=2,
    head_dim=8,
)  # fmt: skip
# Models with every kind of parameter, and every way in which one is used twice.
BFLOAT16_MODELS = {
    "tied": _WIDER | dict(qk_bias=True, output_bias=True, qk_norm=True),
    "untied": _WIDER | dict(tie_embeddings=False, qk_bias=True),
    "gemma": _WIDER
    | dict(norm_offset=True, post_norms=True, scale_embedding=True, logit_softcap=5.0),
    "lora": _WIDER | dict(lora_rank=4),
}


def bfloat16_errors(name, mesh=None):
    """Of one of these models, the relative error of each leaf of an update's gradient
    when it is computed in bfloat16, by the leaf's path: 16 x 8 completions of 80
    tokens, of which 19 in 20 are the same token, in micro-batches."""
    p, g, length, tokens = 16, 8, 12, 80
    rng = np.random.default_rng(0)
    ids, mask = random_prompts(p, length, seed=0)
    completions = rng.integers(0, 16, (p, g, tokens), np.int32)
    completions[rng.random(completions.shape) < 0.95] = 5
    rewards = rng.normal(1, 1, (p, g)).astype(np.float32)
    rollouts = Rollouts(
        ids % 16, mask, completions, np.ones_like(completions),
        np.zeros(completions.shape, np.float32), rewards,
    )  # fmt: skip
    batch = Batch(rollouts, rewards, np.ones(p, np.float32), None, None)
    config = gj.ModelConfig(**BFLOAT16_MODELS[name])
    with on_mesh(mesh):
        policy = gj.init_policy(config, jax.random.key(0))
        noise = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape), policy.params)
        params = jax.tree.map(lambda x, y: x + np.float32(y), policy.params, noise)
        policy = put_on_mesh(policy.replace(params), mesh)
        gradients = jax.jit(
            make_gradients(
                gj.OBJECTIVES["reinforce"],
                micro=micro_batch(p, g, length, tokens, 3000),
                temperature=1.0,
                max_length=tokens,
            )
        )
        batch = put_on_mesh(batch, mesh)
        low = gradients(policy.reconfigured(compute_dtype="bfloat16"), batch)[0]
        exact = gradients(policy, batch)[0]
    errors = jax.tree.map(
        lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)), low, exact
    )
    leaves = jax.tree_util.tree_leaves_with_path(errors)
    return {jax.tree_util.keystr(path): error for path, error in leaves}


def tiny_policy(seed=0, **changes):
    config = dataclasses.replace(TINY, **changes)
    policy = gj.init_policy(config, jax.random.key(seed))
    # Larger weights: at their initial size distributions are nearly uniform.
    return policy.replace(jax.tree.map(lambda x: x * 2.0, policy.params))


def random_prompts(num_prompts, length, *, seed=0, shortest=1, side="left"):
    """(ids, mask) of prompts of different lengths, tokens 2 and up."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, TINY.vocab_size, size=(num_prompts, length))
    lengths = rng.integers(shortest, length + 1, size=num_prompts)
    places = np.arange(length)
    mask = places[None] < lengths[:, None]
    if side == "left":
        mask = mask[:, ::-1]
    return np.where(mask, ids, 0).astype(np.int32), mask.astype(np.int32)


def random_rollouts(policy, num_prompts=4, group_size=6, length=5, tokens=7, seed=0):
    """Samples of the policy (EOS 1, padding 0), with random rewards in {0, .5, 1}."""
    ids, mask = random_prompts(num_prompts, length, seed=seed)
    rollouts = gj.sample(
        policy,
        ids,
        mask,
        group_size=group_size,
        max_new_tokens=tokens,
        key=jax.random.key(seed),
        eos_id=1,
        pad_id=0,
    )
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 0.5, 1.0], size=(num_prompts, group_size))
    return rollouts._replace(rewards=jnp.asarray(rewards, jnp.float32))


def weighed(objective, rollouts, old=None, reference=None):
    """A Batch under the weights of the objective's scale."""
    rule = scale_weights(objective)
    ids = np.arange(len(rollouts.rewards))
    call = jax.jit(partial(weigh, objective, rule, max_length=7))
    weighed = call(rollouts, reference, ids, rule.init())
    shaped, weights = weighed.shaped_rewards, weighed.weights
    added = weighed.added_rewards
    return Batch(weighed.rollouts, shaped, weights, old, reference, None, added)


def train_step(policy, objective, micro, optimizer=None, max_length=7):
    """(pure train step, params -> state) with plain defaults."""
    config = OptimizerConfig(learning_rate=1e-2)
    optimizer = optimizer or make_optimizer(config, make_schedule(config, 10))
    step = make_train_step(
        policy,
        objective,
        optimizer,
        micro=micro,
        temperature=1.0,
        max_length=max_length,
    )
    return step, lambda params: init_state(params, optimizer, scale_weights(objective))


def one_update(policy, objective, batch: Batch, micro, optimizer=None, max_length=7):
    """(new state, metrics) of one jitted train step."""
    step, init = train_step(policy, objective, micro, optimizer, max_length)
    return jax.jit(step)(init(policy.params), batch)


def assert_gradients_close(actual, expected):
    """Asserts equality to float32's rounding, relative to the largest entry."""
    scale = max(abs(x).max() for x in jax.tree.leaves(expected))
    assert scale > 1e-3  # the gradient is not zero
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-5 * scale)


def equations(jaxpr):
    """Every equation of a jaxpr, and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
