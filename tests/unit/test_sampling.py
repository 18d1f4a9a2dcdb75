import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import (
    ModelConfig,
    completion_logprobs,
    init_policy,
    next_token_logits,
    sample,
)
from grpo_jax.rollouts import sampling
from grpo_jax.rollouts.draw import draw_tokens, inverse_cdf
from grpo_jax.rollouts.sampling import cache_lengths

V, EOS, PAD = 11, 1, 10
CONFIG = ModelConfig(
    vocab_size=V, num_layers=2, width=16, mlp_width=24, num_heads=4, num_kv_heads=2,
    head_dim=4, qk_bias=True, remat="none",
)  # fmt: skip
PROMPTS = [[3, 4, 5, 6], [7], [8, 2, 9]]  # one of them a single token
NEVER = V + 5  # an end that no token is
MANY = 4000  # samples of one token
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))

_logits = jax.jit(next_token_logits)


@pytest.fixture(scope="module")
def policy():
    policy = init_policy(CONFIG, jax.random.key(0))
    # Flatter than a fresh model's, which repeats its last token for being tied to it.
    return policy.replace(jax.tree.map(lambda x: 0.7 * x, policy.params))


def padded(rows, side="left", length=5):
    ids, mask = np.full((2, len(rows), length), PAD, np.int32)
    mask[:] = 0
    for i, row in enumerate(rows):
        start = length - len(row) if side == "left" else 0
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return ids, mask


def draw(policy, rows=PROMPTS, side="left", **changes):
    arguments = dict(group_size=6, max_new_tokens=36, key=jax.random.key(1))
    arguments |= dict(eos_id=EOS, pad_id=PAD) | changes
    rollouts = sample(policy, *padded(rows, side), **arguments)
    shape = len(rows), arguments["group_size"], arguments["max_new_tokens"]
    chex.assert_shape(rollouts[2:5], shape)
    chex.assert_type(rollouts[2:5], [np.int32, np.int32, np.float32])
    chex.assert_tree_all_finite(rollouts.behaviour_logprobs)
    return rollouts


def next_logprobs(policy, rows, temperature=1.0):
    """[len(rows), V] log-probs of the token after each row, by the plain forward."""
    ids, mask = padded([*rows, *[[0]] * (8 - len(rows))], "right", length=12)
    logits = np.asarray(_logits(policy, ids, mask))
    last = [logits[i, len(row) - 1] for i, row in enumerate(rows)]
    return np.asarray(jax.nn.log_softmax(np.array(last) / temperature))


@pytest.fixture(scope="module")
def rollouts(policy):
    return jax.device_get(draw(policy))


@pytest.fixture(scope="module")
def firsts(policy):
    return jax.device_get(draw(policy, max_new_tokens=1, group_size=MANY))


def test_eos_ends_a_completion_and_is_its_last_token(rollouts):
    lengths = rollouts.completion_mask.sum(-1)
    ended = 0
    for p, g in np.ndindex(lengths.shape):
        n = lengths[p, g]
        tokens = rollouts.completions[p, g]
        assert (rollouts.completion_mask[p, g] == (np.arange(36) < n)).all()
        assert (tokens[: n - 1] != EOS).all()
        assert tokens[n - 1] == EOS or n == 36
        assert (tokens[n:] == PAD).all()
        assert (rollouts.behaviour_logprobs[p, g, n:] == 0).all()
        ended += tokens[n - 1] == EOS
    assert ended > 9 and lengths.min() < 6 < 32 < lengths.max()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("eos_id", [EOS, NEVER])
def test_behaviour_logprobs_are_the_teacher_forced_ones(policy, temperature, eos_id):
    rollouts = draw(policy, temperature=temperature, eos_id=eos_id)
    twin = jax.jit(completion_logprobs)
    actual = twin(policy, rollouts, temperature=temperature)
    chex.assert_equal_shape([actual, rollouts.completions])
    np.testing.assert_allclose(actual, rollouts.behaviour_logprobs, atol=1e-5)
    assert (np.asarray(actual)[np.asarray(rollouts.completion_mask) > 0] < 0).all()
    other = twin(policy, rollouts, temperature=temperature * 1.5)
    assert np.abs(other - rollouts.behaviour_logprobs).max() > 1e-2


