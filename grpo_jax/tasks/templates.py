"""How a prompt becomes tokens: one function for training, evaluation and warm starts.

A template is text around the user's text. Names of control tokens become these tokens
where the template has them; inside the user's text the same characters are spelt out
like any others, so that no question can end a turn, start one, or stop a completion.
"""

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError, check_choice
from grpo_jax.tasks.jinja import syntax_error
from grpo_jax.tasks.plain_text import (
    TextError,
    bos,
    check_each,
    check_plain,
    control_token_error,
    control_tokens,
    encode_plain,
    names_pattern,
    unknown_character_error,
    unknown_id,
)

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
Turn = tuple[str, str]  # role, content
Message = Turn | Mapping[str, Any]  # a mapping may have more, such as tool_calls
Turns = tuple[Turn, ...]
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


def encode_templated(
    tokenizer: Any,
    template: str,
    texts: Sequence[str],
    *,
    system: str | None = None,
    contexts: Sequence[Turns] | None = None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    date: str = "",
    keep: bool = False,
    what: str = "a prompt",
) -> list[list[int]]:
    """Token ids of each text in its template.

    For template chat, exactly `apply_chat_template(..., add_generation_prompt=True)`
    wherever no turn has a control token's name. Fixed templates begin with BOS if the
    tokenizer itself puts one before a text; a chat template prints its own.

    Args:
        template: One of `TEMPLATES`.
        system: The system turn of a chat template, for texts without one of their own.
        contexts: Turns before each text, in a chat template; None: none.
        arguments: Further variables of the chat template.
        date: What the chat template takes for now, in ISO format; "": the time it is.
        keep: Names of control tokens in texts and turns become these tokens, as in data
            to which a template was applied beforehand.
        what: Name of a text in errors.

    Raises:
        TextError: a text is empty or has what the tokenizer cannot encode, or the chat
            template does not print it once, unchanged or stripped.
        ConfigError: the template is not the tokenizer's, or refuses the system turn.
    """
    check_template(tokenizer, template, system)
    if not texts:
        return []
    check_each(texts, what)
    contexts = [()] * len(texts) if contexts is None else contexts
    befores = [turns_before(context, system) for context in contexts]
    speller = _Speller(tokenizer, template, dict(arguments), date, keep)
    speller.frame(turns_before((), system))  # its errors are not of one text
    rendered = speller.render(texts, befores)
    encoded = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    rows = []
    for i, row in enumerate(zip(texts, befores, rendered, encoded, strict=True)):
        try:
            rows.append(speller.encode(*row, what))
        except ConfigError as error:
            raise TextError(i, str(error)) from error
    return rows


def turns_before(context: Turns, system: str | None) -> Turns:
    """The turns before a prompt: its own, with a system turn where it has none."""
    if system is None or any(role == "system" for role, _ in context):
        return context
    return (("system", system), *context)


_Span = tuple[int, int]  # start and end of a part of a text


class _Frame(NamedTuple):
    """The text around the user's text: the template's, and that of earlier turns."""

    before: str
    after: str
    bos: tuple[int, ...]
    pattern: re.Pattern[str] | None  # matches the names of control tokens
    quoted: tuple[_Span, ...] = ()  # parts of `before` that are somebody's text

    def spans(self, text: str) -> list[_Span]:
        """Names of control tokens in a text."""
        return [m.span() for m in self.pattern.finditer(text)] if self.pattern else []

    def names(self) -> list[str]:
        """The template's control tokens in order."""
        return [
            *(self.before[a:b] for a, b in self._spans_before()),
            *(self.after[a:b] for a, b in self.spans(self.after)),
        ]

    def template_spans(self, inner: str) -> list[_Span]:
        """The template's control tokens in the template around the text `inner`."""
        shift = len(self.before) + len(inner)
        after = [(a + shift, b + shift) for a, b in self.spans(self.after)]
        return self._spans_before() + after

    def own(self) -> list[_Span]:
        """Parts of `before` that are the template's."""
        edges = [0, *itertools.chain(*self.quoted), len(self.before)]
        return list(zip(edges[::2], edges[1::2], strict=True))

    def _spans_before(self) -> list[_Span]:
        return [
            (a + start, b + start)
            for start, end in self.own()
            for a, b in self.spans(self.before[start:end])
        ]


