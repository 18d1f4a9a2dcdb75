"""Gradients and curvature of a real model's probe prompts, one prompt at a time.

Every prompt's figures are kept in a file of their own, so that a script that was killed
goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.diagnostics.geometry import part_weights
from grpo_jax.diagnostics.probe import probe_prompt
from grpo_jax.diagnostics.sketch import gradient_hash
from grpo_jax.instrument.measurement import group_logprobs, mean_hidden_state
from grpo_jax.models.policy import Policy, add_lora, merge_lora
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.streams import run_keys

PART = 8  # samples of a part of a group, whose gradient is kept
_AT_ONCE = 2**16  # tokens of a pass: one group always fits


class Probed(NamedTuple):
    """Measurements of P prompts; those of curvature are None where not asked for."""

    rewards: np.ndarray  # [P, G]
    vectors: np.ndarray  # [P, H, K] hashed gradients of parts of 8 samples
    answers: np.ndarray  # [P, D] hidden states, mean over the samples' tokens
    questions: np.ndarray  # [P, D] mean over the prompt's tokens
    seconds: np.ndarray  # [P] of the gradients, and of curvature if measured
    coordinates: np.ndarray  # [P] of a gradient; if not above K, it is kept as it is
    curvature: np.ndarray | None = None  # [P] along the own gradient, cross-fitted
    halves: np.ndarray | None = None  # [P] see `Probe`
    slope: np.ndarray | None = None  # [P]
    fisher: np.ndarray | None = None  # [P] the paper's proxy, G |mean score|^2

    @property
    def num_directions(self) -> int | None:
        """K where the vectors are hashed; None where they hold every coordinate."""
        width = self.vectors.shape[-1]
        return None if self.coordinates[0] <= width else width


def as_kind(policy: Policy, kind: str, *, rank: int) -> Policy:
    """The same function with other trained parameters.

    kind: "full": every parameter, factors merged into them; "lora": factors of the run
        if it has some, else new ones, of which the second is 0: always the same, so
        that gradients of other seeds' prompts can be compared.
    """
    if kind == "full":
        return policy if policy.frozen is None else merge_lora(policy)
    if policy.frozen is not None:
        return policy
    key = run_keys(0).lora
    return add_lora(policy, rank=rank, alpha=2.0 * rank, key=key)


def kept_in(directory: Path, about: dict[str, Any]) -> Path:
    """The directory of what `about` says, which is written in it."""
    text = json.dumps(about, sort_keys=True)
    folder = directory / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(text)
    return folder


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Writes a .npz file, in one rename."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def probe(
    load: Callable[[], Policy],
    rollouts: Rollouts,
    *,
    width: int,
    curvature: bool,
    directory: Path,
) -> Probed:
    """Measures prompts one by one, each kept in a file of `directory`.

    Args:
        load: Makes the policy, if one is needed; its trained parameters are what
            gradients are of.
        rollouts: [P, G, T] with rewards, on the host.
        width: K, the sums that gradients are hashed to.
        curvature: Whether to measure curvature and the Fisher proxy too.
        directory: Of `kept_in`.
    """
    names = [x for x in Probed._fields if curvature or x not in Probed._field_defaults]
    measured, policy = [], None
    for i in range(len(rollouts.prompts)):
        path = directory / f"prompt-{i}.npz"
        group = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), rollouts)
        kept = dict(np.load(path)) if path.exists() else {}
        same = np.array_equal(kept.get("completions", ()), group.completions)
        if not (same and kept.keys() >= set(names)):
            policy = load() if policy is None else policy
            kept = _measure(policy, group, width=width, curvature=curvature)
            save(path, kept)
            print(f"  prompt {i}: {float(kept['seconds']):.1f} s", flush=True)
        measured.append(kept)
    return Probed(**{name: np.stack([x[name] for x in measured]) for name in names})


def _measure(
    policy: Policy, group: Rollouts, *, width: int, curvature: bool
) -> dict[str, np.ndarray]:
    """One prompt's fields of `Probed`, and its completions."""
    began = time.monotonic()
    if curvature:
        figures = dict(curvature_figures(policy, group, width=width))
    else:
        figures = {"vectors": part_vectors(policy, group, width=width)}
    figures = jax.block_until_ready(figures)
    seconds = time.monotonic() - began
    figures |= {
        "answers": _features(policy, group),
        "questions": mean_question(policy, group),
        "rewards": group.scored_rewards,
        "completions": group.completions,
    }
    figures = {name: np.asarray(x) for name, x in figures.items()}
    size = sum(x.size for x in jax.tree.leaves(policy.params))
    return figures | {"seconds": np.float32(seconds), "coordinates": np.int64(size)}


