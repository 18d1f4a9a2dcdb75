"""The bounds that convergence_rates.py checks, against runs that they should bound.

Theorems 3.1 and 3.2 are those of arXiv:2601.23135, A and C ours. Shapes: I random
single prompts, T steps.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from grpo_jax import loglinear
from grpo_jax.loglinear import LogLinear

METHODS = ("reinforce", "std", "log-odds")  # weights sigma^-0, sigma^-1, sigma^-2


class Trace(NamedTuple):
    """Full-batch ascents of single prompts, each field [I, T + 1]."""

    log_odds: jax.Array
    sigma: jax.Array
    norm2: jax.Array  # |grad J|^2
    delta2: jax.Array  # |grad logit p|^2


@functools.partial(jax.jit, static_argnums=(1, 3))
def trace(policies: LogLinear, power: int, steps: jax.Array, horizon: int) -> Trace:
    """Ascents with weights sigma^-power; a constant step size per policy, steps [I]."""

    def run(policy, step):
        def one(theta, _):
            now = loglinear.exact(policy, theta)
            logits = policy.features @ theta + policy.offsets
            right, wrong = (
                jax.nn.logsumexp(jnp.where(policy.rewards == r, logits, -jnp.inf))
                for r in (1, 0)
            )
            norm2 = (now.gradients**2).sum()
            out = Trace(right - wrong, now.sigma[0], norm2, norm2 / now.sigma[0] ** 4)
            return theta + step * (now.sigma**-power) @ now.gradients, out

        theta = jnp.zeros(policy.features.shape[-1])
        return jax.lax.scan(one, theta, length=horizon + 1)[1]

    return jax.vmap(run)(policies, steps)


def random_prompts(instances: int, responses: int, block: int) -> LogLinear:
    """Single prompts with 1 to K - 1 right responses and pass rates of all sizes."""
    rng = np.random.default_rng(0)
    n, k = instances, responses
    right = np.arange(k) < rng.integers(1, k, (n, 1))
    offsets = rng.normal(size=(n, k))
    sums = [(np.exp(offsets) * side).sum(1) for side in (right, ~right)]
    shift = rng.uniform(-7, 3, n) - np.log(sums[0] / sums[1])
    offsets += right * shift[:, None]
    features = rng.normal(size=(n, k, block))
    return LogLinear(*(jnp.asarray(a)[:, None] for a in (features, right, offsets)))


def summary(name: str, n: int, ratio: np.ndarray) -> dict:
    """A bound's row; `ratio` [I, T] is 1 where it is attained, above where violated."""
    ratio = np.asarray(ratio)
    row = {"kind": "bound", "name": name, "n": n, "median": float(np.nanmedian(ratio))}
    row |= {"worst": float(np.nanmax(ratio))}
    violated = ratio > 1 + 1e-9
    return row | {"violated": float(violated.any(1).mean())}  # share of the runs


def expected(values: jax.Array, n: int) -> np.ndarray:
    """[I, T] means after t steps that update the prompt with chance 1 / n each.

    values: [I, T + 1] after so many updates.
    """
    horizon = values.shape[1] - 1
    t = np.arange(1, horizon + 1)
    chances = stats.binom.pmf(np.arange(horizon), t[:, None] - 1, 1 / n)
    return np.asarray(values)[:, :horizon] @ chances.T


def unsaturated(log_odds: jax.Array) -> np.ndarray:
    """[I, T] steps whose gain is not rounding error."""
    return np.abs(np.asarray(log_odds))[:, :-1] < np.log(1e5)


def theorem_3_rows(
    policies: LogLinear, label: str, x: jax.Array, horizon: int, draws: Sequence[int]
) -> Iterator[dict]:
    """Rows of 3.1 and 3.2 with `x` [I] for X, at their step sizes."""
    t = np.arange(1, horizon + 1)
    plain = trace(policies, 0, 1 / x**2, horizon)
    std = trace(policies, 1, 1 / (2 * x**2), horizon)
    wrong = np.asarray(jax.nn.sigmoid(-plain.log_odds[:, :1]))  # 1 - p at the start
    x2, sigma = np.asarray(x)[:, None] ** 2, np.asarray(std.sigma)[:, :-1]
    gain = np.diff(jax.nn.sigmoid(std.log_odds), axis=1)
    promised = 3 * np.asarray(std.norm2)[:, :-1] / (16 * x2 * sigma)
    ratio = np.where(unsaturated(std.log_odds), promised / gain, np.nan)
    yield summary(f"3.2 step, {label}", 1, ratio)
    for n in draws:
        sums = expected(plain.norm2, n).cumsum(1)
        yield summary(f"3.1 sum, {label}", n, sums / (2 * n * wrong * x2))
        squares = expected(std.norm2, n)
        # An upper bound of sigma whichever prompts were drawn; sigma at n = 1.
        most = sigma if n == 1 else np.maximum.accumulate(sigma, 1)
        bound = 2 * n * wrong * x2 / t * 8 / (3 * t) * most.cumsum(1)
        least = np.minimum.accumulate(squares, 1)
        yield summary(f"3.2 min, {label}", n, least / bound)
        yield summary(f"3.2 sum, {label}", n, squares.cumsum(1) / (t * bound))


