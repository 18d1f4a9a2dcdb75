"""Everything a run can be told: frozen records, one comment per field, strict loading.

No jax here: `--help` and a mistyped flag should answer at once.
"""

import dataclasses
import math
from typing import Any, Literal

from grpo_jax.errors import ConfigError, check_choice
from grpo_jax.models.config import ModelConfig

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is asked and how it is scored; an option that a task does not know is an
    error."""

    # chains | gsm8k-expressions | gsm8k | math | countdown | jsonl
    name: str = "chains"
    path: str | None = None  # the data's file or directory, for tasks that read one
    heldout_path: str | None = None  # a file only evaluated, such as MATH-500's
    train_prompts: int | None = None  # prompts trained on; default: the task's
    # Prompts only evaluated; default: the task's, 512 at most; 0: all in the file
    heldout_prompts: int | None = None
    seed: int = 0  # of the split into trained, held-out and warm-start prompts
    # none | qa | r1 | qwen-math | chat; default: chat where the tokenizer has one
    template: str | None = None
    system: str | None = None  # the system prompt of template chat
    # NAME=WEIGHT, NAME(option=1)=WEIGHT or module:function=WEIGHT; the first decides
    # what is solved; default: the task's
    rewards: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()  # math: 1 to 5; default: all
    subjects: tuple[str, ...] = ()  # math: such as Algebra; default: all
    prompt_field: str | None = None  # jsonl: the field of the question
    answer_field: str | None = None  # jsonl: the field of the gold answer
    solution_field: str | None = None  # jsonl: the field of a worked text
    tag_fields: tuple[str, ...] = ()  # jsonl: fields that evaluation is split by
    vocab_size: int | None = None  # of a tokenizer made from the task's own text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A row of the objectives' table (`grpo-jax objectives` prints it), and overrides.

    Every field of a row can be overridden; None takes the row's.
    """

    name: str = "grpo"
    baseline: str | None = None  # none | mean | leave_one_out
    scale: str | None = None  # none | std | batch_std | group_mean | beta | ...
    std_eps: float | None = None  # added to the std
    std_ddof: int | None = None  # 0 population std, 1 sample std
    ratio: str | None = None  # none | token | sequence_mean | sequence_sum | ...
    surrogate: str | None = None  # logp | is | ppo | hard_clip | cispo | ...
    clip: tuple[float | None, float] | None = None  # (low, high); low None: no edge
    dual_clip: float | None = None  # loss at most -dual_clip A where A < 0
    ratio_cap: float | None = None  # the ratio itself is cut here
    mixture: float | None = None  # of the relative ratio
    mask: str | None = None  # tv | kl
    mask_limit: float | None = None  # distance past which a token is dropped
    hinge: str | None = None  # ratio | log | sqrt
    tau: float | None = None  # of the Fisher-Rao penalty
    token_weight: str | None = None  # none | conflict | nthr
    entropy_coef: float | None = None  # mean entropy taken off the advantage
    entropy_limit: float | None = None  # nats above which a completion has weight 0
    aggregation: str | None = None  # sequence_mean_token_mean | constant | ...
    first_token_weight: float | None = None  # of a completion's first token
    divergence: str | None = None  # k1 | k2 | k3
    kl_in: str | None = None  # loss | reward
    kl_coef: float | None = None  # weight of KL to the starting policy
    drafts: int | None = None  # per prompt; the best is appended to it
    refills: int | None = None  # times tied groups are sampled again on new prompts
    overlong: str | None = None  # keep | mask | punish completions cut off
    overlong_share: float | None = None  # of T, over which the punishment grows
    tis_cap: float | None = None  # of the weight trainer's pi / sampler's pi
    stop_deviation: float | None = None  # no more updates past mean |ratio - 1|
    history: int | None = None  # iterates whose rollouts are in an update
    disjoint: bool | None = None  # each update of a rollout has its own prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The prompt weights: the preconditioner. None: the rule's own default."""

    # objective (as its row says) | unit | std | batch_std | group_mean | beta |
    # finite_group | shrunk (posterior of one group) | posterior (over visits)
    name: str = "objective"
    power: float | None = None  # weight = std^-power: 0 REINFORCE, 1 GRPO, 2 log-odds
    power_end: float | None = None  # the power at the last step, linear from `power`
    eps: float | None = None  # added to the std
    ddof: int | None = None  # 0 population std, 1 sample std
    group_size: int | None = None  # finite_group: whose normalisation is meant
    prior: float | None = None  # posterior, shrunk: pseudo-counts of either outcome
    discount: float | None = None  # posterior: what a visit leaves of older counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How rollouts are made; a step holds prompts x group_size completions."""

    prompts: int = 16  # P, prompts per step
    group_size: int = 16  # G, completions per prompt
    temperature: float = 1.0  # of the policy, in sampling and in training
    max_prompt_tokens: int | None = None  # longer prompts are left out; default: none
    max_new_tokens: int | None = None  # T; default: the task's longest answer and EOS
    # With drafts: how the best one joins its prompt; default: the task's
    refine_template: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """The worker processes that compute rewards by name."""

    workers: int = 2  # processes
    timeout_s: float = 3.0  # of one check; past it the worker is killed, the reward 0
    memory_gib: float = 2.0  # of each worker


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
class MeshConfig:
    """Devices along each axis of the mesh; a run may be continued on another mesh."""

    data: int = 1  # prompts are split, parameters copied
    fsdp: int = 1  # prompts are split, and parameters with Adam's moments
    tensor: int = 1  # heads, MLP and vocabulary are split; prompts copied


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of a run, where there are several: under srun, mpirun and on a TPU
    pod they find each other, else every one is told. They share the run's directory."""

    coordinator: str | None = None  # HOST:PORT of process 0; default: found, or alone
    processes: int | None = None  # how many there are, beside coordinator
    process: int | None = None  # which one this is, from 0, beside coordinator
    join_timeout_s: int = 300  # for all of them to come
    heartbeat_s: int = 100  # a process that died is noticed within it
    timeout_s: int = 1800  # longer in one phase or for the others, and it ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Pass rates on trained and held-out prompts, exact where one answer is right."""

    every: int = 10  # steps; also at the start and at the end; 0: only those two
    prompts: int = 256  # trained prompts looked at (held-out ones: all)
    samples: int = 1  # of each prompt, at the policy's temperature


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstrumentConfig:
    """Curvature and geometry of prompts' gradients, on a fixed set of probe prompts."""

    every: int = 40  # steps; also at the start and at the end; 0: never
    # Of step time, on average; chooses how many probe prompts there are
    max_overhead: float = 0.1
    prompts: int | None = None  # probe prompts; default: what max_overhead allows
    # Samples of each, a multiple of 4; default: sampling's, at least 8
    group_size: int | None = None
    # Steps between looks at what other weightings would have done; 0: never
    counterfactual_every: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What can be resumed: the latest `keep` and the best on held-out prompts."""

    every: int = 20  # steps; also at the end and on SIGTERM
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
    # A directory of config.json, safetensors and tokenizer, or a Hub name; of `model`
    # only compute_dtype, remat and lora_* may then be given
    pretrained: str | None = None
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    weights: WeightsConfig = WeightsConfig()
    sampling: SamplingConfig = SamplingConfig()
    scoring: ScoringConfig = ScoringConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    instrument: InstrumentConfig = InstrumentConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    run_dir: str | None = None  # default: runs/TASK-OBJECTIVE-seedN, numbered if taken
    steps: int = 120  # rollouts; each is updates_per_rollout optimizer updates
    updates_per_rollout: int = 1  # more than 1: behaviour log-probs recomputed once
    # Tokens of one backward pass on one device; the split is derived
    micro_batch_tokens: int = 16384
    seed: int = 0  # of parameters, order of prompts and sampling
    resume: bool = False  # continue the run in run_dir

    def __post_init__(self):
        leaves = _check_ranges(self)
        for name in ("optimizer.b1", "optimizer.b2"):
            if not 0 <= leaves[name] < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {leaves[name]}.")
        check_choice("optimizer.schedule", self.optimizer.schedule, SCHEDULES)
        _check_distributed(self.distributed)
        plain = ModelConfig()
        for name in ("lora_alpha", "lora_targets"):
            value = getattr(self.model, name)
            if not self.model.lora_rank and value != getattr(plain, name):
                raise ConfigError(
                    f"model.{name} changes nothing without LoRA; set model.lora_rank "
                    "or leave it out."
                )
        group = self.instrument.group_size
        if group is not None and group % 4:
            raise ConfigError(
                f"instrument.group_size must be a multiple of 4, got {group}; groups "
                "are cut into equal parts."
            )
        target = self.warm_start.target_pass_rate
        if target is not None and not 0 < target <= 1:
            raise ConfigError(
                f"warm_start.target_pass_rate must be in (0, 1], got {target}."
            )
        if self.resume and not self.run_dir:
            raise ConfigError("resume needs the run to continue: give --run-dir DIR.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What a policy is asked, how often, and where the answers go."""

    pretrained: str | None = None  # the policy: a directory or a Hub name; or
    run_dir: str | None = None  # a run's, whose task is then the default
    step: int | None = None  # of the run; default: its newest checkpoint
    task: TaskConfig = TaskConfig(heldout_prompts=0)
    part: Literal["heldout", "train"] = "heldout"  # of the task's prompts
    prompts: int | None = None  # only so many of them, drawn by seed; default: all
    greedy: bool = True  # one answer of each prompt by greedy decoding
    samples: int = 0  # k sampled answers of each prompt, for avg@k and pass@k; 0: none
    pass_at: tuple[int, ...] = ()  # the k's of pass@k; default: 1, 2, 4, ... samples
    temperature: float = 1.0  # of the samples
    top_k: int | None = None  # samples are drawn from the k most likely tokens
    top_p: float | None = None  # or from the fewest that have this much probability
    max_new_tokens: int | None = None  # default: the run's, or the task's longest
    max_prompt_tokens: int | None = None  # longer prompts are left out; default: none
    rows: int = 64  # completions sampled at a time
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    scoring: ScoringConfig = ScoringConfig()
    seed: int = 0  # of the samples
    output: str | None = None  # a directory; an interrupted evaluation goes on there

    def __post_init__(self):
        if bool(self.pretrained) == bool(self.run_dir):
            raise ConfigError(
                "eval needs one policy: give --pretrained DIR or --run-dir DIR."
            )
        if self.step is not None and not self.run_dir:
            raise ConfigError("step is a run's: give it with --run-dir.")
        _check_ranges(self)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}.")
        if not self.greedy and not self.samples:
            raise ConfigError("nothing to evaluate: give --samples K or --greedy.")
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                raise ConfigError(
                    f"pass_at must be between 1 and samples={self.samples}, got {k}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Supervised learning of a task's solutions, saved as a model directory."""

    output: str  # the directory to write: config.json, safetensors, tokenizer
    pretrained: str | None = None  # what to start from; default: a new `model`
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    max_prompt_tokens: int | None = None  # longer prompts are left out; default: none
    max_new_tokens: int | None = None  # longer solutions are left out; default: 99 %
    seed: int = 0  # of parameters and of the order of demonstrations

    def __post_init__(self):
        _check_ranges(self)
        if not self.warm_start.enabled:
            raise ConfigError("warm_start.enabled is what warmup is for; leave it out.")


_AT_LEAST = {
    "steps": 1, "updates_per_rollout": 1, "micro_batch_tokens": 1, "seed": 0,
    "task.seed": 0, "task.train_prompts": 1, "task.heldout_prompts": 0,
    "objective.kl_coef": 0, "objective.std_eps": 0, "model.vocab_size": 0,
    "sampling.prompts": 1, "sampling.group_size": 2, "sampling.max_prompt_tokens": 1,
    "sampling.max_new_tokens": 1, "optimizer.warmup_steps": 0, "optimizer.eps": 0,
    "optimizer.clip_norm": 0, "optimizer.weight_decay": 0, "warm_start.max_steps": 1,
    "warm_start.noisy_steps": 0, "warm_start.batch_size": 1, "evaluation.every": 0,
    "evaluation.prompts": 1, "evaluation.samples": 1, "task.vocab_size": 300,
    "scoring.workers": 1, "instrument.every": 0, "instrument.prompts": 2,
    "instrument.group_size": 4,
    "instrument.counterfactual_every": 0, "weights.eps": 0,
    "weights.group_size": 2,
    "checkpoint.every": 1, "checkpoint.keep": 1, "log.samples_every": 0,
    "log.samples_prompts": 1, "log.lines_every": 1,
    "mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1,
    "distributed.processes": 1, "distributed.process": 0,
    "distributed.join_timeout_s": 1, "distributed.heartbeat_s": 10,
    "distributed.timeout_s": 1,
    # of eval and warmup
    "samples": 0, "rows": 1, "prompts": 1, "max_new_tokens": 1, "max_prompt_tokens": 1,
    "top_k": 1, "step": 0,
}  # fmt: skip
_POSITIVE = (
    "instrument.max_overhead", "sampling.temperature", "optimizer.learning_rate",
    "warm_start.learning_rate", "scoring.timeout_s", "scoring.memory_gib",
    "temperature",
)  # fmt: skip
_WHY = {
    "sampling.group_size": "; a group of one has no baseline",
    "sampling.temperature": "; it is part of the policy that is trained",
    "temperature": "; greedy decoding is --greedy",
    "instrument.prompts": "; one prompt has no angle to another",
}


def _check_distributed(config):
    given = config.coordinator, config.processes, config.process
    if given != (None,) * 3 and None in given:
        raise ConfigError(
            "distributed.coordinator, .processes and .process belong together, got "
            f"{', '.join(map(str, given))}; give all three, or none."
        )
    if config.processes is not None and config.process >= config.processes:
        raise ConfigError(
            f"distributed.process must be below distributed.processes="
            f"{config.processes}, got {config.process}."
        )


def _leaves(record, where=""):
    """('sampling.prompts', 16), ... of a nested config."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{where}{field.name}.")
        elif isinstance(value, tuple):
            yield from ((f"{where}{field.name}", x) for x in value)
        else:
            yield f"{where}{field.name}", value


def _check_ranges(record) -> dict[str, Any]:
    """The leaves of a config, every number of which is in its range."""
    leaves = dict(_leaves(record))
    for name, value in leaves.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, got {value}.")
        least, why = _AT_LEAST.get(name), _WHY.get(name, "")
        if least is not None and value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}{why}.")
        if name in _POSITIVE and value is not None and not value > 0:
            raise ConfigError(f"{name} must be positive, got {value}{why}.")
        if name in ("seed", "task.seed") and value >= 2**63:
            raise ConfigError(f"{name} must be below 2**63, got {value}.")
    return leaves
