"""The jobs a new user runs first, to their ends: the README's figures hold."""

from pathlib import Path

import pytest

import grpo_jax as gj
from grpo_jax.runs.config import TaskConfig
from grpo_jax.runs.lines import read_lines

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
pytestmark = pytest.mark.slow


def first_and_last(result):
    rows = read_lines(result.run_dir / "metrics.jsonl")
    rows = [row for row in rows if "eval/heldout_pass_rate" in row]
    return rows[0], rows[-1]


def test_chains_by_default(tmp_path):
    result = gj.train(gj.TrainConfig(run_dir=str(tmp_path / "run")))
    first, last = first_and_last(result)
    assert 0.1 < first["eval/heldout_pass_rate"] < 0.4
    assert last["eval/heldout_pass_rate"] > 0.7
    # One sample a prompt agrees with the exact pass rates.
    low, high = (last[f"eval/heldout_sampled_{end}"] for end in ("low", "high"))
    assert low - 0.03 < last["eval/heldout_pass_rate"] < high + 0.03


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs the GSM8K files in {GSM8K}")
def test_gsm8k_expressions_are_memorised(tmp_path):
    config = gj.TrainConfig(
        run_dir=str(tmp_path / "run"),
        task=TaskConfig(name="gsm8k-expressions", path=str(GSM8K)),
    )
    first, last = first_and_last(gj.train(config))
    assert last["eval/train_pass_rate"] >= 2 * first["eval/train_pass_rate"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The pass rate on held-out prompts" in page and "memorises" in page
