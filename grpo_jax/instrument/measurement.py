"""What the device computes in a probe measurement, and along the update after it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.diagnostics.curvature import (
    directional_derivatives,
    prompt_curvature,
    prompt_slope,
)
from grpo_jax.diagnostics.geometry import PromptGeometry, parts_geometry
from grpo_jax.diagnostics.probe import Probe, probe_prompt
from grpo_jax.diagnostics.sketch import gradient_hash
from grpo_jax.models.forward import completion_hidden
from grpo_jax.models.policy import Policy
from grpo_jax.precision import float32_products
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.rollouts.types import Rollouts


class Measurement(NamedTuple):
    """Gradients and curvature of P probe prompts under one policy."""

    probes: Probe  # leaves [P, ...]; `vectors` and `exact_vector` are None
    geometry: PromptGeometry
    null_cosines: jax.Array  # [P, P] between differences of parts: sampling noise alone
    feature_cosines: jax.Array  # [P, P] of hidden states, mean over tokens and samples
    centred_feature_cosines: jax.Array  # [P, P] of the same less their prompt mean
    exact_cosines: jax.Array  # [P, P] of the exact pass rates' gradients; or NaN
    exact_norms: jax.Array  # [P] norms of those gradients; or NaN


def measure(
    policy: Policy,
    rollouts: Rollouts,
    answers: Rollouts | None,
    temperature: float | jax.Array,
    key: jax.Array,
    *,
    width: int,
    exact: bool,
    micro_batch_tokens: int = 2**16,
    layers: int | None = None,
) -> Measurement:
    """Measures geometry and curvature of P prompts from their groups of G samples.

    Args:
        policy: With parameters.
        rollouts: [P, G, T] completions with rewards [P, G].
        answers: [P, 1, T], the only completion of each prompt with reward 1 (the others
            have 0); None where several are right or rewards are graded.
        temperature: Of sampling.
        key: Of `gradient_hash`; the same for all prompts.
        width: K, the coordinates kept of a gradient.
        exact: Whether K holds all coordinates, so that inner products are exact.
        micro_batch_tokens: Tokens in one pass, about.
        layers: Gradients are those of so many layers, the last ones; None: of all
            trained parameters.
    """
    policy = _cast_once(policy)
    rewards = _rewards(rollouts)
    hash_fn = partial(gradient_hash, key=key, width=width)
    params, replaced = measured_parameters(policy, layers)
    logprobs = partial(group_logprobs, replaced, temperature, micro_batch_tokens)

    def probe(prompt: tuple[Rollouts, Rollouts | None]) -> Probe:
        group, answer = prompt
        return probe_prompt(
            partial(logprobs, (group.prompts, group.prompt_mask)),
            params,
            _samples(group),
            _rewards(group),
            hash_fn,
            None if answer is None else _samples(answer),
        )

    probes = jax.lax.map(probe, (rollouts, answers))
    features = jax.lax.map(
        partial(mean_hidden_state, policy, micro_batch_tokens), rollouts
    )  # [P, D]
    geometry = parts_geometry(
        rewards, probes.vectors, num_directions=None if exact else width
    )
    # The vectors are large, and the matrices hold what the rows need of them.
    without_vectors: dict[str, Any] = {"vectors": None, "exact_vector": None}
    return Measurement(
        probes._replace(**without_vectors),
        geometry,
        cosines(noise_vectors(probes.vectors)),
        cosines(features),
        cosines(features - features.mean(0)),
        cosines(probes.exact_vector),
        jnp.linalg.norm(probes.exact_vector, axis=1),
    )


def _cast_once(policy: Policy) -> Policy:
    """The policy with LoRA's base in the compute dtype.

    Cast where it is used, the base would be kept once more for every use of it: a
    derivative through the loops over samples and layers takes all that depends on
    neither out of them.
    """
    dtype = policy.config.dtype
    frozen = jax.tree.map(lambda x: x.astype(dtype), policy.frozen)
    return dataclasses.replace(policy, frozen=frozen)


def _rewards(rollouts: Rollouts) -> jax.Array:
    if rollouts.rewards is None:
        raise ValueError("rollouts must have rewards, got None; score them first.")
    return rollouts.rewards


def _samples(group: Rollouts) -> tuple[jax.Array, jax.Array]:
    """(completions, completion_mask), each [G, T], of one prompt."""
    return group.completions, group.completion_mask


def measured_parameters(
    policy: Policy, layers: int | None
) -> tuple[Any, Callable[[Any], Policy]]:
    """(the parameters of the last `layers` layers, the policy with others of them).

    Args:
        policy: With parameters; its layers' are stacked.
        layers: None: all trained parameters.
    """
    if layers is None:
        return policy.params, policy.replace
    stacked = policy.params["layers"]
    first = jax.tree.map(lambda x: x[:-layers], stacked)
    lower = policy.replace(policy.params | {"layers": first})

    def replaced(params: Any) -> Policy:
        return dataclasses.replace(lower, tail=params)

    return jax.tree.map(lambda x: x[-layers:], stacked), replaced


def group_logprobs(
    replaced: Callable[[Any], Policy],
    temperature: float | jax.Array,
    micro_batch_tokens: int,
    prompt: tuple[jax.Array, jax.Array],  # ids and mask, each [L]
    params: Any,
    samples: tuple[jax.Array, jax.Array],  # completions and mask, each [G, T]
) -> jax.Array:
    """[G] log-probs of one prompt's completions."""
    (ids, prompt_mask), (completions, mask) = prompt, samples
    n, t = completions.shape
    batch = (ids, prompt_mask, completions, mask)
    ids, prompt_mask, completions, mask = (x[None] for x in batch)
    group = Rollouts(ids, prompt_mask, completions, mask, behaviour_logprobs=mask)
    micro = micro_batch(1, n, ids.shape[1], t, micro_batch_tokens)
    policy = replaced(params).with_all_modes()
    return batch_logprobs(policy, group, temperature, micro)[0].sum(-1)


