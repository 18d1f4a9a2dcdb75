import math

import numpy as np
import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.rollouts.refine import refined_length, refined_prompts, template_pieces
from grpo_jax.tasks.tokenizers import character_tokenizer

NAN = float("nan")
EOS = 1


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer("ab,{}")  # pad 0, eos 1, a 2, b 3, comma 4


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("{prompt}{draft}", ["prompt", "draft"]),
        ("{prompt}{draft},{prompt}", ["prompt", "draft", (4,), "prompt"]),
        ("ab{draft},{prompt}b", [(2, 3), "draft", (4,), "prompt", (3,)]),
        ("{draft}{draft}{prompt}", ["draft", "draft", "prompt"]),
    ],
)
def test_template_pieces(tokenizer, template, pieces):
    assert template_pieces(tokenizer, template) == pieces


@pytest.mark.parametrize(
    "template",
    ["", "ab", "{prompt}", "{draft},", "{prompt}{draft}{answer}", "{}{prompt}{draft}"],
)
def test_a_template_holds_the_prompt_and_the_draft(tokenizer, template):
    message = "sampling.refine_template must hold {prompt} and {draft} and no other"
    with pytest.raises(ConfigError, match=message):
        template_pieces(tokenizer, template)


def test_a_templates_text_must_have_tokens(tokenizer):
    message = "sampling.refine_template .* the text 'x' has a character without a"
    with pytest.raises(ConfigError, match=message):
        template_pieces(tokenizer, "{prompt}x{draft}")


# 2 prompts of 5, a draft of 7 and 2 + 1 tokens between.
def test_refined_length():
    pieces = ["prompt", (2, 3), "draft", (4,), "prompt"]
    assert refined_length(pieces, prompt_tokens=5, draft_tokens=7) == 20


def refined(drafts, lengths, rewards, prompts=((2, 3),), pieces=("prompt", "draft")):
    drafts = np.array(drafts)
    mask = np.arange(drafts.shape[-1]) < np.array(lengths)[..., None]
    rewards = np.array(rewards, np.float32)
    return refined_prompts(
        pieces, prompts, drafts, mask.astype(int), rewards, {EOS, 12}
    )


DRAFTS = [[[5, 1, 0], [6, 7, 1], [8, 9, 8]]]


@pytest.mark.parametrize(
    ("rewards", "draft"),
    [
        ([0, 1, 0.5], [6, 7]),  # without its EOS
        ([0, 0, 2], [8, 9, 8]),  # cut off before one
        ([1, 1, 0], [5]),  # the first of the best
        ([NAN, -1, -2], [6, 7]),
        ([-math.inf, NAN, -1], [8, 9, 8]),
        ([NAN, NAN, NAN], [5]),
    ],
)
def test_the_best_draft_joins_the_prompt(rewards, draft):
    actual = refined(DRAFTS, [[2, 3, 3]], [rewards])
    assert actual == [[2, 3, *draft]]


def test_each_prompt_has_its_own_draft_in_the_templates_place():
    actual = refined(
        DRAFTS * 2,
        [[2, 3, 3]] * 2,
        [[0, 0, 1], [1, 0, 0]],
        prompts=([2], [3, 3]),
        pieces=("draft", (4,), "prompt", "prompt"),
    )
    assert actual == [[8, 9, 8, 4, 2, 2], [5, 4, 3, 3, 3, 3]]
    assert all(type(token) is int for row in actual for token in row)


# The first ends at once, the second holds an EOS in its padding, the third is empty.
@pytest.mark.parametrize(
    ("best", "draft"), [([1, 0, 0], []), ([0, 1, 0], [6, 7]), ([0, 0, 1], [])]
)
def test_only_the_drafts_own_end_is_left_out(best, draft):
    drafts = [[[1, 0, 0], [6, 7, 1], [5, 5, 5]]]
    assert refined(drafts, [[1, 2, 0]], [best]) == [[2, 3, *draft]]


def test_an_end_within_a_draft_stays():
    assert refined([[[5, 1, 1]]], [[3]], [[1]]) == [[2, 3, 5, 1]]
