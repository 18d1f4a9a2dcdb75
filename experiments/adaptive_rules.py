"""The prompt weightings that adaptive_weighting.py compares.

RULES weigh a batch from what `observe` remembers, and `train` applies one to log-linear
policies; OURS are two of them as rules of the trainer. B prompts a batch, G samples
each, D parameters.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import grpo_jax as gj
from grpo_jax.loglinear import LogLinear
from grpo_jax.prompt_weights import Rule

# ---- what is remembered, and what a rule sees


class Horizon(NamedTuple):
    """How long what was seen counts."""

    prior: float  # pseudo-counts of the posterior
    discount: float  # what a visit leaves of older counts
    decay: float  # of the running sums, per batch


class Memory(NamedTuple):
    successes: jax.Array  # [n] discounted counts
    failures: jax.Array
    sums: jax.Array  # [6] running sums over batches, see `observe`


class Seen(NamedTuple):
    """A batch as a rule sees it."""

    mean: jax.Array  # [B] of the group
    a: jax.Array  # [B] posterior Beta(a, b) of the pass rate
    b: jax.Array
    interference: jax.Array  # (n - 1) x variance of the cosines between prompts
    noise: jax.Array  # the sigma^2 at which noise equals signal in a gradient

    @property
    def p(self) -> jax.Array:
        """Posterior mean of the pass rate [B]."""
        return self.a / (self.a + self.b)

    @property
    def variance(self) -> jax.Array:
        return self.p * (1 - self.p)

    @property
    def push(self) -> jax.Array:
        """Push of the other prompts at mixed signs over a prompt's own, in [0, 1]."""
        return jnp.sqrt(jnp.clip(self.interference, 0, 1))


def observe(
    memory: Memory,
    rewards: jax.Array,
    ids: jax.Array,
    halves: jax.Array,
    gradient: jax.Array,
    horizon: Horizon,
) -> tuple[Memory, Seen]:
    """(memory, Seen) after the batch of prompts `ids` [B] with `rewards` [B, G].

    halves: gradients of two halves of each group, [B, 2, D]: products of different
        halves are free of their noise's squares.
    gradient: of each group, [B, D].
    """
    prior, discount, decay = horizon
    group = rewards.shape[1]
    wins = rewards.sum(1) + discount * memory.successes[ids]
    losses = group - rewards.sum(1) + discount * memory.failures[ids]
    seen = Seen(rewards.mean(1), wins + prior, losses + prior, 0.0, 0.0)
    products = jnp.einsum("ihd,jkd->hkij", halves, halves)
    signal = jnp.diagonal(products[0, 1])  # of |g_x|^2
    noise = (gradient**2).sum(1) - signal
    off = 1 - jnp.eye(len(ids))
    squares = products[0, 0] * products[1, 1] + products[0, 1] * products[1, 0]
    new = (
        (off * squares).sum() / 2,  # of <g_x, g_y>^2
        (off * products.mean((0, 1))).sum(),  # of <g_x, g_y>
        (off * signal[:, None] * signal).sum(),
        (noise * seen.variance).sum(),
        signal.sum(),
        1.0,  # how much has been summed
    )
    sums = decay * memory.sums + jnp.stack(new)
    square, inner, norms, noisy, signals, total = sums
    pairs = len(ids) * (len(ids) - 1) * total
    spread = (square - inner**2 / pairs) / jnp.maximum(norms, 1e-30)
    num_prompts = len(memory.successes)
    seen = seen._replace(
        interference=(num_prompts - 1) * jnp.where(norms > 0, spread, 0.0),
        noise=jnp.clip(noisy / jnp.maximum(signals, 1e-30), 0.0, 10.0),
    )
    memory = Memory(
        memory.successes.at[ids].set(wins), memory.failures.at[ids].set(losses), sums
    )
    return memory, seen


# ---- rules: Seen -> weights [B], all 1 at a pass rate of 1/2 that is certain


def std(power: float) -> Callable[[Seen], jax.Array]:
    return lambda x: (4 * x.mean * (1 - x.mean)) ** (-power / 2)


def posterior(power: float) -> Callable[[Seen], jax.Array]:
    return lambda x: (4 * x.variance) ** (-power / 2)


def skewed(p: jax.Array, u: jax.Array | float, v: jax.Array | float) -> jax.Array:
    """(2 p)^-u (2 (1 - p))^-v: more weight on the hard side than on the solved one for
    u > v; p [B]."""
    return (2 * p) ** -u * (2 * (1 - p)) ** -v


def expected(x: Seen) -> jax.Array:
    """E[1 / sigma^2] of the posterior: generous where the pass rate is uncertain."""
    s = x.a + x.b
    return (s - 1) * (s - 2) / (4 * (x.a - 1) * (x.b - 1))


def cautious(x: Seen) -> jax.Array:
    """1 / (E[sigma^2] + its posterior sd): small where the pass rate is uncertain."""
    a, b, s = x.a, x.b, x.a + x.b
    mean = a * b / (s * (s + 1))
    square = a * (a + 1) * b * (b + 1) / (s * (s + 1) * (s + 2) * (s + 3))
    return 1 / (4 * (mean + jnp.sqrt(square - mean**2)))


def noise_aware(x: Seen) -> jax.Array:
    """The step that raises log-odds most, |E g|^2 / E|g|^2 / sigma^2, is proportional
    to 1 / (sigma^2 + noise): REINFORCE where noise dominates, else 1 / sigma^2."""
    return (0.25 + x.noise) / (x.variance + x.noise)


