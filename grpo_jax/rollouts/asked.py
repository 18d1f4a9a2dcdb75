"""What a model is asked, for the record: fingerprints of encoded prompts."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.tasks.templates import FIXED
from grpo_jax.tasks.types import Task


def asked_facts(
    task: Task, trained: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """What a task asks: a hash of its encoded prompts, and of what they are made of.

    Args:
        trained: Token ids of the trained prompts; None: they are encoded here.
    """
    tokenizer = task.tokenizer
    rows = encode_prompts(task, task.train) if trained is None else trained
    digest = hashlib.sha256()
    for ids in (*rows, *encode_prompts(task, task.heldout)):
        digest.update(np.asarray([len(ids), *ids], np.int64).tobytes())
    template: Any = FIXED.get(task.template)
    if template is None:
        template = tokenizer.chat_template
    texts = [[e.context, e.prompt] for e in (*task.train, *task.heldout)]
    return {
        "encoded": digest.hexdigest()[:20],
        "texts": _hash(texts),
        "template": _hash(template),
        "system": task.system,
        "arguments": dict(task.template_arguments),
        "control_tokens": task.control_tokens,
        "vocabulary": _hash(sorted(tokenizer.get_vocab().items())),
        "first": tokenizer.decode(rows[0], skip_special_tokens=False) if rows else "",
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]
