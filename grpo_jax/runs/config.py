"""The settings of a run: frozen records, one comment and one range per field.

Without jax, so that a mistyped flag is answered at once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from grpo_jax.errors import UP_TO_ONE, ConfigError, at_least, check_fields
from grpo_jax.models.config import ModelConfig
from grpo_jax.records import Own, Record
from grpo_jax.runs.optimizers import (
    OPTIMIZER,
    OptimizerConfig,
    check_optimizer_config,
)
from grpo_jax.runs.sinks import check_sinks
from grpo_jax.runs.values import (
    Count,
    Ddof,
    GroupSize,
    Natural,
    NotNegative,
    PolicyTemperature,
    Positive,
    ProbePrompts,
    Seed,
    own,
)

_TASK, _OBJECTIVE = own("a Task", "task"), own("an Objective", "objective")
_WEIGHTS = own("a rule", "weights")
_POLICY, _ON_STEP = own("a policy", "policy"), own("a function", "on_step")
_REWARD = Own("a function of your own is named as module:function")
_SINK = Own(
    "a sink of your own is named as module:function, a function of the run that gives "
    "a function of a row"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(Record):
    """What is asked and how it is scored; an option that a task does not know is an
    error."""

    # chains | gsm8k-expressions | gsm8k | math | countdown | ladder | jsonl, or
    # module:name of your own: a Task, or a function of options that makes one
    name: Annotated[str, _TASK] = "chains"
    path: str | None = None  # the data's file or directory, for tasks that read one
    heldout_path: str | None = None  # a file only evaluated, such as MATH-500's
    train_prompts: Count | None = None  # prompts trained on; default: the task's
    # Prompts only evaluated; default: the task's, 512 at most; 0: all in the file
    heldout_prompts: Natural | None = None
    seed: Seed = 0  # of the split into trained, held-out and warm-start prompts
    # none | qa | r1 | qwen-math | chat; default: chat where the tokenizer has one
    template: str | None = None
    # The system prompt of template chat, for rows without one of their own
    system: str | None = None
    # NAME=VALUE: variables of template chat, such as enable_thinking=false
    template_arguments: tuple[str, ...] = ()
    # Names of control tokens in prompts are spelt out, or kept as these tokens: for
    # data that are in the model's template already (then the default template is none)
    control_tokens: Literal["spell", "keep"] = "spell"
    # NAME=WEIGHT, NAME(option=1)=WEIGHT or module:function=WEIGHT; the first decides
    # what is solved; default: the task's
    rewards: tuple[Annotated[str, _REWARD], ...] = ()
    # Answers count after </think> only; default: anywhere, an unfinished thought's too
    thinking: bool = False
    levels: tuple[int, ...] = ()  # math: 1 to 5; ladder: 1 to 8; default: all
    subjects: tuple[str, ...] = ()  # math: such as Algebra; default: all
    skills: tuple[str, ...] = ()  # ladder: such as add; default: all
    # jsonl: the field of the question, text or a list of messages; a.b: field b in a
    prompt_field: str | None = None
    system_field: str | None = None  # jsonl: the field of each row's system turn
    answer_field: str | None = None  # jsonl: the field of the gold answer
    solution_field: str | None = None  # jsonl: the field of a worked text
    tag_fields: tuple[str, ...] = ()  # jsonl: fields that evaluation is split by
    vocab_size: Annotated[int, at_least(300)] | None = None  # of a tokenizer made here


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Record):
    """A row of the objectives' table (`grpo-jax objectives` prints it), and overrides.

    Every field of a row can be overridden; None takes the row's. `Objective` has their
    ranges, and `grpo-jax train --help` begins with the choices of each axis.
    """

    # Of a row of OBJECTIVES, or module:name of an Objective of your own
    name: Annotated[str, _OBJECTIVE] = "grpo"
    baseline: str | None = None  # what is taken off a reward
    scale: str | None = None  # the prompt weights
    std_eps: NotNegative | None = None  # added to the std
    std_ddof: int | None = None  # 0 population std, 1 sample std
    ratio: str | None = None  # policy over behaviour policy, by token or completion
    surrogate: str | None = None  # the term of a token, with its trust region
    clip: tuple[float | None, float] | None = None  # (low, high); low None: no edge
    dual_clip: float | None = None  # loss at most -dual_clip A where A < 0
    ratio_cap: float | None = None  # the ratio itself is cut here
    mixture: float | None = None  # of the relative ratio
    mask: str | None = None  # distance of probabilities that drops a token
    mask_limit: float | None = None  # of that distance
    hinge: str | None = None  # classifier of the hinge loss
    tau: float | None = None  # of the Fisher-Rao penalty
    token_weight: str | None = None  # factors on tokens
    entropy_coef: float | None = None  # mean entropy taken off the advantage
    entropy_limit: float | None = None  # nats above which a completion has weight 0
    aggregation: str | None = None  # how tokens become a prompt's loss
    first_token_weight: float | None = None  # of a completion's first token
    divergence: str | None = None  # estimator of KL to the starting policy
    # Loss | reward, where it is added after the prompt weights
    kl_in: str | None = None
    kl_coef: NotNegative | None = None  # weight of that KL
    drafts: int | None = None  # per prompt; the best is appended to it
    refills: int | None = None  # times tied groups are sampled again on new prompts
    overlong: str | None = None  # keep | mask | punish completions cut off
    overlong_share: float | None = None  # of T, over which the punishment grows
    tis_cap: float | None = None  # of the weight trainer's pi / sampler's pi
    stop_deviation: float | None = None  # no more updates past mean |ratio - 1|
    history: int | None = None  # iterates whose rollouts are in an update
    disjoint: bool | None = None  # each update of a rollout has its own prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsConfig(Record):
    """The prompt weights: the preconditioner. None: the rule's default."""

    # A rule, or module:name, PromptWeights of your own or a function of the number of
    # trained prompts; objective: the scale of the objective. Rules made of pass rates
    # (group_mean, beta, finite_group, shrunk, posterior) take them from the first
    # reward, 1 or more where solved, and weigh what it pays; other rewards are added
    name: Annotated[str, _WEIGHTS] = "objective"
    power: float | None = None  # weight = std^-power: 0 REINFORCE, 1 GRPO, 2 log-odds
    power_end: float | None = None  # the power at the last step, linear from `power`
    eps: NotNegative | None = None  # added to the std
    ddof: Ddof | None = None  # 0 population std, 1 sample std
    # Of finite_group: whose normalisation is meant
    group_size: Annotated[int, at_least(2)] | None = None
    prior: float | None = None  # posterior, shrunk: pseudo-counts of either outcome
    discount: float | None = None  # posterior: what a visit leaves of older counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Record):
    """How rollouts are made; a step holds prompts x group_size completions."""

    prompts: Count | None = None  # P, prompts per step; default: 16, or 8 of pretrained
    # G, completions per prompt; default: 16, or 8 of a pretrained model
    group_size: GroupSize | None = None
    temperature: PolicyTemperature = 1.0  # of the policy, sampled and trained
    max_prompt_tokens: Count | None = None  # longer prompts are left out; default: none
    max_new_tokens: Count | None = None  # T; default: the task's longest answer and EOS
    # Tokens by name that end a completion, besides those of the model and its template
    stop_tokens: tuple[str, ...] = ()
    # With drafts: how the best one joins its prompt; default: the task's
    refine_template: str | None = None
    # A function, by module:name, that is called as gj.sample and samples elsewhere
    sampler: Annotated[str, own("a sampler", "sampler")] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig(Record):
    """The worker processes that compute rewards by name."""

    workers: Count = 2  # processes
    # Of one check; past it the worker is killed, the reward 0
    timeout_s: Positive = 3.0
    memory_gib: Positive = 2.0  # of each worker
    # Names of environment variables, such as a judge's key, that your reward may read;
    # the values are kept nowhere
    environment: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                # Not the whole text: after the name there may be a secret.
                raise ConfigError(
                    "scoring.environment takes names of environment variables, got "
                    f"{re.split(r'[^A-Za-z_0-9]', name)[0]!r} and more; export the "
                    "variable, and give its name alone."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig(Record):
    """Supervised learning before step 0, stopped by a measured pass rate and cached."""

    enabled: bool = True  # False starts from random parameters
    # Clean learning stops here; default: task's
    target_pass_rate: Annotated[float, UP_TO_ONE] | None = None
    max_steps: Count | None = None  # and here at the latest; default: the task's
    # Steps on spoiled answers after it; default: task's
    noisy_steps: Natural | None = None
    batch_size: Count | None = None  # demonstrations a step; default: the task's
    # Peak, cosine over max_steps; default: the task's
    learning_rate: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Record):
    """Devices along each axis of the mesh; a run may be continued on another mesh."""

    data: Count = 1  # prompts are split, parameters copied
    fsdp: Count = 1  # prompts are split, and parameters with optimizer state
    tensor: Count = 1  # heads, MLP and vocabulary are split; prompts copied


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig(Record):
    """The processes of a run, where there are several: under srun, mpirun and on a TPU
    pod they find each other, else each needs these. They share the run's directory."""

    coordinator: str | None = None  # HOST:PORT of process 0; default: detected, or none
    processes: Count | None = None  # how many there are, beside coordinator
    process: Natural | None = None  # which one this is, from 0, beside coordinator
    join_timeout_s: Count = 300  # for all of them to come
    # A process that died is noticed within it
    heartbeat_s: Annotated[int, at_least(10)] = 100
    timeout_s: Count = 1800  # longer in one phase or for the others, and it ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Record):
    """Pass rates on trained and held-out prompts, exact where one answer is right."""

    every: Natural = 10  # steps; also at the start and at the end; 0: only those two
    # Trained prompts evaluated, beside all held-out ones; default: 256 where one answer
    # is right, else as many of either as max_overhead allows, from 16 to 256
    prompts: Count | None = None
    # Of step time, on average, where completions are sampled and no number is given
    max_overhead: Positive = 0.05
    samples: Count = 1  # of each prompt, at the policy's temperature


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstrumentConfig(Record):
    """Curvature and geometry of prompts' gradients, on a fixed set of probe prompts."""

    # Steps; also at the end; 0: never; default: 40, or at the ends alone if dear
    every: Natural | None = None
    # Also before the first step; default: yes, but for a pretrained model on a CPU,
    # whose first step would wait minutes for it
    at_start: bool | None = None
    max_overhead: Positive = 0.1  # of step time; chooses prompts, and when
    prompts: ProbePrompts | None = None  # default: what max_overhead allows
    # Samples of each, a multiple of 4; default: sampling's, but at least 16 where 8
    # prompts of so many fit, else (and where `prompts` is given) at least 8
    group_size: Annotated[int, at_least(4)] | None = None
    # Steps between comparisons with other prompt weights; 0: never
    counterfactual_every: Natural = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Record):
    """What can be resumed: the latest `keep` and the best on held-out prompts."""

    every: Count = 20  # steps; also at the end and on SIGTERM
    # Also after so many since the last one, or since the start; 0: never
    minutes: NotNegative = 10.0
    keep: Count = 2  # latest ones kept, besides the best
    # The figure of held-out prompts that the best one is chosen by
    best: Literal["pass_rate", "reward"] = "pass_rate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(Record):
    """What is written beside metrics.jsonl."""

    # Steps between entries of samples.jsonl, besides the first step's; 0: never
    samples_every: Natural = 10
    samples_prompts: Count = 3  # prompts per entry
    # Steps between printed lines where there is no terminal; fewer where these take
    # longer than 15 s
    lines_every: Count = 10
    # A function of (row, run), by module:name, that sees every line of metrics.jsonl,
    # and may ask to stop, evaluate or save
    on_step: Annotated[str, _ON_STEP] | None = None
    # Where else lines of metrics.jsonl go: tensorboard, wandb, trackio, or module:name
    # of a function of the run that gives a function of a row; none of them ends a run
    to: tuple[Annotated[str, _SINK], ...] = ()


