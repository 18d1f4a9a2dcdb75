"""The command line: exit codes and messages a person can act on."""

import json
import re
import subprocess
import sys

import jax
import pytest

from grpo_jax import ModelConfig, init_policy, save_pretrained
from grpo_jax.cli import main
from grpo_jax.tasks.registry import load_task


def answer(capsys, *argv):
    """(exit code, everything printed)."""
    try:
        code = main(list(argv))
    except SystemExit as stop:  # tyro's way out
        code = stop.code
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--task", "chain"], "did you mean 'chains'?"),
        (["train", "--objective", "gpro"], "did you mean 'grpo'?"),
        (["train", "--sampling.group-sise", "4"], "--sampling.group-size"),
        (["train", "--sampling.group-size", "1"], "group_size must be at least 2"),
        (["train", "--sampling.temperature", "0"], "temperature must be positive"),
        (["train", "--sampling.temperature", "-1"], "temperature must be positive"),
        (["train", "--steps", "0"], "steps must be at least 1"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--model.num-heads", "3"], "must divide num_heads"),
        (["train", "--task.path", "/nowhere"], "nothing is read by task chains"),
        (["train", "--objective.kl-coef", "-1"], "kl_coef must be at least 0"),
        (["train", "--resume"], "give --run-dir"),
        (["train", "--seed", "99999999999999999999"], "seed must be below 2**63"),
        (["train", "--optimizer.learning-rate", "inf"], "must be a finite number"),
        (["train", "--optimizer.b1", "2"], "optimizer.b1 must be in [0, 1)"),
        (
            ["train", "--objective", "dr_grpo", "--objective.std-eps", "1"],
            "objective.std_eps changes nothing in dr_grpo",
        ),
        (
            ["train", "--objective", "reinforce", "--updates-per-rollout", "2"],
            "off policy",
        ),
        (["train", "--run-dir", "/proc/nope/x"], "cannot make the run directory"),
        (["train", "--config", "missing.yaml"], "cannot read --config"),
        (["train", "--config", "notes.txt"], ".yaml, .yml or .json"),
        (["report", "nowhere"], "holds no run"),
        (["report"], "at least one run directory"),
        (["report", "--ouput", "x"], "did you mean '--output'?"),
    ],
)
def test_bad_input_exits_with_2(capsys, argv, words):
    code, text = answer(capsys, *argv)
    assert code == 2 and words in text


def test_gsm8k_without_its_data_names_the_directory(capsys, tmp_path):
    argv = ["train", "--task", "gsm8k-expressions", "--task.path"]
    code, text = answer(capsys, *argv, str(tmp_path / "none"))
    assert code == 2 and "task.path must be a directory" in text
    (tmp_path / "train.jsonl").write_text('{"answer": "<<1+1=2>>"}\n{"answer": 3}\n')
    (tmp_path / "test.jsonl").write_text("")
    code, text = answer(capsys, *argv, str(tmp_path))
    assert code == 2 and "train.jsonl, line 2: field 'answer' is 3" in text
    (tmp_path / "train.jsonl").write_text('{"answer": "<<1+1=2>>"}\n')
    code, text = answer(capsys, *argv, str(tmp_path))
    assert code == 2 and "test.jsonl is empty" in text


