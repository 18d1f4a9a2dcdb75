"""What others call the fields of their rollouts: forms of rows, by name.

Forms of other trainers, as their code writes them: TRL's `GRPOTrainer` with
`log_completions` (`completions/completions_00010.parquet`), verl's `RayPPOTrainer` with
`trainer.rollout_data_dir` (`10.jsonl`), prime-rl's orchestrator, both
`rollouts/step_10/train_rollouts.jsonl` and `step_10/train/effective/traces.jsonl`.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import numpy as np

from grpo_jax.errors import ConfigError, check_kind, unknown_name
from grpo_jax.rewards.rows import Row
from grpo_jax.tasks.templates import TEMPLATES
from grpo_jax.user_code import find_object

_OF_COMPLETIONS = ("logprobs", "mask", "truncated", "advantage")
AUTO = "auto"  # template of prompts that may lack their control tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowForm:
    """The fields of a row of rollouts, "a.b" being field b of the object in field a.

    A row is one completion, or one prompt with a list of completions and lists of what
    belongs to each. Fields other than prompt, completion and rewards may be missing
    from the rows.

    Attributes:
        prompt: Text, token ids, or messages with role and content.
        completion: The same. Of messages, the assistant's are sampled.
        rewards: A field of numbers, or several with weights, of which the sum is taken;
            null or NaN in one of several counts as 0, in all as a missing reward. None:
            every field of numbers that the form does not name, with weight 1.
        logprobs: Of the sampler, one for each token of a completion.
        mask: One for each token of a completion: 1 or true where it was sampled.
        group: What the rows of one group share; rows without it share the tokens of
            their prompt.
        step: The trainer's step.
        truncated: True for a completion that was cut off, so that no EOS is added.
        advantage: The other trainer's; only its order within groups is looked at, to
            warn where it is not that of the rewards.
        template: How a prompt that is text becomes tokens: a name of
            `grpo-jax train --task.template`, where "none" takes the text as it is, with
            names of control tokens as these tokens; or "auto", for text from which the
            control tokens of the chat template may have been left out: they are put
            back where the template explains the text.
        system: The system turn, for template "chat".
        template_arguments: Further variables of the chat template.
        add_end: Whether completions that are text get the token with which the model
            ends them, where they do not end with it: dumps leave it out.
        max_new_tokens: Completions of so many tokens were cut off, and get no end.
        unpack: Makes rows of these fields of a row of another structure.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    rewards: str | Mapping[str, float] | None = "reward"
    logprobs: str = "logprobs"
    mask: str = "mask"
    group: str = "group"
    step: str = "step"
    truncated: str = "truncated"
    advantage: str = "advantage"
    template: str = "none"
    system: str | None = None
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add_end: bool = True
    max_new_tokens: int | None = None
    unpack: Callable[[Row], Iterator[Row]] | None = None

    def __post_init__(self):
        if self.template not in (*TEMPLATES, AUTO):
            raise ConfigError(
                f"template must be one of {', '.join((*TEMPLATES, AUTO))}, got "
                f"{self.template!r}."
            )
        if self.system is not None and self.template != "chat":
            raise ConfigError(
                f"system needs template chat, got template {self.template!r}; leave it "
                "out."
            )
        if not (isinstance(self.rewards, str) or self.rewards is None) and (
            not isinstance(self.rewards, Mapping) or not self.rewards
        ):
            raise ConfigError(
                "rewards must be a field or fields with weights, such as "
                f"{{'accuracy': 1.0, 'format': 0.2}}, got {self.rewards!r}."
            )

    def weights(self) -> Mapping[str, float] | None:
        """Fields of rewards with their weights; None: to be found in the rows."""
        if isinstance(self.rewards, str):
            return {self.rewards: 1.0}
        return self.rewards

    def of_completions(self) -> dict[str, str]:
        """Field that a completion may have -> its name in rows."""
        return {kind: getattr(self, kind) for kind in _OF_COMPLETIONS}

    def optional(self) -> dict[str, str]:
        """Field of the form -> its name in rows, which need not have it."""
        return self.of_completions() | {"group": self.group, "step": self.step}

    def named(self) -> set[str]:
        """Names of all fields but those of rewards."""
        return {*self.optional().values(), self.prompt, self.completion}


def find_form(form: str | RowForm) -> RowForm:
    """The form itself, or that of a name.

    Args:
        form: A RowForm, a key of `ROW_FORMS`, or "module:name" of a RowForm.

    Raises:
        ConfigError: no form has that name.
    """
    if isinstance(form, RowForm):
        return form
    if isinstance(form, str) and ":" in form:
        found = find_object(form, "form")
        check_kind(f"form {form}", found, RowForm, "make it as gj.RowForm(prompt=...)")
        return found
    if not isinstance(form, str) or form not in ROW_FORMS:
        raise unknown_name("form of rows", str(form), ROW_FORMS)
    return ROW_FORMS[form]


def explaining(fields: Collection[str], form: RowForm) -> list[str]:
    """Names of the other trainers' forms that a row with these fields may be of, where
    it lacks what is read in `form`."""
    if {form.prompt, form.completion, *(form.weights() or ())} <= {*fields}:
        return []
    if {"traces", "nodes"} & {*fields}:
        return ["prime-rl"]
    return [
        name
        for name in ("trl", "verl")
        if (other := ROW_FORMS[name]) != form
        and {other.prompt, other.completion, *(other.weights() or ())} <= {*fields}
    ]


