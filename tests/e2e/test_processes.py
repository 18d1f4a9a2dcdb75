"""Two processes of four devices each: one run, and what becomes of it when one of them
dies, hangs, is stopped, or is told something else."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.test_sharding import on_devices

pytestmark = pytest.mark.slow
ROOT = str(Path(__file__).parents[2])


def together(*commands, timeout=300):
    """(exit code, stdout, stderr) of each command, run as one of so many processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.on_devices", *map(str, command)],
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": ROOT, "PROCESSES": f"{port} {len(commands)} {i}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, command in enumerate(commands)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, *out) for p, out in zip(running, outputs, strict=True)]


def on_two(*command):
    """What the first process printed."""
    done = together(command, command)
    for code, out, err in done:
        assert code == 0, out + err
    return json.loads(done[0][1].splitlines()[-1])


def check_same(actual, expected):
    """Of the samples, those that the process that writes holds."""
    assert actual["finished"] and expected["finished"]
    assert 12 <= len(actual["samples"]) <= len(expected["samples"])
    for name, completions in actual["samples"].items():
        assert completions == expected["samples"][name], name
    assert actual["tokens"] == expected["tokens"]
    np.testing.assert_allclose(actual["rewards"], expected["rewards"], rtol=1e-6)
    np.testing.assert_allclose(actual["norms"], expected["norms"], rtol=1e-4)
    assert actual["heldout"] == pytest.approx(expected["heldout"], rel=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Six steps on one device."""
    directory = tmp_path_factory.mktemp("runs") / "alone"
    return on_devices("whole_run", directory, "1x1x1", 6)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The directory of the first four steps, by two processes."""
    directory = tmp_path_factory.mktemp("runs") / "half"
    compiles = on_two("whole_run", directory, "2x2x2", 4)["compiles"]
    # The first checkpoint, of step 2, compiles what orbax cuts arrays with.
    assert compiles[1] == compiles[2] and compiles[3] == compiles[4]
    return directory


@pytest.mark.parametrize(
    ("mesh", "p", "g"), [("1x8x1", 8, 4), ("8x1x1", 2, 8), ("2x2x2", 8, 4)]
)
def test_two_processes_sample_and_learn_the_same(mesh, p, g):
    gaps = on_two("same_step", mesh, p, g, "tied")
    assert gaps["tokens"] == 0
    assert gaps["params"] < 1e-5 and gaps["moments"] < 1e-5


@pytest.mark.parametrize(
    ("processes", "mesh"), [(1, "1x1x1"), (1, "1x8x1"), (2, "8x1x1"), (2, "2x2x2")]
)
def test_a_run_goes_on_by_other_processes(tmp_path, half, alone, processes, mesh):
    run = shutil.copytree(half, tmp_path / "run")
    go_on = on_two if processes == 2 else on_devices
    actual = go_on("whole_run", run, mesh, 6, "resume")
    if processes == 1:  # which writes all samples
        known = len([name for name in actual["samples"] if int(name.split()[0]) < 5])
        assert len(actual["samples"]) == known + 16
    check_same(actual, alone)


@pytest.mark.parametrize(
    "options",
    [("dapo", "binary"), ("grpo", "look", "host"), ("dr_grpo", "lora")],
)
def test_methods_and_looks_are_the_same(tmp_path, options):
    expected = on_devices("whole_run", tmp_path / "one", "1x1x1", 3, *options)
    actual = on_two("whole_run", tmp_path / "two", "2x2x2", 3, *options)
    check_same(actual, expected)
    assert actual["refilled"] == expected["refilled"]
    assert ("dapo" in options) == (sum(expected["refilled"]) > 0)
    assert len(actual["looks"]) == len(expected["looks"])
    for a, b in zip(actual["looks"], expected["looks"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_a_process_that_dies_ends_the_run_which_goes_on_without_it(tmp_path, alone):
    run = tmp_path / "run"
    command = ("whole_run", run, "2x2x2", 6, "die")
    [(code, _, err), (killed, *_)] = together(command, command, timeout=150)
    assert killed == -9
    assert code != 0 and ("another process ended" in err or "another task died" in err)
    check_same(on_devices("whole_run", run, "1x1x1", 6, "resume"), alone)


def test_a_process_that_hangs_ends_the_run_in_time(tmp_path, alone):
    run = tmp_path / "run"
    command = ("whole_run", run, "2x2x2", 6, "hang")
    done = together(command, command, timeout=200)
    for i, (code, _, err) in enumerate(done):
        assert code == 1, err
        assert f"process {i} waited" in err and "--resume" in err
    assert "process 1 waited 0:40 for scoring" in done[1][2]
    check_same(on_two("whole_run", run, "2x2x2", 6, "resume"), alone)


def test_one_sigterm_stops_all_after_their_phase(tmp_path, alone):
    run = tmp_path / "run"
    command = ("whole_run", run, "2x2x2", 6, "signal")
    for code, out, err in together(command, command):
        assert code == 0 and not json.loads(out.splitlines()[-1])["finished"], err
    check_same(on_two("whole_run", run, "1x8x1", 6, "resume"), alone)


@pytest.mark.parametrize("step", [3, 4])  # of the latter a checkpoint is due
def test_a_full_disk_ends_all_and_loses_nothing(tmp_path, alone, step):
    run = tmp_path / "run"
    command = ("whole_run", run, "2x2x2", 6, f"full-{step}")
    for code, _, err in together(command, command):
        assert code == 1 and "metrics.jsonl: No space left" in err
        assert "is saved. Make room" in err
    check_same(on_two("whole_run", run, "2x2x2", 6, "resume"), alone)


def test_a_checkpoint_that_cannot_be_saved_is_left_out_by_all(tmp_path, alone):
    command = ("whole_run", tmp_path / "run", "2x2x2", 6, "unsaved")
    done = together(command, command, timeout=200)
    for code, out, err in done:
        assert code == 0, out + err
    assert "checkpoint of step 2 failed" in done[0][1]
    assert "process 1: warning: checkpoint of step 2 failed" in done[1][2]
    check_same(json.loads(done[0][1].splitlines()[-1]), alone)
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {"4", "6"}


def test_a_damaged_checkpoint_is_passed_over_by_all(tmp_path, half, alone):
    run = shutil.copytree(half, tmp_path / "run")
    for file in (run / "checkpoints" / "4" / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    command = ("whole_run", run, "2x2x2", 6, "resume")
    done = together(command, command)
    for code, out, err in done:
        assert code == 0, out + err
    assert "checkpoint of step 4 cannot be read" in done[0][1]
    assert "resumed at step 2" in done[0][1]
    check_same(json.loads(done[0][1].splitlines()[-1]), alone)


def test_what_does_not_fit_together_is_refused_by_all(tmp_path):
    command = ("whole_run", tmp_path / "run", "2x2x2")
    for code, _, err in together((*command, 6), (*command, 7)):
        assert code == 1 and "was given another config" in err
    command = ("whole_run", tmp_path / "run", "2x2x1", 2)
    for code, _, err in together(command, command):
        assert code == 1 and "must have all 8 devices of the 2 processes" in err
    assert not (tmp_path / "run").exists()