def test_logprobs_are_those_of_the_plain_forward(policy, rollouts):
    for p, prompt in enumerate(PROMPTS):
        tokens = rollouts.completions[p, 0]
        steps = min(7, rollouts.completion_mask[p, 0].sum())
        rows = [prompt + tokens[:t].tolist() for t in range(steps)]
        expected = next_logprobs(policy, rows)[np.arange(steps), tokens[:steps]]
        actual = rollouts.behaviour_logprobs[p, 0, :steps]
        np.testing.assert_allclose(actual, expected, atol=1e-5)


# A window of 4 ends inside the prompt at first, at its edge, and then beyond it.
@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_and_caps_are_those_of_the_plain_forward(side):
    config = dataclasses.replace(
        CONFIG, sliding_window=4, sliding_layers=(0,), post_norms=True,
        norm_offset=True, scale_embedding=True, activation="gelu_tanh",
        attention_softcap=2.0, logit_softcap=3.0, rope_local_theta=50.0, query_scale=9,
        rope_scaling="linear", rope_factor=4.0,
    )  # fmt: skip
    policy = init_policy(config, jax.random.key(0))
    settings = dict(max_new_tokens=7, group_size=2, temperature=0.7, eos_id=NEVER)
    rollouts = jax.device_get(draw(policy, side=side, **settings))
    twin = jax.jit(completion_logprobs)(policy, rollouts, temperature=0.7)
    np.testing.assert_allclose(twin, rollouts.behaviour_logprobs, atol=1e-5)
    for p, prompt in enumerate(PROMPTS):
        tokens = rollouts.completions[p, 1]
        rows = [prompt + tokens[:t].tolist() for t in range(7)]
        expected = next_logprobs(policy, rows, 0.7)[np.arange(7), tokens]
        actual = rollouts.behaviour_logprobs[p, 1]
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_any_of_several_ids_ends_a_completion(policy, rollouts):
    both = jax.device_get(draw(policy, eos_id=(EOS, 4), max_new_tokens=12))
    for p, g in np.ndindex(both.completions.shape[:2]):
        tokens = both.completions[p, g][both.completion_mask[p, g] > 0]
        assert not np.isin(tokens[:-1], [EOS, 4]).any()
        assert np.isin(tokens[-1], [EOS, 4]) or len(tokens) == 12
    ends = both.completions[both.completion_mask > 0]
    assert (ends == EOS).any() and (ends == 4).any()
    alone = draw(policy, eos_id=[EOS])
    chex.assert_trees_all_equal(alone, rollouts)


def test_top_k_1_is_greedy(policy):
    rollouts = jax.device_get(
        draw(policy, top_k=1, max_new_tokens=7, group_size=2, eos_id=NEVER)
    )
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(7):
        best = np.argmax(next_logprobs(policy, rows), axis=-1)
        rows = [row + [int(token)] for row, token in zip(rows, best, strict=True)]
    for p, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        np.testing.assert_array_equal(rollouts.completions[p], [row[len(prompt) :]] * 2)
    np.testing.assert_allclose(rollouts.behaviour_logprobs, 0, atol=1e-6)


@pytest.mark.parametrize("truncation", [dict(top_k=3), dict(top_p=0.6)])
def test_truncated_logprobs_are_renormalised(policy, truncation):
    rollouts = jax.device_get(
        draw(policy, max_new_tokens=1, group_size=MANY, temperature=0.8, **truncation)
    )
    for p, full in enumerate(np.exp(next_logprobs(policy, PROMPTS, 0.8))):
        order = np.argsort(-full)
        # The smallest set of likeliest tokens that holds at least 0.6 of the mass.
        enough = np.searchsorted(np.cumsum(full[order]), 0.6) + 1
        kept = order[: truncation.get("top_k", enough)]
        tokens = rollouts.completions[p, :, 0]
        assert set(tokens) == set(kept) and 1 < len(kept) < V
        expected = np.log(full / full[kept].sum())[tokens]
        actual = rollouts.behaviour_logprobs[p, :, 0]
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_truncation_that_keeps_everything_changes_nothing(policy, firsts):
    wide = dict(max_new_tokens=1, group_size=MANY, top_k=99, top_p=1.0)
    actual = draw(policy, **wide)
    np.testing.assert_array_equal(actual.completions, firsts.completions)
    np.testing.assert_allclose(
        actual.behaviour_logprobs, firsts.behaviour_logprobs, atol=1e-6
    )


