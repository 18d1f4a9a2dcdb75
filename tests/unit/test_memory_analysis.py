"""The estimate of memory against what XLA says of the programs; nothing is run."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import OBJECTIVES, ModelConfig, std_weights
from grpo_jax.instrument.measurement import measure, update_effect
from grpo_jax.models.policy import abstract_policy
from grpo_jax.parallel.sharding import tree_shardings, with_shardings
from grpo_jax.planning.memory import estimate_memory
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.rollouts.sampling import _sample
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.runs.config import MeshConfig, OptimizerConfig
from grpo_jax.training import counterfactual
from grpo_jax.training.optimizer import make_optimizer, make_schedule
from grpo_jax.training.state import Batch, init_state, part_of
from grpo_jax.training.step import make_train_step

Shape = jax.ShapeDtypeStruct


def learner(params):
    """(optimizer, the state of a run that starts with it)."""
    config = OptimizerConfig(learning_rate=3e-4)
    optimizer = make_optimizer(config, make_schedule(config, 1))
    state = jax.eval_shape(lambda x: init_state(x, optimizer, std_weights()), params)
    return optimizer, state


def rollout_shapes(p, g, length, t):
    prompts, ids = Shape((p, length), jnp.int32), Shape((p, g, t), jnp.int32)
    floats, rewards = Shape((p, g, t), jnp.float32), Shape((p, g), jnp.float32)
    return Rollouts(prompts, prompts, ids, ids, floats, rewards)


def update_program(c, micro, reference, p, g, length, t, mesh=None):
    """The loop's, of abstract arguments."""
    policy = with_shardings(abstract_policy(c), mesh)
    optimizer, state = learner(policy.params)
    state = with_shardings(state, mesh)
    rollouts, weights = rollout_shapes(p, g, length, t), Shape((p,), jnp.float32)
    behind = rollouts.behaviour_logprobs if reference else None
    batch = with_shardings(
        Batch(rollouts, rollouts.rewards, weights, None, behind), mesh
    )
    step = make_train_step(
        dataclasses.replace(policy, params=None, frozen=None),
        OBJECTIVES["grpo" if reference else "dr_grpo"],
        optimizer,
        micro=micro,
        temperature=1.0,
        max_length=t,
    )

    def update(state, batch, index, at, frozen):
        return step(state, part_of(batch, index, 1), at, frozen)

    options = {}
    if mesh is not None:
        options["out_shardings"] = tree_shardings(state, mesh), None
    jitted = jax.jit(update, donate_argnums=0, **options)
    return jitted.lower(state, batch, np.int32(0), None, policy.frozen).compile()


