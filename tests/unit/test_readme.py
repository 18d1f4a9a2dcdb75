"""What the README shows runs, and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

import grpo_jax as gj
from grpo_jax.prompt_weights import WEIGHTS

README = (Path(__file__).parents[2] / "README.md").read_text()


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


def test_every_file_of_the_map_exists():
    root = Path(__file__).parents[2]
    paths = re.findall(r"^\| `([\w/.]+)` \|", README, re.M)
    named = [path for path in paths if "/" in path]
    assert len(named) > 8
    assert all((root / path).exists() for path in named)


def test_the_tables_name_every_objective_and_no_rule_that_is_gone():
    rows = re.findall(r"^\| (`.*?`) \|.*\|.*\|$", README, re.M)
    named = set(re.findall(r"`([a-z_]+)`", " ".join(rows)))
    assert set(gj.OBJECTIVES) <= named, "add the preset to README's table of objectives"
    table = README[README.index("| weights | rule |") :]
    rules = re.findall(r"^\| (`.*?`) \|", table.split("\n\n")[0], re.M)
    rules = set(re.findall(r"`(\w+)`", " ".join(rules)))
    assert "std" in rules and rules <= set(WEIGHTS)
