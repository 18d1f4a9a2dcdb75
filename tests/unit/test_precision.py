"""Products of float32 arrays are float32 ones, also where the default is another."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision

import grpo_jax as gj
from grpo_jax.instrument.measurement import measure
from grpo_jax.objectives.presets import OBJECTIVES
from grpo_jax.precision import float32_products
from grpo_jax.rollouts.micro_batches import MicroBatch
from tests.helpers import (
    equations,
    random_prompts,
    random_rollouts,
    tiny_policy,
    train_step,
    weighed,
)

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
IN_FULL = (Precision.HIGHEST, Precision.HIGHEST)


def products(function, *arguments):
    """Pairs of the dtypes multiplied, with the precision, wherever it is traced."""
    found = set()
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "dot_general":
            kinds = frozenset(x.aval.dtype for x in equation.invars)
            found.add((kinds, equation.params["precision"]))
    return found


def update(policy, rollouts):
    batch = weighed(OBJECTIVES["grpo"], rollouts)
    step, init = train_step(policy, OBJECTIVES["grpo"], MicroBatch(1, 6))
    return products(step, init(policy.params), batch, None, policy.frozen)


def sampling(policy, rollouts):
    prompts = random_prompts(2, 5)
    fixed = dict(group_size=2, max_new_tokens=3, eos_id=1, pad_id=0)
    call = partial(gj.sample, policy, *prompts, **fixed)
    return products(lambda key: call(key=key), jax.random.key(0))


def logits(policy, rollouts):
    return products(gj.next_token_logits, policy, rollouts.prompts)


def instrument(policy, rollouts):
    fixed = dict(width=64, exact=False)
    key = jax.random.key(0)
    return products(partial(measure, **fixed), policy, rollouts, None, 1.0, key)


def what_if(policy, rollouts):
    """The counterfactual of two weightings."""
    logprobs = partial(gj.completion_logprobs, rollouts=rollouts)

    def compare(params):
        return gj.counterfactual_updates(
            lambda weights: jax.tree.map(lambda x: x * weights.sum(), params),
            lambda params: logprobs(policy.replace(params)).sum(-1),
            params,
            rollouts.rewards,
            {"one": jnp.ones(4), "two": jnp.full(4, 2.0)},
        )

    return products(compare, policy.params)


PROGRAMS = [update, sampling, logits, instrument, what_if]


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_a_model_in_float32_multiplies_in_float32(program, lora_rank):
    policy = tiny_policy(lora_rank=lora_rank)
    found = program(policy, random_rollouts(policy))
    assert found == {(frozenset({FLOAT32}), IN_FULL)}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_a_model_in_bfloat16_does_so_in_its_statistics_alone(program):
    policy = tiny_policy(compute_dtype="bfloat16")
    found = program(policy, random_rollouts(policy))
    assert frozenset({BFLOAT16}) in {kinds for kinds, _ in found}
    for kinds, precision in found:
        assert (precision == IN_FULL) == (kinds == {FLOAT32})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_weights_of_hidden_states_are_made_in_float32(dtype):
    hidden = jnp.ones((2, 3, 4, 8), dtype)
    weights = partial(gj.nthr_weights, temperature=1.0, softcap=None)
    shape = hidden.shape[:3]
    ids, mask = jnp.ones(shape, int), jnp.ones(shape)
    found = products(weights, hidden, jnp.ones((8, 5)), ids, mask[..., 0], mask)
    assert found == {(frozenset({FLOAT32}), IN_FULL)}


def test_a_precision_that_was_chosen_is_kept():
    x = jnp.ones((2, 2))
    product = float32_products()(lambda x: x @ x)
    with jax.default_matmul_precision("tensorfloat32"):
        chosen = products(product, x)
    assert chosen == {(frozenset({FLOAT32}), (Precision.HIGH, Precision.HIGH))}
