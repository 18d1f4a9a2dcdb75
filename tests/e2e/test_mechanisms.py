"""What training does around the loss, method by method, in runs from start to end."""

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.cli import main
from grpo_jax.errors import ConfigError
from grpo_jax.planning import plan
from grpo_jax.prompt_weights import WEIGHTS
from grpo_jax.rollouts.encoding import decode_groups
from grpo_jax.runs.config import (
    CheckpointConfig,
    EvaluationConfig,
    InstrumentConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    WeightsConfig,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.training import collector, parts
from grpo_jax.training import run as whole_run
from grpo_jax.training.learner import Learner
from grpo_jax.training.saving import NonFiniteGradientsError
from tests.e2e.test_cli import answer
from tests.e2e.test_survival import numbers
from tests.e2e.test_train import digits_task, small_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

P, G = 4, 4
MODEL = gj.ModelConfig(
    num_layers=1, width=16, mlp_width=24, num_heads=2, num_kv_heads=2, head_dim=4
)


def tiny(run_dir, name, *, group_size=G, max_new_tokens=None, temperature=1.0, **more):
    """A config of that objective, given by name or as an ObjectiveConfig."""
    objective = ObjectiveConfig(name=name) if isinstance(name, str) else name
    sampling = SamplingConfig(
        prompts=P,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    defaults = dict(
        model=MODEL,
        objective=objective,
        sampling=sampling,
        steps=4,
        evaluation=EvaluationConfig(every=0, prompts=4),
        checkpoint=CheckpointConfig(every=1000),
        log=LogConfig(samples_every=1, samples_prompts=P),
    )
    return small_config(run_dir, **(defaults | more))


def starts_with_a_digit(example, completion):
    return float(completion[:1].isdigit())


@contextlib.contextmanager
def watched():
    """Records, while it is open, the updates, samples and refined prompts of runs, and
    their contexts and parts."""
    seen = SimpleNamespace(updates=[], sampled=[], refined=[], runs=[])
    update, sample, refine = Learner.update, parts.sample, collector.refined_prompts
    make_parts = whole_run.make_parts

    def watched_parts(context, start):
        made = make_parts(context, start)
        seen.runs.append(SimpleNamespace(context=context, parts=made))
        return made

    def watched_update(self, state, batch):
        before = jax.device_get(state)
        after, metrics = update(self, state, batch)
        seen.updates.append(
            SimpleNamespace(
                before=before,
                batch=jax.device_get(batch),
                after=jax.device_get(after),
                metrics=jax.device_get(metrics),
            )
        )
        return after, metrics

    def watched_sample(policy, ids, mask, **how):
        seen.sampled.append((np.asarray(ids), how))
        return sample(policy, ids, mask, **how)

    def watched_refine(*arguments):
        rows = refine(*arguments)
        seen.refined.append((*arguments, rows))
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_run, "make_parts", watched_parts)
        patch.setattr(Learner, "update", watched_update)
        patch.setattr(parts, "sample", watched_sample)
        patch.setattr(collector, "refined_prompts", watched_refine)
        yield seen


def run(config, task=None):
    """(rows of metrics.jsonl, what `watched` saw, the result)."""
    with watched() as seen:
        result = gj.train(config, task=task or digits_task())
    return read_lines(result.run_dir / "metrics.jsonl"), seen, result


def assert_nothing_compiled_after_step_1(rows):
    compiled = [row["compiles"] for row in rows[1:]]
    assert len(rows) > 2 and len(set(compiled)) == 1, compiled


def samples_of(result, step):
    rows = read_lines(result.run_dir / "samples.jsonl")
    return [row for row in rows if row["step"] == step]


class Redone:
    """A run's update recomputed by the public functions, without micro-batches."""

    def __init__(self, run, objective=None):
        settings = run.parts.learner.settings
        policy, objective = settings.policy, objective or settings.objective
        length = settings.max_new_tokens

        def logprobs(params, rollouts):
            return gj.completion_logprobs(policy.replace(params), rollouts)

        def loss(params, rollouts, arrays):
            current = logprobs(params, rollouts)
            return gj.policy_loss(
                objective,
                logprobs=current,
                rewards=rollouts.rewards,
                completion_mask=rollouts.completion_mask,
                max_length=length,
                **({"behaviour_logprobs": jax.lax.stop_gradient(current)} | arrays),
            )[0]

        self._gradient = jax.jit(jax.grad(loss))
        self.logprobs = jax.jit(logprobs)
        self.changes = jax.jit(settings.optimizer.update)

    def gradient(self, params, rollouts, **arrays):
        return jax.device_get(self._gradient(params, rollouts, arrays))


def norm(tree):
    return math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))


# ---- dynamic sampling


def tied(rewards):
    return len(set(rewards)) == 1


@pytest.fixture(scope="module")
def refilled(tmp_path_factory):
    calls = []

    def reward(example, completion):
        value = starts_with_a_digit(example, completion)
        calls.append((example.prompt, value))
        return value

    directory = tmp_path_factory.mktemp("refilled") / "run"
    objective = ObjectiveConfig(name="dapo", overlong="keep")
    config = tiny(directory, objective, group_size=2, steps=6)
    return *run(config, digits_task(reward)), calls


