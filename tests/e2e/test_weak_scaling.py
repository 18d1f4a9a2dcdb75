"""What devices send at constant work each: the benchmark in short."""

import json

import pytest

from tests.e2e.experiments import run_script

pytestmark = pytest.mark.slow


def test_weak_scaling_in_short(tmp_path):
    results = run_script("benchmarks/weak_scaling", tmp_path)
    lines = (results / "table.jsonl").read_text().splitlines()
    one, data, fsdp = map(json.loads, lines)
    assert one["step"] == 0
    # Two chunks of logits, and a prompt's part beside the completions': added up once.
    assert data["update"] == pytest.approx(data["formula"], rel=1e-3)
    assert fsdp["update"] <= fsdp["formula"] * 1.001
    assert data["sample_once"] == 0 and data["weigh"] < 100
