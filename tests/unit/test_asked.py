"""What a run was asked is what it is resumed with, or it is refused with words."""

import dataclasses
import json

import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.planning.plan import make_plan
from grpo_jax.rollouts.asked import asked_facts
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.runs.config import SamplingConfig, TaskConfig, TrainConfig
from grpo_jax.runs.config_files import to_dict
from grpo_jax.runs.directory import claim, differing_prompts
from grpo_jax.runs.policies import task_for_run, task_to_continue
from grpo_jax.tasks.registry import load_task
from grpo_jax.tasks.templates import CHATML
from grpo_jax.training.run import _save_tokenizer, _task
from grpo_jax.training.start import facts_of
from tests.chat_forms import DATED, THINKING, chatml, sums, write_rows

NOW = "2026-08-01T10:00:00"


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", sums())


def asked(rows, tokenizer, **options):
    return load_task("jsonl", path=rows, tokenizer=tokenizer, **options)


def test_equal_prompts_have_equal_fingerprints(rows):
    one, other = (asked_facts(asked(rows, chatml())) for _ in range(2))
    assert differing_prompts(one, other) is None and one == other
    # A run of an older version recorded none.
    assert differing_prompts(None, one) is None
    task = asked(rows, chatml())
    assert asked_facts(task, encode_prompts(task, task.train)) == one


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(system="Be brief."), "changed: the system prompt; the first prompt had"),
        (
            dict(template="qa"),
            "changed: the template; the first prompt had '<.im_start",
        ),
        (
            dict(tokenizer=chatml(CHATML.replace("'\\n' +", "'\\r\\n' +"))),
            "changed: the template;",
        ),
        (dict(tokenizer=chatml(DATED)), "now 'Today is "),
        (
            dict(template_arguments={"enable_thinking": False}),
            "changed: the template's arguments; the first prompt had .*, now .*think>",
        ),
    ],
)
def test_what_differs_is_said(rows, change, words):
    old = asked_facts(asked(rows, chatml(THINKING)))
    given = {"tokenizer": chatml(THINKING)} | change
    new = asked_facts(load_task("jsonl", path=rows, **given))
    if "tokenizer" in change:
        old = asked_facts(asked(rows, chatml()))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(differing_prompts(old, new))


def test_a_changed_row_is_said_where_it_is_not_the_first(rows, tmp_path):
    old = asked(rows, chatml())
    last = old.train[-1].prompt
    changed = [row | {"prompt": row["prompt"].replace(last, "?")} for row in sums()]
    new = asked(write_rows(tmp_path / "new.jsonl", changed), chatml())
    said = differing_prompts(asked_facts(old), asked_facts(new))
    assert said == "changed: the rows' prompts"


def test_a_template_that_prints_the_date_has_the_runs(rows):
    task = asked(rows, chatml(DATED), date="2026-07-26T10:00:00")
    (ids,) = encode_prompts(task, task.train[:1])
    assert task.tokenizer.decode(ids).startswith("Today is 26 Jul 2026.\n<|im_start|>")
    tomorrow = dataclasses.replace(task, date="2026-07-27T10:00:00")
    said = differing_prompts(asked_facts(task), asked_facts(tomorrow))
    assert said is not None and "had 'Today is 26 Jul" in said
    assert "now 'Today is 27 Jul" in said
    assert asked(rows, chatml(DATED)).date[:2] == "20"


# ---- a run's directory


@pytest.fixture
def begun(rows, tmp_path):
    """(config, its directory) of a run begun on 2026-07-26, with a model's tokenizer;
    nothing is trained."""
    config = TrainConfig(
        task=TaskConfig(name="jsonl", path=rows, system="Be brief."),
        sampling=SamplingConfig(
            prompts=4, max_new_tokens=8, stop_tokens=("<|endoftext|>",)
        ),
        run_dir=str(tmp_path / "run"),
    )
    task = asked(rows, chatml(DATED), system="Be brief.", date="2026-07-26T10:00:00")
    plan = make_plan(config, task)
    directory = claim(config, facts_of(config, plan))
    _save_tokenizer(plan.task, directory)
    return dataclasses.replace(config, resume=True), directory


def edit(directory, change):
    file = directory / "config.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


def resumed(config):
    plan = make_plan(config, _task(config, None, NOW))
    claim(config, facts_of(config, plan))
    return plan


def test_a_resumed_run_has_its_tokenizer_template_date_and_ends(begun):
    config, directory = begun
    plan = resumed(config)
    text = plan.task.tokenizer.decode(plan.prompts[0])
    assert text.startswith("Today is 26 Jul 2026.\n<|im_start|>system\nBe brief.")
    assert plan.task.ends == (2, 0)  # <|im_end|>, and the stop token
    assert "ends at <|im_end|> (2), <|endoftext|> (0)" in plan.headline
    assert task_for_run(config.task, directory).date == "2026-07-26T10:00:00"


def test_a_run_of_an_older_version_resumes(begun):
    config, directory = begun

    def as_it_was(facts):
        for name in ("prompts", "date", "template_arguments"):
            del facts[name]
        for name in ("template_arguments", "control_tokens", "system_field"):
            del facts["config"]["task"][name]

    edit(directory, as_it_was)
    assert resumed(config).task.date == NOW  # all its processes have one date


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(date="2026-07-28T10:00:00"), "is 26 Jul .*is 28 Jul"),
        (lambda f: f.update(template_arguments={}, template="qa"), "the template"),
    ],
)
def test_other_prompts_are_refused_with_what_differs(begun, change, words):
    config, directory = begun
    edit(directory, change)
    with pytest.raises(ConfigError, match=f"(?s)cannot resume.*{words}|task.system"):
        resumed(config)


def test_an_edited_template_or_row_is_refused(begun, rows, tmp_path):
    config, directory = begun
    file = directory / "tokenizer" / "chat_template.jinja"
    before = file.read_text()
    file.write_text(before.replace("Today is", "It is"))
    with pytest.raises(ConfigError, match="changed: the template; .*Today is .*It is "):
        resumed(config)
    file.write_text(before)
    write_rows(tmp_path / "rows.jsonl", sums(21))
    with pytest.raises(ConfigError, match="the model is asked .changed: the rows' pro"):
        resumed(config)


def test_the_processes_of_a_run_have_one_date(begun, rows):
    config = dataclasses.replace(begun[0], resume=False)
    assert _task(config, None, NOW) is None
    assert make_plan(config, date=NOW).task.date == NOW
    given = _task(config, asked(rows, chatml(DATED)), NOW)
    assert given is not None and given.date == NOW


def test_another_setting_is_refused_before_it_is_tried(begun):
    config, _ = begun
    other = dataclasses.replace(config, task=TaskConfig(name="countdown"))
    with pytest.raises(ConfigError, match="cannot resume .* with another config"):
        _task(other, None, NOW)
    stops = SamplingConfig(prompts=4, max_new_tokens=8)
    with pytest.raises(ConfigError, match="sampling.stop_tokens: .'<.endoftext.>'. ->"):
        _task(dataclasses.replace(config, sampling=stops), None, NOW)


def test_a_run_stopped_before_its_tokenizer_was_written_starts_over(begun):
    config, directory = begun
    (directory / "tokenizer").rename(directory / "tokenizer.tmp")
    assert task_to_continue(config.task, directory) is None
    task = asked(config.task.path, chatml(DATED))
    _save_tokenizer(task, directory)
    assert {f.name for f in directory.iterdir()} == {"config.json", "tokenizer"}
    assert to_dict(config)["sampling"]["stop_tokens"] == ["<|endoftext|>"]