def theorem_a_rows(
    policies: LogLinear, diameter: jax.Array, horizon: int
) -> Iterator[dict]:
    """Rows of the least gain in log-odds of a safe step; diameter: [I]."""
    for power, method in enumerate(METHODS):
        steps = loglinear.safe_step(power, diameter)
        run = trace(policies, power, steps, horizon)
        p, delta = jax.nn.sigmoid(run.log_odds), jnp.sqrt(run.delta2)
        bound = loglinear.log_odds_gain(p, power, delta, diameter[:, None])[:, :-1]
        gain = np.diff(run.log_odds, axis=1)
        ratio = np.where(unsaturated(run.log_odds), bound / gain, np.nan)
        yield summary(f"A, {method}", 1, ratio)


def theorem_c_rows(
    policies: LogLinear, diameter: jax.Array, horizon: int, draws: Sequence[int]
) -> Iterator[dict]:
    """Rows of the bounds on GRPO's ascent of sum 2 asin sqrt p; diameter: [I]."""
    t = np.arange(1, horizon + 1)
    smooth = loglinear.smoothness(1, diameter)
    run = trace(policies, 1, 1 / smooth, horizon)
    start = loglinear.ascended(1, jax.nn.sigmoid(run.log_odds[:, :1]))
    room = np.asarray(2 * smooth[:, None] * (np.pi - start))
    for n in draws:
        sums = expected(run.norm2 / run.sigma**2, n).cumsum(1)
        yield summary("C sum", n, sums / (n * room))
    harmonic = t / (1 / np.asarray(run.sigma)[:, :-1] ** 2).cumsum(1)
    least = np.minimum.accumulate(np.asarray(run.norm2)[:, :-1], 1)
    yield summary("C min", 1, least / (room / t * harmonic))


def bound_rows(
    policies: LogLinear, horizon: int, draws: Sequence[int]
) -> Iterator[dict]:
    """A row per bound, on `horizon` steps from each of the random prompts.

    draws: n, the orthogonal prompts of which a step draws one, in expectation.
    """
    diameter = jax.vmap(loglinear.diameters)(policies)[:, 0]
    spectral = jnp.linalg.norm(policies.features[:, 0], ord=2, axis=(1, 2))
    for label, x in (("X = D/2", diameter / 2), ("spectral X", spectral)):
        yield from theorem_3_rows(policies, label, x, horizon, draws)
    yield from theorem_a_rows(policies, diameter, horizon)
    yield from theorem_c_rows(policies, diameter, horizon, draws)


def counterexample() -> dict:
    """Theorem 3.2 as a sum: one prompt, two one-hot responses, pass rate 1/2."""
    policy = LogLinear(
        jnp.eye(2)[None, None], jnp.eye(2)[None, :1], jnp.zeros((1, 1, 2))
    )
    run = trace(policy, 1, jnp.array([0.5]), 1000)
    sigma, norm2 = run.sigma[0, :-1], run.norm2[0, :-1]
    t = np.arange(1, 1001)
    bound = 2 * 0.5 * 8 / (3 * t) * np.cumsum(sigma)  # X = 1, of the sum
    sums, least = (f.accumulate(norm2) for f in (np.add, np.minimum))
    first = int(t[(sums > bound).argmax()])
    kept = np.unique(np.geomspace(1, 1000, 60).astype(int))
    curves = {"bound": bound, "sum": sums, "t_min": t * least}
    return {
        "kind": "counterexample",
        "first": first,
        "always_after": bool((sums > bound)[first:].all()),
        "min_violated": int((least > bound / t).sum()),
        "t": kept.tolist(),
    } | {name: x[kept - 1].tolist() for name, x in curves.items()}
