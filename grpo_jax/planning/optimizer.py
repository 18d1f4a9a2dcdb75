"""Optimizers behind a global-norm clip, and their learning-rate schedule."""

import functools
import math

import jax
import optax
from jax.sharding import AbstractMesh

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.policy import abstract_policy
from grpo_jax.parallel.platform import platform
from grpo_jax.parallel.sharding import AXES, MeshShape, tree_shardings
from grpo_jax.runs.optimizers import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate over optimizer updates: linear warm-up, then the named decay.

    Raises:
        ValueError: the learning rate is left open, as before a run's plan is made.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if peak is None:
        raise ValueError(
            "optimizer.learning_rate must be a number here, got None; make_plan says "
            "which one a run takes by default."
        )
    decay = max(1, total_updates - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay),
    }[config.schedule]()
    if not warmup:
        return after
    # The first update moves already: rate peak / warmup, not 0.
    rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Global-norm clip, then `step_direction` and decoupled weight decay, both times
    the learning rate; decay on matrices only (not norms, not biases)."""
    optimizer = optax.chain(
        step_direction(config),
        optax.add_decayed_weights(config.weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule),
    )
    if not config.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


_B2 = {"adamw": 0.999, "lion": 0.99}


def step_direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What an optimizer makes of gradients, before the learning rate.

    adamw: mean / (sqrt(mean of squares) + eps), both without bias. lion: the sign of
    b1 mean + (1 - b1) gradient. adafactor: the gradient over its root mean square, of
    large matrices by rows and columns, the root mean square of an array (of all layers)
    at most 1; without momentum, and not times the parameters' size, so that a learning
    rate means what it does in the others.

    References:
        Loshchilov and Hutter 2019, arXiv:1711.05101; Chen et al. 2023,
        arXiv:2302.06675; Shazeer and Stern 2018, arXiv:1804.04235.
    """
    if config.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    b2 = _B2[config.name] if config.b2 is None else config.b2
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, b2, config.mean_dtype)
    return optax.scale_by_adam(config.b1, b2, config.eps, mu_dtype=config.mean_dtype)


DECAYED = ("kernel", "embedding", "unembedding", "lora_a", "lora_b")


def _decayed(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in DECAYED, params
    )


def optimizer_bytes(
    c: ModelConfig, config: OptimizerConfig, mesh: MeshShape, trained: float
) -> float:
    """Bytes of the optimizer's state on each device, which holds `trained` bytes of
    float32 parameters; a user's own optimizer is taken to hold what adamw does."""
    if config.name == "adafactor":
        return _factored_bytes(c, tuple(getattr(mesh, name) for name in AXES))
    mean = {"float32": 1.0, "bfloat16": 0.5}[config.mean_dtype]
    return trained * (mean if config.name == "lion" else mean + 1)


@functools.lru_cache(maxsize=64)
def _factored_bytes(c: ModelConfig, sizes: tuple[int, ...]) -> int:
    """Of adafactor's means of squares, from the shapes that they would have."""
    init = optax.scale_by_factored_rms().init
    state = jax.eval_shape(init, abstract_policy(c).params)
    shardings = tree_shardings(state, AbstractMesh(sizes, AXES))
    shares = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
        state,
        shardings,
    )
    return sum(jax.tree.leaves(shares))


def optimizing_copies(config: OptimizerConfig) -> int:
    """Copies of the trained parameters at the peak of an optimizer's update.

    The gradient and the change: accelerators write new moments and parameters over
    the old ones. XLA on a CPU keeps both, and of adamw a mean before it is rounded; a
    user's own optimizer counts as adamw.
    """
    if platform() != "cpu":
        return 2
    rounded = config.mean_dtype == "bfloat16"
    return {"adafactor": 3, "lion": 4}.get(config.name, 5 + rounded)
