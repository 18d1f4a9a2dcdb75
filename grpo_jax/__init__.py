"""grpo_jax: critic-free policy optimisation of language models, in JAX.

    g  =  mean_p  w_p * g_p        g_p: the policy gradient of prompt p, centred rewards

One [P] vector of prompt weights is the whole difference between the methods at the
centre of the family: w_p = 1 is REINFORCE, w_p = 1 / (std_p + eps) is GRPO. Everything
here computes that vector, applies it, or measures what it does.

Shapes: P prompts, G group_size, L prompt tokens, T completion tokens, V vocab, D width.
Rollouts are [P, G, T] everywhere: the group is an axis.
"""

import importlib

from grpo_jax.compiler_flags import set_compiler_flags as _set_compiler_flags
from grpo_jax.errors import has_the_whole_install as _has_the_whole_install
from grpo_jax.errors import needs_the_whole_install as _needs_the_whole_install

_set_compiler_flags()

# The modules that need jax, optax and numpy alone.
_MATHS = (
    "advantages", "preconditioner", "pull_back", "prompt_weights", "logprobs",
    "objectives", "diagnostics",
)  # fmt: skip

_HOMES = {
    "grpo_jax.advantages": (
        "inverse_std",
        "centred_advantages",
        "leave_one_out_advantages",
        "whitened_advantages",
        "expected_group_std",
        "overlong_punishment",
    ),
    "grpo_jax.preconditioner": (
        "PromptWeights",
        "std_weights",
        "unit_weights",
        "scale_by_prompt_weights",
        "scale_by_group_std",
        "mean_over_prompts",
        "apply_weights",
    ),
    "grpo_jax.pull_back": ("weighted_value_and_grad",),
    "grpo_jax.prompt_weights": (
        "PEER_STD",
        "batch_std_weights",
        "group_mean_weights",
        "beta_weights",
        "finite_group_weights",
        "posterior_weights",
    ),
    "grpo_jax.objectives.objective": ("Objective",),
    "grpo_jax.objectives.presets": ("OBJECTIVES",),
    "grpo_jax.objectives.loss": (
        "per_prompt_losses",
        "policy_loss",
    ),
    "grpo_jax.objectives.token_weights": (
        "conflict_weights",
        "nthr_weights",
        "overlong_weights",
        "truncated_importance_weights",
        "dense_step_weights",
    ),
    "grpo_jax.objectives.surrogates": ("relative_ratio",),
    "grpo_jax.diagnostics.curvature": (
        "directional_derivatives",
        "prompt_slope",
        "prompt_curvature",
    ),
    "grpo_jax.diagnostics.counterfactual": (
        "Counterfactual",
        "counterfactual_updates",
    ),
    "grpo_jax.diagnostics.sketch": (
        "gradient_sketch",
        "sketch_gram",
        "exact_gram",
        "gradient_hash",
    ),
    "grpo_jax.diagnostics.geometry": (
        "PromptGeometry",
        "prompt_geometry",
        "parts_geometry",
    ),
    "grpo_jax.diagnostics.phases": (
        "Phase",
        "Thresholds",
        "phase",
    ),
    "grpo_jax.logprobs": ("token_logprobs",),
    "grpo_jax.models.config": ("ModelConfig",),
    "grpo_jax.models.policy": (
        "Policy",
        "init_policy",
        "add_lora",
        "merge_lora",
    ),
    "grpo_jax.models.forward": ("next_token_logits",),
    "grpo_jax.models.lora": ("save_adapter",),
    "grpo_jax.models.hub": (
        "load_tokenizer",
        "eos_ids",
    ),
    "grpo_jax.models.pretrained": (
        "load_pretrained",
        "save_pretrained",
    ),
    "grpo_jax.rollouts.types": ("Rollouts",),
    "grpo_jax.rollouts.forms": (
        "ROW_FORMS",
        "RowForm",
    ),
    "grpo_jax.rollouts.checks": (
        "check_rollouts",
        "warn_if_unlikely",
        "with_logprobs",
    ),
    "grpo_jax.rollouts.encoding": ("pad_left",),
    "grpo_jax.rollouts.sampling": ("sample",),
    "grpo_jax.rollouts.server_sampler": ("ServerSampler",),
    "grpo_jax.rollouts.logprobs": ("completion_logprobs",),
    "grpo_jax.records": ("from_dict",),
    "grpo_jax.rewards.types": (
        "Example",
        "Reward",
    ),
    "grpo_jax.rewards.scoring": ("verify",),
    "grpo_jax.tasks.types": (
        "Task",
        "WarmStart",
    ),
    "grpo_jax.tasks.registry": ("load_task",),
    "grpo_jax.tasks.tokenizers": (
        "character_tokenizer",
        "train_tokenizer",
    ),
    "grpo_jax.runs.config": (
        "TrainConfig",
        "TaskConfig",
        "ObjectiveConfig",
        "WeightsConfig",
        "SamplingConfig",
        "ScoringConfig",
        "OptimizerConfig",
        "WarmStartConfig",
        "MeshConfig",
        "DistributedConfig",
        "EvaluationConfig",
        "InstrumentConfig",
        "CheckpointConfig",
        "LogConfig",
    ),
    "grpo_jax.runs.command_configs": (
        "EvalConfig",
        "LookConfig",
        "WarmupConfig",
    ),
    "grpo_jax.commands.evaluate": ("evaluate",),
    "grpo_jax.commands.export": ("export",),
    "grpo_jax.commands.look": (
        "Look",
        "look",
    ),
    "grpo_jax.commands.warmup": ("warm_up",),
    "grpo_jax.training.handle": ("RunHandle",),
    "grpo_jax.training.learner": ("Learner",),
    "grpo_jax.training.loop": ("TrainResult",),
    "grpo_jax.training.run": ("train",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    # Looked up on first use: the maths should not pay for the trainer's imports.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")
    with _needs_the_whole_install(f"gj.{name}"):
        home = importlib.import_module(_HOME_OF[name])
    value = globals()[name] = getattr(home, name)
    return value


def __dir__():
    # `help` and completion get every name they find: none that would raise.
    if _has_the_whole_install():
        return __all__
    return [name for name in __all__ if _HOME_OF[name].split(".")[1] in _MATHS]
