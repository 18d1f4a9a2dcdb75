"""Every objective against the plain loops of `reference`, in float64."""

import functools
import math
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from tests.golden import reference as plain

NAMES = tuple(gj.OBJECTIVES)
WITH_REFERENCE = [name for name in NAMES if name in plain.ROWS]
SEEDS = range(12)
# Their gradient is not that of their value: something in it is held constant.
WITH_CONSTANTS = {"cispo", "gspo_token", "grpo_no_is", "gtpo"}
WITH_CONSTANTS |= {"dppo_tv", "dppo_kl", "rt_pg"}
EXTRAS = {"nthr": ("token_weights",), "gtpo": ("entropy", "token_ids")}

pytestmark = pytest.mark.usefixtures("x64")


def random_batch(seed, shape=(3, 5, 7)):
    """Ragged; every other seed a tied group, and every other an empty completion.

    Sequences differ by orders of magnitude in how far they are from the behaviour
    policy, which is what reaches both GSPO's clip and DPPO's truncation.
    """
    rng = np.random.default_rng(seed)
    prompts, group, tokens = shape
    behaviour = np.log(0.9) * rng.uniform(0.1, 50, shape)
    scale = rng.choice([5e-4, 0.1, 0.5, 2.0], size=(prompts, group, 1))
    logprobs = np.minimum(behaviour + scale * rng.normal(size=shape), -0.01)
    lengths = rng.integers(1, tokens + 1, size=(prompts, group))
    rewards = rng.uniform(0, 1, (prompts, group))
    if seed % 2:
        rewards[1] = rewards[1, 0]
    else:
        lengths[0, 1] = 0
    rewards[0, 0] = rewards[2, 3] = math.nan
    level = rng.uniform(0.2, 1.1, (prompts, group, 1))
    return dict(
        logprobs=logprobs,
        behaviour_logprobs=behaviour,
        rewards=rewards,
        completion_mask=(np.arange(tokens) < lengths[..., None]).astype(np.int32),
        reference_logprobs=np.minimum(logprobs + 0.5 * rng.normal(size=shape), -0.01),
        entropy=level * rng.uniform(0.8, 1.2, shape),
        token_ids=rng.integers(0, 3, shape).astype(np.int32),
        token_weights=rng.uniform(0, 2, shape),
    )


def taken(name, batch):
    """The arrays that the objective needs."""
    unused = {"entropy", "token_ids", "token_weights"} - set(EXTRAS.get(name, ()))
    return {k: x for k, x in batch.items() if k not in unused}


@functools.cache
def compiled(name, max_length=None):
    def loss(logprobs, others):
        losses, _ = gj.per_prompt_losses(
            gj.OBJECTIVES[name], logprobs=logprobs, max_length=max_length, **others
        )
        return losses.mean(), losses

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def library(name, batch, max_length=None):
    """(losses [P], gradient of their mean)."""
    others = jax.tree.map(jnp.asarray, taken(name, batch))
    logprobs = others.pop("logprobs")
    (_, losses), gradient = compiled(name, max_length)(logprobs, others)
    return np.asarray(losses), np.asarray(gradient)


def looped(row, batch, max_length=None):
    """The same in loops; `row`: a preset's name, or a `Row`."""
    new_names = dict(behaviour_logprobs="behaviour", completion_mask="mask")
    arrays = {new_names.get(k, k): x for k, x in batch.items()}
    row = plain.ROWS[row] if isinstance(row, str) else row
    return plain.reference(row, max_length=max_length, **arrays)


def assert_close(actual, expected):
    chex.assert_trees_all_close(list(actual), list(expected), rtol=1e-10, atol=1e-10)


def directional_difference(loss, logprobs, direction, step=1e-6):
    return (loss(logprobs + step * direction) - loss(logprobs - step * direction)) / (
        2 * step
    )


def frozen_loss(monkeypatch, name, batch):
    """The looped loss of log-probs, whatever it stops kept at its value in `batch`."""
    stopped = []

    def record(x):
        stopped.append(float(x))
        return stopped[-1]

    monkeypatch.setattr(plain, "stop", record)
    looped(name, batch)

    def loss(logprobs):
        replay = iter(stopped)
        monkeypatch.setattr(plain, "stop", lambda x: next(replay))
        return looped(name, batch | dict(logprobs=logprobs))[0].mean()

    return loss


def test_there_is_a_reference_for_every_objective():
    missing = ", ".join(sorted(set(NAMES) - set(plain.ROWS)))
    assert not missing, f"add to ROWS in tests/golden/reference.py: {missing}"
    assert set(plain.ROWS) <= set(NAMES)


