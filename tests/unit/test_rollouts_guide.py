"""docs/rollouts.md: its code runs, its table names every form and field."""

import dataclasses
import re
import warnings
from pathlib import Path

import numpy as np

import grpo_jax as gj
from tests.chat_forms import chatml

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "rollouts.md").read_text()
BLOCKS = dict(re.findall(r"<!-- ([\w-]+) -->\n```python\n(.*?)```", GUIDE, re.S))


def test_the_blocks_run_in_their_order(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    space = {"tokenizer": chatml()}
    exec(BLOCKS["rows"], space)
    rollouts, metrics = space["rollouts"], space["metrics"]
    np.testing.assert_array_equal(
        rollouts.rewards, np.float32([[1, 0, np.nan], [0, 0.5, 1]])
    )
    assert metrics["update/applied"] == 1 and metrics["reward/missing"] == 0
    assert metrics["tokens/completion"] == 3 + 2 + 3 + 2 + 2
    mine = dict(space)
    exec(BLOCKS["forms"], space)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "1",
        "2",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the log-probs are made up
        exec(BLOCKS["checks"], mine)
    assert 0 <= mine["share"] < 0.37
    assert len(BLOCKS) == GUIDE.count("```python")


def test_the_tables_name_every_form_and_field():
    named = set(re.findall(r"^\| `([\w-]+)` \|", GUIDE, re.M))
    fields = {f.name for f in dataclasses.fields(gj.RowForm)}
    assert set(gj.ROW_FORMS) <= named
    assert named - set(gj.ROW_FORMS) <= fields | {"reward"}