@partial(jax.jit, static_argnames="width")
def part_vectors(policy: Policy, group: Rollouts, *, width: int) -> jax.Array:
    """[G / 8, K] hashed gradients of the parts of one prompt's group.

    The same as `probe_prompt`'s for as many parts. A tied part is 0, at no cost.
    """
    rewards = group.scored_rewards
    parts = len(rewards) // PART
    weights = part_weights(rewards[None], parts)[0]  # [H, 8]
    logprobs = _logprobs(policy, group)

    def vector(part: tuple) -> jax.Array:
        samples, weights = part
        gradient = jax.grad(lambda params: weights @ logprobs(params, samples))
        return gradient_hash(gradient(policy.params), _hash_key(), width)

    def one(part: tuple) -> jax.Array:
        tied = jnp.zeros(width, jnp.float32)
        return jax.lax.cond((part[1] != 0).any(), vector, lambda _: tied, part)

    samples = jax.tree.map(lambda x: x.reshape(parts, PART, -1), _samples(group))
    return jax.lax.map(one, (samples, weights))


@partial(jax.jit, static_argnames="width")
def curvature_figures(
    policy: Policy, group: Rollouts, *, width: int
) -> dict[str, jax.Array]:
    """Vectors [H, K], curvature, halves, slope and Fisher proxy of one prompt."""
    hash_fn = partial(gradient_hash, key=_hash_key(), width=width)
    logprobs, samples = _logprobs(policy, group), _samples(group)
    found = probe_prompt(
        logprobs, policy.params, samples, group.scored_rewards, hash_fn
    )
    mean = jax.grad(lambda params: logprobs(params, samples).mean())(policy.params)
    squares = sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(mean))
    return {
        "vectors": found.vectors,
        "curvature": found.curvature,
        "halves": found.halves,
        "slope": found.slope,
        "fisher": len(group.scored_rewards) * squares,
    }


def _hash_key() -> jax.Array:
    """One for all gradients: those of other seeds can be compared too."""
    return jax.random.key(2026)


def _logprobs(policy: Policy, group: Rollouts) -> Callable[..., jax.Array]:
    prompt = (group.prompts, group.prompt_mask)
    return partial(group_logprobs, policy.replace, 1.0, _AT_ONCE, prompt)


def _samples(group: Rollouts) -> tuple[jax.Array, jax.Array]:
    """(completions, completion_mask), each [G, T]."""
    return group.completions, group.completion_mask


@jax.jit
def _features(policy: Policy, group: Rollouts) -> jax.Array:
    """[D] mean hidden state over the completions' tokens."""
    return mean_hidden_state(policy, _AT_ONCE, group)


def mean_question(policy: Policy, group: Rollouts) -> jax.Array:
    """[D] mean hidden state over the prompt's tokens but the last.

    Computed as of a completion of the prompt's first token.
    """
    length = len(group.prompts)
    mask = np.asarray(group.prompt_mask).astype(bool)
    tokens = np.asarray(group.prompts)[mask]
    rest = np.zeros((1, length - 1), np.int32)
    rest_mask = np.zeros_like(rest)
    rest[0, : len(tokens) - 1], rest_mask[0, : len(tokens) - 1] = tokens[1:], 1
    first, one = jnp.asarray(tokens[:1]), jnp.ones(1, jnp.int32)
    rest, rest_mask = jnp.asarray(rest), jnp.asarray(rest_mask)
    question = Rollouts(first, one, rest, rest_mask, rest_mask.astype(jnp.float32))
    return _features(policy, question)


def hash_errors(
    policy: Policy, rollouts: Rollouts, widths: Sequence[int]
) -> dict[str, Any]:
    """Exact cosines of whole groups' gradients beside those of hashed ones.

    The gradients of all prompts of `rollouts` are in memory at once: give a few.
    """

    @jax.jit
    def gradient(policy: Policy, group: Rollouts) -> Any:
        weights = part_weights(group.scored_rewards[None], 1)[0, 0]
        fn = _logprobs(policy, group)
        return jax.grad(lambda x: weights @ fn(x, _samples(group)))(policy.params)

    @jax.jit
    def inner(a: Any, b: Any) -> jax.Array:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum((x * y).sum() for x, y in pairs)

    count = len(rollouts.prompts)
    groups = [
        jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), rollouts) for i in range(count)
    ]
    found = [gradient(policy, group) for group in groups]
    gram = np.array([[float(inner(a, b)) for b in found] for a in found])
    above = np.triu_indices(count, 1)

    def cosines(gram: np.ndarray) -> list[float]:  # [P, P]
        norms = np.sqrt(np.diag(gram))
        return [round(float(x), 5) for x in (gram / np.outer(norms, norms))[above]]

    hashed = {}
    for width in widths:
        fold = jax.jit(partial(gradient_hash, width=width))
        vectors = np.stack([np.asarray(fold(g, _hash_key()), float) for g in found])
        hashed[str(width)] = cosines(vectors @ vectors.T)
    return {"exact": cosines(gram), "hashed": hashed}
