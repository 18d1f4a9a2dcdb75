"""A sampler that is an OpenAI-compatible server, to which the policy is handed over."""

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import ConfigError, at_least, check_fields, positive, summary
from grpo_jax.models.lora import save_adapter
from grpo_jax.models.policy import Policy
from grpo_jax.models.pretrained import save_pretrained
from grpo_jax.rollouts.completions_api import (
    Completion,
    ServerError,
    UnavailableError,
    completion_request,
    post_json,
    read_completion,
)
from grpo_jax.rollouts.sampling import check_arguments, sample_keys
from grpo_jax.rollouts.types import Rollouts

# Fields of a request that `extra` may not touch, and those it may only leave out.
_FIXED = ("prompt", "max_tokens", "n", "seed", "temperature", "logprobs")
_NEUTRAL = (
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "repeat_penalty",
)  # fmt: skip


class _Job(NamedTuple):
    """One sample to ask for."""

    row: int  # of all P * G
    place: str  # for errors
    prompt: list[int]
    seed: int


@dataclasses.dataclass(eq=False, kw_only=True)
class ServerSampler:
    """Samples from a server with /v1/completions; is called as `gj.sample`.

    One request a sample, in parallel, with a seed that is a function of (key, prompt,
    sample). The server gets token ids, and must return the sampled ids with their
    log-probs: vLLM, SGLang and llama.cpp's server do. A policy whose parameters are
    other arrays than those handed over last is first saved and reloaded. Arrays do not
    change, so the same ones are the same policy: an evaluation and the step after it
    hand over once.

    Attributes:
        url: Of the server, such as "http://127.0.0.1:8000", with or without /v1.
        model: As the server calls it.
        save: Directory to which a policy is exported before it samples.
        reload: Is called as reload(directory) after every export, and returns when the
            server samples from it. None, as is `save`: the server has the policy; a
            second one is refused.
        tokenizer: Saved beside the model.
        dtype: Of the exported files, "float32" or "bfloat16"; None: the policy's own
            (float32, where LoRA's factors are merged).
        adapter: Export LoRA's factors alone, as an adapter of `model`, instead of the
            merged model.
        logprobs: What the server's log-probs are of. "raw": the model's distribution at
            temperature 1 (vLLM, llama.cpp); then the run's temperature must be 1.
            "at_temperature": the one that it samples from (SGLang; vLLM with
            --logprobs-mode processed_logprobs).
        concurrency: Requests at a time.
        timeout_s: Seconds without an answer after which a request has failed.
        retries: Further tries of a request whose failure may pass, the first one after
            `retry_wait_s` seconds, each next one after twice as long.
        headers: Of each request, such as {"Authorization": f"Bearer {KEY}"}.
        extra: Fields of each request, in place of its own; None leaves out a field that
            the server does not know.

    Raises:
        ConfigError: a setting is outside its range, or does not go with another one.
    """

    url: str = dataclasses.field(kw_only=False)
    model: str = dataclasses.field(kw_only=False)
    save: str | os.PathLike[str] | None = None
    reload: Callable[[Path], object] | None = None
    tokenizer: Any = None
    dtype: str | None = None
    adapter: bool = False
    logprobs: Literal["raw", "at_temperature"] = "raw"
    concurrency: Annotated[int, at_least(1)] = 64
    timeout_s: Annotated[float, positive()] = 600.0
    retries: Annotated[int, at_least(0)] = 3
    retry_wait_s: Annotated[float, positive()] = 1.0
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, error=ConfigError)
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"url must begin with http:// or https:// and name a host, got "
                f"{self.url!r}; for example http://127.0.0.1:8000."
            )
        if (self.save is None) != (self.reload is None):
            raise ConfigError(
                "save and reload must be given together: the directory that a policy "
                "is exported to, and a function of it that makes the server load it."
            )
        for name, value in self.extra.items():
            if name in _FIXED or (name in _NEUTRAL and value is not None):
                raise ConfigError(
                    f"extra must leave {name} as it is, got {value!r}: samples would "
                    "be drawn from another distribution, or be others than asked for."
                )
        # No fields: a run records what a sampler is, not what it did.
        self._served: list[weakref.ref] | None = None
        self._lock = threading.Lock()

    def __call__(
        self,
        policy: Policy,
        prompt_ids: jax.Array | np.ndarray,
        prompt_mask: jax.Array | np.ndarray,
        *,
        group_size: int,
        max_new_tokens: int,
        key: jax.Array,
        temperature: float | jax.Array = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | Sequence[int] | jax.Array,
        pad_id: int,
        prompt_indices: jax.Array | np.ndarray | None = None,
        active: jax.Array | np.ndarray | None = None,
    ) -> Rollouts:
        """Samples a group of completions for every prompt; arguments as `gj.sample`.

        Args:
            policy: Handed over first, unless the server has it.
            prompt_ids: [P, L] int32, padded on either side.
            prompt_mask: [P, L], 1 on tokens; every row holds at least one.
            group_size: G, completions per prompt.
            max_new_tokens: T.
            key: Of which the seeds of the samples are a function.
            temperature: 1, where the server's log-probs are raw.
            top_k, top_p: None.
            eos_id: Ends a completion, and is its last token; or several ids that do.
            pad_id: Fills completions after their end.
            prompt_indices: [P] naming the prompts for the seeds; default 0..P-1.
            active: [P] bool, False for prompts that are not asked for, whose
                completions get no token; default all.

        Returns:
            `Rollouts` [P, G, T] without rewards, with the server's log-probs.

        Raises:
            ValueError: shapes do not fit, or an argument is outside its range.
            ServerError: the policy could not be handed over, or a request failed after
                all its tries; the prompt and sample are named.
        """
        ids, mask = np.asarray(prompt_ids), np.asarray(prompt_mask)
        indices, active = check_arguments(
            policy,
            ids,
            mask,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_id=eos_id,
            pad_id=pad_id,
            prompt_indices=prompt_indices,
            active=active,
        )
        temperature = float(temperature)
        self._check_distribution(temperature, top_k, top_p)
        ends = [int(x) for x in np.atleast_1d(np.asarray(eos_id)) if x >= 0]
        jobs = _jobs(ids, mask, np.asarray(indices), group_size, key)
        jobs = [job for job in jobs if active[job.row // group_size]]

        def ask(job: _Job, stop: threading.Event) -> Completion:
            body = completion_request(
                self.model,
                job.prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=job.seed,
                ends=ends,
            )
            return self._ask(job, body, stop, ends, policy.config.vocab_size)

        completions = []
        if jobs:
            with self._lock:
                self._hand_over(policy, ends)
                completions = _in_parallel(ask, jobs, self.concurrency)
        shape = len(ids), group_size, max_new_tokens
        rows = [job.row for job in jobs]
        tokens, sampled, logprobs = _padded(completions, rows, shape, pad_id)
        ids, mask = (jnp.asarray(x, jnp.int32) for x in (ids, mask))
        return Rollouts(
            ids, mask, jnp.asarray(tokens), jnp.asarray(sampled), jnp.asarray(logprobs)
        )

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers to a POST of JSON, for a `reload`; None if empty.

        Args:
            path: Below the server's root, such as "/update_weights_from_disk".
            body: Sent as JSON, with the sampler's headers.

        Raises:
            ServerError: the server cannot be reached, answers with an HTTP error, or
                with something that is no JSON.
        """
        root = self.url.rstrip("/").removesuffix("/v1")
        return post_json(
            root + path, body, headers=self.headers, timeout_s=self.timeout_s
        )

    def _check_distribution(
        self, temperature: float, top_k: int | None, top_p: float | None
    ) -> None:
        """ValueError where the server's log-probs are not of what it samples from."""
        if jax.process_count() > 1:
            raise ValueError(
                f"a ServerSampler needs a run of one process, got "
                f"{jax.process_count()}: each would ask for the samples again."
            )
        if top_k is not None or top_p is not None:
            raise ValueError(
                "top_k and top_p must be None with a ServerSampler: servers report "
                "log-probs of the distribution that is not truncated."
            )
        if self.logprobs == "raw" and temperature != 1:
            raise ValueError(
                f"temperature must be 1 with raw log-probs, got {temperature:g}: they "
                "are those of temperature 1, whatever the server samples at. Set "
                "sampling.temperature to 1, or use a server whose log-probs are those "
                "of the temperature (SGLang; vLLM with --logprobs-mode "
                "processed_logprobs) and logprobs='at_temperature'."
            )

    def _hand_over(self, policy: Policy, ends: Sequence[int]) -> None:
        """Makes the server sample from the policy, unless it has it already."""
        leaves = jax.tree.leaves((policy.params, policy.frozen))
        if not all(isinstance(x, jax.Array) for x in leaves):
            raise ValueError(
                "the policy's parameters must be jax arrays: others can change in "
                "place, unseen; jax.tree.map(jnp.asarray, policy.params) makes them so."
            )
        served = self._served
        if served is not None and len(served) == len(leaves):
            pairs = zip(served, leaves, strict=True)
            if all(reference() is x for reference, x in pairs):
                return
        if self.save is not None and self.reload is not None:
            self._served = None  # whatever fails from here on, it is handed over again
            directory = Path(self.save).expanduser().resolve()
            self._export(policy, directory, ends)
            try:
                self.reload(directory)
            except Exception as error:
                raise ServerError(
                    f"reload({str(directory)!r}) failed: {summary(error)}; the policy "
                    "is saved there, and the server may have another one."
                ) from error
        elif served is not None:
            raise ServerError(
                "the policy is another one than before, and the server has not got it: "
                "give the sampler save, a directory, and reload, a function of it that "
                "makes the server load it."
            )
        self._served = [weakref.ref(x) for x in leaves]

    def _export(self, policy: Policy, directory: Path, ends: Sequence[int]) -> None:
        if self.adapter:
            save_adapter(policy.params, policy.config, directory, base=self.model)
            return
        save_pretrained(
            policy, directory, tokenizer=self.tokenizer, eos_ids=ends, dtype=self.dtype
        )

    def _ask(
        self,
        job: _Job,
        body: Mapping[str, Any],
        stop: threading.Event,
        ends: Sequence[int],
        vocab_size: int,
    ) -> Completion:
        """One sample, after as many tries as it takes; no more once `stop` is set."""
        fields = {k: x for k, x in {**body, **self.extra}.items() if x is not None}

        def ask_once() -> Completion:
            return read_completion(
                self.post("/v1/completions", fields),
                prompt_tokens=len(job.prompt),
                max_new_tokens=body["max_tokens"],
                ends=ends,
                vocab_size=vocab_size,
            )

        try:
            for attempt in range(self.retries):
                try:
                    return ask_once()
                except UnavailableError:
                    if stop.wait(self.retry_wait_s * 2**attempt):
                        raise
            return ask_once()
        except ServerError as error:
            passing = isinstance(error, UnavailableError)
            tried = f" (tried {self.retries + 1} times)" if passing else ""
            raise ServerError(f"{job.place}: {error}{tried}.") from error


def _jobs(
    ids: np.ndarray,  # [P, L]
    mask: np.ndarray,  # [P, L]
    indices: np.ndarray,  # [P]
    group_size: int,
    key: jax.Array,
) -> list[_Job]:
    """P * G samples to ask for, prompt by prompt."""
    keys = sample_keys(key, jnp.asarray(indices, jnp.int32), group_size)  # [P, G]
    bits = jax.vmap(jax.vmap(lambda k: jax.random.bits(k, dtype=jnp.uint32)))(keys)
    seeds = np.asarray(bits) >> 1  # servers take signed seeds
    return [
        _Job(
            p * group_size + g,
            f"prompt {p} (index {i}), sample {g}",
            row[held > 0].tolist(),
            int(seed),
        )
        for p, (row, held, i) in enumerate(zip(ids, mask, indices, strict=True))
        for g, seed in enumerate(seeds[p])
    ]


def _in_parallel(
    ask: Callable[[_Job, threading.Event], Completion],
    jobs: Sequence[_Job],
    concurrency: int,
) -> list[Completion]:
    """A completion of each job; the first failure ends them all."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(min(concurrency, len(jobs)))
    futures: list[Future[Completion]] = [pool.submit(ask, job, stop) for job in jobs]
    try:
        done = wait(futures, return_when=FIRST_EXCEPTION).done
        return [future.result() for future in futures if future in done]
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _padded(
    completions: Sequence[Completion],
    rows: Sequence[int],
    shape: tuple[int, int, int],
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, mask, log-probs), each [P, G, T], of completions at rows of P * G."""
    p, g, t = shape
    tokens = np.full((p * g, t), pad_id, np.int32)
    mask = np.zeros((p * g, t), np.int32)
    logprobs = np.zeros((p * g, t), np.float32)
    for row, completion in zip(rows, completions, strict=True):
        n = len(completion.tokens)
        tokens[row, :n], mask[row, :n] = completion.tokens, 1
        logprobs[row, :n] = completion.logprobs
    return tokens.reshape(shape), mask.reshape(shape), logprobs.reshape(shape)
