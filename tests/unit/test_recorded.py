"""What a run recorded is read as it was meant, from wherever it is read."""

import dataclasses
import importlib
import json

import jax
import pytest

from grpo_jax import (
    EvalConfig,
    ModelConfig,
    TrainConfig,
    init_policy,
    save_pretrained,
)
from grpo_jax.cli import main
from grpo_jax.commands import plan
from grpo_jax.commands.evaluate import config_like_run
from grpo_jax.errors import ConfigError
from grpo_jax.planning.learning_rate import learning_rate
from grpo_jax.records import overlaid
from grpo_jax.runs.config import TaskConfig
from grpo_jax.runs.config_files import load_config_file, to_dict
from grpo_jax.runs.directory import check_same_config, claim, read_notes, record
from grpo_jax.runs.recorded import continued, eval_settings, run_config

FACTS = {"max_new_tokens": 12, "data": "1", "base": ""}
CONFIG = TrainConfig(
    task={
        "name": "jsonl",
        "path": "rows.jsonl",
        "heldout_path": "test.jsonl",
        "prompt_field": "q",
        "heldout_prompts": 8,
        "rewards": ("exact", "own_rewards_of_the_run:short=0.1"),
    },
    pretrained="org/name",
    sampling={"temperature": 0.7, "max_prompt_tokens": 9},
    model={"compute_dtype": "bfloat16"},
    run_dir="runs/mine",
    steps=3,
)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The directory of a run begun in tmp_path/home, read from tmp_path/elsewhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for directory in (home, elsewhere):
        directory.mkdir()
    (home / "rows.jsonl").touch()
    (home / "own_rewards_of_the_run.py").write_text("def short(e, c): return 1.0\n")
    monkeypatch.chdir(home)
    claim(CONFIG, FACTS)
    monkeypatch.chdir(elsewhere)
    return home / "runs" / "mine"


