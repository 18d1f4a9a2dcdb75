"""A run with objects of the user's own, given in code or as module:name."""

import dataclasses
import json
import shutil
import threading
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax as gj
from grpo_jax.commands.replay import replay
from grpo_jax.errors import ConfigError
from grpo_jax.runs.lines import read_lines
from grpo_jax.streams import run_keys
from grpo_jax.training.saving import NonFiniteGradientsError, SamplerFailedError

from .test_train import digits_task, small_config

MODULE = """
import dataclasses

import jax.numpy as jnp
import optax

import grpo_jax as gj

GATED = dataclasses.replace(gj.OBJECTIVES["grpo"], kl_coef=0.0, clip=(0.1, 0.3))
ROWS = []


def focal(gamma=2.0):
    return gj.PromptWeights(
        lambda: (), lambda rewards, state: ((1 - rewards.mean(1)) ** gamma, state)
    )


def lion(schedule):
    return optax.lion(schedule)


def share_of_digits(example, completion):
    return sum(c.isdigit() for c in completion) / 8


def digits(*, tokenizer=None, seed=0):
    task = gj.load_task("chains", seed=seed, heldout_prompts=16)
    return dataclasses.replace(
        task, name="digits", reward=share_of_digits, single_answer=False,
        warm_start=None, tokenizer=tokenizer or task.tokenizer,
    )


def sampler(policy, prompt_ids, prompt_mask, **how):
    ROWS.append("sampled")
    return gj.sample(policy, prompt_ids, prompt_mask, **how)


def on_step(row, run):
    ROWS.append(row["step"])
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "open_rows.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import open_rows

    yield open_rows
    monkeypatch.delitem(__import__("sys").modules, "open_rows")


def config_of(directory, **changes):
    changes = (
        dict(steps=2, evaluation=gj.EvaluationConfig(every=0, prompts=4)) | changes
    )
    return small_config(directory, **changes)


# Every object of the user's own, by the flags' names.
NAMED = dict(
    task=gj.TaskConfig(name="open_rows:digits"),
    objective=gj.ObjectiveConfig(name="open_rows:GATED"),
    weights=gj.WeightsConfig(name="open_rows:focal"),
    optimizer=gj.OptimizerConfig(name="open_rows:lion", learning_rate=1e-3),
    sampling=gj.SamplingConfig(prompts=4, group_size=4, sampler="open_rows:sampler"),
    log=gj.LogConfig(samples_every=2, on_step="open_rows:on_step"),
)


@pytest.mark.slow
def test_objects_by_name_train_as_those_given_in_code(tmp_path, module):
    """The same numbers; resume, eval, replay and export find them by themselves."""
    named = gj.train(config_of(tmp_path / "named", **NAMED))
    assert module.ROWS.count("sampled") >= 2  # and those of evaluations
    assert [x for x in module.ROWS if x != "sampled"] == [0, 1, 2]
    rows = []
    given = gj.train(
        config_of(tmp_path / "given", optimizer=NAMED["optimizer"]),
        task=module.digits(),
        objective=module.GATED,
        weights=module.focal(),
        sampler=module.sampler,
        on_step=lambda row, run: rows.append((row["step"], run.directory)),
    )
    assert rows == [(step, tmp_path / "given") for step in (0, 1, 2)]
    same = ("reward/mean", "weights/max", "gradient/norm", "update/norm")
    for name in same:
        assert named.history[name][1:].tolist() == given.history[name][1:].tolist()
    for name in (1, 2):
        assert not replay(named.run_dir, name).differing
    recorded = json.loads((named.run_dir / "config.json").read_text())
    assert recorded["config"]["objective"]["name"] == "open_rows:GATED"
    computed = dataclasses.replace(module.GATED, scale="none")  # of the weights
    assert recorded["formula"] == computed.formula()
    assert {*recorded["given"]} == {
        "objective", "weights", "optimizer", "sampler", "on_step", "task.reward",
    }  # fmt: skip

    more = gj.train(gj.TrainConfig(run_dir=str(named.run_dir), resume=True, steps=3))
    assert more.finished and len(more.history["step"]) == 4
    result = gj.evaluate(gj.EvalConfig(run_dir=str(named.run_dir)))
    assert result is not None
    gj.export(named.run_dir, tmp_path / "exported")
    assert (tmp_path / "exported" / "config.json").exists()

    message = "objective.name objective was made in code: give it again"
    with pytest.raises(ConfigError, match=message):
        gj.train(gj.TrainConfig(run_dir=str(given.run_dir), resume=True, steps=3))


@pytest.mark.slow
def test_a_task_given_in_code_is_given_again(tmp_path, module, monkeypatch):
    """Each command says how; named at last, it is found by itself from then on."""
    task = dataclasses.replace(module.digits(), name="mine")
    run = gj.train(config_of(tmp_path / "run"), task=task)
    directory = str(run.run_dir)
    resume = gj.TrainConfig(run_dir=directory, resume=True, steps=3)
    code = "the run's task mine was given in code and cannot be found by its name; "
    with pytest.raises(ConfigError, match=f"{code}give it again, gj.train.config, tas"):
        gj.train(resume)
    with pytest.raises(ConfigError, match=f"{code}give it again: grpo_jax.commands"):
        replay(directory, 1)
    with pytest.raises(ConfigError, match=f"{code}say where it is: --task module"):
        gj.evaluate(gj.EvalConfig(run_dir=directory))
    gj.export(directory, tmp_path / "exported")
    assert not replay(directory, 1, task=task).differing

    named = gj.TaskConfig(name="open_rows:digits")
    lines = []
    evaluation = gj.EvalConfig(run_dir=directory, task=named, output=directory + "/e")
    gj.evaluate(evaluation, say=lines.append)
    assert any("trained on is not known (the run's task mine was" in x for x in lines)
    more = gj.train(dataclasses.replace(resume, task=named))
    assert more.finished and not replay(directory, 3).differing
    assert gj.train(gj.TrainConfig(run_dir=directory, resume=True, steps=4)).finished


def test_a_task_in_code_of_a_tasks_name_is_not_mistaken_for_it(tmp_path, capsys):
    """digits_task is called chains, and has another reward; a third one is said."""
    run = gj.train(config_of(tmp_path / "run", steps=1), task=digits_task())
    resume = gj.TrainConfig(run_dir=str(run.run_dir), resume=True, steps=2)
    with pytest.raises(ConfigError, match="the run's task chains was given in code"):
        gj.train(resume)
    capsys.readouterr()
    gj.train(resume, task=digits_task(lambda example, completion: 0.5))
    said = " ".join(capsys.readouterr().out.split())
    assert "task.reward: the code or its values changed since the run's last st" in said


def test_an_own_objective_is_the_preset_it_equals(tmp_path):
    runs = [
        gj.train(
            config_of(tmp_path / name, objective=gj.ObjectiveConfig(**named)),
            task=digits_task(), **given,
        )
        for name, named, given in (
            ("preset", dict(name="dapo"), {}),
            ("own", {}, dict(objective=gj.OBJECTIVES["dapo"])),
        )
    ]  # fmt: skip
    rows = [read_lines(run.run_dir / "metrics.jsonl")[-1] for run in runs]
    times = [name for name in rows[0] if name.startswith("time/") or name == "compiles"]
    for row in rows:
        for name in times:
            row.pop(name)
    assert rows[0] == rows[1]


def test_a_policy_and_an_optimizer_given_in_code(tmp_path):
    """One SGD step from the policy given: it moves by rate x gradient norm."""
    task = digits_task()
    model = gj.ModelConfig(
        vocab_size=len(task.tokenizer), width=16, mlp_width=24, head_dim=4
    )
    policy = gj.init_policy(model, jax.random.key(7))
    before = jax.device_get(policy.params)
    config = config_of(tmp_path / "run", steps=1, model=gj.ModelConfig())
    result = gj.train(config, task=task, policy=policy, optimizer=optax.sgd(0.5))
    chex.assert_trees_all_equal(policy.params, before)
    chex.assert_trees_all_equal(result.policy(0).params, before)
    row = result.metrics
    assert row["update/norm"] == pytest.approx(0.5 * row["gradient/norm"], rel=1e-4)
    assert "learning_rate" not in row
    moved = jax.tree.map(lambda x, y: x - y, result.policy().params, before)
    assert float(optax.tree.norm(moved)) == pytest.approx(row["update/norm"], rel=1e-3)
    again = gj.TrainConfig(run_dir=str(tmp_path / "run"), resume=True, steps=2)
    more = gj.train(again, task=task, optimizer=optax.sgd(0.5))
    assert more.finished and more.metrics["step"] == 2


def test_a_policy_that_a_function_makes_is_not_kept(tmp_path):
    """The run trains a copy: at the first row the one made is gone."""
    task, made, kept = digits_task(), [], []

    def make():
        model = gj.ModelConfig(
            vocab_size=len(task.tokenizer), width=16, mlp_width=24, head_dim=4
        )
        policy = gj.init_policy(model, jax.random.key(7))
        made.append(weakref.ref(jax.tree.leaves(policy.params)[0]))
        return policy

    def on_step(row, run):
        kept.append(made[0]() is not None)

    config = config_of(tmp_path / "run", steps=1, model=gj.ModelConfig())
    gj.train(config, task=task, policy=make, on_step=on_step)
    assert kept == [False, False] and len(made) == 1


def test_a_run_stopped_before_its_start_was_saved_starts_from_its_policy(tmp_path):
    """Its directory holds a config and no parameters; resumed, it wants the policy."""
    task = digits_task()
    model = gj.ModelConfig(
        vocab_size=len(task.tokenizer), width=16, mlp_width=24, head_dim=4
    )
    policy = gj.init_policy(model, jax.random.key(7))
    config = config_of(tmp_path / "run", steps=1, model=gj.ModelConfig())
    stopped = gj.train(config, task=task, policy=policy)
    shutil.rmtree(stopped.run_dir / "checkpoints")
    (stopped.run_dir / "initial.safetensors").unlink()
    resume = gj.TrainConfig(run_dir=str(stopped.run_dir), resume=True)
    with pytest.raises(ConfigError, match="give it again to gj.train, as policy="):
        gj.train(resume, task=task)
    again = gj.train(resume, task=task, policy=policy)
    chex.assert_trees_all_equal(again.policy(0).params, jax.device_get(policy.params))


def test_a_resumed_run_may_have_another_listener(tmp_path, module):
    log = gj.LogConfig(on_step="open_rows:on_step")
    config = config_of(tmp_path / "run", steps=1, log=log)
    gj.train(config, task=digits_task())
    rows = []
    resume = gj.TrainConfig(run_dir=str(tmp_path / "run"), resume=True, steps=2)
    gj.train(resume, task=digits_task(), on_step=lambda row, run: rows.append(row))
    assert [row["step"] for row in rows] == [2]


def test_on_step_stops_evaluates_and_saves(tmp_path):
    """Asked at the row of step 2: the step in progress evaluates and saves; asked to
    stop at step 4, the run ends and is resumed to the same numbers."""

    def on_step(row, run):
        if row["step"] == 2:
            run.evaluate()
            run.save()
        if row["step"] == 4:
            run.stop()

    config = config_of(
        tmp_path / "run", steps=8, checkpoint=gj.CheckpointConfig(every=1000)
    )
    stopped = gj.train(config, task=digits_task(), on_step=on_step)
    assert not stopped.finished
    rates = stopped.history["eval/heldout_pass_rate"]
    assert np.isfinite(rates[3]) and np.isnan(rates[[1, 2, 4]]).all()
    assert (stopped.run_dir / "checkpoints" / "3").exists()
    resume = gj.TrainConfig(run_dir=str(stopped.run_dir), resume=True)
    finished = gj.train(resume, task=digits_task())
    whole = gj.train(
        dataclasses.replace(config, run_dir=str(tmp_path / "whole")), task=digits_task()
    )
    for name in ("reward/mean", "gradient/norm"):
        np.testing.assert_array_equal(finished.history[name], whole.history[name])


def test_an_error_in_on_step_ends_the_run_once_it_is_saved(tmp_path):
    def on_step(row, run):
        if row["step"] == 1:
            raise KeyError("mine")

    with pytest.raises(RuntimeError, match="on_step failed .*KeyError: 'mine'"):
        gj.train(
            config_of(tmp_path / "run", steps=6), task=digits_task(), on_step=on_step
        )
    saved = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()]
    assert max(saved) >= 1


def test_a_run_in_a_thread_is_watched_and_stopped(tmp_path):
    """As in a notebook: started in the background, stopped from the foreground."""
    started, handles, results = threading.Event(), [], []

    def on_step(row, run):
        handles.append(run)
        if row["step"] == 1:
            started.set()

    config = config_of(tmp_path / "run", steps=100_000)
    thread = threading.Thread(
        target=lambda: results.append(
            gj.train(config, task=digits_task(), on_step=on_step)
        )
    )
    thread.start()
    assert started.wait(120)
    handles[-1].stop()
    thread.join(120)
    assert not thread.is_alive() and not results[0].finished
    assert results[0].history["step"][-1] >= 1


def completions_of(task, rollouts):
    """Texts [P][G], without EOS."""
    masked = np.where(rollouts.completion_mask > 0, rollouts.completions, -1)
    eos = task.tokenizer.eos_token_id
    return [
        [task.tokenizer.decode([t for t in row if t not in (-1, eos)]) for row in group]
        for group in masked.tolist()
    ]


def test_the_learner_is_the_trainers(tmp_path):
    """A loop of one's own, with the run's prompts and keys, gives its numbers to the
    last bit."""
    task, steps = digits_task(), 3
    config = config_of(tmp_path / "run", steps=steps)
    seen = {}

    def sampler(policy, prompt_ids, prompt_mask, **how):
        if how["group_size"] == 4:
            key = jax.random.key_data(how["key"]).tobytes()
            seen[key] = prompt_ids, prompt_mask, how
        return gj.sample(policy, prompt_ids, prompt_mask, **how)

    run = gj.train(config, task=task, sampler=sampler, optimizer=optax.adamw(1e-3))
    learner = gj.Learner("grpo", optax.adamw(1e-3))
    state = learner.init(run.policy(0))
    keys = run_keys(config.seed)
    for step in range(steps):
        key = jax.random.fold_in(keys.samples, step)
        ids, mask, how = seen[jax.random.key_data(key).tobytes()]
        rollouts = gj.sample(learner.policy(state), ids, mask, **how)
        texts = completions_of(task, rollouts)
        rewards = [[task.reward(None, text) for text in group] for group in texts]
        rewards = np.array(rewards, np.float32)
        state, metrics = learner.step(state, rollouts._replace(rewards=rewards))
        row = {name: run.history[name][step + 1] for name in run.history}
        for name in ("reward/mean", "gradient/norm", "update/norm", "loss/policy"):
            assert float(metrics[name]) == row[name], (step, name)
    chex.assert_trees_all_equal(run.policy().params, state.params)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(objective=3), "objective must be an Objective"),
        (dict(objective="dapo"), "objective must be an Objective"),
        (dict(optimizer=optax.adamw), "adamw must give a .*learning_rate"),
        (dict(weights=3), "weights must be a PromptWeights"),
        (dict(optimizer=3), "optax.adamw"),
        (dict(policy=3), "load_pretrained"),
        (dict(sampler=3), "def sampler"),
        (dict(on_step=3), "def on_step"),
        (dict(on_step=lambda row: None), r"must be a function of \(row, run\), got <f"),
        (
            dict(sampler=lambda policy, ids, mask: None),
            r"mask, \*, group_size, max_new",
        ),
        (
            dict(weights=lambda rewards: rewards.mean(1)),
            r"'rewards'; call a rule, or w",
        ),
    ],
)
def test_objects_of_the_wrong_kind_are_refused(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        gj.train(config_of(tmp_path / "run"), task=digits_task(), **given)
    assert not (tmp_path / "run").exists()


def counted(rewards, state):
    return jnp.ones(len(rewards)), state + 1.5


@pytest.mark.parametrize(
    ("init", "weights", "message"),
    [
        ((), lambda r, s: (r.mean(1), s), "TypeError: .*callable"),
        (tuple, lambda r, s: r.mean(1), "weights, state"),
        (tuple, lambda r: (r.mean(1), ()), "positional argument"),
        (tuple, lambda r, s: (np.asarray(r).mean(1), s), "got Tracer"),
        (tuple, lambda r, s: (r.mean(0), s), r"float weights \[3\], .* float32 \[4\]"),
        (
            tuple,
            lambda r, s: ((r > 0).sum(1), s),
            r"float weights \[3\], .* int32 \[3\]",
        ),
        (lambda: jnp.zeros((), int), counted, r"same form, int32\[\], got float32\[\]"),
        (tuple, lambda r, s: (r.mean(1), (1.0,)), "same form"),
    ],
)
def test_a_rule_that_cannot_weigh_is_refused(tmp_path, init, weights, message):
    """Of 16 prompts x 16 samples a mean over prompts would have passed for weights."""
    rule = gj.PromptWeights(init, weights)
    with pytest.raises(ConfigError, match=f"(?s)weights, called under jit .*{message}"):
        gj.train(config_of(tmp_path / "run"), task=digits_task(), weights=rule)
    assert not (tmp_path / "run").exists()


def test_a_rule_of_nan_is_named_where_its_updates_are_left_out(tmp_path, capsys):
    """0 / 0 for every group; not the learning rate's fault."""
    rule = gj.PromptWeights(tuple, lambda r, s: (0 * r.mean(1) / 0, s))
    message = r"the prompt weights code:weights gave nan to prompt '\d.*4 of 4 .*mend"
    with pytest.raises(NonFiniteGradientsError, match=message) as stopped:
        gj.train(config_of(tmp_path / "run", steps=9), task=digits_task(), weights=rule)
    assert "learning_rate" not in str(stopped.value)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("step 1: the prompt weights code:weights gave nan") == 1
    assert "step 2: the prompt weights" not in said