def test_first_tokens_come_in_the_policys_proportions(policy, firsts):
    for p, logprobs in enumerate(next_logprobs(policy, PROMPTS)):
        counts = np.bincount(firsts.completions[p, :, 0], minlength=V)
        expected = MANY * np.exp(logprobs)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 30  # 10 degrees of freedom: 1 in 1000 beyond 29.6


def test_a_named_prompts_samples_do_not_depend_on_its_batch(policy):
    first = draw(policy, prompt_indices=np.array([40, 50, 60]))
    rows = [PROMPTS[2], [4, 4], PROMPTS[0]]
    other = draw(policy, rows, prompt_indices=np.array([60, 7, 40]))
    for a, b in ((2, 0), (0, 2)):
        np.testing.assert_array_equal(first.completions[a], other.completions[b])
    again = draw(policy, prompt_indices=np.array([41, 50, 60]))
    assert (np.asarray(again.completions[0]) != first.completions[0]).any()
    np.testing.assert_array_equal(again.completions[1:], first.completions[1:])


def test_prompts_that_are_not_active_get_no_token(policy, rollouts):
    some = draw(policy, active=np.array([True, False, True]))
    for name in ("completions", "completion_mask", "behaviour_logprobs"):
        actual, expected = getattr(some, name), getattr(rollouts, name)
        np.testing.assert_array_equal(actual[::2], expected[::2])
    assert not np.asarray(some.completion_mask[1]).any()
    assert (np.asarray(some.completions[1]) == PAD).all()
    assert {row["group"] for row in some.to_rows()} == {0, 2}
    assert not np.asarray(draw(policy, active=[False] * 3).completion_mask).any()


# The loop ends with the last active completion.
def test_no_step_is_made_for_prompts_that_are_not_active(policy, monkeypatch):
    made = []
    extended = sampling._LoopState.extended

    def counting(state, *args):
        jax.debug.callback(lambda: made.append(1))
        return extended(state, *args)

    monkeypatch.setattr(sampling._LoopState, "extended", counting)
    sizes = dict(max_new_tokens=9, group_size=1)
    draw(policy, eos_id=NEVER, active=[False] * 3, **sizes)
    jax.effects_barrier()
    assert not made
    draw(policy, eos_id=NEVER, active=[False, True, False], **sizes)
    jax.effects_barrier()
    assert len(made) == 9


def test_a_sample_depends_on_no_other_and_on_no_length(firsts, rollouts):
    few = rollouts.completions.shape[1]
    expected = rollouts.completions[:, :, :1]
    np.testing.assert_array_equal(firsts.completions[:, :few], expected)


def test_the_side_of_the_padding_changes_nothing(policy, rollouts):
    actual = draw(policy, side="right")
    np.testing.assert_array_equal(actual.completions, rollouts.completions)
    np.testing.assert_allclose(
        actual.behaviour_logprobs, rollouts.behaviour_logprobs, atol=1e-5
    )


def test_samples_differ_within_a_group_and_between_keys(policy, rollouts):
    assert len({tuple(row) for row in rollouts.completions[0]}) > 3
    other = draw(policy, key=jax.random.key(2))
    assert (np.asarray(other.completions) != rollouts.completions).any()


# What `sample` traces, it traces through `prefill`: once, whatever the values.
def test_steps_of_one_shape_are_traced_once(policy, monkeypatch):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(sampling.prefill, n=1)
    monkeypatch.setattr(sampling, "prefill", counted)
    shape, updated = dict(group_size=2, max_new_tokens=3), policy
    for step in range(3):
        updated = policy.replace(jax.tree.map(lambda x: x + 0.1, updated.params))
        settings = dict(key=jax.random.key(step), temperature=1 + step / 2)
        draw(updated, PROMPTS[step:] + PROMPTS[:step], **shape, **settings)
    with pytest.raises(AssertionError, match="prefill' is traced > 1 times"):
        draw(policy, PROMPTS[1:], **shape)


