"""Every objective a second time: loops over floats, to be read against the papers.

A completion is its unmasked tokens. Gradients are exact: a `Dual` carries the
derivatives of a number in every log-probability it was made from, and what a method
holds constant goes through `stop`.
"""

import math
from dataclasses import dataclass, field

import numpy as np


class Dual:
    """A float and its derivatives, by index of the log-probability."""

    def __init__(self, value, slopes):
        self.value, self.slopes = value, slopes

    def chain(self, value, slope):
        return Dual(value, {k: slope * s for k, s in self.slopes.items()})

    def __add__(self, other):
        if not isinstance(other, Dual):
            return Dual(self.value + other, self.slopes)
        slopes = dict(self.slopes)
        for k, s in other.slopes.items():
            slopes[k] = slopes.get(k, 0.0) + s
        return Dual(self.value + other.value, slopes)

    def __mul__(self, other):
        if not isinstance(other, Dual):
            return self.chain(self.value * other, other)
        mine = self.chain(self.value * other.value, other.value)
        return mine + other.chain(0.0, self.value)

    def power(self, n):
        return self.chain(self.value**n, n * self.value ** (n - 1))

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self):
        return self * -1

    def __sub__(self, other):
        return self + -other

    def __rsub__(self, other):
        return -self + other

    def __truediv__(self, other):
        return self * (other.power(-1) if isinstance(other, Dual) else 1 / other)

    def __float__(self):
        return self.value

    def __lt__(self, other):
        return self.value < float(other)

    def __gt__(self, other):
        return self.value > float(other)


def stop(x):
    """The number alone: a constant to the gradient."""
    return float(x)


def clip(x, low, high):
    """Outside, a bound: a plain float, so no gradient."""
    return min(max(x, low), high)


def exp(x):
    """e^x with x kept in [-20, 20]."""
    x = clip(x, -20.0, 20.0)
    if not isinstance(x, Dual):
        return math.exp(x)
    return x.chain(math.exp(x.value), math.exp(x.value))


def root(x):
    return x.power(0.5) if isinstance(x, Dual) else math.sqrt(x)


def mean(xs):
    xs = list(xs)
    return sum(xs) / len(xs) if xs else 0.0


def deviation(xs, ddof=0):
    centre = mean(xs)
    return math.sqrt(sum((x - centre) ** 2 for x in xs) / (len(xs) - ddof))


@dataclass
class Completion:
    reward: float
    lp: list  # Dual, current policy
    old: list  # behaviour policy
    ref: list = field(default_factory=list)
    entropy: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    advantage: float = math.nan

    def log_ratios(self):
        return [new - old for new, old in zip(self.lp, self.old, strict=True)]

    def ratios(self):
        return [exp(d) for d in self.log_ratios()]


# Advantages: the batch's rewards [[float]] to as many advantages.


def by_group(advantages):
    """Of a group's rewards alone; 0 where all are the same."""

    def of_batch(groups):
        tied = [len(set(rewards)) < 2 for rewards in groups]
        zeros = [[0.0] * len(rewards) for rewards in groups]
        each = zip(groups, zeros, tied, strict=True)
        return [zero if same else advantages(g) for g, zero, same in each]

    return of_batch


def raw(groups):
    return groups


@by_group
def centred(rewards):
    return [r - mean(rewards) for r in rewards]


@by_group
def leave_one_out(rewards):
    others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
    return [r - mean(rest) for r, rest in zip(rewards, others, strict=True)]


@by_group
def standardised(rewards):
    return [(r - mean(rewards)) / (deviation(rewards) + 1e-6) for r in rewards]


@by_group
def over_the_mean(rewards):
    return [(r - mean(rewards)) / (mean(rewards) + 1e-6) for r in rewards]


def over_batch_std(groups):
    spread = deviation([r for g in groups for r in g] or [0.0])
    return [[a / (spread + 1e-6) for a in group] for group in centred(groups)]


def beta_shapes(means):
    """(alpha, beta) of BNPO's normaliser, from the group means of a batch."""
    if len(means) < 2 or deviation(means, ddof=1) == 0:
        return 1.0, 1.0
    m, v = mean(means), deviation(means, ddof=1) ** 2
    a, b = (m * (1 - m) / v - 1) * m, (m * (1 - m) / v - 1) * (1 - m)
    return max(1.0, 1 + a / 3), max(1.0, 1 + b / 3)


