import os
import subprocess
import sys

import pytest

from tests.e2e.experiments import ENVIRONMENT
from tests.e2e.undrawn import savefig

# A model that compiles and warm-starts in seconds, with some groups that are not tied.
TINY_FLAGS = [
    "--model.width", "32", "--model.mlp-width", "48", "--model.head-dim", "8",
    "--warm-start.max-steps", "200", "--warm-start.noisy-steps", "0",
    "--sampling.prompts", "6", "--sampling.group-size", "8",
    "--evaluation.prompts", "32", "--task.heldout-prompts", "32",
    "--instrument.every", "0",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def undrawn(request):
    """Reports have empty figures, but in modules with DRAWN = True."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "DRAWN", False):
            patch.setattr("matplotlib.figure.Figure.savefig", savefig)
        yield


@pytest.fixture
def grpo_jax(tmp_path):
    """Starts `python -m grpo_jax ...`, `train` with TINY_FLAGS and without drawing
    unless `bare`; killed at the end."""
    started = []

    def start(*arguments, code=None, bare=False, **options):
        module = "grpo_jax" if bare else "tests.e2e.undrawn"
        command = [sys.executable, "-m", module, *map(str, arguments)]
        if arguments[:1] == ("train",) and not bare:
            command += TINY_FLAGS
        if code is not None:
            command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=os.environ | ENVIRONMENT,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.fixture
def run(grpo_jax):
    """Runs a command to its end and returns (exit code, output)."""

    def to_end(*arguments, **options):
        process = grpo_jax(*arguments, **options)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    return to_end
