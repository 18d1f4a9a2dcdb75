"""Tokenizers made for a task: characters or a trained BPE, as Hugging Face fast
tokenizers."""

from collections.abc import Iterable
from typing import Any

from grpo_jax.errors import ConfigError
from grpo_jax.models.hub import quiet_transformers
from grpo_jax.tasks.templates import CHATML

PAD, EOS = "<pad>", "<eos>"
# Of trained tokenizers, from id 0: padding, end of a turn, start of a turn.
CHAT_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
VOCAB_SIZE = 2048
_SMALLEST = 256 + len(CHAT_TOKENS)


def character_tokenizer(alphabet: str) -> Any:
    """One token per character of `alphabet`, after <pad> (0) and <eos> (1).

    Text with any other character has no encoding: `encode_all` says so.
    """
    quiet_transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, EOS, *alphabet]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> Any:
    """A byte-level BPE of those texts: any text has an encoding, each digit a token.

    The same texts in the same order give the same tokenizer. Its chat template is
    ChatML, whose <|im_end|> (1) is the EOS; <|endoftext|> (0) is the padding.

    Args:
        vocab_size: Most tokens, the 256 bytes and 3 control tokens included; default
            2,048. Short texts give fewer.
    """
    vocab_size = VOCAB_SIZE if vocab_size is None else vocab_size
    if vocab_size < _SMALLEST:
        raise ConfigError(
            f"task.vocab_size must be at least {_SMALLEST}, the bytes and the control "
            f"tokens, got {vocab_size}."
        )
    quiet_transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=CHAT_TOKENS[0],
        eos_token=CHAT_TOKENS[1],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def spellings(tokenizer: Any, text: str, limit: int = 2) -> int:
    """Number of token sequences that decode to exactly `text`, counted up to `limit`.

    1 for every answer is what makes exp(log-prob of the answer) an exact pass rate.
    """
    return _count(_pieces(tokenizer, set(text)), text, limit)


def check_single_spelling(tokenizer: Any, answers: Iterable[str], task: str) -> None:
    """Raises ConfigError unless each answer has exactly one token sequence."""
    answers = sorted(set(answers))
    pieces = _pieces(tokenizer, set("".join(answers)))
    for answer in answers:
        if _count(pieces, answer, 2) != 1:
            raise ConfigError(
                f"the pass rates of task {task} are exact because one sequence of "
                f"tokens is right, but this tokenizer has several for {answer!r}; "
                "leave task.tokenizer out, or ask the same as a jsonl task."
            )


def _pieces(tokenizer: Any, alphabet: set[str]) -> tuple[list[str], list[str]]:
    """(texts at the start, texts after another token) of the tokens that have only
    characters of the alphabet.

    The two may differ: some decoders drop the space that the first token begins with.
    """
    ids = sorted(tokenizer.get_vocab().values())
    lead = tokenizer("x", add_special_tokens=False)["input_ids"][-1]
    before = tokenizer.decode([lead], clean_up_tokenization_spaces=False)
    options = {"clean_up_tokenization_spaces": False, "skip_special_tokens": False}
    first = tokenizer.batch_decode([[i] for i in ids], **options)
    later = tokenizer.batch_decode([[lead, i] for i in ids], **options)
    later = [text.removeprefix(before) for text in later]
    first, later = (
        [text for text in part if set(text) <= alphabet] for part in (first, later)
    )
    return first, later


def _count(pieces: tuple[list[str], list[str]], text: str, limit: int) -> int:
    """Number of ways to write the text as pieces, at most `limit`; with an empty piece
    there is no end of ways."""
    first, later = pieces
    if "" in first or "" in later:
        return limit
    ways = [0] * (len(text) + 1)
    for piece in first:
        if text.startswith(piece):
            ways[len(piece)] += 1
    for at in range(1, len(text)):
        if ways[at]:
            for piece in later:
                if text.startswith(piece, at):
                    ways[at + len(piece)] += ways[at]
    return min(ways[-1], limit)
