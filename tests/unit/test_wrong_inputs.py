"""Public functions refuse what they would otherwise answer with something else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.commands.export import _check_output
from grpo_jax.errors import ConfigError

REWARDS = np.array([[1.0, 0, 0, 1], [0, 0, 1, 0]], np.float32)
ONES = np.ones((2, 4), np.float32)
IDS, MASK = np.ones((2, 5), np.int32), np.ones((2, 5), np.int32)
MODEL = gj.ModelConfig(
    vocab_size=11, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_dim=4
)


@pytest.fixture(scope="module")
def policy():
    return gj.init_policy(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def rollouts(policy):
    return sample(policy)


def sample(policy, ids=IDS, mask=MASK, **changes):
    settings = dict(group_size=3, max_new_tokens=2, eos_id=1, pad_id=0)
    settings |= {"key": jax.random.key(0)} | changes
    return gj.sample(policy, ids, mask, **settings)


@pytest.mark.parametrize("function", [gj.inverse_std, gj.whitened_advantages])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
        ({"eps": float("nan")}, "eps must not be negative, got nan"),
        ({"ddof": 2}, "ddof must be 0 or 1, got 2"),
        ({"ddof": -1}, "ddof must be 0 or 1, got -1"),
        ({"ddof": 0.5}, r"ddof must be 0 or 1, got 0\.5"),
    ],
)
def test_settings_of_the_std(function, settings, message):
    with pytest.raises(ValueError, match=message):
        function(REWARDS, **settings)


@pytest.mark.parametrize(
    "function",
    [
        gj.inverse_std,
        gj.centred_advantages,
        gj.leave_one_out_advantages,
        gj.whitened_advantages,
        lambda r: gj.std_weights().weights(r, ())[0],
        lambda r: gj.batch_std_weights().weights(r, ())[0],
        lambda r: gj.beta_weights().weights(r, ())[0],
        lambda r: gj.finite_group_weights().weights(r, ())[0],
    ],
)
def test_rewards_may_be_a_list(function):
    np.testing.assert_allclose(function(REWARDS.tolist()), function(REWARDS), rtol=1e-6)
    with pytest.raises(ValueError, match=r"rewards must be \[num_prompts, group_size"):
        function([1.0, 0.0])


@pytest.mark.parametrize("size", [2.5, "4", None])
def test_a_group_size_is_whole(size):
    with pytest.raises(ValueError, match="group_size must be a whole number, got"):
        gj.expected_group_std(0.5, size)


@pytest.mark.parametrize("wrong", [ONES[:, :1], ONES[:1], ONES.T, ONES[0]])
def test_derivatives_are_not_broadcast(wrong):
    for arguments in ((wrong, ONES), (ONES, wrong)):
        with pytest.raises(ValueError, match=r"derivatives must be \(2, 4\), the rew"):
            gj.prompt_curvature(REWARDS, *arguments)
    with pytest.raises(ValueError, match=r"derivatives must be \(2, 4\), the rew"):
        gj.prompt_slope(REWARDS, wrong)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS[0], None, r"must be \[B, L\] alike, got \(5,\) and None"),
        (IDS, MASK[:1], r"alike, got \(2, 5\) and \(1, 5\)"),
        (IDS, MASK[:, :1], r"alike, got \(2, 5\) and \(2, 1\)"),
        (IDS, MASK[0], r"alike, got \(2, 5\) and \(5,\)"),
        (IDS * 1.0, None, "token_ids must be integers, got float"),
        (IDS * 11, None, r"token_ids must be in \[0, 11\), .* from 11 to 11"),
        (-jnp.asarray(IDS), None, r"token_ids must be in \[0, 11\), .* from -1 to -1"),
    ],
)
def test_tokens_of_logits(policy, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        gj.next_token_logits(policy, ids, mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": IDS * 11}, r"prompt_ids must be in \[0, 11\)"),
        ({"ids": IDS * 1.0}, "prompt_ids must be integers, got float"),
        ({"mask": MASK * [[1], [0]]}, "prompt 1 has no token: its mask is 0"),
        ({"eos_id": ()}, r"eos_id must be a token or .*, got \(\)"),
        ({"eos_id": None}, "eos_id must be a token or .*, got None"),
        ({"pad_id": -1}, r"pad_id must be in \[0, 11\)"),
        ({"pad_id": None}, "pad_id must be integers"),
    ],
)
def test_tokens_of_samples(policy, changes, message):
    with pytest.raises(ValueError, match=message):
        sample(policy, **changes)


def test_no_end_can_be_asked_for(policy):
    assert np.asarray(sample(policy, eos_id=-1).completion_mask).all()


@pytest.mark.parametrize(
    ("changes", "temperature", "message"),
    [
        ({"completion_mask": np.ones((1, 3, 2))}, 1.0, r"must be \[2, G, T\] alike"),
        ({"completions": np.ones((6, 2), int)}, 1.0, r"must be \[2, G, T\] alike"),
        ({"prompts": IDS[:1], "prompt_mask": MASK[:1]}, 1.0, r"be \[1, G, T\] alike"),
        ({"prompt_mask": MASK[:1]}, 1.0, r"must be \[P, L\] alike"),
        ({"completions": np.full((2, 3, 2), 77)}, 1.0, r"completions must be in \[0"),
        ({}, 0.0, "temperature must be positive, got 0.0"),
        ({}, -1.0, "temperature must be positive, got -1.0"),
    ],
)
def test_rollouts_of_logprobs(policy, rollouts, changes, temperature, message):
    with pytest.raises(ValueError, match=message):
        gj.completion_logprobs(
            policy, rollouts._replace(**changes), temperature=temperature
        )


def test_no_token_is_another_ones_logprob():
    """-1 and -100, which mark padding elsewhere, are no tokens of the vocabulary."""
    hidden, unembedding = jnp.ones((2, 3, 8)), jnp.ones((8, 11))
    ids = jnp.array([[0, -1, -100], [10, 11, 5]])
    logprobs = jax.jit(gj.token_logprobs)(hidden, unembedding, ids)
    known = np.array([[True, False, False], [True, False, True]])
    np.testing.assert_array_equal(np.isfinite(logprobs), known)
    np.testing.assert_allclose(np.asarray(logprobs)[known], -np.log(11), rtol=1e-6)
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive, got"):
            gj.token_logprobs(hidden, unembedding, ids, temperature=temperature)


def test_a_model_has_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size must be at least 1 in a model"):
        gj.init_policy(gj.ModelConfig(), jax.random.key(0))


def test_the_text_of_targets_is_not_a_list_of_letters(policy):
    with pytest.raises(ValueError, match="lora_targets must be a list of values, got"):
        gj.add_lora(policy, rank=1, alpha=1.0, targets="qv", key=jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_prompts": 0}, "task.train_prompts must be at least 1, got 0"),
        ({"train_prompts": -1}, "task.train_prompts must be at least 1, got -1"),
        ({"train_prompts": "3"}, "task.train_prompts must be a whole number, got '3'"),
        ({"heldout_prompts": -1}, "task.heldout_prompts must be at least 0, got -1"),
        ({"seed": None}, "task.seed must be a whole number, got None"),
        ({"rewards": "exact"}, "task.rewards must be a list of values, got 'exact'"),
        ({"rewards": (len,)}, "task.rewards must be text, got <built-in"),
        ({"thinking": "no"}, "task.thinking must be true or false, got 'no'"),
        ({"thinking": 1}, "task.thinking must be true or false, got 1"),
        ({"path": 3}, "task.path must be text, got 3"),
        ({"template": True}, "task.template must be text, got True"),
        ({"system": ("a",)}, r"task.system must be text, got \('a',\)"),
        ({"date": 2024}, "task.date must be text, got 2024"),
        ({"control_tokens": "no"}, "control_tokens must be one of spell, keep, got"),
        ({"eos_ids": 3}, "task.eos_ids must be a list of values, got 3"),
        ({"eos_ids": ("3",)}, "task.eos_ids must be a whole number, got '3'"),
        ({"levels": "12"}, "task.levels must be a list of values, got '12'"),
        ({"levels": [1.5]}, r"task.levels must be values of str or int, got 1\.5"),
        ({"tag_fields": {"a": 1}}, "task.tag_fields must be a list of values, got"),
        ({"vocab_size": "300"}, "task.vocab_size must be a whole number, got '300'"),
        ({"tokenizer": "gpt2"}, "task.tokenizer must be a tokenizer, got 'gpt2'"),
        ({"template_arguments": "a=1"}, r"mapping or a list .*got 'a=1'; give \{'NAME"),
        ({"template_arguments": [1]}, r"mapping or a list of NAME=VALUE, got \[1\]"),
    ],
)
def test_options_of_a_task(options, message):
    with pytest.raises(ConfigError, match=message):
        gj.load_task("chains", **options)


@pytest.mark.parametrize("wrong", ["gsm8k", 3, gj.ModelConfig()])
def test_a_task_of_a_run_is_one(wrong):
    with pytest.raises(ConfigError, match="task must be a Task, got .*load_task's"):
        gj.train(gj.TrainConfig(), task=wrong)


@pytest.mark.parametrize(
    ("gold", "completion"), [("3", None), ("3", ["3"]), (None, "3"), ([3], "3")]
)
def test_a_verdict_is_of_texts(gold, completion):
    with pytest.raises(ConfigError, match="must be text|gold"):
        gj.verify("gsm8k", gold, completion)


@pytest.mark.parametrize("function", [gj.train, gj.evaluate, gj.warm_up])
def test_a_config_is_one(function):
    for wrong in ("run", 3, None, gj.ModelConfig()):
        with pytest.raises(
            ConfigError, match="^config must be a mapping, got .*Config"
        ):
            function(wrong)
    with pytest.raises(ConfigError, match="unknown config key 'config.stepz'"):
        function({"stepz": 3})


def test_what_a_config_needs_is_named():
    with pytest.raises(ConfigError, match="config.output must be given"):
        gj.warm_up({"seed": 1})
    with pytest.raises(ConfigError, match="one policy: give pretrained, .* or run_dir"):
        gj.evaluate({"seed": 1})
    message = "one policy, got pretrained='m' and run_dir='r'; leave one out"
    with pytest.raises(ConfigError, match=message):
        gj.EvalConfig(pretrained="m", run_dir="r")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "3"}, "step must be a whole number, got '3'"),
        ({"adapter": "no"}, "adapter must be true or false, got 'no'"),
        ({"max_loss": "1"}, "max_loss must be a number, got '1'"),
        ({"run_dir": 3}, "run_dir must be text, got 3"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_options_of_an_export(options, message):
    given = {"run_dir": "run", "directory": "out"} | options
    with pytest.raises(ConfigError, match=message):
        gj.export(**given)


def test_an_export_keeps_away_from_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"no model's \(thesis.tex\); export to a n"):
        _check_output(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # of an earlier export
    _check_output(tmp_path)
    _check_output(tmp_path / "new")


@pytest.mark.parametrize("wrong", [None, ONES.tolist()])
@pytest.mark.parametrize(
    "name", ["logprobs", "behaviour_logprobs", "rewards", "completion_mask"]
)
def test_arrays_of_a_loss(name, wrong):
    cube = np.ones((2, 4, 3), np.float32)
    arrays = {n: cube for n in ("logprobs", "behaviour_logprobs", "completion_mask")}
    arrays |= {"rewards": REWARDS, name: wrong}
    with pytest.raises(ValueError, match=f"{name} must be an array, got"):
        gj.per_prompt_losses(gj.OBJECTIVES["grpo"], **arrays)