class _Speller:
    """Encodes texts in one template, with or without the control tokens they name."""

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        arguments: dict[str, Any],
        date: str,
        keep: bool,
    ):
        self._tokenizer, self._template = tokenizer, template
        self._arguments, self._date, self._keep = arguments, date, keep
        self._control = control_tokens(tokenizer)
        self._pattern = names_pattern(self._control)
        self._unknown = unknown_id(tokenizer)
        self._bos = () if template == "chat" else bos(tokenizer)
        self._frames: dict[Turns, _Frame] = {}
        self._by_pieces: dict[Turns, bool] = {}

    def encode(
        self, text: str, before: Turns, full: str, ids: list[int], what: str
    ) -> list[int]:
        """Token ids of a text; `full` is it in its template, and `ids` are of that."""
        frame, control = self.frame(before), set(self._control.values())
        inner = _inner(frame, text, full)
        if not inner:
            raise ConfigError(f"{what} must not be empty, got {text!r}.")
        expected = [self._control[name] for name in frame.names()]
        if not self._keep:
            present = [i for i in ids if i in control]
            if present != expected or frame.spans(full) != frame.template_spans(inner):
                ids = _encode_pieces(self._tokenizer, frame, inner, what)
                if before not in self._by_pieces:
                    fits = _can_encode_pieces(self._tokenizer, frame)
                    self._by_pieces[before] = fits
                same = [i for i in ids if i in control] == expected
                if not same or not self._by_pieces[before]:
                    raise control_token_error(text, what)
        if self._unknown not in expected and self._unknown in ids:
            raise unknown_character_error(text, what)
        # Text that was templated beforehand may have its BOS already.
        return ids if tuple(ids[:1]) == frame.bos else [*frame.bos, *ids]

    def frame(self, before: Turns) -> _Frame:
        """What is around a text after the turns `before`."""
        if before not in self._frames:
            self._frames[before] = self._make_frame(before)
        return self._frames[before]

    def _make_frame(self, before: Turns) -> _Frame:
        if self._template != "chat":
            if before:
                raise ConfigError(
                    f"turns before the prompt need template chat, got template "
                    f"{self._template!r} and {len(before)} turns."
                )
            return _Frame(*FIXED[self._template], self._bos, self._pattern)
        pattern = self._pattern
        text, after = self._around(before)
        named = [
            i
            for i, (_, content) in enumerate(before)
            if pattern and not self._keep and pattern.search(content)
        ]
        if not named:
            return _Frame(text, after, (), pattern)
        marks = {i: f"\ue000turn{i}\ue001" for i in named}
        marked = tuple(
            (role, marks.get(i, content)) for i, (role, content) in enumerate(before)
        )
        rest, _ = self._around(marked)
        for change in (str, str.strip):  # contents as they are, or stripped
            spans, parts, at = [], rest, 0
            for i in named:
                head, _, parts = parts.partition(marks[i])
                content = change(before[i][1])
                at += len(head)
                spans.append((at, at + len(content)))
                at += len(content)
            frame = _Frame(text, after, (), pattern, tuple(spans))
            if _with_marks(frame, [marks[i] for i in named]) == rest:
                return frame
        raise ConfigError(
            f"the chat template does not print the turn {before[named[0]][1][:60]!r} "
            "as it is; choose another template or remove the row."
        )

    def _around(self, before: Turns) -> tuple[str, str]:
        """(text before the user's text, text after it)."""
        (text,) = self.render([_PLACEHOLDER], [before])
        head, *rest = text.split(_PLACEHOLDER)
        if len(rest) != 1:
            raise ConfigError(
                f"the chat template must print the user's text once, printed it "
                f"{len(rest)} times; choose another template."
            )
        return head, rest[0]

    def render(self, texts: Sequence[str], befores: Sequence[Turns]) -> list[str]:
        """Each text in its template, as text."""
        if self._template != "chat":
            before, after = FIXED[self._template]
            return [before + text + after for text in texts]
        pairs = zip(texts, befores, strict=True)
        turns = [[*before, ("user", text)] for text, before in pairs]
        try:
            return apply_chat(self._tokenizer, turns, self._arguments, self._date)
        except ConfigError:
            if len(texts) == 1:
                raise
        for i, one in enumerate(turns):
            try:
                apply_chat(self._tokenizer, [one], self._arguments, self._date)
            except ConfigError as error:
                raise TextError(i, str(error)) from error
        raise AssertionError("unreachable: one of the texts was refused")


def apply_chat(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    arguments: Mapping[str, Any] = MappingProxyType({}),
    date: str = "",
    *,
    answer_follows: bool = True,
) -> list[str]:
    """Each conversation in the tokenizer's chat template, as text.

    Args:
        arguments, date: As `encode_templated`.
        answer_follows: The head of an assistant's turn is printed last.

    Raises:
        ConfigError: the template refuses the turns.
    """
    import jinja2

    turns = [
        [
            dict(turn)
            if isinstance(turn, Mapping)
            else {"role": turn[0], "content": turn[1]}
            for turn in conversation
        ]
        for conversation in conversations
    ]
    options = dict(arguments)
    source = tokenizer.get_chat_template(tools=options.get("tools"))
    if date and "strftime_now" in source:
        options["chat_template"] = _at(date) + source
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer_follows, **options
        )
    except jinja2.TemplateSyntaxError as error:
        raise syntax_error(tokenizer, error) from error
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        roles = dict.fromkeys(str(turn.get("role")) for turn in turns[0])
        raise ConfigError(
            f"the chat template refuses {' and '.join(roles)} turns: {error}."
        ) from error


def _at(date: str) -> str:
    """A definition of `strftime_now` at that time, to be put before a template."""
    clock = datetime.datetime.fromisoformat(date)
    letters = "aAbBcdDeFfGHIjklmMpRsSTuUVwWxXyYzZ"
    codes = [f"%{flag}{letter}" for letter in letters for flag in ("", "-")]
    pairs = [*((code, clock.strftime(code)) for code in codes), ("%%", "%")]
    return (
        "{% macro strftime_now(form) %}{% set now = namespace(text=form) %}"
        f"{{% for code, value in {pairs!r} %}}"
        "{% set now.text = now.text | replace(code, value) %}{% endfor %}"
        "{{ now.text }}{% endmacro +%}"
    )


def _with_marks(frame: _Frame, marks: Sequence[str]) -> str:
    """`frame.before` with marks in place of its quoted parts."""
    own = [frame.before[start:end] for start, end in frame.own()]
    return own[0] + "".join(m + text for m, text in zip(marks, own[1:], strict=True))


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
            (encoded,) = encode_plain(tokenizer, [piece])
            if what is not None:
                control = set(control_tokens(tokenizer).values())
                check_plain(tokenizer, piece, encoded, control, what)
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
    bare = _with_marks(frame, ["x"] * len(frame.quoted))
    frame = frame._replace(before=bare, quoted=())
    text = frame.before + _PLACEHOLDER + frame.after
    (ids,) = tokenizer([text], add_special_tokens=False)["input_ids"]
    return _encode_pieces(tokenizer, frame, _PLACEHOLDER) == ids
