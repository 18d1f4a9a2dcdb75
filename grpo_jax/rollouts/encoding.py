"""Text to padded token arrays and back, with the lengths rounded to few shapes."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.types import Rollouts
from grpo_jax.tasks.templates import encode_all, encode_templated
from grpo_jax.tasks.types import Task


def encode_prompts(task: Task, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of each example's prompt in the task's template."""
    return encode_templated(
        task.tokenizer,
        task.template,
        [e.prompt for e in examples],
        system=task.system,
    )


def encode_imitated(task: Task, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of what a model may imitate of each example, with the EOS.

    Raises:
        ConfigError: a text is empty, cannot be encoded, or holds a token that ends
            completions.
    """
    texts = [task.imitated(e) for e in examples]
    rows = encode_all(task.tokenizer, texts, "an answer")
    for text, ids in zip(texts, rows, strict=True):
        if not task.stop_ids.isdisjoint(ids):
            raise ConfigError(
                f"an answer {text[:200]!r} holds a token that ends completions; remove "
                "the row."
            )
    return [[*ids, task.end_id] for ids in rows]


def pad_left(rows: Sequence[Sequence[int]], length: int, pad_id: int):
    """(ids, mask), each [len(rows), length] int32, padded on the left."""
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, mask


def answer_rollouts(
    task: Task, examples: Sequence[Example], prompt_length: int, length: int
) -> Rollouts:
    """Examples as rollouts of one completion, what is imitated of each and the EOS:
    [N, 1, length].

    `behaviour_logprobs` are 0: nobody sampled them.
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
    """`answer_rollouts` of token ids; an answer's last one is its EOS."""
    ids, prompt_mask = pad_left(prompts, prompt_length, pad_id)
    completions = np.full((len(answers), 1, length), pad_id, np.int32)
    mask = np.zeros_like(completions)
    for i, answer in enumerate(answers):
        completions[i, 0, : len(answer)] = answer
        mask[i, 0, : len(answer)] = 1
    zeros = np.zeros(completions.shape, np.float32)
    return Rollouts(ids, prompt_mask, completions, mask, zeros)


def decode_groups(task: Task, completions, mask) -> list[list[str]]:
    """Text of completions [P, G, T] without their final EOS and what follows it.

    Every other token shows, padding and control tokens sampled on the way included, and
    an id that the tokenizer does not know as U+FFFD: where one completion is right, no
    other one reads like it.
    """
    p, g, _ = completions.shape
    tokenizer, stop = task.tokenizer, task.stop_ids
    lengths, known = mask.sum(-1), len(tokenizer)
    texts = []
    for ids, length in zip(
        completions.reshape(p * g, -1), lengths.reshape(-1), strict=True
    ):
        ids = ids[:length].tolist()
        if ids and ids[-1] in stop:
            ids.pop()
        text = tokenizer.decode(
            [i for i in ids if i < known],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        texts.append(text + "\ufffd" * sum(i >= known for i in ids))
    return [texts[i * g : (i + 1) * g] for i in range(p)]
