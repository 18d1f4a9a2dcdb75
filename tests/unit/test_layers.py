"""Imports only ever point down, and the maths pays for nobody else's imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_jax as gj

ROOT = Path(gj.__file__).parent
LAYERS = [  # an arrow goes to a lower line, or stays in its package
    ["compiler_flags", "errors", "precision", "streams", "advantages", "intervals"],
    ["logprobs", "loglinear", "preconditioner", "records", "user_code"],
    ["prompt_weights", "diagnostics", "parallel", "rewards"],
    ["models", "pull_back"],
    ["objectives", "tasks"],
    ["rollouts", "runs"],
    ["evaluation"],
    ["instrument"],
    ["planning", "report"],
    ["training"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"transformers", "datasets", "tyro", "rich", "matplotlib", "orbax", "yaml"}
LATE = {"transformers", "datasets", "tyro", "matplotlib", "orbax", "torch"}
FILES = [f for f in sorted(ROOT.rglob("*.py")) if f != ROOT / "__init__.py"]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "grpo_jax":
            yield from (f"grpo_jax.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file):
    level = LEVEL[file.relative_to(ROOT).with_suffix("").parts[0]]
    for name in imported(ast.parse(file.read_text())):
        parts = name.split(".")
        if parts[0] == "grpo_jax" and len(parts) > 1:
            own = file.relative_to(ROOT).with_suffix("").parts[0]
            assert parts[1] == own or LEVEL[parts[1]] < level, (
                f"{file} imports {name} from above"
            )
        assert parts[0] != "torch"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(file):
    top = [n for n in ast.parse(file.read_text()).body]
    names = {name.split(".")[0] for n in top for name in imported(n)}
    names -= {None}
    inside = {
        name.split(".")[0]
        for n in top
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
        for name in imported(n)
    }
    assert not (names - inside) & HEAVY


def test_importing_the_package_and_its_maths_is_light():
    code = (
        "import sys, grpo_jax as gj; gj.std_weights, gj.policy_loss, gj.train;"
        f"print(sorted(set(sys.modules) & {LATE}))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "[]"


def test_every_public_name_resolves():
    for name in gj.__all__:
        assert getattr(gj, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'grpo'"):
        gj.grpo  # noqa: B018
