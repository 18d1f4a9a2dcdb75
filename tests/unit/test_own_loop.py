"""docs/own_loop.md runs, and its loop of equinox learns."""

import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import grpo_jax as gj

GUIDE = (Path(__file__).parents[2] / "docs" / "own_loop.md").read_text()
BLOCKS = dict(re.findall(r"<!-- ([\w-]+) -->\n```python\n(.*?)```", GUIDE, re.S))


def test_every_block_is_named():
    assert len(BLOCKS) == GUIDE.count("```python")


def test_a_loop_of_equinox_learns():
    pytest.importorskip("equinox")
    space = {}
    exec(BLOCKS["equinox"], space)
    history = space["history"]
    assert history[0] < 0.25 and np.mean(history[-20:]) > 0.95


def test_the_other_blocks_in_their_order():
    space, seen = {}, {}
    for name in ("objective", "penalty", "micro-batches", "shard_map"):
        exec(BLOCKS[name], space)
        seen[name] = space["grads"]
    batch, params = space["batch"], space["params"]
    centred = gj.centred_advantages(batch["rewards"])[..., None]  # [P, G, 1]

    def gradient(factors):
        def loss(params):
            logprobs = jax.nn.log_softmax(params)[batch["tokens"]]
            return -(factors * centred * logprobs).mean()

        return jax.grad(loss)(params)

    grpo = gradient(gj.inverse_std(batch["rewards"])[:, None, None])  # on policy
    by_batch = gradient(1 / (batch["rewards"].std() + 1e-6))
    expected = {
        "objective": grpo,
        "penalty": grpo,  # the entropy is at its largest, all tokens equally likely
        "micro-batches": by_batch,
        "shard_map": by_batch,
    }
    chex.assert_trees_all_close(seen, expected, rtol=1e-4, atol=1e-6)
