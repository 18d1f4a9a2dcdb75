import chex
import numpy as np
import pytest

from grpo_jax import Example, Rollouts
from grpo_jax.errors import ConfigError
from grpo_jax.rollouts.encoding import answer_rollouts, decode_groups, pad_left
from grpo_jax.rollouts.lengths import bucket, completion_buckets
from grpo_jax.tasks.plain_text import encode_all
from grpo_jax.tasks.tokenizers import character_tokenizer
from grpo_jax.tasks.types import Task


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer("ab")  # pad 0, eos 1, a 2, b 3


@pytest.fixture(scope="module")
def task(tokenizer):
    return Task(
        name="ab", train=[], heldout=[], tokenizer=tokenizer, reward=lambda e, c: 0.0
    )


def test_encode_all(tokenizer):
    assert encode_all(tokenizer, ["ab", "b"], "a prompt") == [[2, 3], [3]]


def test_text_without_a_token_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="a prompt 'axb' has a character without"):
        encode_all(tokenizer, ["ab", "axb"], "a prompt")


def test_empty_text_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="an answer must not be empty, got ''"):
        encode_all(tokenizer, ["ab", ""], "an answer")


def test_pad_left():
    ids, mask = pad_left([[5, 6], [7, 8, 9]], 3, pad_id=4)
    assert ids.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    chex.assert_type([ids, mask], np.int32)
    with pytest.raises(ValueError, match="at least 3, .* longest row, got 2"):
        pad_left([[5, 6], [7, 8, 9]], 2, pad_id=4)


def test_answer_rollouts_end_with_eos(task):
    examples = [Example("a", "bb"), Example("ab", "a")]
    rollouts = answer_rollouts(task, examples, prompt_length=2, length=4)
    expected = Rollouts(
        prompts=np.array([[0, 2], [2, 3]]),
        prompt_mask=np.array([[0, 1], [1, 1]]),
        completions=np.array([[[3, 3, 1, 0]], [[2, 1, 0, 0]]]),
        completion_mask=np.array([[[1, 1, 1, 0]], [[1, 1, 0, 0]]]),
        behaviour_logprobs=np.zeros((2, 1, 4)),
        rewards=None,
    )
    chex.assert_trees_all_equal(rollouts, expected)


@pytest.mark.parametrize(("prompt_length", "length"), [(1, 4), (2, 2)])
def test_answer_rollouts_refuse_what_is_too_long(task, prompt_length, length):
    with pytest.raises(ValueError):
        answer_rollouts(task, [Example("ab", "bb")], prompt_length, length)


def test_decode_groups_leaves_eos_and_padding_out(task):
    completions = np.array([[[2, 3, 1, 0], [2, 2, 2, 2]], [[1, 0, 0, 0], [3, 1, 0, 0]]])
    mask = np.array([[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0]]])
    texts = decode_groups(task, completions, mask)
    assert texts == [["ab", "aaaa"], ["", "b"]]


# Only the EOS at the end is removed; sampled padding and ids without a token are kept
# visible, so that no wrong completion reads like a right one.
def test_decode_groups_shows_what_is_not_text(task):
    completions = np.array([[[2, 0, 1], [2, 9, 1], [0, 2, 1], [2, 1, 0]]])
    mask = np.array([[[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]]])
    (texts,) = decode_groups(task, completions, mask)
    assert texts[3] == "a" and len(set(texts)) == 4


# Ids: 2 is "a", 3 is "b"; 9 and 12 are of no token.
def test_an_unknown_id_keeps_its_neighbours_apart(task):
    completions = np.array([[[2, 9, 3, 1], [9, 12, 2, 3], [2, 3, 9, 1]]])
    (texts,) = decode_groups(task, completions, np.ones_like(completions))
    assert texts == ["a\ufffdb", "\ufffd\ufffdab", "ab\ufffd"]


def test_decoding_undoes_encoding(task):
    examples = [Example("a", "abba"), Example("a", "b")]
    rollouts = answer_rollouts(task, examples, 1, 6)
    texts = decode_groups(task, rollouts.completions, rollouts.completion_mask)
    assert texts == [["abba"], ["b"]]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 1), (16, 16), (17, 32), (100, 112), (128, 128), (129, 160), (1000, 1024)],
)
def test_bucket_golden(length, expected):
    assert bucket(length) == expected


def test_buckets_cover_their_lengths_and_are_few():
    lengths = np.arange(1, 5000)
    buckets = np.array([bucket(int(n)) for n in lengths])
    assert (buckets >= lengths).all() and (np.diff(buckets) >= 0).all()
    assert all(bucket(int(b)) == b for b in np.unique(buckets))
    for low in (16, 128, 1024):
        assert len(np.unique(buckets[low : 2 * low])) <= 8
    assert (buckets[256:] < 1.25 * lengths[256:]).all()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(8, [8]), (64, [64]), (128, [64, 128]), (256, [64, 128, 256]), (130, [80, 130])],
)
def test_completion_buckets(tokens, expected):
    assert completion_buckets(tokens) == expected
