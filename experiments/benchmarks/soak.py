"""A long run that is killed, stopped, and robbed of its disk and its verifiers.

Claim:     whatever happens to a run, it goes on from a complete checkpoint, says which
           ones it skipped, and ends with the parameters of a run without faults.
Command:   python experiments/benchmarks/soak.py  (--smoke: 7 faults)
Hardware:  2 CPU cores, busy with other work; 200 faults in 12 minutes
Expected:  every fault as expected, every array and every number the same
Got:       200 of 200 faults as expected: 22 each of kill, kill early and sigterm, 21
           each of stray, full disk, truncated and deleted (151 attempts, 750 steps; 38
           of 38 arrays the same bits, metrics.jsonl the same), and 13 hangs, 13 deaths,
           12 NaN and 12 raises, each counted once. 2026-11-21
Writes:    results/soak/{config.json,faults.jsonl,summary.json} and the runs

Two runs take the faults, one after another:
  exact   the default task; killed, stopped by SIGTERM, its newest checkpoint deleted or
          a file of it cut in half, a stray directory among them, or the disk full (a
          limit on file sizes, a line or two above what metrics.jsonl holds). At the end
          its last checkpoint and its metrics are compared with those of a run without
          faults: every array bit for bit, every number but times and compile counts.
  checks  countdown with a reward that hangs, kills its worker, is NaN or raises once
          for each fault. These change rewards, so the run is compared with no other: it
          must count each fault, go on, and end with finite parameters.

Every attempt is a process forked from this one after the imports, and `grpo-jax train`
in it. A fault is logged with its kind, its step, what had to follow and what did.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from attempt import Attempt, wait_for

from grpo_jax.runs.lines import read_lines

Log = Callable[[dict], None]  # of a fault's row

EXACT = ("kill", "kill early", "sigterm", "truncated", "deleted", "stray", "full disk")
CHECKS = ("hang", "die", "nan", "raise")
TINY = [
    "--model.width", "32", "--model.mlp-width", "48", "--model.head-dim", "8",
    "--warm-start.max-steps", "200", "--warm-start.noisy-steps", "0",
    "--sampling.prompts", "6", "--sampling.group-size", "8",
    "--evaluation.prompts", "32", "--task.heldout-prompts", "32",
    "--instrument.every", "0", "--log.lines-every", "1000000",
    "--optimizer.learning-rate", "1e-3",
]  # fmt: skip
REWARD = """
import os, time
INJECT = {path!r}
def reward(example, completion):
    try:
        os.rename(INJECT, INJECT + ".taken")  # one check takes it
    except FileNotFoundError:
        return float(sum(c.isdigit() for c in completion)) / 8
    fault = open(INJECT + ".taken").read()
    if fault == "hang":
        time.sleep(3600)
    if fault == "die":
        os.kill(os.getpid(), 9)
    if fault == "raise":
        raise RuntimeError("injected")
    return float("nan")
