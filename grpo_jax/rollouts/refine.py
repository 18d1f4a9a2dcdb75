"""Draft, then refine (iGRPO): the best of some drafts joins the prompt.

Drafts are sampled and scored like any completion and carry no gradient; the update
sees only the refinements, whose prompt is the template with the draft in it.
"""

import re
from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.tasks.plain_text import encode_all

Piece = str | tuple[int, ...]  # "prompt", "draft", or literal token ids


def template_pieces(tokenizer: Any, template: str) -> list[Piece]:
    """Parts of a template: `{prompt}` and `{draft}` by name, other text as token ids.

    Parts are joined as tokens, so the refined prompt contains exactly the tokens that
    were sampled.

    Args:
        tokenizer: A transformers tokenizer.
        template: Text with the two names.

    Raises:
        ConfigError: `{draft}` or `{prompt}` is missing, another name is used, or the
            text between cannot be encoded.
    """
    parts = re.split(r"(\{\w*\})", template)
    names = [part for part in parts if part.startswith("{")]
    wrong = [name for name in names if name not in ("{prompt}", "{draft}")]
    if wrong or not {"{prompt}", "{draft}"} <= set(names):
        raise ConfigError(
            "sampling.refine_template must hold {prompt} and {draft} and no other "
            f"name, got {template!r}."
        )
    pieces: list[Piece] = []
    for part in parts:
        if part in names:
            pieces.append(part[1:-1])
        elif part:
            what = f"sampling.refine_template (here {template!r}): the text"
            pieces.append(tuple(encode_all(tokenizer, [part], what)[0]))
    return pieces


def refined_length(
    pieces: Sequence[Piece], prompt_tokens: int, draft_tokens: int
) -> int:
    """Tokens of the longest refined prompt."""
    lengths = {"prompt": prompt_tokens, "draft": draft_tokens}
    return sum(lengths[p] if isinstance(p, str) else len(p) for p in pieces)


def refined_prompts(
    pieces: Sequence[Piece],
    prompts: Sequence[Sequence[int]],
    drafts: np.ndarray,
    mask: np.ndarray,
    rewards: np.ndarray,
    eos_ids: Container[int],
) -> list[list[int]]:
    """Token ids of each prompt with its best draft, without the draft's EOS.

    The best draft is the first one of the highest reward. A missing reward counts as
    the lowest.

    Args:
        pieces: Of the template.
        prompts: [P] rows of token ids.
        drafts, mask: [P, N, T] int32.
        rewards: [P, N] float32, NaN where missing.
        eos_ids: Tokens that end a completion (`Task.stop_ids`).
    """
    best = np.argmax(np.where(np.isnan(rewards), -np.inf, rewards), axis=1)
    rows = []
    for p, i in enumerate(best):
        draft = drafts[p, i][mask[p, i] > 0].tolist()
        if draft and draft[-1] in eos_ids:
            draft.pop()
        ids = {"prompt": list(prompts[p]), "draft": draft}
        parts = (ids[x] if isinstance(x, str) else x for x in pieces)
        rows.append([token for part in parts for token in part])
    return rows
