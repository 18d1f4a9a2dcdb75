"""Checks on eight virtual devices: `python -m tests.e2e.on_devices CHECK ...`.

The number of devices is fixed when jax starts, so each check is a process, or, by
PROCESSES="PORT COUNT INDEX", several. Prints one line of JSON.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import grpo_jax as gj
from grpo_jax.commands.replay import replay
from grpo_jax.objectives.loss import scale_weights
from grpo_jax.parallel.collectives import parse_collectives
from grpo_jax.parallel.meshes import make_mesh
from grpo_jax.parallel.processes import LostProcessError, exit_at_once, gather_to_host
from grpo_jax.parallel.sharding import (
    AXES,
    on_mesh,
    put_on_mesh,
    tree_shardings,
    with_shardings,
)
from grpo_jax.planning.optimizer import make_optimizer
from grpo_jax.rollouts.micro_batches import micro_batch
from grpo_jax.rollouts.sampling import sample
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.config import (
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    InstrumentConfig,
    LogConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
)
from grpo_jax.runs.lines import read_lines
from grpo_jax.runs.paths import use_compile_cache
from grpo_jax.training import journal
from grpo_jax.training.state import Batch
from grpo_jax.training.weighing import weigh
from tests.e2e.undrawn import savefig
from tests.helpers import (
    bfloat16_errors,
    one_update,
    random_prompts,
    random_rollouts,
    tiny_policy,
    train_step,
    weighed,
)

PORT, COUNT, INDEX = map(int, os.environ.get("PROCESSES", "0 1 0").split())
AS_RUN = ("programs", "memory")  # checks of programs as they are compiled outside tests
if sys.argv[1] in AS_RUN:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = flags.replace("--xla_cpu_use_fusion_emitters=false", "")
chex.set_n_cpu_devices(8 // COUNT)  # raises if jax has been started

OBJECTIVE = gj.OBJECTIVES["dr_grpo"]


def keep_programs_of_every_process():
    """Their keys tell processes apart, but jax writes the first's only."""
    from jax._src import compiler

    first = SimpleNamespace(process_id=0, client=None)
    compiler.distributed = SimpleNamespace(global_state=first)


def mesh_of(text):
    sizes = map(int, text.split("x"))
    return make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))


def one_step(mesh, p, g, budget, optimizer, **changes):
    policy = tiny_policy(**changes)
    optimizer = make_optimizer(optimizer, optax.constant_schedule(1e-2))
    with on_mesh(mesh):
        policy = put_on_mesh(policy, mesh)
        rollouts = random_rollouts(policy, p, g)
        batch = weighed(gj.OBJECTIVES["grpo"], put_on_mesh(rollouts, mesh))
        micro = micro_batch(p, g, 5, 7, budget)
        state, _ = one_update(policy, gj.OBJECTIVES["grpo"], batch, micro, optimizer)
        return gather_to_host((rollouts.completions, state.params, state.opt_state))


def same_step(text, p, g, tied, name="adamw"):
    """Largest differences of a mesh's samples and update from one device's."""
    changes = {} if tied == "tied" else {"tie_embeddings": False, "vocab_size": 20}
    if name == "adafactor":  # which takes means over axes of 128 or more
        changes |= {"width": 128, "mlp_width": 256}
    p, g, optimizer = int(p), int(g), OptimizerConfig(name=name)
    expected = one_step(None, p, g, 10**6, optimizer, **changes)
    actual = one_step(mesh_of(text), p, g, 30, optimizer, **changes)
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), actual, expected)
    return {
        "tokens": gaps[0],
        "params": max(jax.tree.leaves(gaps[1])),
        "moments": max(jax.tree.leaves(gaps[2])),
    }


