"""The instrument on rollouts from anywhere."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.cli import main
from grpo_jax.commands import _look_forecast
from grpo_jax.commands._look_sources import (
    load_source,
    measured_steps,
    sampling_temperature,
    source_of,
)
from grpo_jax.commands.look import forecast, look_at
from grpo_jax.errors import ConfigError
from grpo_jax.instrument.measurement import measured_parameters
from grpo_jax.instrument.prompts import ProbePrompts
from grpo_jax.rollouts.encoding import encode_prompts, pad_left
from grpo_jax.runs.lines import read_lines, without_nan

from ..helpers import assert_gradients_close, random_rollouts, tiny_policy
from .test_train import digits_task, small_config

P, G = 6, 8


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory):
    """(a run with two measurements, the rollouts that these were made of)."""
    made, directory = [], tmp_path_factory.mktemp("look")
    call = ProbePrompts.__call__

    def recorded(self, params, key):
        made.append(call(self, params, key))
        return made[-1]

    config = small_config(
        directory / "run", steps=2, checkpoint=gj.CheckpointConfig(every=1),
        instrument=gj.InstrumentConfig(every=2, prompts=P, group_size=G),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbePrompts, "__call__", recorded)
        result = gj.train(config, task=digits_task())
    rows = read_lines(result.run_dir / "instrument.jsonl")
    assert [row["step"] for row in rows] == [0, 2]
    file = directory / "rollouts.jsonl"
    # The first call of each measurement sampled what it measured; the others compared.
    with file.open("w") as out:
        for step, rollouts in ((0, made[0]), (2, made[-1])):
            for row in rollouts.to_rows():
                out.write(json.dumps(row | {"step": step}) + "\n")
    return result, rows, file


def test_a_runs_own_rollouts_give_its_own_figures(measured_run, tmp_path):
    """Every number of both rows, exactly, through a file and the run's checkpoints."""
    result, rows, file = measured_run
    looks = look_at(
        gj.LookConfig(
            rollouts=str(file), run_dir=str(result.run_dir), every_step=True,
            output=str(tmp_path / "look"),
        )
    )  # fmt: skip
    for row, seen in zip(rows, looks, strict=True):
        for name in row.keys() - {"prompts", "update"}:
            again = json.loads(json.dumps(without_nan(seen.row[name])))
            assert again == row[name], name
    content = json.loads((tmp_path / "look/look.json").read_text())
    assert [row["step"] for row in content["rows"]] == [0, 2]
    page = (tmp_path / "look/look.html").read_text()
    assert "Why and when normalisation helps" in page and "Every measurement" in page


def scored(seed=0):
    rollouts = random_rollouts(tiny_policy(), P, G, 5, 6)
    rewards = np.random.default_rng(seed).integers(0, 2, (P, G)).astype(np.float32)
    return rollouts._replace(rewards=jnp.asarray(rewards))


def test_the_last_layers_gradients_are_slices_of_the_whole():
    policy, rollouts, layers = tiny_policy(), scored(), 1
    last, replaced = measured_parameters(policy, layers)
    whole, same = measured_parameters(policy, None)

    def gradient(params, policy_of):
        return jax.grad(lambda x: gj.completion_logprobs(policy_of(x), rollouts).sum())(
            params
        )

    some, everything = gradient(last, replaced), gradient(whole, same)
    expected = jax.tree.map(lambda x: x[-layers:], everything["layers"])
    assert_gradients_close(some, expected)
    row = gj.look(policy, rollouts, parameters="last-layers", layers=layers).row
    norms = np.array(row["geometry"]["raw_squared_norms"], float)
    full = gj.look(policy, rollouts).row["geometry"]["raw_squared_norms"]
    assert (norms < np.array(full, float)).all()


def test_new_factors_are_measured_as_those_of_a_policy_that_has_them():
    policy, rollouts = tiny_policy(), scored()
    key = jax.random.key(3)
    lora = gj.add_lora(policy, rank=2, alpha=4.0, key=key)
    made = gj.look(policy, rollouts, parameters="lora", lora_rank=2, key=key)
    given = gj.look(lora, rollouts, key=key)
    same = [without_nan(x.row["geometry"]) for x in (made, given)]
    assert same[0] == same[1]
    assert "prompts" in made.text() and made.phase in ("I", "II", "III", "unknown")


def test_a_change_has_the_slope_of_the_expected_reward_along_it():
    """Along the mean gradient, P times its squared norm less noise: positive here by
    construction, as the same samples made it."""
    policy, rollouts = tiny_policy(), scored()
    change = jax.grad(
        lambda params: (
            (rollouts.rewards - rollouts.rewards.mean(1, keepdims=True))
            * gj.completion_logprobs(policy.replace(params), rollouts).sum(-1)
        ).mean()
    )(policy.params)
    row = gj.look(policy, rollouts, change=change).row
    total = sum((x**2).sum() for x in jax.tree.leaves(change))
    slopes = np.array(row["update"]["slope"], float)
    assert slopes.mean() == pytest.approx(float(total) * G / (G - 1), rel=1e-3)
    assert (
        set(row["update"]["realised"]) == {None}
        or np.isnan(np.array(row["update"]["realised"], float)).all()
    )


