"""Every function and entry of objectives, with and without jit and on NumPy arrays."""

import importlib
import pkgutil
from functools import partial

import chex
import numpy as np
from absl.testing import parameterized
from scipy import special

import grpo_jax as gj
from grpo_jax import objectives
from grpo_jax.objectives import loss, ratios, surrogates, token_weights
from grpo_jax.objectives.aggregation import token_coefficients
from grpo_jax.objectives.divergences import divergence
from grpo_jax.objectives.objective import AXES
from tests.variants import Case, bools, called_by, check, floats, public_functions

MODULES = [
    importlib.import_module(f"grpo_jax.objectives.{module.name}")
    for module in pkgutil.iter_modules(objectives.__path__)
]
ON_THE_HOST = {  # numbers and texts of an Objective: nothing to trace
    "loss.loss_kl_coef",
    "loss.needs_entropy",
    "formula.loss",
    "formula.choices",
    "formula.mechanisms",
    "objective.choices",
}

P, G, T, V, D = 3, 4, 5, 7, 3
RNG = np.random.default_rng(0)


def uniform(low, high, shape=(P, G, T)):
    return RNG.uniform(low, high, shape).astype(np.float32)


LENGTHS = np.array([[1, 2, 3, 5], [5, 4, 3, 2], [5, 5, 1, 3]])
MASK = np.arange(T) < LENGTHS[..., None]
ONES = MASK.astype(np.float32)
IDS = RNG.integers(0, V, (P, G, T)).astype(np.int32)
LAST = np.take_along_axis(IDS, LENGTHS[..., None] - 1, -1)  # [P, G, 1]
REWARDS = np.float32([[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 1]])
CENTRED = REWARDS - REWARDS.mean(1, keepdims=True)
INVERSE = 1 / (REWARDS.std(1) + 1e-6)
A = CENTRED[..., None]  # [P, G, 1]
LOGPROBS = uniform(-3, -0.1) * ONES
LOG_RATIOS = uniform(-0.5, 0.5) * ONES  # r in [0.6, 1.65], on both sides of the clip
BEHAVIOUR, R = LOGPROBS - LOG_RATIOS, np.exp(LOG_RATIOS)
REFERENCE, ENTROPY = LOGPROBS + uniform(-0.5, 0.5) * ONES, uniform(0, 2)
P_NOW, P_OLD = np.exp(LOGPROBS), np.exp(BEHAVIOUR)
P_NEW, P_BEFORE = uniform(0.1, 0.9), uniform(0.1, 0.9)  # of one token, two policies

# ---- entries of the registries: their own fields, called as `loss` calls them

BASE = gj.Objective(
    baseline="mean",
    scale="none",
    ratio="token",
    surrogate="is",
    aggregation="sequence_mean_token_sum",
    source="a convention",
)  # clip (0.2, 0.2), mixture 1/2, total variation at most 0.15
TOKENS = ratios.Tokens(LOGPROBS, BEHAVIOUR, MASK, A)
LEVEL = ratios.Level(LOG_RATIOS, LOGPROBS, BEHAVIOUR, np.zeros_like(MASK))


def surrogate_case(entry):
    terms = floats(P, G, T), bools(P, G, T)
    return partial(entry.terms, BASE), (LEVEL, A), terms


def ratio_case(entry):
    terms = floats(P, G, 1 if entry.sequence else T)
    level = ratios.Level(terms, terms, terms, bools(P, G, T))
    return partial(entry.level, BASE), (TOKENS,), level


def aggregation_case(entry):
    def coefficients(mask):
        return entry.coefficients(mask, 10, 0.5)

    return coefficients, (ONES,), floats(P, G, T)


def scale_case(entry):
    def weights(rewards):
        return entry.weights(BASE).weights(rewards, ())[0]

    def with_factors(rewards):
        return weights(rewards), entry.per_sample(BASE, rewards)

    if entry.per_sample is None:
        return weights, (REWARDS,), floats(P)
    return with_factors, (REWARDS,), (floats(P), floats(P, G))


CASES_OF = {  # axis -> entry -> (function, arguments, result)
    "baseline": lambda entry: (
        partial(entry.advantages, BASE), (REWARDS,), floats(P, G)
    ),
    "scale": scale_case,
    "ratio": ratio_case,
    "surrogate": surrogate_case,
    "mask": lambda entry: (entry, (np.log(P_NEW), np.log(P_BEFORE)), floats(P, G, T)),
    "hinge": lambda entry: (entry.value, (LOG_RATIOS,), floats(P, G, T)),
    "aggregation": aggregation_case,
    "divergence": lambda entry: (entry.estimate, (LOG_RATIOS,), floats(P, G, T)),
}  # fmt: skip
WITHOUT_ARRAYS = {"token_weight"}  # names; their functions are cases below


