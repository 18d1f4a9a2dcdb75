"""Sampling: one prefill per prompt, one compiled loop for all completions.

The loop is one `while_loop` per cache length (32, 64, 128, ... tokens), so that early
tokens attend over a short cache; each ends as soon as every completion has ended.

A token's randomness is a function of (key, prompt, sample, token) alone. So a sample
depends on the rest of its batch only through rounding: products of other shapes may be
added up in another order. In float32 that moves logits by 1e-6, and hardly any draw is
so close to the edge between two tokens. In bfloat16 it moves them by 1e-2, and with the
number of prompts or samples in a batch some completions become others: a few in a
thousand where most tokens are certain, most where many tokens are equally likely.
Batches of one shape give one result in both.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.forward import PromptSplit, check_token_ids, split_prompts
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.token_weights import is_eos
from grpo_jax.parallel.sharding import constrain
from grpo_jax.rollouts.decoding import Caches, prefill, write
from grpo_jax.rollouts.draw import draw_tokens
from grpo_jax.rollouts.types import Rollouts

_FIRST_CACHE = 32  # tokens; each next cache is twice as long


def sample(
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
    """Samples a group of completions for every prompt.

    Args:
        policy: What to sample from.
        prompt_ids: [P, L] int32, padded on either side.
        prompt_mask: [P, L], 1 on tokens; every row holds at least one.
        group_size: G, completions per prompt.
        max_new_tokens: T; a completion without EOS by then is cut there.
        key: One per step, typed: `fold_in(run_key, step)`.
        temperature: Positive; part of the policy, also where log-probs are recomputed.
        top_k, top_p: Truncation of the distribution (evaluation); the log-probs
            returned are those of the truncated, renormalised distribution.
        eos_id: Ends a completion, and is its last token; or several ids that do.
        pad_id: Fills completions after their end.
        prompt_indices: [P] int32 naming the prompts for the randomness, so that a
            prompt gets the same random numbers in any batch; default 0..P-1.
        active: [P] bool, False for prompts whose completions get no token, as of a
            dialogue that is over: shapes stay, and nothing waits for it; default all.

    Returns:
        `Rollouts` without rewards.

    Raises:
        ValueError: shapes do not fit, or an argument is outside its range.
    """
    prompt_indices, active = check_arguments(
        policy,
        prompt_ids,
        prompt_mask,
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
    return _sample(
        policy,
        jnp.asarray(prompt_ids, jnp.int32),
        jnp.asarray(prompt_mask, jnp.int32),
        jnp.asarray(prompt_indices, jnp.int32),
        jnp.asarray(active, bool),
        key,
        jnp.asarray(temperature, jnp.float32),
        jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32)),
        jnp.asarray(pad_id, jnp.int32),
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        top_p=top_p,
    )


def lower_sample(
    policy: Policy,
    prompts: int,
    prompt_tokens: int,
    *,
    group_size: int,
    max_new_tokens: int,
    ends: int,
) -> jax.stages.Lowered:
    """The program of `sample` for an abstract policy with shardings, whose devices need
    not be there; not compiled.

    Args:
        policy: Parameters are `jax.ShapeDtypeStruct`s.
        prompts: P.
        prompt_tokens: L.
        group_size: G.
        max_new_tokens: T.
        ends: Number of tokens that end a completion.
    """
    shape: Any = jax.ShapeDtypeStruct
    rows, number = shape((prompts, prompt_tokens), jnp.int32), shape((), jnp.int32)
    # A `jit` of its own: a trace is kept by shapes, whatever it was made for.
    program = jax.jit(
        partial(
            _traced,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            top_k=None,
            top_p=None,
        )
    )
    return program.lower(
        policy,
        rows,
        rows,
        shape((prompts,), jnp.int32),
        shape((prompts,), bool),
        jax.eval_shape(lambda: jax.random.key(0)),
        shape((), jnp.float32),
        shape((ends,), jnp.int32),
        number,
    )


def check_arguments(
    policy: Policy,
    prompt_ids: jax.Array | np.ndarray,
    prompt_mask: jax.Array | np.ndarray,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float | jax.Array,
    top_k: int | None,
    top_p: float | None,
    eos_id: int | Sequence[int] | jax.Array,
    pad_id: int,
    prompt_indices: jax.Array | np.ndarray | None,
    active: jax.Array | np.ndarray | None,
) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]:
    """(prompt_indices [P], active [P]) of a sampler's arguments, those of `sample`.

    Raises:
        ValueError: shapes do not fit, or an argument is outside its range.
    """
    _check_prompts(prompt_ids, prompt_mask)
    check_token_ids("prompt_ids", prompt_ids, policy.config.vocab_size)
    check_token_ids("pad_id", np.asarray(pad_id), policy.config.vocab_size)
    _check_ends(eos_id)
    _check_settings(group_size, max_new_tokens, temperature, top_k, top_p)
    if prompt_indices is None:
        prompt_indices = np.arange(prompt_ids.shape[0])
    if active is None:
        active = np.ones(prompt_ids.shape[0], bool)
    for name, given in (("prompt_indices", prompt_indices), ("active", active)):
        if np.shape(given) != prompt_ids.shape[:1]:
            raise ValueError(
                f"{name} must be [{prompt_ids.shape[0]}], one per prompt, "
                f"got {np.shape(given)}."
            )
    return prompt_indices, active


def _check_prompts(
    prompt_ids: jax.Array | np.ndarray, prompt_mask: jax.Array | np.ndarray
) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.shape != prompt_mask.shape:
        raise ValueError(
            "prompt_ids and prompt_mask must be [P, L] alike, got "
            f"{prompt_ids.shape} and {prompt_mask.shape}."
        )
    if isinstance(prompt_mask, np.ndarray) and not prompt_mask.any(axis=1).all():
        row = int(prompt_mask.any(axis=1).argmin())
        raise ValueError(f"prompt {row} has no token: its mask is 0; leave it out.")


def _check_ends(eos_id: int | Sequence[int] | jax.Array) -> None:
    """ValueError where no end [] or [N] is named; one outside the vocabulary never
    comes."""
    ids = eos_id if isinstance(eos_id, jax.Array) else np.asarray(eos_id)
    if not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"eos_id must be a token or several, -1 for completions that never end, "
            f"got {eos_id}."
        )


def _check_settings(
    group_size: int,
    max_new_tokens: int,
    temperature: float | jax.Array,
    top_k: int | None,
    top_p: float | None,
) -> None:
    for name, value in (("group_size", group_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; "
            "for greedy decoding use top_k=1."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")


def _traced(
    policy: Policy,
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    prompt_indices: jax.Array,
    active: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    eos_id: jax.Array,
    pad_id: jax.Array,
    *,
    group_size: int,
    max_new_tokens: int,
    top_k: int | None,
    top_p: float | None,
) -> Rollouts:
    """The compiled part of `sample`: prefill, then one loop per cache length."""
    per_prompt = prompt_ids, prompt_mask, prompt_indices, active
    prompt_ids, prompt_mask, prompt_indices, active = (
        constrain(x, "prompts") for x in per_prompt
    )
    prompts = split_prompts(prompt_ids, prompt_mask)
    decoder = prefill(policy.module(), prompts, max_new_tokens)
    token_keys = sample_keys(key, prompt_indices, group_size)  # [P, G]

    def step(state: _LoopState) -> _LoopState:
        logits, keys, values = decoder.logits(
            state.token, state.t, state.keys, state.values
        )
        token, logprob = draw_tokens(
            token_keys, state.t, logits / temperature, top_k, top_p
        )
        return state.extended(token, logprob, keys, values, eos_id, pad_id)

    state = _start(prompts, active, policy.config, group_size, max_new_tokens, pad_id)
    for end in cache_lengths(max_new_tokens):
        state = jax.lax.while_loop(
            lambda state, end=end: (state.t < end) & ~state.done.all(),
            step,
            state.with_cache(end),
        )
    return Rollouts(
        prompt_ids, prompt_mask, state.completions, state.mask, state.logprobs
    )


_sample = jax.jit(
    _traced, static_argnames=("group_size", "max_new_tokens", "top_k", "top_p")
)


def sample_keys(key: jax.Array, prompts: jax.Array, group_size: int) -> jax.Array:
    """[P, G] keys, each a function of (key, prompt index, sample index)."""

    def group(i):
        fold = partial(jax.random.fold_in, jax.random.fold_in(key, i))
        return jax.vmap(fold)(jnp.arange(group_size))

    return jax.vmap(group)(prompts)


class _LoopState(NamedTuple):
    """What the sampling loop carries from token to token.

    KV: key-value heads, d: their width, U: length of the cache. Keys are stored
    transposed: so the score product of one token is fast on a CPU.
    """

    t: jax.Array  # [], tokens drawn
    token: jax.Array  # [P, G], the last ones
    done: jax.Array  # [P, G] bool
    keys: Caches  # [P, G, KV, d, U] per layer
    values: Caches  # [P, G, KV, U, d] per layer
    completions: jax.Array  # [P, G, T]
    mask: jax.Array  # [P, G, T] int32
    logprobs: jax.Array  # [P, G, T] float32

    def with_cache(self, length: int) -> "_LoopState":
        """The state with caches lengthened to U = length."""
        cached = ("prompts", "samples", "kv_heads")
        keys = [constrain(_lengthen(x, length, axis=4), *cached) for x in self.keys]
        values = [constrain(_lengthen(x, length, axis=3), *cached) for x in self.values]
        t, token, done, _, _, *rest = self
        token, done, *rest = (
            constrain(x, "prompts", "samples") for x in (token, done, *rest)
        )
        return _LoopState(t, token, done, keys, values, *rest)

    def extended(
        self,
        token: jax.Array,
        logprob: jax.Array,
        keys: Caches,
        values: Caches,
        eos_id: jax.Array,
        pad_id: jax.Array,
    ) -> "_LoopState":
        """The state after one more token: [P, G] drawn with its log-prob."""
        token = jnp.where(self.done, pad_id, token)
        live = ~self.done[..., None]
        logprob = jnp.where(self.done, 0.0, logprob)
        return _LoopState(
            t=self.t + 1,
            token=token,
            done=self.done | is_eos(token, eos_id),
            keys=keys,
            values=values,
            completions=write(self.completions, token[..., None], self.t, axis=2),
            mask=write(self.mask, live.astype(jnp.int32), self.t, axis=2),
            logprobs=write(self.logprobs, logprob[..., None], self.t, axis=2),
        )


def _start(
    prompts: PromptSplit,
    active: jax.Array,
    config: ModelConfig,
    group_size: int,
    max_new_tokens: int,
    pad_id: jax.Array,
) -> _LoopState:
    """The state before the first token: each prompt's last token is the input."""
    shape = len(prompts.last_token), group_size
    heads, n = (*shape, config.num_kv_heads), config.num_layers
    dtype = config.dtype
    return _LoopState(
        t=jnp.zeros((), jnp.int32),
        token=jnp.broadcast_to(prompts.last_token[:, None], shape),
        done=jnp.broadcast_to(~active[:, None], shape),
        keys=[jnp.zeros((*heads, config.head_dim, 0), dtype)] * n,
        values=[jnp.zeros((*heads, 0, config.head_dim), dtype)] * n,
        completions=jnp.full((*shape, max_new_tokens), pad_id),
        mask=jnp.zeros((*shape, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((*shape, max_new_tokens), jnp.float32),
    )


def cache_lengths(max_new_tokens: int) -> list[int]:
    """Lengths U of the caches of a sampling loop, the last being max_new_tokens."""
    lengths, length = [], _FIRST_CACHE
    while length < max_new_tokens:
        lengths.append(length)
        length *= 2
    return [*lengths, max_new_tokens]


def _lengthen(cache: jax.Array, length: int, axis: int) -> jax.Array:
    padding = [(0, 0)] * cache.ndim
    padding[axis] = (0, length - cache.shape[axis])
    return jnp.pad(cache, padding)
