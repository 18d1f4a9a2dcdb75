"""What tests of public functions with and without jit share."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """A public function with small inputs."""

    function: Callable
    arguments: tuple  # trees of NumPy arrays
    result: Any  # the tree that the function returns, of `floats`, `ints` and `bools`
    reference: Callable | None = None  # of the same arguments; None: without jit


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)


def bools(*shape):
    return jax.ShapeDtypeStruct(shape, bool)


def check(case, variant):
    """Asserts shapes, dtypes and values of the case's function under the variant."""
    result = variant(case.function)(*jax.tree.map(jnp.asarray, case.arguments))
    chex.assert_trees_all_equal_shapes_and_dtypes(result, case.result)
    chex.assert_tree_all_finite(result)
    expected = (case.reference or case.function)(*case.arguments)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)


def public_functions(*modules):
    """{"module.function", ...} that the modules define."""
    return {
        _name(x)
        for module in modules
        for _, x in inspect.getmembers(module, inspect.isfunction)
        if x.__module__ == module.__name__ and not x.__name__.startswith("_")
    }


def called_by(*registries):
    """{"module.function", ...} that the entries of registries are or call."""
    entries = [entry for registry in registries for entry in registry.values()]
    rows = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    functions = [x for row in rows for x in row if inspect.isfunction(x)]
    called = [f.__globals__.get(n) for f in functions for n in f.__code__.co_names]
    return {_name(x) for x in (*functions, *called) if inspect.isfunction(x)}


def _name(function):
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
