"""A `gj.Task` made in code: what is wrong with it is said before a run starts."""

import dataclasses

import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.planning.plan import make_plan
from grpo_jax.rollouts.demonstrations import Demonstrations

LETTERS = "abcd"
ALL = [gj.Example(x + y, x) for x in LETTERS for y in LETTERS]
GOOD = dict(
    name="first",
    train=ALL[:12],
    heldout=ALL[12:],
    tokenizer=gj.character_tokenizer(LETTERS),
    reward=lambda example, completion: float(completion == example.answer),
)


def config(**changes):
    sampling = gj.SamplingConfig(prompts=4, group_size=4)
    warm = gj.WarmStartConfig(enabled=False)
    return gj.TrainConfig(steps=1, sampling=sampling, warm_start=warm, **changes)


def planned(**fields):
    return make_plan(config(), gj.Task(**(GOOD | fields)))


def demonstrations(rng, count, siled):
    return ALL[:count]


def warm_start(**fields):
    return gj.WarmStart(**(dict(demonstrations=demonstrations, max_steps=9) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(train="ab"), r"task.train must be a list of Examples, got 'ab'; give \["),
        (dict(heldout={"ab": "a"}), r"task.heldout must be a list .*got {'ab': 'a'}"),
        (dict(train=[("ab", "a")]), r"task.train\[0\] must be an Example, got \('ab',"),
        (dict(train=[gj.Example("ab", 3)]), r"train\[0\].answer must be text, got 3; "),
        (dict(train=[gj.Example(3, "a")]), r"train\[0\].prompt must be text, got 3"),
        (dict(train=[gj.Example("a", "b", None)]), "solution must be text, got None"),
        (dict(train=[gj.Example("a", "b", tags="x")]), "tags must be a tuple of pairs"),
        (dict(train=[gj.Example("a", "b", context=("u", "v"))]), "context must be a"),
        (
            dict(tokenizer="gpt2"),
            "task.tokenizer must be a tokenizer, got 'gpt2'; gj.",
        ),
        (
            dict(reward="m:f"),
            r"task.reward must be a function .*got 'm:f'; for",
        ),
        (dict(reward=("exact",)), "or a tuple of Rewards, got .'exact',"),
        (dict(reward=gj.Reward(name="exact")), "or a tuple of Rewards, got Reward"),
        (dict(reward=()), r"or a tuple of Rewards, got \(\)"),
        (
            dict(reward=(gj.Reward(name="exakt"),)),
            "unknown reward 'exakt'; did you",
        ),
        (dict(eos_ids=3), "task.eos_ids must be a list of values, got 3"),
        (dict(eos_ids=("1",)), "task.eos_ids must be a whole number, got '1'"),
        (dict(eos_ids=(1, -3)), r"eos_ids must be tokens of .*got \(1, -3\); leave"),
        (
            dict(warm_start=True),
            r"task.warm_start must be a WarmStart, got True; l",
        ),
        (dict(name=3), "task.name must be text, got 3"),
        (dict(control_tokens="no"), "control_tokens must be one of spell, keep, got"),
        (dict(template_arguments=["a"]), r"task.template_arguments must be a Mapping"),
        (dict(single_answer="yes"), "task.single_answer must be true or false, got"),
        (dict(warnings="abc"), "task.warnings must be a list of values, got 'abc'"),
    ],
)
def test_fields_of_a_task_have_their_types(fields, message):
    with pytest.raises(ConfigError, match=message):
        gj.Task(**(GOOD | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(demonstrations=ALL), "demonstrations must be a function of .rng, count"),
        (
            dict(demonstrations=lambda rng: ALL),
            "must be a function of .rng, count, s",
        ),
        (dict(max_steps=0), "warm_start.max_steps must be at least 1, got 0"),
        (dict(max_steps="9"), "warm_start.max_steps must be a whole number, got '9'"),
        (dict(learning_rate=-1.0), "warm_start.learning_rate must be positive, got -1"),
        (dict(target_pass_rate=40), r"target_pass_rate must be in \(0, 1\], got 40"),
        (dict(longest="abc"), "warm_start.longest must be an Example, got 'abc'"),
    ],
)
def test_fields_of_a_warm_start_have_their_types(fields, message):
    with pytest.raises(ConfigError, match=message):
        warm_start(**fields)


def test_what_demonstrations_give_is_examples():
    wrong = warm_start(demonstrations=lambda rng, count, siled: [("ab", "a")])
    drawn = Demonstrations(gj.Task(**GOOD), wrong, 8, 8)
    with pytest.raises(ConfigError, match=r"demonstrations gives\[0\] must be an Exam"):
        drawn.batch(np.random.default_rng(0), False)


def test_lists_and_tuples_will_both_do():
    task = gj.Task(
        **(GOOD | dict(train=tuple(ALL[:12]), reward=[gj.Reward(name="exact")]))
    )
    assert task.train == ALL[:12] and task.reward == (gj.Reward(name="exact"),)
    assert not task.graded


def test_an_end_outside_the_vocabulary_is_refused():
    """<pad>, <eos> and five letters: 0 to 6."""
    tokenizer = gj.character_tokenizer(LETTERS + "e")
    assert planned(eos_ids=(1, 6), tokenizer=tokenizer).task.ends == (1, 6)
    with pytest.raises(ConfigError, match=r"from 0 to 6, got \(1, 7\); leave them out"):
        planned(eos_ids=(1, 7), tokenizer=tokenizer)


def test_a_prompt_in_both_parts_is_only_evaluated():
    """ALL[8:12] are in both; white space after a prompt does not tell prompts apart."""
    heldout = [x._replace(prompt=x.prompt + "\n") for x in ALL[8:]]
    plan = planned(heldout=heldout, tokenizer=gj.character_tokenizer(LETTERS + "\n"))
    assert plan.task.train == ALL[:8] and plan.task.heldout == heldout
    assert len(plan.prompts) == 8
    assert any("4 of 12 trained prompts are held-out" in x for x in plan.warnings)
    assert not any("held-out ones" in x for x in planned().warnings)
    with pytest.raises(ConfigError, match="all 12 trained prompts of task first are"):
        planned(heldout=ALL)


def test_a_task_is_checked_again_when_it_is_replaced():
    task = gj.Task(**GOOD)
    with pytest.raises(ConfigError, match="task.train must be a list of Examples"):
        dataclasses.replace(task, train="abc")
