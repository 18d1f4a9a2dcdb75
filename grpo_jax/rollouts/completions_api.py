"""One completion of an OpenAI-compatible server: the request, and its answer read.

Prompts go as token ids, and sampled tokens come back as token ids: text would be
encoded again, into other tokens than were sampled. Servers name the ids in three ways,
and all are read: `token_ids` of the choice (vLLM, SGLang), `id` of each entry of its
log-probs (llama.cpp), and tokens spelled "token_id:7" (vLLM before `token_ids`).
"""

import http.client
import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_jax.errors import summary

_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP errors worth another try
_SPELLED_ID = re.compile(r"token_id:(\d+)")
_SHOWN = 300  # characters of an answer in an error
_ROUNDING = 0.01  # nats by which a log-prob may be above 0


class ServerError(RuntimeError):
    """The server gave no sample that can be used; the message says what to do."""


class UnavailableError(ServerError):
    """The server did not answer, or not now: another try may succeed."""


class Completion(NamedTuple):
    """One sampled completion, its end included."""

    tokens: list[int]
    logprobs: list[float]  # of the tokens, as the server reports them


def completion_request(
    model: str,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    ends: Sequence[int],
) -> dict[str, Any]:
    """The body of a request for one completion, drawn from the full distribution.

    What a server or the model's generation_config.json would cut or penalise by
    default (llama.cpp: top_k 40, top_p .95, min_p .05) is switched off by name: none of
    it shows in the log-probs.

    Args:
        model: As the server calls it.
        prompt: Token ids.
        max_new_tokens: T.
        temperature: Of sampling.
        seed: In [0, 2**31).
        ends: Tokens that end a completion.
    """
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_new_tokens,
        "n": 1,
        "seed": seed,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,  # off in vLLM, SGLang and llama.cpp alike; SGLang refuses 0
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,  # vLLM, SGLang
        "repeat_penalty": 1.0,  # llama.cpp
        "stop_token_ids": list(ends),
        "logprobs": 1,  # 0 would be none at all in llama.cpp
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def post_json(
    url: str, body: Mapping[str, Any], *, headers: Mapping[str, str], timeout_s: float
) -> Any:
    """The JSON that a server answers to a POST; None for an empty answer.

    Raises:
        UnavailableError: it cannot be reached, is silent for `timeout_s` seconds, or
            answers with an HTTP error that may pass.
        ServerError: another HTTP error, or the answer is no JSON.
    """
    headers = {"Content-Type": "application/json"} | dict(headers)
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        kind = UnavailableError if error.code in _PASSING else ServerError
        raise kind(f"HTTP {error.code} of {url}: {_text_of(error)}") from error
    except TimeoutError as error:
        raise UnavailableError(_silent(url, timeout_s)) from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise UnavailableError(_silent(url, timeout_s)) from error
        raise UnavailableError(
            f"{url} cannot be reached ({summary(error)}); is the server running there?"
        ) from error
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServerError(
            f"{url} answered with something that is no JSON: {text[:_SHOWN]!r}; is it "
            "an OpenAI-compatible server's address?"
        ) from error


