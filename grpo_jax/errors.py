"""The one error a user is meant to read: bad input, found before anything starts."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A run that cannot start as it was asked for; the message says what to change."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """'did you mean ...? ' or nothing."""
    near = difflib.get_close_matches(str(name), list(choices), n=5, cutoff=0.4)
    # Among the close ones, letters in another order are the likeliest slip.
    near.sort(key=lambda choice: sorted(choice) != sorted(str(name)))
    return f"did you mean {near[0]!r}? " if near else ""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> ConfigError:
    """The error for a name that is not among its choices, with the nearest one."""
    choices = sorted(choices)
    return ConfigError(
        f"unknown {kind} {name!r}; {nearest(name, choices)}"
        f"choices: {', '.join(choices)}."
    )


def check_choice(axis: str, value: str, choices: Iterable[str]) -> None:
    """ValueError, with the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{axis} must be one of {', '.join(choices)}, got {value!r}.")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def summary(error: Exception) -> str:
    """An error's type and up to 200 characters of its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
