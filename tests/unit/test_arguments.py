"""Command lines to records: what is read before tyro, and its errors as one line."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_jax as gj
from grpo_jax.cli import COMMANDS, usage
from grpo_jax.commands._arguments import (
    NamedRun,
    Synopsis,
    complaint,
    named_run,
    parse,
    parse_run,
    spelled_out,
    synopsis,
)
from grpo_jax.commands.evaluate import config_like_run
from grpo_jax.errors import ConfigError
from grpo_jax.planning.plan import make_plan
from grpo_jax.runs.command_configs import EvalConfig
from grpo_jax.runs.config import ScoringConfig, TrainConfig
from grpo_jax.runs.lines import write_json
from grpo_jax.runs.recorded import eval_settings

DOC = """`grpo-jax copy FILE [--times
N]`: copy it.

More."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    file: str  # what is copied
    times: int = 1
    share: float | None = None
    max_size: int | None = None


def options(*argv):
    return parse(Options, argv, DOC, positional=True)


def test_every_module_is_a_subcommand():
    folder = Path(gj.__file__).parent / "commands"
    modules = {f.stem for f in folder.glob("*.py") if not f.stem.startswith("_")}
    assert modules == set(COMMANDS.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_module_begins_with_its_synopsis(command):
    file = Path(gj.__file__).parent / "commands" / f"{COMMANDS[command]}.py"
    result = synopsis(ast.get_docstring(ast.parse(file.read_text())))
    assert result.command == command and result.description
    lines = usage().splitlines()
    (line,) = [x for x in lines if x.startswith(f"  {command} ")]
    assert line.split()[1] in f"{result.arguments} {result.description}"


def test_help_imports_no_jax():
    code = (
        "import sys; from grpo_jax.cli import main; main(['--help']);"
        "assert not {'jax', 'tyro', 'transformers', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_synopsis():
    assert synopsis(DOC) == Synopsis("copy", "FILE [--times N]", "copy it.")
    assert synopsis("`grpo-jax run`: run it.") == Synopsis("run", "", "run it.")


def test_positional_arguments_and_both_spellings():
    expected = Options(file="a", times=3, max_size=2)
    assert options("a", "--times", "3", "--max-size", "2") == expected
    assert options("--times=3", "--max_size=2", "a") == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--times", "x"], "--times must be a whole number, got 'x'."),
        (["a", "--max-size", "x"], "--max-size must be a whole number, got 'x'."),
        (["a", "--share", "x"], "--share must be a number, got 'x'."),
        (["a", "--times"], "--times needs a value."),
        (["a", "--tims", "3"], "unrecognized options: --tims, 3; did you mean"),
        (["a", "b"], "unrecognized options: b."),
        ([], "missing from grpo-jax copy: FILE what is copied (required)."),
    ],
)
def test_errors_are_one_line_with_the_usage(argv, message):
    with pytest.raises(ConfigError) as caught:
        options(*argv)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(" usage: grpo-jax copy FILE [--times N].")


PLAIN = """
 Unrecognized options
 -----------------------------
  Unrecognized options: --tims
  ----------------------------
  Perhaps you meant:
      --times INT
  ----------------------------
  For full helptext, run x
"""
COLOURED = """\x1b[31m╭─\x1b[0m Unrecognized options ──────╮
\x1b[31m│\x1b[m \x1b[1mUnrecognized options:\x1b[0m --tims │
│ ──────────────────────────── │
│ Perhaps you meant:           │
│     --times INT              │
│ ──────────────────────────── │
│ For full helptext, run x     │
╰──────────────────────────────╯
"""


@pytest.mark.parametrize("box", [PLAIN, COLOURED], ids=["plain", "coloured"])
def test_a_box_as_one_sentence(box):
    expected = "unrecognized options: --tims; did you mean '--times'?"
    assert complaint(box) == expected


def test_short_spellings():
    argv = ["--task", "a", "--weights=b", "--objective.clip", "1", "--task.path", "c"]
    expected = ["--task.name", "a", "--weights.name=b", *argv[3:]]
    assert spelled_out(argv) == expected


def test_the_run_that_is_named():
    assert named_run(["--steps", "3", "x"]) == NamedRun()
    result = named_run(["--steps", "3", "--run_dir=a", "--resume", "--task.name", "b"])
    assert (result.run_dir, result.resume, result.task.name) == ("a", True, "b")


def test_a_config_file_is_the_base_of_the_flags(tmp_path):
    file = tmp_path / "config.json"
    write_json(file, {"steps": 7, "sampling": {"prompts": 8}})
    for argv in (["--config", str(file)], [f"--config={file}"]):
        config = parse_run(TrainConfig, [*argv, "--seed", "3"], "`grpo-jax train`: .")
        assert (config.steps, config.seed, config.sampling.prompts) == (7, 3, 8)
    for argv, words in (
        (["--seed", "3", "--config", str(file)], "--config FILE comes first"),
        (["--config"], "--config needs a .yaml"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_run(TrainConfig, argv, DOC)


def test_a_resumed_run_keeps_its_settings(tmp_path):
    write_json(tmp_path / "config.json", {"config": {"steps": 7, "seed": 2}})
    argv = ["--run-dir", str(tmp_path), "--resume", "--steps", "9"]
    config = parse_run(TrainConfig, argv, "`grpo-jax train`: .")
    assert (config.steps, config.seed, config.resume) == (9, 2, True)
    config = parse_run(TrainConfig, argv[:2], "`grpo-jax train`: .")
    assert (config.steps, config.seed) == (TrainConfig().steps, 0)


def test_a_run_is_asked_as_it_was_trained(tmp_path):
    config = {
        "task": {"name": "countdown", "template": "qa"},
        "sampling": {"temperature": 0.7, "max_prompt_tokens": 9},
        "model": {"compute_dtype": "bfloat16"},
        "scoring": {"timeout_s": 9.0, "environment": ["JUDGE"]},
    }
    write_json(tmp_path / "config.json", {"config": config, "max_new_tokens": 6})
    same = config_like_run(str(tmp_path), "countdown")
    assert same == config_like_run(str(tmp_path)) and same.run_dir == str(tmp_path)
    assert same.task.template == "qa" and same.task.heldout_prompts == 0
    assert (same.max_new_tokens, same.max_prompt_tokens) == (6, 9)
    other = config_like_run(str(tmp_path), "chains")
    assert other.task == EvalConfig(pretrained="x").task and not other.max_new_tokens
    assert (same.temperature, other.temperature) == (0.7, 0.7)
    assert same.compute_dtype == other.compute_dtype == "bfloat16"
    assert same.scoring == ScoringConfig(timeout_s=9.0, environment=("JUDGE",))
    assert other.scoring == ScoringConfig()
    asked = EvalConfig(run_dir=str(tmp_path), scoring=ScoringConfig(timeout_s=1.0))
    assert eval_settings(asked).scoring.environment == ("JUDGE",)
    assert eval_settings(asked).scoring.timeout_s == 1.0


# tyro makes a record with all its fields: none may count as asked for by that.
def test_a_command_line_without_flags_is_planned_like_the_defaults():
    ours, typed = make_plan(TrainConfig()), make_plan(parse(TrainConfig, [], "x"))
    assert typed.headline == ours.headline and typed.probe == ours.probe
    assert typed.probe is not None and not typed.warnings