def prime_rows(row: Row) -> Iterator[Row]:
    """The rows of a line of prime-rl: of an episode's traces, of one trace, or of a
    rollout in messages.

    Raises:
        ConfigError: a trace is not one sequence of messages.
    """
    if "traces" not in row.values and "nodes" not in row.values:
        yield row
        return
    traces = row.values.get("traces", [row.values])
    run = row.values.get("run")
    for i, trace in enumerate(traces, 1):
        where = row.where if len(traces) == 1 else f"{row.where}, trace {i}"
        if not isinstance(trace, dict) or not isinstance(trace.get("nodes"), list):
            raise ConfigError(f"{where}: expected a trace with a list of nodes.")
        agent = trace.get("agent")
        if isinstance(agent, dict) and agent.get("trainable") is False:
            continue  # a judge's, whose tokens train nothing
        yield Row(where, _of_trace(trace, trace.get("run") or run, where))


def _of_trace(trace: dict[str, Any], run: Any, where: str) -> dict[str, Any]:
    nodes = _path(trace["nodes"], where)
    last = [*nodes, *(trace.get("calls") or [])][-1]  # the calls, where there are any
    values: dict[str, Any] = {
        "reward": _trace_reward(trace.get("rewards"), where),
        "is_truncated": last.get("finish_reason") == "length",
    }
    if isinstance(run, dict) and run.get("step") is not None:
        values["step"] = run["step"]
    ids, mask = _joined(nodes, "token_ids"), _joined(nodes, "mask")
    if not ids:  # sampled through a server that tells no tokens
        sampled = [bool(node.get("sampled")) for node in nodes]
        messages = [node.get("message") for node in nodes]
        first = _first(sampled, where)
        return values | {"prompt": messages[:first], "completion": messages[first:]}
    if len(mask) != len(ids):
        raise ConfigError(
            f"{where}: the nodes have {len(ids)} token_ids and {len(mask)} entries of "
            "mask; they must be as many."
        )
    logprobs = _joined(nodes, "logprobs")
    if len(logprobs) != sum(map(bool, mask)):
        raise ConfigError(
            f"{where}: the nodes have {len(logprobs)} logprobs for "
            f"{sum(map(bool, mask))} sampled tokens; they must be as many."
        )
    of_sampled = iter(logprobs)
    spread = [next(of_sampled) if one else 0.0 for one in mask]
    first = _first(mask, where)
    parts = {"completion": ids, "mask": mask, "logprobs": spread}
    parts = {name: part[first:] for name, part in parts.items()}
    return values | {"prompt": ids[:first]} | parts


def _path(nodes: list[Any], where: str) -> list[dict[str, Any]]:
    """The nodes from the root to the one leaf."""
    parents = {node.get("parent") for node in nodes}
    leaves = [i for i in range(len(nodes)) if i not in parents]
    if len(leaves) != 1:
        raise ConfigError(
            f"{where}: the trace has {len(leaves)} branches; a completion is one "
            "sequence of tokens: leave traces with compaction or subagents out."
        )
    path, at = [], leaves[0]
    while at is not None:
        path.append(nodes[at])
        at = nodes[at].get("parent")
    return path[::-1]


def _joined(nodes: list[dict[str, Any]], field: str) -> list[Any]:
    return [x for node in nodes for x in node.get(field) or ()]


def _first(sampled: list[Any], where: str) -> int:
    if not any(sampled):
        raise ConfigError(f"{where}: no token of the trace was sampled.")
    return [bool(x) for x in sampled].index(True)


def _trace_reward(rewards: Any, where: str) -> Any:
    """The weighted sum of a trace's named rewards; None where scoring did not run."""
    if not isinstance(rewards, dict):
        raise ConfigError(f"{where}: field 'rewards' must be an object of rewards.")
    total: Any = None
    for value in rewards.values():
        if isinstance(value, dict):
            score = value.get("score")
            weight = value.get("weight")
            weight = 1 if weight is None else weight
            value = (
                None if score is None else number(score, where) * number(weight, where)
            )
        if value is not None:
            total = number(value, where) + (total or 0.0)
    return total


def number(value: Any, where: str) -> float:
    """A finite number of a row, or NaN for null and NaN.

    Raises:
        ConfigError: it is anything else.
    """
    if value is None:
        return float("nan")
    if isinstance(value, bool | int | float | Decimal | np.number | np.bool_):
        result = float(value)
        if not np.isinf(result):
            return result
    given = "the text " * isinstance(value, str) + f"{value!r:.100}"
    raise ConfigError(f"{where}: expected a finite number or null, got {given}.")


ROW_FORMS: Mapping[str, RowForm] = MappingProxyType(
    {
        "rows": RowForm(),  # also what `Rollouts.to_rows` makes
        "samples": RowForm(
            completion="completions", rewards="rewards"
        ),  # samples.jsonl
        # Both leave control tokens out of the texts, and so the EOS.
        "trl": RowForm(rewards=None, template=AUTO),
        "verl": RowForm(
            prompt="input", completion="output", rewards="score", template=AUTO
        ),
        "prime-rl": RowForm(truncated="is_truncated", unpack=prime_rows),
    }
)
