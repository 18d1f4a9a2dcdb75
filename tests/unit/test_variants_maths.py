"""Every public function of the maths, with and without jit and on NumPy arrays."""

from functools import partial

import chex
import jax
import numpy as np
from absl.testing import parameterized
from scipy import special, stats
from scipy.spatial.distance import pdist

import grpo_jax as gj
from grpo_jax import (
    advantages,
    intervals,
    loglinear,
    logprobs,
    preconditioner,
    prompt_weights,
    pull_back,
)
from grpo_jax.objectives.objective import AXES
from grpo_jax.preconditioner import apply_weights
from grpo_jax.prompt_weights import WEIGHTS, of_pass_rates
from tests.variants import Case, bools, called_by, check, floats, public_functions

MODULES = (
    advantages, intervals, loglinear, logprobs, preconditioner, prompt_weights,
    pull_back,
)  # fmt: skip
# Nothing to trace.
ON_THE_HOST = {
    *public_functions(intervals), "loglinear.flow_time", "preconditioner.check_power",
    *(f"advantages.{n}" for n in ("check_number", "not_negative", "whole_number")),
    "advantages.as_array", "preconditioner.check_rule", "preconditioner.axis_names",
    "preconditioner.whole_ids", "logprobs.chunk_tokens",
    "logprobs.chunk_length",
}  # fmt: skip

P, G, T, V, D, K = 3, 4, 5, 7, 3, 6  # K: responses to a prompt of a log-linear policy
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# ---- group statistics, and prompt weights made of them

REWARDS = np.float32([[1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]])  # the last one is tied
MEANS, STDS = REWARDS.mean(1), REWARDS.std(1)
TIED = STDS == 0
CENTRED = REWARDS - MEANS[:, None]
INVERSE = np.where(TIED, 0, 1 / (STDS + 1e-6))
INVERSE_MEANS = np.where(TIED, 0, 1 / (MEANS + 1e-6))
INVERSE_BATCH = np.full(P, 1 / (REWARDS.std() + 1e-6))
POSTERIOR = (REWARDS.sum(1) + 0.5) / (G + 1)
INVERSE_POSTERIOR = np.where(TIED, 0, (POSTERIOR * (1 - POSTERIOR)) ** -0.5)
GRADS = {"a": normal(P, 2, 3), "b": normal(P)}


def std_of_others(rewards):
    """[P, G] sample std of each group without one of its rewards."""
    others = [np.delete(rewards, i, axis=1) for i in range(G)]
    return np.stack([x.std(1, ddof=1) for x in others], 1)


def std_of_bernoulli(p):
    """[P] mean over the binomial of the std of G rewards."""
    share = np.arange(G + 1) / G
    mass = stats.binom.pmf(np.arange(G + 1), G, p[:, None])
    return mass @ np.sqrt(share * (1 - share))


def finite_group(rewards):
    p = np.where(TIED, 0.5, MEANS)
    return np.where(TIED, 0, std_of_bernoulli(p) / ((1 - 1 / G) * p * (1 - p)))


def weights_of(rule):
    ids = np.arange(P)
    return lambda rewards: apply_weights(rule, rewards, rule.init(), ids)[0]


def per_prompt(transform):
    return lambda grads, rewards: transform.update(
        grads, transform.init(parameters_of(grads)), rewards=rewards
    )[0]


def parameters_of(grads):
    return jax.tree.map(lambda g: g[0], grads)


def scaled(weights):
    return lambda grads, rewards: {k: (g.T * weights).T for k, g in grads.items()}


def mean_over_prompts(grads):
    transform = gj.mean_over_prompts()
    return transform.update(grads, transform.init(parameters_of(grads)))[0]


def on_rewards(function, result, reference=None):
    return Case(function, (REWARDS,), result, reference)


