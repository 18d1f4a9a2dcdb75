"""Rows of somebody else's rollouts to arrays [P, G, T], and back."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import whole_number
from grpo_jax.errors import ConfigError
from grpo_jax.rewards.rows import Row
from grpo_jax.rollouts.encoding import pad_left
from grpo_jax.rollouts.forms import RowForm, find_form
from grpo_jax.rollouts.lengths import bucket
from grpo_jax.rollouts.records import Record, records_by_step
from grpo_jax.rollouts.sources import as_rows, files_of, read_file
from grpo_jax.rollouts.transcripts import Completion, Encoder, Value, kind_of
from grpo_jax.rollouts.types import Rollouts, completion_lengths

_MOST_LOGPROB = 0.01  # nats above 0 that a server's rounding explains


class StepRollouts(NamedTuple):
    """The rollouts of a step, and what was made of its rows."""

    step: int | None  # None: the rows name none
    rollouts: Rollouts
    ended: int  # completions, texts, that got the token with which the model ends
    completions: int
    rewards: Mapping[str, float]  # fields that a reward is the sum of, with weights


class Sample(NamedTuple):
    """One completion in tokens."""

    ids: list[int]
    mask: list[int]
    logprobs: list[float]  # NaN where not known, 0 outside the mask
    record: Record
    end: int  # tokens at its end that were added to a text, 0 or 1


# ---- from rows to rollouts


def one_step(
    rows: Sequence[Row],
    tokenizer: Any,
    form: str | RowForm,
    step: int | None,
    group_size: int | None,
    pad_to: int | None,
) -> Rollouts:
    """`Rollouts.from_rows` of rows that know their place."""
    return chosen_step(rows, tokenizer, form, step, group_size, pad_to).rollouts


def chosen_step(
    rows: Sequence[Row],
    tokenizer: Any,
    form: str | RowForm,
    step: int | None = None,
    group_size: int | None = None,
    pad_to: int | None = None,
) -> StepRollouts:
    """The step chosen, or the only one, as `one_step`."""
    if step is not None:
        step = whole_number("step", step, 0)
    found = find_form(form)
    steps, weights = records_by_step(rows, found)
    if step is None and len(steps) > 1:
        raise ConfigError(
            f"the rows are of {len(steps)} steps ({_some(steps)}); choose one with "
            "step=N (--step N), or take them one by one with Rollouts.by_step "
            "(--every-step)."
        )
    if step is not None and step not in steps:
        raise ConfigError(f"no row is of step {step}; there are {_some(steps)}.")
    if step is None:
        step = next(iter(steps))
    records = steps[step]
    return _of_step(step, records, weights, tokenizer, found, group_size, pad_to)


def each_step(
    source: str | PathLike[str] | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    form: str | RowForm,
    group_size: int | None,
    pad_to: int | None,
) -> Iterator[StepRollouts]:
    """`Rollouts.by_step`."""
    found = find_form(form)
    if isinstance(source, str | PathLike):
        parts = (read_file(file) for file in files_of(source, ".jsonl", ".parquet"))
    else:
        parts = iter([as_rows(source)])
    seen: set[int | None] = set()
    for rows in parts:
        steps, weights = records_by_step(rows, found)
        for step, records in steps.items():
            if step in seen:
                named = "without a step" if step is None else f"of step {step}"
                raise ConfigError(
                    f"{records[0].where}: rows {named} were in an earlier file too; "
                    "put the rows of a step into one file."
                )
            seen.add(step)
            yield _of_step(step, records, weights, tokenizer, found, group_size, pad_to)


def _some(steps: Iterable[int | None]) -> str:
    shown = ["none" if step is None else str(step) for step in steps]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def _of_step(
    step: int | None,
    records: Sequence[Record],
    weights: Mapping[str, float],
    tokenizer: Any,
    form: RowForm,
    group_size: int | None,
    pad_to: int | None,
) -> StepRollouts:
    encoder = Encoder(tokenizer, form)
    places = [record.where for record in records]
    prompts = encoder.prompts([record.prompt for record in records], places)
    vocab_size = None if tokenizer is None else len(tokenizer)
    for ids, where in zip(prompts, places, strict=True):
        _check_ids(ids, vocab_size, f"{where}: the prompt")
    samples = [_sample(encoder, record, vocab_size) for record in records]
    _check_all_or_none(records)
    groups: dict[Any, list[int]] = {}
    for i, record in enumerate(records):
        key = tuple(prompts[i]) if record.group is None else record.group
        groups.setdefault(key, []).append(i)
        if prompts[i] != prompts[groups[key][0]]:
            raise ConfigError(
                f"{record.where}: its prompt is not that of {places[groups[key][0]]}, "
                f"which is of the same {form.group} {record.group}; a group has one."
            )
    packed = _pack(
        [prompts[members[0]] for members in groups.values()],
        [[samples[i] for i in members] for members in groups.values()],
        _pad_id(tokenizer),
        group_size,
        pad_to,
    )
    _check_groups(packed, len(records))
    _warn_of_order(groups.values(), records, summed=len(weights) > 1)
    ended = sum(sample.end for sample in samples)
    rollouts = jax.tree.map(jnp.asarray, packed)
    return StepRollouts(step, rollouts, ended, len(records), weights)


def _sample(encoder: Encoder, record: Record, vocab_size: int | None) -> Sample:
    """A record's completion in tokens, cut after its last sampled one."""
    where = record.where
    made = encoder.completion(record.prompt, record.completion, record.truncated, where)
    for field in (record.logprobs, record.mask):
        if field is not None and not isinstance(field, list):
            raise ConfigError(f"{where}: expected a list, got {field!r:.100}.")
        if field is not None and made.end and len(field) == len(made.ids) - 1:
            # The end that was added is none of the sampled tokens.
            made = Completion(made.ids[:-1], made.mask[:-1], 0)
    ids, mask = made.ids, made.mask
    if not ids:
        raise ConfigError(f"{where}: the completion has no token; leave the row out.")
    _check_ids(ids, vocab_size, f"{where}: the completion")
    if record.mask is not None:
        _check_length("mask", record.mask, ids, record.completion, where)
        mask = _bits(record.mask, where)
    if not any(mask):
        raise ConfigError(
            f"{where}: no token of the completion was sampled, its mask is 0; leave "
            "the row out."
        )
    logprobs = [np.nan if one else 0.0 for one in mask]
    if record.logprobs is not None:
        _check_length("logprobs", record.logprobs, ids, record.completion, where)
        logprobs = _logprobs(record.logprobs, mask, where)
    n = len(mask) - mask[::-1].index(1)
    return Sample(ids[:n], mask[:n], logprobs[:n], record, made.end * (n == len(ids)))


