"""Everything a run can be told: frozen records, one comment per field, strict loading.

No jax here: `--help` and a mistyped flag should answer at once.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from grpo_jax.errors import ConfigError, nearest
from grpo_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is asked and how it is scored."""

    name: str = "chains"  # chains | gsm8k-expressions
    path: str | None = None  # the data's file or directory, for tasks that read one
    train_prompts: int | None = None  # prompts trained on; default: the task's
    heldout_prompts: int | None = None  # prompts only evaluated; default: the task's
    seed: int = 0  # of the split into trained, held-out and warm-start prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A row of the objectives' table, and overrides of its numbers."""

    name: str = "grpo"  # reinforce | rloo | grpo | dr_grpo
    kl_coef: float | None = (
        None  # weight of KL to the starting policy; default: the row's
    )
    clip: tuple[float, float] | None = None  # (low, high); default: the row's
    std_eps: float | None = None  # added to the std; default: the row's
    std_ddof: int | None = None  # 0 population std, 1 sample std; default: the row's


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How rollouts are made; a step holds prompts x group_size completions."""

    prompts: int = 16  # P, prompts per step
    group_size: int = 16  # G, completions per prompt
    temperature: float = 1.0  # of the policy, in sampling and in training
    max_prompt_tokens: int | None = (
        None  # longer prompts are an error; default: no limit
    )
    max_new_tokens: int | None = None  # T; default: the task's longest answer and EOS


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW behind a global-norm clip."""

    learning_rate: float = 3e-4  # peak
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after warm-up
    warmup_steps: int = 0  # optimizer updates of linear warm-up
    weight_decay: float = 0.0  # decoupled, on matrices only
    b1: float = 0.9  # Adam's decay of the mean
    b2: float = 0.999  # Adam's decay of the square
    eps: float = 1e-8  # Adam's
    clip_norm: float = 1.0  # global gradient norm kept below this; 0: no clipping


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Supervised learning before step 0, stopped by a measured pass rate and cached."""

    enabled: bool = True  # False starts from random parameters
    target_pass_rate: float | None = None  # clean learning stops here; default: task's
    max_steps: int | None = None  # and here at the latest; default: the task's
    noisy_steps: int | None = None  # steps on spoiled answers after it; default: task's
    batch_size: int | None = None  # demonstrations a step; default: the task's
    learning_rate: float | None = (
        None  # peak, cosine over max_steps; default: the task's
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Pass rates on trained and held-out prompts, exact where one answer is right."""

    every: int = 10  # steps; also at the start and at the end; 0: only those two
    prompts: int = 256  # trained prompts looked at (held-out ones: all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstrumentConfig:
    """The geometry of per-prompt gradients on a fixed set of probe prompts."""

    every: int = 20  # steps; also at the start and at the end; 0: never
    prompts: int = 16  # probe prompts, fixed over the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What can be resumed: the latest `keep` and the best on held-out prompts."""

    every: int = 25  # steps; also at the end and on SIGTERM
    keep: int = 2  # latest ones kept, besides the best


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written beside metrics.jsonl."""

    samples_every: int = 10  # steps between entries of samples.jsonl; 0: never
    samples_prompts: int = 3  # prompts per entry
    lines_every: int = 10  # steps between printed lines where there is no terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: a policy, a task, an objective, and how long."""

    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampling: SamplingConfig = SamplingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    instrument: InstrumentConfig = InstrumentConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    run_dir: str | None = None  # default: runs/TASK-OBJECTIVE-seedN, numbered if taken
    steps: int = 120  # rollouts; each is updates_per_rollout optimizer updates
    updates_per_rollout: int = 1  # more than 1: behaviour log-probs recomputed once
    micro_batch_tokens: int = 16384  # tokens of one backward pass; the split is derived
    seed: int = 0  # of parameters, order of prompts and sampling
    resume: bool = False  # continue the run in run_dir

    def __post_init__(self):
        s, positive = self.sampling, {"steps": self.steps}
        positive["sampling.prompts"] = s.prompts
        positive["updates_per_rollout"] = self.updates_per_rollout
        positive["micro_batch_tokens"] = self.micro_batch_tokens
        positive["checkpoint.every"] = self.checkpoint.every
        positive["checkpoint.keep"] = self.checkpoint.keep
        positive["evaluation.prompts"] = self.evaluation.prompts
        positive["instrument.prompts"] = self.instrument.prompts
        positive["log.samples_prompts"] = self.log.samples_prompts
        positive["log.lines_every"] = self.log.lines_every
        for name in ("max_prompt_tokens", "max_new_tokens"):
            positive[f"sampling.{name}"] = getattr(s, name)
        for name in ("train_prompts", "heldout_prompts"):
            positive[f"task.{name}"] = getattr(self.task, name)
        for name in ("max_steps", "batch_size"):
            positive[f"warm_start.{name}"] = getattr(self.warm_start, name)
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        for name, value in {
            "optimizer.warmup_steps": self.optimizer.warmup_steps,
            "optimizer.clip_norm": self.optimizer.clip_norm,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "evaluation.every": self.evaluation.every,
            "instrument.every": self.instrument.every,
            "log.samples_every": self.log.samples_every,
            "warm_start.noisy_steps": self.warm_start.noisy_steps or 0,
            "seed": self.seed,
        }.items():
            if value < 0:
                raise ConfigError(f"{name} must not be negative, got {value}.")
        if s.group_size < 2:
            raise ConfigError(
                f"sampling.group_size must be at least 2, got {s.group_size}; a group "
                "of one has no baseline."
            )
        if not s.temperature > 0:
            raise ConfigError(
                f"sampling.temperature must be positive, got {s.temperature}; it is "
                "part of the policy that is trained."
            )
        if not self.optimizer.learning_rate > 0:
            raise ConfigError(
                "optimizer.learning_rate must be positive, "
                f"got {self.optimizer.learning_rate}."
            )
        target = self.warm_start.target_pass_rate
        if target is not None and not 0 < target <= 1:
            raise ConfigError(
                f"warm_start.target_pass_rate must be in (0, 1], got {target}."
            )
        if self.resume and not self.run_dir:
            raise ConfigError("resume needs the run to continue: give --run-dir DIR.")