def offloaded(text):
    """Two steps of a mesh with the reference on the devices and on the host: whether
    all numbers are equal, and where the host's lies."""
    mesh, policy = mesh_of(text), tiny_policy()
    rollouts = random_rollouts(policy, 8, 4)
    kl, ends = dataclasses.replace(gj.OBJECTIVES["grpo"], kl_coef=1.0), {}
    for memory in ("device", "host"):
        learner = gj.Learner(kl, optax.sgd(0.1), reference_memory=memory, mesh=mesh)
        state = learner.init(policy)
        for _ in range(2):
            state, metrics = learner.step(state, rollouts)
        reference = learner.settings.reference
        ends[memory] = gather_to_host((state.params, metrics))
    host, device = jax.tree.leaves(ends["host"]), jax.tree.leaves(ends["device"])
    lies = jax.tree.map(lambda x: x.sharding, reference.params)
    placed = tree_shardings(reference.params, mesh)
    return {
        "equal": all((a == b).all() for a, b in zip(host, device, strict=True)),
        "kl": float(ends["host"][1]["kl/mean"]),
        "kinds": sorted({x.memory_kind for x in jax.tree.leaves(lies)}),
        "as_placed": all(
            x.spec == y.spec
            for x, y in zip(jax.tree.leaves(lies), jax.tree.leaves(placed), strict=True)
        ),
    }


def programs(text):
    """Collectives of sampling, of the weights and of the update, P = 8 and G = 4."""
    mesh, p, g = mesh_of(text), 8, 4
    policy, rule = tiny_policy(vocab_size=256), scale_weights(OBJECTIVE)
    shape, ids = jax.ShapeDtypeStruct, jnp.int32
    found = {}

    def add(name, lowered):
        found[name] = parse_collectives(lowered.compile().as_text(), trips=1000)

    with on_mesh(mesh):
        policy = put_on_mesh(policy, mesh)
        prompts, mask = random_prompts(p, 5)
        sampled = partial(sample, group_size=g, max_new_tokens=7, eos_id=1, pad_id=0)
        key = jax.random.key(0)
        add("sample", jax.jit(sampled).lower(policy, prompts, mask, key=key))
        group = shape((p, g, 7), ids)
        rollouts = gj.Rollouts(
            shape((p, 5), ids),
            shape((p, 5), ids),
            group,
            group,
            shape((p, g, 7), jnp.float32),
            shape((p, g), jnp.float32),
        )
        rollouts = with_shardings(rollouts, mesh)
        weights = jax.jit(partial(weigh, OBJECTIVE, rule, max_length=7))
        add("weigh", weights.lower(rollouts, None, shape((p,), ids), rule.init()))
        batch = Batch(rollouts, rollouts.rewards, shape((p,), jnp.float32))
        batch = with_shardings(batch, mesh)
        step, init = train_step(policy, OBJECTIVE, micro_batch(p, g, 5, 7, 10**6))
        state = put_on_mesh(init(policy.params), mesh)
        out_shardings = tree_shardings(state, mesh), None
        update = jax.jit(step, out_shardings=out_shardings)
        add("update", update.lower(state, batch))
    leaves = jax.tree.leaves(policy.params)
    found["parameters"] = sum(x.nbytes for x in leaves)
    found["embedding"] = policy.params["embedding"]["embedding"].nbytes
    return found


