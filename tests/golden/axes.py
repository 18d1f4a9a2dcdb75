"""A reference for every entry of every registry, in the loops of `reference`.

An entry of an axis of `Objective` has a `Case` in `AXES`: the plain `Row` that an
objective with that entry must equal. A rule of `WEIGHTS` has one in `RULES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.golden import reference as plain
from tests.golden.reference import Row, mean, stop


@dataclass
class Case:
    """An objective, as changes to `test_every_entry.BASE`, and the same in loops."""

    row: Row
    changes: dict = field(default_factory=dict)  # of fields besides the axis itself


@dataclass
class RuleCase:
    """Weights by loops: the batch's rewards [[float]] to as many weights as groups."""

    weights: Callable
    settings: dict = field(default_factory=dict)


def advantages_case(advantages, **changes):
    return Case(Row(advantages, plain.log_prob, plain.sequence_sum), changes)


def terms_case(terms, **changes):
    return Case(Row(plain.centred, terms, plain.sequence_sum), changes)


def total_case(total, **changes):
    return Case(Row(plain.centred, plain.unclipped, total), changes)


# Baselines: rewards [[float]] to as many advantages.


def plain_rewards(groups):
    return groups


# Scales: the same, of rewards less their group's mean.


@plain.by_group
def over_the_std_of_others(rewards):
    advantages = []
    for i, r in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        tied = len(set(others)) < 2
        spread = 1 if tied else plain.deviation(others) + 1e-6
        advantages.append((r - mean(rewards)) / spread)
    return advantages


# Ratios: the term -r A.


def standardised(c, group):
    logs = c.log_ratios()
    centre = stop(mean(logs))
    spread = math.sqrt(mean((float(d) - centre) ** 2 for d in logs))
    z = [(d - centre) * (1 / max(spread, 1)) for d in logs]
    return [-c.advantage * plain.exp(x) for x in z]


def sequence_mean_token(c, group):
    s = stop(plain.exp(mean(c.log_ratios())))
    return [-c.advantage * s * plain.one(lp) for lp in c.lp]


def sequence_mean(c, group):
    return [-c.advantage * plain.exp(mean(c.log_ratios()))]


def sequence_sum(c, group):
    return [-c.advantage * plain.exp(sum(c.log_ratios()))]


# Surrogates, on token ratios.


def hard_clip(c, group):
    return [-c.advantage * plain.clip(r, 0.8, 1.2) for r in c.ratios()]


def relative_importance(c, group):
    pairs = zip(c.ratios(), c.lp, strict=True)
    return [-stop(r) / (0.5 + 0.5 * stop(r)) * c.advantage * lp for r, lp in pairs]


# Token weights.


def conflict_weighted(c, group):
    weights = plain.conflict_weights(c, group)
    return [w * x for w, x in zip(weights, plain.unclipped(c, group), strict=True)]


def given_weights(c, group):
    return [w * x for w, x in zip(c.weights, plain.unclipped(c, group), strict=True)]


# Aggregations.


def first_rest_sequence_mean(batch, max_length):
    def one(terms):
        return 1e-3 * terms[0] + mean(terms[1:])

    return [mean(one(terms) for terms in group) for group in batch]


# KL(policy || reference): estimators of a token's log-probs.


def k2(lp, ref):
    return (lp - ref) * (lp - ref) * 0.5


def kl_case(estimate, **changes):
    def terms(c, group):
        return [
            -c.advantage * lp + 0.1 * estimate(lp, ref)
            for lp, ref in zip(c.lp, c.ref, strict=True)
        ]

    return terms_case(terms, surrogate="logp", kl_coef=0.1, **changes)