def test_a_rule_of_negative_weights_is_named_once(tmp_path, capsys):
    rule = gj.PromptWeights(tuple, lambda r, s: (r.mean(1) - 2, s))
    run = gj.train(config_of(tmp_path / "run"), task=digits_task(), weights=rule)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("weights are negative): such a prompt is trained towards") == 1
    assert run.history["weights/min"][1] <= run.history["weights/mean"][1] < 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(policy="mine"), "policy of your own must be module:name, got 'mine'"),
        (dict(log=gj.LogConfig(on_step="watch")), "log.on_step of your own"),
        (dict(sampling=gj.SamplingConfig(sampler="vllm")), "sampling.sampler of your"),
        (dict(objective=gj.ObjectiveConfig(name="gppo")), "did you mean 'g"),
        (dict(weights=gj.WeightsConfig(name="stdd")), "did you mean 'std'"),
    ],
)
def test_a_name_of_nothing_is_refused(tmp_path, changes, message):
    """Not trained past, as with the default in its place."""
    with pytest.raises(ConfigError, match=message):
        gj.train(config_of(tmp_path / "run", **changes), task=digits_task())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x._replace(behaviour_logprobs=np.nan * x.behaviour_logprobs), "NaN"),
        (lambda x: x._replace(completions=x.completions + 999), "prompt 0, .*outside"),
        (lambda x: jax.tree.map(lambda y: y[:1], x), "must return completions"),
        (lambda x: x.completions, "rollouts must be Rollouts"),
    ],
)
def test_what_a_sampler_must_not_return_is_refused(tmp_path, spoil, message):
    def sampler(policy, prompt_ids, prompt_mask, **how):
        return spoil(gj.sample(policy, prompt_ids, prompt_mask, **how))

    message = f"(?s)the sampler failed: ValueError: .*{message}.*no step is saved"
    with pytest.raises(SamplerFailedError, match=message):
        gj.train(config_of(tmp_path / "run"), task=digits_task(), sampler=sampler)


def test_settings_that_an_own_object_does_not_read_are_refused(tmp_path):
    def refuse(message, given, **changes):
        config = config_of(tmp_path / "run", **changes)
        with pytest.raises(ConfigError, match=message):
            gj.train(config, task=digits_task(), **given)

    refuse(
        "optimizer.b1 changes nothing", dict(optimizer=optax.sgd(1.0)),
        optimizer=gj.OptimizerConfig(b1=0.5),
    )  # fmt: skip
    refuse(
        "optimizer.learning_rate changes nothing.*function of `schedule`",
        dict(optimizer=optax.sgd(1.0)), optimizer=gj.OptimizerConfig(learning_rate=0.5),
    )  # fmt: skip
    refuse(
        "given as an object too", dict(objective=gj.OBJECTIVES["dapo"]),
        objective=gj.ObjectiveConfig(name="grpo2"),
    )  # fmt: skip