"""


@dataclasses.dataclass(frozen=True)
class Config:
    faults: int = 200  # a quarter of them in the run of checks
    every: int = 4  # steps between checkpoints
    farthest: int = 10  # steps that an attempt makes at most before its fault
    seed: int = 0
    output: str = "results/soak"  # emptied at the start
    smoke: bool = False  # one of each in the exact run, none in the other


def last_step(directory: Path) -> int:
    """Step of the last complete line of metrics.jsonl; -1 without one."""
    with (
        contextlib.suppress(FileNotFoundError, ValueError, IndexError, KeyError),
        (directory / "metrics.jsonl").open("rb") as file,
    ):
        file.seek(max(0, file.seek(0, os.SEEK_END) - 5000))
        return json.loads(file.read().rsplit(b"\n", 2)[-2])["step"]
    return -1


def checkpoints(directory: Path) -> list[int]:
    """Steps of the checkpoints, oldest first."""
    names = [path.name for path in (directory / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit() and name != "999999")


def start_of(text: str) -> int | None:
    """The step that an attempt says it began at."""
    if "no readable checkpoint to resume from" in text:
        return 0
    match = re.search(r"resumed at step (\d+)", text)
    return int(match[1]) if match else None


class Exact:
    """The run of the default task, and faults that must not change a bit of it."""

    def __init__(self, config: Config, output: Path, rng: random.Random, faults: int):
        self.config, self.rng, self.output = config, rng, output
        self.directory, self.attempts = output / "exact", 0
        steps = max(12, faults * config.farthest // 2)
        self.steps = steps
        self.flags = [
            *("--steps", str(steps), "--checkpoint.every", str(config.every)),
            *("--evaluation.every", str(max(10, steps // 20))),
            *("--updates-per-rollout", "2", *TINY),
        ]

    def start(self, directory: Path, **limits: int) -> Attempt:
        arguments = ["--run-dir", str(directory), *self.flags]
        if (directory / "config.json").exists():
            arguments.append("--resume")
        self.attempts += 1
        log = self.output / "attempts" / f"{self.attempts}.log"
        return Attempt(arguments, log, **limits)

    def inject(self, kind: str) -> dict:
        """Starts an attempt with that fault; the row says what must follow."""
        saved, began = checkpoints(self.directory), time.monotonic()
        target = (saved or [0])[-1] + self.rng.randint(1, self.config.farthest)
        target = min(target, self.steps - 1)
        limits, metrics = {}, self.directory / "metrics.jsonl"
        if kind == "full disk" and metrics.exists():
            limits["file_size"] = metrics.stat().st_size + self.rng.randint(500, 4000)
        attempt = self.start(self.directory, **limits)
        row: dict[str, Any] = {"run": "exact", "fault": kind}
        if limits:
            row |= {"code": attempt.end(), "said": error_line(attempt.text())}
        elif kind == "kill early":
            time.sleep(self.rng.uniform(0.2, 6.0))
            attempt.signal(signal.SIGKILL)
            row["code"] = attempt.end()
        else:
            wait_for(attempt, lambda: "ready after" in attempt.text())
            wait_for(attempt, lambda: last_step(self.directory) >= target)
            time.sleep(self.rng.uniform(0, 0.1))
            stop = signal.SIGTERM if kind == "sigterm" else signal.SIGKILL
            attempt.signal(stop)
            row["code"] = attempt.end()
        row |= {"step": last_step(self.directory), "began_at": start_of(attempt.text())}
        row, resumes_at = self.consequence(kind, row, attempt.text())
        codes = {"sigterm": 0} | ({"full disk": 1} if limits else {})
        return row | {
            "expected": {"resumes_at": resumes_at, "code": codes.get(kind, -9)},
            "seconds": round(time.monotonic() - began, 2),
        }

    def consequence(self, kind: str, row: dict, text: str) -> tuple[dict, list]:
        """(row, steps that the next attempt may resume at), checkpoints damaged."""
        saved = checkpoints(self.directory)
        if kind == "sigterm":
            stopped = re.search(r"stopped at step (\d+)", text)
            row["stopped_at"] = int(stopped[1]) if stopped else None
            return row, [row["stopped_at"]]
        if kind == "full disk" and "said" in row:
            match = re.search(r"step (\d+) is saved", row["said"])
            if match:
                return row, [int(match[1])]
        if kind in ("truncated", "deleted") and len(saved) > 1:
            newest = self.directory / "checkpoints" / str(saved[-1])
            if kind == "deleted":
                shutil.rmtree(newest)
                return row, saved[-2:-1]
            files = [f for f in newest.rglob("*") if f.is_file()]
            file = self.rng.choice(sorted(f for f in files if f.stat().st_size))
            os.truncate(file, file.stat().st_size // 2)
            return row | {"file": str(file.relative_to(newest))}, saved[-2:]
        if kind == "stray":
            (self.directory / "checkpoints" / "999999").mkdir(exist_ok=True)
        return row, saved[-1:] or [0]


def error_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    return lines[-1] if lines else ""


def settle(row: dict, text: str) -> dict:
    """The row with the step that the next attempt began at, and whether it is right."""
    began = start_of(text)
    warned = [x for x in text.splitlines() if x.startswith("warning: checkpoint")]
    right = began in row["expected"]["resumes_at"]
    right &= row["code"] == row["expected"]["code"] or row["step"] < 0
    if row["fault"] == "truncated" and began != row["expected"]["resumes_at"][-1]:
        right &= bool(warned)
    if row["fault"] == "full disk" and row["code"] == 1:
        right &= "cannot write" in row["said"]
    return row | {"resumed_at": began, "warnings": warned, "as_expected": bool(right)}


def exact_run(config: Config, output: Path, kinds: list[str], log: Log) -> dict:
    """Injects the faults one after another; a summary of how the run ended."""
    rng = random.Random(config.seed)
    run = Exact(config, output, rng, len(kinds))
    reference = output / "reference"
    began = time.monotonic()
    attempt = run.start(reference)
    if attempt.end(3600) != 0:
        raise SystemExit(f"the run without faults failed:\n{attempt.text()}")
    seconds, waiting = time.monotonic() - began, []
    for kind in kinds:
        fault = run.inject(kind)
        # An attempt says at its start where it resumed, which settles the fault before;
        # if it was killed earlier than that, the next attempt settles both.
        if fault["began_at"] is None and waiting:
            fault["expected"]["resumes_at"] = waiting[-1]["expected"]["resumes_at"]
        else:
            text = (output / "attempts" / f"{run.attempts}.log").read_text()
            for row in waiting:
                log(settle(row, text))
            waiting = []
        waiting.append(fault)
    attempt = run.start(run.directory)
    code = attempt.end(3600)
    for row in waiting:
        log(settle(row, attempt.text()))
    if code:
        raise SystemExit(f"the last attempt failed:\n{attempt.text()}")
    same = same_checkpoint(reference, run.directory, run.steps)
    rows = [numbers(directory) for directory in (reference, run.directory)]
    return {
        "steps": run.steps,
        "seconds_without_faults": round(seconds, 1),
        "attempts": run.attempts - 1,
        "arrays_compared": same[1],
        "arrays_bit_identical": same[0],
        "metrics_identical": rows[0] == rows[1],
    }


def numbers(directory: Path) -> list[dict]:
    """Rows of metrics.jsonl without times and compile counts."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "compiles"}
        for row in read_lines(directory / "metrics.jsonl")
    ]


