"""Whether every token that a run uses has a row in the model's embedding.

A tokenizer may have more tokens than the model, such as one for images beside a model
of text, as long as no prompt, answer or end is made of them.
"""

from collections.abc import Iterable, Iterator, Sequence

from grpo_jax.errors import ConfigError
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.rollouts.refine import Piece
from grpo_jax.tasks.ends import named_tokens
from grpo_jax.tasks.plain_text import encode_plain
from grpo_jax.tasks.types import Task


def check_embedded(
    task: Task, vocab_size: int, *, refine: Sequence[Piece] = ()
) -> None:
    """ConfigError where a token that the task uses has no embedding.

    Args:
        task: Its prompts, answers, ends and padding are looked at, if its tokenizer has
            tokens past the embedding at all.
        vocab_size: Rows of the embedding.
        refine: Parts of a prompt with a draft in it.
    """
    largest = max(task.tokenizer.get_vocab().values())
    if max(task.ends) > max(largest, vocab_size - 1):
        raise ConfigError(
            f"task.eos_ids must be tokens of the vocabulary, from 0 to {largest}, got "
            f"{task.ends}; leave them out for the tokenizer's EOS."
        )
    if largest < vocab_size:
        return
    for what, ids in _used(task, refine):
        largest = max(ids, default=0)
        if largest >= vocab_size:
            name = named_tokens(task.tokenizer, [largest])
            raise ConfigError(
                f"model.vocab_size must be above {largest}, since {what} of task "
                f"{task.name} uses the token {name}, got {vocab_size}; the model and "
                "the tokenizer do not belong together, or, for a new model, leave it "
                "out."
            )


def _used(task: Task, refine: Sequence[Piece]) -> Iterator[tuple[str, Iterable[int]]]:
    """(what uses them, token ids), one after the other."""
    yield "an end", task.ends
    yield "the padding", [task.tokenizer.pad_token_id]
    yield (
        "the refine template",
        [i for x in refine if not isinstance(x, str) for i in x],
    )
    examples = [*task.train, *task.heldout]
    for ids in encode_prompts(task, examples):
        yield "a prompt", ids
    texts = [x for x in map(task.imitated, examples) if isinstance(x, str) and x]
    for ids in encode_plain(task.tokenizer, texts) if texts else []:
        yield "an answer", ids
