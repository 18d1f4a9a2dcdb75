"""Objects of a user's own code: found by "module:name", named, and told apart."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from grpo_jax.errors import ConfigError, summary

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DEEPEST = 100  # levels of an object that its digest reads
_IN_CODE = "code:"  # how the name of an object begins that no import would find


def find_object(name: str, field: str) -> Any:
    """The object that "module:name" names.

    The module is looked for on sys.path, and last in the working directory.

    Args:
        name: Such as "my.rows:GATED".
        field: The setting that has this name, for errors.

    Raises:
        ConfigError: there is no such object, or importing it failed.
    """
    if in_code(name):
        argument = field.split(".")[0].replace("sampling", "sampler")
        raise ConfigError(
            f"{field} {name.removeprefix(_IN_CODE)} was made in code: give it again to "
            f"gj.train, as {argument}=...; only what a run named module:name from its "
            "start is found by itself."
        )
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{field} of your own must be module:name, got {name!r}; for example "
            "mypackage.rows:GATED."
        )
    module, _, attributes = name.partition(":")
    here = os.getcwd()
    if not {"", here} & {*sys.path}:
        sys.path.append(here)
    try:
        return functools.reduce(
            getattr, attributes.split("."), importlib.import_module(module)
        )
    except Exception as error:
        raise ConfigError(
            f"{field} {name} cannot be loaded: {summary(error)}; module {module} must "
            f"be importable from {here} or sys.path, and have {attributes}."
        ) from error


def takes(function: Any, *arguments: Any, **named: Any) -> bool:
    """Whether it can be called with these arguments; True where nothing says."""
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError:  # not callable, or not with these
        return False
    except ValueError:  # a builtin that does not say what it takes
        pass
    return True


def named_by(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function has as parameters."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    names = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def in_code(name: str) -> bool:
    """Whether it is the name of an object that no import would find."""
    return name.startswith(_IN_CODE)


def name_of(value: Any, fallback: str) -> str:
    """ "module:name" where importing finds this very object, else "code:NAME".

    Args:
        value: An object that a user gave in code.
        fallback: NAME of one that has none.
    """
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if isinstance(value, type | types.FunctionType) and module and name:
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is value and module != "__main__":
            return f"{module}:{name}"
        return f"{_IN_CODE}{name.rpartition('.')[2].strip('<>')}"
    return f"{_IN_CODE}{fallback}"


def digest(value: Any) -> str:
    """A short hash of what an object is made of: numbers, text, arrays, and of
    functions the source, the defaults and what they close over.

    Two objects of the same code and values have the same one in any process. A change
    in a function that it calls by a global name is not seen.
    """
    hasher = hashlib.sha256()
    _add(hasher, value, {}, 0)
    return hasher.hexdigest()[:12]


def code_digest(value: Any) -> str:
    """A short hash of a function's text alone; of another object, of its type."""
    function = getattr(value, "__func__", value)
    if isinstance(function, types.FunctionType):
        return digest(_source(function))
    return digest(type(value))


def _add(hasher: Any, value: Any, seen: dict[int, Any], depth: int) -> None:
    """Feeds the hash with a value and all it holds; what was seen before is left out,
    as of a function that closes over itself, and what lies `_DEEPEST` levels down."""
    hasher.update(type(value).__qualname__.encode())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        hasher.update(repr(value).encode())
        return
    if id(value) in seen or depth == _DEEPEST:
        return
    seen[id(value)] = value  # kept, so that no other object gets its id
    for part in _parts(value):
        _add(hasher, part, seen, depth + 1)


def _parts(value: Any) -> list[Any]:
    """What a value is made of, as plainer values."""
    if isinstance(value, types.FunctionType):
        cells = [_contents(cell) for cell in value.__closure__ or ()]
        return [_source(value), value.__defaults__, value.__kwdefaults__, *cells]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, Mapping):
        return [x for key in sorted(value, key=repr) for x in (key, value[key])]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        return [getattr(value, "__module__", ""), value.__name__]
    if hasattr(value, "__array__"):
        try:
            array = np.asarray(value)
        except Exception:  # an array that was donated, or lies on other hosts
            return [str(getattr(value, "dtype", "")), str(getattr(value, "shape", ""))]
        return [str(array.dtype), str(array.shape), array.tobytes()]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [x for name in names for x in (name, getattr(value, name))]
    return [getattr(value, "__dict__", "")]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _source(function: types.FunctionType) -> str:
    """The text of a function; where there is none, its bytecode."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = function.__code__
        return f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