def test_what_cannot_be_measured_is_said():
    policy, rollouts = tiny_policy(), scored()
    few = jax.tree.map(lambda x: x[:, :3] if x.ndim > 1 else x, rollouts)
    few = few._replace(prompts=rollouts.prompts, prompt_mask=rollouts.prompt_mask)
    with pytest.raises(ConfigError, match="four samples"):
        gj.look(policy, few)
    with pytest.raises(ConfigError, match="layers must be at most 2"):
        gj.look(policy, rollouts, parameters="last-layers", layers=3)
    for wrong, message in (
        (dict(parameters="last"), "unknown parameters 'last'"),
        (dict(prompts=4), "a whole number for each of the 6 prompts"),
    ):
        with pytest.raises(ConfigError, match=message):
            gj.look(policy, rollouts, **wrong)
    with pytest.raises(ConfigError, match="gj.load_pretrained"):
        gj.look("model", rollouts)
    with pytest.raises(ConfigError, match='change needs parameters "all"'):
        gj.look(policy, rollouts, parameters="lora", change=policy.params)
    with pytest.raises(ValueError, match="must have rewards"):
        gj.look(policy, rollouts._replace(rewards=None))
    peaked = policy.replace(jax.tree.map(lambda x: 50 * x, policy.params))
    others = np.random.default_rng(5).integers(2, 19, rollouts.completions.shape)
    with pytest.warns(UserWarning, match="cannot have produced"):
        assert gj.look(peaked, rollouts._replace(completions=others)).unlikely > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forecast_of = forecast(policy, rollouts)
    size = sum(x.nbytes for x in jax.tree.leaves(policy.params))
    assert forecast_of.seconds > 0 and forecast_of.peak_bytes > size


# ---- the command


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """(model directory, rows that the model sampled: 12 prompts x 8 samples)."""
    directory = tmp_path_factory.mktemp("sampled") / "model"
    task = gj.load_task("chains", heldout_prompts=16)
    pad = task.tokenizer.pad_token_id
    config = gj.ModelConfig(
        vocab_size=len(task.tokenizer), width=16, mlp_width=24, head_dim=4
    )
    policy = gj.init_policy(config, jax.random.key(0))
    gj.save_pretrained(policy, directory, tokenizer=task.tokenizer)
    examples = task.train[:12]
    ids = encode_prompts(task, examples)
    prompts, mask = pad_left(ids, max(map(len, ids)), pad)
    rollouts = gj.sample(
        policy, prompts, mask, group_size=8, max_new_tokens=6, key=jax.random.key(1),
        eos_id=task.ends, pad_id=pad,
    )  # fmt: skip
    rows = []
    for row in rollouts.to_rows():
        text = task.tokenizer.decode(row["completion"], skip_special_tokens=True)
        prompt = examples[row["group"]].prompt
        rows.append({"prompt": prompt, "completion": text or "1"})
    return directory, rows


def tossed(rows, number=1, low=0, seed=0):
    """The rows with `number` rewards of low or 1 each, by coins."""
    coins = np.random.default_rng(seed).integers(0, 2, (len(rows), number))
    names = ("reward", "form")[:number]
    return [
        row | {name: float(1 if x else low) for name, x in zip(names, c, strict=True)}
        for row, c in zip(rows, coins, strict=True)
    ]


@pytest.fixture
def command(sampled, tmp_path, capsys):
    """Runs `look` on rows: (exit code, what it printed, look.json or None)."""
    number = iter(range(9))

    def run(rows, *more):
        file = tmp_path / f"rows{next(number)}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        output = file.with_suffix("")
        arguments = ["look", file, "--pretrained", sampled[0], "--output", output]
        code = main([str(x) for x in (*arguments, *more)])
        out, err = capsys.readouterr()
        made = output / "look.json"
        content = json.loads(made.read_text()) if made.exists() else None
        return code, out + err, content

    return run