def test_refills_replace_tied_groups_by_informative_ones(refilled):
    """Replayed from the reward function's calls: P x G of them per round."""
    rows, _, result, calls = refilled
    evaluated = 4 + 16  # trained and held-out prompts, at either end
    rounds = calls[1 + evaluated : -evaluated]  # the first call tries the reward
    size = P * 2
    rounds = [rounds[i : i + size] for i in range(0, len(rounds), size)]
    groups = [
        [(r[2 * p][0], [r[2 * p][1], r[2 * p + 1][1]]) for p in range(P)]
        for r in rounds
    ]
    for row in rows[1:]:
        batch, replaced, asked = groups.pop(0), 0, 0
        while asked < 3 and any(tied(rewards) for _, rewards in batch):
            fresh = groups.pop(0)
            assert not {p for p, _ in fresh} & {p for p, _ in batch}
            asked += 1
            old = [i for i, (_, rewards) in enumerate(batch) if tied(rewards)]
            good = [group for group in fresh if not tied(group[1])]
            for i, group in zip(old, good, strict=False):
                batch[i], replaced = group, replaced + 1
        assert (row["group/refills"], row["group/refilled"]) == (asked, replaced)
        logged = samples_of(result, row["step"])
        assert [(x["prompt"], x["rewards"]) for x in logged] == batch
        assert len({prompt for prompt, _ in batch}) == P
        assert row["group/informative"] == np.mean([not tied(r) for _, r in batch])
        texts = (x["completions"] for x in logged)
        recomputed = [[starts_with_a_digit(None, t) for t in group] for group in texts]
        assert recomputed == [rewards for _, rewards in batch]
    assert not groups
    assert {row["group/refills"] for row in rows[1:]} > {1}
    assert sum(row["group/refilled"] for row in rows[1:]) >= 4


def test_refilled_groups_are_trained_on_as_sampled(refilled):
    rows, seen, _, _ = refilled
    run = seen.runs[0]
    task = run.context.plan.task
    for row, update in zip(rows[1:], seen.updates, strict=True):
        rollouts = update.batch.rollouts
        texts = decode_groups(task, rollouts.completions, rollouts.completion_mask)
        rewards = [[starts_with_a_digit(None, t) for t in group] for group in texts]
        np.testing.assert_array_equal(rewards, rollouts.rewards)
        # Prompt, completion and log-prob belong together in every slot.
        assert row["mismatch/max_abs"] < 1e-5


def test_refills_compile_nothing_later(refilled):
    assert_nothing_compiled_after_step_1(refilled[0])


def test_where_nothing_is_informative_the_run_goes_on(tmp_path, capsys):
    objective = ObjectiveConfig(name="dapo", overlong="keep")
    config = tiny(tmp_path / "run", objective, group_size=2, steps=2)
    rows, seen, result = run(config, digits_task(lambda example, text: 1.0))
    assert result.finished
    for row in rows[1:]:
        assert (row["group/refills"], row["group/refilled"]) == (3, 0)
        assert row["group/informative"] == row["gradient/norm"] == 0
        assert row["update/empty"] == 1 and row["update/applied"] == 0
    chex.assert_trees_all_equal(
        seen.updates[0].before.params, seen.updates[-1].after.params
    )
    output = capsys.readouterr().out
    assert "informative 0%" in output
    assert output.count("the gradient is 0 and the update is left out (said once") == 1


# ---- overlong completions, truncated importance weights


@pytest.mark.slow
def test_soft_overlong_punishment(tmp_path):
    """T is 10 where the longest answer has 8 tokens; the last fifth is punished."""
    objective = ObjectiveConfig(name="dapo", refills=0)
    config = tiny(tmp_path / "run", objective, group_size=2, steps=2)
    rows, seen, result = run(config)
    punished = 0
    for row, update in zip(rows[1:], seen.updates, strict=True):
        rollouts = update.batch.rollouts
        assert "group/refills" not in row and rollouts.completions.shape[-1] == 10
        lengths = rollouts.completion_mask.sum(-1)
        off = np.select([lengths <= 8, lengths == 9], [0.0, -0.5], -1.0)
        logged = samples_of(result, row["step"])
        plain = [
            [sum(c.isdigit() for c in text) / 8 for text in x["completions"]]
            for x in logged
        ]
        np.testing.assert_allclose(rollouts.rewards, plain + off, rtol=1e-6)
        np.testing.assert_allclose([x["rewards"] for x in logged], plain)
        assert row["reward/mean"] == pytest.approx(np.mean(plain), rel=1e-5)
        punished += (off < 0).sum()
    assert punished


@pytest.mark.slow
def test_a_group_that_only_length_tells_apart_is_not_informative(tmp_path):
    config = tiny(tmp_path / "run", "dapo", group_size=2, steps=2)
    rows, _, _ = run(config, digits_task(lambda example, text: 0.0))
    assert all(row["group/refills"] == 3 for row in rows[1:])


