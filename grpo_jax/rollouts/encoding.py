"""Text to padded token arrays, and completions back to text."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.types import Rollouts, completion_lengths
from grpo_jax.tasks.plain_text import TextError, encode_all
from grpo_jax.tasks.templates import encode_templated
from grpo_jax.tasks.types import Task


def encode_prompts(task: Task, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of each example's prompt in the task's template.

    Raises:
        ConfigError: a prompt is empty or cannot be encoded; its row is named.
    """
    with _naming_rows(task, examples):
        return encode_templated(
            task.tokenizer,
            task.template,
            [e.prompt for e in examples],
            system=task.system,
            contexts=[e.context for e in examples],
            arguments=task.template_arguments,
            date=task.date,
            keep=task.control_tokens == "keep",
        )


@contextlib.contextmanager
def _naming_rows(task: Task, examples: Sequence[Example]) -> Iterator[None]:
    """Puts the row of an example before what is wrong with its text."""
    try:
        yield
    except TextError as error:
        place = task.places.get(examples[error.index])
        raise ConfigError(f"{place}: {error}" if place else str(error)) from error


def encode_imitated(task: Task, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of the text that a model imitates for each example, with the EOS.

    Raises:
        ConfigError: a text is empty, cannot be encoded, or contains a token that ends
            completions.
    """
    texts = [task.imitated(e) for e in examples]
    with _naming_rows(task, examples):
        rows = encode_all(task.tokenizer, texts, "an answer")
    for text, ids in zip(texts, rows, strict=True):
        if not task.stop_ids.isdisjoint(ids):
            raise ConfigError(
                f"an answer {text[:200]!r} holds a token that ends completions; remove "
                "the row."
            )
    return [[*ids, task.end_id] for ids in rows]


def pad_left(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), each [P, length] int32, of P rows of token ids padded on the left.

    Raises:
        ValueError: a row is longer.
    """
    longest = max(map(len, rows), default=0)
    if longest > length:
        raise ValueError(
            f"length must be at least {longest}, the tokens of the longest row, got "
            f"{length}."
        )
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, mask


def answer_rollouts(
    task: Task, examples: Sequence[Example], prompt_length: int, length: int
) -> Rollouts:
    """Examples as rollouts with one completion each: the imitated text and the EOS.

    Args:
        task: Its template and tokenizer encode the examples.
        examples: [P].
        prompt_length: L.
        length: T.

    Returns:
        [P, 1, T] completions; `behaviour_logprobs` are 0, as they were not sampled.
    """
    prompts, answers = encode_prompts(task, examples), encode_imitated(task, examples)
    pad_id = task.tokenizer.pad_token_id
    return pack_answers(prompts, answers, prompt_length, length, pad_id)


def pack_answers(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    prompt_length: int,
    length: int,
    pad_id: int,
) -> Rollouts:
    """`answer_rollouts` [P, 1, T] from token ids; an answer includes its EOS."""
    ids, prompt_mask = pad_left(prompts, prompt_length, pad_id)
    completions = np.full((len(answers), 1, length), pad_id, np.int32)
    mask = np.zeros_like(completions)
    for i, answer in enumerate(answers):
        completions[i, 0, : len(answer)] = answer
        mask[i, 0, : len(answer)] = 1
    logprobs = np.zeros(completions.shape, np.float32)
    return Rollouts._make((ids, prompt_mask, completions, mask, logprobs, None, None))


def decode_groups(
    task: Task,
    completions: np.ndarray,
    mask: np.ndarray,
) -> list[list[str]]:
    """Texts [P][G] of completions [P, G, T], each up to its final EOS, without it.

    What others wrote between sampled tokens, as a tool's results, is part of the text.
    Every other token is visible, sampled padding and control tokens included, and an id
    that the tokenizer does not know as U+FFFD in its place: a completion that differs
    from a right one never reads like it.

    Args:
        task: Its tokenizer decodes.
        completions: [P, G, T] int32.
        mask: [P, G, T], 1 on sampled tokens.
    """
    tokenizer, stop_ids = task.tokenizer, task.stop_ids
    ids = np.unique(completions).tolist()
    tokens = tokenizer.convert_ids_to_tokens(ids)
    unknown = {i for i, token in zip(ids, tokens, strict=True) if token is None}

    def decode(ids: list[int]) -> str:
        if ids and ids[-1] in stop_ids:
            ids.pop()
        known = itertools.groupby(ids, lambda i: i in unknown)
        return "".join(
            "\ufffd" * len(list(part))
            if strange
            else tokenizer.decode(
                list(part),
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            for strange, part in known
        )

    lengths = completion_lengths(mask)  # [P, G]
    return [
        [decode(ids[:n].tolist()) for ids, n in zip(group, counts, strict=True)]
        for group, counts in zip(completions, lengths, strict=True)
    ]