def whole_run(directory, text, steps, *options):
    """A run, or its continuation; its samples by step and prompt.

    Options: "resume"; a method of `OBJECTIVES`; "host", where its reference lies;
    "binary" rewards; "lora"; "look"; what becomes of the last process, "hang", "die"
    or "signal"; "full-3": the first's disk is, from the third step's line on;
    "unsaved": its second checkpoint fails.
    """
    from tests.e2e.test_train import digits_task, small_config

    sizes = dict(zip(AXES, map(int, text.split("x")), strict=True))
    where = DistributedConfig()
    if COUNT > 1:
        where = DistributedConfig(
            coordinator=f"127.0.0.1:{PORT}",
            processes=COUNT,
            process=INDEX,
            heartbeat_s=30,
            timeout_s=40 if "hang" in options else 300,
        )
    method = next((name for name in options if name in gj.OBJECTIVES), "dr_grpo")
    lora = dict(lora_rank=2) if "lora" in options else {}
    config = small_config(
        directory,
        steps=int(steps),
        resume="resume" in options,
        reference_memory="host" if "host" in options else "device",
        mesh=MeshConfig(**sizes),
        distributed=where,
        model=gj.ModelConfig(width=16, mlp_width=24, head_dim=4, **lora),
        objective=ObjectiveConfig(name=method),
        sampling=SamplingConfig(prompts=8, group_size=4),
        evaluation=EvaluationConfig(every=0, prompts=16),
        instrument=InstrumentConfig(every=2 if "look" in options else 0, prompts=2),
        log=LogConfig(samples_every=1, samples_prompts=8),
        checkpoint=CheckpointConfig(every=2, keep=3),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    task, calls = digits_task(), iter(range(10**6))
    partial_credit = task.reward

    def reward(example, completion):
        if INDEX == COUNT - 1 and next(calls) == 1 + 70:  # one tries it
            if "hang" in options:
                time.sleep(600)
            if "die" in options:
                os.kill(os.getpid(), signal.SIGKILL)
            if "signal" in options:
                os.kill(os.getpid(), signal.SIGTERM)
        found = partial_credit(example, completion)
        return float(found > 0.5) if "binary" in options else found

    task = dataclasses.replace(task, reward=reward)
    full = [name for name in options if name.startswith("full-")]
    if "unsaved" in options and INDEX == 0:
        # Nothing can be saved at step 2: a file is in place of the directory.
        save = Checkpoints.save

        def hindered(self, step, *arguments):
            place = self._directory
            if step == 2:
                place.rename(place.with_name("aside"))
                place.write_text("")
            save(self, step, *arguments)
            if step == 2:
                place.unlink()
                place.with_name("aside").rename(place)

        Checkpoints.save = hindered
    if full:
        Full.since = int(full[0].partition("-")[2])
        journal.JsonLines = Full
    result = gj.train(config, task=task)
    rows = read_lines(result.run_dir / "metrics.jsonl")
    looks = read_lines(result.run_dir / "instrument.jsonl")
    return {
        "finished": result.finished,
        "samples": {
            f"{row['step']} {row['prompt']}": row["completions"]
            for row in read_lines(result.run_dir / "samples.jsonl")
        },
        "rewards": [row["reward/mean"] for row in rows[1:]],
        "norms": [row["gradient/norm"] for row in rows[1:]],
        "tokens": [row["tokens/sampled"] for row in rows[1:]],
        "refilled": [row.get("group/refilled", 0) for row in rows[1:]],
        "heldout": rows[-1].get("eval/heldout_pass_rate"),
        "looks": [row["geometry"]["raw_squared_norms"] for row in looks],
        "compiles": [row["compiles"] for row in rows],
    }


class Full(journal.JsonLines):
    """The disk is full from a step's line on."""

    since: int

    def write(self, row):
        if self._path.stem == "metrics" and row["step"] >= self.since:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, self._file.fileno())
            os.close(full)
        super().write(row)


def replayed(directory, step):
    """Fields of a step's line that differ when the step is replayed."""
    from tests.e2e.test_train import digits_task

    return replay(directory, int(step), task=digits_task()).differing


def bfloat16(text, name):
    """Relative errors of an update's gradient in bfloat16, by leaf."""
    return bfloat16_errors(name, mesh_of(text))


def memory(text):
    """(predicted, XLA's) bytes on a device, of an update and of sampling."""
    from tests.unit.test_memory_analysis import memory_of

    config = gj.ModelConfig(
        vocab_size=4096, num_layers=6, width=256, mlp_width=768, num_heads=8,
        num_kv_heads=8, head_dim=32,
    )  # fmt: skip
    mesh = mesh_of(text)
    with on_mesh(mesh):
        micro = micro_batch(32, 8, 64, 64, 1024)
        return memory_of(config, 32, 8, 64, 64, micro, mesh=mesh)


if __name__ == "__main__":
    if COUNT > 1 and sys.argv[1] != "whole_run":  # which joins the others itself
        jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, INDEX)
    use_compile_cache()
    keep_programs_of_every_process()
    checks = (same_step, offloaded, programs, whole_run, replayed, bfloat16, memory)
    check = {function.__name__: function for function in checks}
    if sys.argv[1] not in AS_RUN:
        jax.config.update("jax_disable_most_optimizations", True)
    Figure.savefig = savefig
    try:
        print(json.dumps(check[sys.argv[1]](*sys.argv[2:])))
    except LostProcessError as error:
        exit_at_once(str(error))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
