"""Prompts as lists of messages, {"role": ..., "content": ...}: read and checked."""

from collections.abc import Mapping
from typing import Any

from grpo_jax.errors import ConfigError
from grpo_jax.tasks.templates import Turn, Turns


def read_prompt(value: Any, where: str) -> tuple[Turns, str]:
    """(turns before the prompt, the prompt) of a text or of a list of messages.

    Args:
        value: From a row.
        where: The row and its field, for errors.

    Raises:
        ConfigError: it is neither, or its last message is not the user's.
    """
    turns = _turns(value, "user", where)
    if turns[-1][0] != "user":
        raise ConfigError(
            f"{where} ends with a message of role {turns[-1][0]!r}; the last one must "
            "be the user's, which the model answers."
        )
    return turns[:-1], turns[-1][1]


def read_system(value: Any, where: str) -> Turns:
    """System turns from a text or a list of messages; none of null or an empty text.

    Raises:
        ConfigError: it is neither, or has messages of another role.
    """
    if value is None or value == "":
        return ()
    turns = _turns(value, "system", where)
    other = next((role for role, _ in turns if role != "system"), None)
    if other is not None:
        raise ConfigError(
            f"{where} must be a system turn, got a message of role {other!r}."
        )
    return turns


def _turns(value: Any, role: str, where: str) -> Turns:
    """The messages of a list; a text is one of `role`."""
    if isinstance(value, str):
        return ((role, value),)
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"{where} is {value!r:.200}; expected text, or a list of messages with "
            "role and content."
        )
    return tuple(_turn(message, where) for message in value)


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where}: a message must have role and content, got "
                          f"{message!r:.200}.")  # fmt: skip
    role, content = message.get("role"), text_content(message.get("content"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(
            f"{where}: a message must have role and content as text, got "
            f"{message!r:.200}."
        )
    return role, content


def text_content(content: Any) -> str | None:
    """A message's content as text, of parts that are text joined; None: it is none."""
    if isinstance(content, str):
        return content
    return _joined(content) if isinstance(content, list) else None


def _joined(parts: list[Any]) -> str | None:
    """The text of a message given in parts; None where a part is no text."""
    texts = [_text_of(part) for part in parts]
    known = [text for text in texts if text is not None]
    return "".join(known) if len(known) == len(texts) else None


def _text_of(part: Any) -> str | None:
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        part = part.get("text")
    return part if isinstance(part, str) else None
