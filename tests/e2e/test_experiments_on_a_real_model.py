"""The experiments that ask the paper's questions of a real model, in smoke form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    real_curvature,
    real_gradients,
    real_normalisation,
    real_orthogonality,
    real_phases,
    real_probes,
    real_runs,
)
from grpo_jax.diagnostics.sketch import gradient_hash
from grpo_jax.models.policy import add_lora
from grpo_jax.rollouts.logprobs import completion_logprobs
from grpo_jax.runs.snapshots import saved_steps
from tests.e2e.experiments import check_config, check_plot, rows_of

pytestmark = pytest.mark.slow


def run(script, directory, **settings):
    """Runs the script's smoke form; all single prompts' files in one directory."""
    output = directory / script.__name__.rpartition(".")[2]
    kept = directory / "prompts"
    script.main(script.Config(smoke=True, output=output, runs=kept, **settings))
    return output


def test_real_orthogonality(tmp_path, capsys):
    output = run(real_orthogonality, tmp_path)
    check_config(output)
    check_plot(output)
    rows = rows_of(output, "cosines")
    # Two draws of 32 samples of the same prompts, and both together.
    assert [(r["params"], r["group_size"], r["draws"]) for r in rows] == [
        (params, 32 * len(draws), draws)
        for params in ("lora", "full")
        for draws in ([0], [1], [0, 1])
    ]
    for *halves, whole in (rows[:3], rows[3:]):
        rates = np.mean([half["rate"] for half in halves], 0)
        np.testing.assert_allclose(rates, whole["rate"], rtol=1e-3)
    [hashed] = rows_of(output, "hash")
    np.testing.assert_allclose(hashed["hashed"]["16384"], hashed["exact"], atol=1e-4)
    [probes] = rows_of(output, "probes")
    assert all(1 / 8 <= probe["rate"] <= 7 / 8 for probe in probes["probes"])
    # The same rows again: nothing is measured twice.
    before, _ = (output / "metrics.jsonl").read_text(), capsys.readouterr()
    run(real_orthogonality, tmp_path)
    assert (output / "metrics.jsonl").read_text() == before
    said = capsys.readouterr().out
    assert "prompt 0:" not in said and "| start | full | 64 | one skill |" in said


def test_real_curvature(tmp_path):
    output = run(real_curvature, tmp_path)
    check_config(output)
    check_plot(output)
    [row] = rows_of(output, "curvature")
    assert len(row["curvature"]) == len(row["fisher"]) == len(row["other"]) == 10
    assert all(x > 0 for x in row["fisher"]) and set(row["halves"]) <= {0, 1, 2}
    series = real_curvature.load([row], "lora")
    rng = np.random.default_rng(0)
    [[x]] = series.values()
    # Curvature sigma^2 itself: correlated by 1, and by 1 when shuffled; not permuted.
    itself = [x | {"curvature": x["own"]}]
    found = {
        which: real_curvature.figure(itself, "curvature", "own", which, "pearson", rng)
        for which in ("same", "shuffled", "permuted")
    }
    assert found["same"] == pytest.approx(1) and found["shuffled"] == pytest.approx(1)
    assert found["permuted"] < 0.999


SMALL = dict(group_sizes=(8,), rules=("none", "std"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(settings of both scripts, output of real_normalisation) of runs with G = 8."""
    directory = tmp_path_factory.mktemp("runs")
    output = directory / "normalisation"
    settings = dict(
        smoke=True, runs=directory / "kept", rows=output / "metrics.jsonl"
    )  # fmt: skip
    config = real_normalisation.Config(output=output, **SMALL, **settings)
    real_normalisation.main(config)
    return settings, output


def test_real_normalisation(trained, capsys):
    settings, output = trained
    check_config(output)
    check_plot(output)
    assert [row["draw"] for row in rows_of(output, "start")] == [0, 1]
    tuning, runs = rows_of(output, "tuning"), rows_of(output, "run")
    assert [(row["rule"], row["rate"]) for row in tuning] == [
        (rule, rate) for rule in SMALL["rules"] for rate in (0.1, 0.3)
    ]
    for row in runs:  # at the rate whose later steps have the larger reward
        of_rule = [x for x in tuning if x["rule"] == row["rule"]]
        best = max(of_rule, key=lambda x: np.mean(x["rewards"][2:]))
        assert row["rate"] == best["rate"]
        assert len(row["rewards"]) == 4
        assert len(row["train"]) == len(row["heldout"]) == 8
        name = real_runs.run_name(row["rule"], row["rate"], 8, row["seed"])
        assert saved_steps(settings["runs"] / name) == [0, 2, 4]
    # The first step's samples are of the same policy; what follows is not.
    first = {(row["seed"], row["rewards"][0]) for row in runs}
    assert len(first) == 2
    after = {
        rule: [row["train"] + row["heldout"] for row in runs if row["rule"] == rule]
        for rule in SMALL["rules"]
    }
    assert after["none"] != after["std"]
    before, _ = (output / "metrics.jsonl").read_text(), capsys.readouterr()
    config = real_normalisation.Config(output=output, **SMALL, **settings)
    real_normalisation.main(config)
    assert (output / "metrics.jsonl").read_text() == before  # nothing is trained twice
    said = capsys.readouterr().out
    assert "training:" not in said and "| 8 | std | 2 |" in said


