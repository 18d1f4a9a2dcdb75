"""A sampler that is a server: what is asked, what is read, what is refused."""

import dataclasses
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax.errors import ConfigError
from grpo_jax.rollouts.checks import check_sampled
from grpo_jax.rollouts.completions_api import ServerError
from grpo_jax.user_code import digest
from tests.completion_server import CompletionServer
from tests.helpers import TINY

END, PAD = 3, 0
POLICY = gj.init_policy(TINY, jax.random.key(0))
IDS = np.array([[0, 5, 6], [7, 8, 9], [4, 0, 0]])
MASK = np.array([[0, 1, 1], [1, 1, 1], [1, 0, 0]])
HOW = dict(group_size=2, max_new_tokens=6, key=jax.random.key(1), eos_id=END, pad_id=0)


def sampler_of(server, **changes):
    changes = dict(retries=0, retry_wait_s=0.01, concurrency=4) | changes
    return gj.ServerSampler(server.url, "tiny", **changes)


def sampled(sampler, policy=POLICY, **changes):
    return sampler(policy, IDS, MASK, **(HOW | changes))


@pytest.fixture(scope="module")
def expected():
    """What a server that does nothing wrong gives."""
    with CompletionServer(POLICY) as server:
        return sampled(sampler_of(server))


def test_rollouts_are_those_of_the_policy(expected):
    check_sampled(expected, IDS, group_size=2, max_new_tokens=6, vocab_size=19)
    own = gj.completion_logprobs(POLICY, expected)
    np.testing.assert_allclose(expected.behaviour_logprobs, own, atol=1e-5)
    np.testing.assert_array_equal(expected.prompts, IDS)
    np.testing.assert_array_equal(expected.prompt_mask, MASK)
    tokens, mask = (
        np.asarray(expected.completions),
        np.asarray(expected.completion_mask),
    )
    lengths = mask.sum(-1)
    assert lengths.min() < 6  # one ended
    for row, n in zip(tokens.reshape(6, 6), lengths.reshape(6), strict=True):
        assert END not in row[: n - 1] and (row[n - 1] == END or n == 6)
        assert (row[n:] == PAD).all()
    np.testing.assert_array_equal(mask, np.arange(6) < lengths[..., None])


@pytest.mark.parametrize("form", ["content", "spelled"])
def test_every_form_of_token_ids_is_read(expected, form):
    with CompletionServer(POLICY, form=form) as server:
        chex.assert_trees_all_equal(sampled(sampler_of(server)), expected)


def test_tokens_after_an_end_that_the_server_does_not_know_are_cut(expected):
    with CompletionServer(POLICY, stops=False) as server:
        chex.assert_trees_all_equal(sampled(sampler_of(server)), expected)


def test_a_sample_is_a_function_of_key_prompt_and_sample(expected):
    with CompletionServer(POLICY) as server:
        sampler = sampler_of(server, concurrency=1)
        recorded = digest(sampler)
        again = sampled(sampler)
        chex.assert_trees_all_equal(again, expected)
        assert digest(sampler) == recorded  # of what it is, not of what it did
        seeds = [body["seed"] for body, _ in server.requests]
        assert len({*seeds}) == 6 and all(0 <= x < 2**31 for x in seeds)
        order = np.array([2, 0])
        part = sampler(POLICY, IDS[order], MASK[order], **HOW, prompt_indices=order)
        fields = ("completions", "completion_mask", "behaviour_logprobs")
        for name in fields:
            whole = np.asarray(getattr(expected, name))
            np.testing.assert_array_equal(getattr(part, name), whole[order])
        other = sampled(sampler, key=jax.random.key(2))
        assert (np.asarray(other.completions) != expected.completions).any()


def test_prompts_that_are_not_active_are_not_asked_for(expected):
    with CompletionServer(POLICY) as server:
        sampler = sampler_of(server)
        some = sampled(sampler, active=np.array([True, False, True]))
        assert len(server.requests) == 4
        for name in ("completions", "completion_mask", "behaviour_logprobs"):
            whole, part = np.asarray(getattr(expected, name)), getattr(some, name)
            np.testing.assert_array_equal(part[::2], whole[::2])
            assert (np.asarray(part)[1] == 0).all()  # PAD too
        none = sampled(sampler, active=[False] * 3)
        assert len(server.requests) == 4 and not none.completion_mask.any()


