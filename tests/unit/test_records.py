"""Records of settings take what a user writes for a field, or refuse it by name."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.records import Record, field_types, overlaid
from grpo_jax.runs import config as configs
from grpo_jax.runs.config import OptimizerConfig, SamplingConfig, TaskConfig

CLASSES = [
    x for x in vars(configs).values() if isinstance(x, type) and issubclass(x, Record)
]
CLASSES = [x for x in CLASSES if x is not Record]
NEEDED = {"EvalConfig": {"pretrained": "x"}, "WarmupConfig": {"output": "x"}}
FIELDS = [(cls, name) for cls in CLASSES for name in field_types(cls)]


def made(cls, **fields):
    return cls(**NEEDED.get(cls.__name__, {}) | fields)


def test_every_config_is_a_record():
    named = {x for x in vars(configs) if x.endswith("Config")}
    assert named == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize(
    ("cls", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x)
)
def test_no_field_takes_what_it_is_not(cls, name):
    for wrong in (object(), {1: 2}, b"x"):
        with pytest.raises(ConfigError, match=rf"{name}\b.* must be|'{name}.1'"):
            made(cls, **{name: wrong})
    if type(None) not in get_args(field_types(cls)[name]):
        with pytest.raises(ConfigError, match=rf"{name} must be .*, got None"):
            made(cls, **{name: None})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sampling": {"prompts": 4}}, {"sampling": SamplingConfig(prompts=4)}),
        ({"task": {"rewards": ["math"]}}, {"task": TaskConfig(rewards=("math",))}),
        ({"steps": np.int64(3)}, {"steps": 3}),
        ({"run_dir": Path("a") / "b"}, {"run_dir": "a/b"}),
        ({"objective": {"clip": [0, 1]}}, {"objective": {"clip": (0.0, 1.0)}}),
        (
            {"model": {"compute_dtype": jnp.bfloat16}},
            {"model": {"compute_dtype": "bfloat16"}},
        ),
    ],
)
def test_what_is_meant_is_taken(fields, expected):
    assert gj.TrainConfig(**fields) == gj.TrainConfig(**expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling": {"prompts": "4"}}, "^sampling.prompts must be a whole number"),
        ({"sampling": {"prompt": 4}}, "unknown config key 'sampling.prompt'; did you"),
        ({"sampling": {"prompts": 0}}, "^sampling.prompts must be at least 1, got 0"),
        ({"model": {"head_dim": 3}}, "^model.head_dim must be even, got 3"),
        ({"sampling": SamplingConfig}, "^sampling must be a mapping, got <class"),
        ({"task": OptimizerConfig()}, "^task must be a TaskConfig, got .*; a Task of"),
        ({"steps": "many"}, "^steps must be a whole number, got 'many'"),
        ({"steps": 3.0}, r"^steps must be a whole number, got 3\.0"),
        ({"steps": True}, "^steps must be a whole number, got True"),
        ({"optimizer": {"learning_rate": "1e-4"}}, "learning_rate must be a number"),
        ({"task": {"rewards": "math"}}, "^task.rewards must be a list of values, got"),
    ],
)  # fmt: skip
def test_the_field_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        gj.TrainConfig(**fields)


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16", jnp.zeros(1, "bfloat16").dtype],
)
def test_dtypes_are_what_jax_takes(dtype):
    assert gj.ModelConfig(compute_dtype=dtype).compute_dtype == "bfloat16"
    config = gj.EvalConfig(pretrained="x", compute_dtype=dtype)
    assert config.compute_dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [jnp.float16, np.float64, float, int, "half", 3])
def test_another_dtype_lists_the_choices(dtype):
    message = "compute_dtype must be one of float32, bfloat16, got "
    with pytest.raises(ConfigError, match=message):
        gj.ModelConfig(compute_dtype=dtype)


def test_an_objective_is_as_strict():
    grpo = gj.OBJECTIVES["grpo"]
    assert dataclasses.replace(grpo, clip=[0.1, 0.2]).clip == (0.1, 0.2)
    for field, wrong in (("clip", 0.2), ("kl_coef", "0"), ("disjoint", 1)):
        with pytest.raises(ValueError, match=f"{field} must be"):
            dataclasses.replace(grpo, **{field: wrong})


def test_what_was_given_lies_over_what_was_not():
    base = gj.TrainConfig(steps=7, sampling={"prompts": 4, "group_size": 8})
    over = gj.TrainConfig(seed=3, sampling={"prompts": 16})
    assert overlaid(base, over) == gj.TrainConfig(
        steps=7, seed=3, sampling={"prompts": 16, "group_size": 8}
    )
    assert overlaid(base, gj.TrainConfig()) == base
    for same in (
        copy.copy(over),
        copy.deepcopy(over),
        pickle.loads(pickle.dumps(over)),
    ):
        assert same == over and same.given == over.given == {"seed", "sampling"}
