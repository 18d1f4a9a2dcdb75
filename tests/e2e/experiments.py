"""Smoke forms of the experiments, run in this process or as their users run them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import tyro

ROOT = Path(__file__).parents[2]
# Of a process whose programs are compiled as they are in the tests' own.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def run_smoke(experiment: ModuleType, results: Path, *flags: str) -> Path:
    """Runs the script's main in this process; returns `results`."""
    argv = ["--smoke", "--results", str(results), *flags]
    experiment.main(tyro.cli(experiment.Config, args=argv))
    return results


def run_script(name: str, directory: Path, *flags: str, **environment: str) -> Path:
    """Runs experiments/NAME.py in a process of its own; returns its results."""
    plain = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    process = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--smoke", *flags],
        capture_output=True,
        text=True,
        cwd=directory,
        env=os.environ | plain | environment,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return directory / "results" / Path(name).name


def rows_of(results: Path, kind: str | None = None) -> list[dict]:
    """Rows of metrics.jsonl, of one kind or all."""
    lines = (results / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if kind is None or row["kind"] == kind]


def check_config(results: Path) -> dict:
    """config.json, which must say that this was a smoke run, and of which commit."""
    config = json.loads((results / "config.json").read_text())
    assert config["smoke"] and config["git"]
    return config


def check_plot(results: Path) -> None:
    assert (results / "plot.png").read_bytes().startswith(b"\x89PNG")
