"""The experiments that ask the paper's questions of a real model, in smoke form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import real_curvature, real_gradients, real_orthogonality, real_probes
from grpo_jax.diagnostics.sketch import gradient_hash
from grpo_jax.models.policy import add_lora
from grpo_jax.rollouts.logprobs import completion_logprobs
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