@pytest.mark.slow
def test_overlong_mask_leaves_cut_off_completions_out(tmp_path):
    objective = ObjectiveConfig(name="dr_grpo", overlong="mask")
    rows, seen, _ = run(tiny(tmp_path / "run", objective, max_new_tokens=12, steps=3))
    redone = Redone(seen.runs[0])
    for update in seen.updates:
        rollouts = update.batch.rollouts
        ended = (rollouts.completions == 1).any(-1, keepdims=True)
        assert 0 < ended.sum() < ended.size
        weights = np.broadcast_to(ended, rollouts.completions.shape).astype(np.float32)
        sampled = rollouts.completion_mask > 0
        actual = update.batch.token_weights
        np.testing.assert_array_equal(actual[sampled], weights[sampled])
        arrays = (update.before.params, rollouts)
        masked = norm(redone.gradient(*arrays, token_weights=weights))
        assert update.metrics["gradient/norm"] == pytest.approx(masked, rel=1e-4)
        assert abs(norm(redone.gradient(*arrays)) - masked) > 1e-3 * masked
    assert_nothing_compiled_after_step_1(rows)


@pytest.mark.slow
def test_tis_cap_weighs_by_the_samplers_error(tmp_path, monkeypatch):
    """A sampler whose log-probs are off by up to 1.5 nats: weights are cut at 2."""
    sample, rng = parts.sample, np.random.default_rng(0)

    def wrong(*arguments, **how):
        rollouts = sample(*arguments, **how)
        shift = rng.uniform(-1.5, 1.5, rollouts.behaviour_logprobs.shape)
        shift = np.where(rollouts.completion_mask > 0, shift, 0).astype(np.float32)
        return rollouts._replace(behaviour_logprobs=rollouts.behaviour_logprobs + shift)

    monkeypatch.setattr(parts, "sample", wrong)
    norms = {}
    for cap in (2.0, None):
        objective = ObjectiveConfig(name="dr_grpo", tis_cap=cap)
        config = tiny(tmp_path / f"run-{cap}", objective, steps=1)
        rows, seen, _ = run(config)
        assert 1 < rows[1]["mismatch/max_abs"] < 1.51
        (update,) = seen.updates
        params, rollouts = update.before.params, update.batch.rollouts
        redone = Redone(seen.runs[0])
        gap = redone.logprobs(params, rollouts) - rollouts.behaviour_logprobs
        weights = np.minimum(np.exp(gap), cap) if cap else np.ones_like(gap)
        norms[cap] = norm(redone.gradient(params, rollouts, token_weights=weights))
        assert update.metrics["gradient/norm"] == pytest.approx(norms[cap], rel=1e-4)
    assert abs(norms[2.0] / norms[None] - 1) > 1e-3


# ---- drafts


def digits_or_missing(example, completion):
    if completion.startswith(("1", "+", "=")):
        raise RuntimeError("no verdict")
    return sum(c.isdigit() for c in completion) / 8


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    directory = tmp_path_factory.mktemp("refined") / "run"
    config = tiny(directory, "igrpo", group_size=3)
    return run(config, digits_task(digits_or_missing))


@pytest.mark.slow
def test_the_best_draft_joins_the_prompt_of_the_update(refined):
    rows, seen, result = refined
    task, gaps = seen.runs[0].context.plan.task, 0
    for row, update, call in zip(rows[1:], seen.updates, seen.refined, strict=True):
        _, _, drafts, mask, _, _, _ = call
        assert drafts.shape == (P, 4, 8)
        rollouts = update.batch.rollouts
        assert rollouts.completions.shape == (P, 3, 8)
        for p, logged in enumerate(samples_of(result, row["step"])):
            (texts,) = decode_groups(task, drafts[[p]], mask[[p]])
            scores = []
            for text in texts:
                try:
                    scores.append(digits_or_missing(None, text))
                except RuntimeError:
                    scores.append(-math.inf)
                    gaps += 1
            best = texts[scores.index(max(scores))]
            seen_ids = rollouts.prompts[p][rollouts.prompt_mask[p] > 0]
            prompt = logged["prompt"]
            assert task.tokenizer.decode(seen_ids) == f"{prompt}{best},{prompt}"
    assert gaps


@pytest.mark.slow
def test_drafts_have_separate_keys(refined):
    """With the keys of the completions they would equal samples of plain prompts."""
    _, seen, _ = refined
    run_key = jax.random.fold_in(jax.random.key(0), 1)
    for step, (call, update) in enumerate(zip(seen.refined, seen.updates, strict=True)):
        run = seen.runs[0]
        indices = run.parts.collector.prompts_of(step)
        params, key = update.before.params, jax.random.fold_in(run_key, step)
        plain = run.parts.prompts.sample(params, indices, key, 4)
        assert (call[2] != np.asarray(plain.completions)).any((1, 2)).all()
    drafts = [call[2].tobytes() for call in seen.refined]
    assert len(set(drafts)) == len(drafts)


