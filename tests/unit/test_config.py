import dataclasses
import json
from typing import Annotated, Literal

import optax
import pytest

import grpo_jax as gj
from grpo_jax import TrainConfig
from grpo_jax.errors import (
    UP_TO_ONE,
    ConfigError,
    at_least,
    check_fields,
    nearest,
    unknown_name,
)
from grpo_jax.runs.config import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    ScoringConfig,
)
from grpo_jax.runs.config_files import differences, from_dict, load_config_file, to_dict
from grpo_jax.runs.directory import claim
from grpo_jax.runs.recorded import continued, run_config

CHANGED = TrainConfig(
    objective=ObjectiveConfig(name="dr_grpo", clip=(0.2, 0.28), kl_coef=0.01),
    sampling=SamplingConfig(group_size=4, max_new_tokens=7, temperature=0.5),
    optimizer=OptimizerConfig(schedule="cosine"),
    run_dir="somewhere",
    steps=3,
)


def load(values):
    return from_dict(TrainConfig, values)


def nested(name, value):
    *groups, field = name.split(".")
    values = {field: value}
    for group in reversed(groups):
        values = {group: values}
    return values


@pytest.mark.parametrize("config", [TrainConfig(), CHANGED])
def test_round_trip(config):
    assert load(to_dict(config)) == config
    assert load(json.loads(json.dumps(to_dict(config)))) == config


