"""Text as tokens without a template: what is text to a tokenizer, and what is control.

Names of control tokens inside a text are spelt out like any other characters.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from grpo_jax.errors import ConfigError

_SURROGATE = re.compile("[\ud800-\udfff]")


class TextError(ConfigError):
    """A text that cannot be encoded; `index` is its place among those given."""

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index = index


def encode_all(tokenizer: Any, texts: Sequence[str], what: str) -> list[list[int]]:
    """Token ids of each text without any template and without control tokens.

    Args:
        what: Name of a text in errors, such as "an answer".

    Raises:
        TextError: a text is empty or has what the tokenizer cannot encode.
    """
    if not texts:
        return []
    check_each(texts, what)
    encoded = encode_plain(tokenizer, list(texts))
    control = set(control_tokens(tokenizer).values())
    for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        try:
            check_plain(tokenizer, text, ids, control, what)
        except ConfigError as error:
            raise TextError(i, str(error)) from error
    return encoded


def check_each(texts: Sequence[str], what: str) -> None:
    """Raises TextError for the first of the texts that `check_characters` refuses."""
    for i, text in enumerate(texts):
        try:
            check_characters(text, what)
        except ConfigError as error:
            raise TextError(i, str(error)) from error


def check_characters(text: str, what: str) -> None:
    """Raises ConfigError for half a character pair, which no encoding can write."""
    if text.isascii() or not (found := _SURROGATE.search(text)):
        return
    at = found.start()
    raise ConfigError(
        f"{what} holds half of a surrogate pair ({text[at]!a}, character {at + 1}), "
        "which is no text."
    )


def encode_plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts whose names of control tokens are spelt out."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Name -> id of the tokens that are no text.

    A padding token that is ordinary text (as "!" in some vocabularies) is none: it is
    what that text is spelt with.
    """
    added = tokenizer.added_tokens_decoder.items()
    named = {token.content: i for i, token in added if token.special}
    fillers = {tokenizer.pad_token, tokenizer.unk_token}
    fillers -= {tokenizer.eos_token, tokenizer.bos_token}
    for name in fillers & set(named):
        if encode_plain(tokenizer, [name]) == [[named[name]]]:
            del named[name]
    return named


def names_pattern(names: Collection[str]) -> re.Pattern[str] | None:
    """Matches the names; the longest wins, as in the tokenizer. None: no names."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if names else None


def unknown_id(tokenizer: Any) -> int | None:
    """The token that stands for characters without one; None: every text has tokens.

    The model's own, where it has a say: the name in a config may be any token.
    """
    model = tokenizer.backend_tokenizer.model
    if not hasattr(model, "unk_token"):  # a unigram model
        return tokenizer.unk_token_id
    return None if model.unk_token is None else model.token_to_id(model.unk_token)


def check_plain(
    tokenizer: Any, text: str, ids: list[int], control: set[int], what: str
) -> None:
    """Raises ConfigError where the ids are not the text spelt out."""
    if not ids:
        raise ConfigError(f"{what} must not be empty, got {text!r}.")
    absent = unknown_id(tokenizer)
    if absent is not None and absent in ids:
        raise unknown_character_error(text, what)
    if not control.isdisjoint(ids):
        raise control_token_error(text, what)


def control_token_error(text: str, what: str) -> ConfigError:
    """For a text whose names of control tokens cannot be spelt out."""
    return ConfigError(
        f"{what} {text[:200]!r} holds a control token's name, which this tokenizer "
        "cannot spell out; remove the row."
    )


def unknown_character_error(text: str, what: str) -> ConfigError:
    """For a text with characters that have no token."""
    return ConfigError(f"{what} {text!r} has a character without a token.")


def bos(tokenizer: Any) -> tuple[int, ...]:
    """(BOS,) if the tokenizer itself puts it before a text, else ()."""
    bos = tokenizer.bos_token_id
    ids = tokenizer(["a"])["input_ids"][0]
    plain = tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
    if bos is None or ids[:1] != [bos] or plain[:1] == [bos]:
        return ()
    return (bos,)
