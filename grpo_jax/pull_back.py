"""The preconditioner at the memory of one gradient: a pull-back of w / P.

    value = mean_p w_p L_p        grads = mean_p w_p dL_p / d params

The weights are constants, so both come from one `jax.vjp` of the [P] losses, pulled
back through w / P: the third form of `preconditioner.py`, and the one to use in a loop
of your own. The gradients have the shapes of the parameters, so whatever takes
gradients takes them: any optax optimizer and wrapper, flax's TrainState, equinox's
apply_updates.

Terms that the weights must not multiply (KL, entropy) need the weights themselves:

    weights, state = apply_weights(rule, rewards, state)
    jax.value_and_grad(lambda params: (weights * losses(params) + kl(params)).mean())
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import as_array, whole_number
from grpo_jax.parallel.sharding import varying_axes
from grpo_jax.preconditioner import (
    AxisName,
    PromptWeights,
    apply_weights,
    axis_names,
    check_rule,
)

EXAMPLE = """
    losses = lambda params, batch: ...  # [P], one loss per prompt, centred advantages
    f = gj.weighted_value_and_grad(losses, gj.std_weights())"""


class WeightedValueAndGrad(Protocol):
    """What `weighted_value_and_grad` makes."""

    def __call__(
        self,
        params: Any,
        *args: Any,
        rewards: Any,
        state: Any = None,
        prompt_ids: Any = None,
        axis_name: AxisName = None,
    ) -> tuple[Any, Any, Any]: ...


def weighted_value_and_grad(
    losses: Callable[..., Any],
    rule: PromptWeights,
    *,
    has_aux: bool = False,
    micro_batches: int = 1,
) -> WeightedValueAndGrad:
    """f(params, *args, rewards=...) -> (value, grads, state), at O(params) memory.

    In place of `jax.value_and_grad` of a mean loss:

        step = gj.weighted_value_and_grad(losses, gj.std_weights())  # GRPO
        value, grads, state = step(params, batch, rewards=rewards, state=state)

    f takes what `losses` takes, and by name:

        rewards: [P, G], those of the prompts whose losses these are.
        state: The rule's, as the last call returned it; None is `rule.init()`, right
            at the first call and for rules without memory.
        prompt_ids: [P] integers, for rules that remember prompts.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of them, over which
            prompts are split. Arguments and aux are this device's; weights, value,
            grads and state are those of the global batch. Parameters split over
            such an axis get the gradient of their shard (shard_map's check_vma must be
            on to tell).

    It returns value [] float32, grads shaped as params, and the rule's new state. As
    with equinox, leaves of params that are not arrays of floats (functions, integers,
    keys) are constants, and None in grads. It may be jitted, and params donated.

    Args:
        losses: (params, *args) -> [P], one loss per prompt, to minimise, of advantages
            that are not divided by a std: the rule does that.
        rule: What turns rewards into weights, such as `std_weights()`.
        has_aux: `losses` returns ([P], aux); then f returns ((value, aux), grads,
            state), as `jax.value_and_grad` has it.
        micro_batches: Parts of P / micro_batches prompts, one after the other, so that
            one part's activations are in memory. Every leaf of args then has P rows
            (what losses close over is not split), and aux gets a leading axis,
            [micro_batches, ...]. The weights are made once of the whole batch, so any
            rule is exact. Calling f for each part instead (as `optax.MultiSteps` wants
            it) is exact for rules that weigh each group by itself, not for batch_std,
            beta, or a schedule, which counts calls.

    Raises:
        ValueError: `losses` is no function or does not return [P], rule is no rule,
            state is not the rule's, or the micro-batches do not divide P.
    """
    if not callable(losses):
        raise ValueError(
            "losses must be a function from parameters to [P] losses, got "
            f"{type(losses).__name__}; write{EXAMPLE}"
        )
    check_rule("rule", rule)
    micro_batches = whole_number("micro_batches", micro_batches, 1)

    def value_and_grad(
        params: Any,
        *args: Any,
        rewards: Any,
        state: Any = None,
        prompt_ids: Any = None,
        axis_name: AxisName = None,
    ) -> tuple[Any, Any, Any]:
        rewards = as_array(rewards)
        weights, state = apply_weights(
            rule, rewards, state, prompt_ids, axis_name=axis_name
        )
        axes = axis_names(axis_name)
        shares = jnp.asarray(weights, float) / (len(weights) * _size(axes))  # [P]
        leaves, structure = jax.tree.flatten(params)
        places = [i for i, x in enumerate(leaves) if _is_floating(x)]
        if not places:
            kinds = sorted({type(x).__name__ for x in leaves}) or "nothing"
            raise ValueError(
                f"params must have arrays of floats, got a tree of {kinds}; make "
                "parameters with jnp.asarray, and give f the parameters first."
            )
        # Once here, so that each gradient is summed over devices once, at the end.
        missing = [_missing(leaves[i], axes) for i in places]
        arrays = [_vary(leaves[i], m) for i, m in zip(places, missing, strict=True)]

        def restored(arrays: list[Any], others: list[Any]) -> Any:
            every = list(others)
            for i, x in zip(places, arrays, strict=True):
                every[i] = x
            return jax.tree.unflatten(structure, every)

        def part(shares: jax.Array, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
            def of_prompts(arrays: list[Any]) -> tuple[jax.Array, Any]:
                with _saying_of_parts(len(shares), len(weights)):
                    result = losses(restored(arrays, leaves), *args)
                    out, aux = _checked_losses(result, has_aux, len(shares))
                return _vary(out.astype(shares.dtype), _missing(out, axes)), aux

            out, pull_back, aux = jax.vjp(of_prompts, arrays, has_aux=True)
            more = tuple(varying_axes(out) - varying_axes(shares))
            (grads,) = pull_back(_vary(shares, more))
            return (shares * out).sum(), grads, aux

        if micro_batches == 1:
            value, grads, aux = part(shares, args)
        else:
            value, grads, aux = _accumulated(part, arrays, shares, args, micro_batches)
        value = _sum(value, axes)
        grads = [_sum(g, m) for g, m in zip(grads, missing, strict=True)]
        grads = restored(grads, [None] * len(leaves))
        return ((value, aux) if has_aux else value), grads, state

    return value_and_grad


def _accumulated(
    part: Callable[[jax.Array, tuple[Any, ...]], tuple[Any, Any, Any]],
    arrays: list[Any],
    shares: jax.Array,
    args: tuple[Any, ...],
    count: int,
) -> tuple[Any, Any, Any]:
    """(value, gradients of arrays, aux [count, ...]) of `count` parts of prompts."""
    prompts = len(shares)
    if prompts % count:
        raise ValueError(
            f"micro_batches must divide the {prompts} prompts, got {count}."
        )

    def split(path: Any, x: Any) -> jax.Array:
        if jnp.shape(x)[:1] != (prompts,):
            raise ValueError(
                f"argument {jax.tree_util.keystr(path)} must be [{prompts}, ...], a "
                f"row per prompt, to be split into micro_batches, got {jnp.shape(x)}; "
                "let losses close over what prompts share."
            )
        return jnp.reshape(x, (count, prompts // count, *jnp.shape(x)[1:]))

    parts = jax.tree_util.tree_map_with_path(split, args)

    def add(total: list[Any], now: Any) -> tuple[Any, Any]:
        value, grads, aux = part(*now)
        return jax.tree.map(jnp.add, total, grads), (value, aux)

    zeros = [jnp.zeros_like(x) for x in arrays]
    grads, (values, aux) = jax.lax.scan(add, zeros, (split((), shares), parts))
    return values.sum(), grads, aux


@contextlib.contextmanager
def _saying_of_parts(prompts: int, total: int) -> Iterator[None]:
    """Adds to an error of `losses` which prompts they were given, if not all."""
    try:
        yield
    except Exception as error:
        if prompts < total:
            error.add_note(
                f"With micro_batches, losses get {prompts} of the {total} prompts at a "
                "time; what has a row per prompt must be an argument of f: of an array "
                "that losses close over they would see all rows."
            )
        raise


def _is_floating(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic) and jnp.issubdtype(
        x.dtype, jnp.inexact
    )


def _checked_losses(result: Any, has_aux: bool, prompts: int) -> tuple[jax.Array, Any]:
    """(losses [P], aux) that `losses` returned; ValueError where they are not that."""
    aux = None
    if has_aux:
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                "losses must return ([P] losses, aux) with has_aux=True, got "
                f"{type(result).__name__}."
            )
        result, aux = result
    if isinstance(result, tuple | list | dict):
        raise ValueError(
            f"losses must return one array [{prompts}], got a {type(result).__name__}; "
            "what it returns beside the losses needs has_aux=True."
        )
    out = jnp.asarray(result)
    if out.shape != (prompts,) or not jnp.issubdtype(out.dtype, jnp.floating):
        advice = {
            0: "return the losses of the prompts, not their mean",
            2: "take each prompt's mean over its samples",
        }.get(out.ndim, "its prompts must be those of the rewards")
        raise ValueError(
            f"losses must return [{prompts}] floats, one loss per prompt (row of the "
            f"rewards), got {out.shape} {out.dtype}; {advice}:{EXAMPLE}"
        )
    return out, aux


def _size(axes: tuple[Any, ...]) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _missing(x: Any, axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of the axes along which devices share x, as far as shard_map knows."""
    return tuple(name for name in axes if name not in varying_axes(x))


def _vary(x: Any, axes: tuple[Any, ...]) -> Any:
    """x, no longer known to be the same along the axes; only where shard_map checks."""
    checked = varying_axes(jax.lax.axis_index(axes)) if axes else ()
    return jax.lax.pcast(x, axes, to="varying") if checked else x


def _sum(x: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x