def per_term(reduce):
    """Of completions as one term each: log-ratio, log-probs of both policies."""
    arrays = LOG_RATIOS, LOGPROBS, BEHAVIOUR
    return ratios.Level(*(reduce(x.sum(-1, keepdims=True)) for x in arrays), False)


def over_mean_of_tokens(x):
    return x / LENGTHS[..., None]


CLIPPED = np.clip(R, 0.8, 1.2)
OUTSIDE = (R > 1.2) | (R < 0.8)
PAST = ((R > 1.2) & (A > 0)) | ((R < 0.8) & (A < 0))
WITHIN = np.clip(LOGPROBS, BEHAVIOUR + np.log(0.8), BEHAVIOUR + np.log(1.2))
ROOM = 0.2 - np.sign(A) * (R - 1)
DROPPED = (abs(P_NOW - P_OLD) > 0.15) & ((P_NOW > P_OLD) == (A > 0))
FIRST = ONES * (np.arange(T) == 0)
REST = ONES - FIRST
SURROGATE = -np.minimum(R * A, CLIPPED * A)
STD_OF_OTHERS = np.stack([np.delete(REWARDS, i, 1).std(1) for i in range(G)], 1)

VALUES = {  # (axis, entry) -> its result on the arrays above
    ("baseline", "none"): REWARDS,
    ("baseline", "mean"): CENTRED,
    ("baseline", "leave_one_out"): CENTRED * G / (G - 1),
    ("scale", "none"): np.ones(P),
    ("scale", "std"): INVERSE,
    ("scale", "batch_std"): np.full(P, 1 / REWARDS.std()),
    ("scale", "group_mean"): 1 / REWARDS.mean(1),
    ("scale", "length_std"): INVERSE,
    ("scale", "leave_one_out_std"): (
        np.ones(P),
        np.where(STD_OF_OTHERS == 0, 1, 1 / (STD_OF_OTHERS + 1e-6)),
    ),
    ("ratio", "none"): LEVEL._replace(z=0 * LOG_RATIOS),
    ("ratio", "token"): LEVEL,
    ("ratio", "sequence_mean_token"): LEVEL._replace(
        z=over_mean_of_tokens(LOG_RATIOS.sum(-1, keepdims=True)) + 0 * LOG_RATIOS
    ),
    ("ratio", "sequence_mean"): per_term(over_mean_of_tokens),
    ("ratio", "sequence_sum"): per_term(lambda x: x),
    ("surrogate", "logp"): (-A * LOGPROBS, False),
    ("surrogate", "is"): (-A * R, False),
    ("surrogate", "ppo"): (SURROGATE, PAST),
    ("surrogate", "hard_clip"): (-A * CLIPPED, OUTSIDE),
    ("surrogate", "cispo"): (-A * CLIPPED * LOGPROBS, False),
    ("surrogate", "copg"): (-np.minimum(A * LOGPROBS, A * WITHIN), PAST),
    ("surrogate", "hinge"): (abs(A) * np.maximum(ROOM, 0), ROOM < 0),
    ("surrogate", "relative_is"): (-2 * R / (R + 1) * A * LOGPROBS, False),
    ("surrogate", "masked_is"): (np.where(DROPPED, 0, -R * A * LOGPROBS), DROPPED),
    ("surrogate", "fisher_rao"): (-A * R, False),
    ("mask", "tv"): abs(P_NEW - P_BEFORE),
    ("mask", "kl"): special.rel_entr(P_BEFORE, P_NEW)
    + special.rel_entr(1 - P_BEFORE, 1 - P_NEW),
    ("hinge", "ratio"): R - 1,
    ("hinge", "log"): LOG_RATIOS,
    ("hinge", "sqrt"): np.sqrt(R) - 1,
    ("aggregation", "sequence_mean_token_sum"): ONES / G,
    ("aggregation", "sequence_mean_token_mean"): ONES / G / LENGTHS[..., None],
    ("aggregation", "constant"): ONES / G / 10,
    ("aggregation", "group_token_mean"): ONES / ONES.sum((1, 2), keepdims=True),
    ("aggregation", "batch_token_mean"): P * ONES / ONES.sum(),
    ("aggregation", "first_rest"): P * (0.5 * FIRST / (P * G) + REST / REST.sum()),
    ("aggregation", "first_rest_sequence_mean"): (
        (0.5 * FIRST + REST / np.maximum(LENGTHS - 1, 1)[..., None]) / G
    ),
    ("divergence", "k1"): -LOG_RATIOS,
    ("divergence", "k2"): LOG_RATIOS**2 / 2,
    ("divergence", "k3"): R - 1 - LOG_RATIOS,
}


