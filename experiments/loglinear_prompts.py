"""Sets of prompts for the solvable policy (grpo_jax.loglinear) of several experiments.

P prompts of K responses, the first of them right; features [P, K, D].
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from grpo_jax.loglinear import LogLinear


def unit_features(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Random directions [P, K, D], each of norm 1."""
    x = rng.normal(size=shape)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def offsets_for(pass_rates: np.ndarray, responses: int) -> np.ndarray:
    """Logits [P, K] under which response 0 has its pass rate [P], the others equal
    shares of the rest."""
    p = np.asarray(pass_rates)
    offsets = np.zeros((len(p), responses))
    offsets[:, 0] = np.log(p / (1 - p)) + np.log(responses - 1)
    return offsets


def first_is_right(num_prompts: int, responses: int) -> np.ndarray:
    """Rewards [P, K]."""
    return np.eye(responses)[0] * np.ones((num_prompts, 1))


def make_prompts(
    kind: str,
    pass_rates: tuple[float, float],
    seed: int,
    *,
    num_prompts: int,
    responses: int,
    block: int,
) -> LogLinear:
    """Prompts with unit features and pass rates log-spaced between two at theta = 0.

    kind: "orthogonal" (a block of `block` parameters for each prompt), "aligned" (half
        of each squared norm on one shared direction, + for right), or "mixed<D>"
        (random directions in D dimensions: cosines of either sign).

    Raises:
        ValueError: `kind` is none of these.
    """
    mixed = kind.startswith("mixed")
    if not mixed and kind not in ("orthogonal", "aligned"):
        raise ValueError(
            f"features must be orthogonal, aligned or mixed<dimensions>, got {kind}."
        )
    n, k = num_prompts, responses
    width = int(kind.removeprefix("mixed")) if mixed else block
    x = unit_features(np.random.default_rng(seed), (n, k, width))
    if not mixed:
        x = np.einsum("pkd,pq->pkqd", x, np.eye(n)).reshape(n, k, n * width)
    if kind == "aligned":
        shared = np.where(np.arange(k) == 0, 1.0, -1.0)[None, :, None].repeat(n, 0)
        x = np.concatenate([x, shared], -1) / np.sqrt(2)
    offsets = offsets_for(np.geomspace(*pass_rates, n), k)
    return LogLinear(x, first_is_right(n, k), offsets)


def independent_prompts(
    seed: int, dimension: int, *, num_prompts: int, responses: int
) -> LogLinear:
    """Prompts with independent normal features and pass rates that differ."""
    rng = np.random.default_rng([seed, dimension])
    features = rng.normal(size=(num_prompts, responses, dimension))
    rewards = first_is_right(num_prompts, responses)
    return LogLinear(features, rewards, 2 * rng.normal(size=rewards.shape))


def stacked(policies: Sequence[LogLinear]) -> LogLinear:
    """One LogLinear with a leading axis of policies, its arrays on the device."""
    return LogLinear(*map(jnp.asarray, map(np.stack, zip(*policies, strict=True))))
