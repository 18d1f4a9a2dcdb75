"""Time, memory and figures of `grpo-jax look`, by what it takes gradients of.

    python experiments/real_look.py DIR            # a model's directory
    python experiments/real_look.py DIR --shape qwen2.5-0.5b --prompts 4 \\
        --group-size 8 --parameters all

The model draws G samples of T tokens for each of P prompts of the task `ladder`, once,
and they are scored. Then `look` measures them in a process of its own for each kind of
parameters. A line has what it said before it started beside what it took: seconds with
compilation, and the process's peak memory. "As the first": Pearson over pairs of
prompts of raw cosines and those of the first kind, on the same samples. With --shape
the model is a new one of that shape in bfloat16 with DIR's tokenizer and rewards by
coins: of it only time and memory tell something. Figures are in BUILD_NOTES.md.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from real_probes import real_policy, sample_scored

import grpo_jax as gj
from grpo_jax.models.pretrained import save_pretrained
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.runs.config import TaskConfig
from grpo_jax.runs.policies import task_of

SHAPES = {
    "qwen2.5-0.5b": dict(
        vocab_size=151_936, num_layers=24, width=896, mlp_width=4864, num_heads=14,
        num_kv_heads=2, head_dim=64, qk_bias=True, rope_theta=1e6,
    ),
}  # fmt: skip
COLUMNS = "parameters", "mean cosine", "std", "as the first", "said", "s", "GB"


@dataclasses.dataclass(frozen=True)
class Config:
    model: Annotated[Path, tyro.conf.Positional]
    shape: Literal["", *SHAPES] = ""  # a new model of it
    skills: tuple[str, ...] = ("word", "first", "copy", "smaller", "even", "last")
    prompts: int = 24  # P
    group_size: int = 16  # G
    tokens: int = 8  # T
    parameters: tuple[str, ...] = ("all", "lora", "last-layers")
    seed: int = 0
    draw: Path | None = None  # only draw the rollouts, to this directory


class Run(NamedTuple):
    """What a process printed and used."""

    text: str
    seconds: float
    peak_bytes: int


def run(*command: str | Path) -> Run:
    """Runs a command to its end.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=output, stderr=output
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(text)
    return Run(text, seconds, used.ru_maxrss * 1024)


def draw(c: Config, directory: Path) -> None:
    """Writes the rollouts, and the model where it is a new one."""
    task = task_of(TaskConfig(name="ladder", skills=c.skills), str(c.model))
    key = jax.random.key(c.seed)
    if c.shape:
        config = gj.ModelConfig(**SHAPES[c.shape], compute_dtype="float32")
        policy = gj.init_policy(config, key)
        path = directory / "model"
        save_pretrained(policy, path, tokenizer=task.tokenizer, dtype="bfloat16")
    else:
        policy = real_policy(str(c.model))
    examples = task.train[: c.prompts]
    longest = max(map(len, encode_prompts(task, examples)))
    rollouts = sample_scored(
        policy, task, examples, c.group_size, c.tokens, key, longest
    )
    if c.shape:
        tosses = jax.random.bernoulli(key, shape=(c.prompts, c.group_size))
        known = rollouts.completions % len(task.tokenizer)  # that can be read back
        rewards = np.asarray(tosses, np.float32)
        rollouts = rollouts._replace(completions=known, rewards=rewards)
    lines = [json.dumps(row) + "\n" for row in rollouts.to_rows()]
    (directory / "rollouts.jsonl").write_text("".join(lines))


def measured(output: Path) -> dict[str, Any]:
    """The row of a look."""
    return json.loads((output / "look.json").read_text())["rows"][0]


def likeness(first: Path, other: Path) -> float:
    """Correlation of two looks' raw cosines over pairs of prompts."""
    cosines = np.array(
        [pairs_of(measured(x)["geometry"]["cosines"]) for x in (first, other)]
    )
    both = np.isfinite(cosines).all(0)
    return float(np.corrcoef(cosines[:, both])[0, 1]) if both.sum() > 1 else np.nan


def pairs_of(matrix: list[list[float | None]]) -> np.ndarray:
    """[P (P - 1) / 2] entries above the diagonal; NaN where they are missing."""
    square = np.asarray(matrix, float)
    return square[np.triu_indices(len(square), 1)]


def line(c: Config, parameters: str, directory: Path, model: Path) -> list[str]:
    """A row of the table, in the order of `COLUMNS`."""
    output = directory / parameters
    found = run(
        "-m", "grpo_jax", "look", directory / "rollouts.jsonl", "--pretrained", model,
        "--parameters", parameters, "--prompts", str(c.prompts), "--output", output,
    )  # fmt: skip
    said = re.search("measuring: (.*?B)", found.text)
    phase = measured(output)["phase"]
    figures = [
        f"{phase[name]} {phase[f'{name}_interval']}"
        for name in ("mean_cosine", "std_cosine")
    ]
    figures.append(f"{likeness(directory / c.parameters[0], output):.2f}")
    took = [f"{found.seconds:.0f}", f"{found.peak_bytes / 1e9:.2f}"]
    return [parameters, *figures, said[1] if said else "nothing", *took]


def main(c: Config) -> None:
    if c.draw is not None:
        draw(c, c.draw)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        run(*sys.argv, "--draw", directory)
        model = directory / "model" if c.shape else c.model
        print(*COLUMNS, sep=" | ")
        for parameters in c.parameters:
            print(*line(c, parameters, directory, model), sep=" | ", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