CASES = {
    "advantages.group_statistics": on_rewards(
        advantages.group_statistics,
        advantages.GroupStatistics(
            bools(P, G), floats(P), floats(P), floats(P, G), bools(P)
        ),
        lambda r: advantages.GroupStatistics(True, G, MEANS, CENTRED, TIED),
    ),
    "advantages.inverse_std": on_rewards(
        advantages.inverse_std, floats(P), lambda r: INVERSE
    ),
    "advantages.group_std": on_rewards(
        advantages.group_std, (floats(P), bools(P)), lambda r: (STDS, TIED)
    ),
    "advantages.centred_advantages": on_rewards(
        advantages.centred_advantages, floats(P, G), lambda r: CENTRED
    ),
    "advantages.leave_one_out_advantages": on_rewards(
        advantages.leave_one_out_advantages,
        floats(P, G),
        lambda r: CENTRED * G / (G - 1),
    ),
    "advantages.whitened_advantages": on_rewards(
        advantages.whitened_advantages,
        floats(P, G),
        lambda r: CENTRED * INVERSE[:, None],
    ),
    "advantages.inverse_batch_std": on_rewards(
        advantages.inverse_batch_std, floats(P), lambda r: INVERSE_BATCH
    ),
    "advantages.inverse_group_mean": on_rewards(
        advantages.inverse_group_mean, floats(P), lambda r: INVERSE_MEANS
    ),
    "advantages.inverse_beta_density": on_rewards(
        advantages.inverse_beta_density, floats(P)
    ),
    "advantages.leave_one_out_inverse_std": on_rewards(
        advantages.leave_one_out_inverse_std,
        floats(P, G),
        lambda r: np.where(std_of_others(r) == 0, 1, 1 / (std_of_others(r) + 1e-6)),
    ),
    "advantages.overlong_punishment": Case(
        partial(advantages.overlong_punishment, max_length=10, cache=4),
        (np.int32([[5, 6, 8], [9, 10, 12]]),),
        floats(2, 3),
        lambda n: np.array([[0, 0, -0.5], [-0.75, -1, -1]]),
    ),
    "advantages.expected_group_std": Case(
        partial(advantages.expected_group_std, group_size=G),
        (np.float32([0.1, 0.5, 0.9]),),
        floats(3),
        std_of_bernoulli,
    ),
    "preconditioner.apply_weights": Case(
        partial(apply_weights, gj.std_weights(power=2.0)),
        (REWARDS, ()),
        (floats(P), ()),
        lambda r, state: (INVERSE**2, ()),
    ),
    "preconditioner.stateless": on_rewards(
        weights_of(preconditioner.stateless(lambda r: r.max(1))),
        floats(P),
        lambda r: r.max(1),
    ),
    "preconditioner.scale_by_prompt_weights": Case(
        per_prompt(gj.scale_by_prompt_weights(gj.group_mean_weights())),
        (GRADS, REWARDS),
        {"a": floats(P, 2, 3), "b": floats(P)},
        scaled(INVERSE_MEANS),
    ),
    "preconditioner.scale_by_group_std": Case(
        per_prompt(gj.scale_by_group_std()),
        (GRADS, REWARDS),
        {"a": floats(P, 2, 3), "b": floats(P)},
        scaled(INVERSE),
    ),
    "preconditioner.mean_over_prompts": Case(
        mean_over_prompts,
        (GRADS,),
        {"a": floats(2, 3), "b": floats()},
        lambda grads: {k: g.mean(0) for k, g in grads.items()},
    ),
}
WEIGHTED = gj.weighted_value_and_grad(lambda params, x: x @ params, gj.std_weights())
FEATURES = normal(P, D)
CASES["pull_back.weighted_value_and_grad"] = Case(
    lambda params, x, rewards: WEIGHTED(params, x, rewards=rewards),
    (normal(D), FEATURES, REWARDS),
    (floats(), floats(D), ()),
    lambda params, x, rewards: (
        (INVERSE * (x @ params)).mean(), (INVERSE[:, None] * x).mean(0), ()
    ),
)  # fmt: skip
RULES = {  # of WEIGHTS
    "unit": np.ones(P),
    "std": INVERSE,
    "batch_std": INVERSE_BATCH,
    "group_mean": INVERSE_MEANS,
    "finite_group": finite_group(REWARDS),
    "shrunk": INVERSE_POSTERIOR,
    "posterior": INVERSE_POSTERIOR,  # of a first visit
}
CASES["prompt_weights.of_pass_rates"] = on_rewards(
    weights_of(of_pass_rates(preconditioner.stateless(lambda r: r.max(1)))),
    floats(P),
    lambda r: r.max(1),
)
for name, rule in WEIGHTS.items():
    function, expected = weights_of(rule.build({}, P)), RULES.get(name)
    reference = None if expected is None else lambda r, expected=expected: expected
    CASES[f"rule.{name}"] = on_rewards(function, floats(P), reference)


# ---- log-probabilities of tokens

HIDDEN, UNEMBEDDING = normal(P, G, T, D), normal(D, V)
IDS = RNG.integers(0, V, (P, G, T)).astype(np.int32)


def log_softmax_and_entropy(hidden, unembedding, ids):
    log_p = special.log_softmax(hidden @ unembedding, -1)
    chosen = np.take_along_axis(log_p, ids[..., None], -1)[..., 0]
    return chosen, special.entr(np.exp(log_p)).sum(-1)