def _text_of(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with an HTTP error."""
    try:
        with error:
            return error.read(_SHOWN).decode(errors="replace") or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _silent(url: str, timeout_s: float) -> str:
    return (
        f"{url} was silent for {timeout_s:g} s; raise timeout_s, or lower concurrency: "
        "requests that wait in the server's queue count too"
    )


def read_completion(
    answer: Any,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    ends: Sequence[int],
    vocab_size: int,
) -> Completion:
    """The completion in a server's answer, cut after its first end.

    Tokens after an end that the server does not stop at are dropped: those before them
    were sampled without them.

    Args:
        answer: JSON.
        prompt_tokens: Of the prompt that was sent.
        max_new_tokens: T.
        ends: Tokens that end a completion.
        vocab_size: V; token ids are below it.

    Raises:
        ServerError: it is no completion, has no token ids or log-probs, or ends early.
    """
    choice = _choice(answer)
    read = _mapping(answer.get("usage")).get("prompt_tokens", prompt_tokens)
    if read != prompt_tokens:
        raise ServerError(
            f"the server read a prompt of {read} tokens, and {prompt_tokens} were "
            "sent; it must neither add nor cut any: look at its limits of length"
        )
    tokens, logprobs = _tokens(choice), _logprobs(choice)
    if len(tokens) != len(logprobs):
        raise ServerError(
            f"{len(tokens)} tokens came with {len(logprobs)} log-probs, and each token "
            "needs one, the end included"
        )
    for x in tokens:
        if type(x) is not int or not 0 <= x < vocab_size:
            raise ServerError(
                f"{x!r} is no token id in [0, {vocab_size}), the model's vocabulary; "
                "is the server's model the policy that is trained?"
            )
    for x in logprobs:
        if type(x) not in (int, float) or not math.isfinite(x) or x > _ROUNDING:
            raise ServerError(
                f"a log-prob is {x!r}; each must be a finite number of nats, 0 at most"
            )
    last = next((i for i, x in enumerate(tokens) if x in ends), None)
    if last is None and len(tokens) < max_new_tokens:
        raise ServerError(_early(choice, tokens, max_new_tokens, ends))
    kept = max_new_tokens if last is None else min(last + 1, max_new_tokens)
    return Completion(tokens[:kept], [float(x) for x in logprobs[:kept]])


def _choice(answer: Any) -> dict[str, Any]:
    """The one choice of an answer."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise ServerError(
            f"the answer has no list of choices: {json.dumps(answer)[:_SHOWN]}; is url "
            "that of /v1, of a server with /v1/completions?"
        )
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise ServerError(f"1 completion was asked for, got {len(choices)}")
    return choices[0]


def _tokens(choice: Mapping[str, Any]) -> list[Any]:
    if isinstance(choice.get("token_ids"), list):
        return choice["token_ids"]
    entries = _entries(choice)
    if entries and all("id" in x for x in entries):
        return [x["id"] for x in entries]
    names = _mapping(choice.get("logprobs")).get("tokens")
    if isinstance(names, list) and names:
        ids = [_SPELLED_ID.fullmatch(str(x)) for x in names]
        if None not in ids:
            return [int(x[1]) for x in ids if x]
    raise ServerError(
        "the answer has no token ids: neither token_ids, nor logprobs.content[].id, "
        'nor tokens spelled "token_id:7". Text alone would be encoded again, into '
        "other tokens than were sampled; use vLLM, SGLang or llama.cpp's server"
    )


def _logprobs(choice: Mapping[str, Any]) -> list[Any]:
    values = _mapping(choice.get("logprobs")).get("token_logprobs")
    if isinstance(values, list):
        return values
    entries = _entries(choice)
    if entries:
        return [x.get("logprob") for x in entries]
    raise ServerError(
        "the answer has no log-probs: neither logprobs.token_logprobs nor "
        "logprobs.content[].logprob; use a server whose /v1/completions has them"
    )


def _mapping(value: Any) -> dict[str, Any]:
    """The JSON object, or an empty one in place of something else."""
    return value if isinstance(value, dict) else {}


def _entries(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry a token, as llama.cpp has them; [] for other forms."""
    entries = _mapping(choice.get("logprobs")).get("content")
    return [_mapping(x) for x in entries] if isinstance(entries, list) else []


def _early(
    choice: Mapping[str, Any],
    tokens: Sequence[int],
    max_new_tokens: int,
    ends: Sequence[int],
) -> str:
    """What is wrong with a completion that has no end and is too short."""
    reason, count = choice.get("finish_reason"), len(tokens)
    text = f"the server stopped after {count} of {max_new_tokens} tokens"
    if reason == "length":
        return f"{text}, at its own limit of length; raise its context length"
    if reason == "stop":
        last = f"at token {tokens[-1]}" if tokens else "without a token"
        return (
            f"{text} {last}, which is none of the task's ends {list(ends)}; the served "
            "model's config must name these ends as its own (an export with tokenizer "
            "does), or the server be told to ignore its own: with vLLM, "
            "extra={'ignore_eos': True}"
        )
    return f"{text}, with finish_reason {reason!r}"
