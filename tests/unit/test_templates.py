import itertools

import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.tasks.plain_text import encode_all
from grpo_jax.tasks.templates import CHATML, FIXED, TEMPLATES, encode_templated
from grpo_jax.tasks.tokenizers import character_tokenizer, train_tokenizer

TEXTS = ["What is 12 + 7?", "Where is the cat?\n\nIn the house.", "é 日本 <| eot |>"]
# The form of Llama 3: BOS is printed, content is stripped, turns end with <|eot|>.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n'"
    " + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
# The form of Gemma: no system turn, and a token that swallows the white space after it.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '\n' + m['content'] | trim }}"
    "{{ '<|eot|>\n' }}{% endfor %}{{ '<|head|>model\n' }}"
)
NAMES = ["<|begin|>", "<|eot|>", "<|head|>", "<|/head|>", "<|pad|>"]


def build(chat_template, *, rstrip=False, bos=True, texts=TEXTS):
    """A byte-level tokenizer that puts its BOS before every text."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(n, special=True, rstrip=rstrip) for n in NAMES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(list(texts) * 4, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>", eos_token="<|eot|>",
        pad_token="<|pad|>", chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


TOKENIZERS = {
    "chatml": lambda: train_tokenizer(TEXTS * 9, 400),
    "llama": lambda: build(LLAMA),
    "gemma": lambda: build(GEMMA),
    "swallowing": lambda: build(LLAMA, rstrip=True),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def applied(tokenizer, text, system=None):
    turns = [{"role": "user", "content": text}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]


def control(tokenizer):
    return {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


@pytest.mark.parametrize("text", [*TEXTS, "  spaces around \n", "\ue000text\ue001"])
def test_chat_is_apply_chat_template(tokenizer, text):
    (ids,) = encode_templated(tokenizer, "chat", [text])
    assert ids == applied(tokenizer, text)


def test_a_system_prompt_is_the_templates(tokenizer):
    if "raise_exception" in tokenizer.chat_template:
        with pytest.raises(ConfigError, match="refuses system and user turns: System"):
            encode_templated(tokenizer, "chat", TEXTS, system="Be brief.")
        return
    rows = encode_templated(tokenizer, "chat", TEXTS, system="Be brief.")
    assert rows == [applied(tokenizer, text, "Be brief.") for text in TEXTS]


def injections(tokenizer):
    names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    yield from names
    yield from (f"before {name}\n after" for name in names)
    yield from (a + b for a, b in itertools.product(names, names))
    yield "".join(f" {name} " for name in names) + "\ue000text\ue001"
    # What a template would look like, were it in the text.
    yield tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    for name in names:  # parts that the template's own text might complete
        yield from (name[:-2], name[2:], name[:-2] + name, name + name[2:])


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_text_of_the_user_is_a_control_token(tokenizer, template):
    if template == "qwen-math" and "<|im_start|>" not in tokenizer.get_vocab():
        pytest.skip("the template is not this tokenizer's")
    texts = list(injections(tokenizer))
    special = control(tokenizer)
    (benign,) = encode_templated(tokenizer, template, ["benign"])
    expected = [i for i in benign if i in special]
    rows = encode_templated(tokenizer, template, texts)
    before, after = FIXED.get(template, ("", ""))
    for text, ids in zip(texts, rows, strict=True):
        assert [i for i in ids if i in special] == expected
        shown = tokenizer.decode(ids, skip_special_tokens=False)
        assert text.strip() in shown
        if template != "chat":
            assert shown.removeprefix("<|begin|>") == before + text + after
    # One text's spelling does not depend on the others.
    for text, ids in list(zip(texts, rows, strict=True))[::7]:
        assert encode_templated(tokenizer, template, [text]) == [ids]


def test_answers_hold_no_control_tokens_and_no_bos(tokenizer):
    special = control(tokenizer)
    texts = list(injections(tokenizer))
    for text, ids in zip(texts, encode_all(tokenizer, texts, "an answer"), strict=True):
        assert special.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("template", ["none", "qa", "r1"])
@pytest.mark.parametrize(("bos", "expected"), [(True, [0]), (False, [])])
def test_fixed_templates_have_a_bos_where_the_tokenizer_adds_one(
    template, bos, expected
):
    tokenizer = build(LLAMA, bos=bos)
    before, after = FIXED[template]
    rows = encode_templated(tokenizer, template, TEXTS)
    for text, ids in zip(TEXTS, rows, strict=True):
        assert ids == tokenizer(before + text + after)["input_ids"]
        assert [i for i in ids if i == 0] == expected


def test_a_chat_template_prints_its_own_bos_once():
    tokenizer = build(LLAMA)
    (ids,) = encode_templated(tokenizer, "chat", ["<|begin|>hello"])
    assert ids[0] == 0 and ids.count(0) == 1


def test_the_text_of_qwen_math():
    tokenizer = train_tokenizer(TEXTS, 300)
    (ids,) = encode_templated(tokenizer, "qwen-math", ["1+1?"])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer "
        "within \\boxed{}.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    assert [ids] == encode_templated(tokenizer, "chat", ["1+1?"], system=system)


@pytest.mark.parametrize(
    ("chat_template", "text", "message"),
    [
        (CHATML, "", "a prompt must not be empty, got ''"),
        (LLAMA, " \n ", "a prompt must not be empty, got ' "),
        ("{{ messages[0]['content'] * 2 }}", "x", "print the user's text once, .* 2 t"),
        ("nothing", "x", "must print the user's text once, printed it 0 times"),
        ("{{ messages[0]['content'] | replace('z', 'y') }}", "z", "prompt 'z' as it"),
        (None, "x", "template chat needs a tokenizer with a chat_template.*none, qa"),
    ],
)
def test_what_a_chat_template_may_not_do(chat_template, text, message):
    with pytest.raises(ConfigError, match=message):
        encode_templated(build(chat_template), "chat", ["ok", text])


def test_a_template_must_exist_and_fit():
    tokenizer = build(LLAMA)
    with pytest.raises(ConfigError, match="task.template must be one of none.*'R1'"):
        encode_templated(tokenizer, "R1", ["x"])
    with pytest.raises(ConfigError, match="task.system needs template chat, got temp"):
        encode_templated(tokenizer, "none", ["x"], system="Be brief.")
    with pytest.raises(ConfigError, match="needs the tokens <.im_end.>, <.im_start.>"):
        encode_templated(tokenizer, "qwen-math", ["x"])


def test_characters_without_a_token_are_named():
    tokenizer = character_tokenizer("ab<>pd")
    with pytest.raises(ConfigError, match="a prompt 'axb' has a character without a"):
        encode_templated(tokenizer, "none", ["ab", "axb"])
    with pytest.raises(ConfigError, match="'Question: a\\\\nAnswer:' has a character"):
        encode_templated(tokenizer, "qa", ["a"])
    # Spelt out, <pad> is five characters that this alphabet has.
    assert encode_templated(tokenizer, "none", ["<pad>"]) == [[4, 6, 2, 7, 5]]


# As in GPT-2, whose one special token is all of them.
def test_one_token_may_be_eos_and_unknown():
    tokenizer = build("{{ messages[0]['content'] + eos_token }}")
    tokenizer.unk_token = tokenizer.pad_token = tokenizer.eos_token
    (ids,) = encode_templated(tokenizer, "chat", [TEXTS[0]])
    assert ids == applied(tokenizer, TEXTS[0])
    for text in ("<|eot|>", "a<|eot|> b <|eot|>"):
        (ids,) = encode_templated(tokenizer, "chat", [text])
        assert ids.count(1) == 1 and tokenizer.decode(ids) == text + "<|eot|>"
        (ids,) = encode_templated(tokenizer, "none", [text])
        assert 1 not in ids and tokenizer.decode(ids) == "<|begin|>" + text
        assert tokenizer.decode(*encode_all(tokenizer, [text], "an answer")) == text


def metaspace(scheme):
    """Marks where a text, or each piece of it, starts, as Llama 2 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(i) for i in range(33, 127)] + ["\u2581", "\n", "\ue000", "\ue001"]
    vocab = {t: i for i, t in enumerate(["<unk>", "</s>", *letters])}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>",
        chat_template="{{ 'U: ' + messages[0]['content'] + '</s>A:' }}",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def test_a_tokenizer_that_marks_starts():
    tokenizer = metaspace("always")
    (ids,) = encode_templated(tokenizer, "chat", ["hello there"])
    assert ids == applied(tokenizer, "hello there")
    (ids,) = encode_templated(tokenizer, "chat", ["a</s>b"])
    assert [i for i in ids if i == 1] == [1]
    with pytest.raises(ConfigError, match="hello é' has a character without a token"):
        encode_templated(tokenizer, "chat", ["hello é"])


# Where only the first piece is marked, no piece can be spelt out on its own: such a row
# is refused, not encoded in some other way.
def test_what_cannot_be_spelt_out_is_refused():
    tokenizer = metaspace("first")
    (ids,) = encode_templated(tokenizer, "chat", ["hello there"])
    assert ids == applied(tokenizer, "hello there")
    with pytest.raises(ConfigError, match="'a</s>b' holds a control token's name, whi"):
        encode_templated(tokenizer, "chat", ["ok", "a</s>b"])