def test_config_file_comes_first_and_flags_win(capsys, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("optimizer:\n  learning_rat: 1e-5\n")
    code, text = answer(capsys, "train", "--config", str(file))
    assert code == 2 and "did you mean 'learning_rate'?" in text
    file.write_text("optimizer: {learning_rate: 1e-5}\nsampling: {group_size: 1}\n")
    code, text = answer(capsys, "train", "--config", str(file))
    assert code == 2 and "group_size must be at least 2" in text
    file.write_text("optimizer: {learning_rate: 1e-5}\nsteps: 7\n")
    code, text = answer(capsys, "train", "--config", str(file), "--steps", "0")
    assert code == 2 and "steps must be at least 1" in text


def test_help_lists_settings_with_their_meaning(capsys):
    code, text = answer(capsys, "train", "--help")
    assert code == 0 and "--sampling.group-size" in text
    assert "G, completions per prompt" in text
    code, text = answer(capsys, "--help")
    assert code == 0 and "report" in text


def test_damaged_config_of_a_run_is_named(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": 3})[:5])
    code, text = answer(capsys, "report", str(tmp_path))
    assert code == 2 and "config.json is damaged" in text


PLAN = ["plan", "--sampling.prompts", "4", "--sampling.group-size", "4"]


def test_plan_prints_memory_shapes_and_informative_groups(capsys, tmp_path):
    file = tmp_path / "plan.json"
    code, text = answer(capsys, *PLAN, "--steps", "7", "--json", str(file))
    assert code == 0
    for words in (
        "allocated throughout", "sampler's copy of the weights", "keys and values",
        "peak, in", "4 prompts x 4 samples: 16 completions", "7 optimizer updates",
        "0.05 19 % 34 % 56 %",
    ):  # fmt: skip
        assert words in text
    plan = json.loads(file.read_text())
    memory = plan["memory"]
    assert memory["peak"] == memory["held"] + max(memory["phases"].values())
    assert memory["fits"] and memory["advice"] == []
    assert plan["step"]["updates"] == 7
    assert plan["informative"]["examples"]["0.5"]["4"] == 0.875
    assert list(tmp_path.iterdir()) == [file]  # no run directory


def test_plan_of_a_pass_rate_file(capsys, tmp_path):
    (tmp_path / "rates.json").write_text("[0.5, 0.0]")
    argv = [*PLAN, "--pass-rates", str(tmp_path / "rates.json")]
    code, text = answer(capsys, *argv)
    assert code == 0 and "44 % at 4" in text
    # .875 and 0, as two outcomes: Beta(.875, 2.125) and Beta(1.875, 1.125), times 4.
    assert "of 4 prompts a step, 1.8 [0.0, 3.9] are informative and 2.2 have" in text
    assert "1 prompts were never solved and 0 always" in text
    rows = [{"solved": [True, False, False, False]}] * 3
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(lines)
    code, text = answer(capsys, *PLAN, "--pass-rates", str(tmp_path))
    assert code == 0 and "over 3 prompts of mean pass rate 0.250 [" in text
    rows = [{"solved": [False, False, False]}, {"solved": [True, False, False, True]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(lines)
    code, text = answer(capsys, *PLAN, "--pass-rates", str(tmp_path))
    assert "1 prompts were never solved and 0 always; in 3 samples each" in text
    assert "in 20 of pass rate 0.63 is never solved" in text  # .37^3 is 1/20
    assert "are informative and" in text and "] are informative" not in text  # biased


def test_plan_needs_no_devices(capsys, tmp_path):
    file, sizes = tmp_path / "plan.json", []
    for fsdp in ("1", "8"):
        mesh = ["--mesh.fsdp", fsdp, "--sampling.prompts", "8", "--json", str(file)]
        assert answer(capsys, *PLAN, *mesh)[0] == 0
        sizes.append(json.loads(file.read_text())["memory"]["held"])
    assert sizes[1] < sizes[0] / 4  # fsdp splits nearly all of it


def test_plan_that_does_not_fit_names_settings_that_would(capsys, tmp_path):
    file = tmp_path / "plan.json"
    argv = [*PLAN, "--model.remat", "none", "--instrument.every", "0"]
    argv += ["--model.num-layers", "8", "--json", str(file)]
    argv += ["--micro-batch-tokens", "16384"]

    def planned(*more):
        code, text = answer(capsys, *argv, *more)
        assert code == 0
        return json.loads(file.read_text())["memory"], text

    memory, _ = planned("--device-gib", "1")
    assert memory["peak_in"] == "update"
    limit = ["--device-gib", str(0.8 * memory["peak"] / 2**30)]
    memory, text = planned(*limit)
    assert "it does not fit" in text and not memory["fits"]
    settings = dict(line.split() for line in memory["advice"])
    assert {"micro_batch_tokens", "model.remat", "sampling.prompts"} <= set(settings)
    for name in ("micro_batch_tokens", "model.remat", "sampling.prompts"):
        flag = "--" + name.replace("_", "-")
        assert planned(*limit, flag, settings[name])[0]["fits"]
    memory, text = planned("--device-gib", "1e-5")
    assert "no one setting is enough" in text


def test_plan_of_more_devices_than_there_are(capsys, tmp_path):
    file = tmp_path / "plan.json"
    argv = ["plan", "--sampling.prompts", "16", "--sampling.group-size", "4"]
    argv += ["--mesh.data", "8", "--micro-batch-tokens", "64", "--json", str(file)]
    code, text = answer(capsys, *argv)
    assert code == 0 and "the device's memory is not known" in text
    assert "micro-batch 8 x 4" in text  # on each device one prompt
    plan = json.loads(file.read_text())
    assert set(map(tuple, plan["step"]["micro_batches"].values())) == {(8, 4)}
    code, text = answer(capsys, "train", *argv[1:-2])
    assert code == 2 and "needs 8 devices, and there are 1" in text


def test_a_device_elsewhere_is_planned_as_an_accelerator(capsys, tmp_path):
    file = tmp_path / "plan.json"
    code, _ = answer(capsys, *PLAN, "--device-gib", "16", "--json", str(file))
    sizes = json.loads(file.read_text())["memory"]["bytes"]
    # The gradient and the change; of a CPU, 5 copies.
    assert code == 0 and sizes["optimizing"] == 2 * sizes["parameters"]


def test_plan_says_one_peak(capsys, tmp_path):
    """bfloat16 is widened on the CPU that plans, not on the device planned for."""
    argv = [*PLAN, "--model.compute-dtype", "bfloat16", "--device-gib", "16"]
    code, text = answer(capsys, *argv)
    about = re.search(r"about (\S+) on the device", text).group(1)
    assert code == 0 and re.search(r"peak, in an update (\S+)", text).group(1) == about


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device-gib", "0"], "--device-gib must be positive, got 0"),
        (["--device-gib", "much"], "--device-gib must be a number, got 'much'"),
        (["--device-gib"], "--device-gib needs a value"),
        (["--topology", "a100:8"], "--topology must be a chip and the shape"),
        (["--topology", "v5e:1", "--device-gib", "16"], "leave one out"),
        (["--json", "--steps", "3"], "--json needs a value"),
        (["--pass-rates", "nowhere.json"], "cannot read --pass-rates nowhere.json"),
        (["--jsn", "x"], "--jsn"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--sampling.group-sise", "4"], "--sampling.group-size"),
        (["--pretrained", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_plans_exit_with_2(capsys, argv, words):
    code, text = answer(capsys, "plan", *argv)
    assert code == 2 and words in text


def test_plan_needs_no_weights(capsys, tmp_path):
    task = load_task("chains")
    model = ModelConfig(vocab_size=len(task.tokenizer), num_layers=3)
    save_pretrained(
        init_policy(model, jax.random.key(0)), tmp_path, tokenizer=task.tokenizer
    )
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    argv = [*PLAN, "--pretrained", str(tmp_path), "--task.template", "none"]
    code, text = answer(capsys, *argv)
    assert code == 0 and "peak, in" in text
    code, text = answer(capsys, "train", *argv[1:])
    assert code == 2 and "safetensors" in text


def test_help_into_a_reader_that_has_enough_ends_quietly():
    command = f"{sys.executable} -m grpo_jax train --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage:") and done.stderr == ""
