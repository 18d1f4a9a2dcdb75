"""Sampling and updating a real model: ours beside transformers, plain torch and TRL.

The work: SmolLM2-135M-Instruct (`python experiments/real_model.py DIR` makes it) in
float32, trained in full; P prompts of L tokens, G samples of T tokens each, without an
early end; one AdamW update per rollout, without KL, rewards at random. transformers:
`generate`, then the same loss with torch's autograd in one batch. TRL: its own trainer.

    python experiments/benchmarks/real_model.py DIR [--rounds 2]

Needs torch and trl beside the library. Programs run one after the other, each in a
process of its own, on the same cores with one thread for each, in turn for every round.
A rate alone says little where libraries multiply matrices of one shape at rates that
differ by processor. So each program also multiplies its own shapes (the rows of a token
of all completions, of an update; forward, or forward and backward; the real matrices
in turn) in its own framework, with nothing between: GFLOP per CPU second.

Rows go to results/real_model_speed; those that are there are not run again. Figures
are in BUILD_NOTES.md.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from grpo_jax.rollouts.micro_batches import TOKENS
from grpo_jax.runs.lines import read_lines

Program = Literal["ours", "transformers", "trl"]
PROGRAMS: tuple[Program, ...] = ("ours", "transformers", "trl")
RESULTS = Path(__file__).parents[1] / "results" / "real_model_speed"


@dataclasses.dataclass(frozen=True)
class Config:
    model: Annotated[Path, tyro.conf.Positional]
    prompts: int = 4
    group_size: int = 8
    prompt_tokens: int = 96
    new_tokens: int = 32
    steps: int = 2  # timed, after one that compiles
    rounds: int = 2
    programs: tuple[Program, ...] = PROGRAMS
    output: Path = RESULTS
    only: Program | None = None  # run this one here and print its row

    @property
    def completions(self) -> int:
        return self.prompts * self.group_size

    def settings(self) -> dict[str, int]:
        """What a row was measured with."""
        names = ("prompts", "group_size", "prompt_tokens", "new_tokens", "steps")
        return {name: getattr(self, name) for name in names}


class Used(NamedTuple):
    """Seconds of a phase: on the clock, and of all cores together."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> "Used":
        return Used(time.perf_counter(), time.process_time())

    def since(self, began: "Used") -> "Used":
        return Used(self.wall - began.wall, self.cpu - began.cpu)


class Step(NamedTuple):
    sample: Used
    update: Used


class Products(NamedTuple):
    """Shapes of a phase's matrix products.

    Attributes:
        rows: Of the products in the layers.
        logits: Rows that are multiplied with the unembedding.
        backward: The gradients' products too.
    """

    rows: int
    logits: int
    backward: bool

    def flop(self, maps: list[tuple[int, int]], layers: int, head: int) -> float:
        """Of all layers and the unembedding of `head` weights."""
        layer = sum(a * b for a, b in maps)
        weights = self.rows * layers * layer + self.logits * head
        return (6 if self.backward else 2) * weights


class Measured(NamedTuple):
    steps: list[Step]  # without the first
    products: dict[str, Products]  # of "sample" (one token) and "update"
    rates: dict[str, float]  # their FLOP per CPU second
    versions: dict[str, str]


def model_maps(model: Path) -> tuple[list[tuple[int, int]], int, tuple[int, int]]:
    """((inputs, outputs) of a layer's maps, layers, those of the unembedding)."""
    c = json.loads((model / "config.json").read_text())
    width, mlp = c["hidden_size"], c["intermediate_size"]
    q, kv = (c[f"num_{x}_heads"] * c["head_dim"] for x in ("attention", "key_value"))
    maps = [(width, q), (width, kv), (width, kv), (q, width)]
    maps += [(width, mlp), (width, mlp), (mlp, width)]
    return maps, c["num_hidden_layers"], (width, c["vocab_size"])


def rate(
    model: Path, products: Products, multiply: Callable[[Any, Any, bool], Any],
    as_array: Callable[[np.ndarray], Any],
) -> float:  # fmt: skip
    """FLOP per CPU second of the products alone, the median of three; with gradients
    those of 6 layers, else of all.

    Args:
        multiply: (xs, ws, backward): x w of every pair, and with `backward` the two
            products of its gradient; returns when they are done.
        as_array: Of the framework.
    """
    maps, layers, head = model_maps(model)
    layers = min(layers, 6) if products.backward else layers
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return as_array(rng.standard_normal(shape, np.float32))

    # [inputs, outputs]; torch keeps a linear map transposed.
    weights = [[normal(b, a).T for a, b in maps] for _ in range(layers)]
    inputs = [normal(products.rows, a) for a, _ in maps]
    calls = [(inputs, ws) for ws in weights]
    calls.append(([normal(products.logits, head[0])], [normal(*head[::-1]).T]))
    seconds = []
    for _ in range(4):  # the first compiles
        began = Used.now()
        for xs, ws in calls:
            multiply(xs, ws, products.backward)
        seconds.append(Used.now().since(began).cpu)
    return products.flop(maps, layers, head[0] * head[1]) / statistics.median(
        seconds[1:]
    )


# ---- ours


