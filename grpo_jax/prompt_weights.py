"""Rules for prompt weights, and the registry of those that `--weights` names."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from grpo_jax.advantages import (
    as_array,
    check_number,
    expected_group_std,
    group_statistics,
    inverse_batch_std,
    inverse_beta_density,
    inverse_group_mean,
    not_negative,
    whole_number,
)
from grpo_jax.preconditioner import (
    Power,
    PromptWeights,
    check_power,
    stateless,
    std_weights,
    unit_weights,
)

# What each other library divides by: `std_weights(**PEER_STD["trl"])`, or an
# Objective's std_eps and std_ddof.
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


def batch_std_weights(*, eps: float = 1e-6, ddof: int = 0) -> PromptWeights:
    """w_p = 1 / (std of all the batch's rewards + eps): the same for every prompt."""
    check_number("eps", eps, not_negative, "must not be negative")
    check_number("ddof", ddof, lambda x: (x == 0) | (x == 1), "must be 0 or 1")
    return stateless(lambda rewards: inverse_batch_std(rewards, eps=eps, ddof=ddof))


def of_pass_rates(rule: PromptWeights) -> PromptWeights:
    """A rule that reads the mean of rewards as a pass rate, held to rewards in [0, 1].

    A sum of several rewards has no pass rate: give the rule what was solved, 0 or 1.
    Shares of a success, in between, count as such. Its weights raise ValueError for
    other rewards; inside jit, where no value can be read, they are NaN for that group.
    """

    def weights(
        rewards: jax.Array, state: Any, *prompt_ids: jax.Array
    ) -> tuple[jax.Array, Any]:
        rewards = as_array(rewards)
        outside = (jnp.isfinite(rewards) & ((rewards < 0) | (rewards > 1))).any(-1)
        if not isinstance(outside, Tracer) and outside.any():
            raise ValueError(
                "rewards must be in [0, 1] for weights made of pass rates, got "
                f"{np.nanmin(rewards):g} to {np.nanmax(rewards):g}; give the rule what "
                "was solved (0 or 1), or take unit, std or batch_std weights, which "
                "read any reward."
            )
        w, state = rule.weights(rewards, state, *prompt_ids)
        return jnp.where(outside, jnp.nan, w), state

    return PromptWeights(rule.init, weights, rule.by_prompt, pass_rates=True)


def group_mean_weights(*, eps: float = 1e-6) -> PromptWeights:
    """w_p = 1 / (mean_p + eps): MaxRL, of rewards `of_pass_rates`.

    It ascends sum log p_x as G grows (`inverse_group_mean` has the finite group's).
    """
    check_number("eps", eps, not_negative, "must not be negative")
    return of_pass_rates(stateless(lambda r: inverse_group_mean(r, eps=eps)))


def beta_weights() -> PromptWeights:
    """w_p = 1 / Beta density at mean_p, fitted to the batch: BNPO, `of_pass_rates`."""
    return of_pass_rates(stateless(inverse_beta_density))


def finite_group_weights(group_size: int | None = None) -> PromptWeights:
    """The weight that dividing by the std of a finite group has on average.

    w_p = w_G(p) / ((1 - 1/n) p (1 - p)), with w_G `expected_group_std`, at p the mean
    of the group's n rewards; 0 for a tied group. Were p the true pass rate, the centred
    gradient times w_p would have exactly the expectation of std-normalisation with
    groups of G. At G = n = 2 and 3 w_p is a constant (2, and 1.5 sqrt 2): normalisation
    is a rescale. For p far below 1 / G it saturates, at sqrt(G - 1) n / (n - 1); as G
    grows it is 1 / sigma.

    Args:
        group_size: G, the group whose normalisation is meant; default: the columns of
            rewards.
    """
    if group_size is not None:
        group_size = whole_number("group_size", group_size, 2)

    def weights(rewards: jax.Array) -> jax.Array:
        statistics = group_statistics(rewards)
        g = group_size or rewards.shape[1]
        inside = ~statistics.tied & (statistics.mean > 0) & (statistics.mean < 1)
        p = jnp.where(inside, statistics.mean, 0.5)
        centring = 1 - 1 / jnp.maximum(statistics.count, 2)
        scale = expected_group_std(p, g) / (centring * p * (1 - p))
        return jnp.where(inside, scale, 0.0)

    return of_pass_rates(stateless(weights))


class PosteriorWeightsState(NamedTuple):
    """Discounted counts of every prompt, and the number of calls."""

    successes: Any  # [num_prompts] array, or None without memory
    failures: Any
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
    visit the old ones are discounted and the group's are added, so that an often
    visited prompt is estimated from more than one group.

    Args:
        num_prompts: Prompt ids are 0 to num_prompts - 1: others raise, or under jit
            get a NaN weight. None: each group counts by itself, as under `--weights
            shrunk`, and `discount` changes nothing.
        power: As in `std_weights`.
        prior: Pseudo-counts of success, and of failure.
        discount: What is left of old counts at a visit, in [0, 1].

    The rewards must be in [0, 1]; between, they count as a share of a success.
    """
    if num_prompts is not None:
        num_prompts = whole_number("num_prompts", num_prompts, 1)
    check_power(power)
    check_number("prior", prior, lambda x: x > 0, "must be positive")
    check_number(
        "discount", discount, lambda x: (x >= 0) & (x <= 1), "must be in [0, 1]"
    )

    def init() -> PosteriorWeightsState:
        counts = (None, None)
        if num_prompts is not None:  # two arrays, not one twice: they may be donated
            counts = (jnp.zeros(num_prompts, float), jnp.zeros(num_prompts, float))
        return PosteriorWeightsState(*counts, jnp.zeros((), jnp.int32))

    def weights(
        rewards: jax.Array,
        state: PosteriorWeightsState,
        prompt_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, PosteriorWeightsState]:
        statistics = group_statistics(rewards)
        share = jnp.clip(statistics.mean, 0, 1)
        successes = share * statistics.count
        failures = statistics.count - successes
        known: Any = True
        if prompt_ids is not None and num_prompts is not None:
            ids = _ids_below(prompt_ids, num_prompts)
            _check_size(state.successes, num_prompts)
            visited = jnp.zeros(num_prompts, bool).at[ids].set(True)

            def count(old: jax.Array, of_groups: jax.Array) -> jax.Array:
                """[num_prompts]; a prompt that comes twice counts both groups."""
                added = jnp.zeros_like(old).at[ids].add(of_groups)
                return jnp.where(visited, discount * old + added, old)

            state = state._replace(
                successes=count(state.successes, successes),
                failures=count(state.failures, failures),
            )
            known = ids < num_prompts
            successes, failures = state.successes[ids], state.failures[ids]
        mean = (successes + prior) / (successes + failures + 2 * prior)
        now: Any = power(state.count) if callable(power) else power
        exponent = -now / 2
        state = state._replace(count=optax.safe_increment(state.count))
        w = jnp.where(statistics.tied, 0.0, (mean * (1 - mean)) ** exponent)
        return jnp.where(known, w, jnp.nan), state

    rule = PromptWeights(init, weights, by_prompt=num_prompts is not None)
    return of_pass_rates(rule)


def _ids_below(prompt_ids: jax.Array, num_prompts: int) -> jax.Array:
    """[P] the same ids; under jit num_prompts, which no prompt has, for others.

    Raises:
        ValueError: some are not from 0 to num_prompts - 1, outside jit.
    """
    known = (prompt_ids >= 0) & (prompt_ids < num_prompts)
    if not isinstance(known, Tracer) and not np.all(known):
        wrong = np.asarray(prompt_ids)[~np.asarray(known)]
        raise ValueError(
            f"prompt_ids must be 0 to {num_prompts - 1}, got {wrong.tolist()}; these "
            f"weights were made with num_prompts={num_prompts}."
        )
    return jnp.where(known, prompt_ids, num_prompts)


def _check_size(counts: jax.Array, num_prompts: int) -> None:
    """ValueError for the state of a rule that was made for other prompts."""
    if counts.shape != (num_prompts,):
        raise ValueError(
            f"the state has counts of {len(counts)} prompts, and these weights were "
            f"made with num_prompts={num_prompts}; begin with rule.init()."
        )


class Rule(NamedTuple):
    """A row of `WEIGHTS`.

    Attributes:
        uses: The settings of `WeightsConfig` that it has.
        build: (settings given, number of trained prompts) -> the rule.
        text: The weight of a prompt, as a run's first line writes it.
        pass_rates: It is made of pass rates (`of_pass_rates`). In a run those are of
            the first reward, 1 or more where solved; the weights multiply what it pays
            for that, and all else (other rewards, punishments) is added unweighted.
    """

    uses: tuple[str, ...]
    build: Callable[[dict[str, Any], int], PromptWeights]
    text: str
    pass_rates: bool = False


WEIGHTS = {
    "unit": Rule((), lambda s, n: unit_weights(), "1"),
    "std": Rule(
        ("power", "power_end", "eps", "ddof"),
        lambda s, n: std_weights(**s),
        "(std + eps)^-power",
    ),
    "batch_std": Rule(
        ("eps", "ddof"), lambda s, n: batch_std_weights(**s), "1 / batch's std"
    ),
    "group_mean": Rule(
        ("eps",), lambda s, n: group_mean_weights(**s), "1 / group's mean", True
    ),
    "beta": Rule(
        (), lambda s, n: beta_weights(), "1 / Beta density at group's mean", True
    ),
    "finite_group": Rule(
        ("group_size",),
        lambda s, n: finite_group_weights(**s),
        "w_G(mean) / ((1 - 1/n) mean (1 - mean)), n rewards",
        pass_rates=True,
    ),
    "shrunk": Rule(
        ("power", "power_end", "prior"),
        lambda s, n: posterior_weights(None, **s),
        "(posterior std of this group)^-power",
        pass_rates=True,
    ),
    "posterior": Rule(
        ("power", "power_end", "prior", "discount"),
        lambda s, n: posterior_weights(n, **s),
        "(posterior std over visits)^-power",
        pass_rates=True,
    ),
}
