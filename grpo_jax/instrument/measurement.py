"""What the device measures of the probe prompts."""

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
from grpo_jax.rollouts.logprobs import batch_logprobs
from grpo_jax.rollouts.micro_batches import MicroBatch, micro_batch
from grpo_jax.rollouts.types import Rollouts


class Measurement(NamedTuple):
    """What the device measures of P probe prompts."""

    probes: Probe  # leaves [P, ...]
    geometry: PromptGeometry
    null_cosines: jax.Array  # [P, P] of differences of parts: sampling noise alone
    feature_cosines: jax.Array  # [P, P] of hidden states, mean over tokens and samples
    centred_feature_cosines: jax.Array  # of the same less their mean over prompts
    exact_cosines: jax.Array  # [P, P] of the exact pass rates' gradients; or NaN
    exact_norms: jax.Array  # [P]


def measure(
    policy: Policy,
    rollouts: Rollouts,
    answers: Rollouts | None,
    temperature: jax.Array,
    key: jax.Array,
    *,
    width: int,
    exact: bool,
    micro_batch_tokens: int = 2**16,
) -> Measurement:
    """A look at rollouts [P, G, T] with rewards; answers [P, 1, T] or None.

    Passes are split so that each sees about `micro_batch_tokens` tokens.
    """
    length, t = rollouts.prompts.shape[1], rollouts.completions.shape[-1]
    hash_fn = partial(gradient_hash, key=key, width=width)

    def sequence_logprobs(prompt, params, samples):
        completions, mask = samples
        group = Rollouts(*(x[None] for x in (*prompt, *samples)), mask[None])
        n = completions.shape[0]
        micro = micro_batch(1, n, length, t, micro_batch_tokens)
        current = policy.replace(params)
        return batch_logprobs(current, group, temperature, micro)[0].sum(-1)

    def one_prompt(x):
        rollouts, answer = x
        log_prob_fn = partial(
            sequence_logprobs, (rollouts.prompts, rollouts.prompt_mask)
        )
        right = None
        if answer is not None:
            right = (answer.completions, answer.completion_mask)
        return probe_prompt(
            log_prob_fn,
            policy.params,
            (rollouts.completions, rollouts.completion_mask),
            rollouts.rewards,
            hash_fn,
            right,
        )

    def feature(rollouts):
        """[D] mean hidden state of a prompt's sampled tokens."""
        prompt = (rollouts.prompts[None], rollouts.prompt_mask[None])
        g = rollouts.completions.shape[0]
        size = micro_batch(1, g, length, t, micro_batch_tokens).samples

        def total(x):
            completions, mask = x
            hidden = completion_hidden(policy.module(), *prompt, completions[None])[0]
            return (hidden * mask[..., None]).sum((0, 1), jnp.float32)

        cut = (rollouts.completions, rollouts.completion_mask)
        cut = jax.tree.map(lambda x: x.reshape(g // size, size, t), cut)
        count = jnp.maximum(rollouts.completion_mask.sum(), 1)
        return jax.lax.map(total, cut).sum(0) / count

    probes = jax.lax.map(one_prompt, (rollouts, answers))
    features = jax.lax.map(feature, rollouts)
    geometry = parts_geometry(
        rollouts.rewards, probes.vectors, num_directions=None if exact else width
    )
    parts = probes.vectors.shape[1]
    signs = jnp.where(jnp.arange(parts) % 2 == 0, 1.0, -1.0)
    noise = jnp.einsum("h,phk->pk", signs, probes.vectors)
    # A part without signal leaves the others' mean in the difference.
    whole = (probes.vectors != 0).any(2).all(1)
    noise = jnp.where(whole[:, None], noise, 0.0)
    kept = {"vectors": None, "exact_vector": None}  # large, and in the matrices
    return Measurement(
        probes._replace(**kept),
        geometry,
        cosines(noise),
        cosines(features),
        cosines(features - features.mean(0)),
        cosines(probes.exact_vector),
        jnp.linalg.norm(probes.exact_vector, axis=1),
    )


def cosines(vectors: jax.Array) -> jax.Array:
    """[P, P] of vectors [P, K]; NaN where one of them is 0."""
    norms = jnp.linalg.norm(vectors, axis=1)
    unit = vectors / jnp.where(norms > 0, norms, jnp.nan)[:, None]
    return unit @ unit.T


class UpdateEffect(NamedTuple):
    """Of P prompts along a change of the parameters, per that change; to its square."""

    slope: jax.Array  # [P]
    curvature: jax.Array
    exact_slope: jax.Array  # NaN where no single answer is right
    exact_curvature: jax.Array


def update_effect(
    policy: Policy,
    change: Any,
    rollouts: Rollouts,
    answers: Rollouts | None,
    temperature: jax.Array,
    *,
    micro: MicroBatch,
) -> UpdateEffect:
    """Slope and curvature of every probe prompt's expected reward along `change`."""
    group = rollouts._replace(rewards=None)
    if answers is not None:  # one more completion of each prompt

        def join(name):
            pair = (getattr(rollouts, name), getattr(answers, name))
            return jnp.concatenate(pair, axis=1)

        names = ("completions", "completion_mask", "behaviour_logprobs")
        group = group._replace(**{name: join(name) for name in names})

    def sequence_logprobs(params):
        current = policy.replace(params)
        return batch_logprobs(current, group, temperature, micro).sum(-1)

    value, first, second = directional_derivatives(
        sequence_logprobs, policy.params, change
    )
    g = rollouts.rewards.shape[1]
    exact = jnp.full((2, len(value)), jnp.nan)
    if answers is not None:
        exact = jnp.exp(value[:, g]) * jnp.stack(
            [first[:, g], first[:, g] ** 2 + second[:, g]]
        )
    first, second = first[:, :g], second[:, :g]
    return UpdateEffect(
        prompt_slope(rollouts.rewards, first),
        prompt_curvature(rollouts.rewards, first, second),
        *exact,
    )
