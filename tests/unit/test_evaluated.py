"""How many prompts evaluations ask, and in which batches."""

import dataclasses

import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.evaluation.sampled import prompts_at_a_time
from grpo_jax.planning.evaluated import evaluated_prompts, evaluation_text
from grpo_jax.planning.shapes import Lengths
from grpo_jax.runs.config import (
    EvaluationConfig,
    SamplingConfig,
    TaskConfig,
    TrainConfig,
)


@pytest.fixture(scope="module")
def task():
    task = gj.load_task("chains", train_prompts=300, heldout_prompts=100)
    return dataclasses.replace(task, single_answer=False)


def lengths(prompt, completion):
    return Lengths([], prompt, completion, completion, [])


def asked(task, prompt=160, completion=32, *, heldout=None, p=16, g=16, **evaluation):
    config = TrainConfig(
        task=TaskConfig(heldout_prompts=heldout),
        sampling=SamplingConfig(prompts=p, group_size=g),
        evaluation=EvaluationConfig(**evaluation),
    )
    return config, evaluated_prompts(config, task, lengths(prompt, completion))


def test_an_evaluation_takes_its_share_of_the_steps_before_it(task):
    # A step: 6 x 16 x (160 + 16 x 32) = 64,512 passes over tokens; 5 % of ten: 32,256.
    # A prompt: 2 x (160 + 32) = 384; so 84 prompts, 42 of either part, in eights 40.
    _, chosen = asked(task)
    assert (
        len(chosen.trained) == len(chosen.heldout) == 40 and chosen.sampled(task) == 80
    )
    # Twice the share, and four samples of each: 64,512 / 576 = 112; 56 of either part.
    _, chosen = asked(task, max_overhead=0.1, samples=4)
    assert len(chosen.trained) == len(chosen.heldout) == 56


def test_the_number_has_bounds_and_does_not_depend_on_the_runs_length(task):
    _, few = asked(task, 2000, 10, p=1, g=2)
    assert len(few.trained) == 16
    _, many = asked(task, max_overhead=9.0)
    assert len(many.trained) == 256 and len(many.heldout) == 100
    config, chosen = asked(task)
    longer = dataclasses.replace(config, steps=config.steps * 10)
    again = evaluated_prompts(longer, task, lengths(160, 32))
    for one, two in zip(chosen, again, strict=True):
        np.testing.assert_array_equal(one, two)
    _, ends = asked(task, every=0)  # pays no more than a usual one
    assert len(ends.trained) == 40


def test_numbers_that_are_given_are_kept(task):
    _, chosen = asked(task, prompts=7)
    assert len(chosen.trained) == 7 and len(chosen.heldout) == 100
    _, chosen = asked(task, heldout=100)
    assert len(chosen.trained) == 40 and len(chosen.heldout) == 100
    exact = dataclasses.replace(task, single_answer=True)
    _, chosen = asked(exact)
    assert len(chosen.trained) == 256 and len(chosen.heldout) == 100
    assert chosen.sampled(exact) == 100


def test_prompts_are_chosen_once_each_and_by_the_runs_seed(task):
    config, chosen = asked(task)
    assert len(set(chosen.heldout)) == 40 and chosen.heldout.max() < 100
    other = dataclasses.replace(config, seed=1)
    others = evaluated_prompts(other, task, lengths(160, 32))
    assert set(chosen.heldout) != set(others.heldout)


def test_the_line_says_how_many_of_how_many(task):
    config, chosen = asked(task)
    text = evaluation_text(config, task, chosen)
    assert text == (
        "evaluation: 40 of 300 trained and 40 of 100 held-out prompts, every 10 steps, "
        "at the start and at the end"
    )
    config, chosen = asked(task, heldout=100, every=0, samples=2)
    text = evaluation_text(config, task, chosen)
    assert text.endswith(
        "100 held-out prompts, 2 samples of each, at the start and at the end"
    )


@pytest.mark.parametrize(
    ("rows", "samples", "prompts", "size"),
    [
        (64, 1, 8, 8),  # not 64 rows for 8 prompts
        (64, 1, 3, 8),  # one program for a few
        (64, 1, 65, 40),  # 2 batches of 33, rounded up
        (64, 1, 1319, 64),
        (64, 16, 100, 4),
        (256, 1, 80, 80),
        (5, 1, 100, 5),
        (2, 8, 1, 1),  # one prompt has more samples than rows
    ],
)
def test_batches_are_as_few_and_as_small_as_they_can_be(rows, samples, prompts, size):
    assert prompts_at_a_time(rows, samples, prompts) == size
