"""What each device sends in a step, at constant work per device, on 1 to 8 devices.

Claim:     sampling sends nothing but whether all are done, unless it is split over
           tensor; an update adds up every gradient once, however many tokens a step
           has; so over data and fsdp a device's traffic does not grow with the work.
Command:   python experiments/benchmarks/weak_scaling.py  (--smoke: 1 and 2 devices)
Hardware:  2 CPU cores that play 1, 2, 4 and 8 devices; 2 minutes
Expected:  as claimed
Got:       as claimed: over data the parameters' gradients once, as an all-reduce (1.00,
           1.50 and 1.75 times their bytes on 2, 4 and 8 devices, as the formula has
           it); over fsdp two gathers and one reduce-scatter (1.37, 2.05 and 2.39: below
           the formula, since the embedding is gathered once). Over tensor 1.5 to 1.7
           times the formula, which has one all-reduce for what q, k and v, or gate and
           up, send back together; here each sends one. 2026-11-21
Writes:    results/weak_scaling/{config.json,table.jsonl}

The programs are the trainer's (sampling, the weights, one update of a rollout in one
micro-batch), compiled for a mesh and read: the collectives of the compiled text are
counted as often as they run, for devices in a ring. Nothing is computed: seconds on
virtual devices that share cores would mean nothing. Prompts per group of
tensor devices grow with its size, so that a device always has the same share of work.
`formula` is what grpo_jax/planning/traffic.py expects of the update, over the
parameters' bytes.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from shape import Shape, make_step, model_config

import grpo_jax as gj
from grpo_jax.models.config import num_parameters
from grpo_jax.models.policy import abstract_policy
from grpo_jax.parallel.collectives import KINDS, bytes_sent, parse_collectives
from grpo_jax.parallel.meshes import make_mesh
from grpo_jax.parallel.sharding import (
    AXES,
    on_mesh,
    tree_shardings,
    with_shardings,
)
from grpo_jax.planning.traffic import Step, num_devices, prompt_shards, traffic
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.runs.config import MeshConfig
from grpo_jax.training.state import Batch
from grpo_jax.training.weighing import weigh

MESHES = (
    "1x1x1",
    "2x1x1", "1x2x1", "1x1x2",
    "4x1x1", "1x4x1", "2x2x1", "2x1x2",
    "8x1x1", "1x8x1", "4x2x1", "2x2x2",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    meshes: tuple[str, ...] = MESHES  # data x fsdp x tensor
    prompts: int = 4  # per device
    group_size: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 32  # one loop; the cache does not grow
    layers: int = 4
    width: int = 256
    mlp_width: int = 688
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    vocab: int = 4096
    micro_batches: int = 1  # of an update
    objective: str = "grpo"
    output: str = "results/weak_scaling"
    smoke: bool = False  # up to two devices, a smaller model
    child: str = ""  # one mesh; prints one line of JSON


class Programs(NamedTuple):
    """Compiled text of what a step runs, and the update's micro-batch."""

    sampling: str
    weighing: str
    update: str
    micro: MicroBatch


