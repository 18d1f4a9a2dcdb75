"""What we write, read by transformers and PEFT themselves."""

import jax
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.tasks.tokenizers import train_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = dict(
    width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)
QUESTIONS = ["How many figs has Ann?", "What is 12 and 30?", "Say <|im_end|> twice."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(QUESTIONS, 300)


@pytest.fixture(scope="module")
def policy(tokenizer):
    config = gj.ModelConfig(vocab_size=len(tokenizer), qk_bias=True, **SHAPE)
    policy = gj.init_policy(config, jax.random.key(0))
    # Larger weights: the greedy token should not hang on rounding.
    return policy.replace(jax.tree.map(lambda x: 2 * x, policy.params))


def test_transformers_says_the_same_greedy_tokens(policy, tokenizer, tmp_path):
    """Through the chat template, from the exported directory alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gj.save_pretrained(policy, tmp_path, tokenizer=tokenizer)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS[:2]]
    inputs = their_tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = expected[:, inputs["input_ids"].shape[1] :].numpy()

    rollouts = gj.sample(
        gj.load_pretrained(tmp_path),
        inputs["input_ids"].numpy().astype(np.int32),
        inputs["attention_mask"].numpy().astype(np.int32),
        group_size=1,
        max_new_tokens=12,
        key=jax.random.key(0),
        top_k=1,
        eos_id=gj.eos_ids(tmp_path),
        pad_id=tokenizer.pad_token_id,
    )
    ours = np.asarray(rollouts.completions[:, 0])
    np.testing.assert_array_equal(ours[:, : expected.shape[1]], expected)
    assert (ours[:, expected.shape[1] :] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("targets", [("q", "v"), None], ids=["q and v", "all"])
def test_peft_computes_with_our_adapter(policy, tokenizer, tmp_path, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    policy = gj.init_policy(policy.config, jax.random.key(3))
    settings = {} if targets is None else {"targets": targets}
    adapted = gj.add_lora(policy, rank=3, alpha=6.0, key=jax.random.key(1), **settings)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    adapted = adapted.replace(
        jax.tree.map(
            lambda x: 0.1 * jax.random.normal(next(keys), x.shape), adapted.params
        )
    )
    gj.save_pretrained(policy, tmp_path / "base", tokenizer=tokenizer)
    base = str(tmp_path / "base")
    gj.save_adapter(adapted.params, adapted.config, tmp_path / "adapter", base=base)

    theirs = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = np.arange(3, 43, dtype=np.int32).reshape(2, 20)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        actual = gj.next_token_logits(adapted, ids)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    before = gj.next_token_logits(policy, ids)
    assert np.abs(np.asarray(before) - expected).max() > 0.1
