"""Chat prompts decoded without control tokens, made tokens again.

Logs of other trainers have them: `tokenizer.decode(ids, skip_special_tokens=True)`
leaves "user\\nWhat is 2+2?\\nassistant\\n" of a ChatML prompt. Where the tokenizer's
template explains such a text, it gives back the ids: the turns are found between what
the template prints, are printed again, and must decode to exactly the text.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError
from grpo_jax.tasks.templates import Turns, apply_chat

_SYSTEM, _USER = "\ue000system\ue001", "\ue000user\ue001"  # no template strips them
_FRAMES = ((("user", _USER),), (("system", _SYSTEM), ("user", _USER)))


class _Frame(NamedTuple):
    """What a template prints around turns, without control tokens."""

    pattern: re.Pattern[str]  # a group for each turn
    roles: tuple[str, ...]


def restore_prompts(
    tokenizer: Any,
    texts: Sequence[str],
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> list[list[int] | None]:
    """Token ids of each text with the chat template's control tokens put back; None for
    a text that is not what the template leaves of one user's turn, with or without a
    system turn.

    Args:
        tokenizer: With a chat template; without one every result is None.
        texts: Decoded prompts, the head of the assistant's turn included.
        arguments: Further variables of the chat template.
    """
    frames = _frames(tokenizer, arguments)
    return [_restored(tokenizer, text, frames, arguments) for text in texts]


def _frames(tokenizer: Any, arguments: Mapping[str, Any]) -> list[_Frame]:
    frames = []
    for turns in _FRAMES if tokenizer.chat_template else ():
        try:
            bare = _bare(tokenizer, _encode(tokenizer, turns, arguments))
        except ConfigError:  # a template without such turns
            continue
        pattern = re.escape(bare)
        for mark in (_SYSTEM, _USER):
            pattern = pattern.replace(re.escape(mark), "(.*?)")
        if re.compile(pattern).groups == len(turns):
            roles = tuple(role for role, _ in turns)
            frames.append(_Frame(re.compile(pattern, re.DOTALL), roles))
    return frames


def _restored(
    tokenizer: Any,
    text: str,
    frames: Sequence[_Frame],
    arguments: Mapping[str, Any],
) -> list[int] | None:
    for pattern, roles in frames:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        turns = tuple(zip(roles, match.groups(), strict=True))
        ids = _encode(tokenizer, turns, arguments)
        if _bare(tokenizer, ids) == text:
            return ids
    return None


def _encode(tokenizer: Any, turns: Turns, arguments: Mapping[str, Any]) -> list[int]:
    (text,) = apply_chat(tokenizer, [turns], arguments)
    return tokenizer([text], add_special_tokens=False)["input_ids"][0]


def _bare(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