def beta_scaled(groups):
    alpha, beta = beta_shapes([mean(g) for g in groups if g])
    log_norm = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)

    def weight(p):
        density = p ** (alpha - 1) * (1 - p) ** (beta - 1) / math.exp(log_norm)
        return min(1 / density, 1e6)

    advantages = zip(groups, centred(groups), strict=True)
    # A tied group's zeros need no weight (its mean may be 0 or 1: no density there).
    return [[a * weight(mean(g)) if a else 0.0 for a in row] for g, row in advantages]


# Losses: (completion, its group) to one term per token, or one in all.


def ppo(ratio, advantage, low, high, dual=math.inf):
    clipped = clip(ratio, 1 - low, 1 + high) * advantage
    loss = -min(ratio * advantage, clipped)
    return min(loss, -dual * advantage) if advantage < 0 else loss


def token_ppo(low, high, dual=math.inf):
    return lambda c, group: [ppo(r, c.advantage, low, high, dual) for r in c.ratios()]


def weighted_ppo(c, group):
    terms = token_ppo(0.2, 0.2)(c, group)
    return [w * term for w, term in zip(c.weights, terms, strict=True)]


def log_prob(c, group):
    return [-c.advantage * lp for lp in c.lp]


def unclipped(c, group):
    return [-c.advantage * r for r in c.ratios()]


def one(lp):
    """pi / sg(pi): 1, with the gradient of log pi."""
    return 1 + lp - stop(lp)


def no_ratio(c, group):
    return [-c.advantage * one(lp) for lp in c.lp]


def capped(c, group):
    return [-c.advantage * min(r, 1.28) for r in c.ratios()]


def trajectory_capped(c, group):
    return [-c.advantage * min(exp(sum(c.log_ratios())), 1.28)]


def trajectory_ppo(c, group):
    return [ppo(exp(sum(c.log_ratios())), c.advantage, 0.2, 0.2)]


def gspo(c, group):
    return [ppo(exp(mean(c.log_ratios())), c.advantage, 3e-4, 4e-4)]


def gspo_token(c, group):
    s = stop(exp(mean(c.log_ratios())))
    return [ppo(s * one(lp), c.advantage, 3e-4, 4e-4) for lp in c.lp]


def gmpo(c, group):
    clipped = []
    for d in c.log_ratios():
        inside = clip(d, -0.4, 0.4)
        clipped.append(min(d, inside) if c.advantage >= 0 else max(d, inside))
    return [-c.advantage * exp(mean(clipped))]


def truncated_log_prob(cap):
    def terms(c, group):
        pairs = zip(c.ratios(), c.lp, strict=True)
        return [-stop(min(r, cap)) * c.advantage * lp for r, lp in pairs]

    return terms


def binary_tv(p, q):
    return abs(p - q)


