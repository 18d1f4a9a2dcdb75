"""What devices send at constant work each: the benchmark in short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_weak_scaling_in_short(tmp_path):
    root = Path(__file__).parents[2]
    script = root / "experiments/benchmarks/weak_scaling.py"
    done = subprocess.run(
        [sys.executable, script, "--smoke"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "results/weak_scaling/table.jsonl").read_text().splitlines()
    one, data, fsdp = map(json.loads, lines)
    assert one["step"] == 0
    # Two chunks of logits, and a prompt's part beside the completions': added up once.
    assert data["update"] == pytest.approx(data["formula"], rel=1e-3)
    assert fsdp["update"] <= fsdp["formula"] * 1.001
    assert data["sample_once"] == 0 and data["weigh"] < 100
