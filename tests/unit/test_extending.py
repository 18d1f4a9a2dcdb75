"""What docs/extending.md names exists, and what it adds works as it says."""

import importlib
import re
from pathlib import Path

import pytest

import grpo_jax as gj
from grpo_jax.objectives.objective import AXES, choices
from grpo_jax.planning.plan import make_plan
from grpo_jax.prompt_weights import WEIGHTS
from tests.golden import axes, test_every_entry

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", GUIDE, re.S)
ADDED = {
    "surrogate": "soft_clip",
    "ratio": "tempered",
    "baseline": "median",
    "scale": "range",
}


@pytest.fixture
def extended(x64):
    """The library and its references with the guide's code appended to its files."""
    registries = [*AXES.values(), *axes.AXES.values(), WEIGHTS, axes.RULES]
    names = {path.removesuffix(".py").replace("/", ".") for path, _ in BLOCKS}
    spaces = [vars(importlib.import_module(name)) for name in names]
    before = [dict(mapping) for mapping in (*registries, *spaces)]
    for path, code in BLOCKS:
        name = path.removesuffix(".py").replace("/", ".")
        exec(code, vars(importlib.import_module(name)))
    yield
    for mapping, old in zip((*registries, *spaces), before, strict=True):
        mapping.clear()
        mapping.update(old)


def test_every_path_of_the_guide_exists():
    paths = set(re.findall(r"[\w./]+/[\w./]+\.(?:py|md)", GUIDE))
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_the_guide_adds_one_of_each_with_its_reference():
    assert len(BLOCKS) == 2 * (len(ADDED) + 1)
    assert [path for path, _ in BLOCKS[1::2]] == ["tests/golden/axes.py"] * 5


@pytest.mark.parametrize("axis", ADDED)
def test_an_entry_of_the_guide_is_what_its_reference_says(axis, extended):
    assert ADDED[axis] in choices()[axis]
    test_every_entry.test_losses_and_gradients(axis, ADDED[axis])


def test_the_guides_rule_is_what_its_reference_says(extended):
    test_every_entry.test_prompt_weights("range")


def test_an_entry_without_a_reference_is_named(extended):
    del axes.AXES["ratio"]["tempered"]
    with pytest.raises(AssertionError, match="add to AXES.*'ratio'.*: tempered"):
        test_every_entry.test_there_is_a_reference_for_every_entry("ratio")


def test_the_guides_task_is_one():
    code = re.search(r"<!-- task -->\n```python\n(.*?)```", GUIDE, re.S)[1]
    exec(code, space := {})
    task = space["task"]
    config = gj.TrainConfig(sampling=gj.SamplingConfig(prompts=4, group_size=4))
    plan = make_plan(config, task)
    assert plan.warm_starts and (len(plan.prompts), plan.max_new_tokens) == (48, 4)
    assert task.reward(task.train[1], task.train[1].answer) == 1