def test_the_command_reads_a_file_in_trls_form(sampled, command, capsys):
    """Of two columns the sum, with weights as given, of the first prompts; and whose
    file it is, is said where the form is left out."""
    rows = tossed(sampled[1], 2)
    code, printed, content = command(
        rows, "--form", "trl", "--rewards", "reward", "form=0.25", "--prompts", "8"
    )
    assert code == 0
    assert "8 prompts x 8 samples" in printed and "4 further prompts" in printed
    assert "Reward: reward + 0.25 form." in printed
    assert "96 completions of the file got the token" in printed
    assert "measuring: about 0:0" in printed
    sums = np.array([x["reward"] + 0.25 * x["form"] for x in rows]).reshape(12, 8)
    row = content["rows"][0]
    np.testing.assert_allclose(row["group_mean"], sums[:8].mean(1), rtol=1e-3)
    code, printed, _ = command([x | {"accuracy": 1.0} for x in sampled[1]])
    assert code == 2 and "it may be of form='trl' (--form trl)" in printed
    code, printed, _ = command([x | {"right": True} for x in rows], "--rewards", "a=b")
    assert code == 2 and "NAME=WEIGHT" in printed
    assert main(["look", "rows.jsonl"]) == 2
    assert "give --pretrained" in capsys.readouterr().err


def test_any_reward_is_measured_and_what_needs_0_and_1_is_left_out(sampled, command):
    """Rewards -1 and 1 are twice rewards 0 and 1 less 1: gradients are doubled. A rule
    of pass rates has no weights for them, nor has the theorem's C a meaning."""
    _, printed, plain = command(tossed(sampled[1][:64]))
    code, other, signed = command(tossed(sampled[1][:64], low=-1))
    assert code == 0
    assert "C says nothing here" in other and "C = 8/3 of the mean sigma" in printed
    assert "pass rate" not in other
    for text in (printed, other):
        assert "completions have the largest length" in text  # many were cut off at 6
    norms = [
        np.array(x["rows"][0]["geometry"]["raw_squared_norms"], float)
        for x in (signed, plain)
    ]
    np.testing.assert_allclose(norms[0], 4 * norms[1], rtol=1e-3)
    changes = signed["rows"][0]["weightings"]
    assert set(changes["shrunk"]["own"]) == {None}
    assert None not in changes["std"]["own"]
    assert None not in plain["rows"][0]["weightings"]["shrunk"]["own"]


def test_rewards_all_alike_teach_nothing(sampled, command):
    code, printed, _ = command([row | {"reward": 0.0} for row in sampled[1][:64]])
    assert code == 0 and "No group has two different rewards" in printed
    assert "exact pass rates" not in printed


def test_steps_of_the_same_prompts_are_one_series_and_others_are_not(sampled, command):
    """The second step has the prompts of the first in another order, or others."""
    first, other = tossed(sampled[1][:64]), tossed(sampled[1][32:], seed=1)
    again = tossed(sampled[1][:64], seed=2)

    def steps(*parts):
        return [x | {"step": 3 + i} for i, part in enumerate(parts) for x in part]

    code, printed, content = command(steps(first, again[::-1]), "--every-step")
    assert code == 0 and "different prompts" not in printed
    names = [row["prompts"] for row in content["rows"]]
    assert names == [list(range(8))] * 2
    means = np.mean([x["reward"] for x in again[:8]])
    assert content["rows"][1]["group_mean"][0] == pytest.approx(means, abs=1e-3)
    code, printed, content = command(steps(first, other), "--every-step")
    assert code == 0 and "each is read for itself" in printed
    assert "\nstep 3:\n" in printed and "\nstep 4:\n" in printed
    assert content["rows"][1]["prompts"] == list(range(4, 12))


