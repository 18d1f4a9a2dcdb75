"""Whether rollouts are what they should be, and what a policy says of them."""

import math
import reprlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.policy import Policy
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.rollouts.types import Rollouts

_MICRO_BATCH_TOKENS = 2**14
MOST_UNLIKELY = math.exp(-1)  # share of tokens; above it is no policy's own
_MOST_GAP = 0.5  # nats a token
_batch_logprobs = jax.jit(batch_logprobs, static_argnames=("micro",))


def check_rollouts(rollouts: Rollouts, vocab_size: int) -> None:
    """Checks the arrays of rollouts, on the host.

    Args:
        rollouts: [P, G, T] completions, of any sampler.
        vocab_size: V, of the model; token ids are below it.

    Raises:
        ValueError: shapes or dtypes do not fit, or a prompt or completion (which is
            named) has no token, a token outside the vocabulary, a log-prob that is NaN
            beside known ones or positive, or a reward that is infinite. Of arrays that
            are spread over several hosts only shapes and dtypes are checked.
    """
    if not isinstance(rollouts, Rollouts):
        raise ValueError(
            f"rollouts must be Rollouts, got {type(rollouts).__name__}; make them with "
            "gj.sample(policy, ids, mask, ...) or\n"
            "gj.Rollouts.from_rows([{'prompt': [5, 6], 'completion': [7, 1], "
            "'reward': 1.0}, ...], tokenizer)."
        )
    _check_shapes(rollouts)
    leaves = jax.tree.leaves(rollouts)
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves):
        return  # parts are on other hosts
    host = jax.tree.map(np.asarray, rollouts)
    sampled, prompt = host.completion_mask > 0, host.prompt_mask > 0
    rewards = np.zeros(sampled.shape[:2]) if host.rewards is None else host.rewards
    outside = (host.completions < 0) | (host.completions >= vocab_size)
    known = ~np.isnan(host.behaviour_logprobs)
    strange = (host.prompts < 0) | (host.prompts >= vocab_size)
    limits = f"[0, {vocab_size}), the model's vocabulary"
    _refuse(~prompt.any(1), "has no token: its mask is 0")
    _refuse((strange & prompt).any(1), f"has token ids outside {limits}")
    _refuse(
        ~sampled.any(2) & np.isfinite(rewards),
        "has a reward and no token: its mask is 0",
    )
    # Tokens between sampled ones are read too.
    read = np.flip(np.maximum.accumulate(np.flip(sampled, 2), 2), 2)
    _refuse((outside & read).any(2), f"has token ids outside {limits}")
    if (known & sampled).any():
        _refuse(
            (~known & sampled).any(2),
            "has behaviour log-probs that are NaN; where none is known all must be NaN",
        )
    positive = sampled & known & (host.behaviour_logprobs > 0.01)
    _refuse(positive.any(2), "has behaviour log-probs above 0; they are in nats")
    _refuse(np.isinf(rewards), "has an infinite reward; a missing one is NaN")


def check_sampled(
    rollouts: Rollouts,
    prompts: np.ndarray | jax.Array,
    *,
    group_size: int,
    max_new_tokens: int,
    vocab_size: int,
) -> None:
    """Checks what a sampler returned for the prompts that it was given.

    Args:
        rollouts: [P, G, T], not scored yet.
        prompts: [P, L] token ids, as it was given.
        group_size: G, as it was asked for.
        max_new_tokens: T, as it was asked for.
        vocab_size: V, of the model.

    Raises:
        ValueError: other shapes or other prompts, log-probs that are NaN, or as
            `check_rollouts`.
    """
    check_rollouts(rollouts, vocab_size)
    expected = (len(prompts), group_size, max_new_tokens)
    if rollouts.completions.shape != expected:
        raise ValueError(
            f"the sampler must return completions {expected}: [P, G, T] of its prompts,"
            " group_size and max_new_tokens (padded, with a mask), got "
            f"{rollouts.completions.shape}."
        )
    if rollouts.prompts.shape != prompts.shape:
        raise ValueError(
            f"the sampler must return the prompts {prompts.shape} that it was given, "
            f"got {rollouts.prompts.shape}."
        )
    _ = rollouts.sampler_logprobs  # raises where some are not known


def _check_shapes(rollouts: Rollouts) -> None:
    for name, array in rollouts._asdict().items():
        if array is None and name in Rollouts._field_defaults:
            continue
        if not hasattr(array, "ndim"):
            raise ValueError(
                f"{name} of rollouts must be an array, got {reprlib.repr(array)}."
            )
    p, length = np.shape(rollouts.prompts) if rollouts.prompts.ndim == 2 else (-1, -1)
    shape = np.shape(rollouts.completions)
    fields = {
        "prompts": (p, length),
        "prompt_mask": (p, length),
        "completions": (p, *shape[1:3], *[-1] * (3 - len(shape))),
        "completion_mask": shape,
        "behaviour_logprobs": shape,
        "rewards": shape[:2],
        "solving": shape[:2],
    }
    for name, expected in fields.items():
        array = getattr(rollouts, name)
        if array is not None and np.shape(array) != expected:
            raise ValueError(
                f"{name} of rollouts must fit prompts [P, L] and completions "
                f"[P, G, T], got {np.shape(array)} beside prompts "
                f"{np.shape(rollouts.prompts)} and completions {shape}."
            )
    for name in ("prompts", "completions"):
        dtype = getattr(rollouts, name).dtype
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{name} of rollouts must be integers, got {dtype}.")