def compiled_text(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def compile_programs(c: Config, layout: MeshConfig, shape: Shape) -> Programs:
    """Compiles the loop's programs for a mesh, from shapes alone."""
    mesh = make_mesh(layout)
    p, g, length, t = shape
    ids = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    floats = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    with on_mesh(mesh):
        policy = with_shardings(abstract_policy(model_config(c)), mesh)
        share = p // prompt_shards(layout) // c.micro_batches
        made = make_step(policy, c.objective, shape, share * (length + g * t))
        prompt, completions = ids((p, length)), ids((p, g, t))
        sampled = partial(gj.sample, group_size=g, max_new_tokens=t, eos_id=1, pad_id=0)
        sampling = compiled_text(
            lambda policy, prompts, mask, key: sampled(policy, prompts, mask, key=key),
            policy, prompt, prompt, jax.eval_shape(lambda: jax.random.key(0)),
        )  # fmt: skip
        rollouts = gj.Rollouts(
            prompt, prompt, completions, completions, floats((p, g, t)), floats((p, g))
        )
        rollouts = with_shardings(rollouts, mesh)
        weighing = compiled_text(
            partial(weigh, made.objective, made.rule, max_length=t),
            rollouts, None, ids((p,)), jax.eval_shape(made.rule.init),
        )  # fmt: skip
        state = with_shardings(jax.eval_shape(made.init, policy.params), mesh)
        batch = with_shardings(Batch(rollouts, rollouts.rewards, floats((p,))), mesh)
        options = {}
        if mesh is not None:
            options["out_shardings"] = (tree_shardings(state, mesh), None)
        update = compiled_text(made.update, state, batch, donate_argnums=0, **options)
    return Programs(sampling, weighing, update, made.micro)


def measure(c: Config, mesh: str) -> dict:
    """One mesh's row; jax must have been started with that many devices."""
    layout = MeshConfig(**dict(zip(AXES, map(int, mesh.split("x")), strict=True)))
    model = model_config(c)
    prompts = c.prompts * num_devices(layout)
    shape = Shape(prompts, c.group_size, c.prompt_tokens, c.new_tokens)
    programs = compile_programs(c, layout, shape)
    sampling, weighing = programs.sampling, programs.weighing
    once, twice = (bytes_sent(sampling, trips=n) for n in (1, 2))
    by_kind = dict.fromkeys(KINDS, 0.0)
    for one in parse_collectives(programs.update):
        by_kind[one.kind] += one.sent
    share = prompts // prompt_shards(layout) // c.micro_batches
    local = dataclasses.replace(programs.micro, prompts=share, shards=(1, 1))
    step = Step(
        prompts=prompts,
        group_size=c.group_size,
        prompt_tokens=c.prompt_tokens,
        max_new_tokens=c.new_tokens,
        micro=local,
    )
    update = sum(by_kind.values())
    return {
        "mesh": mesh,
        "devices": num_devices(layout),
        "prompts": prompts,
        "tokens": prompts * (c.prompt_tokens + c.group_size * c.new_tokens),
        "parameters": 4 * num_parameters(model),
        "micro_batches": c.micro_batches,
        "sample_once": once - (twice - once),  # a token's share taken out
        "sample_token": twice - once,
        "weigh": bytes_sent(weighing),
        "update": update,
        "update_by_kind": by_kind,
        "formula": traffic(model, step, layout).update,
        "step": bytes_sent(sampling, trips=c.new_tokens)
        + bytes_sent(weighing)
        + update,
    }


def in_child(c: Config, mesh: str) -> dict:
    """`measure` in a process that starts jax with the mesh's number of devices."""
    devices = 1
    for size in mesh.split("x"):
        devices *= int(size)
    flag = f"--xla_force_host_platform_device_count={devices}"
    arguments = []
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if type(value) is int and value != field.default:
            arguments += [f"--{field.name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--objective", c.objective]
        + ["--child", mesh],
        env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{mesh} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


COLUMNS = (
    "| mesh | tokens a step | sampling, once | a token | weigh | all-reduce "
    "| all-gather | other | update / parameters | formula |"
)


def line(row: dict) -> str:
    """A line of the table: kB, and what an update sends over the parameters' bytes."""
    kinds, parameters = dict(row["update_by_kind"]), row["parameters"]
    reduced, gathered = kinds.pop("all-reduce"), kinds.pop("all-gather")
    cells = [
        row["mesh"],
        f"{row['tokens']:,}",
        *(f"{row[name] / 1e3:,.1f}" for name in ("sample_once",)),
        *(f"{row[name]:,.0f} B" for name in ("sample_token", "weigh")),
        *(f"{x / 1e3:,.0f}" for x in (reduced, gathered, sum(kinds.values()))),
        f"{row['update'] / parameters:.2f}",
        f"{row['formula'] / parameters:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    output = subprocess.run(git, capture_output=True, text=True).stdout
    return output.strip() or "unknown"


def main(c: Config) -> None:
    if c.child:
        print(json.dumps(measure(c, c.child)))
        return
    if c.smoke:
        c = dataclasses.replace(
            c, meshes=("1x1x1", "2x1x1", "1x2x1"), layers=2, width=64, mlp_width=96,
            vocab=256,
        )  # fmt: skip
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    config = dataclasses.asdict(c) | {"git": commit()}
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(COLUMNS, f"|{'---|' * (COLUMNS.count('|') - 1)}", sep="\n")
    with (output / "table.jsonl").open("w") as file:
        for mesh in c.meshes:
            row = in_child(c, mesh)
            file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
    print(f"kB sent by a device; parameters {row['parameters'] / 1e3:,.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Config))