def to_dict(config: Any) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: Any, base: Any = None, where: str = ""):
    """A `cls` from nested dicts, over `base`; strict about keys and types.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a value of another type.
    """
    base = cls() if base is None else base
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the config'} must be a mapping, got {values!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    changes = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            raise ConfigError(
                f"unknown config key {name!r}; {nearest(key, fields)}"
                f"keys here: {', '.join(fields)}."
            )
        if dataclasses.is_dataclass(fields[key]):
            changes[key] = from_dict(fields[key], value, getattr(base, key), f"{name}.")
        else:
            changes[key] = _coerce(fields[key], value, name)
    try:
        return dataclasses.replace(base, **changes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error


def _coerce(kind, value, name):
    """A value of a file as the field's type; YAML reads 1e-5 as a string."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise ConfigError(
            f"{name} must be one of {', '.join(typing.get_args(kind))}, got {value!r}."
        )
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(_coerce(k, v, name) for k, v in zip(kinds, value, strict=True))
        raise ConfigError(f"{name} must be {len(kinds)} values, got {value!r}.")
    if kind is float and isinstance(value, int | float | str):
        try:
            if not isinstance(value, bool):
                return float(value)
        except ValueError:
            pass  # reported below, with every other value of the wrong type
    if type(value) is kind:
        return value
    raise ConfigError(f"{name} must be a {kind.__name__}, got {value!r}.")


def load_config_file(path: str) -> TrainConfig:
    """A TrainConfig from a .yaml, .yml or .json file."""
    file = Path(path)
    if file.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"--config must be a .yaml, .yml or .json file, got {path}.")
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}.") from error
    if file.suffix == ".json":
        try:
            return from_dict(TrainConfig, json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from error
    import yaml

    try:
        return from_dict(TrainConfig, yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}.") from error


def differences(old: dict, new: dict, where: str = "") -> list[str]:
    """'field: old -> new' for every leaf that differs between two config dicts."""
    rows = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            rows += differences(a, b, f"{where}{key}.")
        elif a != b:
            rows.append(f"{where}{key}: {a!r} -> {b!r}")
    return rows
