"""Small tokenizers in the forms of published chat models."""

import json

from grpo_jax.tasks.templates import CHATML

TURNS = "{% for m in messages %}"
LLAMA = (
    "{{ bos_token }}" + TURNS + "{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + TURNS
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + TURNS + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    TURNS + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GLM = (  # no token ends a turn: the next turn's begins
    "[gMASK]" + TURNS + "{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (  # as Qwen3
    CHATML + "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHATML


def chat_tokenizer(
    chat_template, names, *, eos, bos=None, pad=None, adds_bos=False, special=True
):
    """A byte-level tokenizer with control tokens `names`, from id 0."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*names, *alphabet])}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(n, special=special, normalized=False) for n in names])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=pad or eos,
        chat_template=chat_template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def chatml(template=CHATML, **changes):
    """As Qwen2.5: <|endoftext|> (0) pads, <|im_end|> (2) ends a turn."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    given = dict(eos="<|im_end|>", pad="<|endoftext|>") | changes
    return chat_tokenizer(template, names, **given)


LLAMA_NAMES = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
]  # fmt: skip


def llama(template=LLAMA, **changes):
    """As Llama 3: adds its BOS (0) to every text."""
    given = dict(eos="<|end_of_text|>", bos="<|begin_of_text|>", adds_bos=True)
    return chat_tokenizer(template, LLAMA_NAMES, **(given | changes))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count=20, **more):
    """Rows of a jsonl task."""
    return [{"prompt": f"{a}+1=?", "answer": str(a + 1), **more} for a in range(count)]
