"""Objects that a user makes: found by "module:name" or given in code, and checked."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.errors import ConfigError, a_kind, check_kind, summary, unknown_name
from grpo_jax.models.config import COMPUTATION
from grpo_jax.models.policy import Policy
from grpo_jax.objectives.objective import Objective
from grpo_jax.objectives.presets import OBJECTIVES
from grpo_jax.preconditioner import PromptWeights
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.optimizers import check_read
from grpo_jax.user_code import (
    code_digest,
    digest,
    find_object,
    in_code,
    name_of,
    named_by,
    takes,
)


class Start:
    """A policy to start from, held until it is taken: a run trains a copy."""

    def __init__(self, policy: Policy):
        self._policy: Policy | None = policy

    def take(self) -> Policy:
        """The policy; only once."""
        policy, self._policy = self._policy, None
        assert policy is not None  # a run starts once
        return policy


class Given(NamedTuple):
    """The user's own objects of a run; None where the config says all.

    Attributes:
        objective: An `Objective`.
        weights: `PromptWeights`, or a function of num_prompts that makes them.
        optimizer: Of optax, or a function of the learning rate's schedule.
        policy: Where to start; a `Start` once it is checked.
        sampler: Is called as `gj.sample`.
        on_step: Sees every line of metrics.jsonl, with a handle of the run.
    """

    objective: Objective | None = None
    weights: Any = None
    optimizer: Any = None
    policy: Any = None
    sampler: Callable[..., Any] | None = None
    on_step: Callable[..., Any] | None = None

    def digests(self) -> dict[str, str]:
        """What tells each object from another one; a policy has a file for that."""
        given = self._asdict() | {"policy": None, "on_step": None}
        digests = {name: digest(x) for name, x in given.items() if x is not None}
        if self.on_step is not None:  # what it has collected is no matter of the run's
            digests["on_step"] = code_digest(self.on_step)
        return digests


# Argument of `train` -> the setting that names it, by path.
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "objective": ("objective", "name"),
    "weights": ("weights", "name"),
    "optimizer": ("optimizer", "name"),
    "policy": ("policy",),
    "sampler": ("sampling", "sampler"),
    "on_step": ("log", "on_step"),
}


def given_objects(
    config: TrainConfig, given: Given | None = None, *, starting: bool = True
) -> tuple[TrainConfig, Given]:
    """(the config with the objects' names in it, the objects).

    Args:
        config: A run's; its names of the form module:name are imported.
        given: Objects given in code, in place of what the config names.
        starting: Whether a policy to start from is needed; a run that began has it in a
            file.

    Raises:
        ConfigError: an object cannot be found or is of the wrong kind, or the config
            asks for another one too.
    """
    objects: dict[str, Any] = {}
    for argument, value in (Given() if given is None else given)._asdict().items():
        path = _SETTINGS[argument]
        field, named = ".".join(path), _get(config, path)
        default = _get(TrainConfig(), path)
        if argument == "policy" and not starting:
            continue
        if value is None:
            # Others are named there.
            rows = argument in ("objective", "weights", "optimizer")
            own = ":" in named if rows else named != default
            value = find_object(named, field) if own else None
        else:
            name = name_of(value, argument)
            if argument == "on_step" and config.resume:  # who listens may change
                config, named = _set(config, path, default), default
            if named not in (default, name):
                raise ConfigError(
                    f"{field} is {named!r}, and {argument} was given as an object too; "
                    "leave one of them out."
                )
            if argument != "on_step" or not in_code(name):  # no run depends on it
                config = _set(config, path, name)
        objects[argument] = value
    return _checked(config, objects)


def _checked(config: TrainConfig, objects: dict[str, Any]) -> tuple[TrainConfig, Given]:
    """The same, with every object of its kind, and the policy's config the run's."""
    objective, policy = objects.get("objective"), objects.get("policy")
    if objective is not None:
        check_objective(objective)
    if objects.get("weights") is not None and not callable(objects["weights"]):
        check_weights(objects["weights"])
    if objects.get("optimizer") is not None:
        _check_optimizer_settings(config, objects["optimizer"])
        made(  # once for its errors, before anything is written
            objects["optimizer"],
            optax.GradientTransformation,
            check_optimizer,
            schedule=optax.constant_schedule(1e-6),
        )
    for name in ("sampler", "on_step"):
        if objects.get(name) is not None:
            _check_function(name, objects[name])
    if policy is not None:
        policy = made(policy, Policy, check_policy)
        objects["policy"] = Start(policy)
        config = _with_policy(config, policy)
    return config, Given(**objects)


# Keywords that a sampler is called with; on_step's arguments have no names.
_SAMPLED_BY = (
    "group_size", "max_new_tokens", "key", "temperature", "eos_id", "pad_id",
    "prompt_indices",
)  # fmt: skip
_FUNCTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "sampler": (
        ("policy", "prompt_ids", "prompt_mask"), _SAMPLED_BY, "return gj.Rollouts(...)",
    ),
    "on_step": (("row", "run"), (), "print(row['reward/mean'])"),
}  # fmt: skip


def _check_function(name: str, value: Any) -> None:
    """ConfigError unless it is a function of what a run calls it with."""
    arguments, keywords, body = _FUNCTIONS[name]
    if not takes(value, *arguments, **dict.fromkeys(keywords)):
        listed = ", ".join([*arguments, *(["*"] if keywords else []), *keywords])
        raise ConfigError(
            f"{name} must be a function of ({listed}), got {value!r}; for example\n"
            f"    def {name}({listed}):\n        {body}"
        )


def _with_policy(config: TrainConfig, policy: Policy) -> TrainConfig:
    """The config of a run that starts from the policy: its model, no warm start."""
    if policy.frozen is not None:
        raise ConfigError(
            "policy must be without LoRA factors, got one with them; give the base, "
            "and model.lora_rank."
        )
    asked, plain = config.model, type(config.model)()
    own = ("lora_rank", "lora_alpha", "lora_targets", *COMPUTATION)
    changed = {
        f.name: getattr(asked, f.name)
        for f in dataclasses.fields(asked)
        if getattr(asked, f.name) != getattr(plain, f.name)
    }
    for name, value in changed.items():
        if name not in own and value != getattr(policy.config, name):
            raise ConfigError(
                f"model.{name} is the given policy's own "
                f"({getattr(policy.config, name)!r}), got {value!r}; leave it out."
            )
    model = dataclasses.replace(policy.config, **changed)
    warm = dataclasses.replace(config.warm_start, enabled=False)
    return dataclasses.replace(config, model=model, warm_start=warm)


def _check_optimizer_settings(config: TrainConfig, optimizer: Any) -> None:
    """ConfigError for a setting that an optimizer of the user's does not read."""
    makes = callable(optimizer)  # of the learning rate's schedule
    kept = ("name", "skip_empty")
    if makes:
        kept += ("learning_rate", "schedule", "warmup_steps")
    else:
        check_optimizer(optimizer)
    hint = "" if makes else ", or give a function of `schedule` that makes one"
    fix = f"set it there and leave it out here{hint}"
    check_read(config.optimizer, kept, "an optimizer of your own", fix)


def _get(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _set(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """The config with another value of the setting."""
    if path:
        inner = _set(getattr(config, path[0]), path[1:], value)
        return dataclasses.replace(config, **{path[0]: inner})
    return value


# What an error ends with, for an object of another kind.
_EXAMPLES: Mapping[type, str] = {
    PromptWeights: "call a rule, or write one:\n"
    "    weights = gj.std_weights(power=1.0)\n"
    "    weights = gj.PromptWeights(lambda: (), lambda rewards, state: "
    "(1 - rewards.mean(1), state))",
    optax.GradientTransformation: "give one of optax, with its learning rate:\n"
    "    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))",
    Policy: "load a model, or make one:\n"
    "    policy = gj.load_pretrained(directory)\n"
    "    policy = gj.init_policy(gj.ModelConfig(vocab_size=256), jax.random.key(0))",
}


def made(value: Any, kind: type, check: Callable[[Any], None], **arguments: Any) -> Any:
    """The value, or what it makes where it is a function.

    Args:
        value: One of the kind, or a function of those of the arguments that it names.
        kind: What is wanted.
        check: Raises for another kind.
        arguments: What a function may ask for.

    Raises:
        ConfigError: a function needs something else, or the value is of another kind.
    """
    if not isinstance(value, kind) and callable(value):
        named = named_by(value, arguments)
        try:
            inspect.signature(value).bind(**named)
        except TypeError as error:
            called = getattr(value, "__qualname__", repr(value))
            raise ConfigError(
                f"{called} must give {a_kind(kind)} when it is called with "
                f"{', '.join(arguments) or 'nothing'}: {error}; {_EXAMPLES[kind]}."
            ) from error
        value = value(**named)
    check(value)
    return value


def as_objective(value: Any) -> Objective:
    """The objective, given as one or by its name.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, str):
        if value not in OBJECTIVES:
            raise unknown_name("objective", value, OBJECTIVES)
        return OBJECTIVES[value]
    check_objective(value)
    return value


def check_objective(value: Any) -> None:
    """ConfigError unless the value is an `Objective`."""
    example = (
        'name a row where a name is taken, such as "grpo", or give your own:\n'
        '    objective = dataclasses.replace(gj.OBJECTIVES["grpo"], kl_coef=0.01)'
    )
    check_kind("objective", value, Objective, example)


def check_weights(value: Any) -> None:
    """ConfigError unless the value is a `PromptWeights` that can weigh.

    It is traced as a step calls it, with 3 prompts of 4 samples, which no rule should
    take for each other.
    """
    example = _EXAMPLES[PromptWeights]
    check_kind("weights", value, PromptWeights, example)
    rewards = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    ids = [jax.ShapeDtypeStruct((3,), jnp.int32)] * bool(value.by_prompt)
    called = "weights, called under jit with rewards [3, 4] and what init() gave,"
    try:
        state = jax.eval_shape(value.init)
        weights, after = jax.eval_shape(value.weights, rewards, state, *ids)
        shape, dtype = weights.shape, weights.dtype
    except Exception as error:  # whatever a user's rule does
        raise ConfigError(
            f"{called} must give (weights, state), got {summary(error)}; {example}."
        ) from error
    if shape != (3,) or not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(
            f"{called} must give float weights [3], one per prompt, got {dtype} "
            f"{list(shape)}; {example}."
        )
    if jax.tree.flatten(_types(after)) != jax.tree.flatten(_types(state)):
        raise ConfigError(
            f"{called} must give a state of the same form, {_types(state)}, got "
            f"{_types(after)}."
        )


def _types(state: Any) -> Any:
    """The shapes and dtypes in a rule's state."""
    return jax.tree.map(lambda x: f"{x.dtype.name}{list(x.shape)}", state)


def check_optimizer(value: Any) -> None:
    """ConfigError unless the value is an optax optimizer."""
    kind = optax.GradientTransformation
    check_kind("optimizer", value, kind, _EXAMPLES[kind])


def check_policy(value: Any) -> None:
    """ConfigError unless the value is a `Policy` with parameters."""
    check_kind("policy", value, Policy, _EXAMPLES[Policy])
    if value.params is None:
        raise ConfigError(f"policy has no parameters; {_EXAMPLES[Policy]}.")