def test_what_cannot_be_measured_is_said_before_the_model_is_read(sampled, command):
    rows = tossed(sampled[1])
    three = [row for i, row in enumerate(rows) if i % 8 < 3]
    for few, message in ((three, "four samples"), (rows[:8], "two prompts or more")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("grpo_jax.commands.look.load_source", None)
            code, printed, content = command(few)
        assert (code, content) == (2, None) and message in printed


FORM = gj.RowForm(prompt="question", completion="answer", rewards="reward")


def test_a_form_of_ones_own_by_its_name(sampled, command):
    rows = [
        {"question": x["prompt"], "answer": x["completion"], "reward": x["reward"]}
        for x in tossed(sampled[1][:64])
    ]
    code, _, content = command(rows, "--form", f"{__name__}:FORM")
    assert code == 0 and content["rows"][0]["group_size"] == 8
    code, printed, _ = command(rows, "--form", f"{__name__}:P")
    assert code == 2 and "must be a RowForm" in printed


@pytest.mark.parametrize(
    ("changed", "flags", "message"),
    [
        ({"reward": 1e39}, (), "more than float32 holds"),
        ({"completion": [999]}, (), "must have token ids in"),
        ({}, ("--prompts", "1"), "prompts must be at least 2"),
        ({}, ("--rewards", "reward=inf"), "NAME=WEIGHT"),
        ({}, ("--rewards", "reward", "reward=2"), "names a field twice"),
        ({}, ("--every-step",), "of rows with a step"),
        ({}, ("--form", "samples"), "does not read samples.jsonl"),
        ({}, ("--temperature", "0.001"), "at temperature 0.001"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(sampled, command, changed, flags, message):
    rows = tossed(sampled[1][:64])
    rows[1] = rows[1] | changed
    code, printed, content = command(rows, *flags)
    assert (code, content) == (2, None)
    assert message in printed and "Traceback" not in printed


def test_a_step_that_cannot_be_measured_is_left_out_of_a_series(sampled, command):
    rows = tossed(sampled[1][:64])
    few = [row | {"step": 2} for i, row in enumerate(rows) if i % 8 < 3]
    code, printed, content = command(
        [*few, *(row | {"step": 5} for row in rows)], "--every-step"
    )
    assert code == 0 and "step 2 is left out: rollouts must have four" in printed
    assert [row["step"] for row in content["rows"]] == [5]


def test_another_models_text_is_refused(sampled, command):
    """Of a model that is sure of itself, random digits are not its own."""
    directory, rows = sampled
    policy = gj.load_pretrained(directory)
    peaked = policy.replace(jax.tree.map(lambda x: 50 * x, policy.params))
    other = directory.parent / "peaked"
    gj.save_pretrained(peaked, other, tokenizer=gj.load_tokenizer(directory))
    code, printed, _ = command(tossed(rows), "--pretrained", other)
    assert code == 2 and "it cannot have produced them" in printed


def test_less_is_measured_with_less_memory():
    """Of a wider model, so that its arrays are more than what a process varies by."""
    config = gj.ModelConfig(
        vocab_size=64, width=512, mlp_width=2048, num_layers=12, head_dim=64,
        num_heads=8,
    )  # fmt: skip
    policy, rollouts = gj.init_policy(config, jax.random.key(0)), scored()
    adapted = gj.add_lora(policy, rank=2, alpha=4.0, key=jax.random.key(0))
    with pytest.MonkeyPatch.context() as patch:  # a clock's noise
        patch.setattr(_look_forecast, "_product_rate", lambda *_: 1e9)
        whole, last = forecast(policy, rollouts), forecast(policy, rollouts, layers=1)
        lora = forecast(adapted, rollouts)
    size = 4 * sum(x.size for x in jax.tree.leaves(policy.params))
    assert whole.peak_bytes > last.peak_bytes + 2 * size
    assert last.peak_bytes > lora.peak_bytes > size
    assert whole.seconds > lora.seconds > last.seconds > 0


def test_settings_that_change_nothing_are_refused():
    base = gj.LookConfig(rollouts="x", pretrained="y")
    for wrong, message in (
        (dict(layers=2), "layers is of"),
        (dict(lora_rank=4), "lora_rank is of"),
        (dict(run_dir="z"), "look needs the policy"),
        (dict(run_dir="z", pretrained=None, seed=1), "a run has its own"),
        (dict(adapter="z", parameters="lora", lora_rank=4), "adapter has its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(base, **wrong)


def test_a_runs_settings_are_taken_and_may_be_set(measured_run):
    """Temperature, and what it computes in; of rollouts of one step that step's
    checkpoint."""
    result, _, file = measured_run
    base = gj.LookConfig(rollouts=str(file), run_dir=str(result.run_dir))
    assert sampling_temperature(base) == 1.0
    asked = dataclasses.replace(base, temperature=0.5, compute_dtype="bfloat16")
    assert sampling_temperature(asked) == 0.5
    assert load_source(asked, 0).config.compute_dtype == "bfloat16"
    (found,) = measured_steps(dataclasses.replace(base, step=2))
    assert found.step == 2 and source_of(base, 2).startswith("step 2 of")
    assert source_of(base, 0).startswith("step 0 of")


def test_the_step_in_a_name_is_that_of_the_rows(tmp_path):
    """Also where it was not given, and no directory is of step 0."""
    task = gj.load_task("chains", heldout_prompts=16)
    policy = gj.init_policy(
        gj.ModelConfig(
            vocab_size=len(task.tokenizer), width=16, mlp_width=24, head_dim=4
        ),
        jax.random.key(0),
    )
    gj.save_pretrained(policy, tmp_path / "step-3", tokenizer=task.tokenizer)
    row = {"prompt": [3], "completion": [4, 5]}
    for step in ({"step": 3}, {}):
        rows = [row | step | {"reward": float(i % 2)} for i in range(4)]
        file = tmp_path / f"rows{len(step)}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        config = gj.LookConfig(
            rollouts=str(file), pretrained=str(tmp_path / "step-{step}")
        )
        (found,) = measured_steps(config)
        if step:
            assert source_of(config, found.step) == str(tmp_path / "step-3")
        else:
            with pytest.raises(ConfigError, match="the rollouts have none"):
                source_of(config, found.step)
