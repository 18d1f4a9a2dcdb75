"""SmolLM2-135M-Instruct against transformers, in float32: prompts, logits, text."""

import jax
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.rollouts.encoding import encode_prompts, pad_left

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

NEW = 24
QUESTIONS = [
    "What is the capital of France?",
    "Write a line about\n\n  two  cats — in 1,024 words or ½.",
    "Ann has 12 figs and eats 5. How many are left?",
    "Überprüfe: 3.14 * 2 = ?\tنعم 日本語 🙂",
]


@pytest.fixture(scope="module")
def theirs(real_model_directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        real_model_directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def ours(real_model_directory):
    return gj.load_pretrained(real_model_directory, dtype="float32")


@pytest.fixture(scope="module")
def task(real_model_directory):
    """A prompt of each of ladder's skills, after turns of examples."""
    tokenizer = gj.load_tokenizer(real_model_directory)
    return gj.load_task(
        "ladder", tokenizer=tokenizer, train_prompts=26, heldout_prompts=26
    )


@pytest.fixture(scope="module")
def chats(task):
    """(examples, their chats as transformers takes them)."""
    examples = [*task.train, *(gj.Example(q, "") for q in QUESTIONS)]
    chats = [
        [
            {"role": role, "content": content}
            for role, content in (*e.context, ("user", e.prompt))
        ]
        for e in examples
    ]
    return examples, chats


def test_prompts_are_the_tokens_of_their_chat_template(
    task, chats, real_model_directory
):
    from transformers import AutoTokenizer

    examples, messages = chats
    tokenizer = AutoTokenizer.from_pretrained(real_model_directory)
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert encode_prompts(task, examples) == expected
    assert len({len(ids) for ids in expected}) > 10


def test_logits_equal_theirs(ours, theirs, task, chats):
    """Prompts of different lengths, padded on the left."""
    rows = encode_prompts(task, chats[0][-8:])
    ids, mask = pad_left(rows, max(map(len, rows)), task.tokenizer.pad_token_id)
    live = mask.astype(bool)
    with jax.default_matmul_precision("highest"):
        actual = np.asarray(jax.jit(gj.next_token_logits)(ours, ids, mask))[live]
    with torch.no_grad():
        expected = theirs(
            torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask)
        )
    expected = expected.logits.numpy()[live]
    largest = np.abs(actual - expected).max() / np.abs(expected).max()
    norm = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    print(f"logits: relative error {largest:.1e} of the largest, {norm:.1e} in norm")
    assert largest < 1e-5 and norm < 1e-5


def test_greedy_text_equals_theirs(ours, theirs, task, chats):
    rows = encode_prompts(task, chats[0][-8:])
    ids, mask = pad_left(rows, max(map(len, rows)), task.tokenizer.pad_token_id)
    rollouts = gj.sample(
        ours, ids, mask, group_size=1, max_new_tokens=NEW, key=jax.random.key(0),
        top_k=1, eos_id=task.ends, pad_id=task.tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask),
            max_new_tokens=NEW,
            do_sample=False,
        )[:, ids.shape[1] :]
    actual = np.asarray(rollouts.completions[:, 0])[:, : expected.shape[1]]
    decode = task.tokenizer.batch_decode
    assert decode(actual) == decode(expected.numpy())
    np.testing.assert_array_equal(actual, expected.numpy())
    ended = rollouts.completion_mask[:, 0].sum(1) < NEW
    assert 0 < ended.sum() < len(rows)  # some end, some are cut off
