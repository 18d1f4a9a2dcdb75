"""How a prompt becomes tokens: one function for training, evaluation and warm starts.

A template is text around the user's text. Names of control tokens become these tokens
where the template has them; inside the user's text the same characters are spelt out
like any others, so that no question can end a turn, start one, or stop a completion.
"""

import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError, check_choice

# Name -> text before and after the user's text. r1 and qwen-math are taken from Liu et
# al. 2025, arXiv:2503.20783 (Dr. GRPO, Templates 1 and 2).
FIXED = MappingProxyType(
    {
        "none": ("", ""),
        "qa": ("Question: ", "\nAnswer:"),
        "r1": (
            "A conversation between User and Assistant. The User asks a question, and "
            "the Assistant solves it. The Assistant first thinks about the reasoning "
            "process in the mind and then provides the User with the answer. The "
            "reasoning process is enclosed within <think> </think> and answer is "
            "enclosed within <answer> </answer> tags, respectively, i.e., <think> "
            "reasoning process here </think> <answer> answer here </answer>.\nUser: ",
            "\nAssistant: <think>",
        ),
        "qwen-math": (
            "<|im_start|>system\nPlease reason step by step, and put your final answer "
            "within \\boxed{}.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
    }
)
TEMPLATES = (*FIXED, "chat")  # chat: the tokenizer's own chat_template
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Stands for the user's text while a chat template is analysed; no template strips it.
_PLACEHOLDER = "\ue000text\ue001"


def check_template(tokenizer: Any, template: str, system: str | None = None) -> None:
    """Raises ConfigError unless the tokenizer supports the template."""
    try:
        check_choice("task.template", template, TEMPLATES)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if system is not None and template != "chat":
        raise ConfigError(
            f"task.system needs template chat, got template {template!r}; leave it out."
        )
    if template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "template chat needs a tokenizer with a chat_template, and this one has "
            f"none; choose one of {', '.join(FIXED)}."
        )
    if template == "qwen-math":
        absent = {"<|im_start|>", "<|im_end|>"} - set(tokenizer.get_vocab())
        if absent:
            raise ConfigError(
                f"template qwen-math needs the tokens {', '.join(sorted(absent))}, "
                "which this tokenizer lacks; choose another template."
            )


def encode_all(tokenizer: Any, texts: Sequence[str], what: str) -> list[list[int]]:
    """Token ids of each text without any template and without control tokens.

    Args:
        what: Name of a text in errors, such as "an answer".

    Raises:
        ConfigError: a text is empty or has what the tokenizer cannot encode.
    """
    if not texts:
        return []
    encoded = _encode_plain(tokenizer, list(texts))
    control = _control_ids(tokenizer)
    for text, ids in zip(texts, encoded, strict=True):
        _check_plain(tokenizer, text, ids, control, what)
    return encoded


def encode_templated(
    tokenizer: Any,
    template: str,
    texts: Sequence[str],
    *,
    system: str | None = None,
    what: str = "a prompt",
) -> list[list[int]]:
    """Token ids of each text in its template.

    For template chat, exactly `apply_chat_template(..., add_generation_prompt=True)`
    wherever the text has no control token's name. Fixed templates begin with BOS if the
    tokenizer itself puts one before a text; a chat template prints its own.

    Args:
        template: One of `TEMPLATES`.
        system: The system turn of a chat template.
        what: Name of a text in errors.

    Raises:
        ConfigError: a text is empty or has what the tokenizer cannot encode, or the
            chat template does not print it once, unchanged or stripped.
    """
    check_template(tokenizer, template, system)
    if not texts:
        return []
    frame = _frame(tokenizer, template, system)
    rendered = _render(tokenizer, template, texts, system)
    encoded = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    control = _control_ids(tokenizer)
    expected = [tokenizer.convert_tokens_to_ids(name) for name in frame.names()]
    rows, by_pieces = [], None
    for text, full, ids in zip(texts, rendered, encoded, strict=True):
        inner = _inner(frame, text, full)
        if not inner:
            raise ConfigError(f"{what} must not be empty, got {text!r}.")
        present = [i for i in ids if i in control]
        if present != expected or frame.spans(full) != frame.template_spans(inner):
            ids = _encode_pieces(tokenizer, frame, inner, what)
            if by_pieces is None:
                by_pieces = _can_encode_pieces(tokenizer, frame)
            if not by_pieces or [i for i in ids if i in control] != expected:
                raise _control_token_error(text, what)
        if tokenizer.unk_token_id not in expected and tokenizer.unk_token_id in ids:
            raise _unknown_character_error(text, what)
        rows.append([*frame.bos, *ids])
    return rows


_Span = tuple[int, int]  # start and end of a control token's name in a text


