"""Every objective and every prompt weights on the default task: does each one train?

Not a ranking: one learning rate for all, few steps, on policy (one update a rollout).
It shows that every row and every rule runs and stays finite, and its final pass rate.

Command:   python experiments/benchmarks/every_method.py  (--smoke: 2 methods, 2 steps)
           ... --resumed: instead, two steps, resumed for two more, against four
Hardware:  2 CPU cores, 18 minutes (--resumed: 10)
Writes:    results/every_method/{config.json,metrics.jsonl,table.md}
Got:       BUILD_NOTES.md, "Every method on the default task"
"""

import dataclasses
import json
import math
import statistics
import tempfile
from pathlib import Path

import tyro

import grpo_jax as gj
from grpo_jax.prompt_weights import WEIGHTS
from grpo_jax.runs.config_files import from_dict
from grpo_jax.runs.lines import read_lines

SETTINGS = {"posterior": {"power": 1.5}, "finite_group": {"group_size": 64}}


@dataclasses.dataclass(frozen=True)
class Config:
    objectives: tuple[str, ...] = tuple(gj.OBJECTIVES)  # rows of the table
    weights: tuple[str, ...] = tuple(WEIGHTS)  # rules, on the loss of grpo
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 30
    output: str = "results/every_method"  # runs that it has already are skipped
    resumed: bool = False  # check that a resumed run is the uninterrupted one
    smoke: bool = False  # two methods, one seed, two steps


def run_rows(
    directory: str, name: str, weights: str, seed: int, **more: object
) -> list[dict]:
    """Rows of metrics.jsonl of a run in `directory`, trained or continued."""
    settings = {
        "objective": {"name": name},
        "weights": {"name": weights} | SETTINGS.get(weights, {}),
        "evaluation": {"every": 0},
        "instrument": {"every": 0},
        "log": {"lines_every": 10**6, "samples_every": 0},
        "checkpoint": {"every": 10**6},
        "run_dir": directory,
        "seed": seed,
    } | more
    result = gj.train(from_dict(gj.TrainConfig, settings))
    return read_lines(result.run_dir / "metrics.jsonl")


def one_run(name: str, weights: str, seed: int, steps: int) -> dict:
    """Starting and final pass rates of one run, and a summary of its steps."""
    with tempfile.TemporaryDirectory() as directory:
        rows = run_rows(f"{directory}/run", name, weights, seed, steps=steps)
    first, last = rows[0], rows[-1]
    numbers = [x for row in rows for x in row.values()]
    return {
        "method": name if weights == "objective" else f"grpo, weights {weights}",
        "seed": seed,
        "start": first["eval/heldout_pass_rate"],
        "end": last["eval/heldout_pass_rate"],
        "skipped": last["update/skipped"],
        "finite": all(x is not None and math.isfinite(x) for x in numbers),
        "median_step_s": statistics.median(row["time/step_s"] for row in rows[1:]),
        "gradient_norm": statistics.median(row["gradient/norm"] for row in rows[1:]),
    }


def resumes(name: str, weights: str) -> bool:
    """Whether two steps and two more give the numbers of four, to the last bit."""
    with tempfile.TemporaryDirectory() as directory:
        straight = run_rows(f"{directory}/straight", name, weights, 0, steps=4)
        parts = f"{directory}/parts"
        run_rows(parts, name, weights, 0, steps=2)
        resumed = run_rows(parts, name, weights, 0, steps=4, resume=True)

    def numbers(row):
        # The run of two steps evaluated at its end.
        skipped = ("time/", "compiles", "eval/")
        return {k: v for k, v in row.items() if not k.startswith(skipped)}

    same_end = (
        straight[-1]["eval/heldout_pass_rate"],
        resumed[-1]["eval/heldout_pass_rate"],
    )
    return same_end[0] == same_end[1] and all(
        numbers(a) == numbers(b) for a, b in zip(straight, resumed, strict=True)
    )


def table(rows: list[dict]) -> str:
    """Markdown: mean over seeds, with the smallest and largest."""
    lines = [
        "| method | start | end: mean (min-max) | gradient norm | finite |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == method]
        start, end, norm = (
            [row[key] for row in runs] for key in ("start", "end", "gradient_norm")
        )
        finite = all(row["finite"] and not row["skipped"] for row in runs)
        lines.append(
            f"| {method} | {statistics.mean(start):.3f} | {statistics.mean(end):.3f} "
            f"({min(end):.3f}-{max(end):.3f}) | {statistics.mean(norm):.2g} | "
            f"{'yes' if finite else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    runs = [(name, "objective") for name in config.objectives]
    runs += [("grpo", weights) for weights in config.weights]
    seeds, steps = config.seeds, config.steps
    if config.smoke:
        runs, seeds, steps = [("tic_grpo", "objective"), ("grpo", "posterior")], (0,), 2
    if config.resumed:
        for name, weights in runs:
            print(f"{name}, weights {weights}: {resumes(name, weights)}", flush=True)
        return
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    path = output / "metrics.jsonl"
    rows = read_lines(path)
    done = {(row["objective"], row["weights"], row["seed"]) for row in rows}
    for name, weights in runs:
        for seed in seeds:
            if (name, weights, seed) in done:
                continue
            row = {"objective": name, "weights": weights}
            row |= one_run(name, weights, seed, steps)
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            (output / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Config))
