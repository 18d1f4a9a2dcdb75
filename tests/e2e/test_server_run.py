"""Runs whose sampler is a server, which has this library's numbers."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.cli import main
from grpo_jax.runs.lines import read_lines
from grpo_jax.training.saving import SamplerFailedError
from tests.completion_server import CompletionServer

from .test_train import digits_task, small_config

SHOWN_URL = "http://127.0.0.1:30000"
GUIDE = Path(__file__).parents[2] / "docs" / "rollouts.md"


def sampler_of(server, directory, **changes):
    changes = dict(retries=0, retry_wait_s=0.01) | changes
    return gj.ServerSampler(
        server.url, "policy", save=directory, reload=server.load, **changes
    )


def run_with(server, directory, **changes):
    changes = dict(evaluation=gj.EvaluationConfig(every=0, prompts=2)) | changes
    return gj.train(
        small_config(directory / "run", **changes),
        task=digits_task(),
        sampler=sampler_of(server, directory / "served"),
    )


def test_a_run_has_the_trainers_log_probs_and_hands_each_policy_over(tmp_path, capsys):
    with CompletionServer() as server:
        run = run_with(server, tmp_path, steps=3)
        # The start and the policy after each step: evaluations need no more.
        assert len(server.loaded) == 4
    assert run.history["mismatch/max_abs"][1:].max() < 1e-5
    mean, largest = (run.history[f"mismatch/{x}"][1:] for x in ("mean_abs", "max_abs"))
    assert (mean > 0).all() and (mean <= largest).all()
    assert "the sampler's log-probs differ" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_through_a_server_gets_better(tmp_path):
    with CompletionServer() as server:
        run = run_with(
            server, tmp_path, steps=30,
            optimizer=gj.OptimizerConfig(learning_rate=3e-2),
        )  # fmt: skip
    rewards = run.history["reward/mean"][1:]
    assert rewards[-5:].mean() > rewards[:5].mean() + 0.2
    assert run.history["mismatch/max_abs"][1:].max() < 1e-4


def shifted_by(nats):
    """A server whose log-probs are lower by so much."""

    def spoil(body, answer):
        (choice,) = answer["choices"]
        values = [x - nats for x in choice["logprobs"]["token_logprobs"]]
        return answer | {"choices": [choice | {"logprobs": {"token_logprobs": values}}]}

    return spoil


def test_a_mismatch_is_told_once(tmp_path, capsys):
    with CompletionServer(spoil=shifted_by(0.2)) as server:
        run = run_with(server, tmp_path, steps=2)
    np.testing.assert_allclose(run.history["mismatch/mean_abs"][1:], 0.2, atol=1e-4)
    (told,) = capsys.readouterr().out.split("the sampler's log-probs differ")[1:]
    line = told.split("\n")[0]
    assert line.startswith(" from the trainer's by 0.2 nats a token on average, 0.2 at")
    assert "--objective.tis-cap" in line


@pytest.mark.slow
def test_tis_cap_weighs_a_servers_tokens(tmp_path):
    """Log-probs lower by ln 1.5: each token weighs 1.5, and so does the gradient."""
    norms = {}
    for cap in (None, 2.0, 1.2):
        with CompletionServer(spoil=shifted_by(np.log(1.5))) as server:
            run = run_with(
                server, tmp_path / str(cap), steps=1,
                objective=gj.ObjectiveConfig(name="dr_grpo", tis_cap=cap),
            )  # fmt: skip
        norms[cap] = run.history["gradient/norm"][1]
    assert norms[2.0] / norms[None] == pytest.approx(1.5, rel=1e-4)
    assert norms[1.2] / norms[None] == pytest.approx(1.2, rel=1e-4)


@pytest.mark.parametrize(
    "steps_made",
    [
        pytest.param(0, id="at_the_start", marks=pytest.mark.slow),
        pytest.param(2, id="in_a_step"),
        pytest.param(3, id="in_an_evaluation", marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_server_dies_keeps_what_it_has(tmp_path, steps_made):
    """It dies with the policy after so many steps, of which the third is evaluated."""
    evaluation = gj.EvaluationConfig(every=3, prompts=2)
    message = rf"stopped at step {steps_made}, .*Mend the sampler, then continue with"
    with CompletionServer() as server:
        server.spoil = lambda body, answer: (
            500 if len(server.loaded) > steps_made else answer
        )
        with pytest.raises(SamplerFailedError, match=message) as caught:
            run_with(server, tmp_path, steps=4, evaluation=evaluation)
        assert "HTTP 500" in str(caught.value) and "prompt " in str(caught.value)
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(steps_made + bool(steps_made)))

    with CompletionServer() as server:  # another port: that is no change of the run
        config = gj.TrainConfig(run_dir=str(tmp_path / "run"), resume=True)
        resumed = gj.train(
            config, task=digits_task(), sampler=sampler_of(server, tmp_path / "served")
        )
    with CompletionServer() as server:
        whole = run_with(server, tmp_path / "whole", steps=4, evaluation=evaluation)
    assert resumed.finished
    for name in ("reward/mean", "gradient/norm", "eval/heldout_pass_rate"):
        np.testing.assert_array_equal(resumed.history[name], whole.history[name])


def test_a_sampler_is_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    """With the module that the guide shows, at another address."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"<!-- server -->\n```python\n(.*?)```", GUIDE.read_text(), re.S
    )
    (module,) = blocks
    assert SHOWN_URL in module
    with CompletionServer() as server:
        (tmp_path / "my_server.py").write_text(module.replace(SHOWN_URL, server.url))
        arguments = (
            "train --task chains --run-dir run --steps 2 --sampling.prompts 2 "
            "--sampling.group-size 2 --sampling.sampler my_server:sampler "
            "--model.width 16 --model.mlp-width 24 --model.head-dim 4 "
            "--warm-start.no-enabled --instrument.every 0 --evaluation.every 0 "
            "--evaluation.prompts 2"
        )
        assert main(arguments.split()) == 0
        assert server.loaded == [tmp_path / "served"] * 3
        server.spoil = lambda body, answer: b"{}"
        again = arguments.replace("--run-dir run", "--run-dir again").split()
        assert main(again) == 1
    assert "the answer has no list of choices: {}" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["config"]["sampling"]["sampler"] == "my_server:sampler"
    monkeypatch.delitem(sys.modules, "my_server")