def of_entry(axis, name):
    value = VALUES.get((axis, name))
    reference = None if value is None else lambda *arguments: value
    return Case(*CASES_OF[axis](AXES[axis][name]), reference)


ENTRIES = {
    f"{axis}.{name}": of_entry(axis, name)
    for axis, registry in AXES.items()
    for name in registry
    if axis in CASES_OF
}

# ---- the functions around them

DR_GRPO, GRPO = gj.OBJECTIVES["dr_grpo"], gj.OBJECTIVES["grpo"]
ARRAYS = {
    "logprobs": LOGPROBS,
    "behaviour_logprobs": BEHAVIOUR,
    "rewards": REWARDS,
    "completion_mask": MASK.astype(np.int32),
}
SHARES = ONES / ONES.sum()
RATIO_METRICS = {
    "ratio/mean": (SHARES * R).sum(),
    "ratio/deviation": (SHARES * abs(R - 1)).sum(),
    "ratio/clipped": (SHARES * PAST).sum(),
}
METRICS = {name: floats() for name in RATIO_METRICS}
LOSSES = (SURROGATE * ONES / G / T).sum((1, 2))
KL = np.exp(REFERENCE - LOGPROBS) - 1 - (REFERENCE - LOGPROBS)
TERMS = {
    "logprobs": LOGPROBS,
    "behaviour_logprobs": BEHAVIOUR,
    "reference_logprobs": REFERENCE,
    "advantages": CENTRED,
    "coefficients": ONES / G / T,
    "token_shares": SHARES,
}
KL_IN_REWARD = gj.OBJECTIVES["rloo"]  # k1, 0.03


def with_keywords(function, objective):
    return lambda arrays: function(objective, **arrays)