def ours(c: Config) -> Measured:
    """The library's sampler and update, at their default settings."""
    import jax
    import jax.numpy as jnp
    from shape import Shape, make_step, one_step

    import grpo_jax as gj

    policy = gj.load_pretrained(c.model, dtype="float32")
    shape = Shape(c.prompts, c.group_size, c.prompt_tokens, c.new_tokens)
    made = make_step(policy, "grpo", shape, TOKENS)
    if (made.micro.prompts, made.micro.samples) != (c.prompts, c.group_size):
        raise ValueError(f"{shape} must be one micro-batch, got {made.micro}.")
    update = jax.jit(made.update, donate_argnums=0)
    state = made.init(policy.params)
    ids = np.random.default_rng(0).integers(1000, 40000, (c.prompts, c.prompt_tokens))
    ids, steps = ids.astype(np.int32), []
    for i in range(c.steps + 1):
        rewards = jnp.asarray(random_rewards(c, i).reshape(c.prompts, -1))
        state, _, (began, sampled, ended) = one_step(
            policy, made, update, state, ids, rewards, i,
            new_tokens=c.new_tokens, now=Used.now,
        )  # fmt: skip
        steps.append(Step(sampled.since(began), ended.since(sampled)))
    del state

    @jax.jit
    def forward(xs: list, ws: list) -> list:
        return [x @ w for x, w in zip(xs, ws, strict=True)]

    @jax.jit
    def both(xs: list, ws: list) -> list:
        ys = forward(xs, ws)
        return [
            (y, x.T @ y, y @ w.T) for x, w, y in zip(xs, ws, ys, strict=True)
        ]  # fmt: skip

    def multiply(xs: list, ws: list, backward: bool) -> None:
        jax.block_until_ready((both if backward else forward)(xs, ws))

    # The prompt is encoded once per group.
    new = c.completions * c.new_tokens
    update_rows = c.prompts * c.prompt_tokens + new
    products = {
        "sample": Products(c.completions, c.completions, False),
        "update": Products(update_rows, new, True),
    }
    rates = {k: rate(c.model, p, multiply, jnp.asarray) for k, p in products.items()}
    return Measured(steps[1:], products, rates, {"jax": jax.__version__})


def random_rewards(c: Config, step: int) -> np.ndarray:
    """[P * G] of 0 and 1."""
    rng = np.random.default_rng(step)
    return (rng.random(c.completions) < 0.5).astype(np.float32)


# ---- one row after the other


def row_of(program: Program, measured: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {"program": program, "cores": len(os.sched_getaffinity(0))}
    for phase in ("sample", "update"):
        used = [getattr(step, phase) for step in measured.steps]
        row[phase] = {
            "wall_s": [round(u.wall, 3) for u in used],
            "cpu_s": [round(u.cpu, 3) for u in used],
            "products": measured.products[phase]._asdict(),
            "gflop_per_cpu_s": round(measured.rates[phase] / 1e9, 1),
        }
    return row | {"versions": measured.versions}


def run_here(c: Config, program: Program) -> None:
    """Measures one program and prints its row as the last line."""
    if program == "ours":
        measured = ours(c)
    else:
        from torch_peers import PEERS

        measured = PEERS[program](c)
    print(json.dumps(row_of(program, measured)))


def run_apart(c: Config, program: Program) -> dict[str, Any]:
    """The row of a program in a process of its own."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in c.settings().items()]
    command = [sys.executable, __file__, str(c.model), "--only", program, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{program} ended with {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def table(c: Config, rows: list[dict[str, Any]]) -> str:
    """A line for each program, medians over its rounds and steps."""
    lines = [
        "| program | sampling, tokens/s | CPU s | its products, GFLOP per CPU s | "
        "update, s | CPU s | its products, GFLOP per CPU s | whole step, tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    new = c.completions * c.new_tokens
    for program in c.programs:
        own = [row for row in rows if row["program"] == program]
        cells, wall = [], {}
        for phase in ("sample", "update"):
            seconds, cpu, per_cpu = (
                statistics.median(np.ravel([row[phase][name] for row in own]))
                for name in ("wall_s", "cpu_s", "gflop_per_cpu_s")
            )
            wall[phase] = seconds
            first = f"{new / seconds:.0f}" if phase == "sample" else f"{seconds:.1f}"
            cells += [first, f"{cpu:.1f}", f"{per_cpu:.0f}"]
        total = new / (wall["sample"] + wall["update"])
        lines.append(f"| {' | '.join([program, *cells, f'{total:.0f}'])} |")
    return "\n".join(lines)


def main(c: Config) -> None:
    if c.only is not None:
        run_here(c, c.only)
        return
    c.output.mkdir(parents=True, exist_ok=True)
    path, rows = c.output / "rows.jsonl", []
    for number in range(c.rounds):
        for program in c.programs:
            labels = {"round": number, "settings": c.settings()}
            row = find(path, labels | {"program": program})
            if row is None:
                row = run_apart(c, program) | labels
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            rows.append(row)
    print(table(c, rows))


def find(path: Path, labels: dict[str, Any]) -> dict[str, Any] | None:
    """The row of `path` with these labels."""
    for row in read_lines(path):
        if all(row.get(name) == value for name, value in labels.items()):
            return row
    return None


if __name__ == "__main__":
    main(tyro.cli(Config))
