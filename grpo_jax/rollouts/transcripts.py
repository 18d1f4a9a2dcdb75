"""Prompts and completions of rows as tokens: of ids, of texts, of messages."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError
from grpo_jax.rollouts.forms import AUTO, RowForm
from grpo_jax.tasks.ends import completion_ends, turn_end
from grpo_jax.tasks.messages import text_content
from grpo_jax.tasks.plain_text import TextError, check_characters, control_tokens
from grpo_jax.tasks.stripped import restore_prompts
from grpo_jax.tasks.templates import apply_chat, encode_templated

Value = Any  # text, a list of token ids, or a list of messages


class Completion(NamedTuple):
    """Tokens of one completion."""

    ids: list[int]
    mask: list[int]  # 1 on sampled tokens
    end: int  # tokens at its end that were added to a text, 0 or 1


def kind_of(value: Any) -> str:
    """What a value is: "text", "ids", "messages", "several" of these, or "" if none."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return ""
    if set(map(type, value)) == {int}:
        return "ids"
    if all(isinstance(x, Mapping) for x in value):
        return "messages"
    return "several" if all(isinstance(x, str | list) for x in value) else ""


class Encoder:
    """Makes tokens of the prompts and completions of rows.

    Args:
        tokenizer: None where all rows have token ids.
        form: Its template, and whether completions get an end.
    """

    def __init__(self, tokenizer: Any, form: RowForm):
        if isinstance(tokenizer, str | PathLike):
            raise ConfigError(
                f"tokenizer must be a tokenizer, got {tokenizer!r}; "
                "gj.load_tokenizer(DIR) reads a model's."
            )
        self._tokenizer, self._form = tokenizer, form
        self._chat = form.template == "chat"  # prompts are in the chat template
        self._ends: tuple[int, ...] = ()
        if tokenizer is not None:
            self._ends = completion_ends(tokenizer)

    def prompts(
        self, values: Sequence[Value], places: Sequence[str]
    ) -> list[list[int]]:
        """Token ids of each prompt; equal ones are encoded once.

        Args:
            values: Text, ids or messages.
            places: Rows, for errors.

        Raises:
            ConfigError: a prompt cannot be encoded.
        """
        first: dict[str, int] = {}
        for i, value in enumerate(values):
            first.setdefault(repr(value), i)
        texts = [i for i in first.values() if isinstance(values[i], str)]
        encoded = dict(zip(texts, self._texts(values, texts, places), strict=True))
        for i in first.values():
            value = values[i]
            if isinstance(value, str):
                continue
            if kind_of(value) == "ids":
                encoded[i] = list(value)
            else:
                messages = checked_messages(value, places[i])
                encoded[i] = self._ids(self._render(messages, True, places[i]))
        return [encoded[first[repr(value)]] for value in values]

    def completion(
        self, prompt: Value, value: Value, truncated: bool, where: str
    ) -> Completion:
        """Tokens of a completion, an end added to a text that has none.

        Args:
            prompt, value: Text, ids or messages.
            truncated: The completion was cut off.
            where: The row, for errors.
        """
        if kind_of(value) == "ids":
            return Completion(list(value), [1] * len(value), 0)
        if not isinstance(value, str):
            return self._transcript(prompt, value, truncated, where)
        self._need_tokenizer(where)
        try:
            check_characters(value, "a completion")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        ids = self._ids(value) if value else []
        limit = self._form.max_new_tokens
        cut_off = truncated or (limit is not None and len(ids) >= limit)
        end = self._end(prompt)
        added = (
            self._form.add_end
            and not cut_off
            and end is not None
            and not (ids and ids[-1] in self._ends)
        )
        if added:
            ids = [*ids, end]
        return Completion(ids, [1] * len(ids), int(added))

    def _end(self, prompt: Value) -> int | None:
        """The token with which the model ends an answer to the prompt."""
        chat = self._chat or kind_of(prompt) == "messages"
        end = turn_end(self._tokenizer) if chat else None
        return self._tokenizer.eos_token_id if end is None else end

    def _texts(
        self, values: Sequence[Value], texts: Sequence[int], places: Sequence[str]
    ) -> list[list[int]]:
        """Token ids of the values at the indices `texts`, in the form's template."""
        if not texts:
            return []
        self._need_tokenizer(places[texts[0]])
        form, given = self._form, [str(values[i]) for i in texts]
        if form.template == AUTO:
            return self._restored(given, [places[i] for i in texts])
        try:
            return encode_templated(
                self._tokenizer,
                form.template,
                given,
                system=form.system,
                arguments=form.template_arguments,
                keep=form.template == "none",
            )
        except TextError as error:
            raise ConfigError(f"{places[texts[error.index]]}: {error}") from error

    def _restored(self, texts: list[str], places: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that lack their control tokens, or never had any."""
        names = control_tokens(self._tokenizer)
        whole = [any(name in text for name in names) for text in texts]
        bare = [text for text, w in zip(texts, whole, strict=True) if not w]
        found = iter(
            restore_prompts(self._tokenizer, bare, self._form.template_arguments)
        )
        restored = [None if w else next(found) for w in whole]
        unexplained = [
            i for i, ids in enumerate(restored) if ids is None and not whole[i]
        ]
        if unexplained and len(unexplained) < len(texts):
            i = unexplained[0]
            raise ConfigError(
                f"{places[i]}: the prompt {texts[i][:80]!r} has no control tokens, and "
                "is not what the chat template leaves without them, as other prompts "
                "are; give it as messages, or all as they are with template='none'."
            )
        self._chat = len(unexplained) < len(texts)
        plain = [i for i, ids in enumerate(restored) if ids is None]
        try:
            kept = encode_templated(
                self._tokenizer, "none", [texts[i] for i in plain], keep=True
            )
        except TextError as error:
            raise ConfigError(f"{places[plain[error.index]]}: {error}") from error
        as_they_are = dict(zip(plain, kept, strict=True))
        return [as_they_are.get(i, ids or []) for i, ids in enumerate(restored)]

    def _transcript(
        self, prompt: Value, value: Value, truncated: bool, where: str
    ) -> Completion:
        """A completion in messages; what the template prints between the assistant's
        words is masked, and so are the messages of others."""
        before = self._messages_of(prompt, where)
        talk = checked_messages(value, where)
        if talk[0]["role"] != "assistant":
            raise ConfigError(
                f"{where}: a completion must begin with the assistant's message, got "
                f"role {talk[0]['role']!r}; what comes before belongs to the prompt."
            )
        done = self._render(before, True, where)
        ids: list[int] = []
        mask: list[int] = []
        for i, message in enumerate(talk):
            if message["role"] != "assistant":
                continue
            earlier = [*before, *talk[:i]]
            head = self._render(earlier, True, where)
            full = self._render([*earlier, message], False, where)
            if not head.startswith(done) or not full.startswith(head):
                raise ConfigError(
                    f"{where}: the chat template prints the messages before the "
                    "assistant's in another way than when they were written; give "
                    "token ids and a mask."
                )
            said = self._said(full[len(head) :], truncated and i == len(talk) - 1)
            for text, sampled in ((head[len(done) :], 0), (said, 1)):
                part = self._ids(text) if text else []
                ids, mask = ids + part, mask + [sampled] * len(part)
            done = head + said
        return Completion(ids, mask, 0)

    def _said(self, text: str, cut_off: bool) -> str:
        """The part of a printed assistant's turn that the model wrote: up to the token
        that ends the turn, which a turn that was cut off lacks."""
        end = turn_end(self._tokenizer)
        if end is None:
            return text
        name = self._tokenizer.decode([end], skip_special_tokens=False)
        at = text.rfind(name)
        if at < 0:
            return text
        return text[:at] if cut_off else text[: at + len(name)]

    def _messages_of(self, prompt: Value, where: str) -> list[dict[str, Any]]:
        if kind_of(prompt) == "messages":
            return checked_messages(prompt, where)
        if self._form.template != "chat" or not isinstance(prompt, str):
            raise ConfigError(
                f"{where}: the completion is messages and the prompt is "
                f"{kind_of(prompt)}; give both as messages, or the prompt as text with "
                "template='chat'."
            )
        system = self._form.system
        turns = [{"role": "user", "content": prompt}]
        return (
            turns if system is None else [dict(role="system", content=system), *turns]
        )

    def _render(
        self, messages: Sequence[dict[str, Any]], answer_follows: bool, where: str
    ) -> str:
        self._need_tokenizer(where)
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{where}: messages need a tokenizer with a chat template, and this "
                "one has none; give text or token ids."
            )
        try:
            (text,) = apply_chat(
                self._tokenizer,
                [messages],
                self._form.template_arguments,
                answer_follows=answer_follows,
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        return text

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text, names of control tokens being these tokens."""
        return self._tokenizer([text], add_special_tokens=False)["input_ids"][0]

    def _need_tokenizer(self, where: str) -> None:
        if self._tokenizer is None:
            raise ConfigError(
                f"{where}: text and messages need a tokenizer, got None; give "
                "gj.load_tokenizer(DIRECTORY), or token ids."
            )


def checked_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages of a row with role and content as text, and without fields of null.

    Raises:
        ConfigError: one has no role, or a content that is no text.
    """
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"{where}: a message must have role and content, got {message!r:.200}."
            )
        kept = {name: x for name, x in message.items() if x is not None}
        content = text_content(kept.get("content", "" if len(kept) > 1 else None))
        if content is None:
            raise ConfigError(
                f"{where}: the content of a message must be text, got {message!r:.200}."
            )
        messages.append(kept | {"content": content})
    return messages