def _check_ids(ids: Sequence[int], vocab_size: int | None, what: str) -> None:
    if not ids:
        raise ConfigError(f"{what} has no token; correct the row or leave it out.")
    least, most = min(ids), max(ids)
    if least < 0 or (vocab_size is not None and most >= vocab_size):
        limit = "at least 0" if vocab_size is None else f"in [0, {vocab_size})"
        raise ConfigError(
            f"{what} must have token ids {limit}, the tokenizer's, got ids from "
            f"{least} to {most}; is it the tokenizer of the model that sampled?"
        )


def _check_length(
    name: str, values: list[Any], ids: list[int], completion: Value, where: str
) -> None:
    if len(values) == len(ids):
        return
    advice = (
        "give the completion as the token ids that were sampled: text may be cut into "
        "other tokens"
        if kind_of(completion) != "ids"
        else "it needs one for each token"
    )
    raise ConfigError(
        f"{where}: {name} has {len(values)} entries and the completion {len(ids)} "
        f"tokens; {advice}."
    )


def _bits(values: list[Any], where: str) -> list[int]:
    """A mask of 0 and 1, or of truth values, as 0 and 1."""
    wrong = [x for x in values if isinstance(x, str) or x not in (0, 1)]
    if wrong:
        raise ConfigError(
            f"{where}: mask must be 0 or 1 everywhere, got {wrong[0]!r:.100}."
        )
    return [int(x) for x in values]


def _logprobs(values: list[Any], mask: list[int], where: str) -> list[float]:
    """The log-probs of sampled tokens, 0 on the others."""
    sampled = np.asarray(mask, bool)
    try:
        given = np.asarray(values, float)  # null is NaN
    except (TypeError, ValueError):
        given = np.array([x if isinstance(x, float) else np.nan for x in values])
    wrong = ~(given <= _MOST_LOGPROB) & sampled | np.isinf(given)
    if given.shape == sampled.shape and not wrong.any():
        return np.where(sampled, given, 0.0).tolist()
    first = int(wrong.argmax())
    raise ConfigError(
        f"{where}, token {first}: logprobs of sampled tokens must be finite and at "
        f"most 0 (nats), got {values[first]!r:.100}; leave the field out where they "
        "are not known."
    )


