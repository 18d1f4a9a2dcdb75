"""What a step of a large model would hold, send and take on many chips, on paper.

Claim:     none; formulas of grpo_jax/planning/traffic.py with numbers put in
Command:   python experiments/benchmarks/on_paper.py [--plan 70b]
Hardware:  none; nothing here was run on such chips
Expected:  fits in a chip's memory; most of the time not in communication
Got:       8 B on 64: peak 49.6 of 80 GB, communication 8 % of an update and 3 % of a
           step; 70 B on 512: 65.6 of 80 GB, 38 % and 26 %, most of it gathers over
           the network
Writes:    nothing; --json prints one line

Assumed, each a setting: an H100 SXM has 80e9 bytes, 989e12 bfloat16 operations a second
of which an update gets 40 %, 3.35e12 bytes a second of memory of which sampling gets
60 %; 450e9 bytes a second each way to the 7 others of its node, 50e9 to other nodes, of
which 80 % arrive. Axes are laid innermost first, tensor, fsdp, data: one that stays
within a node has the node's links. Nothing overlaps, so the share of communication is
an upper bound. Every completion has full length; no reference policy, no instrument, no
time to score.
"""

import dataclasses
import json
from typing import Literal

import tyro

import grpo_jax as gj
from grpo_jax.models.config import num_parameters
from grpo_jax.planning.memory import Memory, readable
from grpo_jax.planning.traffic import (
    Step,
    Traffic,
    memory_per_device,
    micro_batches,
    num_devices,
    sampling_seconds,
    traffic,
    update_seconds,
)
from grpo_jax.rollouts.micro_batches import MicroBatch
from grpo_jax.runs.config import MeshConfig