CASES |= {
    "logprobs.soft_capped": Case(
        partial(logprobs.soft_capped, cap=2.0),
        (HIDDEN,),
        floats(P, G, T, D),
        lambda x: 2 * np.tanh(x / 2),
    ),
    "logprobs.token_logprobs": Case(
        partial(logprobs.token_logprobs, chunk_size=2 * P * G, with_entropy=True),
        (HIDDEN, UNEMBEDDING, IDS),
        (floats(P, G, T), floats(P, G, T)),
        log_softmax_and_entropy,
    ),
}

# ---- the log-linear policy

POLICY = loglinear.LogLinear(
    normal(P, K, D),
    np.float32([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1]]),
    normal(P, K),
)
THETA, STEP = normal(D), np.float32(0.1)
RATES, DIAMETERS = np.float32([0.25, 0.5, 0.75]), np.float32([1, 2, 3])


def conditional_means(policy, theta):
    """(probabilities [P, K], pass rates [P], deltas [P, D]) of binary rewards."""
    p = special.softmax(policy.features @ theta + policy.offsets, -1)
    right, wrong = p * policy.rewards, p * (1 - policy.rewards)
    means = [
        np.einsum("pk,pkd->pd", x / x.sum(-1, keepdims=True), policy.features)
        for x in (right, wrong)
    ]
    return p, right.sum(-1), means[0] - means[1]


def exact(policy, theta):
    p, rates, deltas = conditional_means(policy, theta)
    variance = rates * (1 - rates)
    gradients = variance[:, None] * deltas
    return loglinear.Exact(p, rates, np.sqrt(variance), gradients)


def hessians(policy, theta):
    of_theta = jax.hessian(lambda x: loglinear.exact(policy, x).pass_rates)
    return jax.jit(of_theta)(theta)


def ascended(policy, theta, step):
    """Two steps of GRPO's direction, sum of sigma Delta."""
    rates = []
    for _ in range(2):
        now = exact(policy, theta)
        rates.append(now.pass_rates)
        theta = theta + step * (now.gradients / now.sigma[:, None]).sum(0)
    return theta, np.stack([*rates, exact(policy, theta).pass_rates])


CASES |= {
    "loglinear.exact": Case(
        loglinear.exact,
        (POLICY, THETA),
        loglinear.Exact(floats(P, K), floats(P), floats(P), floats(P, D)),
        exact,
    ),
    "loglinear.hessians": Case(
        loglinear.hessians, (POLICY, THETA), floats(P, D, D), hessians
    ),
    "loglinear.deltas": Case(
        loglinear.deltas,
        (POLICY, THETA),
        floats(P, D),
        lambda policy, theta: conditional_means(policy, theta)[2],
    ),
    "loglinear.diameters": Case(
        loglinear.diameters,
        (POLICY,),
        floats(P),
        lambda policy: np.array([pdist(x).max() for x in policy.features]),
    ),
    "loglinear.hessian_bound": Case(
        loglinear.hessian_bound,
        (RATES, DIAMETERS),
        floats(P),
        lambda p, d: np.array([3 / 32, 1 / 16, 3 / 32]) * d**2,
    ),
    "loglinear.smoothness": Case(
        partial(loglinear.smoothness, 1),
        (DIAMETERS,),
        floats(P),
        lambda d: 3**0.5 / 12 * d**2,
    ),
    "loglinear.safe_step": Case(
        partial(loglinear.safe_step, 0), (DIAMETERS,), floats(P), lambda d: 16 / d**2
    ),
    "loglinear.log_odds_gain": Case(
        lambda p, norm, diameter: loglinear.log_odds_gain(p, 2, norm, diameter),
        (RATES, np.float32([1, 1, 2]), DIAMETERS),
        floats(P),
        lambda p, norm, diameter: 2 * norm**2 / diameter**2,
    ),
    "loglinear.ascended": Case(
        partial(loglinear.ascended, 2), (RATES,), floats(P), special.logit
    ),
    # The features of every prompt span all of R^D: each projector is the identity.
    "loglinear.interference": Case(
        loglinear.interference, (POLICY,), floats(), lambda policy: P
    ),
    "loglinear.ascend": Case(
        lambda policy, theta, step: loglinear.ascend(policy, theta, 1.0, step, 2),
        (POLICY, THETA, STEP),
        (floats(D), floats(3, P)),
        ascended,
    ),
}


class MathsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, without_device=True)
    @parameterized.named_parameters((f"_{name}", case) for name, case in CASES.items())
    def test(self, case):
        check(case, self.variant)


def test_every_public_function_has_a_case():
    public = public_functions(*MODULES)
    of_entries = called_by(WEIGHTS, *AXES.values())  # every entry is a case
    missing = public - of_entries - ON_THE_HOST - CASES.keys()
    assert not missing, f"add to CASES: {', '.join(sorted(missing))}"
    assert public >= ON_THE_HOST
