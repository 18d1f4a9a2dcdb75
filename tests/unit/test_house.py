"""Limits of the code itself: lengths, annotations, and shapes of arrays."""

import ast
import re
from pathlib import Path

import pytest

import grpo_jax as gj

PACKAGE = Path(gj.__file__).parent
EXPERIMENTS = PACKAGE.parent / "experiments"
FILES = sorted([*PACKAGE.rglob("*.py"), *EXPERIMENTS.rglob("*.py")])
LONGEST_BODY, LONGEST_FILE = 80, 450  # lines
ARRAYS = ("jax.Array", "np.ndarray")
# [P, G, T], [...], or a statement that there is no axis.
SHAPE = re.compile(r"\[[\w ,.*+()/-]*\]|\bscalars?\b", re.IGNORECASE)


def name_of(file):
    return str(file.relative_to(PACKAGE.parent))


def functions(file):
    """(function, its class or None, whether both are public) of a file."""
    tree = ast.parse(file.read_text())
    outer = {id(node): None for node in tree.body}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            outer |= {id(member): node for member in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            hidden = node.name.startswith("_") and node.name != "__init__"
            yield node, outer.get(id(node)), id(node) in outer and not hidden


def body_lines(function):
    """Lines of a function below its docstring."""
    documented = ast.get_docstring(function) is not None
    body = function.body[1:] if documented else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def takes_or_returns_arrays(function):
    """Whether a type of its signature names an array; keys are scalars."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    types = [a.annotation for a in named if a.arg != "key"] + [function.returns]
    text = " ".join(ast.unparse(x) for x in types if x is not None)
    return any(kind in text for kind in ARRAYS)


def documentation(function, owner, source):
    """Its docstring, that of the class it initialises, and comments on parameters."""
    head = source[function.lineno - 1 : function.body[0].lineno - 1]
    comments = re.findall(r"#.*", "\n".join(head))
    texts = [ast.get_docstring(function) or "", *comments]
    if function.name == "__init__" and owner is not None:
        texts.append(ast.get_docstring(owner) or "")
    return " ".join(texts)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_and_files_are_short(file):
    long = {f.name: body_lines(f) for f, _, _ in functions(file)}
    assert not {name: n for name, n in long.items() if n > LONGEST_BODY}
    assert len(file.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_parameters_of_public_functions_are_annotated(file):
    bare = []
    for function, _, public in functions(file):
        given = function.args
        named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        named += [x for x in (given.vararg, given.kwarg) if x is not None]
        missing = [a.arg for a in named if a.annotation is None]
        missing = [name for name in missing if name not in ("self", "cls")]
        if public and missing:
            bare.append((function.name, missing))
    assert not bare


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_public_functions_of_arrays_say_their_shapes(file):
    source = file.read_text().splitlines()
    silent = []
    for function, owner, public in functions(file):
        if not public or not takes_or_returns_arrays(function):
            continue
        if not SHAPE.search(documentation(function, owner, source)):
            silent.append(function.name)
    assert not silent