FUNCTIONS = {
    "loss.per_prompt_losses": Case(
        with_keywords(gj.per_prompt_losses, DR_GRPO),
        (ARRAYS,),
        (floats(P), METRICS),
        lambda arrays: (LOSSES, RATIO_METRICS),
    ),
    "loss.policy_loss": Case(
        with_keywords(gj.policy_loss, DR_GRPO),
        (ARRAYS,),
        (floats(), METRICS),
        lambda arrays: (LOSSES.mean(), RATIO_METRICS),
    ),
    "loss.scale_weights": Case(
        lambda rewards: loss.scale_weights(GRPO).weights(rewards, ()),
        (REWARDS,),
        (floats(P), ()),
        lambda rewards: (INVERSE, ()),
    ),
    "loss.nan_without_tokens": Case(  # without any: a test of per_prompt_losses
        lambda value, mask: loss.nan_without_tokens({"kl/mean": value}, mask),
        (np.float32(0.5), MASK),
        {"kl/mean": floats()},
        lambda value, mask: {"kl/mean": value},
    ),
    "loss.present_mask": Case(
        loss.present_mask,
        (MASK, np.where(REWARDS == 1, np.nan, REWARDS)),
        floats(P, G, T),
        lambda mask, rewards: mask * (REWARDS == 0)[..., None],
    ),
    "loss.shaped_rewards": Case(
        partial(loss.shaped_rewards, KL_IN_REWARD),
        (REWARDS, BEHAVIOUR, REFERENCE, ONES),
        loss.ShapedRewards(floats(P, G), floats(P, G), floats(P, G)),
        lambda r, old, ref, mask: loss.ShapedRewards(
            r, r, -0.03 * ((old - ref) * mask).sum(-1)
        ),
    ),
    "loss.weighed_advantages": Case(
        lambda r, added, w: loss.weighed_advantages(
            DR_GRPO, loss.ShapedRewards(r, r, added), w
        ),
        (REWARDS, 2 * REWARDS, np.arange(P, dtype=np.float32)),
        floats(P, G),
        lambda r, added, w: CENTRED * (w[:, None] + 2),
    ),
    "loss.baselined": Case(
        partial(loss.baselined, DR_GRPO), (REWARDS,), floats(P, G), lambda r: CENTRED
    ),
    "loss.prompt_terms": Case(
        with_keywords(loss.prompt_terms, GRPO),  # KL by k3, 0.04
        (TERMS,),
        (floats(P), floats(P), METRICS | {"kl/mean": floats()}),
        lambda terms: (
            LOSSES,
            0.04 * (KL * ONES / G / T).sum((1, 2)),
            RATIO_METRICS | {"kl/mean": (SHARES * KL).sum()},
        ),
    ),
    "aggregation.token_coefficients": Case(
        partial(token_coefficients, "constant", max_length=10),
        (MASK,),
        floats(P, G, T),
        lambda mask: mask / G / 10,
    ),
    "divergences.divergence": Case(
        partial(divergence, "k3"),
        (LOGPROBS, REFERENCE),
        floats(P, G, T),
        lambda logprobs, reference: KL,
    ),
    "ratios.tokens_of": Case(
        ratios.tokens_of,
        (np.where(MASK, LOGPROBS, -np.inf), BEHAVIOUR, MASK, A),
        ratios.Tokens(
            floats(P, G, T), floats(P, G, T), bools(P, G, T), floats(P, G, 1)
        ),
        lambda *arrays: TOKENS,
    ),
    "surrogates.bounded_ratio": Case(
        surrogates.bounded_ratio,
        (np.float32([-1e4, -1, 0, 1, 1e4]),),
        floats(5),
        lambda z: np.exp(np.array([-20, -1, 0, 1, 20.0])),
    ),
    "surrogates.relative_ratio": Case(
        partial(gj.relative_ratio, mixture=0.25),
        (LOG_RATIOS,),
        floats(P, G, T),
        lambda z: R / (0.25 * R + 0.75),
    ),
    "surrogates.fisher_rao_penalty": Case(
        partial(surrogates.fisher_rao_penalty, tau=0.5),
        (LOG_RATIOS, BEHAVIOUR),
        floats(P, G, T),
        lambda z, behaviour: P_OLD * (R - 1) ** 2,
    ),
    "token_weights.conflict_weights": Case(
        gj.conflict_weights, (IDS, CENTRED, MASK), floats(P, G, T)
    ),
    "token_weights.mean_entropy": Case(
        token_weights.mean_entropy,
        (ENTROPY, MASK),
        floats(P, G),
        lambda entropy, mask: (entropy * mask).sum(-1) / LENGTHS,
    ),
    "token_weights.nthr_weights": Case(
        gj.nthr_weights,
        (uniform(-1, 1, (P, G, T, D)), uniform(-1, 1, (D, V)), IDS, REWARDS, MASK),
        floats(P, G, T),
    ),
    "token_weights.is_eos": Case(
        token_weights.is_eos,
        (IDS, np.int32([1, 4])),
        bools(P, G, T),
        np.isin,
    ),
    "token_weights.overlong_weights": Case(
        partial(gj.overlong_weights, eos_id=int(LAST[0, 0, 0])),
        (IDS, MASK),
        floats(P, G, T),
        lambda ids, mask: (LAST[0, 0, 0] == LAST) + np.zeros_like(ONES),
    ),
    "token_weights.truncated_importance_weights": Case(
        partial(gj.truncated_importance_weights, cap=1.5),
        (LOGPROBS, BEHAVIOUR),
        floats(P, G, T),
        lambda logprobs, sampled: np.minimum(R, 1.5),
    ),
    "token_weights.dense_step_weights": Case(
        gj.dense_step_weights,
        (ENTROPY, MASK),
        floats(P, G, T),
        lambda values, mask: np.where(
            mask,
            values * LENGTHS[..., None] / (values * mask).sum(-1, keepdims=True),
            1,
        ),
    ),
}


class ObjectivesTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, without_device=True)
    @parameterized.named_parameters(
        (f"_{name}", case) for name, case in (ENTRIES | FUNCTIONS).items()
    )
    def test(self, case):
        check(case, self.variant)


def test_every_public_function_has_a_case():
    public = public_functions(*MODULES)
    of_entries = called_by(*AXES.values())  # every entry is a case
    missing = public - of_entries - ON_THE_HOST - FUNCTIONS.keys()
    assert not missing, f"add to FUNCTIONS: {', '.join(sorted(missing))}"
    assert public >= ON_THE_HOST
    assert AXES.keys() == CASES_OF.keys() | WITHOUT_ARRAYS