@pytest.mark.slow
def test_evaluation_is_on_plain_prompts(refined):
    rows, seen, _ = refined
    run = seen.runs[0]
    evaluated = [ids for ids, how in seen.sampled if how["group_size"] == 1]
    trained = [ids for ids, how in seen.sampled if how["group_size"] == 3]
    assert {ids.shape[1] for ids in evaluated} == {10}
    assert {ids.shape[1] for ids in trained} == {10 + 8 + 1 + 10 + 3}  # to a multiple
    plain = (part.prompts[0] for part in run.parts.pass_rates.parts.values())
    plain = {tuple(row) for ids in plain for row in ids}
    assert all(tuple(row) in plain for ids in evaluated for row in ids)
    assert "eval/heldout_pass_rate" in rows[-1]


@pytest.mark.slow
def test_drafts_compile_nothing_later(refined):
    assert_nothing_compiled_after_step_1(refined[0])


@pytest.mark.slow
def test_missing_rewards_of_drafts_are_reported(tmp_path, capsys):
    calls = iter(range(10**6))

    def reward(example, completion):  # 1 trial, 20 at the start, 16 drafts, the rest
        if 21 <= next(calls) < 37:
            raise RuntimeError("the verifier is down")
        return starts_with_a_digit(example, completion)

    run(tiny(tmp_path / "run", "igrpo", group_size=3, steps=1), digits_task(reward))
    assert "the verifier is down" in capsys.readouterr().out


# ---- history

# A mismatch of 0 cannot be drawn on the report's logarithmic axis.
ALL_ZERO = pytest.mark.filterwarnings("ignore:Data has no positive values")


@pytest.fixture(scope="module")
def remembered(tmp_path_factory):
    directory = tmp_path_factory.mktemp("remembered") / "run"
    return run(tiny(directory, "rt_pg", steps=6))


@ALL_ZERO
def test_history_resumes_bit_for_bit(remembered, tmp_path):
    """Stopped at step 2, with two of three past iterates."""
    rows, seen, result = remembered
    run(tiny(tmp_path / "run", "rt_pg", steps=2))
    again = tiny(tmp_path / "run", "rt_pg", steps=6, resume=True)
    resumed, rest, other = run(again)
    assert len(rest.updates) == 4
    chex.assert_trees_all_equal(rest.updates[-1].after, seen.updates[-1].after)
    # The first part ended there, and was evaluated.
    kept = [r for r in numbers(other.run_dir) if r.pop("step") != 2]
    assert kept == [r for r in numbers(result.run_dir) if r.pop("step") != 2]
    assert resumed[2]["reward/mean"] == rows[2]["reward/mean"]