class StepBatch(NamedTuple):
    """What a step samples."""

    prompts: int  # P
    group_size: int  # G


NEW_BATCH, PRETRAINED_BATCH = StepBatch(16, 16), StepBatch(8, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Record):
    """One run: a policy, a task, an objective, and how long."""

    task: Annotated[TaskConfig, _TASK] = TaskConfig()
    # A directory of config.json, safetensors and tokenizer, or a Hub name; of `model`
    # only compute_dtype, remat, attention and lora_* may then be given
    pretrained: str | None = None
    # A Policy to start from, by module:name, or a function that makes one
    policy: Annotated[str, _POLICY] | None = None

    model: ModelConfig = ModelConfig()
    objective: Annotated[ObjectiveConfig, _OBJECTIVE] = ObjectiveConfig()
    weights: Annotated[WeightsConfig, _WEIGHTS] = WeightsConfig()
    sampling: SamplingConfig = SamplingConfig()
    scoring: ScoringConfig = ScoringConfig()
    optimizer: Annotated[OptimizerConfig, OPTIMIZER] = OptimizerConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    instrument: InstrumentConfig = InstrumentConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    run_dir: str | None = None  # default: runs/TASK-OBJECTIVE-seedN, numbered if taken
    steps: Count = 120  # rollouts; each is updates_per_rollout optimizer updates
    updates_per_rollout: Count = 1  # more than 1: behaviour log-probs recomputed once
    # Tokens of one backward pass on one device; the split is derived. Default: 16384,
    # fewer where memory does not suffice, up to twice as many for a whole group
    micro_batch_tokens: Count | None = None
    # Where the reference policy of a KL term lies: on the devices, or in the memory of
    # their host, from where every step brings it to score and frees it again
    reference_memory: Literal["device", "host"] = "device"
    seed: Seed = 0  # of parameters, order of prompts and sampling
    resume: bool = False  # continue the run in run_dir

    @property
    def batch(self) -> StepBatch:
        """The prompts of a step and the samples of each, as given or by default."""
        default = NEW_BATCH if self.pretrained is None else PRETRAINED_BATCH
        given = self.sampling
        return StepBatch(
            given.prompts or default.prompts, given.group_size or default.group_size
        )

    def __post_init__(self):
        super().__post_init__()
        check_config(self)
        check_vocabulary(self.model)
        _check_lora(self.model)
        check_optimizer_config(self.optimizer)
        _check_distributed(self.distributed)
        check_sinks(self.log.to)
        group = self.instrument.group_size
        if group is not None and group % 4:
            raise ConfigError(
                f"instrument.group_size must be a multiple of 4, got {group}; groups "
                "are cut into equal parts."
            )
        if self.policy is not None and self.pretrained is not None:
            raise ConfigError(
                "policy and pretrained both say where to start; leave one out."
            )
        if self.resume and not self.run_dir:
            raise ConfigError("resume needs the run to continue: give --run-dir DIR.")


