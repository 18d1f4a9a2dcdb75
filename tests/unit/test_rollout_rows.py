"""Rollouts from rows: what is read, and what a wrong row is told."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from tests.chat_forms import THINKING, chatml, llama, write_rows
from tests.helpers import random_rollouts, tiny_policy

END = 2  # <|im_end|> of chatml()
ROW = {"prompt": [5, 6], "completion": [7, 8, 9], "reward": 1.0}


def rows(*changes, **more):
    """Rows of one prompt; a second one is there for the group."""
    return [ROW | {"reward": 0.0} | more, *(ROW | more | c for c in changes or ({},))]


def tokens(tokenizer, text):
    return tokenizer([text], add_special_tokens=False)["input_ids"][0]


def completion_of(rollouts, p=0, g=0):
    ids = np.asarray(rollouts.completions)[p, g]
    return ids[: np.asarray(rollouts.completion_mask)[p, g].sum()].tolist()


def prompt_of(rollouts, p=0):
    mask = np.asarray(rollouts.prompt_mask)[p] > 0
    return np.asarray(rollouts.prompts)[p][mask].tolist()


# ---- what comes back


@pytest.mark.parametrize("pad_to", [None, 1, 4])
def test_samples_of_a_policy_come_back_from_their_rows(tmp_path, pad_to):
    rollouts = random_rollouts(tiny_policy(), 4, 6, 5, 7)
    rollouts = rollouts._replace(rewards=rollouts.rewards.at[1, 2].set(jnp.nan))
    path = write_rows(tmp_path / "rows.jsonl", rollouts.to_rows())
    back = gj.Rollouts.from_jsonl(path, None, pad_to=pad_to)
    t, length = back.completions.shape[2], back.prompts.shape[1]
    assert (t, length) == {None: (7, 5), 1: (7, 5), 4: (8, 8)}[pad_to]
    left, right = [(0, 0), (length - 5, 0)], [(0, 0), (0, 0), (0, t - 7)]
    for name, array in rollouts._asdict().items():
        if array is not None:
            width = {2: left, 3: right}[array.ndim] if name != "rewards" else 0
            expected = np.pad(np.asarray(array), width)
            np.testing.assert_array_equal(getattr(back, name), expected, err_msg=name)
    assert back.solving is None
    chexable = [x.dtype for x in back if x is not None]
    assert chexable == [x.dtype for x in rollouts if x is not None]


def test_a_mask_of_ones_is_no_mask():
    plain = gj.Rollouts.from_rows(rows(), None)
    masked = gj.Rollouts.from_rows(rows(mask=[1, 1, True]), None)
    jax.tree.map(np.testing.assert_array_equal, plain, masked)


def test_masked_tokens_are_kept_and_have_no_log_prob():
    given = rows(mask=[1, 0, 1], logprobs=[-1.0, None, -0.5])
    rollouts = gj.Rollouts.from_rows(given, None, pad_to=1)
    np.testing.assert_array_equal(rollouts.completions, [[[7, 8, 9]] * 2])
    np.testing.assert_array_equal(rollouts.completion_mask, [[[1, 0, 1]] * 2])
    np.testing.assert_array_equal(rollouts.behaviour_logprobs, [[[-1, 0, -0.5]] * 2])
    back = gj.Rollouts.from_rows(rollouts.to_rows(), None, pad_to=1)
    jax.tree.map(np.testing.assert_array_equal, rollouts, back)


# What a tool wrote last, nothing that was sampled attends to.
def test_completions_end_with_their_last_sampled_token():
    rollouts = gj.Rollouts.from_rows(rows(mask=[1, 1, 0]), None, pad_to=1)
    np.testing.assert_array_equal(rollouts.completions, [[[7, 8]] * 2])


def test_unknown_log_probs_are_nan_until_a_policy_gives_them():
    policy = tiny_policy()
    given = rows({"completion": [7]})
    rollouts = gj.Rollouts.from_rows(given, None, pad_to=1)
    np.testing.assert_array_equal(
        np.isnan(rollouts.behaviour_logprobs), [[[1, 1, 1], [1, 0, 0]]]
    )
    with pytest.raises(ValueError, match="NaN for 4 of 4 sampled tokens"):
        rollouts.sampler_logprobs  # noqa: B018
    filled = gj.with_logprobs(policy, rollouts)
    expected = gj.completion_logprobs(policy, rollouts)
    np.testing.assert_allclose(filled.sampler_logprobs, expected, rtol=1e-5)
    again = gj.with_logprobs(tiny_policy(1), filled)
    np.testing.assert_array_equal(again.behaviour_logprobs, filled.behaviour_logprobs)


def test_one_row_a_prompt_is_one_row_a_completion():
    prompt = dict(
        prompt=[5, 6],
        completion=[[7, 8, 9], [7]],
        reward=[0.0, 1.0],
        logprobs=[[-1, -2, -3], [-4]],
        mask=[[1, 0, 1], [1]],
    )
    several = gj.Rollouts.from_rows([prompt], None)
    single = [
        {"prompt": [5, 6]} | {k: prompt[k][i] for k in prompt if k != "prompt"}
        for i in range(2)
    ]
    one_each = gj.Rollouts.from_rows(single, None)
    jax.tree.map(np.testing.assert_array_equal, several, one_each)


def test_rows_may_hold_arrays():
    given = [{k: np.asarray(v) for k, v in row.items()} for row in rows()]
    given[0]["completion"] = jnp.asarray(given[0]["completion"])
    plain = gj.Rollouts.from_rows(rows(), None)
    actual = gj.Rollouts.from_rows(given, None)
    jax.tree.map(np.testing.assert_array_equal, plain, actual)


# .5 and 1 x .2, 1 and nothing, nothing at all: a missing one of several adds nothing.
def test_named_rewards_are_added_with_their_weights():
    given = [
        ROW | {"right": 0.5, "form": 1},
        ROW | {"right": True, "form": None},
        ROW | {"right": float("nan"), "form": None},
    ]
    form = gj.RowForm(rewards={"right": 1.0, "form": 0.2})
    actual = gj.Rollouts.from_rows(given, None, form=form).rewards
    np.testing.assert_allclose(actual, [[0.7, 1.0, np.nan]], rtol=1e-6)
    with_all = [{k: x for k, x in row.items() if k != "reward"} for row in given]
    with_all[1]["right"] = 1.0  # a truth value is taken for a reward by name only
    form = gj.RowForm(rewards=None)
    actual = gj.Rollouts.from_rows(with_all, None, form=form).rewards
    np.testing.assert_allclose(actual, [[1.5, 1.0, np.nan]], rtol=1e-6)


def test_groups_share_the_tokens_of_their_prompt_or_a_field():
    given = [ROW | {"prompt": [p], "at.x": i} for i, p in enumerate([5, 6, 5, 6, 5])]
    rollouts = gj.Rollouts.from_rows(given, None)
    assert [prompt_of(rollouts, p) for p in range(2)] == [[5], [6]]
    assert np.isfinite(rollouts.rewards).sum(1).tolist() == [3, 2]
    same = [ROW | {"id": i // 2} for i in range(4)]
    form = gj.RowForm(group="id")
    assert gj.Rollouts.from_rows(same, None, form=form).rewards.shape == (2, 2)
    wider = gj.Rollouts.from_rows(same, None, form=form, group_size=4).rewards
    np.testing.assert_array_equal(np.isfinite(wider), [[1, 0, 1, 0]] * 2)


def test_lengths_are_padded_to_few():
    shapes = set()
    for n in range(1, 129):
        given = rows(completion=[7] * n, prompt=[5] * n)
        rollouts = gj.Rollouts.from_rows(given, None)
        shapes.add((rollouts.prompts.shape, rollouts.completions.shape))
    assert len(shapes) == 16 + 7  # up to 16 as they are, then by 16


# ---- text


def test_text_is_taken_as_it_is_with_control_tokens_and_gets_its_end():
    tokenizer = chatml()
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    given = rows({"completion": "b<|im_end|>"}, prompt=prompt, completion="a")
    rollouts = gj.Rollouts.from_rows(given, tokenizer)
    assert prompt_of(rollouts) == tokens(tokenizer, prompt)
    assert [completion_of(rollouts, 0, g) for g in (0, 1)] == [
        [*tokens(tokenizer, "a"), END],
        [*tokens(tokenizer, "b"), END],
    ]


SHORT = dict(prompt="p", completion="a")


def test_completions_that_were_cut_off_get_no_end():
    tokenizer = chatml()
    given = rows({"truncated": True}, {"completion": "aaaa"}, **SHORT)
    form = gj.RowForm(max_new_tokens=4)
    rollouts = gj.Rollouts.from_rows(given, tokenizer, form=form)
    ended = [END in completion_of(rollouts, 0, g) for g in range(3)]
    assert ended == [True, False, False]
    form = gj.RowForm(add_end=False)
    rollouts = gj.Rollouts.from_rows(given, tokenizer, form=form)
    assert END not in np.unique(rollouts.completions)


def test_an_empty_text_is_the_end_alone():
    rollouts = gj.Rollouts.from_rows(
        rows(prompt="p", completion=""), chatml(), form="rows"
    )
    assert completion_of(rollouts) == [END]


# The log-probs say how many tokens were sampled: the end was not.
def test_log_probs_of_a_text_tell_whether_it_ended():
    tokenizer = chatml()
    same = dict(prompt="p", completion="ab")
    given = rows({"logprobs": [-1] * 3}, logprobs=[-1] * 2, **same)
    rollouts = gj.Rollouts.from_rows(given, tokenizer)
    assert [len(completion_of(rollouts, 0, g)) for g in (0, 1)] == [2, 3]


def test_bos_comes_before_a_text_where_the_tokenizer_puts_it():
    rollouts = gj.Rollouts.from_rows(rows(prompt="p", completion="c"), llama())
    assert prompt_of(rollouts)[0] == 0
    assert completion_of(rollouts)[-1] == 1  # <|end_of_text|>: no chat


def test_template_chat_makes_a_user_s_turn_of_a_text():
    tokenizer = chatml()
    form = gj.RowForm(template="chat", system="S")
    given = rows(prompt="hi", completion="ho")
    rollouts = gj.Rollouts.from_rows(given, tokenizer, form=form)
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_of(rollouts)) == text


# ---- messages

USER = [{"role": "user", "content": "2+2?"}]
TALK = [
    {"role": "assistant", "content": "sum", "tool_calls": None},
    {"role": "tool", "content": [{"type": "text", "text": "4"}]},
    {"role": "assistant", "content": "It is 4"},
]


def test_of_messages_the_assistant_s_are_sampled_and_the_others_read():
    tokenizer = chatml()
    given = rows(prompt=USER, completion=TALK)
    rollouts = gj.Rollouts.from_rows(given, tokenizer, pad_to=1)
    ids = np.asarray(rollouts.completions)[0, 0]
    mask = np.asarray(rollouts.completion_mask)[0, 0]
    said = tokenizer.decode(ids[mask > 0])
    assert said == "sum<|im_end|>It is 4<|im_end|>"
    whole = tokenizer.decode([*prompt_of(rollouts), *ids])
    talk = [*USER, {"role": "assistant", "content": "sum"}]
    talk += [{"role": "tool", "content": "4"}, TALK[2]]
    printed = tokenizer.apply_chat_template(talk, tokenize=False)
    assert whole == printed.removesuffix("\n")


def test_a_last_message_that_was_cut_off_has_no_end():
    given = rows(prompt=USER, completion=TALK, truncated=True)
    rollouts = gj.Rollouts.from_rows(given, chatml(), pad_to=1)
    assert np.asarray(rollouts.completions)[0, 0][-1] != END
    assert int(rollouts.completion_mask.sum(-1)[0, 0]) == len("sum") + 1 + len(
        "It is 4"
    )


def test_a_template_that_prints_a_head_later_dropped_is_refused():
    form = gj.RowForm(template_arguments={"enable_thinking": False})
    given = rows(prompt=USER, completion=TALK)
    with pytest.raises(ConfigError, match="row 0: the chat template prints"):
        gj.Rollouts.from_rows(given, chatml(THINKING), form=form)


# ---- steps


def test_steps_are_chosen_or_taken_one_by_one(tmp_path):
    given = [ROW | {"step": s, "reward": s + g} for s in (3, 5) for g in (0, 1)]
    with pytest.raises(ConfigError, match=r"2 steps \(3, 5\); choose one with step="):
        gj.Rollouts.from_rows(given, None)
    five = gj.Rollouts.from_rows(given, None, step=5)
    np.testing.assert_array_equal(five.rewards, [[5, 6]])
    with pytest.raises(ConfigError, match="no row is of step 4; there are 3, 5"):
        gj.Rollouts.from_rows(given, None, step=4)
    for source in (given, write_rows(tmp_path / "rows.jsonl", given)):
        steps = dict(gj.Rollouts.by_step(source, None))
        assert list(steps) == [3, 5]
        jax.tree.map(np.testing.assert_array_equal, steps[5], five)


def test_a_directory_is_read_in_the_order_of_its_numbers(tmp_path):
    for step in (10, 2):
        (tmp_path / f"step_{step}").mkdir()
        write_rows(tmp_path / f"step_{step}" / "rows.jsonl", rows())
    assert [step for step, _ in gj.Rollouts.by_step(tmp_path, None)] == [2, 10]
    write_rows(tmp_path / "step_10" / "more.jsonl", rows())
    with pytest.raises(ConfigError, match="step 10 were in an earlier file"):
        list(gj.Rollouts.by_step(tmp_path, None))
    with pytest.raises(ConfigError, match="has no file .parquet"):
        gj.Rollouts.from_parquet(tmp_path, None)


# ---- wrong rows


def changed(**changes):
    """The change of the second row alone."""
    return rows(changes)


def without(field):
    good, bad = rows()
    return [good, {name: x for name, x in bad.items() if name != field}]


WRONG = {
    "no field": (
        without("reward"),
        "field 'reward' is missing; the row has 'prompt', 'completion'",
    ),
    "misspelt": (
        [ROW, {"prompt": [5], "completions": [7], "reward": 1}],
        "field 'completion' is missing; did you mean 'completions'?",
    ),
    "reward": (changed(reward="good"), "'reward': expected a finite number or null"),
    "infinite": (changed(reward=float("inf")), "'reward': expected a finite number"),
    "log-probs": (
        changed(logprobs=[-1.0]),
        "logprobs has 1 entries and the completion 3 tokens; it needs one for each",
    ),
    "nan": (
        [ROW | {"logprobs": [-1] * 3}, ROW | {"logprobs": [-1, float("nan"), -1]}],
        "token 1: logprobs of sampled tokens must be finite and at most 0",
    ),
    "positive": (changed(logprobs=[-1, -1, 0.5]), "token 2: logprobs of sampled"),
    "mask": (changed(mask=[1]), "mask has 1 entries and the completion 3 tokens"),
    "mask of 2": (changed(mask=[1, 2, 1]), "mask must be 0 or 1 everywhere, got 2"),
    "no mask": (changed(mask=[0, 0, 0]), "no token of the completion was sampled"),
    "not a list": (changed(mask=1), "expected a list, got 1"),
    "empty": (changed(completion=[]), "completion must be text, token ids"),
    "empty prompt": (changed(prompt=[]), "prompt must be text, token ids"),
    "floats": (changed(completion=[7.5]), "must be text, token ids (whole numbers)"),
    "negative": (changed(completion=[7, -1]), "token ids at least 0"),
    "text": (changed(completion="text"), "text and messages need a tokenizer"),
    "step": (changed(step=1.5), "field 'step' must be a whole number, got 1.5"),
    "log-probs of some": (
        [ROW | {"logprobs": [-1] * 3}, ROW],
        "logprobs are missing, as in 1 of 2 completions",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("source", ["rows", "file"])
def test_a_wrong_row_is_named(tmp_path, name, source):
    given, message = WRONG[name]
    with pytest.raises(ConfigError) as error:
        if source == "rows":
            gj.Rollouts.from_rows(given, None)
        else:
            text = "".join(json.dumps(row) + "\n" for row in given)
            (tmp_path / "rows.jsonl").write_text(text)
            gj.Rollouts.from_jsonl(tmp_path / "rows.jsonl", None)
    place = "row 1" if source == "rows" else "rows.jsonl, line 2"
    assert place in str(error.value) and message in str(error.value)


OF_TEXT = {
    "outside": (dict(completion=[7, 300]), r"in \[0, 259\).*ids from 7 to 300"),
    "tokens": (
        dict(completion="abc", logprobs=[-1.0]),
        "logprobs has 1 entries.*give the completion as the token ids",
    ),
    "roles": (dict(prompt="p", completion=TALK), "the prompt is text; give both as"),
    "first": (
        dict(prompt=USER, completion=USER),
        "must begin with the assistant's message, got role 'user'",
    ),
    "content": (
        dict(prompt=[{"role": "user", "content": 3}]),
        "the content of a message must be text",
    ),
    "role": (dict(prompt=[{"content": "a"}]), "a message must have role and content"),
    "half": (dict(completion="a\ud800"), "a completion holds half of a surrogate"),
    "empty": (dict(prompt=""), "a prompt must not be empty"),
}


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_wrong_text_is_named(name):
    change, message = OF_TEXT[name]
    with pytest.raises(ConfigError, match=f"row 1.*{message}"):
        gj.Rollouts.from_rows(rows(change, prompt="p", completion="c"), chatml())


def test_lists_of_a_prompt_must_be_as_long():
    row = dict(prompt=[5], completion=[[7], [8]], reward=[1.0])
    with pytest.raises(ConfigError, match="row 0: field 'reward' must be a list of 2"):
        gj.Rollouts.from_rows([row], None)
    row |= dict(reward=[1.0, 0.0], completion=[[7], []])
    with pytest.raises(ConfigError, match="row 0, completion 1: completion must be"):
        gj.Rollouts.from_rows([row], None)


def test_a_group_of_one_is_no_group():
    given = [ROW | {"prompt": [p]} for p in (5, 6, 7)]
    with pytest.raises(ConfigError, match="3 completions of 3 prompts, 3 rewards"):
        gj.Rollouts.from_rows(given, None)
    with pytest.raises(ConfigError, match="2 completions of 1 prompts, 1 rewards"):
        gj.Rollouts.from_rows([ROW, ROW | {"reward": None}], None)
    ids = [ROW | {"group": 0}, ROW | {"group": 0, "prompt": [6]}]
    with pytest.raises(ConfigError, match="row 1: its prompt is not that of row 0"):
        gj.Rollouts.from_rows(ids, None)


def test_a_sum_that_the_advantages_are_no_function_of_brings_a_warning():
    """Advantages of right + .2 form: with equal weights two sums are alike that were
    not, though nothing is in another order."""
    rewards = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
    total = rewards @ [1.0, 0.2]
    advantages = (total - total.mean()) / total.std()
    given = [
        {k: x for k, x in ROW.items() if k != "reward"}
        | {"right": r, "form": f, "advantage": a}
        for (r, f), a in zip(rewards.tolist(), advantages.tolist(), strict=True)
    ]
    form = gj.RowForm(rewards=None)
    with pytest.warns(UserWarning, match="no linear function of the sum"):
        gj.Rollouts.from_rows(given, None, form=form)
    weights = {"right": 1.0, "form": 0.2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gj.Rollouts.from_rows(given, None, form=gj.RowForm(rewards=weights))


def test_rewards_in_another_order_than_the_advantages_bring_a_warning():
    given = [ROW | {"reward": r, "advantage": a} for r, a in [(0, 1), (1, -1), (2, 2)]]
    with pytest.warns(UserWarning, match="row 0: within its group the file's advant"):
        gj.Rollouts.from_rows(given, None)


def test_settings_are_checked():
    for bad, message in (
        (dict(form="trll"), "unknown form of rows 'trll'; did you mean 'trl'"),
        (dict(group_size=1), "group_size must be at least 2, the largest group, got 1"),
        (dict(pad_to=0), "pad_to must be at least 1, got 0"),
        (dict(form=gj.RowForm(mask="loss_mask")), "'loss_mask' is missing; mask is"),
    ):
        with pytest.raises(ConfigError, match=message):
            gj.Rollouts.from_rows(rows(), None, **bad)
    for given, message in (
        ([], "at least one completion, got none"),
        ("rows.jsonl", "got str; a file is read by Rollouts.from_jsonl"),
        ([3], "row 0 must be a Mapping, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            gj.Rollouts.from_rows(given, None)
    for bad, message in (
        (dict(template="cat"), "template must be one of none, .*, auto, got 'cat'"),
        (dict(system="S"), "system needs template chat"),
        (dict(rewards={}), "rewards must be a field or fields with weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            gj.RowForm(**bad)


def test_a_form_is_changed_by_replacing_fields():
    form = dataclasses.replace(gj.ROW_FORMS["verl"], rewards="acc", template="none")
    given = [dict(input="p", output="c", acc=bool(g)) for g in (0, 1)]
    rollouts = gj.Rollouts.from_rows(given, chatml(), form=form)
    np.testing.assert_array_equal(rollouts.rewards, [[0, 1]])