def test_pad_and_eos_may_be_one_token(policy, rollouts):
    actual = draw(policy, pad_id=EOS)
    np.testing.assert_array_equal(actual.completion_mask, rollouts.completion_mask)
    masked = np.asarray(actual.completions) * rollouts.completion_mask
    np.testing.assert_array_equal(
        masked, rollouts.completions * rollouts.completion_mask
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(group_size=0), "group_size must be at least 1, got 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(temperature=0.0), "temperature must be positive, got 0.0; .*top_k=1"),
        (dict(temperature=float("nan")), "temperature must be positive, got nan"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(active=[True]), r"active must be \[3\], one per prompt, got \(1,\)"),
    ],
)
def test_arguments_out_of_range_are_refused(policy, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(policy, **changes)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((2, 3), (2, 4)), ((2, 3), (3,))])
def test_prompts_and_their_mask_must_fit(policy, shapes):
    arrays = [np.ones(shape, np.int32) for shape in shapes]
    arguments = dict(group_size=1, max_new_tokens=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"must be \[P, L\] alike, got \("):
        sample(policy, *arrays, **arguments, eos_id=EOS, pad_id=PAD)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 100, 1000])
def test_cache_lengths_grow_to_the_last(tokens):
    lengths = cache_lengths(tokens)
    assert lengths[-1] == tokens and lengths == sorted(set(lengths))
    assert all(b <= 2 * a for a, b in zip(lengths, lengths[1:], strict=False))


# Weights 1, 0, 2, 1 cumulate to 1/4, 1/4, 3/4, 1 of their total 4.
@pytest.mark.parametrize(
    ("u", "token"),
    [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (BELOW_ONE, 3)],
)
def test_inverse_cdf_golden(u, token):
    weights = np.float32([1, 0, 2, 1])
    actual, total = jax.jit(inverse_cdf)(np.float32(u), weights)
    assert actual == token and total == 4


# Chi-square with k degrees of freedom: mean k, std sqrt(2 k); 4 of them above.
@pytest.mark.parametrize("v", [5, 300])
def test_inverse_cdf_frequencies(v):
    n = 20_000
    weights = np.random.default_rng(0).gamma(2, 1, v).astype(np.float32)
    weights[::4] = 0
    u = jax.random.uniform(jax.random.key(0), (n,))
    tokens, total = jax.jit(jax.vmap(inverse_cdf, (0, None)))(u, weights)
    np.testing.assert_allclose(total, weights.sum(), rtol=1e-5)
    counts, live = np.bincount(tokens, minlength=v), weights > 0
    assert counts.shape == (v,) and (counts[~live] == 0).all()
    expected = n * weights[live] / weights.sum()
    chi_square = ((counts[live] - expected) ** 2 / expected).sum()
    freedom = live.sum() - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