LOGP = dict(surrogate="logp", ratio="none")
HINGE = dict(surrogate="hinge")
MASKED = dict(surrogate="masked_is", ratio_cap=10.0)
AXES: dict[str, dict[str, Case]] = {
    "baseline": {
        "none": advantages_case(plain_rewards, **LOGP),
        "mean": advantages_case(plain.centred, **LOGP),
        "leave_one_out": advantages_case(plain.leave_one_out, **LOGP),
    },
    "scale": {
        "none": advantages_case(plain.centred, **LOGP),
        "std": advantages_case(plain.standardised, **LOGP),
        "batch_std": advantages_case(plain.over_batch_std, **LOGP),
        "group_mean": advantages_case(plain.over_the_mean, **LOGP),
        "beta": advantages_case(plain.beta_scaled, **LOGP),
        "length_std": Case(
            Row(plain.standardised, plain.log_prob, plain.sequence_sum, by_length=True),
            LOGP,
        ),
        "leave_one_out_std": advantages_case(over_the_std_of_others, **LOGP),
    },
    "ratio": {
        "none": terms_case(plain.no_ratio),
        "token": terms_case(plain.unclipped),
        "standardised": terms_case(standardised),
        "sequence_mean_token": terms_case(sequence_mean_token),
        "sequence_mean": terms_case(sequence_mean),
        "sequence_sum": terms_case(sequence_sum),
        "clipped_geometric": terms_case(plain.gmpo, clip=(0.4, 0.4)),
    },
    "surrogate": {
        "logp": terms_case(plain.log_prob),
        "is": terms_case(plain.unclipped),
        "ppo": terms_case(
            plain.token_ppo(0.2, 0.28, 3.0), clip=(0.2, 0.28), dual_clip=3.0
        ),
        "hard_clip": terms_case(hard_clip),
        "cispo": terms_case(plain.truncated_log_prob(5.0), clip=(None, 4.0)),
        "copg": terms_case(plain.copg),
        "hinge": terms_case(plain.hinge(lambda d: plain.exp(d) - 1)),
        "relative_is": terms_case(relative_importance),
        "rpe": terms_case(plain.ppo_rpe),
        "masked_is": terms_case(
            plain.divergence_masked(plain.binary_tv, 0.15), ratio_cap=10.0
        ),
        "fisher_rao": terms_case(plain.fisher_rao),
    },
    "mask": {
        "tv": terms_case(plain.divergence_masked(plain.binary_tv, 0.15), **MASKED),
        "kl": terms_case(plain.divergence_masked(plain.binary_kl, 0.15), **MASKED),
    },
    "hinge": {
        "ratio": terms_case(plain.hinge(lambda d: plain.exp(d) - 1), **HINGE),
        "log": terms_case(plain.hinge(lambda d: d), **HINGE),
        "sqrt": terms_case(
            plain.hinge(lambda d: plain.root(plain.exp(d)) - 1), **HINGE
        ),
    },
    "token_weight": {
        "none": terms_case(plain.unclipped),
        "conflict": terms_case(conflict_weighted),
        "nthr": terms_case(given_weights),
    },
    "aggregation": {
        "sequence_mean_token_mean": total_case(plain.sequence_mean),
        "sequence_mean_token_sum": total_case(plain.sequence_sum),
        "group_token_mean": total_case(plain.group_tokens),
        "batch_token_mean": total_case(plain.batch_tokens),
        "constant": total_case(plain.constant),
        "first_rest": total_case(plain.first_and_rest),
        "first_rest_sequence_mean": total_case(first_rest_sequence_mean),
    },
    "divergence": {
        "k1": Case(
            Row(plain.centred, plain.log_prob, plain.sequence_sum, reward_kl=0.1),
            dict(surrogate="logp", kl_coef=0.1, kl_in="reward"),
        ),
        "k2": kl_case(k2),
        "k3": kl_case(plain.k3),
    },
}


# Prompt weights: of rewards in [0, 1], a weight per group; 0 for a tied one.


def by_group(weight):
    def of_batch(groups):
        return [0.0 if len(set(g)) < 2 else weight(g) for g in groups]

    return of_batch


def units(groups):
    return [1.0 for _ in groups]


@by_group
def inverse_std(rewards):
    return 1 / (plain.deviation(rewards) + 1e-6)


def inverse_batch_std(groups):
    return [1 / (plain.deviation([r for g in groups for r in g]) + 1e-6)] * len(groups)


@by_group
def inverse_mean(rewards):
    return 1 / (mean(rewards) + 1e-6)


def inverse_beta(groups):
    a, b = plain.beta_shapes([mean(g) for g in groups])
    norm = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))

    @by_group
    def weight(rewards):
        p = mean(rewards)
        return min(norm * p ** (1 - a) * (1 - p) ** (1 - b), 1e6)

    return weight(groups)


def finite_group(size):
    """E[std of `size` Bernoulli(p) rewards] / ((1 - 1/n) p (1 - p))."""

    def expected_std(p):
        return sum(
            math.comb(size, k) * p**k * (1 - p) ** (size - k)
            * math.sqrt(k / size * (1 - k / size))
            for k in range(size + 1)
        )  # fmt: skip

    @by_group
    def weight(rewards):
        p, n = mean(rewards), len(rewards)
        return expected_std(p) / ((1 - 1 / n) * p * (1 - p))

    return weight


@by_group
def inverse_posterior_std(rewards):
    m = (sum(rewards) + 0.5) / (len(rewards) + 1)
    return (m * (1 - m)) ** -0.5


RULES = {
    "unit": RuleCase(units),
    "std": RuleCase(inverse_std),
    "batch_std": RuleCase(inverse_batch_std),
    "group_mean": RuleCase(inverse_mean),
    "beta": RuleCase(inverse_beta),
    "finite_group": RuleCase(finite_group(3), dict(group_size=3)),
    "shrunk": RuleCase(inverse_posterior_std),
    "posterior": RuleCase(inverse_posterior_std),  # at a prompt's first visit
}
