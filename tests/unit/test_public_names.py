"""Public names are functions, classes and data, whichever modules were imported."""

import json
import pkgutil
import pydoc
import subprocess
import sys

import jax
import pytest

import grpo_jax as gj

KINDS = {"function", "type"}

# Prints type and module of every gj.X; all modules are imported before or after.
CODE = """
import importlib, json, pkgutil, sys, types
import grpo_jax as gj

def walk():
    for module in pkgutil.walk_packages(gj.__path__, "grpo_jax."):
        if module.name != "grpo_jax.__main__":
            importlib.import_module(module.name)

if sys.argv[1] == "modules first":
    walk()
before = {name: getattr(gj, name) for name in gj.__all__}
if sys.argv[1] == "modules last":
    walk()
after = {name: getattr(gj, name) for name in gj.__all__}
assert all(after[name] is before[name] for name in before)
assert not any(isinstance(x, types.ModuleType) for x in after.values())
print(json.dumps({
    name: [type(x).__name__, getattr(x, "__module__", None)]
    for name, x in after.items()
}))
"""


def names(order):
    command = [sys.executable, "-c", CODE, order]
    return json.loads(subprocess.check_output(command, text=True))


@pytest.fixture(scope="module")
def modules_first():
    return names("modules first")


def test_public_names_do_not_depend_on_the_order_of_imports(modules_first):
    assert modules_first == names("modules last")


def test_public_names_are_functions_and_classes_but_for_tables(modules_first):
    tables = {name for name, (kind, _) in modules_first.items() if kind not in KINDS}
    assert tables == {"OBJECTIVES", "PEER_STD", "ROW_FORMS"}


def test_no_public_name_is_that_of_a_module(modules_first):
    modules = {module.name for module in pkgutil.iter_modules(gj.__path__)}
    assert not modules & modules_first.keys()


def test_dir_has_every_public_name():
    assert set(dir(gj)) == set(gj.__all__)


def test_what_is_printed_of_a_policy_and_an_objective_is_short():
    """No arrays, and no table of functions for each choice."""
    model = gj.ModelConfig(vocab_size=7, width=8, mlp_width=8, head_dim=4)
    policy = gj.init_policy(model, jax.random.key(0))
    assert repr(policy) == f"Policy(config={policy.config})"
    text = pydoc.plain(pydoc.render_doc(gj.Objective))
    assert (
        "function <lambda>" not in text and "OneOf(none, mean, leave_one_out)" in text
    )