# u a few ulp around every boundary, where a rounded sum would step on a zero weight.
@pytest.mark.parametrize("v", [5, 128, 129, 300, 2000])
@pytest.mark.parametrize("share_of_zeros", [0.1, 0.9])
def test_inverse_cdf_never_picks_weight_zero(v, share_of_zeros):
    rng = np.random.default_rng(v)
    weights = rng.exponential(1, v).astype(np.float32)
    weights[rng.random(v) < share_of_zeros] = 0
    weights[v // 2] = 1
    edges = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    u = np.float32(edges)[:, None] + np.float32(2**-24) * np.arange(-3, 4)
    u = np.clip(np.append(u, [0, BELOW_ONE]), 0, BELOW_ONE).astype(np.float32)
    tokens, _ = jax.jit(jax.vmap(inverse_cdf, (0, None)))(u, weights)
    assert np.max(tokens) < v and (weights[tokens] > 0).all()


# Blocks of 128 end in weights of zero; at a block's end a rounded sum may fall short.
@pytest.mark.parametrize("seed", [0, 6, 7, 8])
def test_inverse_cdf_stays_within_its_block(seed):
    blocks = np.random.default_rng(seed).exponential(1, (10, 128)).astype(np.float32)
    blocks[:, 100:] = 0
    sums = blocks.sum(1, dtype=np.float64)
    ends = np.float32(np.cumsum(sums) / sums.sum())
    u = ends[:, None] + np.float32(2**-24) * np.arange(-40, 41)
    u = np.clip(u, 0, BELOW_ONE).astype(np.float32).ravel()
    tokens, _ = jax.jit(jax.vmap(inverse_cdf, (0, None)))(u, blocks.ravel())
    assert np.max(np.asarray(tokens) % 128) < 100


@pytest.mark.parametrize("only", [0, 127, 128, 299])
def test_inverse_cdf_of_a_certain_token(only):
    weights = np.zeros((2, 300), np.float32)
    weights[:, only] = 1e-30
    u = jnp.array([0.0, BELOW_ONE])
    tokens, total = jax.jit(inverse_cdf)(u, weights)
    np.testing.assert_array_equal(tokens, [only, only])
    np.testing.assert_allclose(total, 1e-30, rtol=1e-6)


def test_a_draw_of_zero_is_half_a_step():
    """A token of 2^-30 is not drawn once in 2^23: u = 0 stands for [0, 2^-23)."""
    weights = np.float32([2**-30, 1])
    draw = jax.jit(inverse_cdf)
    assert draw(np.float32(0), weights)[0] == 1
    assert draw(np.float32(0.5), weights, np.float32(0))[0] == 1
    assert draw(np.float32(0), np.float32([2**-23, 1]))[0] == 0


# XLA adds up long rows in a tree: cumulated sums then rise and fall over empty blocks.
# Weights as top-k leaves them: a few, far apart.
@pytest.mark.parametrize("blocks", [400, 1187])
def test_inverse_cdf_never_picks_weight_zero_of_a_large_vocabulary(blocks):
    weights = np.zeros((blocks, 128), np.float32)
    rng = np.random.default_rng(blocks)
    filled = rng.choice(blocks, 50, replace=False)
    weights[filled, rng.integers(0, 128, 50)] = rng.exponential(1, 50)
    sums = np.asarray(jnp.cumsum(weights.sum(1)))
    empty = weights.sum(1) == 0
    assert (np.diff(sums)[empty[1:]] != 0).any()  # the case is the one above
    edges = np.unique(sums) / sums[-1]
    u = np.float32(edges)[:, None] + np.float32(2**-24) * np.arange(-4, 5)
    u = np.clip(u, 0, BELOW_ONE).ravel()
    for within in (None, jnp.zeros(()), jnp.asarray(BELOW_ONE)):
        draw = jax.jit(jax.vmap(lambda u, x, w=within: inverse_cdf(u, x, w), (0, None)))
        tokens, _ = draw(u, weights.ravel())
        assert (weights.ravel()[tokens] > 0).all()


def test_a_second_uniform_resolves_the_tail():
    """128 tokens of 2^-30 each: the first uniform has two steps for all of them."""
    weights = np.full(256, 2**-30, np.float32)
    weights[0] = 1
    weights[1:128] = 0
    within = np.float32((np.arange(128) + 0.25) / 128)
    draw = jax.jit(jax.vmap(inverse_cdf, (None, None, 0)))
    tokens, _ = draw(BELOW_ONE, weights, within)
    np.testing.assert_array_equal(tokens, 128 + np.arange(128))
    alone, _ = jax.jit(inverse_cdf)(BELOW_ONE, weights)
    assert alone == 255  # whichever of them: without a second one, always the same


# Up to 128 tokens the draw is that of one uniform, the key's own.
def test_a_small_vocabulary_is_drawn_by_one_uniform():
    keys = jax.random.split(jax.random.key(3), (4, 50))
    logits = jax.random.normal(jax.random.key(4), (4, 50, 100))
    tokens, logprobs = jax.jit(draw_tokens, static_argnums=(3, 4))(
        keys, jnp.int32(7), logits, None, None
    )
    uniform = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 7))))
    weights = np.exp(np.float64(logits))
    cumulated = np.cumsum(weights, -1) / weights.sum(-1, keepdims=True)
    expected = (cumulated <= np.asarray(uniform(keys))[..., None] + 2**-24).sum(-1)
    np.testing.assert_array_equal(tokens, expected)
    chosen = np.take_along_axis(weights, expected[..., None], -1)[..., 0]
    np.testing.assert_allclose(logprobs, np.log(chosen / weights.sum(-1)), atol=1e-5)
