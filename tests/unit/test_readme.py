"""What the README shows runs, prints what it says and names files that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_jax as gj
from grpo_jax.prompt_weights import WEIGHTS
from tests.unit.test_layers import LAYERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "BUILD_NOTES.md"]
DOCUMENTS += sorted(str(f.relative_to(ROOT)) for f in (ROOT / "docs").glob("*.md"))
IN_A_RUN_DIRECTORY = {"checkpoints/", "tokenizer/"}


def files_and_folders():
    """Paths below the root, folders with a / at their end."""
    for top in ("grpo_jax", "tests", "experiments", "docs"):
        for path in [ROOT / top, *(ROOT / top).rglob("*")]:
            yield f"/{path.relative_to(ROOT)}" + "/" * path.is_dir()
    yield from (f"/{path.name}" for path in ROOT.iterdir() if path.is_file())


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_named_exists(document):
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.M | re.S)
    named = re.findall(r"`(?:python )?([\w./-]+(?:\.(?:py|md|sh)|/))(?: [^`]*)?`", text)
    named += re.findall(r"\b(?:grpo_jax|tests|experiments|docs)/[\w./]+\w", text)
    assert len(named) > 10 or document not in ("README.md", "BUILD_NOTES.md")
    present = [path.rstrip("/") for path in files_and_folders()]
    missing = []
    for name in set(named) - IN_A_RUN_DIRECTORY:
        end = "/" + name.rstrip("/")
        if not any(path.endswith(end) for path in present):
            missing.append(name)
    assert not missing


def test_the_map_lists_the_packages_in_their_order():
    table = README[README.index("| package |") :].split("\n\n")[0]
    named = re.findall(r"`grpo_jax/(\w+)(?:/|\.py)`", table)
    assert len(named) == len(set(named))
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert {*named, "__main__"} == set(level)
    levels = [level[name] for name in named]
    assert levels == sorted(levels)


def test_the_tables_name_every_objective_and_no_rule_that_is_gone():
    rows = re.findall(r"^\| (`.*?`) \|.*\|.*\|$", README, re.M)
    named = set(re.findall(r"`([a-z_]+)`", " ".join(rows)))
    assert set(gj.OBJECTIVES) <= named, "add the preset to README's table of objectives"
    table = README[README.index("| weights | rule |") :]
    rules = re.findall(r"^\| (`.*?`) \|", table.split("\n\n")[0], re.M)
    rules = set(re.findall(r"`(\w+)`", " ".join(rules)))
    assert "std" in rules and rules <= set(WEIGHTS)