def test_only_what_is_given_changes():
    actual = from_dict(TrainConfig, {"sampling": {"prompts": 5}}, CHANGED)
    sampling = dataclasses.replace(CHANGED.sampling, prompts=5)
    assert actual == dataclasses.replace(CHANGED, sampling=sampling)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("step", "steps"),
        ("sampling.groupsize", "group_size"),
        ("optimizer.learning_rte", "learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest(name, near):
    message = f"^unknown config key '{name}'; did you mean '{near}'\\? keys here: "
    with pytest.raises(ConfigError, match=message):
        load(nested(name, 1))


def test_a_key_near_to_nothing_lists_the_keys_alone():
    with pytest.raises(ConfigError, match="unknown config key 'zzzz'; keys here: task"):
        load({"zzzz": 1})


@pytest.mark.parametrize("value", ["1e-5", "0.00001", 1e-5])
def test_numbers_that_yaml_reads_as_text_become_floats(value):
    rate = load(nested("optimizer.learning_rate", value)).optimizer.learning_rate
    assert rate == 1e-5 and type(rate) is float


def test_a_whole_number_is_a_float_where_one_is_wanted():
    clip = load(nested("objective.clip", [0.2, 1])).objective.clip
    assert clip == (0.2, 1.0) and type(clip[1]) is float


def test_a_list_of_any_length_becomes_a_tuple():
    values = {"sliding_window": 4, "sliding_layers": [0, 1]}
    assert load({"model": values}).model.sliding_layers == (0, 1)
    assert load({"model": {"sliding_layers": []}}).model.sliding_layers == ()


@pytest.mark.parametrize("name", ["objective.clip", "task.path", "run_dir"])
def test_null_is_the_default_where_there_is_one(name):
    assert load(nested(name, None)) == TrainConfig()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "many", "steps must be a whole number, got 'many'"),
        ("steps", 1.5, "steps must be a whole number, got 1.5"),
        ("steps", True, "steps must be a whole number, got True"),
        ("steps", None, "steps must be a whole number, got None"),
        ("resume", 1, "resume must be true or false, got 1"),
        ("optimizer.b1", "high", "optimizer.b1 must be a number, got 'high'"),
        ("optimizer.b1", True, "optimizer.b1 must be a number, got True"),
        ("optimizer.b1", [0.9], r"optimizer.b1 must be a number, got \[0.9\]"),
        ("task.name", 3, "task.name must be text, got 3"),
        ("objective.clip", 0.2, "objective.clip must be 2 values, got 0.2"),
        ("model.sliding_layers", 0, "sliding_layers must be a list of values, got 0"),
        ("model.sliding_layers", [0.5], "sliding_layers must be a whole number, got"),
        ("objective.clip", [1, 2, 3], r"objective.clip must be 2 values, got \[1"),
        ("objective.clip", ["a", 1], "objective.clip must be a number, got 'a'"),
        ("optimizer.schedule", "step", "must be one of constant, linear, cosine, got"),
        ("model.remat", "some", "model.remat must be one of none, dots, full, got"),
        ("task", 3, "task.* must be a mapping, got 3"),
        ("model", [1], r"model.* must be a mapping, got \[1\]"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        load(nested(name, value))


def test_the_whole_config_must_be_a_mapping():
    with pytest.raises(ConfigError, match="the config must be a mapping, got 'x'"):
        load("x")


AT_LEAST_TWO = ("sampling.group_size", "instrument.prompts")
AT_LEAST_ONE = (
    "steps", "updates_per_rollout", "micro_batch_tokens", "sampling.prompts",
    "sampling.max_prompt_tokens", "sampling.max_new_tokens", "task.train_prompts",
    "warm_start.max_steps", "warm_start.batch_size",
    "checkpoint.every", "checkpoint.keep", "evaluation.prompts", "log.samples_prompts",
    "log.lines_every",
)  # fmt: skip
AT_LEAST_ZERO = (
    "task.heldout_prompts",
    "optimizer.warmup_steps", "optimizer.clip_norm", "optimizer.weight_decay",
    "evaluation.every", "instrument.every", "log.samples_every",
    "warm_start.noisy_steps", "seed", "task.seed", "objective.kl_coef",
    "objective.std_eps", "optimizer.eps", "checkpoint.minutes",
)  # fmt: skip


LEAST = [
    *[(name, 2) for name in AT_LEAST_TWO],
    *[(name, 1) for name in AT_LEAST_ONE],
    *[(name, 0) for name in AT_LEAST_ZERO],
]


@pytest.mark.parametrize(("name", "least"), LEAST)
def test_numbers_may_be_as_low_as_their_least_and_no_lower(name, least):
    assert load(nested(name, least)) is not None
    for value in (least - 1, -7):
        message = f"^{name} must be at least {least}, got {value}"
        with pytest.raises(ConfigError, match=message):
            load(nested(name, value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sampling.group_size", 1, "at least 2, got 1; a group of one has no baseline"),
        ("sampling.temperature", 0, "must be positive, got 0.0; it is part of the po"),
        ("sampling.temperature", "nan", "must be a finite number, got nan"),
        ("sampling.temperature", "inf", "must be a finite number, got inf"),
        ("optimizer.learning_rate", 0, "must be positive, got 0.0"),
        ("optimizer.learning_rate", "nan", "must be a finite number, got nan"),
        ("objective.clip", [0.2, "inf"], "must be a finite number, got inf"),
        ("optimizer.b1", 1, r"must be in \[0, 1\), got 1.0"),
        ("optimizer.b2", -0.1, r"must be in \[0, 1\), got -0.1"),
        ("warm_start.target_pass_rate", 0, r"must be in \(0, 1\], got 0.0"),
        ("warm_start.target_pass_rate", 1.5, r"must be in \(0, 1\], got 1.5"),
        ("model.width", 0, "must be at least 1, got 0"),
        ("model.head_dim", 3, "must be even, got 3"),
    ],
)
def test_values_out_of_range_are_refused(name, value, message):
    with pytest.raises(ConfigError, match=f"^{name}.* {message}"):
        load(nested(name, value))


def test_a_target_of_one_and_a_group_of_two_are_allowed():
    assert load(nested("warm_start.target_pass_rate", 1)).warm_start.enabled
    assert load(nested("sampling.group_size", 2)).sampling.group_size == 2


def test_resume_needs_a_run():
    with pytest.raises(ConfigError, match="resume needs .* give --run-dir DIR"):
        TrainConfig(resume=True)
    assert TrainConfig(resume=True, run_dir="x").resume


def test_yaml_and_json_files(tmp_path):
    (yaml := tmp_path / "c.yaml").write_text("optimizer: {learning_rate: 1e-5}\n")
    (file := tmp_path / "c.json").write_text('{"optimizer": {"learning_rate": 1e-5}}')
    expected = TrainConfig(optimizer=OptimizerConfig(learning_rate=1e-5))
    assert load_config_file(str(yaml)) == load_config_file(str(file)) == expected


def test_an_empty_yaml_file_is_the_defaults(tmp_path):
    (file := tmp_path / "c.yml").write_text("# nothing yet\n")
    assert load_config_file(str(file)) == TrainConfig()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.toml", "", "--config must be a .yaml, .yml or .json file, got .*c.toml"),
        ("c.json", "{", "c.json is not JSON"),
        ("c.yaml", "a: [", "c.yaml is not YAML"),
        ("c.yaml", "- a", r"the config must be a mapping, got \['a'\]"),
        ("c.yaml", None, "cannot read --config .*c.yaml: .*No such file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config_file(str(file))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (file := tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read --config .*c.yaml"):
        load_config_file(str(file))


def test_differences_name_every_leaf():
    assert differences(to_dict(CHANGED), to_dict(CHANGED)) == []
    other = dataclasses.replace(
        CHANGED, steps=4, sampling=dataclasses.replace(CHANGED.sampling, prompts=2)
    )
    rows = differences(to_dict(CHANGED), to_dict(other))
    assert rows == ["sampling.prompts: None -> 2", "steps: 3 -> 4"]
    assert differences({"a": 1}, {}) == ["a: 1 -> None"]


def test_nearest_and_unknown_name():
    assert nearest("grop", ["grpo", "rloo"]) == "did you mean 'grpo'? "
    assert nearest("xyz", ["grpo", "rloo"]) == ""
    error = unknown_name("objective", "grop", ["rloo", "grpo"])
    expected = "unknown objective 'grop'; did you mean 'grpo'? choices: grpo, rloo."
    assert str(error) == expected and isinstance(error, ValueError)


@dataclasses.dataclass
class Inner:
    share: Annotated[float, UP_TO_ONE] | None = None
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass
class Outer:
    count: Annotated[int, at_least(2, "; why")] = 2
    inner: Inner = dataclasses.field(default_factory=Inner)
    plain: float | None = -1.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Outer(1), r"count must be at least 2, got 1; why\.$"),
        (Outer(inner=Inner(0.0)), r"inner.share must be in \(0, 1\], got 0\.0\.$"),
        (Outer(inner=Inner(kind="c")), r"inner.kind must be one of a, b, got 'c'"),
        (
            Outer(inner=Inner(kind=None)),
            r"inner.kind must be one of a, b, got None",
        ),
    ],
)
def test_rules_are_read_from_annotations(record, message):
    check_fields(Outer(), "x.")
    with pytest.raises(ConfigError, match=rf"^x\.{message}"):
        check_fields(record, "x.", ConfigError)