@ALL_ZERO
def test_history_before_and_after_it_is_full(remembered):
    """The mean over four places; the newest rollouts fill the empty ones."""
    rows, seen, _ = remembered
    redone = Redone(seen.runs[0])
    for step, update in enumerate(seen.updates):
        places = [
            seen.updates[step - i if step >= i else step].batch.rollouts
            for i in range(4)
        ]
        parts = [
            redone.gradient(
                update.before.params,
                rollouts,
                behaviour_logprobs=rollouts.behaviour_logprobs,
            )
            for rollouts in places
        ]
        mean = jax.tree.map(lambda *x: sum(x) / 4, *parts)
        assert rows[step + 1]["gradient/norm"] == pytest.approx(norm(mean), rel=1e-4)
        valid = [True] * min(3, step + 1) + [False] * max(0, 2 - step)
        assert update.after.history.valid.tolist() == valid
    assert rows[1]["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert rows[6]["ratio/deviation"] > 0


@ALL_ZERO
def test_history_compiles_nothing_later(remembered):
    assert_nothing_compiled_after_step_1(remembered[0])


@ALL_ZERO
def test_mismatch_is_measured_with_a_history(remembered):
    assert max(row["mismatch/max_abs"] for row in remembered[0][1:]) > 0
    for row in remembered[0][1:]:
        assert 0 <= row["mismatch/mean_abs"] <= row["mismatch/max_abs"]


# ---- disjoint subsets of prompts


@pytest.mark.parametrize(
    ("name", "updates"),
    [
        pytest.param("tic_grpo", 2, marks=pytest.mark.slow),
        pytest.param("tic_grpo", 4, marks=pytest.mark.slow),
        pytest.param("grpo_no_is", 2, marks=pytest.mark.slow),
        pytest.param("grpo_no_is", 4, marks=pytest.mark.slow),
    ],
)
def test_each_update_has_its_own_prompts(tmp_path, name, updates):
    """Parameters after K updates, recomputed one by one with the public loss: without a
    ratio every gradient is taken at the parameters that sampled."""
    optimizer = OptimizerConfig(learning_rate=1e-2)
    config = tiny(
        tmp_path / "run",
        name,
        updates_per_rollout=updates,
        optimizer=optimizer,
        steps=3,
    )
    rows, seen, _ = run(config)
    redone, size = Redone(seen.runs[0]), P // updates
    for row, update in zip(rows[1:], seen.updates, strict=True):
        start = params = update.before.params
        opt_state, batch = update.before.opt_state, update.batch
        old = redone.logprobs(start, batch.rollouts)
        for i in range(updates):
            part = slice(i * size, (i + 1) * size)
            rollouts = jax.tree.map(lambda x, part=part: x[part], batch.rollouts)
            without_ratio = name == "grpo_no_is"
            behaviour = {} if without_ratio else {"behaviour_logprobs": old[part]}
            at = start if without_ratio else params
            grads = redone.gradient(at, rollouts, **behaviour)
            changes, opt_state = jax.device_get(
                redone.changes(grads, opt_state, params)
            )
            params = jax.tree.map(np.add, params, changes)
        moved = jax.tree.map(lambda a, b: a - b, params, start)
        wrong = jax.tree.map(lambda a, b: a - b, params, update.after.params)
        assert norm(wrong) < 1e-3 * norm(moved)
        assert row["update/applied"] == updates * row["step"]
        if without_ratio:
            assert row["ratio/mean"] == pytest.approx(1, abs=1e-6)
            assert row["ratio/deviation"] == 0
        else:
            assert row["ratio/deviation"] > 1e-3
    assert_nothing_compiled_after_step_1(rows)


# ---- early stop


@pytest.mark.slow
def test_espo_stops_early_and_resumes(tmp_path):
    shared = dict(
        updates_per_rollout=6,
        optimizer=OptimizerConfig(learning_rate=3e-2),
        evaluation=EvaluationConfig(every=2, prompts=4),
    )
    rows, seen, result = run(tiny(tmp_path / "whole", "espo", steps=4, **shared))
    stopped = [row["update/stopped"] for row in rows[1:]]
    applied = np.diff([0] + [row["update/applied"] for row in rows[1:]])
    assert stopped[0] == 1 and set(applied[np.array(stopped) == 1]) <= set(range(1, 6))
    for row in rows[1:]:
        assert (row["ratio/deviation"] > 0.25) == row["update/stopped"]
        assert row["update/skipped"] == 0
        assert not row["update/stopped"] or row["update/norm"] == 0
    assert_nothing_compiled_after_step_1(rows)
    run(tiny(tmp_path / "parts", "espo", steps=2, **shared))
    config = tiny(tmp_path / "parts", "espo", steps=4, resume=True, **shared)
    _, rest, other = run(config)
    chex.assert_trees_all_equal(rest.updates[-1].after, seen.updates[-1].after)
    assert numbers(other.run_dir) == numbers(result.run_dir)


# ---- token weights


@pytest.mark.slow
def test_gtpos_entropy_filter_goes_where_the_start_is_above_it(tmp_path, capsys):
    rows, seen, _ = run(tiny(tmp_path / "high", "gtpo", steps=2))
    output = capsys.readouterr().out
    assert "mean entropy at the start is" in output and "limit of 0.693" in output
    assert seen.runs[0].parts.learner.settings.objective.entropy_limit is None
    assert rows[1]["entropy/mean"] > math.log(2) and rows[1]["gradient/norm"] > 0
    again = tiny(tmp_path / "high", "gtpo", steps=3, resume=True)
    assert run(again)[1].runs[0].parts.learner.settings.objective.entropy_limit is None

    capsys.readouterr()
    rows, seen, _ = run(tiny(tmp_path / "low", "gtpo", steps=3, temperature=0.05))
    assert "mean entropy at the start" not in capsys.readouterr().out
    assert seen.runs[0].parts.learner.settings.objective.entropy_limit == pytest.approx(
        math.log(2)
    )
    assert rows[1]["entropy/mean"] < math.log(2)
    assert_nothing_compiled_after_step_1(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nthr", "gtpo"])
def test_token_weights_change_the_gradient(tmp_path, name):
    changes = {} if name == "gtpo" else {"kl_coef": 0.0}
    if name == "gtpo":
        changes["entropy_coef"] = 0.0
    rows, seen, _ = run(tiny(tmp_path / "run", ObjectiveConfig(name=name, **changes)))
    first, damped = seen.runs[0], 0
    plain = dataclasses.replace(
        first.parts.learner.settings.objective, token_weight="none"
    )
    redone = Redone(first, plain)
    for update in seen.updates:
        rollouts, weights = update.batch.rollouts, update.batch.token_weights
        sampled = rollouts.completion_mask > 0
        centred = rollouts.rewards - rollouts.rewards.mean(1, keepdims=True)
        if name == "nthr":
            assert set(np.unique(weights[sampled])) <= {0.0, 1.0}
            assert (weights[(centred >= 0)[..., None] & sampled] == 1).all()
        else:
            assert set(np.unique(weights[sampled])) <= {0.0, 1.0, 2.0, 4.0}
        arrays = (update.before.params, rollouts)
        with_them = redone.gradient(*arrays, token_weights=weights)
        without = redone.gradient(*arrays)
        expected = norm(with_them)
        assert update.metrics["gradient/norm"] == pytest.approx(expected, rel=1e-4)
        damped += norm(jax.tree.map(np.subtract, with_them, without)) > 1e-3 * expected
    assert damped
    assert_nothing_compiled_after_step_1(rows)


# ---- prompt weights


def expected_weights(name, update):
    """Weights by hand, for rewards 0 and 1; None for rules that unit tests cover."""
    rewards = update.batch.rollouts.rewards
    std = rewards.std(1)
    inside = std > 0
    mean = (rewards.sum(1) + 0.5) / (G + 1)
    safe = np.where(inside, std, 1)
    return {
        "unit": np.ones(P),
        "std": np.where(inside, 1 / (safe + 1e-6), 0),
        "batch_std": np.full(P, 1 / (rewards.std() + 1e-6)),
        "group_mean": np.where(inside, 1 / np.where(inside, rewards.mean(1), 1), 0),
        "shrunk": np.where(inside, (mean * (1 - mean)) ** -0.5, 0),
    }.get(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_rule_of_weights_trains(tmp_path, name):
    weights = WeightsConfig(name=name)
    config = tiny(tmp_path / "run", "dr_grpo", weights=weights, steps=2)
    rows, seen, _ = run(config, digits_task(starts_with_a_digit))
    for row, update in zip(rows[1:], seen.updates, strict=True):
        assert row["weights/max"] > 0 and row["gradient/norm"] > 0
        expected = expected_weights(name, update)
        if expected is not None:
            np.testing.assert_allclose(update.batch.weights, expected, rtol=1e-4)


@pytest.mark.slow
def test_shrunk_weights_are_saved(tmp_path, capsys):
    weights = WeightsConfig(name="shrunk")
    run(tiny(tmp_path / "run", "dr_grpo", weights=weights, steps=1))
    assert "failed" not in capsys.readouterr().out


@pytest.mark.slow
def test_posterior_counts_are_kept_over_visits_and_in_the_checkpoint(tmp_path):
    """Four trained prompts and four a step: every prompt is visited at every step."""
    task = digits_task(starts_with_a_digit)
    task = dataclasses.replace(task, train=task.train[:P])
    weights = WeightsConfig(name="posterior", discount=0.5, prior=1.0)

    def start(directory, **more):
        return run(tiny(tmp_path / directory, "dr_grpo", weights=weights, **more), task)

    _, seen, _ = start("whole", steps=4)
    place = {example.prompt: i for i, example in enumerate(task.train)}
    wins, losses = np.zeros(P), np.zeros(P)
    for step, update in enumerate(seen.updates):
        order = seen.runs[0].parts.collector.prompts_of(step)
        rewards = update.batch.rollouts.rewards
        wins[order] = 0.5 * wins[order] + rewards.sum(1)
        losses[order] = 0.5 * losses[order] + (1 - rewards).sum(1)
        state = update.after.weights_state
        np.testing.assert_allclose(state.successes, wins, rtol=1e-6)
        np.testing.assert_allclose(state.failures, losses, rtol=1e-6)
        mean = ((wins + 1) / (wins + losses + 2))[order]
        expected = np.where(rewards.std(1) > 0, (mean * (1 - mean)) ** -0.5, 0)
        np.testing.assert_allclose(update.batch.weights, expected, rtol=1e-5)
    assert len(place) == P
    start("parts", steps=2)
    _, rest, _ = start("parts", steps=4, resume=True)
    np.testing.assert_array_equal(
        rest.updates[0].before.weights_state.successes,
        seen.updates[2].before.weights_state.successes,
    )
    chex.assert_trees_all_equal(rest.updates[-1].after, seen.updates[-1].after)


@pytest.mark.slow
def test_power_goes_from_its_start_to_its_end_over_the_run(tmp_path):
    weights = WeightsConfig(name="std", power=2.0, power_end=0.0, eps=0.1)
    config = tiny(tmp_path / "run", "dr_grpo", weights=weights, steps=5)
    rows, seen, _ = run(config, digits_task(starts_with_a_digit))
    powers = (2.0, 1.5, 1.0, 0.5, 0.0)
    for power, update in zip(powers, seen.updates, strict=True):
        std = update.batch.rollouts.rewards.std(1)
        expected = np.where(std > 0, (std + 0.1) ** -power, 0)
        np.testing.assert_allclose(update.batch.weights, expected, rtol=1e-5)
    assert_nothing_compiled_after_step_1(rows)


@pytest.mark.slow
def test_a_power_schedule_keeps_its_length_on_resume(tmp_path):
    weights = WeightsConfig(name="std", power_end=0.0)
    run(tiny(tmp_path / "run", "dr_grpo", weights=weights, steps=1))
    again = tiny(tmp_path / "run", "dr_grpo", weights=weights, steps=2, resume=True)
    with pytest.raises(ConfigError, match="steps: 1 -> 2"):
        gj.train(again, task=digits_task())


REFUSED = {
    "--weights unit --weights.power 1": "weights.power changes nothing in weights unit "
    "(its settings: none)",
    "--weights.power 2": "weights.power changes nothing in weights objective",
    "--weights std --weights.prior 1": "weights.prior changes nothing in weights std "
    "(its settings: power, power_end, eps, ddof)",
    "--weights beta --weights.eps 1": "weights.eps changes nothing in weights beta",
    "--weights shrunk --weights.discount 0.5": "weights.discount changes nothing",
    "--weights posterior --weights.discount 2": "weights.discount must be in [0, 1]",
    "--weights posterior --weights.prior 0": "weights.prior must be positive",
    "--weights finite_group --weights.group-size 1": "group_size must be at least 2",
    "--weights std --objective.scale none": "objective.scale changes nothing where",
    "--objective.overlong-share 0.5": "objective.overlong_share changes nothing",
    "--sampling.refine-template {draft}{prompt}": "grpo has no drafts",
    "--objective igrpo --sampling.refine-template {prompt}": "must hold {prompt} and",
    "--objective igrpo --objective.drafts -1": "drafts must not be negative, got -1",
    "--objective.stop-deviation 0.1": "with one update per rollout",
    "--objective rt_pg --objective.kl-coef 0.1": "does not go with history 4",
    "--objective rt_pg --objective.history 0": "history must be at least 1, got 0",
    "--objective tic_grpo --updates-per-rollout 3": "must divide sampling.prompts for",
    "--objective gtpo --updates-per-rollout 2": "has no importance ratio",
    "--objective dapo --task.train-prompts 20": "needs at least 32 trained prompts",
    "--objective.tis-cap 0.5": "tis_cap must be at least 1 or None, got 0.5",
    "--instrument.counterfactual-every -1": "counterfactual_every must be at least 0",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_changes_nothing_or_cannot_be_is_refused(capsys, tmp_path, flags):
    directory = tmp_path / "run"
    code, text = answer(capsys, "train", "--run-dir", str(directory), *flags.split())
    assert code == 2 and REFUSED[flags] in text
    assert "Traceback" not in text and not directory.exists()


def test_unknown_weights_are_named_with_the_nearest(capsys):
    code, text = answer(capsys, "train", "--weights", "stdd")
    assert code == 2 and "unknown weights 'stdd'; did you mean 'std'?" in text


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("grpo", {"weights": WeightsConfig(name="std", ddof=G)}),
        (ObjectiveConfig(name="rt_pg", tis_cap=2.0), {}),
        (ObjectiveConfig(name="rt_pg", disjoint=True), {"updates_per_rollout": 2}),
        (ObjectiveConfig(name="grpo", disjoint=True), {}),
        (ObjectiveConfig(name="reinforce", ratio="token"), {"updates_per_rollout": 2}),
    ],
    ids=[
        "ddof",
        "tis-with-history",
        "disjoint-history",
        "disjoint-of-one",
        "logp-twice",
    ],
)
def test_more_that_should_be_refused_before_anything_starts(tmp_path, objective, more):
    with pytest.raises(ConfigError):
        plan.make_plan(tiny(tmp_path / "run", objective, **more), digits_task())


# ---- the counterfactual step

KEYS = {
    "step", "weightings", "group_mean", "norm_ratio", "cosines", "update_norm",
    "update_cosines", "slope", "curvature", "predicted_change",
}  # fmt: skip


def digits_but(example, completion):
    """The first prompt's rewards are missing, the second's all alike."""
    if digits_but.prompts.setdefault(example.prompt, len(digits_but.prompts)) == 0:
        return math.nan
    if digits_but.prompts[example.prompt] == 1:
        return 0.25
    return starts_with_a_digit(example, completion)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compared")
    task = digits_task(digits_but)
    task = dataclasses.replace(task, train=task.train[:P])
    digits_but.prompts = {e.prompt: i for i, e in enumerate(task.train)}

    def start(name, **more):
        looks = InstrumentConfig(every=0, counterfactual_every=2)
        objective = ObjectiveConfig(name="grpo", kl_coef=0.0)
        return run(tiny(directory / name, objective, instrument=looks, **more), task)

    straight = start("straight", steps=6)
    start("parts", steps=3)
    return straight, start("parts", steps=6, resume=True)


@pytest.mark.slow
def test_counterfactual_rows(compared):
    (rows, seen, result), (_, _, resumed) = compared
    lines = read_lines(result.run_dir / "counterfactual.jsonl")
    assert [row["step"] for row in lines] == [2, 4, 6]
    assert all(set(row) == KEYS for row in lines)
    assert read_lines(resumed.run_dir / "counterfactual.jsonl") == lines
    names = ["this run", "reinforce", "std", "shrunk", "1/std^2"]
    for row in lines:
        assert row["weightings"] == names and row["norm_ratio"][1] == 1
        update = seen.updates[row["step"] - 1]
        length = rows[row["step"]]["update/norm"]
        assert row["update_norm"][0] == pytest.approx(length, rel=1e-4)
        order = list(seen.runs[0].parts.collector.prompts_of(row["step"] - 1))
        for index, mean in ((0, None), (1, 0.25)):
            assert row["group_mean"][order.index(index)] == mean
            slopes = [row["slope"][k][order.index(index)] for k in range(5)]
            assert slopes == [0] * 5
        assert np.isnan(update.batch.rollouts.rewards[order.index(0)]).all()


@pytest.mark.slow
def test_counterfactual_compiles_nothing_later(compared):
    (rows, _, _), _ = compared
    assert_nothing_compiled_after_step_1(rows)


@pytest.mark.slow
def test_counterfactual_row_recomputed(compared):
    """Gradients by the public loss; slopes and curvatures by differences of log-probs
    along the optimizer's updates."""
    (rows, seen, result), _ = compared
    row, first, update = (
        read_lines(result.run_dir / "counterfactual.jsonl")[0],
        seen.runs[0],
        seen.updates[1],
    )
    rollouts, params = update.batch.rollouts, update.before.params
    present = np.isfinite(rollouts.rewards)
    rewards = np.where(present, rollouts.rewards, 0)
    count = np.maximum(present.sum(1), 1)
    mean = rewards.sum(1) / count
    centred = np.where(present, rewards - mean[:, None], 0)
    std = np.sqrt((centred**2).sum(1) / count)
    posterior = (rewards.sum(1) + 0.5) / (present.sum(1) + 1)
    inside, safe = std > 0, np.where(std > 0, std, 1)
    weights = [
        np.where(inside, 1 / (safe + 1e-6), 0),
        np.ones(P),
        np.where(inside, 1 / (safe + 1e-6), 0),
        np.where(inside, (posterior * (1 - posterior)) ** -0.5, 0),
        np.where(inside, (safe + 1e-6) ** -2, 0),
    ]
    grads, changes, predicted = [], [], []
    redone = Redone(first)

    def logprobs(params):
        return np.asarray(redone.logprobs(params, rollouts).sum(-1), float)

    current = logprobs(params)
    for w in weights:
        advantages = (centred * w[:, None]).astype(np.float32)
        grads.append(redone.gradient(params, rollouts, advantages=advantages))
        change, _ = redone.changes(grads[-1], update.before.opt_state, params)
        changes.append(change)
        sides = [
            logprobs(jax.tree.map(lambda x, d, h=h: x + h * d, params, change))
            for h in (-2.0, 2.0)
        ]
        slope = (sides[1] - sides[0]) / 4
        second = (sides[1] - 2 * current + sides[0]) / 4 + slope**2
        loo = centred * (count / np.maximum(count - 1, 1))[:, None]
        predicted.append((loo * (slope + second / 2)).sum(1) / count)

    def table(trees):
        flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in trees]
        norms = np.array([np.linalg.norm(x) for x in flat])
        return norms, np.array([[a @ b for b in flat] for a in flat]) / np.outer(
            norms, norms
        )

    norms, cosines = table(grads)
    np.testing.assert_allclose(row["norm_ratio"], norms / norms[1], rtol=1e-3)
    np.testing.assert_allclose(row["cosines"], cosines, atol=1e-3)
    norms, cosines = table(changes)
    np.testing.assert_allclose(row["update_norm"], norms, rtol=1e-3)
    np.testing.assert_allclose(row["update_cosines"], cosines, atol=1e-3)
    scale = np.abs(predicted).max()
    np.testing.assert_allclose(row["predicted_change"], predicted, atol=0.02 * scale)
    assert row["update_norm"][0] == pytest.approx(rows[2]["update/norm"], rel=1e-4)


@pytest.mark.slow
def test_counterfactual_panel_is_in_the_report(compared):
    (_, _, result), _ = compared
    page = (result.run_dir / "report.html").read_text()
    assert "Other weightings" in page and "What other weightings would have" in page
    for name in ("this run", "reinforce", "shrunk", "1/std^2"):
        assert f"<td>{name}</td>" in page


@pytest.mark.slow
def test_counterfactual_of_non_finite_gradients_hides_no_error(tmp_path):
    def reward(example, completion):
        return 3e38 if len(completion) % 2 else -3e38

    looks = InstrumentConfig(every=0, counterfactual_every=1)
    config = tiny(tmp_path / "run", "reinforce", instrument=looks, steps=9)
    with pytest.raises(NonFiniteGradientsError):
        gj.train(config, task=digits_task(reward))


# ---- the table of methods


def test_objectives_prints_every_method(capsys):
    assert main(["objectives"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == list(gj.OBJECTIVES)
    for block in blocks:
        name, *lines = block.splitlines()
        row, said = gj.OBJECTIVES[name], dict(line.split(None, 1) for line in lines)
        assert said["loss"] == row.formula() and said["source"] == row.source
        for axis in ("baseline", "scale", "ratio", "surrogate", "aggregation"):
            assert f"{axis} {getattr(row, axis)}" in said["axes"]
        assert said.get("and", "") == "; ".join(row.mechanisms())
    assert main(["objectives", "igrpo", "grpo"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["igrpo", "grpo"]


def test_objectives_suggests_a_name(capsys):
    code, text = answer(capsys, "objectives", "grpo", "tic_grp")
    assert code == 2 and "unknown objective 'tic_grp'; did you mean 'tic_grpo'?" in text