def test_differences_are_paired_by_seed(trained):
    settings, output = trained
    config = real_normalisation.Config(output=output, **SMALL, **settings)
    s = real_runs.setting_of(real_runs.sized(config))
    rates = {
        (row["rule"], row["seed"]): np.mean(row["heldout"])
        for row in rows_of(output, "run")
    }
    x, base = real_normalisation.pairs(s)[8, "std"]["heldout all"]
    expected = [rates["std", seed] - rates["none", seed] for seed in (0, 1)]
    np.testing.assert_allclose(x - base, expected, atol=1e-6)
    # A single seed has no interval, three that agree have one.
    sentence = real_normalisation.sentence
    assert sentence(8, "std", "train hard", x[:1], base[:1]).endswith(
        "no interval yet."
    )
    some = np.array([0.3, 0.31, 0.32])
    said = sentence(8, "std", "train hard", some, 0 * some)
    assert said.endswith("is +0.310 ± 0.025: more.") and "trained, hard third" in said
    said = sentence(8, "std", "train all", some - 0.31, 0 * some)
    assert said.endswith("cannot be told from 0.")


def test_thirds_are_of_the_prompts_order():
    masks = real_runs.thirds(np.array([0.5, 0.0, 1.0, 0.25, 0.5, 0.75, 0.1]))
    assert np.flatnonzero(masks["hard"]).tolist() == [1, 6]
    assert np.flatnonzero(masks["easy"]).tolist() == [2, 5]
    assert masks["all"].all()


def test_real_phases(trained, tmp_path):
    settings, _ = trained
    output = tmp_path / "phases"
    config = real_phases.Config(output=output, **settings)
    real_phases.main(config)
    check_config(output)
    check_plot(output)
    looks = rows_of(output, "looks")
    for row in looks:
        assert [look["step"] for look in row["looks"]] == [0, 2, 4]
        assert all(len(look["group_mean"]) == 4 for look in row["looks"])
    assert [row["seed"] for row in rows_of(output, "verdict")] == [0, 1]
    table = (output / "table.md").read_text()
    # Measuring changes nothing in the run.
    assert table.count("with the instrument differ by 0 at most") == 2
    assert "Found, std less none:" in table
    before = (output / "metrics.jsonl").read_text()
    real_phases.main(config)
    assert (output / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("mean", "std", "small", "expected"),
    [
        ([-0.02, 0.02], [0.0, 0.05], [0.95, 1.0], "more"),
        ([0.5, 0.7], [0.05, 0.2], [0.0, 0.1], "no difference"),
        ([-0.1, 0.1], [0.3, 0.4], [0.0, 0.3], "more on hard prompts"),
        ([-0.5, 0.9], [0.0, 0.6], [0.0, 0.96], "nothing"),
    ],
)
def test_what_a_first_measurement_makes_expect(mean, std, small, expected):
    intervals = {"mean_cosine": mean, "std_cosine": std, "small_fraction": small}
    first = {"phase": {f"{name}_interval": x for name, x in intervals.items()}}
    assert real_phases.expectation(first, 0.9) == expected
    if expected == "more":  # C may be above 1
        assert real_phases.expectation(first, 1.1) == "nothing"


@pytest.fixture(scope="module")
def probed():
    """(policy with factors, one prompt's group of 16 with rewards)."""
    task = real_probes.smoke_task()
    policy = add_lora(
        real_probes.smoke_policy(task), rank=2, alpha=4.0, key=jax.random.key(1)
    )
    groups = real_probes.sample_scored(
        policy, task, task.train[:3], 16, 3, jax.random.key(0), 4
    )
    rewards = np.arange(16) % 3 == 0
    groups = groups._replace(rewards=np.tile(rewards, (3, 1)).astype(np.float32))
    return policy, jax.tree.map(lambda x: jnp.asarray(x[1]), groups)


def test_gradients_of_parts_add_up_to_the_groups(probed):
    policy, group = probed
    width = 2**14  # all coordinates
    vectors = real_gradients.part_vectors(policy, group, width=width)

    def total(params):  # leave-one-out baselines within parts of 8
        rollouts = jax.tree.map(lambda x: x[None], group)
        logprobs = completion_logprobs(policy.replace(params), rollouts)[0].sum(-1)
        r = group.rewards.reshape(2, 8)
        advantages = (r - (r.sum(1, keepdims=True) - r) / 7).ravel() / 8
        return (advantages * logprobs).sum()

    expected = gradient_hash(jax.grad(total)(policy.params), jax.random.key(0), width)
    np.testing.assert_allclose(vectors.sum(0), expected, rtol=1e-3, atol=1e-6)


def test_a_prompt_of_its_own_length_has_the_features_of_a_padded_one(probed):
    policy, group = probed
    question = real_gradients.mean_question(policy, group)
    padded = group._replace(
        prompts=jnp.pad(group.prompts, (3, 0)),
        prompt_mask=jnp.pad(group.prompt_mask, (3, 0)),
    )
    np.testing.assert_allclose(
        question, real_gradients.mean_question(policy, padded), rtol=1e-4, atol=1e-5
    )


def test_full_and_new_factors_are_the_same_function(probed):
    policy, group = probed
    full = real_gradients.as_kind(policy, "full", rank=2)
    again = real_gradients.as_kind(full, "lora", rank=3)
    assert full.frozen is None and again.config.lora_rank == 3
    rollouts = jax.tree.map(lambda x: x[None], group)
    for other in (full, again):
        np.testing.assert_allclose(
            completion_logprobs(other, rollouts),
            completion_logprobs(policy, rollouts),
            atol=1e-5,
        )


def test_vectors_are_those_of_the_instrument(probed):
    policy, group = probed
    twice = group._replace(
        **{
            name: jnp.concatenate([getattr(group, name)] * 2)
            for name in ("completions", "completion_mask", "rewards")
        }
    )  # 32 samples: four parts of 8 in both
    found = real_gradients.part_vectors(policy, twice, width=64)
    other = real_gradients.curvature_figures(policy, twice, width=64)["vectors"]
    np.testing.assert_allclose(found, other, rtol=1e-3, atol=1e-6)
