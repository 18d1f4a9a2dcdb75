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
           up, send back together; here each sends its own. 2026-11-21
Writes:    results/weak_scaling/{config.json,table.jsonl}

The programs are the loop's own (sampling, the weights, one update of a rollout in one
micro-batch), compiled for a mesh and read: what they send is counted where it stands
in the compiled text, as often as it runs, for devices in a ring. Nothing is computed:
seconds on virtual devices that share cores would say nothing. Prompts per group of
tensor devices grow with its size, so that a device always has the same share of work.
`formula` is what grpo_jax/planning/traffic.py expects of the update, over the
parameters' bytes.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import tyro

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


def measure(c: Config, text: str) -> dict:
    """One mesh's row. jax starts with that many devices, so in a process of its own."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    import grpo_jax as gj
    from grpo_jax.models.config import num_parameters
    from grpo_jax.models.policy import abstract_policy
    from grpo_jax.objectives.loss import scale_weights
    from grpo_jax.parallel.sharding import (
        AXES,
        make_mesh,
        on_mesh,
        tree_shardings,
        with_shardings,
    )
    from grpo_jax.planning.traffic import Step, num_devices, prompt_shards, traffic
    from grpo_jax.rollouts.micro_batches import micro_batch
    from grpo_jax.runs.config import MeshConfig, OptimizerConfig
    from grpo_jax.training.optimizer import make_optimizer, make_schedule
    from grpo_jax.training.state import Batch, init_state
    from grpo_jax.training.step import make_train_step
    from grpo_jax.training.weighing import weigh

    sizes = dict(zip(AXES, map(int, text.split("x")), strict=True))
    layout = MeshConfig(**sizes)
    mesh = make_mesh(layout)
    p, g, length, t = (
        c.prompts * num_devices(layout),
        c.group_size,
        c.prompt_tokens,
        c.new_tokens,
    )
    model = gj.ModelConfig(
        vocab_size=c.vocab,
        num_layers=c.layers,
        width=c.width,
        mlp_width=c.mlp_width,
        num_heads=c.heads,
        num_kv_heads=c.kv_heads,
        head_dim=c.head_dim,
    )
    objective = dataclasses.replace(gj.OBJECTIVES[c.objective], kl_coef=0.0)
    rule = scale_weights(objective)
    settings = OptimizerConfig()
    optimizer = make_optimizer(settings, make_schedule(settings, 100))
    shape = jax.ShapeDtypeStruct
    ids, floats = partial(shape, dtype=jnp.int32), partial(shape, dtype=jnp.float32)

    def text_of(function, *arguments, **options):
        return jax.jit(function, **options).lower(*arguments).compile().as_text()

    with on_mesh(mesh):
        policy = with_shardings(abstract_policy(model), mesh)
        prompt, completions = ids((p, length)), ids((p, g, t))
        sampled = partial(gj.sample, group_size=g, max_new_tokens=t, eos_id=1, pad_id=0)
        sampling = text_of(
            lambda policy, prompts, mask, key: sampled(policy, prompts, mask, key=key),
            policy, prompt, prompt, jax.eval_shape(lambda: jax.random.key(0)),
        )  # fmt: skip
        rollouts = gj.Rollouts(
            prompt, prompt, completions, completions, floats((p, g, t)), floats((p, g))
        )
        rollouts = with_shardings(rollouts, mesh)
        weighing = text_of(
            partial(weigh, objective, rule, max_length=t),
            rollouts, None, ids((p,)), jax.eval_shape(rule.init),
        )  # fmt: skip
        share = p // prompt_shards(layout) // c.micro_batches
        micro = micro_batch(p, g, length, t, share * (length + g * t))
        step = make_train_step(
            policy.replace(None),
            objective,
            optimizer,
            micro=micro,
            temperature=1.0,
            max_length=t,
        )
        state = jax.eval_shape(
            lambda params: init_state(params, optimizer, rule), policy.params
        )
        state = with_shardings(state, mesh)
        batch = with_shardings(Batch(rollouts, rollouts.rewards, floats((p,))), mesh)
        lies = (
            {}
            if mesh is None
            else {"out_shardings": (tree_shardings(state, mesh), None)}
        )
        update = text_of(step, state, batch, donate_argnums=0, **lies)

    from grpo_jax.parallel.collectives import KINDS, bytes_sent, parse_collectives

    once, twice = (bytes_sent(sampling, trips=n) for n in (1, 2))
    by_kind = dict.fromkeys(KINDS, 0.0)
    for one in parse_collectives(update):
        by_kind[one.kind] += one.sent
    own = dataclasses.replace(micro, prompts=share, shards=(1, 1))
    expected = traffic(
        model,
        Step(
            prompts=p, group_size=g, prompt_tokens=length, max_new_tokens=t, micro=own
        ),
        layout,
    )
    return {
        "mesh": text,
        "devices": num_devices(layout),
        "prompts": p,
        "tokens": p * (length + g * t),
        "parameters": 4 * num_parameters(model),
        "micro_batches": c.micro_batches,
        "sample_once": once - (twice - once),  # a token's share taken out
        "sample_token": twice - once,
        "weigh": bytes_sent(weighing),
        "update": sum(by_kind.values()),
        "update_by_kind": by_kind,
        "formula": expected.update,
        "step": bytes_sent(sampling, trips=t)
        + bytes_sent(weighing)
        + sum(by_kind.values()),
    }


def in_child(c: Config, mesh: str) -> dict:
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
    """One row of the table: kB, and what an update sends over the parameters."""
    kinds, whole = dict(row["update_by_kind"]), row["parameters"]
    reduced, gathered = kinds.pop("all-reduce"), kinds.pop("all-gather")
    cells = [
        row["mesh"],
        f"{row['tokens']:,}",
        *(f"{row[name] / 1e3:,.1f}" for name in ("sample_once",)),
        *(f"{row[name]:,.0f} B" for name in ("sample_token", "weigh")),
        *(f"{x / 1e3:,.0f}" for x in (reduced, gathered, sum(kinds.values()))),
        f"{row['update'] / whole:.2f}",
        f"{row['formula'] / whole:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


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


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return found or "unknown"


if __name__ == "__main__":
    main(tyro.cli(Config))