_LLAMA = dict(
    vocab_size=128256, head_dim=128, num_kv_heads=8, tie_embeddings=False,
    compute_dtype="bfloat16", remat="full",
)  # fmt: skip
# Shapes of Llama 3.1; (data, fsdp, tensor); prompts of a step.
PLANS = {
    "8b": (
        dict(num_layers=32, width=4096, mlp_width=14336, num_heads=32),
        (8, 8, 1),
        128,
    ),
    "70b": (
        dict(num_layers=80, width=8192, mlp_width=28672, num_heads=64),
        (4, 16, 8),
        256,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    plan: Literal["8b", "70b"] = "8b"
    data: int | None = None  # default: the plan's
    fsdp: int | None = None
    tensor: int | None = None
    prompts: int | None = None
    group_size: int = 16
    prompt_tokens: int = 512
    new_tokens: int = 2048
    micro_prompts: int = 1  # of a group of tensor devices
    micro_samples: int | None = None  # default: the most that fit
    memory: float = 80e9  # bytes
    flops: float = 989e12
    mfu: float = 0.4
    memory_bandwidth: float = 3.35e12
    memory_use: float = 0.6
    node: int = 8  # chips
    node_bandwidth: float = 450e9  # bytes a second, one way
    network_bandwidth: float = 50e9
    link_use: float = 0.8
    json: bool = False


def fitting_step(
    c: Config, prompts: int, model: gj.ModelConfig, mesh: MeshConfig
) -> tuple[Step, Memory]:
    """(step, memory of a chip) with the largest micro-batch that fits, or the smallest.

    prompts: of the step, where the settings have no number.
    """
    options = [n for n in range(c.group_size, 0, -1) if c.group_size % n == 0]
    for samples in [c.micro_samples] if c.micro_samples else options:
        step = Step(
            prompts=c.prompts or prompts,
            group_size=c.group_size,
            prompt_tokens=c.prompt_tokens,
            max_new_tokens=c.new_tokens,
            micro=MicroBatch(c.micro_prompts, samples),
        )
        memory = memory_per_device(model, step, mesh)
        if memory.peak <= 0.9 * c.memory:
            break
    return step, memory


def seconds_sending(
    c: Config, step: Step, sent: Traffic, mesh: MeshConfig
) -> dict[str, float]:
    """Seconds of communication of an update, by axis of the mesh, and of sampling."""

    def link(inner, ways):
        within = inner * ways <= c.node
        return c.link_use * (c.node_bandwidth if within else c.network_bandwidth)

    tensor = link(1, mesh.tensor)
    fsdp = link(mesh.tensor, mesh.fsdp)
    data = link(mesh.tensor * mesh.fsdp, mesh.data)
    # Weights are gathered over fsdp once to sample; the rest of it is tensor's.
    once = sent.gathers / (2 * micro_batches(step, mesh))
    return {
        "fsdp": (sent.gathers + sent.scatters) / fsdp,
        "data": sent.data / data,
        "tensor": sent.tensor / tensor,
        "sampling": once / fsdp + (sent.sampling - once) / tensor,
    }


def plan(c: Config) -> dict:
    shape, sizes, prompts = PLANS[c.plan]
    model = gj.ModelConfig(**_LLAMA, **shape)
    given = c.data, c.fsdp, c.tensor
    sizes = [x or y for x, y in zip(given, sizes, strict=True)]
    mesh = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    step, memory = fitting_step(c, prompts, model, mesh)
    sent = traffic(model, step, mesh)
    wires = seconds_sending(c, step, sent, mesh)
    update = update_seconds(model, step, mesh, flops=c.flops * c.mfu)
    sampling = sampling_seconds(
        model, step, mesh, bytes_a_second=c.memory_bandwidth * c.memory_use
    )
    in_update = sum(wires.values()) - wires["sampling"]
    return {
        "plan": c.plan,
        "parameters": num_parameters(model),
        "devices": num_devices(mesh),
        "mesh": "x".join(map(str, sizes)),
        "prompts": step.prompts,
        "tokens": step.tokens,
        "micro": [step.micro.prompts, step.micro.samples],
        "micro_batches": micro_batches(step, mesh),
        "held": memory.state,
        "phases": memory.phases(),
        "peak": memory.peak,
        "received": sent._asdict() | {"update": sent.update},
        "seconds": {"sampling": sampling, "update": update},
        "seconds_sending": wires,
        "share_of_update": in_update / (in_update + update),
        "share_of_sampling": wires["sampling"] / (wires["sampling"] + sampling),
        "share_of_step": sum(wires.values())
        / (sum(wires.values()) + update + sampling),
    }


def text(c: Config, x: dict) -> str:
    received, wires = x["received"], x["seconds_sending"]
    seconds, size = x["seconds"], readable
    return "\n".join(
        [
            f"{size(x['parameters'])} parameters on {x['devices']} chips, data x fsdp "
            f"x tensor {x['mesh']}; {x['prompts']} prompts x {c.group_size} samples, "
            f"{c.prompt_tokens} + {c.new_tokens} tokens, {size(x['tokens'])} a step",
            f"memory of a chip: {size(x['held'], 'B')} state + "
            + ", ".join(f"{k} {size(v, 'B')}" for k, v in x["phases"].items() if v)
            + f"; peak {size(x['peak'], 'B')} of {size(c.memory, 'B')}",
            f"micro-batches: {x['micro_batches']} of {x['micro'][0]} x {x['micro'][1]}",
            "a chip receives in an update: "
            + ", ".join(
                f"{name} {size(received[name], 'B')}"
                for name in ("gathers", "scatters", "data", "tensor")
            )
            + f", in all {size(received['update'], 'B')}; "
            f"in sampling {size(received['sampling'], 'B')}",
            f"update {seconds['update']:.1f} s of arithmetic, on the wires fsdp "
            f"{wires['fsdp']:.1f} s, data {wires['data']:.1f} s, tensor "
            f"{wires['tensor']:.1f} s: {100 * x['share_of_update']:.0f} %",
            f"sampling {seconds['sampling']:.1f} s of reading, "
            f"{wires['sampling']:.1f} s on the wires: "
            f"{100 * x['share_of_sampling']:.0f} %",
            f"communication is {100 * x['share_of_step']:.0f} % of a step, at most",
        ]
    )


if __name__ == "__main__":
    config = tyro.cli(Config)
    result = plan(config)
    print(json.dumps(result) if config.json else text(config, result))
