"""Streams of random numbers: every generator and every key made from a seed.

A stream's number decides all its draws. Changing one breaks the exact resumption of
runs that exist; a new stream takes a number that no other has.
"""

import enum
from typing import NamedTuple

import jax
import numpy as np


class Stream(enum.IntEnum):
    """Streams of the host, drawn by numpy; 9 is used by `experiments/common.py`."""

    PUZZLES = 0  # generated prompts: chains, countdown, ladder
    DATA_PARTS = 1  # which rows of a file are trained on, which are held out
    WARM_START_BATCHES = 2
    EVALUATED_PROMPTS = 3  # of the trained prompts, those that training evaluates
    PROMPT_ORDER = 4  # and the epoch
    REFILLS = 5  # prompts in place of tied groups; and the step, the round
    WARM_START_SET_ASIDE = 6  # demonstrations that measure the loss
    EVAL_COMMAND_PROMPTS = 7  # which prompts `grpo-jax eval` asks


def host_rng(seed: int, stream: Stream, *more: int) -> np.random.Generator:
    """The generator of a stream; `more` as listed at the stream, such as the epoch."""
    return np.random.default_rng([seed, int(stream), *more])


class RunKeys(NamedTuple):
    """A run's PRNG keys; the position of a field is its stream's number."""

    init: jax.Array  # parameters of a model without weights
    samples: jax.Array  # training completions; folded with the step
    evaluation: jax.Array  # completions of evaluations; folded with the step
    drafts: jax.Array  # first attempts that a refinement starts from
    refills: jax.Array  # completions of refills; folded with step and round
    probe: jax.Array  # the instrument's draws; folded with the step
    lora: jax.Array  # LoRA factors


def run_keys(seed: int) -> RunKeys:
    """The typed keys fold_in(key(seed), i), i = 0 to 6."""
    root = jax.random.key(seed)
    return RunKeys._make(
        jax.random.fold_in(root, i) for i in range(len(RunKeys._fields))
    )