def check_config(config: Record) -> None:
    """ConfigError for a number that is not finite or a field that breaks its rule."""
    for name, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, got {value}.")
    check_fields(config, error=ConfigError)


def _leaves(record: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """('sampling.prompts', 16), ... of a nested config."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{where}{field.name}.")
        elif isinstance(value, tuple):
            yield from ((f"{where}{field.name}", x) for x in value)
        else:
            yield f"{where}{field.name}", value


def check_vocabulary(model: ModelConfig) -> None:
    """ConfigError for a vocabulary of negative size."""
    if model.vocab_size < 0:
        got = model.vocab_size
        raise ConfigError(f"model.vocab_size must be at least 0, got {got}.")


def _check_lora(model: ModelConfig) -> None:
    plain = ModelConfig()
    for name in ("lora_alpha", "lora_targets"):
        value = getattr(model, name)
        if not model.lora_rank and value != getattr(plain, name):
            raise ConfigError(
                f"model.{name} changes nothing without LoRA; set model.lora_rank "
                "or leave it out."
            )


def _check_distributed(config: DistributedConfig) -> None:
    coordinator, processes, process = (
        config.coordinator, config.processes, config.process,
    )  # fmt: skip
    if coordinator is None and processes is None and process is None:
        return
    if coordinator is None or processes is None or process is None:
        raise ConfigError(
            "distributed.coordinator, .processes and .process belong together, got "
            f"{coordinator}, {processes}, {process}; give all three, or none."
        )
    if process >= processes:
        raise ConfigError(
            f"distributed.process must be below distributed.processes={processes}, "
            f"got {process}."
        )