@pytest.mark.parametrize("name", sorted(plain.ROWS))
def test_the_references_gradient_is_that_of_its_value(name, monkeypatch):
    batch = random_batch(3)
    _, gradient = looped(name, batch)
    loss = frozen_loss(monkeypatch, name, batch)
    for direction in np.random.default_rng(0).normal(size=(3, 3, 5, 7)):
        slope = directional_difference(loss, batch["logprobs"], direction)
        np.testing.assert_allclose(
            slope, np.sum(gradient * direction), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_losses_and_gradients(name):
    for seed in SEEDS:
        batch = random_batch(seed)
        losses, gradient = looped(name, batch)
        assert_close(library(name, batch), (losses, gradient))
        assert np.abs(gradient).max() > 1e-6


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_another_shape(name):
    batch = random_batch(20, shape=(4, 4, 6))
    assert_close(library(name, batch), looped(name, batch))


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_on_policy(name):
    batch = random_batch(8)
    batch["logprobs"] = batch["behaviour_logprobs"]
    assert_close(library(name, batch), looped(name, batch))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in WITH_CONSTANTS])
def test_gradient_is_that_of_the_value(name):
    batch = random_batch(3)

    def loss(logprobs):
        return library(name, batch | dict(logprobs=logprobs))[0].mean()

    _, gradient = library(name, batch)
    for direction in np.random.default_rng(0).normal(size=(3, 3, 5, 7)):
        slope = directional_difference(loss, batch["logprobs"], direction)
        np.testing.assert_allclose(
            slope, np.sum(gradient * direction), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    "name", ["dr_grpo", "tic_grpo", "tic_grpo_std", "grpo_up_clip"]
)
def test_the_given_length_divides(name):
    batch = random_batch(2)
    divided = library(name, batch, max_length=70)
    assert_close(divided, looped(name, batch, max_length=70))
    assert_close(divided, [x / 10 for x in library(name, batch)])


# What the seeds reach. A branch that no seed takes would be compared with nothing.

EDGES = {
    "token": (0.64, 0.8, 1.2, 1.28, 1.44, 5.0, 10.0),
    "log": (-0.4, -0.2, 0.2, 0.4),
    "geometric mean": (1 - 3e-4, 1 + 4e-4),
    "product": (0.8, 1.2, 1.28),
    "probability": (-0.15, 0.15),
    "relative": (0.8, 1.2),
}


def quantities(c):
    logs = [float(d) for d in c.log_ratios()]
    ratios = [math.exp(d) for d in logs]
    yield "token", ratios
    yield "log", logs
    yield "geometric mean", [math.exp(np.mean(logs))]
    yield "product", [math.exp(np.sum(logs))]
    yield "probability", np.exp([float(x) for x in c.lp]) - np.exp(c.old)
    yield "relative", [r / (0.5 * r + 0.5) for r in ratios]


def seeds_completions(name):
    """(completion, its group) over the seeds, advantages set."""
    for seed in SEEDS:
        arrays = random_batch(seed)
        batch = plain.completions(
            *(arrays[k] for k in ("logprobs", "behaviour_logprobs", "rewards")),
            arrays["completion_mask"],
            ref=arrays["reference_logprobs"],
            entropy=arrays["entropy"],
            ids=arrays["token_ids"],
        )
        plain.set_advantages(plain.ROWS[name], batch)
        yield from ((c, group) for group in batch for c in group if c.lp)


@pytest.mark.parametrize("name", ["grpo", "rloo_trl", "bnpo"])
def test_both_signs_are_on_both_sides_of_every_edge(name):
    sides = Counter()
    for c, _ in seeds_completions(name):
        for what, values in quantities(c):
            for edge in EDGES[what]:
                sides.update((what, edge, c.advantage > 0, x > edge) for x in values)
    reached = [
        sides[what, edge, positive, above]
        for what, edges in EDGES.items()
        for edge in edges
        for positive in (False, True)
        for above in (False, True)
    ]
    assert min(reached) >= 3


def test_dppo_masks_by_the_kl_for_both_signs():
    kept = Counter()
    for c, _ in seeds_completions("dppo_kl"):
        masked = plain.divergence_masked(plain.binary_kl, 0.05)(c, None)
        if c.advantage:
            kept.update((c.advantage > 0, bool(float(x))) for x in masked)
    assert min(kept[sign, keep] for sign in (0, 1) for keep in (0, 1)) >= 3


# From 0.4 the total variation reaches 0.15, and the KL 0.05, within these moves.
@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_close_to_its_thresholds(name):
    for seed in SEEDS:
        batch, rng = random_batch(seed), np.random.default_rng(seed)
        moves = rng.choice([-1, 1], (3, 5, 7)) * rng.uniform(0.14, 0.165, (3, 5, 7))
        batch["behaviour_logprobs"] = np.full((3, 5, 7), np.log(0.4))
        batch["logprobs"] = np.log(0.4 + moves)
        assert_close(library(name, batch), looped(name, batch))