def _check_all_or_none(records: Sequence[Record]) -> None:
    without = [record for record in records if record.logprobs is None]
    if without and len(without) < len(records):
        raise ConfigError(
            f"{without[0].where}: logprobs are missing, as in {len(without)} of "
            f"{len(records)} completions, and others have them; all must or none."
        )


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def _pack(
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sample]],
    pad_id: int,
    group_size: int | None,
    pad_to: int | None,
) -> Rollouts:
    """Host arrays of P prompts and their groups."""
    if pad_to is not None and pad_to < 1:
        raise ConfigError(f"pad_to must be at least 1, got {pad_to}.")
    largest = max(map(len, groups))
    size = largest if group_size is None else group_size
    if size < largest:
        raise ConfigError(
            f"group_size must be at least {largest}, the largest group, got {size}."
        )

    def padded(n: int) -> int:
        return bucket(n) if pad_to is None else -(-n // pad_to) * pad_to

    ids, prompt_mask = pad_left(prompts, padded(max(map(len, prompts))), pad_id)
    longest = max(len(sample.ids) for group in groups for sample in group)
    shape = len(groups), size, padded(longest)
    completions = np.full(shape, pad_id, np.int32)
    mask, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    rewards = np.full(shape[:2], np.nan, np.float32)
    for p, group in enumerate(groups):
        for j, sample in enumerate(group):
            g, n = j * size // len(group), len(sample.ids)  # spread evenly
            completions[p, g, :n], mask[p, g, :n] = sample.ids, sample.mask
            logprobs[p, g, :n] = sample.logprobs
            rewards[p, g] = sample.record.reward
    return Rollouts._make(
        (ids, prompt_mask, completions, mask, logprobs, rewards, None)
    )


def _check_groups(rollouts: Rollouts, count: int) -> None:
    rewards = np.asarray(rollouts.scored_rewards)
    if np.isfinite(rewards).sum(1).max() >= 2:
        return
    raise ConfigError(
        f"no prompt has two completions with a reward ({count} completions of "
        f"{len(rewards)} prompts, {int(np.isfinite(rewards).sum())} rewards): a group "
        "of one has no baseline. Rows are grouped by the tokens of their prompt; name "
        "a field that a group shares with form=gj.RowForm(group=...)."
    )


def _warn_of_order(
    groups: Iterable[list[int]], records: Sequence[Record], summed: bool
) -> None:
    """Warns where the other trainer's advantages rise as our rewards fall, and of a sum
    of several fields also where they are no linear function of it."""
    for members in groups:
        reward = np.array([records[i].reward for i in members])
        advantage = np.array([records[i].advantage for i in members])
        both = np.subtract.outer(reward, reward) * np.subtract.outer(
            advantage, advantage
        )
        how = "do not grow with" if (both < -1e-6).any() else ""
        if summed and not how and not _linear(reward, advantage):
            how = "are no linear function of"
        if how:
            warnings.warn(
                f"{records[members[0]].where}: within its group the file's advantages "
                f"{how} the sum of its rewards; give the weights that the trainer had "
                "with form=gj.RowForm(rewards={field: weight, ...}), or --rewards "
                "NAME=WEIGHT.",
                stacklevel=5,
            )
            return


def _linear(reward: np.ndarray, advantage: np.ndarray) -> bool:
    """Whether advantages are a linear function of rewards, as those of a group that was
    centred and scaled; of two or fewer that are known they always are."""
    known = np.isfinite(reward) & np.isfinite(advantage)
    x, y = reward[known], advantage[known]
    if len(x) < 3 or np.ptp(y) < 1e-6:
        return True
    if np.ptp(x) == 0:
        return False
    left = y - np.polyval(np.polyfit(x, y, 1), x)
    return bool(np.abs(left).max() < 0.01 * np.ptp(y))


# ---- from rollouts to rows


def rows_of(rollouts: Rollouts) -> list[dict[str, Any]]:
    """`Rollouts.to_rows`."""
    host: Any = jax.tree.map(np.asarray, rollouts)
    mask = host.completion_mask.astype(bool)
    lengths = completion_lengths(mask)
    holes = bool((mask.sum(-1) != lengths).any())
    known = not np.isnan(host.behaviour_logprobs[mask]).any()
    rows = []
    for p, g in np.argwhere(lengths > 0).tolist():
        n = int(lengths[p, g])
        row: dict[str, Any] = {
            "group": p,
            "prompt": host.prompts[p][host.prompt_mask[p] > 0].tolist(),
            "completion": host.completions[p, g, :n].tolist(),
        }
        if host.rewards is not None:
            reward = float(host.rewards[p, g])
            row["reward"] = None if np.isnan(reward) else reward
        if known:
            row["logprobs"] = host.behaviour_logprobs[p, g, :n].tolist()
        if holes:
            row["mask"] = mask[p, g, :n].astype(int).tolist()
        rows.append(row)
    return rows
