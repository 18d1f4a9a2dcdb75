"""START HERE. GRPO's division by std is a per-prompt preconditioner.

    g  =  mean_p  w_p * g_p        g_p: prompt p's policy gradient (centred rewards)

w_p = 1 gives REINFORCE, w_p = 1 / (std_p + eps) gives GRPO: the advantages of a group
share one factor, and a gradient is linear in its advantages. So the division can happen
in three equal places, and a property test holds them together:

1. on the advantages: `whitened_advantages`, or an `Objective` with scale="std";
2. on per-prompt gradients [P, ...]: `scale_by_group_std` in an optax chain (this file);
3. on the cotangent of the [P] losses, pulled back through w / P: one backward pass, no
   [P, params] memory. `weighted_value_and_grad` in pull_back.py, for your own loop; the
   trainer does the same (`weigh` in training/weighing.py, training/step.py).

Where it stops holding: KL (in the loss or in the reward), entropy and weight-decay
terms are not proportional to the advantage, so they are added after the weights. And
the mean divides by P, tied groups (weight 0) included: dropping them, as dynamic
sampling does, changes that P.
"""

import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.advantages import (
    as_array,
    check_number,
    group_statistics,
    group_std,
    not_negative,
)

Power = float | optax.Schedule  # a schedule counts calls: one per batch of rollouts
AxisName = str | tuple[str, ...] | None  # mesh axes over which prompts are split


class PromptWeights(NamedTuple):
    """A rule that weighs prompts: a pure pair of functions, optax-style.

    Attributes:
        init: () -> state, any pytree (checkpointed with the optimizer's).
        weights: (rewards [P, G], state) -> (weights [P], state).
        by_prompt: The rule remembers prompts: `weights` takes a third argument,
            prompt_ids [P]. One may come twice; `posterior_weights` counts both groups.
        pass_rates: The rewards must be in [0, 1], best 0 or 1: their mean is read as a
            pass rate.
    """

    init: Callable[[], Any]
    weights: Callable[..., tuple[jax.Array, Any]]
    by_prompt: bool = False
    pass_rates: bool = False


