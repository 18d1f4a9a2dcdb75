"""What the README shows runs, and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_jax as gj
from grpo_jax.prompt_weights import WEIGHTS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FOLDERS = ("grpo_jax", "experiments", "tests", "docs")


def test_snippet_shows_one_method_two_ways():
    snippet = re.search(r"<!-- snippet -->\n```python\n(.*?)```", README, re.S)[1]
    assert len(snippet.strip().splitlines()) <= 15
    output = subprocess.check_output([sys.executable, "-c", snippet], text=True)
    reinforce, grpo, difference = output.strip().splitlines()
    assert "weights [1. 1. 1.]" in reinforce
    weights = [float(x) for x in re.search(r"weights \[(.*?)\]", grpo)[1].split()]
    assert weights[0] > weights[1] > weights[2] == 0
    numbers = re.findall(r"-?\d+\.?\d*e?-?\d*", difference.split(":")[1])
    assert max(abs(float(x)) for x in numbers) < 1e-6


@pytest.mark.parametrize("name", ["README.md", "BUILD_NOTES.md", "docs/extending.md"])
def test_every_path_that_a_document_names_exists(name):
    """Paths in backticks with a slash: from the root, or as in a table of a folder."""
    text = (ROOT / name).read_text(encoding="utf-8")
    endings = r"(?:\.py|\.md|\.sh|\.yaml|\.html|/)"
    paths = re.findall(rf"`((?:\.?\w[\w.-]*/)+(?:[\w.-]+{endings})?)`", text)
    ours = [p for p in paths if p.split("/")[0] in FOLDERS]
    assert len(ours) > 5
    assert not [path for path in ours if not (ROOT / path).exists()]


def test_the_tables_name_every_objective_and_no_rule_that_is_gone():
    rows = re.findall(r"^\| (`.*?`) \|.*\|.*\|$", README, re.M)
    named = set(re.findall(r"`([a-z_]+)`", " ".join(rows)))
    assert set(gj.OBJECTIVES) <= named, "add the preset to README's table of objectives"
    table = README[README.index("| weights | rule |") :]
    rules = re.findall(r"^\| (`.*?`) \|", table.split("\n\n")[0], re.M)
    rules = set(re.findall(r"`(\w+)`", " ".join(rules)))
    assert "std" in rules and rules <= set(WEIGHTS)