def mean_hidden_state(
    policy: Policy, micro_batch_tokens: int, group: Rollouts
) -> jax.Array:
    """[D] mean hidden state over one prompt's sampled tokens."""
    (g, t), length = group.completions.shape, group.prompts.shape[0]
    size = micro_batch(1, g, length, t, micro_batch_tokens).samples

    def total(samples: tuple[jax.Array, jax.Array]) -> jax.Array:
        completions, mask = samples
        prompt = (group.prompts[None], group.prompt_mask[None])
        hidden = completion_hidden(policy.module(), *prompt, completions[None])[0]
        return (hidden * mask[..., None]).sum((0, 1), jnp.float32)

    parts = jax.tree.map(lambda x: x.reshape(g // size, size, t), _samples(group))
    count = jnp.maximum(group.completion_mask.sum(), 1)
    return jax.lax.map(total, parts).sum(0) / count


@float32_products()
def noise_vectors(vectors: jax.Array) -> jax.Array:
    """[P, K] alternating sums of the parts' gradients [P, H, K]: their noise alone."""
    parts = vectors.shape[1]
    signs = jnp.where(jnp.arange(parts) % 2 == 0, 1.0, -1.0)
    noise = jnp.einsum("h,phk->pk", signs, vectors)
    # Without signal in one part the sum is not free of the others' mean.
    complete = (vectors != 0).any(2).all(1)
    return jnp.where(complete[:, None], noise, 0.0)


@float32_products()
def cosines(vectors: jax.Array) -> jax.Array:
    """[P, P] cosines between vectors [P, K]; NaN where one of them is 0."""
    norms = jnp.linalg.norm(vectors, axis=1)
    unit = vectors / jnp.where(norms > 0, norms, jnp.nan)[:, None]
    return unit @ unit.T


class UpdateEffect(NamedTuple):
    """Derivatives of P prompts' expected rewards along a change of the parameters.

    In reward units per change and per change squared; exact ones are NaN where several
    answers are right.
    """

    slope: jax.Array  # [P]
    curvature: jax.Array  # [P]
    exact_slope: jax.Array  # [P]
    exact_curvature: jax.Array  # [P]


def update_effect(
    policy: Policy,
    change: Any,
    rollouts: Rollouts,
    answers: Rollouts | None,
    temperature: float | jax.Array,
    *,
    micro: MicroBatch,
) -> UpdateEffect:
    """Slope and curvature of every probe prompt's expected reward along `change`.

    Args:
        policy: With the parameters before the change.
        change: Pytree like the parameters.
        rollouts: [P, G, T] completions sampled before the change, with rewards [P, G].
        answers: [P, 1, T] or None, as for `measure`.
        temperature: Of sampling.
        micro: Split of [P, G] samples, of [P, G + 1] with answers.
    """
    policy = _cast_once(policy.with_all_modes())
    rewards = _rewards(rollouts)
    group = _with_answers(rollouts, answers)

    def sequence_logprobs(params: Any) -> jax.Array:
        current = policy.replace(params)
        return batch_logprobs(current, group, temperature, micro).sum(-1)

    value, first, second = directional_derivatives(
        sequence_logprobs, policy.params, change
    )
    g = rewards.shape[1]
    exact = jnp.full((2, len(value)), jnp.nan)
    if answers is not None:
        exact = jnp.exp(value[:, g]) * jnp.stack(
            [first[:, g], first[:, g] ** 2 + second[:, g]]
        )
    first, second = first[:, :g], second[:, :g]
    return UpdateEffect(
        prompt_slope(rewards, first),
        prompt_curvature(rewards, first, second),
        *exact,
    )


def _with_answers(rollouts: Rollouts, answers: Rollouts | None) -> Rollouts:
    """Unscored rollouts, each answer as one more completion of its prompt."""
    group = rollouts._replace(rewards=None)
    if answers is None:
        return group

    def join(field: Callable[[Rollouts], jax.Array]) -> jax.Array:
        return jnp.concatenate((field(rollouts), field(answers)), axis=1)

    return group._replace(
        completions=join(lambda x: x.completions),
        completion_mask=join(lambda x: x.completion_mask),
        behaviour_logprobs=join(lambda x: x.behaviour_logprobs),
    )
