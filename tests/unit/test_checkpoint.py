"""A checkpoint is read whole or not at all, whichever of its files is damaged."""

import gc
import logging
import os
import shutil
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.params import restore_params

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # What a failed read leaves in orbax's event loop.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(autouse=True)
def collected():
    """What a failed read left behind is warned of here, not in a later test."""
    yield
    gc.collect()


class State(NamedTuple):
    params: Any
    updates: Any


def state_of(step):
    params = {"a": jnp.arange(64.0) + step, "b": {"c": jnp.full((4, 4), step)}}
    return State(params, jnp.asarray(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, keep=2, warn=print) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {"step": step}, None)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restored(directory, **options):
    """(step, warnings), the arrays being those of that step."""
    said = []
    with Checkpoints(directory, keep=2, warn=said.append, **options) as checkpoints:
        state, data = checkpoints.restore(state_of(0))
    expected = state_of(data["step"])
    np.testing.assert_array_equal(state.params["a"], expected.params["a"])
    np.testing.assert_array_equal(state.params["b"]["c"], expected.params["b"]["c"])
    assert int(state.updates) == data["step"]
    return data["step"], said


def test_newest_is_restored(copy):
    assert restored(copy) == (2, [])


@pytest.mark.parametrize("damage", ["halved", "emptied", "deleted"])
def test_every_file_may_be_damaged(saved, tmp_path, damage):
    """Values are never wrong: a file that matters costs one checkpoint, and is said."""
    names = [path.relative_to(saved) for path in (saved / "2").rglob("*")]
    files = [name for name in names if (saved / name).is_file()]
    assert len(files) > 8
    passed_over = 0
    for i, name in enumerate(files):
        directory = shutil.copytree(saved, tmp_path / str(i) / "checkpoints")
        size = (directory / name).stat().st_size
        if damage == "deleted":
            (directory / name).unlink()
        else:
            os.truncate(directory / name, size // 2 if damage == "halved" else 0)
        step, said = restored(directory)
        if step == 1:
            passed_over += 1
            assert any("checkpoint of step 2 cannot be read" in line for line in said)
            assert not (directory / "2").exists()  # its step can be saved again
    assert passed_over >= 3  # of the manifest, the arrays and the data position


def test_newest_may_be_gone(copy):
    shutil.rmtree(copy / "2")
    assert restored(copy) == (1, [])


def test_strays_are_no_checkpoints(copy):
    (copy / "77").mkdir()
    (copy / "88").write_text("a file")
    (copy / "notes.txt").write_text("a file")
    (copy / "3.orbax-checkpoint-tmp").mkdir()
    step, said = restored(copy)
    assert step == 2 and any("step 77 cannot be read" in line for line in said)


def test_nothing_is_changed_by_reading(copy):
    (copy / "77").mkdir()
    (copy / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(copy.rglob("*"))
    assert restored(copy, read_only=True)[0] == 2
    assert sorted(copy.rglob("*")) == before


def test_none_readable_is_an_error(copy):
    for step in ("1", "2"):
        shutil.rmtree(copy / step / "state")
    with pytest.raises(ConfigError, match="nothing was changed"):
        restored(copy)
    assert (copy / "1").is_dir() and (copy / "2").is_dir()


def test_parameters_are_read_alone_and_in_silence(saved, caplog):
    params = restore_params(saved / "2")
    chex.assert_trees_all_equal(params, state_of(2).params)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
