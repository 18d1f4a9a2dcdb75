"""The settings of `grpo-jax eval` and `grpo-jax warmup`, as a run's in config.py."""

import dataclasses
from typing import Annotated, Literal

from grpo_jax.errors import UP_TO_ONE, ConfigError, at_least, positive
from grpo_jax.models.config import ModelConfig
from grpo_jax.records import Dtype, Record
from grpo_jax.runs.config import (
    ScoringConfig,
    TaskConfig,
    WarmStartConfig,
    check_config,
    check_vocabulary,
)
from grpo_jax.runs.values import Count, Natural, SampleTemperature, Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Record):
    """What a policy is asked, how often, and where the answers go."""

    pretrained: str | None = None  # the policy: a directory or a Hub name; or
    run_dir: str | None = None  # a run's, whose task is then the default
    step: Natural | None = None  # of the run; default: its newest checkpoint
    task: TaskConfig = TaskConfig(heldout_prompts=0)
    part: Literal["heldout", "train"] = "heldout"  # of the task's prompts
    prompts: Count | None = None  # only so many of them, drawn by seed; default: all
    greedy: bool = True  # one answer of each prompt by greedy decoding
    # K sampled answers of each prompt, for avg@k and pass@k; 0: none
    samples: Natural = 0
    pass_at: tuple[int, ...] = ()  # the k's of pass@k; default: 1, 2, 4, ... samples
    temperature: SampleTemperature | None = None  # default: the run's, or 1
    top_k: Count | None = None  # samples are drawn from the k most likely tokens
    # Or from the fewest that have this much probability
    top_p: Annotated[float, UP_TO_ONE] | None = None
    max_new_tokens: Count | None = None  # default: the run's, or the task's longest
    # Tokens by name that end an answer, besides those of the model or of the run
    stop_tokens: tuple[str, ...] = ()
    max_prompt_tokens: Count | None = None  # longer prompts are left out; default: none
    # Completions sampled at a time. In bfloat16 some answers depend on it, so
    # there an interrupted evaluation goes on with no other number.
    rows: Count = 64
    # default: the run's; of a model stored in bfloat16, that on accelerators; float32
    compute_dtype: Annotated[Literal["float32", "bfloat16"], Dtype()] | None = None
    scoring: ScoringConfig = ScoringConfig()
    seed: Seed = 0  # of the samples
    output: str | None = None  # a directory; an interrupted evaluation goes on there

    def __post_init__(self):
        super().__post_init__()
        if self.pretrained and self.run_dir:
            got = f"pretrained={self.pretrained!r} and run_dir={self.run_dir!r}"
            raise ConfigError(f"eval needs one policy, got {got}; leave one out.")
        if not self.pretrained and not self.run_dir:
            raise ConfigError(
                "eval needs one policy: give pretrained, a model's directory, or "
                "run_dir, a run's (--pretrained DIR or --run-dir DIR)."
            )
        if self.step is not None and not self.run_dir:
            raise ConfigError("step is a run's: give it with --run-dir.")
        check_config(self)
        if not self.greedy and not self.samples:
            raise ConfigError("nothing to evaluate: give --samples K or --greedy.")
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                raise ConfigError(
                    f"pass_at must be between 1 and samples={self.samples}, got {k}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupConfig(Record):
    """Supervised learning of a task's solutions, saved as a model directory."""

    output: str  # the directory to write: config.json, safetensors, tokenizer
    pretrained: str | None = None  # what to start from; default: a new `model`
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    max_prompt_tokens: Count | None = None  # longer prompts are left out; default: none
    max_new_tokens: Count | None = None  # longer solutions are left out; default: 99 %
    seed: Seed = 0  # of parameters and of the order of demonstrations

    def __post_init__(self):
        super().__post_init__()
        check_config(self)
        check_vocabulary(self.model)
        if not self.warm_start.enabled:
            raise ConfigError("warm_start.enabled must be true here; leave it out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookConfig(Record):
    """Whose gradients are measured on which rollouts."""

    rollouts: str  # a .jsonl or .parquet file, or a directory of such files
    # The policy that sampled them: a directory or a Hub name, where {step} stands for
    # the step; or
    pretrained: str | None = None
    adapter: str | None = None  # a LoRA adapter of PEFT's form, on top of it
    run_dir: str | None = None  # a run's, of its checkpoint nearest to the rollouts'
    # Whose fields the rows have: rows (ours), trl, verl, prime-rl, or module:name of a
    # gj.RowForm of your own
    form: str = "rows"
    # Fields that a completion's reward is the sum of, NAME or NAME=WEIGHT; default: the
    # form's, which for trl are all numbers
    rewards: tuple[str, ...] = ()
    # Texts of so many tokens were cut off: they get no end, as other texts do
    max_new_tokens: Count | None = None
    step: Natural | None = None  # which one, of rollouts of several steps
    every_step: bool = False  # each of them, as a series
    # Measured at most, of each step
    prompts: Annotated[int, at_least(2, "; the instrument compares them")] | None = 32
    # What gradients are taken of: all parameters, new LoRA factors (an adapter's own),
    # or all of the last layers
    parameters: Literal["all", "lora", "last-layers"] = "all"
    layers: Count = 4  # of last-layers
    lora_rank: Count = 16  # of new factors
    # That the rollouts were sampled at; default: the run's, or 1
    temperature: Annotated[float, positive()] | None = None
    # default: the run's; of a model stored in bfloat16, that on accelerators; float32
    compute_dtype: Annotated[Literal["float32", "bfloat16"], Dtype()] | None = None
    micro_batch_tokens: Count = 16384  # in one pass, about
    seed: Seed = 0  # of new factors, and of the sums that gradients are kept as
    output: str = "look"  # the directory to write look.json and look.html to

    def __post_init__(self):
        super().__post_init__()
        if bool(self.pretrained) == bool(self.run_dir):
            raise ConfigError(
                "look needs the policy that sampled the rollouts: give --pretrained "
                "DIR, a model's directory, or --run-dir DIR, a run's."
            )
        if self.adapter and self.run_dir:
            raise ConfigError("adapter goes with pretrained; a run has its own.")
        if self.seed and self.run_dir:
            raise ConfigError("seed goes with pretrained; a run has its own.")
        if self.every_step and self.step is not None:
            raise ConfigError("step names one, and every_step asks for all: leave one.")
        plain = LookConfig.__dataclass_fields__
        for name, kind in (("layers", "last-layers"), ("lora_rank", "lora")):
            if self.parameters != kind and getattr(self, name) != plain[name].default:
                raise ConfigError(f"{name} is of --parameters {kind}; leave it out.")
        if self.adapter and self.lora_rank != plain["lora_rank"].default:
            raise ConfigError("lora_rank is of new factors; an adapter has its own.")
        check_config(self)