class _Frame(NamedTuple):
    """The text that a template puts around the user's text."""

    before: str
    after: str
    bos: tuple[int, ...]
    pattern: re.Pattern[str] | None  # matches the names of control tokens

    def spans(self, text: str) -> list[_Span]:
        """Names of control tokens in a text."""
        return [m.span() for m in self.pattern.finditer(text)] if self.pattern else []

    def names(self) -> list[str]:
        """The template's control tokens in order."""
        return [
            part[a:b] for part in (self.before, self.after) for a, b in self.spans(part)
        ]

    def template_spans(self, inner: str) -> list[_Span]:
        """The template's control tokens in the template around the text `inner`."""
        shift = len(self.before) + len(inner)
        after = [(a + shift, b + shift) for a, b in self.spans(self.after)]
        return self.spans(self.before) + after


def _frame(tokenizer: Any, template: str, system: str | None) -> _Frame:
    names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    names.sort(key=len, reverse=True)  # the longest name wins, as in the tokenizer
    pattern = re.compile("|".join(map(re.escape, names))) if names else None
    if template != "chat":
        return _Frame(*FIXED[template], _bos(tokenizer), pattern)
    (text,) = _render(tokenizer, template, [_PLACEHOLDER], system)
    before, *rest = text.split(_PLACEHOLDER)
    if len(rest) != 1:
        raise ConfigError(
            f"the chat template must print the user's text once, printed it "
            f"{len(rest)} times; choose another template."
        )
    return _Frame(before, rest[0], (), pattern)


def _render(
    tokenizer: Any, template: str, texts: Sequence[str], system: str | None
) -> list[str]:
    """Each text in its template, as text."""
    if template != "chat":
        before, after = FIXED[template]
        return [before + text + after for text in texts]
    import jinja2

    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [[*first, {"role": "user", "content": text}] for text in texts]
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ConfigError(
            f"the chat template refuses {'system and ' if first else ''}user turns: "
            f"{error}."
        ) from error


def _inner(frame: _Frame, text: str, full: str) -> str:
    """The user's text as the template printed it in `full`: unchanged or stripped."""
    inner = full[len(frame.before) : len(full) - len(frame.after)]
    around = full == frame.before + inner + frame.after
    if not around or inner.strip() != text.strip():
        raise ConfigError(
            f"the chat template does not print the prompt {text[:60]!r} as it is; "
            "choose another template or remove the row."
        )
    return inner


def _encode_pieces(
    tokenizer: Any, frame: _Frame, inner: str, what: str | None = None
) -> list[int]:
    """Token ids of the template around a text, encoded piece by piece between the
    template's control tokens; the pieces have none. `what` None: unchecked."""
    full = frame.before + inner + frame.after
    added = {t.content: t for t in tokenizer.added_tokens_decoder.values()}
    ids, at = [], 0
    for start, end in [*frame.template_spans(inner), (len(full), len(full))]:
        token = added.get(full[start:end])
        piece = full[at:start]
        if token is not None and token.lstrip:
            piece = piece.rstrip()
        if piece:
            (encoded,) = _encode_plain(tokenizer, [piece])
            if what is not None:
                _check_plain(tokenizer, piece, encoded, _control_ids(tokenizer), what)
            ids += encoded
        at = end
        if token is not None:
            ids.append(tokenizer.convert_tokens_to_ids(token.content))
            if token.rstrip:
                at += len(full[at:]) - len(full[at:].lstrip())
    return ids


def _can_encode_pieces(tokenizer: Any, frame: _Frame) -> bool:
    """Whether a template without names of control tokens in its text has the same ids
    piece by piece; not so where a tokenizer marks the start of the first piece only."""
    text = frame.before + _PLACEHOLDER + frame.after
    (ids,) = tokenizer([text], add_special_tokens=False)["input_ids"]
    return _encode_pieces(tokenizer, frame, _PLACEHOLDER) == ids


def _encode_plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts whose names of control tokens are spelt out."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]


def _control_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {i for i, token in added if token.special}


def _check_plain(
    tokenizer: Any, text: str, ids: list[int], control: set[int], what: str
) -> None:
    """Raises ConfigError where the ids are not the text spelt out."""
    if not ids:
        raise ConfigError(f"{what} must not be empty, got {text!r}.")
    absent = tokenizer.unk_token_id
    if absent is None:  # a tokenizer of characters puts its padding there
        absent = tokenizer.pad_token_id
    if absent is not None and absent in ids:
        raise _unknown_character_error(text, what)
    if not control.isdisjoint(ids):
        raise _control_token_error(text, what)


def _control_token_error(text: str, what: str) -> ConfigError:
    return ConfigError(
        f"{what} {text[:200]!r} holds a control token's name, which this tokenizer "
        "cannot spell out; remove the row."
    )


def _unknown_character_error(text: str, what: str) -> ConfigError:
    return ConfigError(f"{what} {text!r} has a character without a token.")


def _bos(tokenizer: Any) -> tuple[int, ...]:
    """(BOS,) if the tokenizer itself puts it before a text, else ()."""
    bos = tokenizer.bos_token_id
    ids = tokenizer(["a"])["input_ids"][0]
    plain = tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
    if bos is None or ids[:1] != [bos] or plain[:1] == [bos]:
        return ()
    return (bos,)