def test_the_request_asks_for_the_full_distribution():
    with CompletionServer(POLICY) as server:
        extra = {"min_p": None, "priority": 2}
        sampler = sampler_of(
            server, extra=extra, headers={"Authorization": "Bearer key"}
        )
        sampled(sampler, eos_id=[END, 5], group_size=1)
        body, headers = server.requests[0]
    assert sorted(body["prompt"] for body, _ in server.requests) == [
        [4], [5, 6], [7, 8, 9],
    ]  # fmt: skip
    wanted = dict(
        model="tiny", n=1, max_tokens=6, temperature=1.0, top_p=1.0, top_k=-1,
        stop_token_ids=[END, 5], return_token_ids=True, priority=2,
    )  # fmt: skip
    assert wanted.items() <= body.items() and body["logprobs"] >= 1
    assert "min_p" not in body
    assert headers["Authorization"] == "Bearer key"
    assert "key" not in repr(sampler)


def test_log_probs_are_those_of_the_temperature_or_refused():
    with CompletionServer(POLICY, raw=True) as server:
        with pytest.raises(ValueError, match="temperature must be 1 with raw.*got 0.7"):
            sampled(sampler_of(server), temperature=0.7)
        assert not server.requests
    with CompletionServer(POLICY) as server:
        sampler = sampler_of(server, logprobs="at_temperature")
        rollouts = sampled(sampler, temperature=0.7)
        own = gj.completion_logprobs(POLICY, rollouts, temperature=0.7)
        np.testing.assert_allclose(rollouts.behaviour_logprobs, own, atol=1e-5)
        for cut in (dict(top_k=3), dict(top_p=0.9)):
            with pytest.raises(ValueError, match="top_k and top_p must be None"):
                sampled(sampler, **cut)


# ---- the policy handed over


def test_a_policy_is_handed_over_once_and_another_one_again(tmp_path):
    with CompletionServer() as server:
        sampler = sampler_of(server, save=tmp_path / "served", reload=server.load)
        first = sampled(sampler)
        assert server.loaded == [tmp_path / "served"]
        sampled(sampler, POLICY.replace(dict(POLICY.params)))  # the same arrays
        assert len(server.loaded) == 1
        halved = POLICY.replace(jax.tree.map(lambda x: x / 2, POLICY.params))
        second = sampled(sampler, halved)
        assert len(server.loaded) == 2
        chex.assert_trees_all_equal(server.policy.params, halved.params)
        own = gj.completion_logprobs(halved, second)
        np.testing.assert_allclose(second.behaviour_logprobs, own, atol=1e-5)
        chex.assert_trees_all_equal(sampled(sampler), first)  # the first one again
        assert len(server.loaded) == 3


def test_a_policy_at_the_place_of_a_freed_one_is_handed_over(tmp_path):
    """Donated arrays are gone; new ones at their addresses are others."""
    with CompletionServer() as server:
        sampler = sampler_of(server, save=tmp_path, reload=server.load)
        update = jax.jit(lambda x: jax.tree.map(lambda y: y * 2, x), donate_argnums=0)
        params = jax.tree.map(jnp.copy, POLICY.params)
        for count in (1, 2, 3):
            sampled(sampler, POLICY.replace(params))
            assert len(server.loaded) == count
            params = update(params)