# In a process of its own: this one is forked again and must not touch a device.
COMPARE = """
import sys, json, pathlib, jax, numpy as np, orbax.checkpoint as ocp
def leaves(directory, step):
    with ocp.CheckpointManager(pathlib.Path(directory).absolute()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(int(step), args=args)["state"]
        return [np.asarray(x) for x in jax.tree.leaves(state)]
trees = [leaves(d, sys.argv[1]) for d in sys.argv[2:]]
same = [a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(trees[0], trees[-1], strict=True)]
finite = all(np.isfinite(x).all() for x in trees[-1])
print(json.dumps([all(same), len(same), bool(finite)]))
"""


def same_checkpoint(a: Path, b: Path, step: int) -> list:
    """[whether all arrays have the same bits, their count, whether b's are finite]."""
    names = [str(directory / "checkpoints") for directory in (a, b)]
    process = subprocess.run(
        [sys.executable, "-c", COMPARE, str(step), *names],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def checks_run(output: Path, kinds: list[str], log: Log) -> dict:
    """Injects faults into single checks of one run; a summary of how it ended."""
    directory, inject = output / "checks", output / "inject"
    (output / "soak_reward.py").write_text(REWARD.format(path=str(inject)))
    sys.path.insert(0, str(output))
    flags = [
        *("--run-dir", str(directory), "--task.name", "countdown", "--steps", "100000"),
        *("--task.train-prompts", "256", "--task.rewards", "soak_reward:reward"),
        *("--sampling.max-new-tokens", "8", "--scoring.timeout-s", "2"),
        *("--checkpoint.every", "50", "--evaluation.every", "0"),
        *("--warm-start.no-enabled", *TINY[:6], *TINY[10:]),
    ]
    attempt = Attempt(flags, output / "attempts" / "checks.log")
    if not wait_for(attempt, lambda: last_step(directory) >= 2):
        raise SystemExit(f"the run of checks did not start:\n{attempt.text()}")
    for kind in kinds:
        began = time.monotonic()
        first = last_step(directory) + 1
        inject.with_suffix(".new").write_text(kind)
        inject.with_suffix(".new").rename(inject)
        taken = inject.with_name("inject.taken")
        wait_for(attempt, taken.exists, 60)
        at = last_step(directory) + 1
        wait_for(attempt, lambda at=at: last_step(directory) > at + 1, 60)
        rows = [
            r for r in read_lines(directory / "metrics.jsonl") if r["step"] >= first
        ]
        counted = Counter()
        for row in rows:
            counted["failed"] += row["reward/failed"]
            counted["missing"] += row["reward/missing"]
        expected = {"failed": int(kind in ("hang", "die"))}
        expected["missing"] = 1 - expected["failed"]
        taken.unlink(missing_ok=True)
        log(
            {
                "run": "checks",
                "fault": kind,
                "step": at,
                "expected": expected,
                "counted": dict(counted),
                "seconds": round(time.monotonic() - began, 2),
                "as_expected": dict(counted) == expected and attempt.running(),
            }
        )
    attempt.signal(signal.SIGTERM)
    code, steps = attempt.end(), last_step(directory)
    rows = read_lines(directory / "metrics.jsonl")
    finite = all(math.isfinite(r["gradient/norm"] or 0) for r in rows[1:])
    _, _, parameters_finite = same_checkpoint(directory, directory, steps)
    return {
        "steps": steps,
        "exit_code_of_sigterm": code,
        "gradients_finite": finite,
        "parameters_finite": parameters_finite,
    }


def plan(config: Config) -> tuple[list[str], list[str]]:
    """Kinds of the faults in the exact run, and in the run of checks."""
    if config.smoke:
        return [*EXACT], []
    rng, checks = random.Random(config.seed + 1), config.faults // 4
    exact = [EXACT[i % len(EXACT)] for i in range(config.faults - checks)]
    rng.shuffle(exact)
    return exact, [CHECKS[i % len(CHECKS)] for i in range(checks)]


def main(config: Config) -> None:
    output = Path(config.output).absolute()
    shutil.rmtree(output, ignore_errors=True)
    (output / "attempts").mkdir(parents=True)
    (output / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    counts, unexpected = Counter(), []
    began = time.monotonic()

    def log(row: dict) -> None:
        counts[row["fault"]] += 1
        if not row["as_expected"]:
            unexpected.append(row)
        with (output / "faults.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    exact, checks = plan(config)
    summary: dict[str, Any] = {"exact": exact_run(config, output, exact, log)}
    if checks:
        summary["checks"] = checks_run(output, checks, log)
    summary |= {
        "faults": sum(counts.values()),
        "by_kind": dict(counts),
        "as_expected": sum(counts.values()) - len(unexpected),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))
    if unexpected or not summary["exact"]["arrays_bit_identical"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