RULES: dict[str, Callable[[Seen], jax.Array]] = {
    "unit": lambda x: jnp.ones_like(x.mean),
    "std 1": std(1),
    "std 1.5": std(1.5),
    "std 2": std(2),
    "posterior 1": posterior(1),
    "posterior 1.5": posterior(1.5),
    "posterior 2": posterior(2),
    "expected 2": expected,
    "cautious 2": cautious,
    "noise-aware": noise_aware,
    "interference": lambda x: (4 * x.variance) ** (-(1 + x.push) / 2),
    "group mean": lambda x: skewed(x.mean, 1.0, 0.0),
    "hard": lambda x: skewed(x.mean, 1.0, 0.5),
    "hard posterior": lambda x: skewed(x.p, 1.0, 0.5),
    "hard interference": lambda x: skewed(x.p, jnp.minimum(0.5 + x.push, 1), 0.5),
}


# ---- a log-linear policy trained under a rule, with sampled gradients


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """Advantages of rewards [..., G]."""
    group = rewards.shape[-1]
    return (rewards - rewards.mean(-1, keepdims=True)) * (group / (group - 1))


@functools.partial(
    jax.jit, static_argnames=("optimizer", "group", "batch", "steps", "horizon")
)
def train(
    policies: LogLinear,
    keys: jax.Array,
    rule: int,
    rates: jax.Array,
    *,
    optimizer: str,
    group: int,
    batch: int,
    steps: int,
    horizon: Horizon,
) -> jax.Array:
    """Results [S, E, 4] of S policies at E learning rates, under RULES number `rule`:
    mean pass rate over the run, final pass rate, mean `push` and `noise`.

    A step has `group` samples of `batch` prompts; which prompts, and the uniforms,
    depend on the key alone.
    """
    tx = {"sgd": optax.identity, "adam": optax.scale_by_adam}[optimizer]()

    _, num_prompts, responses, dim = policies.features.shape

    def run(policy, key, rate):
        def one(state, key):
            theta, opt, memory = state
            probabilities = jax.nn.softmax(policy.features @ theta + policy.offsets)
            key_x, key_y = jax.random.split(key)
            ids = jax.random.permutation(key_x, num_prompts)[:batch]
            features, cdf = policy.features[ids], jnp.cumsum(probabilities[ids], -1)
            u = jax.random.uniform(key_y, (batch, group))
            y = (u[..., None] > cdf[:, None, :-1]).sum(-1)  # [B, G]
            rewards, chosen = (y == 0) * 1.0, jax.nn.one_hot(y, responses)
            # Advantages sum to 0 over a group or a half: the mean score drops out.
            a = leave_one_out(rewards) / group
            gradient = jnp.einsum("bg,bgk,bkd->bd", a, chosen, features)
            parts = leave_one_out(rewards.reshape(batch, 2, -1)) / (group // 2)
            parts = jnp.einsum("bhg,bhgk->bhk", parts, chosen.reshape(*parts.shape, -1))
            halves = jnp.einsum("bhk,bkd->bhd", parts, features)
            memory, seen = observe(memory, rewards, ids, halves, gradient, horizon)
            tied = (seen.mean == 0) | (seen.mean == 1)
            seen = seen._replace(mean=jnp.where(tied, 0.5, seen.mean))
            weights = jax.lax.switch(rule, list(RULES.values()), seen)
            weights = jnp.where(tied, 0.0, weights)
            update, opt = tx.update(weights @ gradient / batch, opt)
            out = probabilities[:, 0].mean(), seen.push, seen.noise
            return (theta + rate * update, opt, memory), jnp.stack(out)

        theta, none = jnp.zeros(dim), jnp.zeros(num_prompts)
        state = theta, tx.init(theta), Memory(none, none, jnp.zeros(6))
        state, out = jax.lax.scan(one, state, jax.random.split(key, steps))
        last = jax.nn.softmax(policy.features @ state[0] + policy.offsets)[:, 0].mean()
        mean = jnp.append(out[1:, 0], last).mean()
        return jnp.stack([mean, last, *out[:, 1:].mean(0)])

    return jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None))(policies, keys, rates)


# ---- rules of the trainer that the library lacks


def hard_weights() -> gj.PromptWeights:
    """w_p = 1 / (m sqrt(1 - m)), m the group's mean; 0 for a tied group."""

    def weights(rewards, state):
        mean = rewards.mean(1)
        tied = (mean <= 0) | (mean >= 1)
        w = skewed(jnp.where(tied, 0.5, mean), 1.0, 0.5)
        return jnp.where(tied, 0.0, w), state

    return gj.PromptWeights(init=lambda: (), weights=weights)


def hard_posterior_weights(
    num_prompts: int, *, prior: float = 0.5, discount: float = 0.8
) -> gj.PromptWeights:
    """`hard_weights` of the posterior mean over a prompt's visits."""
    rule = gj.posterior_weights(num_prompts, prior=prior, discount=discount)

    def weights(rewards, state, prompt_ids):
        w, state = rule.weights(rewards, state, prompt_ids)
        a, b = state.successes[prompt_ids] + prior, state.failures[prompt_ids] + prior
        return jnp.where(w > 0, skewed(a / (a + b), 1.0, 0.5), 0.0), state

    return gj.PromptWeights(rule.init, weights, by_prompt=True)


OURS = {
    "hard": Rule((), lambda s, n: hard_weights(), "1 / (p sqrt(1 - p))"),
    "hard_posterior": Rule(
        (), lambda s, n: hard_posterior_weights(n), "the same over visits"
    ),
}