def _refuse(wrong: np.ndarray, what: str) -> None:
    """ValueError for the first wrong prompt [P], or prompt and sample [P, G]."""
    if not wrong.any():
        return
    first = np.argwhere(wrong)[0].tolist()
    names = ("prompt", "sample")
    place = ", ".join(f"{n} {i}" for n, i in zip(names, first, strict=False))
    count, size = int(wrong.sum()), wrong.size
    raise ValueError(f"{place} of the rollouts {what} ({count} of {size} such).")


def with_logprobs(
    policy: Policy, rollouts: Rollouts, *, temperature: float = 1.0
) -> Rollouts:
    """Rollouts whose unknown behaviour log-probs are those of a policy.

    It should be the one that sampled: with any other the importance ratio of these
    tokens is 1 where it should not be.

    Args:
        policy: That sampled.
        rollouts: [P, G, T]; log-probs that are known stay.
        temperature: Of sampling.
    """
    known = ~jnp.isnan(rollouts.behaviour_logprobs)
    if bool(known.all()):
        return rollouts
    logprobs = _logprobs(policy, rollouts, temperature)
    logprobs = jnp.where(known, rollouts.behaviour_logprobs, logprobs)
    return rollouts._replace(behaviour_logprobs=logprobs)


def unlikely_share(
    policy: Policy, rollouts: Rollouts, *, temperature: float = 1.0
) -> float:
    """The share of sampled tokens that the policy can hardly have sampled.

    With V tokens, those of probability below 1 / (e V) have less than 1 / e together.
    So a share above MOST_UNLIKELY, 1 / e, is no policy's own.

    Args:
        policy: Of which the question is.
        rollouts: [P, G, T].
        temperature: Of sampling.

    Returns:
        In [0, 1].
    """
    sampled = np.asarray(rollouts.completion_mask) > 0
    return _share(_logprobs(policy, rollouts, temperature), sampled, _floor(policy))


def _floor(policy: Policy) -> float:
    return -1 - math.log(policy.config.vocab_size)


def _share(logprobs: jax.Array, sampled: np.ndarray, floor: float) -> float:
    low = (np.asarray(logprobs) < floor) & sampled
    return float(low.sum() / max(1, sampled.sum()))


def warn_if_unlikely(
    policy: Policy,
    rollouts: Rollouts,
    *,
    temperature: float = 1.0,
    floor: float | None = None,
    logprobs: jax.Array | None = None,
) -> float:
    """`unlikely_share`; warns where it is that of another tokenizer's ids or another
    model's text.

    A wrong template hardly shows in it, but
    in the sampler's log-probs: where they are known, a mean difference of more than
    half a nat brings a warning too.

    Args:
        policy: Of which the question is.
        rollouts: [P, G, T].
        temperature: Of sampling.
        floor: Log-prob in nats below which a token is counted; None: -1 - ln V.
        logprobs: [P, G, T] of the policy, where they are computed already.

    Returns:
        The share, in [0, 1].
    """
    if floor is None:
        floor = _floor(policy)
    if logprobs is None:
        logprobs = _logprobs(policy, rollouts, temperature)
    sampled = np.asarray(rollouts.completion_mask) > 0
    share = _share(logprobs, sampled, floor)
    if share > MOST_UNLIKELY:
        low = (np.asarray(logprobs) < floor) & sampled
        worst = int((low.sum((1, 2)) / np.maximum(1, sampled.sum((1, 2)))).argmax())
        warnings.warn(
            f"the policy gives {share:.0%} of the sampled tokens a log-prob below "
            f"{floor:.1f} nats, most of all at prompt {worst}: it cannot have produced "
            "them. Are tokenizer, chat template and model those of the rollouts?",
            stacklevel=2,
        )
    gaps = np.abs(np.asarray(logprobs) - np.asarray(rollouts.behaviour_logprobs))
    gaps = gaps[sampled]
    gap = float(np.nanmean(gaps)) if np.isfinite(gaps).any() else 0.0
    if share <= MOST_UNLIKELY and gap > _MOST_GAP:
        warnings.warn(
            f"the policy's log-probs differ from the sampler's by {gap:.2f} nats a "
            "token: the tokens are likely enough, and another policy, template or "
            "temperature sampled them.",
            stacklevel=2,
        )
    return share


def _logprobs(policy: Policy, rollouts: Rollouts, temperature: float) -> jax.Array:
    """[P, G, T] of the policy, 0 on tokens that were not sampled."""
    (p, g, t), length = rollouts.completions.shape, rollouts.prompts.shape[1]
    micro = micro_batch(p, g, length, t, _MICRO_BATCH_TOKENS)
    unscored = rollouts._replace(rewards=None, solving=None)
    return _batch_logprobs(policy, unscored, temperature, micro)
