"""Tokenizers made here, as Hugging Face fast tokenizers like any other."""

import os

PAD, EOS = "<pad>", "<eos>"


def character_tokenizer(alphabet: str):
    """One token per character of `alphabet`, after <pad> (0) and <eos> (1).

    Text with any other character has no encoding: `encode_all` says so.
    """
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it reports torch's absence
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