def test_lora_is_merged_or_an_adapter(tmp_path):
    policy = gj.add_lora(POLICY, rank=2, alpha=4.0, key=jax.random.key(3))
    params = jax.tree.map(lambda x: x + 0.1, policy.params)
    policy = policy.replace(params)
    with CompletionServer() as server:
        sampler = sampler_of(server, save=tmp_path / "merged", reload=server.load)
        rollouts = sampled(sampler, policy)
        own = gj.completion_logprobs(policy, rollouts)
        np.testing.assert_allclose(rollouts.behaviour_logprobs, own, atol=1e-5)

    def reload(directory):
        names = {file.name for file in directory.iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors"}
        gj.save_pretrained(POLICY, tmp_path / "base")

    with CompletionServer(policy) as server:
        sampler = sampler_of(
            server, save=tmp_path / "adapter", reload=reload, adapter=True
        )
        sampled(sampler, policy)
        with pytest.raises(ConfigError, match="no LoRA factors"):
            sampled(sampler, POLICY)


def test_a_failed_reload_is_an_error_and_is_made_again(tmp_path):
    calls = []

    def reload(directory):
        calls.append(directory)
        if len(calls) == 1:
            raise OSError("no route")

    with CompletionServer(POLICY) as server:
        sampler = sampler_of(server, save=tmp_path, reload=reload)
        with pytest.raises(ServerError, match="reload.*failed: OSError: no route"):
            sampled(sampler)
        assert not server.requests
        sampled(sampler)
    assert len(calls) == 2


def test_a_reload_may_post_to_the_server(tmp_path):
    def reload(directory):
        body = {"model_path": str(directory)}
        assert sampler.post("/update_weights_from_disk", body) == {"success": True}
        assert sampler.post("/reset_prefix_cache", {}) is None
        sampler.post("/nowhere", {})

    with CompletionServer() as server:
        sampler = sampler_of(server, save=tmp_path, reload=reload)
        with pytest.raises(ServerError, match="reload.*failed: ServerError: HTTP 404"):
            sampled(sampler)
        assert server.loaded == [tmp_path]


def test_without_save_a_second_policy_is_refused():
    with CompletionServer(POLICY) as server:
        sampler = sampler_of(server)
        sampled(sampler)
        with pytest.raises(ServerError, match="another one than before.*give.*save"):
            sampled(
                sampler, POLICY.replace(jax.tree.map(lambda x: 2 * x, POLICY.params))
            )
        host = POLICY.replace(jax.tree.map(np.asarray, POLICY.params))
        with pytest.raises(ValueError, match="must be jax arrays"):
            sampled(sampler, host)


# ---- what a server may get wrong


def choice_with(**changes):
    def spoil(answer):
        return answer | {"choices": [answer["choices"][0] | changes]}

    return spoil


def logprobs_with(change):
    def spoil(answer):
        values = answer["choices"][0]["logprobs"]["token_logprobs"]
        return choice_with(logprobs={"token_logprobs": change(values)})(answer)

    return spoil


def cut(reason):
    return choice_with(
        token_ids=[5, 6], finish_reason=reason, logprobs={"token_logprobs": [-1, -1]}
    )


WRONG = {
    "not_json": (lambda x: b"<html>", "no JSON: b'<html>'"),
    "empty": (lambda x: b"", "no list of choices: null"),
    "a_list": (lambda x: [x], "no list of choices"),
    "an_error": (lambda x: {"error": "full"}, 'no list of choices: {"error": "full"}'),
    "no_choice": (lambda x: x | {"choices": []}, "1 completion was asked for, got 0"),
    "two": (lambda x: x | {"choices": x["choices"] * 2}, "asked for, got 2"),
    "no_ids": (
        lambda x: choice_with(token_ids=None, logprobs={"tokens": ["a", "b"]})(x),
        "no token ids.*use vLLM",
    ),
    "no_logprobs": (choice_with(logprobs=None), "no log-probs"),
    "logprobs_of_another_kind": (choice_with(logprobs=[1.0]), "no log-probs"),
    "nan": (logprobs_with(lambda x: [float("nan"), *x[1:]]), "a log-prob is nan"),
    "infinite": (logprobs_with(lambda x: [-float("inf"), *x[1:]]), "log-prob is -inf"),
    "null": (logprobs_with(lambda x: [None, *x[1:]]), "a log-prob is None"),
    "probabilities": (logprobs_with(lambda x: [0.4, *x[1:]]), "a log-prob is 0.4"),
    "fewer": (logprobs_with(lambda x: x[1:]), "tokens came with"),
    "outside": (
        choice_with(token_ids=[19], logprobs={"token_logprobs": [-1.0]}),
        r"19 is no token id in \[0, 19\)",
    ),
    "text": (
        choice_with(token_ids=["5"], logprobs={"token_logprobs": [-1.0]}),
        "'5' is no token id",
    ),
    "another_end": (cut("stop"), r"after 2 of 6 tokens at token 6, .*ends \[3\]"),
    "too_long": (cut("length"), "after 2 of 6 tokens, at its own limit"),
    "aborted": (cut("abort"), "finish_reason 'abort'"),
    "longer_prompt": (
        lambda x: x | {"usage": {"prompt_tokens": 4}},
        "read a prompt of 4 tokens, and 3 were sent",
    ),
    "no_model": (lambda x: 404, "HTTP 404 of .*boom"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_refused_and_its_prompt_named(spoil, message):
    def one(body, answer):
        return spoil(answer) if body["prompt"] == [7, 8, 9] else answer

    with CompletionServer(POLICY, spoil=one) as server:
        sampler = sampler_of(server, concurrency=1, retries=2)
        indices = np.array([9, 11, 13])
        with pytest.raises(ServerError, match=message) as caught:
            sampled(sampler, group_size=1, prompt_indices=indices)
        # Asked once: no other answer is to be expected.
        assert [x["prompt"] for x, _ in server.requests].count([7, 8, 9]) == 1
    assert str(caught.value).startswith("prompt 1 (index 11), sample 0: ")
    assert str(caught.value).endswith(".") and not str(caught.value).endswith("..")


def test_a_failure_that_passes_changes_nothing(expected):
    failed, lock = set(), threading.Lock()

    def busy(body, answer):
        with lock:
            first = body["seed"] not in failed
            failed.add(body["seed"])
        return 503 if first else answer

    with CompletionServer(POLICY, spoil=busy) as server:
        chex.assert_trees_all_equal(sampled(sampler_of(server, retries=1)), expected)
        assert len(server.requests) == 12


def test_a_failure_that_stays_ends_after_the_last_try():
    with CompletionServer(POLICY, spoil=lambda body, answer: 500) as server:
        sampler = sampler_of(server, retries=2, concurrency=1)
        with pytest.raises(ServerError, match=r"sample 0: HTTP 500.*\(tried 3 times\)"):
            sampled(sampler)
        assert len(server.requests) <= 4  # the next one may be on its way


def test_a_silent_server_is_given_up():
    def slow(body, answer):
        time.sleep(1.0)
        return answer

    with CompletionServer(POLICY) as server:
        sampled(sampler_of(server))  # compiled
        server.spoil = slow
        sampler = sampler_of(server, timeout_s=0.3)
        with pytest.raises(ServerError, match=r"prompt \d .*silent for 0.3 s"):
            sampled(sampler)


def test_a_server_that_is_down_is_named():
    with CompletionServer(POLICY) as server:
        sampler = sampler_of(server)
    with pytest.raises(ServerError, match=r"prompt 0 .*/v1/completions cannot be reac"):
        sampled(sampler)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(url="127.0.0.1:8000"), "url must begin with http://"),
        (dict(save="here"), "save and reload must be given together"),
        (dict(reload=print), "save and reload must be given together"),
        (dict(concurrency=0), "concurrency must be at least 1"),
        (dict(timeout_s=0), "timeout_s must be positive"),
        (dict(retries=-1), "retries must be at least 0"),
        (dict(logprobs="processed"), "logprobs must be one of raw, at_temperature"),
        (dict(extra={"seed": 1}), "extra must leave seed as it is"),
        (dict(extra={"top_p": 0.9}), "extra must leave top_p as it is"),
    ],
)
def test_settings_are_checked(changes, message):
    settings = dict(url="http://127.0.0.1:1", model="tiny") | changes
    with pytest.raises(ConfigError, match=message):
        gj.ServerSampler(**settings)


def test_arguments_are_checked_as_those_of_sample():
    sampler = gj.ServerSampler("http://127.0.0.1:1/v1/", "tiny")
    assert dataclasses.replace(sampler, model="other").model == "other"
    for wrong in (
        dict(group_size=0),
        dict(pad_id=19),
        dict(prompt_indices=[1]),
        dict(active=[1]),
    ):
        messages = []
        for function in (sampler, gj.sample):
            with pytest.raises(ValueError) as caught:
                function(POLICY, IDS, MASK, **(HOW | wrong))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
