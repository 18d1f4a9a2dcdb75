"""Tokens that end a completion: which they are, and their names."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.errors import ConfigError
from grpo_jax.tasks.plain_text import control_tokens, encode_plain
from grpo_jax.tasks.templates import apply_chat

_ANSWER = "\ue000answer\ue001"  # no template strips it


def turn_end(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an assistant's turn; None: none."""
    if not tokenizer.chat_template:
        return None
    turns = [[("user", "a"), ("assistant", _ANSWER)]]
    try:
        (text,) = apply_chat(tokenizer, turns, answer_follows=False)
    except ConfigError:  # a template of prompts only
        return None
    _, printed, rest = text.rpartition(_ANSWER)
    if not printed:
        return None
    fillers = {tokenizer.pad_token, tokenizer.unk_token} - set(
        control_tokens(tokenizer)
    )
    added = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and token.content not in fillers
    }
    ids = tokenizer([rest], add_special_tokens=False)["input_ids"][0]
    return next((i for i in ids if i in added), None)


def turn_end_warnings(
    tokenizer: Any, ends: Sequence[int], template: str
) -> tuple[str, ...]:
    """A warning where a chat template ends a turn with text alone, and nothing but the
    tokenizer's own EOS, which the model may never write, ends an answer."""
    own = {tokenizer.eos_token_id}
    if template != "chat" or not set(ends) <= own or turn_end(tokenizer) is not None:
        return ()
    return (
        "the chat template ends an answer with no token of its own, so that answers "
        f"end only at {named_tokens(tokenizer, ends)}; where the model writes another "
        "one there, name it in stop_tokens.",
    )


def completion_ends(tokenizer: Any, ids: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids, the tokenizer's EOS and the token that ends a turn, each once."""
    more = (tokenizer.eos_token_id, turn_end(tokenizer))
    return tuple(dict.fromkeys([*ids, *(i for i in more if i is not None)]))


def stop_token_ids(tokenizer: Any, names: Sequence[str]) -> tuple[int, ...]:
    """Ids of tokens by name: as in the vocabulary, or a text that is one token.

    Raises:
        ConfigError: a name is no token.
    """
    vocabulary, found = tokenizer.get_vocab(), []
    for name in names:
        spelt = encode_plain(tokenizer, [name])[0] if name else []
        if name in vocabulary:
            found.append(vocabulary[name])
        elif len(spelt) == 1:
            found.append(spelt[0])
        else:
            raise ConfigError(
                f"stop_tokens must be tokens of the vocabulary, such as "
                f"{tokenizer.eos_token}, got {name!r}, which is {len(spelt)} tokens."
            )
    return tuple(found)


def named_tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    """'<|im_end|> (1), <|endoftext|> (0)'."""

    def name(i: int) -> str:
        if not 0 <= i < len(tokenizer):
            return "a token outside the vocabulary"
        text = tokenizer.decode([i], skip_special_tokens=False)
        return text if text.isprintable() and text == text.strip() else repr(text)

    return ", ".join(f"{name(i)} ({i})" for i in ids)
