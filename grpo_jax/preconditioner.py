"""START HERE. GRPO's division by std is a per-prompt preconditioner.

    g  =  mean_p  w_p * g_p        g_p: prompt p's policy gradient (centred rewards)

w_p = 1 gives REINFORCE, w_p = 1 / (std_p + eps) gives GRPO: the advantages of a group
share one factor, and a gradient is linear in its advantages. So the division can happen
in three equal places, and a property test holds them together:

1. on the advantages: `whitened_advantages`, or an `Objective` with scale="std";
2. on per-prompt gradients [P, ...]: `scale_by_group_std` in an optax chain (this file);
3. on the cotangent of the [P] losses: `jax.vjp(per_prompt_losses, ...)` pulled back
   through w / P. One backward pass, no [P, params] memory; the trainer does this.

Where it stops holding: KL, entropy and weight-decay terms are not proportional to the
advantage, so they are added after the weights. And the mean divides by P, tied groups
(weight 0) included: dropping them, as dynamic sampling does, changes that P.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.advantages import (
    expected_group_std,
    group_statistics,
    group_std,
    inverse_batch_std,
    inverse_beta_density,
    inverse_group_mean,
)

# What each peer divides by: `std_weights(**PEER_STD["trl"])`, or an Objective's std_eps
# and std_ddof.
PEER_STD: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "trl": {"ddof": 1, "eps": 1e-4},
        "verl": {"ddof": 1, "eps": 1e-6},
        "tunix": {"ddof": 1, "eps": 1e-6},
        "easydel": {"ddof": 0, "eps": 1e-4},
        "lmpo": {"ddof": 0, "eps": 1e-8},
        "oat": {"ddof": 1, "eps": 1e-8},
        "openrlhf": {"ddof": 1, "eps": 1e-9},
    }
)

Power = float | optax.Schedule  # a schedule counts calls: one per batch of rollouts


class PromptWeights(NamedTuple):
    """A rule that weighs prompts: a pure pair of functions, optax-style.

    Attributes:
        init: () -> state, any pytree (checkpointed with the optimizer's).
        weights: (rewards [P, G], state) -> (weights [P], state).
        by_prompt: The rule remembers prompts: `weights` takes a third argument,
            prompt_ids [P], different from each other within a batch.
    """

    init: Callable[[], Any]
    weights: Callable[..., tuple[jax.Array, Any]]
    by_prompt: bool = False


def apply_weights(
    rule: PromptWeights, rewards: jax.Array, state: Any, prompt_ids=None
) -> tuple[jax.Array, Any]:
    """(weights [P], new state) of any rule.

    Raises:
        ValueError: the rule remembers prompts and is not told which they are.
    """
    if not rule.by_prompt:
        return rule.weights(rewards, state)
    if prompt_ids is None or prompt_ids.shape != rewards.shape[:1]:
        got = None if prompt_ids is None else prompt_ids.shape
        raise ValueError(
            f"prompt_ids must be [{rewards.shape[0]}], one per prompt, got {got}; "
            "these weights remember each prompt."
        )
    return rule.weights(rewards, state, prompt_ids)


def _stateless(weights: Callable[[jax.Array], jax.Array]) -> PromptWeights:
    return PromptWeights(
        init=lambda: (), weights=lambda rewards, state: (weights(rewards), state)
    )


def unit_weights() -> PromptWeights:
    """w_p = 1: plain REINFORCE."""
    return _stateless(lambda rewards: jnp.ones_like(group_statistics(rewards).mean))


def std_weights(
    *, eps: float = 1e-6, ddof: int = 0, power: Power = 1.0
) -> PromptWeights:
    """w_p = (std_p + eps)^-power, exactly 0 for a tied group.

    The family w = sigma^(k - 2), k = 2 - power: its members ascend different objectives
    (binary rewards, exact std): power 0 ascends sum p_x (REINFORCE), 1
    sum 2 asin sqrt p_x (GRPO), 2 sum logit p_x.

    Args:
        eps: Added to the std, in reward units.
        ddof: 0 for the population std, 1 for the sample std.
        power: How much of the std is divided out, or a schedule of it (then the state
            counts the calls).

    References:
        Ge et al. 2026, arXiv:2601.23135 (the preconditioner view of power 1).
    """
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}.")

    def weights(rewards, power):
        std, tied = group_std(rewards, ddof=ddof)
        return jnp.where(tied, 0.0, jnp.where(tied, 1.0, std + eps) ** -power)

    if not callable(power):
        return _stateless(lambda rewards: weights(rewards, power))
    return PromptWeights(
        init=lambda: jnp.zeros((), jnp.int32),
        weights=lambda rewards, count: (
            weights(rewards, power(count)),
            optax.safe_increment(count),
        ),
    )


def batch_std_weights(*, eps: float = 1e-6, ddof: int = 0) -> PromptWeights:
    """w_p = 1 / (std of all the batch's rewards + eps): the same for every prompt."""
    return _stateless(lambda rewards: inverse_batch_std(rewards, eps=eps, ddof=ddof))


def group_mean_weights(*, eps: float = 1e-6) -> PromptWeights:
    """w_p = 1 / (mean_p + eps): MaxRL, ascends sum log p_x (`inverse_group_mean`)."""
    return _stateless(lambda rewards: inverse_group_mean(rewards, eps=eps))


def beta_weights() -> PromptWeights:
    """w_p = 1 / Beta density at mean_p, fitted to the batch: BNPO."""
    return _stateless(inverse_beta_density)


def finite_group_weights(group_size: int | None = None) -> PromptWeights:
    """The weight that dividing by the std of a finite group has on average.

    w_p = w_G(p) / ((1 - 1/n) p (1 - p)), with w_G `expected_group_std`, at p the mean
    of the group's n rewards; 0 for a tied group. Were p the true pass rate, the centred
    gradient times w_p would have exactly the expectation of std-normalisation with
    groups of G. At G = n = 2 and 3 w_p is a constant (2, and 1.5 sqrt 2): normalisation
    is a rescale. For p far below 1 / G it saturates, at sqrt(G - 1) n / (n - 1); as G
    grows it is 1 / sigma.

    Args:
        group_size: G, whose normalisation is meant; default: as many as there are
            columns of rewards.
    """
    if group_size is not None and group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}.")

    def weights(rewards):
        statistics = group_statistics(rewards)
        g = group_size or rewards.shape[1]
        inside = ~statistics.tied & (statistics.mean > 0) & (statistics.mean < 1)
        p = jnp.where(inside, statistics.mean, 0.5)
        centring = 1 - 1 / jnp.maximum(statistics.count, 2)
        scale = expected_group_std(p, g) / (centring * p * (1 - p))
        return jnp.where(inside, scale, 0.0)

    return _stateless(weights)


class PosteriorWeightsState(NamedTuple):
    """Discounted counts of every prompt, and how often the rule was asked."""

    successes: jax.Array | None  # [num_prompts]; None where nothing is remembered
    failures: jax.Array | None
    count: jax.Array  # int32


def posterior_weights(
    num_prompts: int | None = None,
    *,
    power: Power = 1.0,
    prior: float = 0.5,
    discount: float = 0.8,
) -> PromptWeights:
    """w_p = (m (1 - m))^(-power / 2), m the posterior mean of p_x; 0 for a tied group.

    The std of a prior Beta(prior, prior) updated by the group: it cannot come near 0
    by luck. With num_prompts the counts are kept across visits of a prompt: at each
    visit the old ones are discounted and the group's added, so that a prompt visited
    often is known better than one group could tell.

    Args:
        num_prompts: Prompt ids are below it; None: nothing is remembered.
        power: As in `std_weights`.
        prior: Pseudo-counts of success, and of failure.
        discount: What is left of old counts at a visit, in [0, 1].

    The rewards must be in [0, 1]; between, they count as a share of a success.
    """
    if not prior > 0:
        raise ValueError(f"prior must be positive, got {prior}.")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be in [0, 1], got {discount}.")

    def init():
        counts = (None, None)
        if num_prompts is not None:  # two arrays, not one twice: they may be donated
            counts = (jnp.zeros(num_prompts, float), jnp.zeros(num_prompts, float))
        return PosteriorWeightsState(*counts, jnp.zeros((), jnp.int32))

    def weights(rewards, state, prompt_ids=None):
        statistics = group_statistics(rewards)
        share = jnp.clip(statistics.mean, 0, 1)
        successes = share * statistics.count
        failures = statistics.count - successes
        if prompt_ids is not None:
            successes += discount * state.successes[prompt_ids]
            failures += discount * state.failures[prompt_ids]
            state = state._replace(
                successes=state.successes.at[prompt_ids].set(successes),
                failures=state.failures.at[prompt_ids].set(failures),
            )
        mean = (successes + prior) / (successes + failures + 2 * prior)
        exponent = -(power(state.count) if callable(power) else power) / 2
        state = state._replace(count=optax.safe_increment(state.count))
        w = jnp.where(statistics.tied, 0.0, (mean * (1 - mean)) ** exponent)
        return w, state

    return PromptWeights(init, weights, by_prompt=num_prompts is not None)


class ScaleByPromptWeightsState(NamedTuple):
    weights_state: Any  # the rule's own


def scale_by_prompt_weights(
    prompt_weights: PromptWeights,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies prompt p's gradient by its weight.

    `update` takes per-prompt gradients, leaves [P, *param_shape], plus the keyword
    `rewards` [P, G], and `prompt_ids` [P] where the rule remembers prompts. It keeps
    the prompt axis: chain `mean_over_prompts` after it.
    """

    def init_fn(params):
        del params
        return ScaleByPromptWeightsState(prompt_weights.init())

    def update_fn(
        updates, state, params=None, *, rewards, prompt_ids=None, **extra_args
    ):
        del params, extra_args
        weights, weights_state = apply_weights(
            prompt_weights, rewards, state.weights_state, prompt_ids
        )

        def precondition(path, g):  # g: [P, *param_shape]
            if g.shape[:1] != weights.shape:
                raise ValueError(
                    f"gradient {jax.tree_util.keystr(path)} must be [{weights.size}, "
                    f"*param_shape], one per prompt, got {g.shape}; differentiate the "
                    "[P] losses (jax.jacrev), not their mean."
                )
            return g * jnp.expand_dims(weights, range(1, g.ndim)).astype(g.dtype)

        updates = jax.tree_util.tree_map_with_path(precondition, updates)
        return updates, ScaleByPromptWeightsState(weights_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_group_std(
    *, eps: float = 1e-6, ddof: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Multiplies prompt p's gradient by `inverse_std(rewards)[p]`: GRPO as a transform.

    `optax.chain(scale_by_group_std(), mean_over_prompts(), optax.adamw(lr))`, then
    `tx.update(grads, state, params, rewards=rewards)`.
    """
    return scale_by_prompt_weights(std_weights(eps=eps, ddof=ddof))


def mean_over_prompts() -> optax.GradientTransformation:
    """[P, ...] -> [...]: after the weights, before clipping, adam and weight decay."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda g: g.mean(0), updates)
    )
