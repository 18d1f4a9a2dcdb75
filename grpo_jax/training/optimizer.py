"""AdamW behind a global-norm clip, and its learning-rate schedule."""

import jax
import optax

from grpo_jax.runs.config import OptimizerConfig


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
    """Global-norm clip, then AdamW; decay on matrices only (not norms, not biases)."""
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


DECAYED = ("kernel", "embedding", "unembedding", "lora_a", "lora_b")


def _decayed(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in DECAYED, params
    )