def binary_kl(p, q):
    rest = (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return q * (math.log(q) - math.log(p)) + rest


def divergence_masked(divergence, delta):
    """DPPO: no gradient where a token is far and would go further."""

    def keep(advantage, lp, old):
        p, q = math.exp(stop(lp)), math.exp(old)
        away = p > q if advantage > 0 else p < q
        return 0.0 if away and divergence(p, q) > delta else 1.0

    def terms(c, group):
        kept = [keep(c.advantage, *pair) for pair in zip(c.lp, c.old, strict=True)]
        plain = truncated_log_prob(10.0)(c, group)
        return [m * term for m, term in zip(kept, plain, strict=True)]

    return terms


def copg(c, group):
    terms = []
    for lp, old in zip(c.lp, c.old, strict=True):
        clipped = clip(lp, old + math.log(0.8), old + math.log(1.2))
        terms.append(-min(c.advantage * lp, c.advantage * clipped))
    return terms


def hinge(classifier):
    """HPO, margin 0.2; the classifier takes the log-ratio."""

    def terms(c, group):
        sign, weight = math.copysign(1, c.advantage), abs(c.advantage)
        margins = [0.2 - sign * classifier(d) for d in c.log_ratios()]
        return [weight * max(0.0, m) for m in margins]

    return terms


def relative_divergence(r):
    """PPO-RPE's D with beta = 1/2: (1 - beta)^2 (r - 1)^2 / 2 (beta r + 1 - beta)."""
    return 0.125 * (r - 1) * (r - 1) / (0.5 * r + 0.5)


def ppo_rpe(c, group):
    # The relative ratio r / (r / 2 + 1 / 2) is 1.2 at 3/2 and 0.8 at 2/3.
    edge = relative_divergence(Dual(1.5 if c.advantage > 0 else 2 / 3, {"r": 1.0}))
    strength = c.advantage / edge.slopes["r"]  # -A + strength dD/dr = 0 there
    return [-c.advantage * r + strength * relative_divergence(r) for r in c.ratios()]


def fisher_rao(c, group):
    terms = []
    for r, old in zip(c.ratios(), c.old, strict=True):
        penalty = math.exp(old) * (r - 1) * (r - 1) / (2 * 1e-3)
        terms.append(-c.advantage * r + penalty)
    return terms


def relative_weight(c, group):
    u = stop(exp(sum(c.log_ratios())))
    return [-u / (0.5 + 0.5 * u) * c.advantage * sum(c.lp)]


def conflict_weights(c, group):
    """GTPO: 2 or 0 by the sign of A while both signs share a token, from either end."""
    weights = [1.0] * len(c.ids)
    for from_the_end in (False, True):
        rows = [(x.ids[::-1] if from_the_end else x.ids, x.advantage) for x in group]
        for k in range(len(c.ids)):
            good = {ids[k] for ids, a in rows if a > 0 and k < len(ids)}
            bad = {ids[k] for ids, a in rows if a < 0 and k < len(ids)}
            if not good & bad:
                break
            place = -1 - k if from_the_end else k
            if c.advantage and c.ids[place] in good & bad:
                weights[place] *= 2.0 if c.advantage > 0 else 0.0
    return weights


def gtpo(c, group):
    entropy = mean(c.entropy)
    if entropy > math.log(2):
        return [0.0 for _ in c.lp]
    gain = c.advantage - 0.1 * entropy
    weights = conflict_weights(c, group)
    return [-gain * w * one(lp) for w, lp in zip(weights, c.lp, strict=True)]


def k3(lp, ref):
    return exp(ref - lp) - (ref - lp) - 1


# Totals: the terms [[[term]]] of prompts, completions, tokens, to a loss per prompt.


def sequence_sum(batch, max_length):
    return [mean(sum(terms) for terms in group) for group in batch]


def sequence_mean(batch, max_length):
    return [mean(mean(terms) for terms in group) for group in batch]


def constant(batch, max_length):
    return [mean(sum(terms) / max_length for terms in group) for group in batch]


def group_tokens(batch, max_length):
    return [mean(term for terms in group for term in terms) for group in batch]


def batch_tokens(batch, max_length):
    count = sum(len(terms) for group in batch for terms in group)
    totals = [sum(term for terms in group for term in terms) for group in batch]
    return [len(batch) * total / max(count, 1) for total in totals]


def first_and_rest(batch, max_length):
    first = batch_tokens([[terms[:1] for terms in group] for group in batch], None)
    rest = batch_tokens([[terms[1:] for terms in group] for group in batch], None)
    return [1e-3 * a + b for a, b in zip(first, rest, strict=True)]


@dataclass
class Row:
    advantages: object
    terms: object
    total: object
    kl: float = 0.0  # k3, in the loss
    reward_kl: float = 0.0  # k1 of the behaviour policy, in the reward
    by_length: bool = False  # rewards are divided by their completion's length


ROWS = {
    "reinforce": Row(centred, log_prob, sequence_sum),
    "rloo": Row(leave_one_out, log_prob, sequence_sum, reward_kl=0.03),
    "rloo_trl": Row(leave_one_out, trajectory_ppo, sequence_sum, reward_kl=0.05),
    "grpo": Row(standardised, token_ppo(0.2, 0.2), sequence_mean, kl=0.04),
    "igrpo": Row(standardised, token_ppo(0.2, 0.2), sequence_mean),
    "nthr": Row(standardised, weighted_ppo, sequence_mean, kl=0.04),
    "dr_grpo": Row(centred, token_ppo(0.2, 0.2), constant),
    "dapo": Row(standardised, token_ppo(0.2, 0.28), group_tokens),
    "gspo": Row(standardised, gspo, sequence_sum),
    "gspo_token": Row(standardised, gspo_token, sequence_mean),
    "cispo": Row(standardised, truncated_log_prob(5.0), batch_tokens),
    "degrpo": Row(centred, token_ppo(0.2, 0.2), first_and_rest, kl=1e-3),
    "tic_grpo": Row(centred, trajectory_capped, constant),
    "tic_grpo_std": Row(standardised, trajectory_capped, constant),
    "grpo_up_clip": Row(centred, capped, constant),
    "grpo_no_is": Row(standardised, no_ratio, sequence_mean),
    "bnpo": Row(beta_scaled, token_ppo(0.2, 0.28, dual=10), sequence_sum),
    "gmpo": Row(standardised, gmpo, sequence_sum),
    "gtpo": Row(centred, gtpo, sequence_mean),
    "dppo_tv": Row(standardised, divergence_masked(binary_tv, 0.15), batch_tokens),
    "dppo_kl": Row(standardised, divergence_masked(binary_kl, 0.05), batch_tokens),
    "copg": Row(standardised, copg, batch_tokens),
    "hpo": Row(standardised, hinge(lambda d: exp(d) - 1), batch_tokens),
    "hpo_log": Row(standardised, hinge(lambda d: d), batch_tokens),
    "hpo_sqrt": Row(standardised, hinge(lambda d: root(exp(d)) - 1), batch_tokens),
    "ppo_rpe": Row(standardised, ppo_rpe, batch_tokens),
    "fr_ppo": Row(over_batch_std, fisher_rao, batch_tokens),
    "espo": Row(standardised, unclipped, batch_tokens),
    "rt_pg": Row(raw, relative_weight, sequence_sum),
    "max_rl": Row(over_the_mean, log_prob, sequence_sum),
}


def completions(logprobs, behaviour, rewards, mask, **per_token):
    """The batch as lists; a completion without a reward is left out."""
    batch = []
    for p in range(len(rewards)):
        batch.append([])
        for i in range(len(rewards[p])):
            if not math.isfinite(rewards[p][i]):
                continue
            places = [(p, i, t) for t in range(len(mask[p][i])) if mask[p][i][t]]
            extra = {k: [x[at].item() for at in places] for k, x in per_token.items()}
            lp = [Dual(float(logprobs[at]), {at: 1.0}) for at in places]
            old = [float(behaviour[at]) for at in places]
            batch[p].append(Completion(float(rewards[p][i]), lp, old, **extra))
    return batch


def set_advantages(row, batch):
    for c in (c for group in batch for c in group):
        if row.reward_kl:
            kl = sum(old - ref for old, ref in zip(c.old, c.ref, strict=True))
            c.reward -= row.reward_kl * kl
        if row.by_length:
            c.reward /= max(len(c.lp), 1)
    advantages = row.advantages([[c.reward for c in group] for group in batch])
    for group, values in zip(batch, advantages, strict=True):
        for c, value in zip(group, values, strict=True):
            c.advantage = value


def terms_of(row, c, group):
    terms = row.terms(c, group)
    if not row.kl:
        return terms
    kl = [k3(lp, ref) for lp, ref in zip(c.lp, c.ref, strict=True)]
    return [term + row.kl * k for term, k in zip(terms, kl, strict=True)]


def reference(
    row,
    logprobs,
    behaviour,
    rewards,
    mask,
    reference_logprobs=None,
    entropy=None,
    token_ids=None,
    token_weights=None,
    max_length=None,
):
    """(losses [P], gradient of their mean in logprobs [P, G, T])."""
    optional = dict(ref=reference_logprobs, entropy=entropy)
    optional |= dict(ids=token_ids, weights=token_weights)
    per_token = {k: x for k, x in optional.items() if x is not None}
    batch = completions(logprobs, behaviour, rewards, mask, **per_token)
    set_advantages(row, batch)
    terms = [[terms_of(row, c, group) for c in group if c.lp] for group in batch]
    losses = row.total(terms, max_length or logprobs.shape[-1])
    gradient = np.zeros(logprobs.shape)
    loss = mean(losses)
    for at, slope in loss.slopes.items() if isinstance(loss, Dual) else ():
        gradient[at] = slope
    return np.array([float(x) for x in losses]), gradient
