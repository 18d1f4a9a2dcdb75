"""Packages and megabytes of grpo_jax's two installs, each in an environment of its own.

    python experiments/benchmarks/installs.py

`whole`: `pip install grpo-jax`, everything that a run needs. `light`: jax, optax, numpy
and `pip install --no-deps grpo-jax`, which is enough for the maths. pip must reach an
index; 3 minutes, and the disk space is given back.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Packages and bytes of an environment, of its Python.
COUNT = """
import importlib.metadata, json, pathlib, sysconfig
names = {d.name for d in importlib.metadata.distributions()} - {"pip", "setuptools"}
files = pathlib.Path(sysconfig.get_path("purelib")).rglob("*")
own = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
size = sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink()
           and "__pycache__" not in f.parts and not {*f.parts} & {*own})
print(json.dumps([len(names), size]))
"""


class UnreachableError(Exception):
    """pip reaches no index here."""


def new_environment(directory: Path) -> Path:
    """The Python of a new, empty environment in `directory`."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    return directory / "bin" / "python"


def pip_install(python: Path, *what: str | Path) -> None:
    """`pip install`; UnreachableError with the last line of its error."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip failed"]
        raise UnreachableError(lines[-1])


def source(directory: Path) -> Path:
    """A copy of what pip builds from: pip writes beside it."""
    shutil.copytree(
        ROOT / "grpo_jax",
        directory / "grpo_jax",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    return directory


def light(directory: Path) -> Path:
    """The Python of an environment with jax, optax, numpy, and grpo_jax on top."""
    python = new_environment(directory / "light")
    pip_install(python, "jax", "optax", "numpy")
    pip_install(python, "--no-deps", source(directory / "source-light"))
    return python


def whole(directory: Path) -> Path:
    """The Python of an environment with grpo_jax and all that it depends on."""
    python = new_environment(directory / "whole")
    pip_install(python, source(directory / "source-whole"))
    return python


def measure(install: Callable[[Path], Path]) -> tuple[int, float]:
    """(packages, MB) of an install, bytecode and pip's own left out."""
    with tempfile.TemporaryDirectory() as directory:
        python = install(Path(directory))
        packages, size = json.loads(subprocess.check_output([python, "-c", COUNT]))
    return packages, size / 1e6


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for kind in (light, whole):
        packages, megabytes = measure(kind)
        print(f"{kind.__name__:5} {packages:3} packages {megabytes:6.0f} MB")