def sampling_program(c, p, g, length, t, mesh=None):
    prompts = Shape((p, length), jnp.int32)
    number = Shape((), jnp.int32)
    return _sample.lower(
        with_shardings(abstract_policy(c), mesh),
        prompts,
        prompts,
        Shape((p,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
        Shape((), jnp.float32),
        Shape((1,), jnp.int32),
        number,
        group_size=g,
        max_new_tokens=t,
        top_k=None,
        top_p=None,
    ).compile()


def peak(program):
    m = program.memory_analysis()
    arguments = (
        m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    )
    return arguments + m.temp_size_in_bytes


def memory_of(c, p, g, length, t, micro, reference=False, mesh=None):
    """name -> (predicted, XLA's), of an update and of sampling, on each device."""
    sizes = {} if mesh is None else {"mesh": MeshConfig(**mesh.shape)}
    memory = estimate_memory(
        c,
        prompts=p,
        group_size=g,
        prompt_tokens=length,
        max_new_tokens=t,
        micro=micro,
        reference=reference,
        widened=jax.default_backend() == "cpu",
        **sizes,
    )
    phases = memory.phases()
    # The reference is no argument of the update, nor are the moments of the sampler.
    update = memory.state - memory.reference + phases["update"]
    sampling = memory.parameters + memory.frozen + phases["sampling"]
    updating = update_program(c, micro, reference, p, g, length, t, mesh)
    return {
        "update": (update, peak(updating)),
        "sampling": (sampling, peak(sampling_program(c, p, g, length, t, mesh))),
    }


def check(c, p, g, length, t, micro, reference=False):
    """Both programs within 15 %; prints what is behind the tables of the notes."""
    programs = memory_of(c, p, g, length, t, MicroBatch(*micro), reference)
    for name, (expected, actual) in programs.items():
        print(
            f"{name}: predicted {expected / 1e6:.1f} MB, XLA {actual / 1e6:.1f} MB, "
            f"{100 * (expected / actual - 1):+.1f} %"
        )
        assert expected == pytest.approx(actual, rel=0.15), name


@pytest.mark.slow
def test_the_default_model():
    check(ModelConfig(vocab_size=32), 16, 16, 10, 8, (16, 16), reference=True)


HALF_B = ModelConfig(
    vocab_size=151_936, num_layers=24, width=896, mlp_width=4864, num_heads=14,
    num_kv_heads=2, head_dim=64, qk_bias=True,
)  # fmt: skip
DEEP = ModelConfig(
    vocab_size=512, num_layers=32, width=256, mlp_width=688, num_heads=8,
    num_kv_heads=8, head_dim=32,
)  # fmt: skip
WORDY = ModelConfig(
    vocab_size=128_000, num_layers=2, width=256, mlp_width=688, num_heads=8,
    num_kv_heads=8, head_dim=32,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "changes", "shape", "micro"),
    [
        pytest.param(HALF_B, {}, (2, 4, 128, 32), (2, 4), id="half_billion_short"),
        pytest.param(HALF_B, {}, (8, 8, 256, 512), (1, 8), id="half_billion_long"),
        pytest.param(
            HALF_B,
            dict(num_layers=6, compute_dtype="bfloat16"),
            (8, 8, 128, 256),
            (4, 8),
            id="bfloat16",
        ),
        pytest.param(HALF_B, dict(lora_rank=16), (8, 8, 128, 256), (2, 8), id="lora"),
        pytest.param(DEEP, {}, (8, 8, 64, 256), (8, 8), id="deep_remat_full"),
        pytest.param(
            DEEP, dict(remat="none"), (8, 8, 64, 256), (4, 8), id="deep_remat_none"
        ),
        pytest.param(
            DEEP, dict(remat="dots"), (8, 8, 64, 256), (4, 8), id="deep_remat_dots"
        ),
        pytest.param(WORDY, {}, (8, 8, 64, 128), (4, 8), id="vocabulary"),
        pytest.param(
            WORDY,
            dict(tie_embeddings=False, vocab_size=32_000, num_layers=4),
            (4, 8, 512, 128),
            (2, 8),
            id="long_prompts",
        ),
        pytest.param(
            DEEP,
            dict(num_layers=4, num_kv_heads=2),
            (2, 4, 128, 1024),
            (1, 4),
            id="long_completions",
        ),
    ],
)
def test_other_shapes(config, changes, shape, micro):
    check(dataclasses.replace(config, **changes), *shape, micro)


@pytest.mark.slow
def test_the_instrument():
    c = ModelConfig(
        vocab_size=4096, num_layers=8, width=512, mlp_width=1536, num_heads=8,
        num_kv_heads=4, head_dim=64,
    )  # fmt: skip
    policy, rollouts = abstract_policy(c), rollout_shapes(8, 16, 64, 64)
    optimizer, state = learner(policy.params)
    micro, width = MicroBatch(8, 16), 2**20
    memory = partial(
        estimate_memory,
        c,
        prompts=8,
        group_size=16,
        prompt_tokens=64,
        max_new_tokens=64,
        micro=micro,
        reference=False,
    )
    one, temperature = MicroBatch(1, 1), Shape((), jnp.float32)
    vectors = 8 * (4 + 3) * 4 * width
    # Two copies of the parameters, before and their change, are arguments.
    follow = memory(probe=(one, micro)).look - 2 * memory().parameters
    key = jax.eval_shape(lambda: jax.random.key(0))
    look = memory(probe=(MicroBatch(1, 8), one), probe_bytes=vectors).look
    compared = memory(weightings=5).counterfactual
    batch = Batch(rollouts, rollouts.rewards, Shape((8,), jnp.float32))
    programs = {
        "look": (partial(measure, width=width, exact=False), look),
        "follow": (partial(update_effect, micro=micro), follow),
        "counterfactual": (
            partial(
                counterfactual.compare_weights,
                OBJECTIVES["dr_grpo"],
                optimizer,
                micro=micro,
                temperature=1.0,
                max_length=64,
            ),
            compared,
        ),
    }
    arguments = {
        "look": (policy, rollouts, None, temperature, key),
        "follow": (policy, policy.params, rollouts, None, temperature),
        "counterfactual": (policy.replace(None), state, batch),
    }
    for name, (function, expected) in programs.items():
        program = jax.jit(function).lower(*arguments[name]).compile()
        actual = program.memory_analysis().temp_size_in_bytes
        print(f"{name}: predicted {expected / 1e6:.1f} MB, XLA {actual / 1e6:.1f} MB")
        assert expected == pytest.approx(actual, rel=0.15), name
