"""The maths needs jax, optax and numpy alone, and the rest says what it needs."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import grpo_jax as gj
from grpo_jax import cli
from grpo_jax.errors import (
    WHOLE_INSTALL,
    MissingPackageError,
    needs_the_whole_install,
)

ROOT = Path(__file__).parents[2]
USES = ROOT / "tests" / "unit" / "light_uses.py"


def check_uses(output):
    """Of `light_uses.py`: all that is not used there says how to get what it needs."""
    done = json.loads(output.splitlines()[-1])
    assert not done["imported"]
    assert {"weighted_value_and_grad", "policy_loss", "phase"} <= {*done["used"]}
    assert {"train", "sample", "load_pretrained"} <= done["others"].keys()
    for name, message in done["others"].items():
        assert re.fullmatch(
            rf"gj\.{name} needs \w+, which is not installed; `pip install grpo-jax` .*",
            message,
        )


def test_every_name_of_the_maths_works_with_three_packages():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", USES, "--pretend"]
    check_uses(subprocess.check_output(command, env=env, text=True))


@pytest.mark.slow
def test_every_name_of_the_maths_works_in_such_an_environment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments" / "benchmarks")
    from installs import UnreachableError, light

    try:
        python = light(tmp_path)
    except UnreachableError as error:
        pytest.skip(f"pip reaches no index: {error}")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, "-W", "error", USES]
    check_uses(subprocess.check_output(command, cwd=tmp_path, env=env, text=True))
    command = [python, "-m", "grpo_jax", "train"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: grpo-jax train needs tyro, which is not inst")


def test_the_modules_of_every_dependency_are_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}
    owners = packages_distributions()
    modules = {m for m, names in owners.items() if {n.lower() for n in names} & named}
    imported = set()
    for file in (ROOT / "grpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    assert modules & imported - {"jax", "optax", "numpy"} <= WHOLE_INSTALL <= imported


def test_a_missing_module_of_ones_own_is_named_as_it_is():
    def own():
        raise ModuleNotFoundError("No module named 'mine'", name="mine.rewards")

    with pytest.raises(ModuleNotFoundError, match="^No module named 'mine'$") as caught:
        needs_the_whole_install("gj.load_task")(own)()
    assert not isinstance(caught.value, MissingPackageError)


@pytest.mark.parametrize(
    ("call", "needs"),
    [
        (lambda: gj.load_tokenizer(ROOT), "gj.load_tokenizer needs transformers"),
        (lambda: gj.load_task("ladder"), "gj.load_task needs tokenizers"),
        (lambda: gj.verify("math", "4", r"\boxed{4}"), "gj.verify needs math_verify"),
    ],
)
def test_a_function_says_what_it_needs(call, needs, monkeypatch):
    from grpo_jax.rewards import scoring

    for name in ("transformers", "tokenizers", "math_verify"):
        monkeypatch.setitem(sys.modules, name, None)
    scoring._shared_pool.cache_clear()
    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=f"{needs}, which is not installed"):
        call()


def test_a_command_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["objectives", "grpo"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: grpo-jax objectives needs tyro, which is not inst")
    assert error.count("\n") == 1
