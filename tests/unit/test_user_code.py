"""Objects of a user's own: found, named, told apart."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax as gj
from grpo_jax.cli import main
from grpo_jax.errors import ConfigError
from grpo_jax.user_code import code_digest, digest, find_object, name_of


def rule(power):
    return gj.PromptWeights(
        lambda: (), lambda rewards, state: (rewards.mean(1) ** power, state)
    )


def test_objects_are_found_by_module_and_name():
    assert find_object("grpo_jax.preconditioner:std_weights", "w") is gj.std_weights
    assert find_object("grpo_jax.models.policy:Policy.replace", "p") is (
        gj.Policy.replace
    )


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "mine_in_a_test.py").write_text("RULE = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert find_object("mine_in_a_test:RULE", "weights.name") == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my rules:x", "must be module:name, got 'my rules:x'"),
        ("nowhere_at_all:x", "ModuleNotFoundError"),
        ("grpo_jax.preconditioner:nothing", "AttributeError"),
        ("code:objective", "give it again to gj.train, as weights=..."),
    ],
)
def test_what_cannot_be_found_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        find_object(name, "weights.name")


def test_names():
    assert name_of(gj.std_weights, "x") == "grpo_jax.preconditioner:std_weights"
    assert name_of(lambda: 1, "x") == "code:lambda"
    assert name_of(gj.OBJECTIVES["grpo"], "objective") == "code:objective"


def test_equal_objects_have_one_digest_and_different_ones_two():
    assert digest(rule(1.0)) == digest(rule(1.0))
    assert digest(rule(1.0)) != digest(rule(2.0))
    assert digest(optax.adam(1e-3)) == digest(optax.adam(1e-3))
    assert digest(optax.adam(1e-3)) != digest(optax.adam(2e-3))
    assert digest(optax.adam(1e-3)) != digest(optax.sgd(1e-3))
    assert digest(gj.OBJECTIVES["grpo"]) != digest(gj.OBJECTIVES["dapo"])
    assert digest(functools.partial(rule, 1)) != digest(functools.partial(rule, 2))
    assert digest(np.arange(3)) != digest(np.arange(4))


def test_what_a_listener_has_collected_is_not_in_its_digest():
    rows = []
    before = code_digest(rows.append), code_digest(lambda row, run: rows.append(row))
    listener = lambda row, run: rows.append(row)  # noqa: E731
    first = code_digest(listener)
    listener({"step": 1}, None)
    assert code_digest(listener) == first
    assert digest(listener) != first and before[0] != before[1]


def test_an_object_that_holds_itself_has_a_digest():
    def again(n):
        return again(n - 1) if n else 0

    assert len(digest(again)) == 12


def test_what_an_object_cannot_show_does_not_end_its_digest():
    """Donated arrays, and chains longer than Python's stack."""
    gone = jnp.ones(3)
    gone.delete()
    assert len(digest(lambda: gone)) == 12
    chain = None
    for _ in range(5000):
        chain = (chain,)
    assert len(digest(chain)) == 12


def test_all_heldout_prompts_of_an_own_task_are_those_it_has(tmp_path, monkeypatch):
    """Evaluation asks for all, 0; for a number the function must have the parameter."""
    (tmp_path / "tasks_in_a_test.py").write_text(
        "import grpo_jax as gj\n"
        "TASK = gj.load_task('chains', heldout_prompts=16)\n"
        "def make(*, tokenizer=None, seed=0): return TASK\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tasks_in_a_test:TASK", "tasks_in_a_test:make"):
        assert len(gj.load_task(name, heldout_prompts=0).heldout) == 16
        with pytest.raises(ConfigError, match="task.heldout_prompts changes nothing"):
            gj.load_task(name, heldout_prompts=4)


def test_objectives_prints_the_formula_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "formula_rows.py").write_text(
        "import dataclasses, grpo_jax as gj\n"
        "MINE = dataclasses.replace(gj.OBJECTIVES['dr_grpo'], clip=(0.1, 0.4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["objectives", "formula_rows:MINE"]) == 0
    own = dataclasses.replace(gj.OBJECTIVES["dr_grpo"], clip=(0.1, 0.4))
    assert own.formula() in capsys.readouterr().out
    assert main(["objectives", "formula_rows:YOURS"]) == 2
    assert "formula_rows:YOURS cannot be loaded" in capsys.readouterr().err