def test_gtpo_meets_conflicts_and_high_entropy():
    weights, high = Counter(), Counter()
    for c, group in seeds_completions("gtpo"):
        weights.update(plain.conflict_weights(c, group))
        high[np.mean(c.entropy) > math.log(2)] += 1
    assert min(weights[w] for w in (0.0, 1.0, 2.0, 4.0)) >= 3
    assert min(high.values()) >= 3


def test_bnpo_meets_a_beta_and_the_uniform():
    shapes = set()
    for seed in SEEDS:
        rewards = random_batch(seed)["rewards"]
        shapes |= set(plain.beta_shapes(list(np.nanmean(rewards, axis=1))))
    assert 1.0 in plain.beta_shapes([0.0, 1.0, 0.5]) and max(shapes) > 2


# Hard inputs.


def extreme_batch(dtype):
    """Log-ratios of +-1e4, to the behaviour policy and to the reference."""
    batch = random_batch(4)
    rng = np.random.default_rng(0)
    for key in ("logprobs", "behaviour_logprobs", "reference_logprobs"):
        far = rng.random(batch[key].shape) < 0.2
        batch[key] = np.where(far, -1e4, batch[key])
    batch["logprobs"][0, 2], batch["behaviour_logprobs"][0, 3] = -1e4, -1e4
    batch["behaviour_logprobs"][1, 2], batch["logprobs"][1, 3] = -1e4, -1e4
    cast = {k: x.astype(dtype) for k, x in batch.items() if x.dtype == np.float64}
    return batch | cast


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", NAMES)
def test_far_log_ratios_are_finite(name, dtype):
    with jax.enable_x64(dtype is np.float64):
        losses, gradient = library(name, extreme_batch(dtype))
    assert losses.dtype == gradient.dtype == dtype
    chex.assert_tree_all_finite((losses, gradient))


@pytest.mark.parametrize(
    "name", ["igrpo", "espo", "cispo", "gspo", "tic_grpo", "rt_pg", "hpo", "fr_ppo"]
)
def test_log_ratios_count_up_to_twenty(name):
    batch = extreme_batch(np.float64)
    actual, expected = library(name, batch), looped(name, batch)
    chex.assert_trees_all_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_completions_without_reward_are_never_read(name):
    batch = random_batch(5)
    present = np.isfinite(batch["rewards"])[..., None]
    read = (batch["completion_mask"] == 1) & present
    noise = np.random.default_rng(0).choice([np.nan, np.inf, -np.inf, 1e30], read.shape)
    dirty = dict(batch)
    for key, x in batch.items():
        if x.dtype == np.float64 and x.shape == read.shape:
            dirty[key] = np.where(read, x, noise)
    dirty["token_ids"] = np.where(read, batch["token_ids"], 2**31 - 1).astype(np.int32)
    clean = library(name, batch)
    for a, b in zip(library(name, dirty), clean, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(clean[1][~read], 0)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_groups_without_tokens_or_without_rewards(name):
    batch = random_batch(6)
    batch["completion_mask"][0] = 0
    batch["rewards"][1] = math.nan
    losses, gradient = library(name, batch)
    assert_close((losses, gradient), looped(name, batch))
    np.testing.assert_array_equal(losses[:2], 0)
    np.testing.assert_array_equal(gradient[:2], 0)


@pytest.mark.parametrize("empty", ["completion_mask", "rewards"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_nothing_is_zero(name, empty):
    batch = random_batch(7)
    batch[empty] = np.full_like(batch[empty], math.nan if empty == "rewards" else 0)
    for x in library(name, batch):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_tied_rewards_everywhere(name):
    batch = random_batch(7)
    batch["rewards"] = np.where(np.isfinite(batch["rewards"]), 1.0, math.nan)
    assert_close(library(name, batch), looped(name, batch))


# Three orders of the same rewards: their means may differ in the last digit.
@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_bnpo_where_every_group_has_the_same_mean(order):
    batch = random_batch(0)
    rewards = np.array([0.1, 0.2, 0.7, 0.4, 0.3])
    batch["rewards"] = np.stack([rewards, rewards[order], np.roll(rewards[order], 2)])
    losses, gradient = library("bnpo", batch)
    chex.assert_tree_all_finite((losses, gradient))
    assert np.abs(gradient).max() > 0


# One group of sixty is seven deviations out, where the density is below 1e-6.
def test_bnpo_bounds_the_weight_of_an_unlikely_group():
    batch = random_batch(0, shape=(60, 4, 2))
    batch["rewards"] = np.tile([0.4, 0.6, 0.4, 0.6], (60, 1))
    batch["rewards"][7] = [0.9, 1.0, 0.9, 1.0]
    losses, gradient = looped("bnpo", batch)
    assert_close(library("bnpo", batch), (losses, gradient))
    assert np.abs(losses[7]) > 1e3