def apply_weights(
    rule: PromptWeights,
    rewards: jax.Array,
    state: Any,
    prompt_ids: jax.Array | None = None,
    *,
    axis_name: AxisName = None,
) -> tuple[jax.Array, Any]:
    """(weights [P], new state) of any rule for rewards [P, G] and prompt_ids [P].

    Args:
        rule: Such as `std_weights()`.
        rewards: [P, G] float32; one that is NaN or infinite counts as missing. A group
            with fewer than two rewards is tied: rules made of its std give it 0.
        state: The rule's; `rule.init()`, or None, at first.
        prompt_ids: [P] int32, for rules that remember prompts.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of them, over which
            prompts are split: rewards, ids and weights are this device's P. The rule
            sees those of all devices ([P, G] numbers are sent), so that its weights
            and its state are those of the global batch.

    Raises:
        ValueError: `rule` is none, or it remembers prompts and prompt_ids [P] are
            missing or no integers, or `state` is another rule's, or what it returns is
            not [P].
    """
    check_rule("rule", rule)
    rewards, axes = as_array(rewards), axis_names(axis_name)
    state = _checked_state(rule, state)
    ids = _checked_ids(rule, rewards, prompt_ids)
    more: tuple[Any, ...] = () if ids is None else (ids,)
    if axes:
        rewards = _of_all_devices(jnp.asarray(rewards, float), axes)
        more = tuple(_of_all_devices(x, axes) for x in more)
    weights, state = rule.weights(rewards, state, *more)
    if jnp.shape(weights) != rewards.shape[:1]:
        raise ValueError(
            f"weights of a rule must be [{len(rewards)}], one per prompt, got "
            f"{jnp.shape(weights)}."
        )
    if axes:
        own = jax.lax.axis_index(axes)
        weights = weights.reshape(jax.lax.axis_size(axes), -1)[own]
    return weights, state


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """One name, several, or none, as a tuple."""
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _of_all_devices(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[N P, ...] the rows [P, ...] of all N devices, known to be the same on each."""
    everyone = jnp.zeros((jax.lax.axis_size(axes), *x.shape), x.dtype)
    # A sum, not all_gather: of that, shard_map does not know that devices agree.
    everyone = jax.lax.psum(everyone.at[jax.lax.axis_index(axes)].set(x), axes)
    return everyone.reshape(-1, *x.shape[1:])


def _checked_ids(
    rule: PromptWeights, rewards: jax.Array, prompt_ids: Any
) -> jax.Array | np.ndarray | None:
    if not rule.by_prompt:
        return None
    if prompt_ids is not None:
        prompt_ids = whole_ids(prompt_ids)
    if prompt_ids is None or prompt_ids.shape != rewards.shape[:1]:
        got = None if prompt_ids is None else prompt_ids.shape
        raise ValueError(
            f"prompt_ids must be [{rewards.shape[0]}], one per prompt, got {got}; "
            "these weights remember each prompt."
        )
    return prompt_ids


def whole_ids(prompt_ids: Any) -> jax.Array | np.ndarray:
    """The ids [P] as an array; ValueError unless they are integers."""
    ids: Any = prompt_ids if hasattr(prompt_ids, "dtype") else np.asarray(prompt_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"prompt_ids must be integers, got {ids.dtype}; give each prompt the "
            "number of its row in the data, from 0."
        )
    return ids


def _checked_state(rule: PromptWeights, state: Any) -> Any:
    """The rule's state, its first one for None."""
    if state is None:
        return rule.init()
    expected = jax.tree.structure(jax.eval_shape(rule.init))
    if jax.tree.structure(state) != expected:
        raise ValueError(
            f"state must be the rule's, {expected}, got {jax.tree.structure(state)}; "
            "give what the last call returned, or None at the first."
        )
    return state


def check_rule(name: str, rule: Any) -> None:
    """ValueError unless it is a rule, `PromptWeights`."""
    if not isinstance(rule, PromptWeights):
        raise ValueError(
            f"{name} must be PromptWeights, got {reprlib.repr(rule)}; call a rule:\n"
            "    rule = gj.std_weights()  # GRPO; gj.unit_weights() is REINFORCE\n"
            "    f = gj.weighted_value_and_grad(losses, rule)"
        )


def stateless(weights: Callable[[jax.Array], jax.Array]) -> PromptWeights:
    """A rule without memory, from rewards [P, G] -> weights [P]."""
    return PromptWeights(
        init=lambda: (), weights=lambda rewards, state: (weights(rewards), state)
    )


def check_power(power: Any) -> None:
    """ValueError unless it is a finite number or a schedule."""
    if not callable(power):
        rule = "must be a finite number or a schedule"
        check_number("power", power, lambda x: abs(x) < float("inf"), rule)


def unit_weights() -> PromptWeights:
    """w_p = 1: plain REINFORCE."""
    return stateless(lambda rewards: jnp.ones_like(group_statistics(rewards).mean))


def std_weights(
    *, eps: float = 1e-6, ddof: int = 0, power: Power = 1.0
) -> PromptWeights:
    """w_p = (std_p + eps)^-power, exactly 0 for a tied group.

    The family w = sigma^(k - 2), k = 2 - power: its members ascend different objectives
    (binary rewards, exact std, no length mean, no clip, no KL): power 0 ascends
    sum p_x (REINFORCE), 1 sum 2 asin sqrt p_x (GRPO), 2 sum logit p_x. With the std of
    G samples the mean weight is another (`expected_group_std`, for power 1).

    Args:
        eps: Added to the std, in reward units.
        ddof: 0 for the population std, 1 for the sample std.
        power: How much of the std is divided out, or a schedule of it (then the state
            counts the calls).

    References:
        Ge et al. 2026, arXiv:2601.23135 (the preconditioner view of power 1); the same
        view independently in arXiv:2607.00152 and arXiv:2605.24331.
    """
    check_number("eps", eps, not_negative, "must not be negative")
    check_number("ddof", ddof, lambda x: (x == 0) | (x == 1), "must be 0 or 1")
    check_power(power)

    def weights(rewards: jax.Array, power: Any) -> jax.Array:
        std, tied = group_std(rewards, ddof=ddof)
        return jnp.where(tied, 0.0, jnp.where(tied, 1.0, std + eps) ** -power)

    if not callable(power):
        return stateless(lambda rewards: weights(rewards, power))
    return PromptWeights(
        init=lambda: jnp.zeros((), jnp.int32),
        weights=lambda rewards, count: (
            weights(rewards, power(count)),
            optax.safe_increment(count),
        ),
    )


_MASKED = optax.MaskedNode
# Ends errors about gradients without the prompt axis.
_ORDER = (
    "differentiate the [P] losses (jax.jacrev), not their mean, chain "
    "mean_over_prompts() once, right after the weights, and put wrappers such as "
    "optax.MultiSteps after that, not around it: chain(scale_by_prompt_weights(rule), "
    "mean_over_prompts(), MultiSteps(tx, k)). Gradients by weighted_value_and_grad may "
    "be wrapped in any way."
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ParameterShapes:
    """The shapes that `init` saw, by path; a tree without leaves."""

    by_path: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, params: Any) -> "ParameterShapes":
        """The shapes of parameters, a tree of arrays."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        keystr = jax.tree_util.keystr
        return cls(tuple((keystr(path), jnp.shape(x)) for path, x in leaves))

    def check(self, updates: Any, params: Any = None) -> None:
        """ValueError unless updates are gradients [P, *param_shape] of the parameters
        that `init` saw, and these still have their shapes."""
        shapes = dict(self.by_path)
        if params is not None:
            now = dict(ParameterShapes.of(params).by_path)
            for path, shape in shapes.items():
                if now.get(path, shape) != shape:
                    raise ValueError(
                        f"parameter {path} must be {shape} as it was in `init`, got "
                        f"{now[path]}; chain mean_over_prompts() right after the "
                        "weights, or every parameter gets a copy for each prompt."
                    )
        gradients = ParameterShapes.of(updates).by_path
        for path, got in gradients:
            shape = shapes.get(path, got[1:])
            if not got or got[1:] != shape:
                raise ValueError(
                    f"gradient {path} must be [P, *{shape}], one per prompt and shaped "
                    f"as `init` saw the parameter, got {got}; {_ORDER}"
                )
            if got[0] != gradients[0][1][0]:
                raise ValueError(
                    "gradients must be of the same prompts, [P, *param_shape], got "
                    f"{gradients[0][0]} {gradients[0][1]} and {path} {got}."
                )


class ScaleByPromptWeightsState(NamedTuple):
    """State of `scale_by_prompt_weights`."""

    weights_state: Any  # of the rule
    shapes: ParameterShapes


class MeanOverPromptsState(NamedTuple):
    """State of `mean_over_prompts`."""

    shapes: ParameterShapes


def scale_by_prompt_weights(
    prompt_weights: PromptWeights,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies prompt p's gradient by its weight.

    `update` takes per-prompt gradients, leaves [P, *param_shape], plus the keyword
    `rewards` [P, G], and `prompt_ids` [P] where the rule remembers prompts. It keeps
    the prompt axis: chain `mean_over_prompts` after it. Without that the next update
    raises ValueError: it meets parameters with a prompt axis that `init` did not see.
    Chain it first: what an optimizer makes of these gradients cannot be told from them.
    """
    check_rule("prompt_weights", prompt_weights)

    def init_fn(params: Any) -> ScaleByPromptWeightsState:
        shapes = ParameterShapes.of(params)
        return ScaleByPromptWeightsState(prompt_weights.init(), shapes)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        rewards: jax.Array | None = None,
        prompt_ids: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByPromptWeightsState]:
        del extra_args
        if rewards is None:
            raise ValueError(
                "rewards must be [P, G], those of the prompts, got None; call "
                "update(grads, state, params, rewards=rewards). Where something else "
                "calls update, as flax's TrainState does, take the gradients by "
                "weighted_value_and_grad and leave the weights out of the chain."
            )
        weights, weights_state = apply_weights(
            prompt_weights, rewards, state.weights_state, prompt_ids
        )

        def precondition(path: Any, g: jax.Array) -> jax.Array:  # g: [P, *param_shape]
            if g.shape[:1] != weights.shape:
                raise ValueError(
                    f"gradient {jax.tree_util.keystr(path)} must be [{weights.size}, "
                    f"*param_shape], one per prompt, got {g.shape}; {_ORDER}"
                )
            return g * jnp.expand_dims(weights, range(1, g.ndim)).astype(g.dtype)

        scaled = jax.tree_util.tree_map_with_path(precondition, updates)
        state.shapes.check(updates, params)
        return scaled, ScaleByPromptWeightsState(weights_state, state.shapes)

    # optax's own type of `update` has no required keyword, that of a state is narrow.
    return optax.GradientTransformationExtraArgs(
        init_fn,  # pyright: ignore[reportArgumentType]
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def scale_by_group_std(
    *, eps: float = 1e-6, ddof: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Multiplies prompt p's gradient by `inverse_std(rewards)[p]`: GRPO as a transform.

    `optax.chain(scale_by_group_std(), mean_over_prompts(), optax.adamw(lr))`, then
    `tx.update(grads, state, params, rewards=rewards)`. `optax.inject_hyperparams` may
    inject eps and ddof.
    """
    return scale_by_prompt_weights(std_weights(eps=eps, ddof=ddof))


def mean_over_prompts() -> optax.GradientTransformation:
    """The mean of gradients [P, ...] over prompts; chain it right after the weights.

    A gradient that is not [P, *param_shape] of the parameters in `init` is a
    ValueError: of one without the prompt axis, the parameter's rows would be averaged.
    So is a tree that `optax.masked` or `multi_transform` left parts out of: these would
    keep the prompt axis, and grow when the updates are applied.
    """

    def init_fn(params: Any) -> MeanOverPromptsState:
        nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, _MASKED))
        if any(isinstance(x, _MASKED) for x in nodes):
            raise ValueError(
                "mean_over_prompts must see every parameter, got a tree with parts "
                "masked out, which would keep the prompt axis; put optax.masked or "
                "multi_transform after it: chain(scale_by_prompt_weights(rule), "
                "mean_over_prompts(), multi_transform(...))."
            )
        return MeanOverPromptsState(ParameterShapes.of(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[Any, MeanOverPromptsState]:
        state.shapes.check(updates, params)
        return jax.tree.map(lambda g: g.mean(0), updates), state

    # optax's own type of a state is narrower than what it takes.
    return optax.GradientTransformation(
        init_fn,  # pyright: ignore[reportArgumentType]
        update_fn,  # pyright: ignore[reportArgumentType]
    )