def test_a_variables_value_is_neither_taken_nor_repeated():
    with pytest.raises(ConfigError, match="names of environment variables") as error:
        TrainConfig(scoring=ScoringConfig(environment=("OK", "KEY=hunter2")))
    assert "'KEY'" in str(error.value) and "hunter2" not in str(error.value)
    config = TrainConfig(scoring=ScoringConfig(environment=("KEY",)))
    assert to_dict(config)["scoring"]["environment"] == ["KEY"]


# An older version chose the number of probe prompts anew at every start, by another
# rule: what it measured says how many there were, and no rows that there were none.
@pytest.mark.parametrize(
    ("rows", "measured"), [([{"step": 0, "prompts": [3, 1, 4]}], 3), ([], None)]
)
def test_an_old_run_keeps_its_probe_prompts(tmp_path, rows, measured):
    facts = {"data": "", "base": ""}
    config = TrainConfig(run_dir=str(tmp_path / "run"), instrument={"every": 40})
    directory = claim(config, facts)
    assert run_config(directory).instrument == config.instrument  # no step yet
    for name, lines in (("instrument", rows), ("metrics", [{"step": 1}])):
        (directory / f"{name}.jsonl").write_text(
            "".join(json.dumps(x) + "\n" for x in lines)
        )
    asked = TrainConfig(run_dir=str(directory), resume=True)
    resumed = continued(asked)
    assert resumed.instrument.prompts == measured
    assert resumed.instrument.every == (40 if measured else 0)
    assert claim(resumed, facts) == directory
    others = dataclasses.replace(resumed.instrument, prompts=9)
    with pytest.raises(ConfigError, match="instrument.prompts: "):
        claim(dataclasses.replace(resumed, instrument=others), facts)


def test_fields_that_an_old_run_lacks_have_their_defaults(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    facts = {"data": "", "base": ""}
    directory = claim(config, facts)
    file = directory / "config.json"
    content = json.loads(file.read_text())
    del content["config"]["checkpoint"]["best"], content["config"]["scoring"]
    file.write_text(json.dumps(content))
    resumed = dataclasses.replace(config, resume=True)
    assert claim(resumed, facts) == directory
    best = CheckpointConfig(best="reward")
    with pytest.raises(ConfigError, match="checkpoint.best: 'pass_rate' -> 'reward'"):
        claim(dataclasses.replace(resumed, checkpoint=best), facts)


def test_a_pretrained_model_has_a_smaller_batch_by_default():
    assert TrainConfig().batch == (16, 16)
    assert TrainConfig(pretrained="m").batch == (8, 8)
    given = TrainConfig(pretrained="m", sampling=SamplingConfig(group_size=5))
    assert given.batch == (8, 5)


TASK = r"a Task of your own goes into gj.train\(config, task=\.\.\.\), or is named"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: gj.TaskConfig(name=x), f"name must be text, got .*; {TASK}"),
        (lambda x: TrainConfig(task=x), f"task must be a TaskConfig, got .*; {TASK}"),
        (
            lambda x: TrainConfig(objective=gj.OBJECTIVES["grpo"]),
            "must be an ObjectiveConfig, got .*config, objective=",
        ),
        (
            lambda x: TrainConfig(weights=gj.std_weights()),
            "a rule of your own goes into .*weights=",
        ),
        (lambda x: gj.WeightsConfig(name=gj.std_weights()), "must be text.* weights="),
        (lambda x: TrainConfig(optimizer=optax.sgd(1.0)), "config, optimizer="),
        (lambda x: TrainConfig(policy=x), "policy must be text, got .* policy="),
        (lambda x: gj.LogConfig(on_step=print), "on_step must be text, .* on_step="),
        (
            lambda x: gj.LogConfig(to=(print,)),
            "must be text, .*function of the run that",
        ),
        (
            lambda x: gj.TaskConfig(rewards=(len,)),
            "rewards must be text, .*module:func",
        ),
        (lambda x: gj.SamplingConfig(sampler=x), "sampler must be text, .* sampler="),
    ],
)
def test_an_object_in_place_of_its_name_is_told_where_it_goes(make, message):
    with pytest.raises(ConfigError, match=message):
        make(object())