def forget_origin(run_dir):
    """Makes the run one that did not record where it began."""
    content = json.loads((run_dir / "config.json").read_text())
    del content["began_in"]
    (run_dir / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("old", [False, True])
def test_paths_lead_to_where_the_run_began(begun, old):
    if old:
        forget_origin(begun)
    config = run_config(begun)
    assert config.task.path == str(begun.parents[1] / "rows.jsonl")
    assert config.task.heldout_path == "test.jsonl"  # which is not there either
    assert config.pretrained == "org/name"
    assert importlib.import_module("own_rewards_of_the_run").short(1, 2) == 1.0


def test_an_old_run_without_its_place_is_read_from_here(begun, tmp_path):
    forget_origin(begun)
    moved = begun.rename(tmp_path / "moved")
    assert run_config(moved).task.path == "rows.jsonl"


def test_a_resumed_run_records_paths_from_anywhere(begun):
    resumed = dataclasses.replace(run_config(begun), resume=True, run_dir=str(begun))
    assert claim(resumed, FACTS) == begun
    record(begun, resumed, FACTS)
    assert run_config(begun).task == resumed.task


def test_a_run_to_resume_is_the_one_that_began(begun):
    asked = TrainConfig(run_dir=str(begun), resume=True, steps=9)
    expected = dataclasses.replace(
        run_config(begun), steps=9, resume=True, run_dir=str(begun)
    )
    assert continued(asked) == expected
    assert continued(expected) == expected
    assert continued(TrainConfig(steps=2)) == TrainConfig(steps=2)


@pytest.mark.parametrize("optimizer", [{}, {"learning_rate": None, "eps": 1e-8}])
def test_a_resumed_run_keeps_its_learning_rate(begun, optimizer):
    """Whatever the default is by now, which a config of its own leaves open."""
    file = begun / "config.json"
    content = json.loads(file.read_text()) | {"learning_rate_from": "the default"}
    content["config"]["optimizer"]["learning_rate"] = 0.5
    file.write_text(json.dumps(content))
    config = continued(TrainConfig(run_dir=begun, resume=True, optimizer=optimizer))
    rate = learning_rate(config, lora=False)
    assert rate.value == 0.5 and rate.source == "as the run began"
    now = FACTS | {"learning_rate_from": rate.source}
    record(claim(config, now), config, now)
    assert read_notes(begun).learning_rate_from == "the default"
    assert run_config(begun).optimizer.learning_rate == 0.5


def test_a_resumed_run_keeps_its_batch(begun):
    file = begun / "config.json"
    content = json.loads(file.read_text())
    content["config"]["pretrained"] = "some/model"
    content["config"]["sampling"] |= {"prompts": 16, "group_size": 16}
    file.write_text(json.dumps(content))
    sampling = {"prompts": None, "temperature": 0.7}
    config = continued(TrainConfig(run_dir=begun, resume=True, sampling=sampling))
    assert config.batch == (16, 16)


def test_a_resumed_run_splits_its_batches_alike(begun):
    file = begun / "config.json"
    content = json.loads(file.read_text())
    content["config"]["micro_batch_tokens"] = 300
    file.write_text(json.dumps(content))
    for given in ({}, {"micro_batch_tokens": None}):
        resumed = TrainConfig(run_dir=begun, resume=True, **given)
        assert continued(resumed).micro_batch_tokens == 300


def test_a_resumed_run_keeps_its_measurements(begun):
    chosen = {"every": 60, "at_start": False, "prompts": 9, "group_size": 16}
    file = begun / "config.json"
    content = json.loads(file.read_text())
    content["config"]["instrument"] |= chosen
    file.write_text(json.dumps(content))
    left_open = dict.fromkeys(chosen) | {"max_overhead": 0.2}
    resumed = TrainConfig(run_dir=begun, resume=True, instrument=left_open)
    instrument = continued(resumed).instrument
    assert {name: getattr(instrument, name) for name in chosen} == chosen
    assert instrument.max_overhead == 0.2


def test_the_config_of_a_run_is_a_config(begun):
    config = load_config_file(str(begun / "config.json"))
    assert config == dataclasses.replace(run_config(begun), run_dir=None)
    assert to_dict(config)["sampling"] == to_dict(CONFIG)["sampling"]


def test_a_run_is_evaluated_on_its_own_task(begun):
    run = run_config(begun)
    actual = eval_settings(EvalConfig(run_dir=str(begun)))
    assert actual.task == run.task
    assert (actual.temperature, actual.compute_dtype) == (0.7, "bfloat16")
    assert (actual.max_new_tokens, actual.max_prompt_tokens) == (12, 9)
    assert actual == config_like_run(str(begun)) == eval_settings(actual)
    again = dataclasses.replace(EvalConfig(run_dir=str(begun)), samples=2)
    assert eval_settings(again).task == run.task


@pytest.mark.parametrize(
    "task",
    [
        {"template": "qa"},
        TaskConfig(template="qa"),
        TaskConfig(name="jsonl", template="qa"),
    ],
)
def test_what_is_given_of_the_task_overrides_it(begun, task):
    actual = eval_settings(EvalConfig(run_dir=str(begun), task=task, temperature=1.0))
    run = run_config(begun)
    assert actual.task == dataclasses.replace(run.task, template="qa")
    assert actual.temperature == 1.0 and actual.max_new_tokens == 12


@pytest.mark.parametrize("task", [{"name": "chains"}, TaskConfig(name="chains")])
def test_another_task_has_its_own_defaults(begun, task):
    """As `grpo-jax eval --run-dir RUN --task chains` has."""
    actual = eval_settings(EvalConfig(run_dir=str(begun), task=task))
    assert actual.task == TaskConfig(heldout_prompts=0)
    assert actual.max_new_tokens is None and actual.temperature == 0.7
    assert actual == config_like_run(str(begun), "chains")


def test_a_model_is_asked_the_default_task_with_all_held_out_prompts():
    actual = eval_settings(EvalConfig(pretrained="x", task=TaskConfig(name="gsm8k")))
    assert actual.task == TaskConfig(name="gsm8k", heldout_prompts=0)
    assert (actual.temperature, actual.compute_dtype) == (1.0, "float32")
    some = EvalConfig(pretrained="x", task=TaskConfig(heldout_prompts=4))
    assert eval_settings(some).task.heldout_prompts == 4


def test_a_plan_of_a_run_is_of_its_settings(begun, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "grpo_jax.planning.forecast.forecast", lambda config, **_: seen.append(config)
    )
    monkeypatch.setattr("grpo_jax.planning.forecast.forecast_text", str)
    assert plan.main(["--run-dir", str(begun), "--steps", "5"]) == 0
    expected = dataclasses.replace(run_config(begun), steps=5, run_dir=str(begun))
    assert to_dict(expected).items() <= to_dict(seen[0]).items()


def test_a_damaged_or_missing_run_is_refused(begun, capsys):
    assert main(["eval", "--run-dir", str(begun.parent)]) == 2
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no run"):
        eval_settings(EvalConfig(run_dir="nowhere"))


def test_overlaid_needs_what_was_given(begun):
    run = run_config(begun)
    assert overlaid(run, TrainConfig(task={"seed": 4})).task == dataclasses.replace(
        run.task, seed=4
    )


def test_what_an_older_run_did_not_record_is_as_it_was(begun):
    assert run_config(begun).optimizer.skip_empty
    content = json.loads((begun / "config.json").read_text())
    del content["config"]["optimizer"]["skip_empty"]
    del content["config"]["model"]["compute_dtype"]
    (begun / "config.json").write_text(json.dumps(content))
    assert not run_config(begun).optimizer.skip_empty
    assert run_config(begun).model.compute_dtype == "float32"
    resumed = continued(TrainConfig(run_dir=str(begun), resume=True))
    assert not resumed.optimizer.skip_empty
    check_same_config(begun, resumed)


def test_a_run_goes_on_in_the_dtype_that_it_began_with(begun):
    """bfloat16 was recorded, whatever this device's default is."""
    resumed = TrainConfig(run_dir=str(begun), resume=True, model={"remat": "dots"})
    assert continued(resumed).model.compute_dtype == "bfloat16"
    open_again = {"compute_dtype": None}
    resumed = TrainConfig(run_dir=str(begun), resume=True, model=open_again)
    assert continued(resumed).model.compute_dtype == "bfloat16"


def test_a_model_stored_in_bfloat16_is_evaluated_in_it_on_accelerators(
    tmp_path, monkeypatch
):
    policy = init_policy(ModelConfig(vocab_size=9), jax.random.key(0))
    for dtype in ("float32", "bfloat16"):
        save_pretrained(policy, tmp_path / dtype, dtype=dtype)
    dtypes = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        for stored in ("float32", "bfloat16"):
            config = eval_settings(EvalConfig(pretrained=str(tmp_path / stored)))
            dtypes.append(config.compute_dtype)
        asked = EvalConfig(pretrained="x", compute_dtype="float32")
        assert eval_settings(asked).compute_dtype == "float32"
    assert dtypes == ["float32", "float32", "float32", "bfloat16"]
